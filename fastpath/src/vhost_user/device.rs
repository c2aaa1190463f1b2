//! The device behind a vhost-user socket, as the front-end's requests shape it.
//!
//! Invariants: the rings are with the worker exactly while both of them are started and enabled and
//! there is memory; whatever changes under them, they are taken out of service first and put back
//! where they were; a request that cannot be served is an error, which costs the connection.
//!
//! Does not read the socket (the `vhost` crate does) and does not touch rings.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::{debug, info};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserVirtioFeatures,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use crate::net_offer::NetOffer;
use crate::ring::{GuestRam, MemoryError, QUEUE_SIZE_MAX, QueueState};
use crate::worker::WorkerGone;

use super::line::adopt;
use super::table::{Table, TableError, TableRegion};
use super::{GuestRings, GuestSide, VhostUserStats};

/// Queues of the device: guest_rx and guest_tx.
const QUEUES: usize = 2;
/// Descriptor, available and used entries and the fixed words of the two rings.
const DESCRIPTOR_BYTES: u64 = 16;

/// A request that the device does not serve.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("features {0:#x} were not offered")]
    Features(u64),
    #[error("without VIRTIO_F_VERSION_1 the rings cannot be served")]
    Legacy,
    #[error("protocol features {0:#x} were not offered")]
    ProtocolFeatures(u64),
    #[error("there is no ring {0}; the device has one queue pair")]
    NoSuchRing(u32),
    #[error("ring {index}: {size} entries; a power of two up to {QUEUE_SIZE_MAX} can be served")]
    RingSize { index: u32, size: u32 },
    #[error("ring {index}: index {base} has more than 16 bits")]
    RingBase { index: u32, base: u32 },
    #[error("ring {index}: its {part} at {address:#x} is not in the memory table")]
    RingAddress {
        index: usize,
        part: &'static str,
        address: u64,
    },
    #[error("ring {index}: its {line} descriptor: {source}")]
    Line {
        index: u8,
        line: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    Table(#[from] TableError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Worker(#[from] WorkerGone),
    #[error("{0} is not served")]
    Unserved(&'static str),
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::ReqHandlerError(io::Error::other(refusal))
    }
}

/// One ring as far as it has been set up.
#[derive(Debug, Default)]
struct Ring {
    size: u16,
    addresses: Option<Addresses>,
    next_avail: u16,
    started: bool,
    enabled: bool,
    kick: Option<EventFd>,
    call: Option<EventFd>,
    error: Option<EventFd>,
}

/// Where a ring is, in the front-end's own addresses.
#[derive(Clone, Copy, Debug)]
struct Addresses {
    descriptors: u64,
    avail: u64,
    used: u64,
}

/// The device of one socket.
#[derive(Debug)]
pub(super) struct Device<G> {
    side: G,
    offer: NetOffer,
    stats: Arc<VhostUserStats>,
    features: u64,
    protocol_features: u64,
    memory: Option<(Table, Arc<GuestRam>)>,
    rings: [Ring; QUEUES],
    in_service: bool,
}

impl<G: GuestSide> Device<G> {
    pub(super) fn new(side: G, offer: NetOffer, stats: Arc<VhostUserStats>) -> Self {
        Self {
            side,
            offer,
            stats,
            features: 0,
            protocol_features: 0,
            memory: None,
            rings: Default::default(),
            in_service: false,
        }
    }

    /// The front-end is gone: nothing of it is kept.
    pub(super) fn disconnected(&mut self) -> std::result::Result<(), WorkerGone> {
        let outcome = self.stop();
        self.forget();
        outcome
    }

    fn forget(&mut self) {
        self.features = 0;
        self.protocol_features = 0;
        self.memory = None;
        self.rings = Default::default();
    }

    fn offered(&self) -> u64 {
        self.offer.features()
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn negotiated(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    fn ring(&mut self, index: u32) -> std::result::Result<&mut Ring, Refusal> {
        self.rings
            .get_mut(index as usize)
            .ok_or(Refusal::NoSuchRing(index))
    }

    /// Changes something while no ring is in service.
    fn change(
        &mut self,
        change: impl FnOnce(&mut Self) -> std::result::Result<(), Refusal>,
    ) -> Result<()> {
        self.stop().map_err(Refusal::from)?;
        change(self)?;
        Ok(self.start_if_ready()?)
    }

    /// Takes the rings out of service and remembers how far they had come.
    fn stop(&mut self) -> std::result::Result<(), WorkerGone> {
        if !std::mem::take(&mut self.in_service) {
            return Ok(());
        }
        self.stats.stops.add(1);
        match self.side.detach()? {
            Some(states) => {
                for (ring, state) in self.rings.iter_mut().zip(states) {
                    ring.next_avail = state.next_avail;
                }
            }
            // Everything taken before the fault was completed: the used index tells how much.
            None => {
                for index in 0..QUEUES {
                    if let Ok(Some(used)) = self.used_index(index) {
                        self.rings[index].next_avail = used;
                    }
                }
            }
        }
        Ok(())
    }

    fn start_if_ready(&mut self) -> std::result::Result<(), Refusal> {
        let up = |ring: &Ring| ring.started && ring.enabled && ring.addresses.is_some();
        let Some((_, ram)) = &self.memory else {
            return Ok(());
        };
        if self.in_service || !self.rings.iter().all(up) {
            return Ok(());
        }
        if !self.negotiated(VIRTIO_F_VERSION_1) {
            return Err(Refusal::Legacy);
        }
        let ram = ram.clone();
        let queues = [self.queue_state(0)?, self.queue_state(1)?];
        let copy = |line: &Option<EventFd>| line.as_ref().and_then(|l| l.try_clone().ok());
        let rings = GuestRings {
            ram,
            queues,
            kicks: self.rings.each_ref().map(|ring| copy(&ring.kick)),
            calls: self.rings.each_ref().map(|ring| copy(&ring.call)),
            errors: self.rings.each_ref().map(|ring| copy(&ring.error)),
        };
        self.side.attach(rings)?;
        self.in_service = true;
        self.stats.starts.add(1);
        Ok(())
    }

    /// A ring in guest addresses, as the worker takes it over.
    fn queue_state(&self, index: usize) -> std::result::Result<QueueState, Refusal> {
        let ring = &self.rings[index];
        let entries = u64::from(ring.size);
        let addresses = ring.addresses.as_ref();
        let place = |part, of: fn(&Addresses) -> u64, bytes| {
            let address = addresses.map_or(0, of);
            let table = self.memory.as_ref().map(|(table, _)| table);
            let gpa = table.and_then(|table| table.gpa_of(address, bytes));
            gpa.ok_or(Refusal::RingAddress {
                index,
                part,
                address,
            })
        };
        let descriptors = place(
            "descriptor table",
            |a| a.descriptors,
            DESCRIPTOR_BYTES * entries,
        )?;
        let avail = place("available ring", |a| a.avail, 6 + 2 * entries)?;
        let used = place("used ring", |a| a.used, 6 + 8 * entries)?;
        let next_used = self.used_index(index)?.unwrap_or(0);
        if next_used != ring.next_avail {
            // An earlier back-end left chains unused: they are taken again.
            info!(
                "vhost-user ring {index} goes on at {next_used}, not {}",
                ring.next_avail
            );
        }
        Ok(QueueState {
            size: ring.size,
            ready: true,
            event_idx: self.negotiated(VIRTIO_RING_F_EVENT_IDX),
            indirect: self.negotiated(VIRTIO_RING_F_INDIRECT_DESC),
            device_features: self.features & self.offer.features(),
            descriptors,
            avail,
            used,
            next_avail: next_used,
            next_used,
            called_at: next_used,
        })
    }

    /// The used index in memory; `None` before memory and addresses are known.
    fn used_index(&self, index: usize) -> std::result::Result<Option<u16>, Refusal> {
        let (Some((table, ram)), Some(addresses)) = (&self.memory, &self.rings[index].addresses)
        else {
            return Ok(None);
        };
        let refusal = Refusal::RingAddress {
            index,
            part: "used ring",
            address: addresses.used,
        };
        let gpa = table.gpa_of(addresses.used, 4).ok_or(refusal)?;
        Ok(Some(ram.load_u16(gpa + 2, Ordering::Acquire)?))
    }

    fn set_line(
        &mut self,
        index: u8,
        line: &'static str,
        file: Option<File>,
        set: impl FnOnce(&mut Ring, Option<EventFd>),
    ) -> Result<()> {
        let adopted = file.map(adopt).transpose();
        let adopted = adopted.map_err(|source| Refusal::Line {
            index,
            line,
            source,
        })?;
        self.change(|device| {
            set(device.ring(index.into())?, adopted);
            Ok(())
        })
    }
}

impl<G: GuestSide> VhostUserBackendReqHandlerMut for Device<G> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// No longer in use; what is left of it is "disable all rings".
    fn reset_owner(&mut self) -> Result<()> {
        self.change(|device| {
            device
                .rings
                .iter_mut()
                .for_each(|ring| ring.enabled = false);
            Ok(())
        })
    }

    fn reset_device(&mut self) -> Result<()> {
        self.change(|device| {
            device.rings = Default::default();
            device.features = 0;
            Ok(())
        })
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let foreign = features & !self.offered();
        if foreign != 0 {
            return Err(Refusal::Features(foreign).into());
        }
        self.change(|device| {
            device.features = features;
            // Without the protocol features there is no message that enables rings.
            if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
                device.rings.iter_mut().for_each(|ring| ring.enabled = true);
            }
            Ok(())
        })
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions = regions.iter().zip(files).map(|(region, file)| TableRegion {
            gpa: region.guest_phys_addr,
            bytes: region.memory_size,
            user_address: region.user_addr,
            file,
            offset: region.mmap_offset,
        });
        let regions = regions.collect();
        self.change(|device| {
            device.memory = None;
            let table = Table::new(regions)?;
            let sources = table.sources()?;
            let ram = Arc::new(GuestRam::from_regions(sources)?);
            device.memory = Some((table, ram));
            Ok(())
        })?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let good = u16::try_from(num).ok();
        let good = good.filter(|size| size.is_power_of_two() && *size <= QUEUE_SIZE_MAX);
        let size = good.ok_or(Refusal::RingSize { index, size: num })?;
        self.change(|device| {
            device.ring(index)?.size = size;
            Ok(())
        })
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = Addresses {
            descriptors: descriptor,
            avail: available,
            used,
        };
        self.change(|device| {
            device.ring(index)?.addresses = Some(addresses);
            Ok(())
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let next_avail = u16::try_from(base).map_err(|_| Refusal::RingBase { index, base })?;
        self.change(|device| {
            device.ring(index)?.next_avail = next_avail;
            Ok(())
        })
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.change(|device| {
            let ring = device.ring(index)?;
            ring.started = false;
            ring.kick = None;
            Ok(())
        })?;
        let next_avail = self.ring(index)?.next_avail;
        Ok(VhostUserVringState::new(index, next_avail.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.set_line(index, "kick", file, |ring, kick| {
            ring.kick = kick;
            ring.started = true;
        })
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.set_line(index, "call", file, |ring, call| ring.call = call)
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.set_line(index, "error", file, |ring, error| ring.error = error)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let foreign = features & !self.get_protocol_features()?.bits();
        if foreign != 0 {
            return Err(Refusal::ProtocolFeatures(foreign).into());
        }
        self.protocol_features = features;
        Ok(())
    }

    /// Queue pairs.
    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(1)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.change(|device| {
            device.ring(index)?.enabled = enable;
            Ok(())
        })
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let config = self.offer.config(true);
        let rest = config.get(offset as usize..).unwrap_or(&[]);
        let mut answer = vec![0; size as usize];
        let known = rest.len().min(answer.len());
        answer[..known].copy_from_slice(&rest[..known]);
        Ok(answer)
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        // The configuration space is read-only, as in every transport.
        debug!(
            "ignored write of {} bytes at configuration byte {offset}",
            buf.len()
        );
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Refusal::Unserved("a GPU socket").into())
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Refusal::Unserved("a shared object").into())
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        Err(Refusal::Unserved("an in-flight region").into())
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Refusal::Unserved("an in-flight region").into())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Err(Refusal::Unserved("memory slots").into())
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        Err(Refusal::Unserved("memory slots").into())
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        Err(Refusal::Unserved("memory slots").into())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Refusal::Unserved("a device state").into())
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Refusal::Unserved("a device state").into())
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Refusal::Unserved("shared memory").into())
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Refusal::Unserved("a dirty log").into())
    }
}
