//! The services of the demo guest: TCP/IP through smoltcp, echo, HTTP/1.1 and a RESP key-value
//! store.
//!
//! Invariants: what an application writes into a connection, and the order in which commands of
//! different connections are executed, depend only on the order of the input frames, never on
//! batching or timing (the clock and the random source behind [`Platform`] excepted, which are the
//! guest's natural divergences). No client input can make it panic, and every buffer has a limit.
//!
//! Does not touch hardware: frames come and go through [`FrameDevice`], time and entropy through
//! [`Platform`].
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

extern crate alloc;

mod arena;
mod conn;
mod demux;
mod flow;
mod hash;
mod http;
mod kv;
mod neighbors;
mod outbox;
mod pages;
mod patience;
mod resp;
mod server;
mod sessions;
mod world;

pub use flow::flow_number;
pub use neighbors::link_local;
pub use pages::page_byte;
pub use patience::Patience;
pub use server::{Addresses, FrameDevice, Limits, Need, Server};
pub use world::Platform;
