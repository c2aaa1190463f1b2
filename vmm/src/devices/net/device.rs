//! The network device: one queue pair, served by the packet worker.
//!
//! Invariants: from activation to deactivation only the worker touches the queues.
//!
//! Does not see packets.

use colo_fastpath::Mac;
use colo_fastpath::net_offer::{NET_CONFIG_BYTES, NetOffer};
use colo_fastpath::ring::{QUEUE_SIZE_MAX, QueueState};
use colo_fastpath::worker::{PortState, WorkerHandle};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

use crate::devices::virtio_mmio::{Backend, BackendError};

/// The backend of a network device.
#[derive(Debug)]
pub struct Net {
    config: [u8; NET_CONFIG_BYTES],
    worker: WorkerHandle,
}

impl Net {
    /// A network device that `worker` serves.
    pub fn new(mac: Mac, mtu: u16, worker: WorkerHandle) -> Self {
        let config = NetOffer { mac, mtu }.config();
        Self { config, worker }
    }
}

impl Backend for Net {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        NetOffer::FEATURES
    }

    fn queue_sizes_max(&self) -> &'static [u16] {
        &[QUEUE_SIZE_MAX; 2]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, queues: &[QueueState]) -> Result<(), BackendError> {
        self.worker
            .activate(pair_of(queues)?)
            .map_err(|_| BackendError)
    }

    fn deactivate(&mut self) -> Result<(), BackendError> {
        self.worker.deactivate().map_err(|_| BackendError)
    }

    fn restore(&mut self, queues: Option<&[QueueState]>) -> Result<(), BackendError> {
        let queues = queues.map(pair_of).transpose()?;
        self.worker.restore(queues).map_err(|_| BackendError)
    }
}

/// The transport has as many queues as [`Backend::queue_sizes_max`] says.
fn pair_of(queues: &[QueueState]) -> Result<PortState, BackendError> {
    queues.try_into().map_err(|_| BackendError)
}
