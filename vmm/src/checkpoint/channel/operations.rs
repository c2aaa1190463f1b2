//! Operations of the ring on buffers: a buffer is handed over, and comes back when the kernel is done with it.
//!
//! Invariants: while the kernel may touch a buffer it is in `held` and nobody can reach it; one that was sent with
//! SEND_ZC comes back only after its last notification (rule 15); at the end operations are waited for, and memory
//! that the kernel does not let go of is never unmapped.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::types::Fixed;
use io_uring::{cqueue, opcode, squeue};

use super::bulk::{self, Bulk};
use super::error::ChannelError;
use super::landing::Landing;
use super::memory::Buffer;
use super::ring::Ring;
use super::wake::Waker;

/// From <linux/io_uring.h>; the crate does not export them.
const IORING_SEND_ZC_REPORT_USAGE: u16 = 1 << 3;
const IORING_NOTIF_USAGE_ZC_COPIED: u32 = 1 << 31;
/// How long the end waits for the kernel.
const DRAIN_MAX: Duration = Duration::from_secs(2);

/// What an operation does, in the topmost bits of its user data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// A send on this stream.
    Send(usize),
    /// A receive on this stream.
    Receive(usize),
    /// Waiting for the eventfd.
    Wake,
}

/// What the kernel said.
#[derive(Debug)]
pub(super) enum Completion {
    /// An operation has ended.
    Done {
        /// Which one.
        what: What,
        /// The number of its buffer.
        index: u32,
        /// Bytes.
        result: io::Result<usize>,
    },
    /// The kernel is done with the memory of a SEND_ZC.
    Notified {
        /// On which stream.
        stream: usize,
        /// The number of its buffer.
        index: u32,
        /// It had made a copy.
        copied: bool,
    },
}

/// Where received bytes go, in this order.
#[derive(Debug)]
pub(super) struct Places {
    /// Into the buffer.
    pub payload: Range<usize>,
    /// Then into this, behind so many bytes that are there.
    pub landing: Option<Landing>,
    /// See there.
    pub landed: usize,
    /// At last into the buffer again.
    pub header: Range<usize>,
}

/// A buffer inside operations.
#[derive(Debug, Default)]
struct Held {
    buffer: Option<Buffer>,
    /// What is sent behind the buffer's first bytes.
    bulk: Bulk,
    /// What is received elsewhere than into the buffer.
    landing: Option<Landing>,
    /// Of the buffer to be sent, if there is a bulk.
    head_bytes: usize,
    /// For the kernel to read at the next submission.
    vectors: Vec<libc::iovec>,
    message: Option<Box<libc::msghdr>>,
    /// Completions and notifications to come.
    pending: u32,
}

/// The ring with everything that is under way.
#[derive(Debug)]
pub(super) struct Operations {
    ring: Ring,
    held: Vec<Held>,
    /// Completions (not notifications) to come.
    under_way: u32,
    wake: Waker,
    wake_index: u32,
}

impl Operations {
    /// On these sockets; buffers have numbers below `buffers`, `registered` is the memory to register, `wake_buffer`
    /// takes what is read from the eventfd.
    pub(super) fn new(
        sockets: &[RawFd],
        buffers: usize,
        registered: libc::iovec,
        wake: Waker,
        wake_buffer: Buffer,
    ) -> Result<Self, ChannelError> {
        let mut files = sockets.to_vec();
        files.push(wake.as_raw_fd());
        let at_once = (2 * files.len()) as u32;
        let outstanding = at_once + 2 * buffers as u32;
        let ring = Ring::new(at_once, outstanding, &files, registered)?;
        let wake_index = wake_buffer.index();
        let mut held = Vec::new();
        held.resize_with(buffers, Held::default);
        let mut operations = Self {
            ring,
            held,
            under_way: 0,
            wake,
            wake_index,
        };
        operations
            .watch(sockets.len(), wake_buffer)
            .map_err(|source| ChannelError::Ring {
                what: "watch the eventfd",
                source,
            })?;
        Ok(operations)
    }

    /// SEND_ZC can be asked for.
    pub(super) fn can_zero_copy(&self) -> bool {
        self.ring.zero_copy && self.ring.registered
    }

    /// The send buffers are registered.
    pub(super) fn registered(&self) -> bool {
        self.ring.registered
    }

    /// How often the ring was entered.
    pub(super) fn enters(&self) -> u64 {
        self.ring.enters
    }

    /// Hands over a buffer to be sent; [`Self::send_range`] follows.
    pub(super) fn hold(&mut self, buffer: Buffer) -> u32 {
        let index = buffer.index();
        self.held[index as usize].buffer = Some(buffer);
        index
    }

    /// The same, with bytes that lie elsewhere behind the buffer's first `head_bytes`.
    pub(super) fn hold_with(&mut self, buffer: Buffer, head_bytes: usize, bulk: &mut Bulk) -> u32 {
        let index = self.hold(buffer);
        let held = &mut self.held[index as usize];
        held.head_bytes = head_bytes;
        std::mem::swap(&mut held.bulk, bulk);
        index
    }

    /// No memory outside the buffers is under way.
    pub(super) fn has_no_bulk(&self) -> bool {
        self.held.iter().all(|held| held.bulk.length() == 0)
    }

    /// The buffer, unless the kernel may still read it.
    pub(super) fn take(&mut self, index: u32) -> Option<Buffer> {
        let held = &mut self.held[index as usize];
        if held.pending > 0 {
            return None;
        }
        held.bulk.clear();
        held.buffer.take()
    }

    /// Sends a part of a held buffer, and of what is behind it.
    pub(super) fn send_range(
        &mut self,
        stream: usize,
        index: u32,
        range: Range<usize>,
        zero_copy: bool,
    ) -> io::Result<()> {
        let held = &mut self.held[index as usize];
        let Some(buffer) = &held.buffer else {
            return Err(io::Error::other("a send without its buffer"));
        };
        if held.bulk.length() > 0 {
            let entry = held.gather(stream, range.start, zero_copy)?;
            return self.start(What::Send(stream), index, entry);
        }
        let bytes = &buffer[range];
        let (at, length, file) = (bytes.as_ptr(), bytes.len() as u32, Fixed(stream as u32));
        let entry = match zero_copy {
            true => opcode::SendZc::new(file, at, length)
                .buf_index(Some(0))
                .zc_flags(IORING_SEND_ZC_REPORT_USAGE)
                .build(),
            false => opcode::Send::new(file, at, length).build(),
        };
        self.start(What::Send(stream), index, entry)
    }

    /// Receives into parts of a buffer, and memory beside it.
    pub(super) fn receive(
        &mut self,
        stream: usize,
        buffer: Buffer,
        places: Places,
    ) -> io::Result<()> {
        let index = self.hold(buffer);
        let held = &mut self.held[index as usize];
        held.landing = places.landing;
        let entry = held.scatter(stream, (places.payload, places.landed, places.header))?;
        self.start(What::Receive(stream), index, entry)
    }

    /// The memory beside a buffer, unless the kernel may still write to it.
    pub(super) fn take_landing(&mut self, index: u32) -> Option<Landing> {
        let held = &mut self.held[index as usize];
        match held.pending {
            0 => held.landing.take(),
            _ => None,
        }
    }

    /// Waits for the eventfd, which is file number `file`.
    pub(super) fn watch(&mut self, file: usize, mut buffer: Buffer) -> io::Result<()> {
        let (at, length) = (buffer.as_mut_ptr(), buffer.len() as u32);
        let index = self.hold(buffer);
        let entry = opcode::Read::new(Fixed(file as u32), at, length).build();
        self.start(What::Wake, index, entry)
    }

    fn start(&mut self, what: What, index: u32, entry: squeue::Entry) -> io::Result<()> {
        let entry = entry.user_data(pack(what, index));
        // SAFETY: the memory is a part of the buffer in `held[index]`, which nobody reaches, or of its landing, which
        // nobody reaches either, or of its bulk, which the keeper there keeps, or its message and vectors; all of it stays where it is until `completion` has counted the
        // last completion and notification of it and `take` lets it go.
        unsafe { self.ring.push(&entry) }?;
        self.held[index as usize].pending += 1;
        self.under_way += 1;
        Ok(())
    }

    /// Submits, and waits for a completion until `timeout`; zero does not wait.
    pub(super) fn enter(&mut self, timeout: Duration) -> io::Result<()> {
        let want = usize::from(!timeout.is_zero());
        self.ring.enter(want, timeout)
    }

    /// The next thing that the kernel said.
    pub(super) fn completion(&mut self) -> Option<Completion> {
        let entry = self.ring.completion()?;
        let (what, index) = unpack(entry.user_data());
        let held = self.held.get_mut(index as usize)?;
        held.pending = held.pending.saturating_sub(1);
        if cqueue::notif(entry.flags()) {
            let stream = match what {
                What::Send(stream) | What::Receive(stream) => stream,
                What::Wake => 0,
            };
            let copied = entry.result() as u32 & IORING_NOTIF_USAGE_ZC_COPIED != 0;
            return Some(Completion::Notified {
                stream,
                index,
                copied,
            });
        }
        if cqueue::more(entry.flags()) {
            held.pending += 1;
        }
        self.under_way = self.under_way.saturating_sub(1);
        let result = match entry.result() {
            error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
            bytes => Ok(bytes as usize),
        };
        Some(Completion::Done {
            what,
            index,
            result,
        })
    }

    /// The buffer of the eventfd, when its read is done.
    pub(super) fn take_wake(&mut self) -> Option<Buffer> {
        self.take(self.wake_index)
    }
}

impl Held {
    /// One send of what the buffer and the bulk have behind their first `sent` bytes.
    fn gather(&mut self, stream: usize, sent: usize, zero_copy: bool) -> io::Result<squeue::Entry> {
        let head = self
            .buffer
            .as_deref()
            .and_then(|buffer| buffer.get(..self.head_bytes));
        let head = head.ok_or_else(|| io::Error::other("a send without its buffer"))?;
        let parts = std::iter::once(head).chain(self.bulk.parts());
        bulk::vectors(parts, sent, &mut self.vectors);
        let (file, message) = (Fixed(stream as u32), self.message().cast_const());
        Ok(match zero_copy {
            true => opcode::SendMsgZc::new(file, message)
                .ioprio(IORING_SEND_ZC_REPORT_USAGE)
                .build(),
            false => opcode::SendMsg::new(file, message).build(),
        })
    }

    /// One receive into these parts: of the buffer, of what is beside it, of the buffer.
    fn scatter(
        &mut self,
        stream: usize,
        (payload, landed, header): (Range<usize>, usize, Range<usize>),
    ) -> io::Result<squeue::Entry> {
        let odd = || io::Error::other("a receive beyond its buffer");
        let buffer = self.buffer.as_deref_mut().ok_or_else(odd)?;
        let (head, behind) = buffer.split_at_mut_checked(payload.start).ok_or_else(odd)?;
        let payload = behind.get_mut(..payload.len()).ok_or_else(odd)?;
        let header = head.get_mut(header).ok_or_else(odd)?;
        let landing = self.landing.as_deref_mut().unwrap_or_default();
        let landing = landing.get_mut(landed..).unwrap_or_default();
        self.vectors.clear();
        let parts = [payload, landing, header].into_iter();
        let vectors = parts.filter(|part| !part.is_empty());
        self.vectors.extend(vectors.map(|part| libc::iovec {
            iov_base: part.as_mut_ptr().cast(),
            iov_len: part.len(),
        }));
        let message = self.message();
        Ok(opcode::RecvMsg::new(Fixed(stream as u32), message).build())
    }

    /// Names the vectors to the kernel.
    fn message(&mut self) -> *mut libc::msghdr {
        // SAFETY: a msghdr of zeros is one without address, parts and control data.
        let message = self
            .message
            .get_or_insert_with(|| Box::new(unsafe { std::mem::zeroed() }));
        message.msg_iov = self.vectors.as_mut_ptr();
        message.msg_iovlen = self.vectors.len();
        &raw mut **message
    }
}

impl Drop for Operations {
    /// The sockets are shut down already, so all operations on them end.
    fn drop(&mut self) {
        self.wake.wake();
        let begun = Instant::now();
        while self.under_way > 0 && begun.elapsed() < DRAIN_MAX {
            if self.ring.enter(1, Duration::from_millis(100)).is_err() {
                break;
            }
            while self.completion().is_some() {}
        }
        // Pages of a SEND_ZC are pinned until they are sent, mapped or not; only receives would write somewhere.
        if self.under_way > 0 {
            tracing::warn!(
                "page channel: {} operations did not end, their memory stays",
                self.under_way
            );
            for held in &mut self.held {
                held.buffer.take().into_iter().for_each(Buffer::leak);
                held.landing.take().into_iter().for_each(Landing::leak);
            }
        }
    }
}

fn pack(what: What, index: u32) -> u64 {
    let (code, stream) = match what {
        What::Send(stream) => (0, stream),
        What::Receive(stream) => (1, stream),
        What::Wake => (2, 0),
    };
    code << 56 | (stream as u64) << 32 | u64::from(index)
}

fn unpack(data: u64) -> (What, u32) {
    let stream = (data >> 32 & 0xffff) as usize;
    let what = match data >> 56 {
        0 => What::Send(stream),
        1 => What::Receive(stream),
        _ => What::Wake,
    };
    (what, data as u32)
}
