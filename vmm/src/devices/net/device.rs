//! The network device: queue pairs, each served by its packet worker, the link that the first worker reports, and the
//! control queue.
//!
//! Invariants: from activation to deactivation only worker `i` touches queue pair `i`, and only the vCPU's thread the
//! control queue; frames for the guest go to the pairs that it uses.
//!
//! Does not see packets.

use std::sync::Arc;

use colo_fastpath::clock::now_us;
use colo_fastpath::log_budget::LogBudget;
use colo_fastpath::net_offer::NetOffer;
use colo_fastpath::ring::{Call, GuestRam, QUEUE_SIZE_MAX, QueueState};
use colo_fastpath::worker::{PortState, WorkerGone, WorkerHandle, set_active_pairs};
use tracing::warn;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

use crate::devices::virtio_mmio::{Backend, BackendError};
use crate::machine::RecordError;

use super::control::{Control, ControlError, ControlStats};
use super::state::NetState;

/// Queue pairs that a device may have.
pub const PAIRS_MAX: usize = 8;

const QUEUE_SIZES_MAX: [u16; 2 * PAIRS_MAX + 1] = [QUEUE_SIZE_MAX; 2 * PAIRS_MAX + 1];

impl From<WorkerGone> for BackendError {
    fn from(_: WorkerGone) -> Self {
        Self::Gone
    }
}

/// The backend of a network device.
#[derive(Debug)]
pub struct Net {
    offer: NetOffer,
    ram: Arc<GuestRam>,
    call: Arc<Call>,
    workers: Vec<WorkerHandle>,
    control: Option<Control>,
    /// Pairs that the driver has set up: the first ones.
    ready_pairs: u16,
    /// Pairs that the driver uses.
    active_pairs: u16,
    /// Of broken control queues, which a guest can make in a loop.
    log: LogBudget,
    stats: Arc<ControlStats>,
}

impl Net {
    /// A network device with a queue pair for each of `workers`, 1 to [`PAIRS_MAX`]. The first reports the link to
    /// `call`.
    pub fn new(
        offer: NetOffer,
        ram: Arc<GuestRam>,
        call: Arc<Call>,
        workers: Vec<WorkerHandle>,
    ) -> Self {
        let pairs = workers.len().min(PAIRS_MAX) as u16;
        Self {
            offer: NetOffer { pairs, ..offer },
            ram,
            call,
            workers,
            control: None,
            ready_pairs: 0,
            active_pairs: 1,
            log: LogBudget::default(),
            stats: Arc::default(),
        }
    }

    /// What the control queue counts.
    pub fn control_stats(&self) -> Arc<ControlStats> {
        self.stats.clone()
    }

    /// The number of the control queue: behind all pairs, if there are several.
    fn control_queue(&self) -> Option<usize> {
        (self.offer.pairs > 1).then_some(2 * usize::from(self.offer.pairs))
    }

    /// Whether the driver has negotiated several pairs; told by any of its queues.
    fn is_multiqueue(queues: &[QueueState]) -> bool {
        let features = queues.first().map_or(0, |queue| queue.device_features);
        features & NetOffer::MULTIQUEUE == NetOffer::MULTIQUEUE
    }

    /// The first pairs that are ready, all there are if the driver can choose, else one.
    fn ready_pairs(&self, queues: &[QueueState]) -> u16 {
        let most = match Self::is_multiqueue(queues) {
            true => self.offer.pairs,
            false => 1,
        };
        let pairs = queues.chunks_exact(2).take(usize::from(most));
        pairs
            .take_while(|pair| pair.iter().all(|queue| queue.ready))
            .count() as u16
    }

    /// Takes over the control queue, if the driver has one.
    fn take_control(&mut self, queues: &[QueueState]) -> Result<(), BackendError> {
        self.control = None;
        let Some(number) = self.control_queue().filter(|_| Self::is_multiqueue(queues)) else {
            return Ok(());
        };
        let queue = queues.get(number).filter(|queue| queue.ready);
        let queue = *queue.ok_or(BackendError::NotReady)?;
        match Control::new(self.ram.clone(), queue) {
            Ok(control) => self.control = Some(control),
            Err(e) => self.fault(&e),
        }
        Ok(())
    }

    fn use_pairs(&mut self, pairs: u16) -> Result<(), WorkerGone> {
        self.active_pairs = pairs;
        set_active_pairs(&self.workers, pairs.into())
    }

    fn fault(&mut self, error: &ControlError) {
        if let Some(left_out) = self.log.line(now_us()) {
            warn!("{error}; the device asks for a reset{left_out}");
        }
        self.control = None;
        self.stats.ring_errors.add(1);
        if let Err(e) = self.call.ask_for_reset() {
            warn!("the guest's interrupt line failed: {e}");
        }
    }
}

impl Backend for Net {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        self.offer.features()
    }

    /// Several pairs need a control queue (section 5.1.3.1). A control queue without several pairs would be the third
    /// queue, whose doorbell is the second pair's.
    fn accepts(&self, features: u64) -> bool {
        [0, NetOffer::MULTIQUEUE].contains(&(features & NetOffer::MULTIQUEUE))
    }

    fn queue_sizes_max(&self) -> &'static [u16] {
        let pairs = 2 * usize::from(self.offer.pairs);
        &QUEUE_SIZES_MAX[..self.control_queue().map_or(pairs, |number| number + 1)]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.offer.config(self.call.link_is_up());
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = config.get(offset + i).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, queues: &[QueueState]) -> Result<(), BackendError> {
        self.ready_pairs = self.ready_pairs(queues);
        if self.ready_pairs == 0 {
            return Err(BackendError::NotReady);
        }
        self.take_control(queues)?;
        // Section 5.1.6.5.6: the first pair until the driver says otherwise.
        self.use_pairs(1)?;
        let pairs = pairs_of(queues).take(self.ready_pairs.into());
        for (worker, pair) in self.workers.iter().zip(pairs) {
            worker.activate(pair)?;
        }
        Ok(())
    }

    fn notify(&mut self, queue: u32) {
        if self.control_queue() != Some(queue as usize) {
            return;
        }
        let Some(mut control) = self.control.take() else {
            return;
        };
        let stats = self.stats.clone();
        let served = control.serve(&stats, |pairs| {
            (1..=self.ready_pairs).contains(&pairs) && self.use_pairs(pairs).is_ok()
        });
        match served {
            Ok(call) => {
                self.control = Some(control);
                if call && let Err(e) = self.call.used_buffers([true; 2]) {
                    warn!("the guest's interrupt line failed: {e}");
                }
            }
            Err(e) => self.fault(&e),
        }
    }

    fn save_queues(&self, queues: &mut [QueueState]) {
        let number = self.control_queue().unwrap_or(usize::MAX);
        if let (Some(control), Some(queue)) = (&self.control, queues.get_mut(number)) {
            *queue = control.state();
        }
    }

    fn deactivate(&mut self) -> Result<(), BackendError> {
        self.control = None;
        self.ready_pairs = 0;
        self.workers.iter().try_for_each(WorkerHandle::deactivate)?;
        Ok(self.use_pairs(1)?)
    }

    fn save(&self) -> Vec<u8> {
        let state = NetState {
            link_is_up: self.call.link_is_up(),
            active_pairs: self.active_pairs,
        };
        state.to_bytes()
    }

    fn check(&self, saved: &[u8]) -> Result<(), RecordError> {
        NetState::from_bytes(saved)?.check(self.offer.pairs)
    }

    fn restore(&mut self, queues: Option<&[QueueState]>, saved: &[u8]) -> Result<(), BackendError> {
        let queues = queues.unwrap_or_default();
        self.ready_pairs = self.ready_pairs(queues);
        self.take_control(queues)?;
        let mut pairs = pairs_of(queues).take(self.ready_pairs.into());
        for worker in &self.workers {
            worker.restore(pairs.next())?;
        }
        if let Ok(state) = NetState::from_bytes(saved) {
            self.call.restore_link(state.link_is_up);
            self.use_pairs(state.active_pairs.min(self.ready_pairs.max(1)))?;
        }
        Ok(())
    }
}

fn pairs_of(queues: &[QueueState]) -> impl Iterator<Item = PortState> {
    queues.as_chunks::<2>().0.iter().copied()
}
