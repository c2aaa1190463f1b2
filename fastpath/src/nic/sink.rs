//! A NIC with nothing behind it, for benchmarks: what is sent is counted and gone.
//!
//! Does not receive.

use std::collections::VecDeque;
use std::io;

use colo_compare::{Frames, Token};

use crate::frame::FramePool;

use super::{Filter, Nic, Sent};

/// Takes everything.
#[derive(Clone, Copy, Debug)]
pub struct Sink {
    mtu: u16,
}

impl Sink {
    /// For frames with this much payload.
    pub fn new(mtu: u16) -> Self {
        Self { mtu }
    }
}

impl Nic for Sink {
    fn name(&self) -> &str {
        "sink"
    }

    fn describe(&self) -> String {
        "sink".to_owned()
    }

    fn receive(
        &mut self,
        _frames: &mut FramePool,
        _out: &mut VecDeque<Token>,
        _max: usize,
    ) -> io::Result<()> {
        Ok(())
    }

    fn send(&mut self, frames: &mut FramePool, token: Token) -> Sent {
        frames.release(token);
        Sent::Done
    }

    fn poll_fds(&self, _wants_frames: bool, _wants_room: bool, _fds: &mut Vec<libc::pollfd>) {}

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn set_filter(&mut self, _filter: Filter) -> io::Result<()> {
        Ok(())
    }
}
