//! The thread that moves packets: it owns the queues, the frames, the NIC and its role.
//!
//! Invariants: while there is work it makes no system call besides those of the NIC and the guest is
//! not asked to ring; it sleeps only after asking to be rung and looking once more; the guest is
//! called at most once a batch.
//!
//! Does not decide which frames may leave; its [`Role`] does.

mod command;
mod crowd;
mod edge;
mod front;
mod gather;
mod idle;
mod merge;
mod offload;
mod port;
mod role;
mod shards;
mod slice;
mod verify;
mod wires;

use std::io;
use std::os::fd::AsRawFd;

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;

use tracing::{debug, info, warn};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::clock::now_us;
use crate::frame::{FramePool, TxMode};
use crate::nic::Nic;
use crate::processor;
use crate::ring::Area;
use crate::shard::ShardGroup;
use crate::stats::WorkerStats;

pub use command::{Command, Task, WorkerGone, WorkerHandle};
pub use edge::{Edge, Handed, NicReport};
pub use idle::{PollMode, SPIN_MAX_US};
pub use port::{Delivery, GuestPort, NET_HEADER_BYTES, PortState, Stays};
pub use role::{BATCH, Role, Solo};
pub use shards::{
    Quiesced, quiesce_all, quiesce_all_and, resume_all, set_active_pairs, spawn_shards,
};
pub use wires::PortWiring;

pub(crate) use front::{FRONT_FRAMES, Front, Shown};

use command::Inbox;
use crowd::Crowd;
use idle::{Idle, Next};

/// How to run a worker.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// Thread name.
    pub name: String,
    /// How it waits.
    pub poll: PollMode,
    /// The CPU it is pinned to.
    pub cpu: Option<usize>,
    /// Frames in flight at most.
    pub frame_slots: u32,
    /// With which bytes compared frames leave.
    pub tx: TxMode,
    /// Whether the times of the stages are taken.
    pub stages: bool,
}

/// Starts a worker in the role [`Solo`], without a driver yet.
pub fn spawn(
    config: WorkerConfig,
    nic: Box<dyn Nic>,
    wiring: PortWiring,
) -> io::Result<WorkerHandle> {
    let area = wiring.ram.area().clone();
    Parts::new(config, nic, area, Some(wiring))?
        .start()?
        .launch(None)
}

/// Starts a worker in the role [`Solo`] for guests that come and go and bring their own memory
/// ([`Edge::attach_guest`]).
pub fn spawn_unattached(config: WorkerConfig, nic: Box<dyn Nic>) -> io::Result<WorkerHandle> {
    let slots_bytes = config.frame_slots as usize * nic.slot_bytes();
    let area = Arc::new(Area::reserve(slots_bytes)?);
    Parts::new(config, nic, area, None)?.start()?.launch(None)
}

/// What a worker is made of, its frames in their place. The NIC is not in use yet.
struct Parts {
    config: WorkerConfig,
    nic: Box<dyn Nic>,
    frames: FramePool,
    wiring: Option<PortWiring>,
    stats: Arc<WorkerStats>,
}

impl Parts {
    fn new(
        config: WorkerConfig,
        nic: Box<dyn Nic>,
        area: Arc<Area>,
        wiring: Option<PortWiring>,
    ) -> io::Result<Self> {
        let stats = Arc::new(WorkerStats::default());
        let slot_bytes = nic.slot_bytes();
        let mut frames = FramePool::in_area(area, config.frame_slots, slot_bytes, stats.clone())?;
        if let Some(wiring) = &wiring {
            frames.set_guest(wiring.ram.clone());
        }
        frames.set_tx(config.tx);
        Ok(Self {
            config,
            nic,
            frames,
            wiring,
            stats,
        })
    }

    /// Puts the NIC to use.
    fn start(mut self) -> io::Result<Prepared> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        self.nic.start(&mut self.frames)?;
        let stats = self.stats;
        let port = GuestPort::new(self.wiring, stats.clone());
        let stages = self.config.stages.then(Box::default);
        Ok(Prepared {
            edge: Edge::new(self.frames, self.nic, port, stages, stats.clone()),
            config: self.config,
            wake,
            stats,
        })
    }
}

/// All that a worker needs but a thread.
struct Prepared {
    config: WorkerConfig,
    edge: Edge,
    wake: Arc<EventFd>,
    stats: Arc<WorkerStats>,
}

impl Prepared {
    /// Starts the thread. `group`: it is one of these.
    fn launch(self, group: Option<ShardGroup>) -> io::Result<WorkerHandle> {
        let Self {
            config,
            edge,
            wake,
            stats,
        } = self;
        let (sender, commands) = channel();
        let worker = Worker {
            edge,
            role: Box::new(Solo::default()),
            inbox: Inbox {
                commands,
                wake: wake.clone(),
            },
            idle: Idle::new(config.poll),
            crowd: Crowd::default(),
            stats: stats.clone(),
            halted: false,
            quiesced: false,
            fds: Vec::with_capacity(8),
        };
        let thread = thread::Builder::new().name(config.name).spawn(move || {
            pin(config.cpu);
            if let Err(e) = slice::ask_for_short() {
                debug!("no short time slice: {e}");
            }
            worker.run();
        })?;
        let group = group.unwrap_or_else(|| ShardGroup::new([wake.clone()]));
        Ok(WorkerHandle::new(sender, wake, stats, group, thread))
    }
}

struct Worker {
    edge: Edge,
    role: Box<dyn Role>,
    inbox: Inbox,
    idle: Idle,
    crowd: Crowd,
    stats: Arc<WorkerStats>,
    /// Frames stand still.
    halted: bool,
    /// And the role knows.
    quiesced: bool,
    fds: Vec<libc::pollfd>,
}

impl Worker {
    fn run(mut self) {
        while self.obey() {
            let now_us = now_us();
            let worked = !self.halted && self.step(now_us);
            // Also without progress: a dropped buffer goes back to the guest too.
            self.edge.flush();
            if !self.halted && self.role.shows_link() {
                self.edge.show_link();
            }
            if worked {
                self.stats.busy_batches.add(1);
                self.idle.worked();
                self.crowd.worked();
                continue;
            }
            let may_gather = self.role.may_gather(&self.edge);
            let frames = may_gather.then(|| self.stats.guest_frames());
            match self.idle.next(now_us, frames) {
                Next::Spin if !self.halted => std::hint::spin_loop(),
                Next::Yield if !self.halted => {
                    self.stats.yields.add(1);
                    thread::yield_now();
                    if self.crowd.yielded() && self.role.passes_on() {
                        self.look_around(now_us);
                    }
                }
                Next::Gather if !self.halted => self.gather(),
                _ => self.sleep(now_us),
            }
        }
        self.role.leave(&mut self.edge);
    }

    /// Moves a batch of frames. Gives whether there were any.
    #[inline]
    fn step(&mut self, now_us: u64) -> bool {
        if !self.edge.is_sharded() {
            return self.role.step(&mut self.edge, now_us);
        }
        self.edge.begin_batch(self.role.serves_guest());
        let delivered = self.take_delivered(now_us);
        let moved = self.role.step(&mut self.edge, now_us);
        self.edge.has_crossed() | delivered | moved
    }

    /// Tells the role what other workers have delivered for it. Gives whether there was anything.
    fn take_delivered(&mut self, now_us: u64) -> bool {
        let mut any = false;
        while let Some((delivery, token)) = self.edge.poll_delivered() {
            self.role.delivered(&mut self.edge, now_us, delivery, token);
            any = true;
        }
        any
    }

    /// Takes what other workers have for this one when an epoch ends: what the guest was given is told
    /// to the role before what the guest has sent, and what they hand over is delivered or goes back.
    fn absorb(&mut self) {
        let now_us = now_us();
        self.edge.look();
        self.take_delivered(now_us);
        self.role.absorb(&mut self.edge, now_us);
        self.edge.deliver_last(self.role.serves_guest());
    }

    /// Handles what others ask for; `false` to end.
    fn obey(&mut self) -> bool {
        self.role.awake(now_us());
        while let Ok(command) = self.inbox.commands.try_recv() {
            self.stats.commands.add(1);
            if matches!(command, Command::Stop) {
                return false;
            }
            self.handle(command);
        }
        true
    }

    fn handle(&mut self, command: Command) {
        let edge = &mut self.edge;
        match command {
            Command::Activate(queues) => {
                edge.port.activate(queues);
                self.poll_mode();
            }
            Command::Deactivate(reply) => {
                edge.deactivate();
                let _ = reply.send(());
            }
            Command::Halt(reply) => {
                self.halted = true;
                edge.flush();
                let _ = reply.send(());
            }
            Command::Absorb(reply) => {
                self.absorb();
                self.edge.flush();
                let _ = reply.send(());
            }
            Command::Quiesce(reply) => {
                self.halted = true;
                edge.look();
                self.take_delivered(now_us());
                let edge = &mut self.edge;
                if !std::mem::replace(&mut self.quiesced, true) {
                    self.role.quiesce(edge);
                }
                let _ = reply.send(edge.quiesce());
            }
            Command::Resume => {
                self.halted = false;
                if std::mem::replace(&mut self.quiesced, false) {
                    self.role.resume(edge);
                }
            }
            Command::Restore(queues, reply) => {
                edge.deactivate();
                if let Some(queues) = queues {
                    edge.port.activate(queues);
                }
                self.poll_mode();
                let _ = reply.send(());
            }
            Command::SetRole(role) => {
                self.role.leave(edge);
                info!("role {} follows {}", role.name(), self.role.name());
                self.role = role;
            }
            Command::Run(task) => task(edge, &mut *self.role),
            Command::Stop => {}
        }
        self.edge.flush();
    }

    /// Moves to another processor if others that poll have been on this one for long.
    #[cold]
    fn look_around(&mut self, now_us: u64) {
        self.stats.looks_around.add(1);
        if !self.crowd.look(processor::switches(), now_us) {
            return;
        }
        match processor::leave() {
            Ok(true) => self.stats.moves.add(1),
            Ok(false) => {}
            Err(e) => debug!("this thread cannot leave its processor: {e}"),
        }
    }

    /// Lets frames gather, as long as there is no command.
    fn gather(&mut self) {
        self.stats.gathers.add(1);
        let mut wake = [readable(self.inbox.wake.as_raw_fd())];
        wait(&mut wake, Some(gather::WAIT_US));
        if wake[0].revents != 0 {
            let _ = self.inbox.wake.read();
        }
        self.idle.gathered(crate::clock::now_us());
    }

    /// Waits for a command, the guest, the NIC, the role's descriptors or its deadline.
    fn sleep(&mut self, now_us: u64) {
        self.fds.clear();
        self.fds.push(readable(self.inbox.wake.as_raw_fd()));
        let mut timeout_us = None;
        if !self.halted {
            let wants_guest = self.role.wants_guest_frames();
            let wants_nic = self.role.wants_nic_frames(&mut self.edge);
            let wants_frames = wants_nic && self.edge.reads_nic();
            let reads_guest = wants_guest && self.edge.reads_guest();
            // To ask for a ring is a write to the guest's memory.
            let serves = self.role.serves_guest();
            if serves && self.edge.port.sleep_mode(reads_guest)
                || !self.edge.may_sleep(wants_nic, wants_guest, serves)
            {
                self.poll_mode();
                return;
            }
            self.fds.extend(self.edge.port.kick_fds().map(readable));
            self.edge.poll_fds(wants_frames, &mut self.fds);
            self.role.poll_fds(&mut self.fds);
            timeout_us = self.role.deadline_us().map(|at| at.saturating_sub(now_us));
        }
        let watch_us = self.role.watch_us().map(|at| at.saturating_sub(now_us));
        let timeout_us = [timeout_us, watch_us].into_iter().flatten().min();
        self.stats.sleeps.add(1);
        wait(&mut self.fds, timeout_us);
        let _ = self.inbox.wake.read();
        if !self.halted {
            self.edge.get_up();
            // Quiesced, guest memory stands still; the first step after it looks at everything.
            self.edge.port.drain_kicks();
            self.poll_mode();
        }
        self.idle
            .slept(crate::clock::now_us().saturating_sub(now_us));
    }

    /// Asks the guest for no ring, unless its memory is to stand still; then who puts it to sleep asks again.
    fn poll_mode(&mut self) {
        if self.role.serves_guest() {
            self.edge.port.poll_mode();
        }
    }
}

fn readable(fd: libc::c_int) -> libc::pollfd {
    libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    }
}

fn wait(fds: &mut [libc::pollfd], timeout_us: Option<u64>) {
    let timeout = timeout_us.map(|us| libc::timespec {
        tv_sec: (us / 1_000_000) as libc::time_t,
        tv_nsec: (us % 1_000_000 * 1000) as libc::c_long,
    });
    let timeout = timeout
        .as_ref()
        .map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the slice and the optional timespec live through the call; no signal mask is given.
    unsafe {
        libc::ppoll(
            fds.as_mut_ptr(),
            fds.len() as libc::nfds_t,
            timeout,
            std::ptr::null(),
        )
    };
}

fn pin(cpu: Option<usize>) {
    if let Some(cpu) = cpu
        && !core_affinity::set_for_current(core_affinity::CoreId { id: cpu })
    {
        warn!("host.cpu: this thread cannot be pinned to CPU {cpu}");
    }
}

#[cfg(test)]
#[path = "worker/tests.rs"]
mod tests;

#[cfg(test)]
#[path = "worker/feature_tests.rs"]
mod feature_tests;

#[cfg(test)]
#[path = "worker/port_tests.rs"]
mod port_tests;

#[cfg(test)]
#[path = "worker/jumbo_tests.rs"]
mod jumbo_tests;

#[cfg(test)]
#[path = "worker/shard_tests.rs"]
mod shard_tests;

#[cfg(test)]
#[path = "worker/crowd_tests.rs"]
mod crowd_tests;
