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
use super::frame::HEADER_BYTES;
use super::landing::Landing;
use super::memory::{Buffer, PAGE_BYTES};
use super::pinned::Pinned;
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

/// Parts of a buffer that are received elsewhere, at the same places of a stream's page.
#[derive(Debug)]
struct Aside {
    payload: Range<usize>,
    /// Bytes of the landing between them.
    landing: usize,
    header: Range<usize>,
}

/// A buffer inside operations.
#[derive(Debug, Default)]
struct Held {
    buffer: Option<Buffer>,
    /// What is sent behind the buffer's first bytes.
    bulk: Bulk,
    /// What is received elsewhere than into the buffer.
    landing: Option<Landing>,
    /// The receive is one into registered memory.
    is_fixed: bool,
    /// What of the buffer comes into the stream's page of the landing's block instead, with the landing in between.
    aside: Option<Aside>,
    /// Of the buffer to be sent behind the bulk, if there is one; what lies before it in the buffer goes before.
    tail: Range<usize>,
    /// For the kernel to read at the next submission.
    vectors: Vec<libc::iovec>,
    /// For the kernel to read then, and of a receive to write when it ends.
    message: Option<Box<libc::msghdr>>,
    /// Completions and notifications to come.
    pending: u32,
}

/// The ring with everything that is under way.
#[derive(Debug)]
pub(super) struct Operations {
    ring: Ring,
    pinned: Pinned,
    /// Bytes received into registered memory.
    fixed_bytes: u64,
    held: Vec<Held>,
    /// Completions (not notifications) to come.
    under_way: u32,
    wake: Waker,
    wake_index: u32,
}

impl Operations {
    /// On these sockets; buffers have numbers below `buffers`, `registered` is the memory of those to send and of those to
    /// receive into, to be registered, `wake_buffer` takes what is read from the eventfd.
    pub(super) fn new(
        sockets: &[RawFd],
        buffers: usize,
        [sent, received]: [libc::iovec; 2],
        wake: Waker,
        wake_buffer: Buffer,
    ) -> Result<Self, ChannelError> {
        let mut files = sockets.to_vec();
        files.push(wake.as_raw_fd());
        let at_once = (2 * files.len()) as u32;
        let outstanding = at_once + 2 * buffers as u32;
        let ring = Ring::new(at_once, outstanding, &files, sent)?;
        let pinned = Pinned::new(&ring, received);
        let wake_index = wake_buffer.index();
        let mut held = Vec::new();
        held.resize_with(buffers, Held::default);
        let mut operations = Self {
            ring,
            pinned,
            fixed_bytes: 0,
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

    /// Bytes received into registered memory.
    pub(super) fn fixed_bytes(&self) -> u64 {
        self.fixed_bytes
    }

    /// How often memory to receive into could not be registered.
    pub(super) fn unregistered_receives(&self) -> u64 {
        self.pinned.refused()
    }

    /// How many receives went into memory that is not registered, because as much is as can be.
    pub(super) fn receives_beyond(&self) -> u64 {
        self.pinned.beyond()
    }

    /// Lets go of memory that was registered for landings, and is unmapped.
    pub(super) fn give_back(&mut self) {
        self.pinned.give_back(&self.ring);
    }

    #[cfg(test)]
    pub(super) fn pinned(&self) -> &Pinned {
        &self.pinned
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

    /// The same, with bytes that lie elsewhere before those at `tail` of the buffer.
    pub(super) fn hold_with(&mut self, buffer: Buffer, tail: Range<usize>, bulk: &mut Bulk) -> u32 {
        let index = self.hold(buffer);
        let held = &mut self.held[index as usize];
        held.tail = tail;
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
        let places = (places.payload, places.landed, places.header);
        let block = held.landing.as_ref().and_then(Landing::block);
        let block = block.map(|block| self.pinned.block(&self.ring, block));
        let entry = match block.unwrap_or_else(|| self.pinned.buffers()) {
            // The records do not fit the stream's page: they come first, and the landing when all of them are there.
            Some(_) if block.is_some() && HEADER_BYTES + places.0.len() > PAGE_BYTES => {
                let (to, slot) = ((places.0, usize::MAX, 0..0), self.pinned.buffers());
                held.scatter(stream, to, slot)?
            }
            Some(slot) if block.is_some() => held.scatter_aside(stream, places, slot)?,
            slot => held.scatter(stream, places, slot)?,
        };
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
        // nobody reaches either, or its stream's page of the landing's block, which no other receive names, or of its bulk,
        // which the keeper there keeps, or its message and vectors; all of it stays where it is until `completion` has
        // counted the last completion and notification of it and `take` lets it go.
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
        let at = index as usize;
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
        let result = match what {
            What::Receive(stream) if self.held[at].is_fixed => self.received(stream, at, result),
            _ => result,
        };
        Some(Completion::Done {
            what,
            index,
            result,
        })
    }

    /// A receive into registered memory has ended; what came into the stream's page goes where it belongs. A kernel that
    /// refuses such a receive is asked for none any more.
    fn received(
        &mut self,
        stream: usize,
        at: usize,
        result: io::Result<usize>,
    ) -> io::Result<usize> {
        let held = &mut self.held[at];
        match result {
            Ok(bytes) => {
                self.fixed_bytes += bytes as u64;
                held.bring_back(stream, bytes);
                Ok(bytes)
            }
            Err(e) if is_refusal(&e) => {
                self.pinned.turn_off(&e);
                Err(io::Error::from_raw_os_error(libc::EAGAIN))
            }
            Err(e) => Err(e),
        }
    }

    /// The buffer of the eventfd, when its read is done.
    pub(super) fn take_wake(&mut self) -> Option<Buffer> {
        self.take(self.wake_index)
    }
}

impl Held {
    /// One send of what the buffer and the bulk have behind their first `sent` bytes.
    fn gather(&mut self, stream: usize, sent: usize, zero_copy: bool) -> io::Result<squeue::Entry> {
        let buffer = self.buffer.as_deref();
        let buffer = buffer.and_then(|buffer| buffer.get(..self.tail.end));
        let halves = buffer.and_then(|buffer| buffer.split_at_checked(self.tail.start));
        let (head, tail) = halves.ok_or_else(|| io::Error::other("a send without its buffer"))?;
        let parts = [head].into_iter().chain(self.bulk.parts()).chain([tail]);
        bulk::vectors(parts, sent, &mut self.vectors);
        let (file, message) = (Fixed(stream as u32), self.message().cast_const());
        Ok(match zero_copy {
            true => opcode::SendMsgZc::new(file, message)
                .ioprio(IORING_SEND_ZC_REPORT_USAGE)
                .build(),
            false => opcode::SendMsg::new(file, message).build(),
        })
    }

    /// One receive into these parts: of the buffer, of what is beside it, of the buffer. All of them are in the registered
    /// memory of that slot, if there is one.
    fn scatter(
        &mut self,
        stream: usize,
        (payload, landed, header): (Range<usize>, usize, Range<usize>),
        slot: Option<u16>,
    ) -> io::Result<squeue::Entry> {
        let odd = || io::Error::other("a receive beyond its buffer");
        let buffer = self.buffer.as_deref_mut().ok_or_else(odd)?;
        let (head, behind) = buffer.split_at_mut_checked(payload.start).ok_or_else(odd)?;
        let payload = behind.get_mut(..payload.len()).ok_or_else(odd)?;
        let header = head.get_mut(header).ok_or_else(odd)?;
        let landing = self.landing.as_deref_mut().unwrap_or_default();
        let landing = landing.get_mut(landed..).unwrap_or_default();
        let parts = [payload, landing, header].map(|part| (part.as_mut_ptr(), part.len()));
        self.aside = None;
        Ok(self.entry(stream, parts, slot))
    }

    /// The same, with the parts of the buffer at the same places of the stream's page in the landing's block.
    fn scatter_aside(
        &mut self,
        stream: usize,
        (payload, landed, header): (Range<usize>, usize, Range<usize>),
        slot: u16,
    ) -> io::Result<squeue::Entry> {
        let odd = || io::Error::other("a receive beyond its landing");
        let landing = self.landing.as_mut().ok_or_else(odd)?;
        let page = landing.aside(stream).ok_or_else(odd)?.as_ptr();
        if header.end > HEADER_BYTES || HEADER_BYTES + payload.len() > PAGE_BYTES {
            return Err(odd());
        }
        let landing = landing.get_mut(landed..).unwrap_or_default();
        let parts = [
            (page.wrapping_add(HEADER_BYTES), payload.len()),
            (landing.as_mut_ptr(), landing.len()),
            (page.wrapping_add(header.start), header.len()),
        ];
        self.aside = Some(Aside {
            payload,
            landing: landing.len(),
            header,
        });
        Ok(self.entry(stream, parts, Some(slot)))
    }

    fn entry(
        &mut self,
        stream: usize,
        parts: [(*mut u8, usize); 3],
        slot: Option<u16>,
    ) -> squeue::Entry {
        self.is_fixed = slot.is_some();
        self.vectors.clear();
        let parts = parts.into_iter().filter(|(_, length)| *length > 0);
        self.vectors.extend(parts.map(|(at, length)| libc::iovec {
            iov_base: at.cast(),
            iov_len: length,
        }));
        let file = Fixed(stream as u32);
        match slot {
            Some(slot) => {
                let (vectors, count) = (self.vectors.as_ptr(), self.vectors.len() as u32);
                opcode::ReadvFixed::new(file, vectors, count, slot).build()
            }
            None => opcode::RecvMsg::new(file, self.message()).build(),
        }
    }

    /// Puts what has come into the stream's page into the buffer: records and a header, never pages.
    fn bring_back(&mut self, stream: usize, bytes: usize) {
        let Some(aside) = self.aside.take() else {
            return;
        };
        let page = self.landing.as_ref().and_then(|l| l.aside(stream));
        let (Some(page), Some(buffer)) = (page, self.buffer.as_deref_mut()) else {
            return;
        };
        // SAFETY: the page is one of the block, which the landing keeps mapped; the stream's only receive has ended, and
        // nobody else writes there.
        let page = unsafe { std::slice::from_raw_parts(page.as_ptr(), PAGE_BYTES) };
        let payload = bytes.min(aside.payload.len());
        let behind = (bytes - payload).saturating_sub(aside.landing);
        let header = behind.min(aside.header.len());
        for (to, from, count) in [
            (aside.payload.start, HEADER_BYTES, payload),
            (aside.header.start, aside.header.start, header),
        ] {
            if let (Some(to), Some(from)) =
                (buffer.get_mut(to..to + count), page.get(from..from + count))
            {
                to.copy_from_slice(from);
            }
        }
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

impl Operations {
    /// Ends everything, once the sockets are shut down, so that all operations on them end; then lets go of what is locked. The
    /// kernel does the latter by itself some time after the ring is gone, which is too late for the next one.
    pub(super) fn close(&mut self) {
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
                // The kernel writes the message of a receive when that ends.
                if let Some(message) = held.message.take() {
                    Box::leak(message);
                    std::mem::take(&mut held.vectors).leak();
                }
            }
            // Nobody waits for them again.
            self.under_way = 0;
        }
        self.pinned.let_go(&self.ring);
    }
}

impl Drop for Operations {
    fn drop(&mut self) {
        self.close();
    }
}

/// The kernel does not receive into registered memory here.
fn is_refusal(e: &io::Error) -> bool {
    let code = e.raw_os_error();
    matches!(
        code,
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EFAULT | libc::ENOMEM)
    )
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
