//! Received frames: in one buffer each, or in several (`VIRTIO_NET_F_MRG_RXBUF`, virtio 1.3, section 5.1.6.3).
//!
//! Invariants: a frame's buffers go back to the device together, as soon as it is done with; a frame in several of them is
//! put together once, however often it is looked at.
//!
//! Does not look into frames.

use crate::net::{HEADER_BYTES, QUEUE_SIZE, RECEIVED_BYTES};
use crate::virtio_mmio::{DeviceError, Window};
use crate::virtqueue::{Queue, Used};
use alloc::vec::Vec;

/// Where the header says how many buffers a frame takes.
const BUFFER_COUNT: usize = 10;

/// A receive queue.
pub struct Receiver {
    queue: Queue,
    /// The header of a frame says how many buffers it takes.
    mergeable: bool,
    /// The next frame, if it lies in several buffers and was looked at.
    whole: Vec<u8>,
}

impl Receiver {
    /// The receive queue of a pair.
    pub fn new(window: &Window, pair: usize, mergeable: bool) -> Result<Self, DeviceError> {
        let queue = Queue::new(window, 2 * pair as u32, QUEUE_SIZE, RECEIVED_BYTES, true)?;
        Ok(Self {
            queue,
            mergeable,
            whole: Vec::new(),
        })
    }

    /// Gives all buffers to the device, which has none.
    pub fn offer_all(&mut self, window: &Window) {
        for id in 0..self.queue.size() {
            self.queue.submit(id, None);
        }
        self.tell(window);
    }

    /// Whether there is a frame.
    pub fn has_frame(&self) -> bool {
        self.queue.has_used()
    }

    /// The next frame.
    pub fn frame(&mut self) -> Option<&[u8]> {
        let first = self.queue.peek_used(0)?;
        let count = self.buffers(first);
        if count == 1 {
            return Some(self.bytes(first, HEADER_BYTES));
        }
        if self.whole.is_empty() {
            let mut whole = core::mem::take(&mut self.whole);
            whole.extend_from_slice(self.bytes(first, HEADER_BYTES));
            for used in (1..count).filter_map(|n| self.queue.peek_used(n)) {
                whole.extend_from_slice(self.bytes(used, 0));
            }
            self.whole = whole;
        }
        Some(&self.whole)
    }

    /// Gives the next frame's buffers back to the device.
    pub fn discard(&mut self) {
        let Some(first) = self.queue.peek_used(0) else {
            return;
        };
        for _ in 0..self.buffers(first) {
            if let Some(used) = self.queue.take_used() {
                self.queue.submit(used.id, None);
            }
        }
        self.whole.clear();
    }

    /// Asks to be woken by the next frame; false when one is already there.
    pub fn arm(&mut self) -> bool {
        self.queue.arm()
    }

    /// Tells the device of buffers that were given back.
    pub fn tell(&mut self, window: &Window) {
        self.queue.tell(window);
    }

    /// How many buffers the frame takes that begins in `first`: the device returns all of them at once.
    fn buffers(&self, first: Used) -> u16 {
        if !self.mergeable || first.len < HEADER_BYTES {
            return 1;
        }
        let header = self.bytes(first, 0);
        let count = u16::from_le_bytes([header[BUFFER_COUNT], header[BUFFER_COUNT + 1]]);
        count.min(self.queue.used_count()).max(1)
    }

    /// What the device wrote into a buffer behind its first `skip` bytes.
    fn bytes(&self, used: Used, skip: usize) -> &[u8] {
        let skip = skip.min(used.len);
        // SAFETY: the device returned the buffer and does not touch it until it is submitted again, which needs `&mut
        // self`; the length is at most that of the buffer.
        unsafe {
            core::slice::from_raw_parts(self.queue.buffer(used.id).add(skip), used.len - skip)
        }
    }
}
