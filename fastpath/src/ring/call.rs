//! How a device tells its guest that there is something to look at.
//!
//! Invariants: the interrupt status bit is set before the line is written; the line is an eventfd,
//! which the VMM connects to the sleep port or, as an irqfd, to an interrupt controller.
//!
//! Does not decide when to call; the queue's used_event does.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// virtio-mmio `InterruptStatus`: a used buffer.
const USED_BUFFER: u32 = 1;
/// virtio-mmio `InterruptStatus`: the configuration (or the device's need for a reset) changed.
const CONFIG_CHANGE: u32 = 2;

/// The interrupt of one device, shared by its worker and its register window.
#[derive(Debug)]
pub struct Call {
    interrupt_status: AtomicU32,
    needs_reset: AtomicBool,
    line: EventFd,
}

impl Call {
    /// A call that writes `line`.
    pub fn new(line: EventFd) -> Self {
        Self {
            interrupt_status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            line,
        }
    }

    /// Tells the guest of used buffers.
    pub fn used_buffers(&self) -> io::Result<()> {
        self.raise(USED_BUFFER)
    }

    /// Tells the guest that the device wants to be reset.
    pub fn ask_for_reset(&self) -> io::Result<()> {
        self.needs_reset.store(true, Ordering::Release);
        self.raise(CONFIG_CHANGE)
    }

    /// Whether a reset has been asked for since the last [`Call::reset`].
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// The `InterruptStatus` register.
    pub fn interrupt_status(&self) -> u32 {
        self.interrupt_status.load(Ordering::Acquire)
    }

    /// The guest wrote `InterruptACK`.
    pub fn acknowledge(&self, bits: u32) {
        self.interrupt_status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// The guest reset the device.
    pub fn reset(&self) {
        self.interrupt_status.store(0, Ordering::Release);
        self.needs_reset.store(false, Ordering::Release);
    }

    /// Puts the registers as a record has them and wakes the guest: one wake-up too many is
    /// harmless, one too few is not.
    pub fn restore(&self, interrupt_status: u32, needs_reset: bool) -> io::Result<()> {
        self.interrupt_status
            .store(interrupt_status, Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
        self.line.write(1)
    }

    fn raise(&self, bit: u32) -> io::Result<()> {
        self.interrupt_status.fetch_or(bit, Ordering::AcqRel);
        match self.line.write(1) {
            // A full counter is a line that is already up.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }
}
