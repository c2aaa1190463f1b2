//! Frames to send: each in one buffer, or in a chain of them.
//!
//! Invariants: a buffer is used again only after the device returned its chain; a transmission is given out only when there
//! are buffers for the longest frame, so nothing is lost. A flow is always sent by the same queue.
//!
//! Does not decide what is sent.

use crate::net::{HEADER_BYTES, QUEUE_SIZE};
use crate::virtio_mmio::{DeviceError, Window};
use crate::virtqueue::Queue;
use alloc::vec;
use alloc::vec::Vec;
use colo_guest_server::flow_number;

/// Bytes of a buffer where each frame fits into one.
const SHORT_BYTES: usize = 2048;
/// Bytes of a buffer where it does not.
const LONG_BYTES: usize = 4096;

/// The transmit queues.
pub struct Senders {
    senders: Vec<Sender>,
    /// Frames that have to be cut, or are on their way to the queue of their flow.
    scratch: Vec<u8>,
    /// The longest frame that needs neither.
    direct_max: usize,
}

impl Senders {
    /// The transmit queues of so many pairs, for frames of up to `frame_max` bytes.
    pub fn new(window: &Window, pairs: usize, frame_max: usize) -> Result<Self, DeviceError> {
        let need = HEADER_BYTES + frame_max;
        let buffer_bytes = if need > SHORT_BYTES {
            LONG_BYTES
        } else {
            SHORT_BYTES
        };
        let sender = |pair| Sender::new(window, pair, buffer_bytes, need.div_ceil(buffer_bytes));
        let senders = (0..pairs).map(sender).collect::<Result<Vec<_>, _>>()?;
        let fits = buffer_bytes - HEADER_BYTES;
        Ok(Self {
            direct_max: if senders.len() == 1 { fits } else { 0 },
            senders,
            scratch: vec![0; frame_max],
        })
    }

    /// Sends a frame of `len` bytes that `fill` writes.
    pub fn send<R>(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        if len <= self.direct_max {
            return self.senders[0].send(len, fill);
        }
        // The flow is known when the frame is there.
        let frame = &mut self.scratch[..len];
        let result = fill(frame);
        let number = flow_number(frame) % self.senders.len();
        self.senders[number].send_copy(frame);
        result
    }

    /// Frames that can be sent now: nobody knows yet by which queue the next one leaves.
    pub fn room(&mut self) -> usize {
        self.senders.iter_mut().map(Sender::room).min().unwrap_or(0)
    }

    /// Asks to be woken when a buffer comes back where few are left; false when one already has.
    pub fn arm(&mut self) -> bool {
        let few = self.senders.iter_mut().filter(|sender| sender.has_few());
        few.fold(true, |quiet, sender| sender.queue.arm() & quiet)
    }

    /// Tells the device of frames that were sent.
    pub fn tell(&mut self, window: &Window) {
        for sender in &mut self.senders {
            sender.queue.tell(window);
        }
    }
}

struct Sender {
    queue: Queue,
    /// Buffers that the device does not hold.
    free: Vec<u16>,
    /// Buffers that the longest frame takes.
    most: usize,
    /// Those of the frame that is being sent.
    chain: Vec<u16>,
}

impl Sender {
    fn new(
        window: &Window,
        pair: usize,
        buffer_bytes: usize,
        most: usize,
    ) -> Result<Self, DeviceError> {
        let number = 2 * pair as u32 + 1;
        let queue = Queue::new(window, number, QUEUE_SIZE, buffer_bytes, false)?;
        let free = (0..queue.size()).rev().collect();
        Ok(Self {
            queue,
            free,
            most,
            chain: Vec::with_capacity(most),
        })
    }

    fn room(&mut self) -> usize {
        if self.has_few() {
            while let Some(used) = self.queue.take_used() {
                let mut returned = Some(used.id);
                while let Some(id) = returned {
                    self.free.push(id);
                    returned = self.queue.next_in_chain(id);
                }
            }
        }
        self.free.len() / self.most
    }

    fn has_few(&self) -> bool {
        self.free.len() < usize::from(QUEUE_SIZE / 4)
    }

    /// Sends a frame of `len` bytes that `fill` writes, in one buffer.
    fn send<R>(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        assert!(
            HEADER_BYTES + len <= self.queue.buffer_bytes(),
            "the frame fits a buffer"
        );
        let id = self.free_buffer();
        // SAFETY: the buffer is free, so only this function touches it; header and frame fit it.
        let frame = unsafe {
            let buffer = self.queue.buffer(id);
            buffer.write_bytes(0, HEADER_BYTES);
            core::slice::from_raw_parts_mut(buffer.add(HEADER_BYTES), len)
        };
        let result = fill(frame);
        self.queue.submit(id, Some(HEADER_BYTES + len));
        result
    }

    /// Sends a frame in as many buffers as it needs.
    fn send_copy(&mut self, frame: &[u8]) {
        let len = HEADER_BYTES + frame.len();
        if len <= self.queue.buffer_bytes() {
            return self.send(frame.len(), |to| to.copy_from_slice(frame));
        }
        self.chain.clear();
        let (mut rest, mut skip) = (frame, HEADER_BYTES);
        while !rest.is_empty() {
            let id = self.free_buffer();
            let room = self.queue.buffer_bytes() - skip;
            let (part, behind) = rest.split_at(rest.len().min(room));
            // SAFETY: as in `send`: a free buffer, of which `skip` bytes are left for the header and the part fits the rest.
            unsafe {
                let buffer = self.queue.buffer(id);
                buffer.write_bytes(0, skip);
                buffer
                    .add(skip)
                    .copy_from_nonoverlapping(part.as_ptr(), part.len());
            }
            self.chain.push(id);
            (rest, skip) = (behind, 0);
        }
        self.queue.submit_chain(&self.chain, len);
    }

    fn free_buffer(&mut self) -> u16 {
        let Some(id) = self.free.pop() else {
            unreachable!("a transmission is given out only when buffers are free");
        };
        id
    }
}
