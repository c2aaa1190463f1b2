//! The sans-IO core that decides what leaves: comparator and translations.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
