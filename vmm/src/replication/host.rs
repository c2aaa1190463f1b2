//! One host of a pair: what its roles share, and the order of its roles.
//!
//! Invariants: one machine at a time; a process that won the VM keeps its machine and goes on as primary; a process
//! that lost it runs no guest any more.
//!
//! Does not decide who wins.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use colo_compare::Limits;
use colo_control::{Geometry, Outcome, Pace, Protection, Record, StepLimits, Storm, Timing};
use colo_fastpath::Mac;
use colo_fastpath::clock::now_us;
use colo_fastpath::link::PeerHeard;
use colo_fastpath::mailbox::{Mailbox, Post};
use colo_fastpath::nic::Filter;
use colo_fastpath::pair::{Answers, FrameParts, Lease, PairEvent, PrimaryRole, PrimaryRoleConfig};
use colo_fastpath::shard::crossing_frames;
use vmm_sys_util::eventfd::EventFd;

use super::arbiter::{ArbiterError, FileArbiter};
use super::guest_end::GuestEnd;
use super::link::{self, LinkError, Listener};
use super::name;
use super::opening::LinkOpening;
use super::report::PairStatus;
use super::wait::Waiter;
use super::{PrimaryShell, SecondaryEnd, SecondaryShell};
use crate::checkpoint::capture::CaptureSettings;
use crate::checkpoint::outbound::OutboundSettings;
use crate::checkpoint::stage::{self, StageSettings};
use crate::config::{Alone, CompareMode, Config, HostConfig, ReplicationConfig};
use crate::geometry::pair_geometry;
use crate::machine::{Machine, MachineError};
use crate::nic::{self, NicError};
use crate::requests::{Request, RequestSocket};
use crate::status::{MachineStatus, StatusError, StatusSocket};

/// Between attempts to join a primary.
const JOIN_RETRY_US: u64 = 200_000;
/// A primary that let a secondary go before it had the state gets some rest.
const REJOIN_AFTER_US: u64 = 1_000_000;
/// Longest step of pairing and of the end.
const STEP_TIMEOUT_US: u64 = 10_000_000;
const ARBITER_RETRY_US: u64 = 100_000;

/// Why a replicated VM could not be run.
#[derive(Debug, thiserror::Error)]
pub enum ReplicaError {
    /// The configuration has no such section.
    #[error("[replication] is missing; add it or use `colo run`")]
    NotConfigured,
    /// The arbiter.
    #[error(transparent)]
    Arbiter(#[from] ArbiterError),
    /// Another host holds the VM.
    #[error(
        "replication.arbiter: host {holder} holds the VM (generation {generation}), and this one is {host}; \
         start `colo secondary` here to join it"
    )]
    Held {
        /// Who asked.
        host: String,
        /// Who.
        holder: String,
        /// Since which generation.
        generation: u64,
    },
    /// The link.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The NIC.
    #[error(transparent)]
    Nic(#[from] NicError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The status socket.
    #[error(transparent)]
    Status(#[from] StatusError),
    /// The thread that receives checkpoints.
    #[error(transparent)]
    Stage(stage::SpawnError),
    /// The worker has ended.
    #[error("the packet worker has ended")]
    WorkerGone,
    /// Threads or descriptors.
    #[error("no threads or descriptors: {0}")]
    System(io::Error),
}

/// How a host's part in the VM ended.
#[derive(Debug)]
pub enum End {
    /// The VM was shut down, or this secondary was asked to leave.
    Stopped,
    /// Another host holds the VM.
    Deposed(Record),
    /// The peer refused to pair.
    Refused(String),
    /// Something that cannot go on.
    Failed(String),
}

/// A request to stop: a flag and a descriptor that becomes readable with it.
#[derive(Debug)]
pub struct StopRequest {
    /// Set by the signal handler's thread.
    pub flag: Arc<AtomicBool>,
    /// Written after the flag was set.
    pub wake: EventFd,
}

/// What the roles of one host share.
pub struct Replica {
    pub(super) config: Config,
    pub(super) replication: ReplicationConfig,
    pub(super) machine: Arc<Machine>,
    pub(super) guest: GuestEnd,
    pub(super) arbiter: FileArbiter,
    pub(super) host: String,
    pub(super) limits: Limits,
    pub(super) mac: Mac,
    digest_key: Option<[u8; 16]>,
    pub(super) status: Status,
    /// What the control thread knows and the workers read when they need it.
    pub(super) lease: Lease,
    /// The other way round.
    pub(super) answers: Answers,
    pub(super) heard: PeerHeard,
    stop: Arc<StopRequest>,
    has_told_of_wait: bool,
}

/// Where a host is asked: how it is, and to do something.
struct Sockets {
    status: StatusSocket,
    requests: RequestSocket,
}

/// The sockets, if there are any.
pub struct Status {
    sockets: Option<Arc<Sockets>>,
    name: String,
    started: Instant,
}

impl Status {
    fn answer(&self, machine: &Machine, pair: impl Fn() -> Option<PairStatus>) {
        let Some(sockets) = &self.sockets else {
            return;
        };
        sockets.status.answer(|| {
            let pair = pair();
            let role = pair.as_ref().map_or("unknown", |p| p.standing.role);
            let machine = MachineStatus::of(machine, &self.name, role, "running", self.started);
            let mut document = serde_json::to_value(machine).unwrap_or_default();
            let pair = pair.and_then(|p| serde_json::to_value(p).ok());
            if let (Some(document), Some(serde_json::Value::Object(pair))) =
                (document.as_object_mut(), pair)
            {
                document.extend(pair);
            }
            document
        });
    }
}

impl Replica {
    fn new(
        config: &Config,
        filter: Filter,
        sockets: Option<Arc<Sockets>>,
        stop: Arc<StopRequest>,
    ) -> Result<Self, ReplicaError> {
        let replication = config
            .replication
            .clone()
            .ok_or(ReplicaError::NotConfigured)?;
        let arbiter = FileArbiter::from_spec(&replication.arbiter)?;
        let nics = nic::open(&config.net, filter, config.host.shards)?;
        let console = Box::new(Console::default());
        let (machine, events) = Machine::create_stopped(config, nics, console)?;
        Ok(Self {
            host: name::of_host(replication.link_listen),
            limits: Limits {
                hash_seed: random_number()?,
                canary_equal: config.test.always_equal,
                ..limits(&replication, &config.host)
            },
            mac: config.net.mac,
            digest_key: digest_key(config.compare.mode)?,
            status: Status {
                sockets,
                name: config.vm.name.clone(),
                started: Instant::now(),
            },
            machine: Arc::new(machine),
            config: config.clone(),
            replication,
            guest: GuestEnd::new(events),
            arbiter,
            lease: Lease::default(),
            answers: Answers::default(),
            heard: PeerHeard::default(),
            stop,
            has_told_of_wait: false,
        })
    }

    /// Where secondaries join.
    fn listen(&self) -> Result<Listener, LinkError> {
        Listener::bind(self.replication.link_listen, self.config.checkpoint.streams)
    }

    /// The same for who runs the VM already.
    fn listen_when_free(&self) -> Listener {
        Listener::bind_when_free(self.replication.link_listen, self.config.checkpoint.streams)
    }

    pub(super) fn timing(&self) -> Timing {
        let r = &self.replication;
        Timing {
            heartbeat_us: r.heartbeat_ms * 1000,
            heartbeat_count: r.heartbeat_count,
            checkpoint_interval_us: r.checkpoint_interval_ms * 1000,
            step_timeout_us: STEP_TIMEOUT_US,
            steps: StepLimits::DEFAULT,
            arbiter_retry_us: ARBITER_RETRY_US,
        }
    }

    /// How output is protected, as far as this host decides it.
    pub(super) fn protection(&self) -> Protection {
        let r = &self.replication;
        let window_us = r.storm_window_ms * 1000;
        Protection {
            mode: r.mode.into(),
            remus_interval_us: r.remus_interval_ms * 1000,
            storm: Storm {
                share_pct: r.storm_share_pct,
                window_us,
                ..Storm::DEFAULT
            },
            pace: Pace {
                // Well before what is late counts as different.
                lag_us: Pace::DEFAULT
                    .lag_us
                    .min(self.limits.compare_deadline_us / 4),
                ..Pace::DEFAULT
            },
        }
    }

    /// How packet channels are opened here.
    pub(super) fn link_opening(&self) -> LinkOpening {
        LinkOpening {
            machine: self.machine.clone(),
            packets: self.replication.packets,
            // Well before the peer may take over: what it says until then must not be heard after it (rule 18).
            patience_us: self.timing().detection_us() / 2,
            heard: self.heard.clone(),
        }
    }

    pub(super) fn capture_settings(&self) -> CaptureSettings {
        let checkpoint = &self.config.checkpoint;
        CaptureSettings {
            stabilise: checkpoint.stabilise,
            arena_pages: checkpoint.arena_pages(self.config.vm.ram_mib),
            audit_every: checkpoint.audit_every,
            ahead: checkpoint.ahead(),
            outbound: OutboundSettings {
                channel: checkpoint.channel(),
                cache_mib: checkpoint.cache_mib,
                verify_one_in: checkpoint.verify_one_in,
                // Until a secondary says that it can.
                lends: false,
            },
        }
    }

    pub(super) fn stage_settings(&self) -> StageSettings {
        let checkpoint = &self.config.checkpoint;
        StageSettings {
            channel: checkpoint.channel(),
            stage_mib: checkpoint.stage_mib(self.config.vm.ram_mib),
            ahead_mib: checkpoint.ahead_mib,
        }
    }

    pub(super) fn block_alone(&self) -> bool {
        self.replication.alone == Alone::Block
    }

    pub(super) fn primary_role(&self) -> PrimaryRoleConfig {
        PrimaryRoleConfig {
            limits: self.limits,
            policy: self.config.compare.rules.clone(),
            gap_limit_us: self.timing().detection_us() / 2,
            frame_slots: self.config.host.frame_slots,
            digest_key: self.digest_key,
            gaps: Arc::new(AtomicU64::new(0)),
            lease: self.lease.clone(),
            answers: self.answers.clone(),
        }
    }

    /// Puts all workers into the role of a primary without a secondary.
    fn speak_as_primary(&self, post: &Post<PairEvent>) -> Result<(), ReplicaError> {
        let config = self.primary_role();
        for worker in self.machine.workers() {
            let role = PrimaryRole::new(&config, self.mac, post.clone());
            let set = worker.set_role(Box::new(role));
            set.map_err(|_| ReplicaError::WorkerGone)?;
        }
        Ok(())
    }

    pub(super) fn add_fds(&self, waiter: &mut Waiter) {
        use std::os::fd::AsRawFd;
        waiter.readable(self.guest.poll_fd());
        if let Some(sockets) = &self.status.sockets {
            waiter.readable(sockets.status.poll_fd());
            waiter.readable(sockets.requests.poll_fd());
        }
        if !self.stop.flag.load(Ordering::Relaxed) {
            waiter.readable(self.stop.wake.as_raw_fd());
        }
    }

    /// Whether the guest, an operator or a client of the status may have something to say.
    pub(super) fn may_be_asked(&self, waiter: &Waiter) -> bool {
        use std::os::fd::AsRawFd;
        let sockets = self.status.sockets.as_ref();
        let asked = |s: &Arc<Sockets>| {
            waiter.may_be_ready(s.status.poll_fd()) || waiter.may_be_ready(s.requests.poll_fd())
        };
        waiter.may_be_ready(self.guest.poll_fd())
            || waiter.may_be_ready(self.stop.wake.as_raw_fd())
            || sockets.is_some_and(asked)
    }

    /// Whether the operator or the guest ends the VM.
    pub(super) fn wants_stop(&self) -> bool {
        self.guest.is_powered_off() || self.stop.flag.load(Ordering::Relaxed)
    }

    /// Says once that the end waits for the arbiter, and for what to look.
    pub(super) fn tell_of_wait(&mut self) {
        if !std::mem::replace(&mut self.has_told_of_wait, true) {
            tracing::warn!(
                "asked to stop, but the arbiter has not answered yet who holds the VM; waiting for it \
                 (look at what holds up {})",
                self.arbiter.path().display()
            );
        }
    }

    /// The next request of an operator.
    pub(super) fn next_request(&self) -> Option<Request> {
        self.status.sockets.as_ref()?.requests.next()
    }

    /// Sends operators to where their requests can be carried out.
    pub(super) fn refuse_requests(&self) {
        while let Some(request) = self.next_request() {
            request.refuse("this host does not run the VM; ask its primary");
        }
    }

    pub(super) fn answer_status(&self, pair: impl Fn() -> Option<PairStatus>) {
        self.status.answer(&self.machine, pair);
    }

    /// What both hosts must agree on (rule 22).
    fn geometry(&self) -> Geometry {
        pair_geometry(&self.config, self.machine.workers().len())
    }
}

/// A key for digests, if they are wanted.
fn digest_key(mode: CompareMode) -> Result<Option<[u8; 16]>, ReplicaError> {
    match mode {
        CompareMode::Bytes => Ok(None),
        CompareMode::Digest => random_key().map(Some),
    }
}

/// A key for page digests.
pub(super) fn page_key() -> Result<[u8; 16], ReplicaError> {
    random_key()
}

/// Not all zeros.
fn random_key() -> Result<[u8; 16], ReplicaError> {
    let halves = [random_number()?, random_number()? | 1];
    let mut key = [0; 16];
    key[..8].copy_from_slice(&halves[0].to_le_bytes());
    key[8..].copy_from_slice(&halves[1].to_le_bytes());
    Ok(key)
}

fn limits(replication: &ReplicationConfig, host: &HostConfig) -> Limits {
    let crossing_frames = crossing_frames(host.shards);
    let parts = FrameParts::of(host.frame_slots, crossing_frames);
    let held = match replication.hold_frames {
        0 => parts.each,
        frames => parts.each.min(frames as usize),
    };
    Limits {
        max_held_frames: held,
        crossing_frames,
        max_svm_frames: parts.each,
        max_input_frames: parts.each,
        max_unacked_inputs: parts.unacked as u64,
        max_stored_output: parts.each,
        compare_deadline_us: replication.compare_deadline_ms * 1000,
        ack_deadline_us: replication.ack_deadline_ms * 1000,
        ..Limits::default()
    }
}

/// Runs a VM as its primary.
pub fn run_primary(
    config: &Config,
    image: &[u8],
    stop: Arc<StopRequest>,
) -> Result<End, ReplicaError> {
    let sockets = bind_sockets(config)?;
    let replica = Replica::new(config, Filter::Guest(config.net.mac), sockets, stop)?;
    replica.machine.load(image)?;
    // Whoever cannot be a primary must not raise the generation.
    let listener = replica.listen()?;
    let before = replica.replication.link_listen.to_string();
    let record = match replica.arbiter.claim(&replica.host, &before)? {
        Ok(record) => record,
        Err(Record {
            holder, generation, ..
        }) => {
            return Err(ReplicaError::Held {
                holder,
                generation,
                host: replica.host,
            });
        }
    };
    let (post, pair_events) = Mailbox::new().map_err(ReplicaError::System)?;
    replica.speak_as_primary(&post)?;
    let geometry = replica.geometry();
    let machine = replica.machine.clone();
    let shell = PrimaryShell::new(replica, listener, geometry, record, 1, 0, pair_events)?;
    machine.resume_vcpus()?;
    Ok(end(shell.run()))
}

/// Joins a primary, follows it, and goes on in its place when it is lost.
pub fn run_secondary(config: &Config, stop: &Arc<StopRequest>) -> Result<End, ReplicaError> {
    let sockets = bind_sockets(config)?;
    let mut rest_us = 0;
    loop {
        let replica = Replica::new(config, Filter::DropAll, sockets.clone(), stop.clone())?;
        let geometry = replica.geometry();
        let Some(channels) = join(&replica, rest_us)? else {
            return Ok(End::Stopped);
        };
        match SecondaryShell::new(replica, geometry.clone(), channels)?.run() {
            // The machine holds a part of a state: a new one is needed for the next attempt.
            SecondaryEnd::Ended(Outcome::NotSynced) => {
                tracing::warn!("the link went before the state was complete; joining again");
                rest_us = REJOIN_AFTER_US;
            }
            SecondaryEnd::Ended(outcome) => return Ok(end(outcome)),
            SecondaryEnd::TookOver {
                record,
                epoch,
                pair_events,
                replica,
            } => {
                let listener = replica.listen_when_free();
                let shell =
                    PrimaryShell::new(*replica, listener, geometry, record, epoch, 1, pair_events)?;
                return Ok(end(shell.run()));
            }
        }
    }
}

fn bind_sockets(config: &Config) -> Result<Option<Arc<Sockets>>, ReplicaError> {
    let bind = |path: &std::path::Path| {
        let (status, requests) = (StatusSocket::bind(path)?, RequestSocket::bind(path)?);
        Ok::<_, StatusError>(Arc::new(Sockets { status, requests }))
    };
    Ok(config.host.status.as_deref().map(bind).transpose()?)
}

/// Tries until the primary answers, for the first time after a rest; `None` when asked to stop.
fn join(replica: &Replica, rest_us: u64) -> Result<Option<link::Channels>, ReplicaError> {
    let mut told = false;
    let peer = replica.replication.link_peer;
    let shards = replica.machine.workers().len();
    let page_streams = replica.config.checkpoint.streams;
    if rest_us > 0 && !wait_to_join(replica, rest_us) {
        return Ok(None);
    }
    loop {
        match link::connect(peer, fresh_session()?, shards, page_streams) {
            Ok(channels) => return Ok(Some(channels)),
            Err(e) if !told => {
                tracing::info!("{e}; trying on");
                told = true;
            }
            Err(_) => {}
        }
        if !wait_to_join(replica, JOIN_RETRY_US) {
            return Ok(None);
        }
    }
}

/// Answers those who ask meanwhile; false when asked to stop.
fn wait_to_join(replica: &Replica, wait_us: u64) -> bool {
    let mut waiter = Waiter::default();
    let until_us = now_us() + wait_us;
    while now_us() < until_us {
        waiter.clear();
        replica.add_fds(&mut waiter);
        waiter.wait(Some(until_us));
        if replica.wants_stop() {
            return false;
        }
        replica.answer_status(|| Some(PairStatus::joining()));
        replica.refuse_requests();
    }
    true
}

fn fresh_session() -> Result<u64, ReplicaError> {
    // 0 means "no session" to the primary's core.
    Ok(random_number()?.max(1))
}

pub(super) fn random_number() -> Result<u64, ReplicaError> {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is ours and as long as the call is told.
    let n = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match n {
        8 => Ok(u64::from_le_bytes(bytes)),
        _ => Err(ReplicaError::System(io::Error::last_os_error())),
    }
}

fn end(outcome: Outcome) -> End {
    match outcome {
        Outcome::Off => End::Stopped,
        Outcome::Deposed { record } => End::Deposed(record),
        Outcome::Refused { reason } => End::Refused(reason),
        Outcome::NotSynced => End::Failed("the link went before the state was complete".to_owned()),
        Outcome::Failed { reason } => End::Failed(reason),
    }
}

/// Seconds since 1970.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs()
}

/// The guest's console goes to the log, line by line.
#[derive(Debug, Default)]
struct Console {
    line: Vec<u8>,
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            if byte == b'\n' || self.line.len() >= 256 {
                tracing::info!("guest: {}", String::from_utf8_lossy(&self.line).trim_end());
                self.line.clear();
            }
            if byte != b'\n' {
                self.line.push(byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
