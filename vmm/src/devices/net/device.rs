//! The network device: one queue pair, served by the packet worker, and the link that the worker reports.
//!
//! Invariants: from activation to deactivation only the worker touches the queues.
//!
//! Does not see packets.

use std::sync::Arc;

use colo_fastpath::net_offer::NetOffer;
use colo_fastpath::ring::{Call, QUEUE_SIZE_MAX, QueueState};
use colo_fastpath::worker::{PortState, WorkerHandle};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

use crate::devices::virtio_mmio::{Backend, BackendError};
use crate::machine::RecordError;

use super::state::NetState;

/// The backend of a network device.
#[derive(Debug)]
pub struct Net {
    offer: NetOffer,
    call: Arc<Call>,
    worker: WorkerHandle,
}

impl Net {
    /// A network device that `worker` serves, which reports the link to `call`.
    pub fn new(offer: NetOffer, call: Arc<Call>, worker: WorkerHandle) -> Self {
        Self {
            offer,
            call,
            worker,
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

    fn queue_sizes_max(&self) -> &'static [u16] {
        &[QUEUE_SIZE_MAX; 2]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.offer.config(self.call.link_is_up());
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = config.get(offset + i).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, queues: &[QueueState]) -> Result<(), BackendError> {
        self.worker
            .activate(pair_of(queues)?)
            .map_err(|_| BackendError)
    }

    fn deactivate(&mut self) -> Result<(), BackendError> {
        self.worker.deactivate().map_err(|_| BackendError)
    }

    fn save(&self) -> Vec<u8> {
        let link_is_up = self.call.link_is_up();
        NetState { link_is_up }.to_bytes()
    }

    fn check(&self, saved: &[u8]) -> Result<(), RecordError> {
        NetState::from_bytes(saved).map(|_| ())
    }

    fn restore(&mut self, queues: Option<&[QueueState]>, saved: &[u8]) -> Result<(), BackendError> {
        if let Ok(state) = NetState::from_bytes(saved) {
            self.call.restore_link(state.link_is_up);
        }
        let queues = queues.map(pair_of).transpose()?;
        self.worker.restore(queues).map_err(|_| BackendError)
    }
}

/// The transport has as many queues as [`Backend::queue_sizes_max`] says.
fn pair_of(queues: &[QueueState]) -> Result<PortState, BackendError> {
    queues.try_into().map_err(|_| BackendError)
}
