//! The sans-IO state machine of checkpoint, heartbeat and failover.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
