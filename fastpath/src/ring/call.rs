//! How a device tells its guest that there is something to look at, and whether there is a link.
//!
//! Invariants: the interrupt status bit is set before the line is written; the line is an eventfd,
//! which the VMM connects to the sleep port or, as an irqfd, to an interrupt controller. A vhost-user
//! front-end has a line for each queue instead, and others for queues that are broken.
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
    link_is_up: AtomicBool,
    config_generation: AtomicU32,
    lines: Lines,
}

/// Lines of both queues; `None` where nobody listens.
type PerQueue = [Option<EventFd>; 2];

#[derive(Debug)]
enum Lines {
    Device(EventFd),
    Queues { calls: PerQueue, errors: PerQueue },
}

impl Call {
    /// A call that writes `line`.
    pub fn new(line: EventFd) -> Self {
        Self::with(Lines::Device(line))
    }

    /// A call that writes the line of the queue: for used buffers one of `calls`, for a broken queue
    /// all `errors`.
    pub fn of_queues(calls: PerQueue, errors: PerQueue) -> Self {
        Self::with(Lines::Queues { calls, errors })
    }

    fn with(lines: Lines) -> Self {
        Self {
            interrupt_status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            link_is_up: AtomicBool::new(true),
            config_generation: AtomicU32::new(0),
            lines,
        }
    }

    /// Tells the guest of used buffers in these of its queues.
    pub fn used_buffers(&self, queues: [bool; 2]) -> io::Result<()> {
        match &self.lines {
            Lines::Device(_) => self.raise(USED_BUFFER),
            Lines::Queues { calls, .. } => calls
                .iter()
                .zip(queues)
                .filter(|(_, wanted)| *wanted)
                .try_for_each(|(line, _)| line.as_ref().map_or(Ok(()), write)),
        }
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

    /// Shows the guest whether there is a link (`VIRTIO_NET_S_LINK_UP`, virtio 1.3 section 5.1.4), and tells it
    /// if that is news.
    pub fn show_link(&self, is_up: bool) -> io::Result<()> {
        if self.link_is_up.swap(is_up, Ordering::AcqRel) == is_up {
            return Ok(());
        }
        self.config_generation.fetch_add(1, Ordering::AcqRel);
        match &self.lines {
            Lines::Device(_) => self.raise(CONFIG_CHANGE),
            // The front-end shows a link of its own.
            Lines::Queues { .. } => Ok(()),
        }
    }

    /// Whether the guest is shown a link.
    pub fn link_is_up(&self) -> bool {
        self.link_is_up.load(Ordering::Acquire)
    }

    /// The `ConfigGeneration` register.
    pub fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::Acquire)
    }

    /// Puts what the guest is shown of the link as a record has it, without telling.
    pub fn restore_link(&self, is_up: bool) {
        self.link_is_up.store(is_up, Ordering::Release);
    }

    /// Puts the `ConfigGeneration` register as a record has it.
    pub fn restore_config_generation(&self, config_generation: u32) {
        self.config_generation
            .store(config_generation, Ordering::Release);
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
        match &self.lines {
            Lines::Device(line) => line.write(1),
            Lines::Queues { .. } => self.used_buffers([true; 2]),
        }
    }

    fn raise(&self, bit: u32) -> io::Result<()> {
        self.interrupt_status.fetch_or(bit, Ordering::AcqRel);
        match &self.lines {
            Lines::Device(line) => write(line),
            Lines::Queues { errors, .. } => errors.iter().flatten().try_for_each(write),
        }
    }
}

fn write(line: &EventFd) -> io::Result<()> {
    match line.write(1) {
        // A full counter is a line that is already up.
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
        other => other,
    }
}
