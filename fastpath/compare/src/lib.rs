//! The sans-IO core that decides what leaves: comparator and translations.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod frames;

pub use frames::{Frames, HEADER_MAX, Token};
