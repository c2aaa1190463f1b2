//! A split virtqueue, driver side (virtio 1.3, section 2.7), with one buffer for each descriptor.
//!
//! Invariants: buffer `i` always belongs to descriptor `i`; a buffer is touched by the guest only
//! between its return in the used ring and its next [`Queue::submit`]. EVENT_IDX is on: the device
//! is told only when it asked to be, and tells us only after [`Queue::arm`].

use crate::virtio_mmio::{DeviceError, Register, Window};
use alloc::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use core::sync::atomic::{AtomicU16, Ordering, fence};

const PAGE: usize = 4096;
const DESCRIPTOR_BYTES: usize = 16;
const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;

/// What the device returned.
#[derive(Clone, Copy)]
pub struct Used {
    /// The descriptor, below the queue's size.
    pub id: u16,
    /// Bytes that the device wrote.
    pub len: usize,
}

/// A queue.
pub struct Queue {
    number: u32,
    size: u16,
    buffer_bytes: usize,
    descriptors: *mut u8,
    avail: *mut u16,
    used: *mut u16,
    buffers: *mut u8,
    /// Next entry of the avail ring, also its index as the device sees it.
    avail_index: u16,
    /// `avail_index` when the device was last told.
    told_index: u16,
    used_index: u16,
}

impl Queue {
    /// Sets up queue `number` with at most `size` descriptors, a power of two, and a buffer of `buffer_bytes` for each.
    pub fn new(
        window: &Window,
        number: u32,
        size: u16,
        buffer_bytes: usize,
        device_writes: bool,
    ) -> Result<Self, DeviceError> {
        window.write(Register::QueueSel, number);
        let max = window.read(Register::QueueNumMax);
        if max == 0 {
            return Err(DeviceError::NoQueue(number));
        }
        let size = u16::try_from(max).map_or(size, |max| size.min(1 << max.ilog2()));
        let n = usize::from(size);
        let queue = Self {
            number,
            size,
            buffer_bytes,
            descriptors: pages(n * DESCRIPTOR_BYTES),
            avail: pages(6 + 2 * n).cast(),
            used: pages(6 + 8 * n).cast(),
            buffers: pages(n * buffer_bytes),
            avail_index: 0,
            told_index: 0,
            used_index: 0,
        };
        let flags = if device_writes { DEVICE_WRITES } else { 0 };
        for id in 0..size {
            queue.write_descriptor(id, buffer_bytes as u32, flags, 0);
        }
        window.write(Register::QueueNum, u32::from(size));
        let [low, high] = [Register::QueueDescLow, Register::QueueDescHigh];
        window.write_address(low, high, queue.descriptors as usize);
        let [low, high] = [Register::QueueDriverLow, Register::QueueDriverHigh];
        window.write_address(low, high, queue.avail as usize);
        let [low, high] = [Register::QueueDeviceLow, Register::QueueDeviceHigh];
        window.write_address(low, high, queue.used as usize);
        window.write(Register::QueueReady, 1);
        Ok(queue)
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    /// Bytes of each buffer.
    pub fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// The buffer of a descriptor that the device does not hold.
    pub fn buffer(&self, id: u16) -> *mut u8 {
        debug_assert!(id < self.size, "descriptor numbers are below the size");
        // SAFETY: `buffers` has `size` buffers of this length.
        unsafe { self.buffers.add(usize::from(id) * self.buffer_bytes) }
    }

    /// Gives a buffer to the device; `len` counts for buffers that the device reads.
    pub fn submit(&mut self, id: u16, len: Option<usize>) {
        if let Some(len) = len {
            self.write_descriptor(id, len as u32, 0, 0);
        }
        let slot = 2 + usize::from(self.avail_index % self.size);
        // SAFETY: the slot lies within the avail ring; the device does not read it before the index
        // moves.
        unsafe { self.avail.add(slot).write_volatile(id) };
        self.avail_index = self.avail_index.wrapping_add(1);
        // The descriptor and the slot must be visible before the index.
        self.word(self.avail, 1)
            .store(self.avail_index, Ordering::Release);
    }

    /// Gives buffers to the device that hold `len` bytes for it to read, one behind the other, all full but for the last.
    pub fn submit_chain(&mut self, ids: &[u16], len: usize) {
        let Some(head) = ids.first() else {
            return;
        };
        let mut left = len;
        for (n, id) in ids.iter().enumerate() {
            let here = left.min(self.buffer_bytes);
            let next = ids.get(n + 1);
            let flags = if next.is_some() { NEXT } else { 0 };
            self.write_descriptor(*id, here as u32, flags, next.copied().unwrap_or(0));
            left -= here;
        }
        self.submit(*head, None);
    }

    /// The buffer behind one that is part of a chain.
    pub fn next_in_chain(&self, id: u16) -> Option<u16> {
        debug_assert!(id < self.size, "descriptor numbers are below the size");
        // SAFETY: the table has `size` entries of 16 bytes, which the guest alone writes.
        let (flags, next) = unsafe {
            let entry = self.descriptors.add(usize::from(id) * DESCRIPTOR_BYTES);
            (
                entry.add(12).cast::<u16>().read_volatile(),
                entry.add(14).cast::<u16>().read_volatile(),
            )
        };
        (flags & NEXT != 0).then_some(next)
    }

    /// Sends a command and waits for the device's answer, one byte. Only on a queue that has no other use.
    pub fn command(&mut self, window: &Window, command: &[u8]) -> u8 {
        let (request, answer) = (self.buffer(0), self.buffer(1));
        // SAFETY: both buffers are at rest, as each command is waited for, and longer than any command.
        unsafe {
            request.copy_from_nonoverlapping(command.as_ptr(), command.len());
            answer.write(u8::MAX);
        }
        self.write_descriptor(0, command.len() as u32, NEXT, 1);
        self.write_descriptor(1, 1, DEVICE_WRITES, 0);
        self.submit(0, None);
        self.tell(window);
        while self.take_used().is_none() {
            core::hint::spin_loop();
        }
        // SAFETY: the device has returned the buffer.
        unsafe { answer.read_volatile() }
    }

    /// Takes the next buffer that the device returned.
    pub fn take_used(&mut self) -> Option<Used> {
        let used = self.peek_used(0)?;
        self.used_index = self.used_index.wrapping_add(1);
        Some(used)
    }

    /// The buffer `n` behind the next that the device returned, without taking it.
    pub fn peek_used(&self, n: u16) -> Option<Used> {
        if n >= self.used_count() {
            return None;
        }
        let slot = 2 + 4 * usize::from(self.used_index.wrapping_add(n) % self.size);
        // SAFETY: the element lies within the used ring, and the acquire load of the index made it
        // visible.
        let (id, len) = unsafe {
            let element = self.used.add(slot).cast::<u32>();
            (element.read_volatile(), element.add(1).read_volatile())
        };
        // The host is trusted, but a wrong number must not become a wild pointer.
        assert!(
            id < u32::from(self.size),
            "queue {}: the device returned {id}",
            self.number
        );
        Some(Used {
            id: id as u16,
            len: (len as usize).min(self.buffer_bytes),
        })
    }

    /// True when the device returned something.
    pub fn has_used(&self) -> bool {
        self.used_count() > 0
    }

    /// Buffers that the device returned and nobody took.
    pub fn used_count(&self) -> u16 {
        let index = self.word(self.used, 1).load(Ordering::Acquire);
        index.wrapping_sub(self.used_index)
    }

    /// Rings the doorbell when the device asked for it.
    pub fn tell(&mut self, window: &Window) {
        if self.told_index == self.avail_index {
            return;
        }
        // The index must be visible before the device's wish is read (virtio 1.3, section 2.7.10).
        fence(Ordering::SeqCst);
        let wish = self
            .word(self.used, 2 + 4 * usize::from(self.size))
            .load(Ordering::Relaxed);
        let (new, old) = (self.avail_index, self.told_index);
        self.told_index = new;
        if new.wrapping_sub(wish).wrapping_sub(1) < new.wrapping_sub(old) {
            window.write(Register::QueueNotify, self.number);
        }
    }

    /// Asks for an interrupt at the next returned buffer; false when one is already there.
    pub fn arm(&mut self) -> bool {
        let event = self.word(self.avail, 2 + usize::from(self.size));
        event.store(self.used_index, Ordering::Relaxed);
        // The wish must be visible before the last look.
        fence(Ordering::SeqCst);
        !self.has_used()
    }

    fn write_descriptor(&self, id: u16, len: u32, flags: u16, next: u16) {
        // SAFETY: the table has `size` entries of 16 bytes, and the device does not hold this one.
        unsafe {
            let entry = self.descriptors.add(usize::from(id) * DESCRIPTOR_BYTES);
            entry.cast::<u64>().write_volatile(self.buffer(id) as u64);
            entry.add(8).cast::<u32>().write_volatile(len);
            entry.add(12).cast::<u16>().write_volatile(flags);
            entry.add(14).cast::<u16>().write_volatile(next);
        }
    }

    /// A ring's word that both sides use at the same time.
    fn word<'a>(&self, ring: *mut u16, at: usize) -> &'a AtomicU16 {
        // SAFETY: all callers stay within the ring's allocation, which is aligned and never freed,
        // and use the word atomically only.
        unsafe { AtomicU16::from_ptr(ring.add(at)) }
    }
}

/// Zeroed pages that are never freed.
fn pages(bytes: usize) -> *mut u8 {
    let layout = match Layout::from_size_align(bytes.next_multiple_of(PAGE), PAGE) {
        Ok(layout) => layout,
        Err(_) => unreachable!("queue sizes are small"),
    };
    // SAFETY: the layout is not empty.
    let pointer = unsafe { alloc_zeroed(layout) };
    if pointer.is_null() {
        handle_alloc_error(layout);
    }
    pointer
}
