//! The seam between the worker and whatever carries frames to the clients.
//!
//! Invariants: nothing here blocks; a frame leaves whole or not at all.
//!
//! Does not know about guests, roles or comparison.

#[cfg(test)]
mod conformance;
mod rtnetlink;
mod share;
mod sink;
mod socket;
mod tap;
#[cfg(test)]
mod testing;
mod timer;
mod xdp;

use std::collections::VecDeque;
use std::io;

use colo_bpf::Mac;
use colo_compare::Token;

use crate::frame::{FramePool, slot_bytes_for};

pub use share::{LinkFrame, LinkShare};
pub use sink::Sink;
pub use socket::SocketNic;
pub use tap::{Tap, TapError, TapSnapshot, TapStats};
pub use xdp::{
    XdpAbilities, XdpNic, XdpNicConfig, XdpNicError, XdpNicMode, XdpNicSnapshot, XdpNicStats,
};

/// What became of a frame handed to [`Nic::send`].
#[derive(Debug)]
#[must_use = "a full NIC gives the frame back"]
pub enum Sent {
    /// The NIC has it, and gives its slot back when it is done with it.
    Done,
    /// The NIC has no room now: try again later.
    Full(Token),
    /// Refused for good (interface down, frame too long): lost, as on a wire.
    Refused(io::Error),
}

/// What the NIC lets through to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Everything.
    Open,
    /// The guest's address, broadcast and multicast.
    Guest(Mac),
    /// Nothing: a secondary before its promotion (rule 24).
    DropAll,
}

/// A NIC that the worker polls.
pub trait Nic: Send {
    /// For logs and reports.
    fn name(&self) -> &str;

    /// How it works, for logs and reports: "tap", "af_xdp, driver, copy, 4 queues".
    fn describe(&self) -> String;

    /// Gets to know the slots, once, before anything else: a NIC that shares memory with the kernel
    /// registers their area here.
    fn start(&mut self, frames: &mut FramePool) -> io::Result<()> {
        let _ = frames;
        Ok(())
    }

    /// Takes the frames that are waiting, `max` at most, as long as there are slots. A frame longer
    /// than a slot is cut off.
    fn receive(
        &mut self,
        frames: &mut FramePool,
        out: &mut VecDeque<Token>,
        max: usize,
    ) -> io::Result<()>;

    /// Sends one whole frame. It may stay in a queue until [`Nic::flush`].
    fn send(&mut self, frames: &mut FramePool, token: Token) -> Sent;

    /// Ends a batch: makes the kernel look at what was queued, and gives back the slots of what has
    /// been sent.
    fn flush(&mut self, frames: &mut FramePool) -> io::Result<()> {
        let _ = frames;
        Ok(())
    }

    /// Adds what to wait for: frames if `wants_frames`, room to send if `wants_room`.
    fn poll_fds(&self, wants_frames: bool, wants_room: bool, fds: &mut Vec<libc::pollfd>);

    /// Largest payload behind the Ethernet header.
    fn mtu(&self) -> u16;

    /// Size of the slots that it works best with.
    fn slot_bytes(&self) -> usize {
        slot_bytes_for(self.mtu())
    }

    /// Names and values of what the NIC and the kernel below it have counted.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// Replaces the filter, for frames that arrive from now on.
    fn set_filter(&mut self, filter: Filter) -> io::Result<()>;

    /// Whether it has a link, as of the last [`Nic::flush`].
    fn has_link(&self) -> bool {
        true
    }

    /// Lets the link's frames through as well, to whoever holds what this gives; `None`: this is not `interface`, or
    /// it cannot.
    fn share_link(
        &mut self,
        frames: &mut FramePool,
        interface: &str,
    ) -> Option<io::Result<LinkShare>> {
        let _ = (frames, interface);
        None
    }

    /// Takes the link's frames that are waiting, until `out` has `max`.
    fn receive_link(&mut self, frames: &mut FramePool, out: &mut VecDeque<LinkFrame>, max: usize) {
        let _ = (frames, out, max);
    }

    /// Takes slots back that [`Nic::receive_link`] gave, or others for them.
    fn take_link_slots(&mut self, frames: &mut FramePool, slots: &mut Vec<u32>) {
        slots.drain(..).for_each(|slot| frames.give_back(slot));
    }

    /// Gives back all slots it has; it is not used afterwards.
    fn recall(&mut self, frames: &mut FramePool) {
        let _ = frames;
    }
}

/// Fills slots from a descriptor that gives one frame a read.
fn read_frames(
    frames: &mut FramePool,
    out: &mut VecDeque<Token>,
    max: usize,
    mut read: impl FnMut(&mut [u8]) -> io::Result<usize>,
) -> io::Result<()> {
    for _ in 0..max.min(frames.free_slots()) {
        let mut failed = None;
        let token = frames.fill(|slot| read(slot).map_err(|e| failed = Some(e)).ok());
        out.extend(token);
        match failed {
            Some(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            Some(e) => return Err(e),
            None => {}
        }
    }
    Ok(())
}

/// What to wait for at a descriptor; nothing if neither is wanted, so that errors do not wake.
fn poll_for(fd: std::os::fd::RawFd, wants_frames: bool, wants_room: bool) -> Option<libc::pollfd> {
    let events = [(wants_frames, libc::POLLIN), (wants_room, libc::POLLOUT)];
    let events = events
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .fold(0, |all, (_, event)| all | event);
    (events != 0).then_some(libc::pollfd {
        fd,
        events,
        revents: 0,
    })
}
