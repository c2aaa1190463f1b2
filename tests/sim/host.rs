//! A process on a host: the real cores and a thin shell that does what they say, like the one in production.
//!
//! Invariants: control, worker and checkpoint thread are told apart by mailboxes with delays of their own; what a core
//! asks for is done in its order; a process that stood still mutes its path before anything else (rule 18).

mod ahead;
mod checkpoint;
mod messages;
mod perform;
mod streams;

use std::collections::VecDeque;
use std::rc::Rc;

use colo_compare::testing::VecFrames;
use colo_compare::{
    ANNOUNCEMENT_MAX, Action as PathAction, Mode, PrimaryPath, SecondaryAction, SecondaryPath,
};
use colo_control::{
    Action, Cas, Msg, Notice, Primary, PrimaryEvent, PrimaryState, Record, Reply, Secondary,
    SecondaryEvent, SecondaryState, Standing, Step,
};

pub use ahead::AheadChunk;
use ahead::{AheadSide, AreaSide};
use streams::{Arriving, CaptureOrder, Streams};

use crate::guest::{Guest, PAGES, PageSet};
use crate::link::{Channel, Image, LinkMsg, PageMsg};
use crate::plan::{Mutation, Plan};
use crate::world::{HostEvent, NAMES, World, show};

/// Slots of a host's frame pool: more than all limits together.
const SLOTS: usize = 40_000;
/// More rounds than one event can take.
const MOST_ROUNDS: u64 = 10_000;
/// Frames that wait in the NIC.
const NIC_RING: usize = 256;

/// What one thread of a process tells another.
#[derive(Debug)]
pub enum Command {
    /// The worker gets the packet channel.
    Attach(usize),
    Capture(CaptureOrder),
    /// The page channel goes on over these.
    Reopen {
        opened: u64,
    },
    /// A round of the synchronisation; the first sends everything.
    SyncRound {
        first: bool,
    },
    /// The pause of a capture is over.
    Captured {
        epoch: u64,
        image: Rc<Image>,
    },
    Commit {
        epoch: u64,
    },
    Abort {
        epoch: u64,
    },
    GoAlone,
    Detach,
    Mute(bool, u64),
    Lease(u64),
    Apply {
        epoch: u64,
        halt: bool,
    },
    Answer(Reply),
}

pub struct PrimarySide {
    pub core: Primary,
    pub path: PrimaryPath,
    /// The worker's end of the packet channel.
    packets: Option<usize>,
    /// The secondary behind it has been given a first cut: input from there on is its.
    mirrors: bool,
    sending: Option<(Rc<Image>, u64, u64)>,
    /// Pages of the checkpoint in flight, and those of aborted ones.
    in_flight: u64,
    carry: u64,
    /// Of pages that travel before a checkpoint needs them.
    ahead: Option<Box<AheadSide>>,
    /// The core was told that the path holds all it can.
    full_told: bool,
    /// Answers of the SVM since the core was told of them, and how late they were (rule 16).
    answers: (u64, u64),
    /// The SVM can answer from here on.
    late_since_us: u64,
    nic: VecDeque<Vec<u8>>,
    /// Clock gaps noticed, and those that the core was told of.
    gaps: u64,
    gaps_told: u64,
}

pub struct SecondarySide {
    pub core: Secondary,
    pub path: SecondaryPath,
    stopped: bool,
    /// What came before the first checkpoint.
    live: Guest,
    arriving: Option<Arriving>,
    staged: Option<Arriving>,
    /// What has come behind a stage that waits for the word about it.
    behind: Vec<(u64, PageMsg)>,
    /// What has come ahead of the next checkpoint.
    area: AreaSide,
    digest_at_stop: Option<u64>,
    link: Option<usize>,
    /// The steps that both hosts were in when it first proposed to take over.
    proposed_at: Option<[Option<Step>; 2]>,
}

pub enum Role {
    Primary(Box<PrimarySide>),
    Secondary(Box<SecondarySide>),
    /// In between, or over.
    None,
}

/// A running process.
pub struct Process {
    pub inc: u64,
    pub role: Role,
    pub link: Option<usize>,
    streams: Streams,
    frames: VecFrames,
    guest: Option<Guest>,
    runs: bool,
    /// Share of time that its vCPUs get, in percent.
    run_pct: u64,
    wake_planned: bool,
    timer_us: u64,
    core_mailbox_us: u64,
    worker_mailbox_us: u64,
    alive: bool,
}

impl Process {
    fn new(inc: u64, role: Role, guest: Option<Guest>) -> Self {
        Self {
            inc,
            role,
            link: None,
            streams: Streams::default(),
            frames: VecFrames::new(SLOTS),
            runs: guest.is_some(),
            guest,
            run_pct: 100,
            wake_planned: false,
            timer_us: u64::MAX,
            core_mailbox_us: 0,
            worker_mailbox_us: 0,
            alive: true,
        }
    }

    /// The first holder of the VM.
    pub fn primary(plan: &Plan, inc: u64, host: usize, record: Record) -> Self {
        let mut path = PrimaryPath::new(plan.limits);
        path.set_digest_key(plan.digest_key());
        let side = PrimarySide::new(plan, host, path, record);
        Self::new(inc, Role::Primary(Box::new(side)), Some(Guest::default()))
    }

    /// One that joins; its incarnation is its session.
    pub fn secondary(plan: &Plan, inc: u64, host: usize) -> Self {
        let mut path = SecondaryPath::new(plan.limits);
        path.set_digests(plan.digest_key());
        let side = SecondarySide {
            core: Secondary::new(NAMES[host].into(), plan.timing, inc, Vec::new()),
            path,
            stopped: true,
            live: Guest::default(),
            arriving: None,
            staged: None,
            behind: Vec::new(),
            area: AreaSide::new(),
            digest_at_stop: None,
            link: None,
            proposed_at: None,
        };
        Self::new(inc, Role::Secondary(Box::new(side)), None)
    }

    pub fn is_alive(&self) -> bool {
        self.alive
    }

    pub fn die(&mut self) {
        self.alive = false;
    }

    /// Whether it is the VM, or becomes it once it hears that it may.
    pub fn may_hold(&self) -> bool {
        match &self.role {
            Role::Primary(side) => side.core.state() != PrimaryState::Ended,
            Role::Secondary(side) => side.core.state() == SecondaryState::TakingOver,
            Role::None => true,
        }
    }

    pub fn wants_secondary(&self) -> bool {
        self.link.is_none()
            && matches!(&self.role, Role::Primary(side)
                if matches!(side.core.state(), PrimaryState::Alone | PrimaryState::Blocked))
    }

    /// For reports.
    pub fn state(&self) -> String {
        match &self.role {
            Role::Primary(side) => format!(
                "primary {:?} {:?} epoch {} of {}, holds {}, {:?}",
                side.core.state(),
                side.path.mode(),
                side.path.epoch(),
                side.core.epoch(),
                side.path.held_frames(),
                side.path.stats(),
            ),
            Role::Secondary(side) => format!("secondary {:?}", side.core.state()),
            Role::None => "none".into(),
        }
    }

    /// Gives everything back; the number of frames that nobody knew of.
    pub fn close(mut self) -> usize {
        match std::mem::replace(&mut self.role, Role::None) {
            Role::Primary(side) => side.path.close(&mut self.frames),
            Role::Secondary(side) => side.path.close(&mut self.frames),
            Role::None => {}
        }
        self.frames.used()
    }
}

impl PrimarySide {
    fn new(plan: &Plan, host: usize, path: PrimaryPath, record: Record) -> Self {
        let (name, epoch) = (NAMES[host].into(), path.epoch());
        Self {
            core: Primary::new(
                name,
                plan.timing,
                plan.block_alone,
                Vec::new(),
                record,
                epoch,
            )
            .protected_by(plan.protection),
            path,
            packets: None,
            mirrors: false,
            sending: None,
            in_flight: 0,
            carry: 0,
            ahead: None,
            full_told: false,
            answers: (0, 0),
            late_since_us: u64::MAX,
            nic: VecDeque::new(),
            gaps: 0,
            gaps_told: 0,
        }
    }
}

/// A process at work.
pub struct Shell<'a> {
    pub world: &'a mut World,
    pub host: usize,
    pub p: &'a mut Process,
}

impl Shell<'_> {
    fn local_us(&self) -> u64 {
        self.world.now + self.world.hosts[self.host].clock_us
    }

    fn below(&mut self, n: u64) -> u64 {
        self.world.hosts[self.host].chance.below(n)
    }

    fn failure(&mut self, per_mille: u64) -> bool {
        self.world.now < self.world.plan.calm_us
            && self.world.hosts[self.host].chance.chance(per_mille)
    }

    fn mutated(&self, mutation: Mutation) -> bool {
        self.world.plan.mutation == mutation
    }

    fn pass(&mut self, point: &str) {
        if self.p.alive {
            self.world.pass(self.host, self.p, point);
        }
    }

    fn fail(&mut self, checker: &str, text: String) {
        let text = format!("{}: {text}", NAMES[self.host]);
        self.world.fail(checker, text);
    }

    fn trace(&mut self, line: impl FnOnce() -> String) {
        let host = self.host;
        self.world.trace(|| format!("{} {}", NAMES[host], line()));
    }

    fn primary(&mut self) -> Option<&mut PrimarySide> {
        match &mut self.p.role {
            Role::Primary(side) => Some(side),
            _ => None,
        }
    }

    fn secondary(&mut self) -> Option<&mut SecondarySide> {
        match &mut self.p.role {
            Role::Secondary(side) => Some(side),
            _ => None,
        }
    }

    /// Takes an event and does everything that follows from it.
    pub fn handle(mut self, event: HostEvent) {
        self.notice_gap();
        match event {
            HostEvent::Frame(frame) => {
                if let Some(side) = self.primary()
                    && side.nic.len() < NIC_RING
                {
                    side.nic.push_back(frame);
                }
            }
            HostEvent::Command(command) => self.command(command),
            HostEvent::PrimaryCore(event) => self.primary_core(event),
            HostEvent::Link(link, channel, msg) => self.link_msg(link, channel, msg),
            HostEvent::GuestWake => self.wake_guest(),
            HostEvent::SendChunk => self.send_chunk(),
            HostEvent::AheadStep(turn) => self.step_ahead(turn),
            HostEvent::RoundSent {
                sent_pages,
                took_us,
            } => self.round_sent(sent_pages, took_us),
            HostEvent::StreamsBroken { link, opened } => self.streams_broken(link, opened),
            HostEvent::StreamsAwaited => self.streams_awaited(),
            HostEvent::NotDialled { link, opened } => self.not_dialled(link, opened),
            HostEvent::Timer => self.p.timer_us = u64::MAX,
        }
        self.tell_answers();
        self.pump();
        self.take_streams();
        if self.p.alive {
            self.tell_room();
            self.check_bounds();
            self.plan_next();
        }
    }

    /// Rule 16: the core looks at how late the SVM's answers are.
    fn tell_answers(&mut self) {
        if let Some(side) = self.primary() {
            let (answers, late_us) = std::mem::take(&mut side.answers);
            self.primary_core(PrimaryEvent::Answers { answers, late_us });
        }
    }

    fn notice_gap(&mut self) {
        let gap_us = std::mem::take(&mut self.world.hosts[self.host].gap_us);
        let limit_us = self.world.plan.timing.detection_us() / 4;
        if gap_us <= limit_us || self.mutated(Mutation::IgnoreClockGap) {
            return;
        }
        if let Some(side) = self.primary() {
            side.path.mute();
            side.gaps += 1;
            self.tell_primary_core(PrimaryEvent::ClockGap);
        }
    }

    // ---- mailboxes ----

    fn tell_primary_core(&mut self, event: PrimaryEvent) {
        let delay = self.below(150);
        let at = (self.world.now + delay).max(self.p.core_mailbox_us);
        self.p.core_mailbox_us = at;
        self.world
            .host_event(at, self.host, self.p.inc, HostEvent::PrimaryCore(event));
    }

    fn tell_worker(&mut self, command: Command, most_us: u64) {
        let delay = self.below(most_us);
        let at = (self.world.now + delay).max(self.p.worker_mailbox_us);
        self.p.worker_mailbox_us = at;
        self.world
            .host_event(at, self.host, self.p.inc, HostEvent::Command(command));
    }

    fn primary_core(&mut self, event: PrimaryEvent) {
        let now = self.local_us();
        let Some(side) = self.primary() else { return };
        side.gaps_told += u64::from(event == PrimaryEvent::ClockGap);
        let before = side.core.counters().coalesced;
        side.core.handle(now, event);
        let coalesced = side.core.counters().coalesced - before;
        self.world.outcome.coalesced += coalesced;
        if self.p.has_broken_streams() {
            self.world.outcome.coalesced_without_streams += coalesced;
        }
    }

    fn secondary_core(&mut self, event: SecondaryEvent) {
        let now = self.local_us();
        if let Some(side) = self.secondary() {
            side.core.handle(now, event);
        }
    }

    fn command(&mut self, command: Command) {
        self.trace(|| format!("does {}", brief(&command)));
        let now = self.local_us();
        match command {
            Command::Answer(reply) => match self.p.role {
                Role::Primary(_) => self.primary_core(PrimaryEvent::Arbiter(reply)),
                _ => self.secondary_core(SecondaryEvent::Arbiter(reply)),
            },
            Command::Attach(link) => {
                let up = self.p.link == Some(link);
                if let Some(side) = self.primary() {
                    (side.packets, side.mirrors) = (up.then_some(link), false);
                }
            }
            Command::SyncRound { first } => self.sync_round(first),
            Command::Capture(order) => self.capture(order),
            Command::Reopen { opened } => self.reopen(opened),
            Command::Captured { epoch, image } => self.captured(epoch, image),
            Command::Apply { epoch, halt } => self.apply(epoch, halt),
            Command::Commit { epoch } => self.commit(now, epoch),
            Command::Abort { epoch } => {
                self.forget_capture();
                let p = &mut *self.p;
                let keeps = self.world.plan.mutation != Mutation::DropCarry;
                if let Role::Primary(side) = &mut p.role {
                    side.sending = None;
                    let pages = std::mem::take(&mut side.in_flight);
                    side.carry |= if keeps { pages } else { 0 };
                    // Nothing to abort when nothing was cut.
                    let _ = side.path.abort(now, &mut p.frames, epoch);
                }
                self.rest_ahead();
            }
            Command::Detach => {
                self.forget_capture();
                if let Some(side) = self.primary() {
                    side.sending = None;
                    (side.in_flight, side.carry) = (0, 0);
                }
            }
            Command::GoAlone => {
                self.forget_capture();
                let p = &mut *self.p;
                if let Role::Primary(side) = &mut p.role {
                    side.sending = None;
                    (side.in_flight, side.carry, side.ahead) = (0, 0, None);
                    side.path.go_alone(now, &mut p.frames);
                }
            }
            Command::Mute(mute, gaps) => {
                let p = &mut *self.p;
                if let Role::Primary(side) = &mut p.role {
                    match mute {
                        true => side.path.mute(),
                        // The word is older than the latest gap.
                        false if gaps < side.gaps => {}
                        false => side.path.unmute(now, &mut p.frames),
                    }
                }
            }
            Command::Lease(until_us) => {
                let p = &mut *self.p;
                if let Role::Primary(side) = &mut p.role {
                    side.path.set_lease(now, &mut p.frames, until_us);
                }
            }
        }
    }

    // ---- afterwards ----

    /// Rule 14: without room for more held output the vCPUs are to stand still.
    fn tell_room(&mut self) {
        if let Some(side) = self.primary() {
            let is_full = !side.path.room();
            if std::mem::replace(&mut side.full_told, is_full) != is_full {
                self.tell_primary_core(PrimaryEvent::HoldFull(is_full));
            }
        }
    }

    fn check_bounds(&mut self) {
        let limits = self.world.plan.limits;
        let text = match &self.p.role {
            Role::Primary(side) if side.path.held_frames() > limits.max_held_frames => {
                format!("{} PVM frames held", side.path.held_frames())
            }
            Role::Secondary(side) => {
                let most = limits.max_input_frames + limits.max_unacked_inputs as usize;
                if side.path.input_frames() > most {
                    format!("{} input frames kept", side.path.input_frames())
                } else if side.path.stored_outputs() > limits.max_stored_output {
                    format!("{} SVM outputs stored", side.path.stored_outputs())
                } else {
                    return;
                }
            }
            _ => return,
        };
        self.fail("bounded", text);
    }

    fn plan_next(&mut self) {
        let (now, host, inc) = (self.world.now, self.host, self.p.inc);
        let clock_us = self.world.hosts[host].clock_us;
        let core_and_path = match &self.p.role {
            Role::Primary(side) => [side.core.next_deadline(), side.path.next_deadline()],
            Role::Secondary(side) => [side.core.next_deadline(), side.path.next_deadline()],
            Role::None => [None, None],
        };
        let next = core_and_path.into_iter().flatten().min();
        let mut next = next.map(|at| at.saturating_sub(clock_us).max(now + 20));
        if let Some(guest) = &self.p.guest
            && self.p.runs
            && self.p.run_pct > 0
        {
            let due = guest.is_busy() || guest.deadline().is_some_and(|at| at <= now);
            if !due {
                next = [next, guest.deadline()].into_iter().flatten().min();
            } else if !self.p.wake_planned {
                self.p.wake_planned = true;
                let is_slow =
                    matches!(self.p.role, Role::Secondary(_)) && now < self.world.plan.calm_us;
                let slow = if is_slow { self.world.plan.slow_svm } else { 1 };
                let most = self.world.plan.guest_delay_us[host] * slow;
                let at = now + 5 + self.below(most) * 100 / self.p.run_pct;
                self.world.host_event(at, host, inc, HostEvent::GuestWake);
            }
        }
        if let Some(at) = next
            && at < self.p.timer_us
        {
            self.p.timer_us = at;
            self.world.host_event(at, host, inc, HostEvent::Timer);
        }
    }
}

fn brief(command: &Command) -> String {
    match command {
        Command::Captured { epoch, image } => {
            format!("Captured {epoch} with {} pending", image.pending.len())
        }
        other => format!("{other:?}"),
    }
}
