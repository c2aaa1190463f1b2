//! The register window between a driver and a device.
//!
//! Invariants: registers change only under the state the specification allows (queues before
//! `DRIVER_OK`, features before `FEATURES_OK`); a bad access reads 0, writes nothing and never
//! panics; after a reset returns to the guest, the device no longer touches its queues.
//!
//! Does not move data: the backend does, from `DRIVER_OK` to reset.

use std::sync::Arc;

use colo_fastpath::clock::now_us;
use colo_fastpath::log_budget::LogBudget;
use colo_fastpath::ring::{Call, QueueState};
use tracing::{debug, warn};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as regs;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use crate::machine::RecordError;

use super::state::{DEVICE_FEATURES, DeviceState};

/// Size of a window.
pub const WINDOW_BYTES: u64 = 512;
/// Where drivers ring.
pub const NOTIFY_OFFSET: u64 = regs::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"colo");
const CONFIG_OFFSET: u64 = regs::VIRTIO_MMIO_CONFIG as u64;

/// A backend does not take its queues over.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A thread of it is gone.
    #[error("the device's backend has ended")]
    Gone,
    /// The driver has not set up what the device cannot do without, or not so that it can be used.
    #[error("the driver started its device without the queues that it needs")]
    NotReady,
}

/// What is behind a window.
pub trait Backend: Send + std::fmt::Debug {
    /// virtio device type.
    fn device_id(&self) -> u32;

    /// Features offered besides those of the transport.
    fn features(&self) -> u64;

    /// Whether the driver may accept these of the features offered, and no others.
    fn accepts(&self, _features: u64) -> bool {
        true
    }

    /// Largest size of each queue.
    fn queue_sizes_max(&self) -> &'static [u16];

    /// The driver reads the device-specific configuration; what is behind its end reads 0.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// The driver is ready: serve these queues, as far as they are ready.
    fn activate(&mut self, queues: &[QueueState]) -> Result<(), BackendError>;

    /// The driver has rung for a queue that no doorbell of the device's is for.
    fn notify(&mut self, _queue: u32) {}

    /// Puts in where the queues stand that the backend serves on the vCPU's thread.
    fn save_queues(&self, _queues: &mut [QueueState]) {}

    /// Let go of the queues; returns when that is done.
    fn deactivate(&mut self) -> Result<(), BackendError>;

    /// What travels of the device besides registers and queues.
    fn save(&self) -> Vec<u8>;

    /// Whether [`Backend::restore`] would take what another one has saved.
    fn check(&self, saved: &[u8]) -> Result<(), RecordError>;

    /// Take over queues as a record has them (`None`: the driver is not ready), and what
    /// [`Backend::save`] gave. [`Backend::check`] has passed.
    fn restore(&mut self, queues: Option<&[QueueState]>, saved: &[u8]) -> Result<(), BackendError>;
}

/// One device behind its window.
#[derive(Debug)]
pub struct VirtioMmio {
    backend: Box<dyn Backend>,
    call: Arc<Call>,
    kicks: Vec<EventFd>,
    regs: DeviceState,
    /// Of drivers that are not taken over.
    log: LogBudget,
}

impl VirtioMmio {
    /// A device after reset. The first of `kicks` is written when a notification for one of the first two queues
    /// comes as an exit, and so on; the backend is told of others itself.
    pub fn new(backend: Box<dyn Backend>, call: Arc<Call>, kicks: Vec<EventFd>) -> Self {
        let regs = reset_registers(&*backend);
        Self {
            backend,
            call,
            kicks,
            regs,
            log: LogBudget::default(),
        }
    }

    /// The driver reads.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG_OFFSET {
            self.backend
                .read_config((offset - CONFIG_OFFSET) as usize, data);
            return;
        }
        let Ok(data): Result<&mut [u8; 4], _> = data.try_into() else {
            data.fill(0);
            return;
        };
        *data = self.read_register(offset as u32).to_le_bytes();
    }

    /// The driver writes.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        // The configuration space of every device so far is read-only.
        let (Ok(data), true) = (data.try_into(), offset < CONFIG_OFFSET) else {
            debug!(
                "ignored write of {} bytes at device register {offset:#x}",
                data.len()
            );
            return;
        };
        self.write_register(offset as u32, u32::from_le_bytes(data));
    }

    /// What travels. `live` are the first queues as workers had them at their packet boundary, `None` for those
    /// that are not in service.
    pub fn save(&self, live: &[Option<QueueState>]) -> DeviceState {
        let mut state = self.regs.clone();
        state.interrupt_status = self.call.interrupt_status();
        state.needs_reset = self.call.needs_reset();
        state.config_generation = self.call.config_generation();
        state.backend = self.backend.save();
        for (queue, live) in state.queues.iter_mut().zip(live) {
            *queue = live.unwrap_or(*queue);
        }
        self.backend.save_queues(&mut state.queues);
        state
    }

    /// Whether a record is of a device like this.
    pub fn check(&self, state: &DeviceState) -> Result<(), RecordError> {
        let bad = |field| {
            Err(RecordError::Field {
                what: "device",
                field,
            })
        };
        if state.device_id != self.backend.device_id() {
            return bad("device_id");
        }
        if state.queues.len() != self.backend.queue_sizes_max().len() {
            return bad("number of queues");
        }
        if state.driver_features & !self.features() != 0 {
            return bad("driver_features");
        }
        if state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
            && !self.backend.accepts(state.driver_features)
        {
            return bad("driver_features");
        }
        self.backend.check(&state.backend)
    }

    /// Becomes the device of a record, and wakes both sides.
    pub fn restore(&mut self, state: &DeviceState) -> Result<(), RecordError> {
        self.check(state)?;
        self.regs = state.clone();
        let live = self.is_live() && !state.needs_reset;
        let queues = live.then_some(state.queues.as_slice());
        self.call.restore_config_generation(state.config_generation);
        if let Err(e) = self.call.restore(state.interrupt_status, state.needs_reset) {
            warn!("the guest's interrupt line failed: {e}");
        }
        if let Err(e) = self.backend.restore(queues, &state.backend) {
            warn!("{e}");
        }
        self.kicks.iter().for_each(ring);
        Ok(())
    }

    fn features(&self) -> u64 {
        self.backend.features()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn is_live(&self) -> bool {
        self.regs.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
    }

    fn read_register(&self, offset: u32) -> u32 {
        let regs = &self.regs;
        match offset {
            regs::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            regs::VIRTIO_MMIO_VERSION => VERSION,
            regs::VIRTIO_MMIO_DEVICE_ID => self.backend.device_id(),
            regs::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            regs::VIRTIO_MMIO_DEVICE_FEATURES => half(self.features(), regs.device_features_sel),
            regs::VIRTIO_MMIO_QUEUE_NUM_MAX => {
                let max = self.backend.queue_sizes_max().get(regs.queue_sel as usize);
                max.copied().unwrap_or(0).into()
            }
            regs::VIRTIO_MMIO_QUEUE_READY => self
                .regs
                .queues
                .get(regs.queue_sel as usize)
                .is_some_and(|q| q.ready)
                .into(),
            regs::VIRTIO_MMIO_INTERRUPT_STATUS => self.call.interrupt_status(),
            regs::VIRTIO_MMIO_STATUS if self.call.needs_reset() => {
                regs.status | VIRTIO_CONFIG_S_NEEDS_RESET
            }
            regs::VIRTIO_MMIO_STATUS => regs.status,
            regs::VIRTIO_MMIO_CONFIG_GENERATION => self.call.config_generation(),
            // No shared memory regions: the length of each is all ones.
            regs::VIRTIO_MMIO_SHM_LEN_LOW | regs::VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            regs::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.regs.device_features_sel = value,
            regs::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.regs.driver_features_sel = value,
            regs::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            regs::VIRTIO_MMIO_QUEUE_SEL => self.regs.queue_sel = value,
            regs::VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            regs::VIRTIO_MMIO_INTERRUPT_ACK => self.call.acknowledge(value),
            regs::VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    fn accept_features(&mut self, value: u32) {
        if self.regs.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            return;
        }
        let features = &mut self.regs.driver_features;
        match self.regs.driver_features_sel {
            0 => set_low(features, value),
            1 => set_high(features, value),
            _ => {}
        }
    }

    fn write_queue_register(&mut self, offset: u32, value: u32) {
        if self.is_live() {
            debug!("ignored write at queue register {offset:#x} of a live device");
            return;
        }
        let Some(queue) = self.regs.queues.get_mut(self.regs.queue_sel as usize) else {
            return;
        };
        match offset {
            // A size that does not fit is refused when the driver gets ready.
            regs::VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            regs::VIRTIO_MMIO_QUEUE_READY => queue.ready = value == 1,
            regs::VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            regs::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            regs::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.avail, value),
            regs::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.avail, value),
            regs::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used, value),
            regs::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used, value),
            _ => debug!("ignored write at device register {offset:#x}"),
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let set = value & !self.regs.status;
        let mut allowed = value & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if set & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !self.features_are_good() {
            // The driver reads back and sees that the bit did not stay.
            allowed &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        self.regs.status |= allowed;
        if set & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.start();
        }
    }

    fn features_are_good(&self) -> bool {
        let driver = self.regs.driver_features;
        let offered = driver & !self.features() == 0;
        driver & 1 << VIRTIO_F_VERSION_1 != 0 && offered && self.backend.accepts(driver)
    }

    fn start(&mut self) {
        let features = self.regs.driver_features;
        for queue in &mut self.regs.queues {
            queue.event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
            queue.indirect = features & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0;
            queue.device_features = features & DEVICE_FEATURES;
        }
        let negotiated = self.regs.status & VIRTIO_CONFIG_S_FEATURES_OK != 0;
        let outcome = match negotiated {
            true => self.backend.activate(&self.regs.queues),
            false => Err(BackendError::NotReady),
        };
        let Err(e) = outcome else {
            return;
        };
        // A guest can do that in a loop.
        if let Some(left_out) = self.log.line(now_us()) {
            warn!("{e}{left_out}");
        }
        if let Err(e) = self.call.ask_for_reset() {
            warn!("the guest's interrupt line failed: {e}");
        }
    }

    fn reset(&mut self) {
        if self.is_live() && self.backend.deactivate().is_err() {
            warn!("the device's backend has ended");
        }
        self.call.reset();
        self.regs = reset_registers(&*self.backend);
    }

    fn notify(&mut self, queue: u32) {
        match self.kicks.get(queue as usize / 2) {
            Some(kick) => ring(kick),
            None if self.is_live() => self.backend.notify(queue),
            None => {}
        }
    }
}

fn ring(kick: &EventFd) {
    // A full counter is a ring already.
    let _ = kick.write(1);
}

fn reset_registers(backend: &dyn Backend) -> DeviceState {
    let queues = backend.queue_sizes_max().iter();
    DeviceState {
        device_id: backend.device_id(),
        queues: queues
            .map(|&size| QueueState {
                size,
                ..QueueState::default()
            })
            .collect(),
        ..DeviceState::default()
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(word: &mut u64, value: u32) {
    *word = *word & !0xffff_ffff | u64::from(value);
}

fn set_high(word: &mut u64, value: u32) {
    *word = *word & 0xffff_ffff | u64::from(value) << 32;
}
