//! A whole machine, and what roles and the checkpoint engine may do with it.
//!
//! Invariants: a machine is made stopped; two machines made from equal configurations take each
//! other's records; dropping it ends all its threads.
//!
//! Does not decide when to pause, save or restore.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use colo_fastpath::net_offer::NetOffer;
use colo_fastpath::nic::Nic;
use colo_fastpath::ring::{Call, GuestRam, MemoryError};
use colo_fastpath::worker::{
    PortState, PortWiring, WorkerConfig, WorkerGone, WorkerHandle, quiesce_all, spawn_shards,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::checkpoint::dirty::DirtySnapshot;
use crate::checkpoint::pages::PageBitmap;
use crate::config::{Config, HostConfig};
use crate::devices::net::{ControlSnapshot, ControlStats, Net, PAIRS_MAX};
use crate::devices::virtio_mmio::{DeviceState, NOTIFY_OFFSET, VirtioMmio};

use super::boot::{self, BootError, MMIO_BASE};
use super::cpuid;
use super::exits::{ExitSnapshot, Platform, VmExit, lock};
use super::host_memory;
use super::kvm::KvmError;
use super::record::RecordError;
use super::states::StateKeeper;
use super::urgent::Unhurried;
use super::vcpu::{VcpuError, VcpuHandle};
use super::vcpu_shape::{MSR_IA32_TSC, VcpuShape, read_msr};
use super::view::GuestView;
use super::vm::Vm;

/// Interrupt line of the first device; the user-mode guest only prints it.
const FIRST_LINE: u32 = 5;

/// A machine could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// Less memory than the guest needs.
    #[error("vm.ram_mib = {wanted_mib}: only {free_mib} MiB are available on this host; lower it")]
    NoMemory {
        /// What the configuration asks for.
        wanted_mib: u64,
        /// What the kernel says is available.
        free_mib: u64,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The image.
    #[error("vm.kernel = {kernel}: {source}")]
    Boot {
        /// Which.
        kernel: String,
        /// What is wrong with it.
        source: BootError,
    },
    /// A record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A record from a machine of another shape.
    #[error("the record has {found} vCPUs, this machine {expected}")]
    Shape {
        /// In the record.
        found: usize,
        /// Here.
        expected: usize,
    },
    /// The packet worker.
    #[error(transparent)]
    Worker(#[from] WorkerGone),
    /// A machine needs one, and cannot have more ends of it than queue pairs.
    #[error(
        "host.shards = {shards}: the NIC has {ends} ends; there must be one for each shard, 1 to {PAIRS_MAX}"
    )]
    Nics {
        /// What the configuration asks for.
        shards: usize,
        /// What there is.
        ends: usize,
    },
    /// The packet workers could not be started, most often because of what their NIC says.
    #[error("packet workers: {0}")]
    Start(#[source] io::Error),
    /// A thread or descriptor.
    #[error("no descriptors or threads for the machine: {0}")]
    Host(#[from] io::Error),
}

/// Something that happened in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Which vCPU.
    pub vcpu: u8,
    /// How it ended.
    pub exit: VmExit,
}

/// Where a machine reports.
#[derive(Debug)]
pub struct Events {
    receiver: Receiver<Event>,
    wake: Arc<EventFd>,
}

impl Events {
    /// Readable when [`Events::next`] may have something.
    pub fn wake_fd(&self) -> &EventFd {
        &self.wake
    }

    /// The next event, if there is one.
    pub fn next(&self) -> Option<Event> {
        match self.receiver.try_recv() {
            Ok(event) => Some(event),
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => {
                let _ = self.wake.read();
                // One may have come between the look and the read.
                self.receiver.try_recv().ok()
            }
        }
    }

    /// Waits for the next event; `None` when the machine is gone.
    pub fn wait(&self) -> Option<Event> {
        self.receiver.recv().ok()
    }
}

/// A machine: RAM, vCPU threads, one network device and its workers.
#[derive(Debug)]
pub struct Machine {
    // Fields are dropped in this order: vCPUs first, RAM (inside `vm`) last.
    pub(super) vcpus: Vec<VcpuHandle>,
    workers: Vec<WorkerHandle>,
    control: Arc<ControlStats>,
    net: Arc<Mutex<VirtioMmio>>,
    kernel: String,
    cmdline: String,
    pub(super) states: StateKeeper,
    pub(super) unhurried: Unhurried,
    pub(super) vm: Vm,
}

impl Machine {
    /// Makes a machine with nothing loaded and all vCPUs paused, with a worker for each of `nics`:
    /// the ends of its NIC, one for each shard. The guest's console goes to `console`.
    pub fn create_stopped(
        config: &Config,
        nics: Vec<Box<dyn Nic>>,
        console: Box<dyn Write + Send>,
    ) -> Result<(Self, Events), MachineError> {
        host_memory::check(config.vm.ram_mib, config.vm.pages())?;
        let ram = Arc::new(GuestRam::new(config.vm.ram_mib << 20, config.vm.pages())?);
        let vm = Vm::new(ram, config.dirty_settings())?;
        Self::create_in(vm, config, nics, console)
    }

    /// The same, around RAM that exists and whose bytes are not those of its memory file: it cannot be
    /// mapped a second time, so this machine is not to be replicated.
    pub fn create_around(
        ram: Arc<GuestRam>,
        config: &Config,
        nics: Vec<Box<dyn Nic>>,
        console: Box<dyn Write + Send>,
    ) -> Result<(Self, Events), MachineError> {
        Self::create_in(Vm::new(ram, None)?, config, nics, console)
    }

    fn create_in(
        vm: Vm,
        config: &Config,
        nics: Vec<Box<dyn Nic>>,
        console: Box<dyn Write + Send>,
    ) -> Result<(Self, Events), MachineError> {
        let ram = vm.ram().clone();
        let interrupt = EventFd::new(EFD_NONBLOCK)?;
        let call = Arc::new(Call::new(interrupt.try_clone()?));
        let (shards, ends) = (config.host.shards, nics.len());
        if shards != ends || !(1..=PAIRS_MAX).contains(&ends) {
            return Err(MachineError::Nics { shards, ends });
        }
        let kicks = add_doorbells(&vm, shards)?;
        let workers =
            spawn_workers(&config.host, nics, &ram, &call, &kicks).map_err(MachineError::Start)?;
        let offer = NetOffer {
            guest_checksum: config.net.guest_checksum,
            ..NetOffer::new(config.net.mac, config.net.mtu)
        };
        let backend = Net::new(offer, ram, call.clone(), workers.clone());
        let control = backend.control_stats();
        let net = Arc::new(Mutex::new(VirtioMmio::new(Box::new(backend), call, kicks)));

        let platform = Arc::new(Platform::new(
            vec![(MMIO_BASE, net.clone())],
            console,
            interrupt,
        ));
        let (sender, receiver) = channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let events = Events {
            receiver,
            wake: wake.clone(),
        };
        let vcpus = (0..config.vm.vcpus)
            .map(|index| spawn_vcpu(&vm, index, &platform, &sender, &wake))
            .collect::<Result<_, _>>()?;
        let (kernel, cmdline) = (config.vm.kernel.clone(), config.vm.cmdline.clone());
        Ok((
            Self {
                vcpus,
                workers,
                control,
                net,
                kernel,
                cmdline,
                states: StateKeeper::new(&vm),
                unhurried: Unhurried::default(),
                vm,
            },
            events,
        ))
    }

    /// Loads a user-mode guest; it starts with [`Machine::resume_vcpus`].
    pub fn load(&self, image: &[u8]) -> Result<(), MachineError> {
        let clock = self.vcpus[0].execute(|fd, _| clock_arguments(fd))??;
        let devices = format!("virtio_mmio.device=512@{MMIO_BASE:#x}:{FIRST_LINE}");
        let cmdline = format!("{devices} {clock} {}", self.cmdline);
        let entry = boot::load(self.ram(), image, cmdline.trim_end()).map_err(|source| {
            MachineError::Boot {
                kernel: self.kernel.clone(),
                source,
            }
        })?;
        self.vcpus[0].execute(move |fd, _| boot::enter_user_mode(fd, entry))??;
        Ok(())
    }

    /// Guest memory.
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.vm.ram()
    }

    /// The packet workers, one for each shard: worker `i` serves queue pair `i`. There is at least one.
    pub fn workers(&self) -> &[WorkerHandle] {
        &self.workers
    }

    /// The first packet worker.
    pub fn worker(&self) -> &WorkerHandle {
        &self.workers[0]
    }

    /// What the network device's control queue has been asked for.
    pub fn control(&self) -> ControlSnapshot {
        self.control.snapshot()
    }

    /// Number of vCPUs.
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.len()
    }

    /// Reads all devices as one record. vCPUs are paused and the workers are quiesced, several of them at one cut
    /// ([`Machine::quiesce_workers`]); they stay so.
    pub fn save_devices(&self) -> Result<Vec<u8>, MachineError> {
        let mut record = Vec::new();
        self.save_devices_at(quiesce_all(&self.workers)?, &mut record);
        Ok(record)
    }

    /// The same, when the workers have been stopped already and have told the states of their queues. The vCPUs stood still
    /// before that. The record is in the memory of `record`.
    pub fn save_devices_at(&self, ports: Vec<Option<PortState>>, record: &mut Vec<u8>) {
        let mut live = Vec::with_capacity(2 * self.workers.len());
        for pair in ports {
            match pair {
                Some(pair) => live.extend(pair.map(Some)),
                None => live.extend([None; 2]),
            }
        }
        let state = lock(&self.net).save(&live);
        *record = state.write_record(std::mem::take(record));
    }

    /// Whether [`Machine::restore_devices`] would take this record, without doing it.
    pub fn check_devices(&self, record: &[u8]) -> Result<(), MachineError> {
        let state = DeviceState::from_bytes(record)?;
        Ok(lock(&self.net).check(&state)?)
    }

    /// Replaces all devices. vCPUs are paused; the workers may run or not.
    pub fn restore_devices(&self, record: &[u8]) -> Result<(), MachineError> {
        let state = DeviceState::from_bytes(record)?;
        Ok(lock(&self.net).restore(&state)?)
    }

    /// Switches dirty logging of guest and host writes; off at first.
    pub fn set_dirty_logging(&self, on: bool) -> Result<(), MachineError> {
        Ok(self.vm.set_dirty_logging(on)?)
    }

    /// Whether writes to guest memory are logged.
    pub fn logs_dirty_pages(&self) -> bool {
        self.vm.dirty().is_on()
    }

    /// Adds the pages written since the last call to `set`.
    pub fn take_dirty(&self, set: &mut PageBitmap) -> Result<(), MachineError> {
        Ok(self.vm.take_dirty(set)?)
    }

    /// What it is in KVM.
    #[cfg(test)]
    pub(crate) fn vm(&self) -> &Vm {
        &self.vm
    }

    /// The dirty log's counters.
    pub fn dirty_stats(&self) -> DirtySnapshot {
        self.vm.dirty().snapshot()
    }

    /// The guest's own mapping of its RAM; a machine without `[replication]` has none.
    pub fn guest_view(&self) -> Option<&Arc<GuestView>> {
        self.vm.view()
    }

    /// Exit statistics, one per vCPU.
    pub fn exits(&self) -> Vec<ExitSnapshot> {
        self.vcpus
            .iter()
            .map(|vcpu| vcpu.stats().snapshot())
            .collect()
    }

    /// Ends all threads and waits for them.
    pub fn stop(&self) {
        for vcpu in &self.vcpus {
            vcpu.stop();
        }
        self.workers.iter().for_each(WorkerHandle::stop);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A doorbell for each queue pair: the driver writes the number of the queue (virtio 1.3 section 4.2.2). With one pair
/// there is no other queue, and whatever is written rings.
fn add_doorbells(vm: &Vm, pairs: usize) -> Result<Vec<EventFd>, MachineError> {
    let notify = MMIO_BASE + NOTIFY_OFFSET;
    let mut kicks = Vec::with_capacity(pairs);
    for pair in 0..pairs {
        let kick = EventFd::new(EFD_NONBLOCK)?;
        if pairs == 1 {
            vm.add_ioeventfd(notify, &kick)?;
        } else {
            for queue in [2 * pair, 2 * pair + 1] {
                vm.add_ioeventfd_for(notify, queue as u32, &kick)?;
            }
        }
        kicks.push(kick);
    }
    Ok(kicks)
}

fn spawn_workers(
    host: &HostConfig,
    nics: Vec<Box<dyn Nic>>,
    ram: &Arc<GuestRam>,
    call: &Arc<Call>,
    kicks: &[EventFd],
) -> io::Result<Vec<WorkerHandle>> {
    let mut wirings = Vec::with_capacity(kicks.len());
    for kick in kicks {
        wirings.push(PortWiring {
            ram: ram.clone(),
            call: call.clone(),
            kick: kick.try_clone()?,
        });
    }
    let configs = (0..kicks.len()).map(|shard| worker_config(host, shard));
    let workers = spawn_shards(configs.collect(), nics, wirings)?;
    for worker in workers.iter().skip(1) {
        // One end speaks for the NIC. A worker that has ended shows nothing anyway.
        let _ = worker.execute(|edge, _| edge.hide_link());
    }
    Ok(workers)
}

fn worker_config(host: &HostConfig, shard: usize) -> WorkerConfig {
    WorkerConfig {
        name: match shard {
            0 => "worker".to_owned(),
            shard => format!("worker{shard}"),
        },
        poll: host.poll,
        cpu: host.cpu_of(shard),
        frame_slots: host.frame_slots,
        tx: host.tx,
        stages: host.stages,
    }
}

fn spawn_vcpu(
    vm: &Vm,
    index: u8,
    platform: &Arc<Platform>,
    events: &Sender<Event>,
    wake: &Arc<EventFd>,
) -> Result<VcpuHandle, MachineError> {
    let fd = vm.create_vcpu(index)?;
    let table = cpuid::table_for(vm.kvm(), index)?;
    fd.set_cpuid2(&table)
        .map_err(KvmError::refused("set CPUID"))?;
    let shape = VcpuShape::probe(vm.kvm(), vm.fd(), &fd)?;
    let (events, wake) = (events.clone(), wake.clone());
    let on_end = move |exit| {
        // Nobody listens any more when the machine is being dropped.
        let _ = events.send(Event { vcpu: index, exit });
        let _ = wake.write(1);
    };
    Ok(VcpuHandle::spawn(
        format!("vcpu{index}"),
        fd,
        shape,
        platform.clone(),
        vm.dirty().clone(),
        on_end,
    )?)
}

/// `tsc_khz=` and `wall_ns=`: the wall clock at TSC 0.
fn clock_arguments(fd: &kvm_ioctls::VcpuFd) -> Result<String, KvmError> {
    let khz = fd
        .get_tsc_khz()
        .map_err(KvmError::refused("tell the TSC frequency"))?;
    let tsc = read_msr(fd, MSR_IA32_TSC)?;
    let now_ns = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64);
    let since_ns = u128::from(tsc) * 1_000_000 / u128::from(khz.max(1));
    let wall_ns = now_ns.saturating_sub(since_ns as u64);
    Ok(format!("tsc_khz={khz} wall_ns={wall_ns}"))
}
