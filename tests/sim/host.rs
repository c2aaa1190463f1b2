//! A process on a host: the real cores and a thin shell that does what they say, like the one in production.
//!
//! Invariants: control, worker and checkpoint thread are told apart by mailboxes with delays of their own; what a core
//! asks for is done in its order; a process that stood still mutes its path before anything else (rule 18).

use std::collections::VecDeque;
use std::rc::Rc;

use colo_compare::testing::VecFrames;
use colo_compare::{ANNOUNCEMENT_MAX, Action as PathAction, Mode, PrimaryPath, SecondaryAction, SecondaryPath};
use colo_control::{
    Action, Cas, Msg, Primary, PrimaryEvent, PrimaryState, Record, Reply, Secondary, SecondaryEvent,
    SecondaryState, Standing,
};

use crate::guest::Guest;
use crate::link::{Channel, Image, LinkMsg};
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
    Capture { epoch: u64, first: bool },
    /// The pause of a capture is over.
    Captured { epoch: u64, image: Rc<Image> },
    Commit { epoch: u64 },
    Abort { epoch: u64 },
    GoAlone,
    Mute(bool, u64),
    Lease(u64),
    Apply { epoch: u64 },
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
    nic: VecDeque<Vec<u8>>,
    /// Clock gaps noticed, and those that the core was told of.
    gaps: u64,
    gaps_told: u64,
}

pub struct SecondarySide {
    pub core: Secondary,
    pub path: SecondaryPath,
    stopped: bool,
    arriving: Option<(Rc<Image>, u64)>,
    staged: Option<Rc<Image>>,
    digest_at_stop: Option<u64>,
    link: Option<usize>,
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
    frames: VecFrames,
    guest: Option<Guest>,
    runs: bool,
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
            frames: VecFrames::new(SLOTS),
            runs: guest.is_some(),
            guest,
            wake_planned: false,
            timer_us: u64::MAX,
            core_mailbox_us: 0,
            worker_mailbox_us: 0,
            alive: true,
        }
    }

    /// The first holder of the VM.
    pub fn primary(plan: &Plan, inc: u64, host: usize, record: Record) -> Self {
        let path = PrimaryPath::new(plan.limits);
        let side = PrimarySide::new(plan, host, path, record);
        Self::new(inc, Role::Primary(Box::new(side)), Some(Guest::default()))
    }

    /// One that joins; its incarnation is its session.
    pub fn secondary(plan: &Plan, inc: u64, host: usize) -> Self {
        let side = SecondarySide {
            core: Secondary::new(NAMES[host].into(), plan.timing, inc, Vec::new()),
            path: SecondaryPath::new(plan.limits),
            stopped: true,
            arriving: None,
            staged: None,
            digest_at_stop: None,
            link: None,
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
            core: Primary::new(name, plan.timing, plan.block_alone, Vec::new(), record, epoch),
            path,
            packets: None,
            mirrors: false,
            sending: None,
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
            HostEvent::PrimaryCore(event) => self.to_primary_core(event),
            HostEvent::SecondaryCore(event) => self.to_secondary_core(event),
            HostEvent::Link(link, channel, msg) => self.from_link(link, channel, msg),
            HostEvent::GuestWake => self.wake_guest(),
            HostEvent::SendChunk => self.send_chunk(),
            HostEvent::Timer => self.p.timer_us = u64::MAX,
        }
        self.pump();
        if self.p.alive {
            self.check_bounds();
            self.plan_next();
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
        self.world.host_event(at, self.host, self.p.inc, HostEvent::PrimaryCore(event));
    }

    fn tell_worker(&mut self, command: Command, most_us: u64) {
        let delay = self.below(most_us);
        let at = (self.world.now + delay).max(self.p.worker_mailbox_us);
        self.p.worker_mailbox_us = at;
        self.world.host_event(at, self.host, self.p.inc, HostEvent::Command(command));
    }

    fn to_primary_core(&mut self, event: PrimaryEvent) {
        let now = self.local_us();
        if let Some(side) = self.primary() {
            side.gaps_told += u64::from(event == PrimaryEvent::ClockGap);
            side.core.handle(now, event);
        }
    }

    fn to_secondary_core(&mut self, event: SecondaryEvent) {
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
                Role::Primary(_) => self.to_primary_core(PrimaryEvent::Arbiter(reply)),
                _ => self.to_secondary_core(SecondaryEvent::Arbiter(reply)),
            },
            Command::Attach(link) => {
                let up = self.p.link == Some(link);
                if let Some(side) = self.primary() {
                    (side.packets, side.mirrors) = (up.then_some(link), false);
                }
            }
            Command::Capture { epoch, first } => self.capture(epoch, first),
            Command::Captured { epoch, image } => self.captured(epoch, image),
            Command::Apply { epoch } => self.apply(epoch),
            Command::Commit { epoch } => self.commit(now, epoch),
            Command::Abort { epoch } => {
                let p = &mut *self.p;
                if let Role::Primary(side) = &mut p.role {
                    side.sending = None;
                    // Nothing to abort when nothing was cut.
                    let _ = side.path.abort(now, &mut p.frames, epoch);
                }
            }
            Command::GoAlone => {
                let p = &mut *self.p;
                if let Role::Primary(side) = &mut p.role {
                    side.sending = None;
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

    // ---- checkpoints, primary ----

    fn capture(&mut self, epoch: u64, first: bool) {
        let attached = self.primary().is_some_and(|side| side.packets.is_some());
        let refused = !attached || self.failure(self.world.plan.capture_failures);
        if refused {
            let reason = "capture failed".into();
            self.tell_primary_core(PrimaryEvent::CheckpointFailed { epoch, reason });
            return;
        }
        self.p.runs = false;
        self.take_guest_output();
        let now = self.local_us();
        let p = &mut *self.p;
        let (Role::Primary(side), Some(guest)) = (&mut p.role, &p.guest) else { return };
        let cut = match first {
            true => side.path.pair_again(now, &mut p.frames),
            false => side.path.cut(now),
        };
        if cut != Ok(epoch) {
            let text = format!("the core cuts epoch {epoch}, the path says {cut:?}");
            return self.fail("protocol", text);
        }
        side.mirrors = true;
        let mut record = Vec::new();
        side.path.export_client_xlate(&mut record);
        let pending = side.path.pending().map(|f| p.frames.bytes(f.token).to_vec()).collect();
        let guest = guest.clone();
        let digest = guest.digest();
        let image = Rc::new(Image { epoch, guest, digest, pending, record });
        self.pass("cut");
        let pause = self.below(self.world.plan.pause_us);
        let at = self.world.now + pause;
        let event = HostEvent::Command(Command::Captured { epoch, image });
        self.world.host_event(at, self.host, self.p.inc, event);
    }

    fn captured(&mut self, epoch: u64, image: Rc<Image>) {
        self.p.runs = true;
        self.pass("captured");
        self.tell_primary_core(PrimaryEvent::Captured { epoch });
        let of = 1 + self.below(self.world.plan.chunks);
        if self.p.link.is_some()
            && let Some(side) = self.primary()
            && side.path.mode() != Mode::Alone
        {
            side.sending = Some((image, 0, of));
            self.plan_chunk();
        }
    }

    fn plan_chunk(&mut self) {
        let at = self.world.now + self.below(800);
        self.world.host_event(at, self.host, self.p.inc, HostEvent::SendChunk);
    }

    fn send_chunk(&mut self) {
        let fails = self.failure(self.world.plan.capture_failures / 4);
        let Some(link) = self.p.link else { return };
        let Some(side) = self.primary() else { return };
        let Some((image, index, of)) = side.sending.take() else { return };
        let epoch = image.epoch;
        if fails {
            let reason = "transfer failed".into();
            self.tell_primary_core(PrimaryEvent::CheckpointFailed { epoch, reason });
            return;
        }
        let msg = LinkMsg::Chunk { index, of, image: image.clone() };
        if index + 1 < of {
            side.sending = Some((image, index + 1, of));
            self.plan_chunk();
        } else {
            self.tell_primary_core(PrimaryEvent::Sent { epoch });
        }
        self.world.link_send(link, self.host, Channel::Pages, msg);
        self.pass(if index + 1 < of { "chunk_sent" } else { "sent" });
    }

    fn commit(&mut self, now: u64, epoch: u64) {
        self.pass("commit");
        if !self.p.alive {
            return;
        }
        if self.mutated(Mutation::NeverCommit) {
            return;
        }
        let p = &mut *self.p;
        if let Role::Primary(side) = &mut p.role {
            match side.path.commit(now, &mut p.frames, epoch) {
                Ok(()) => self.world.outcome.commits += 1,
                Err(e) => self.fail("protocol", format!("commit: {e}")),
            }
        }
    }

    // ---- checkpoints, secondary ----

    fn receive_chunk(&mut self, index: u64, of: u64, image: Rc<Image>) {
        self.pass("chunk_received");
        let fails = self.failure(self.world.plan.stage_failures);
        let half = self.mutated(Mutation::ApplyHalf);
        if !self.p.alive {
            return;
        }
        if half && let Some(guest) = &mut self.p.guest {
            guest.mix(&image.guest);
        }
        let Some(side) = self.secondary() else { return };
        let epoch = image.epoch;
        let expected = match &side.arriving {
            Some((before, n)) if Rc::ptr_eq(before, &image) => *n,
            _ => 0,
        };
        if index != expected {
            return; // the rest of a checkpoint whose beginning was thrown away
        }
        side.arriving = Some((image.clone(), index + 1));
        if index + 1 < of {
            return;
        }
        side.arriving = None;
        let record = side.path.check_record(&image.record);
        if fails || record.is_err() {
            let reason = "refused".into();
            return self.to_secondary_core(SecondaryEvent::StageFailed { epoch, reason });
        }
        side.staged = Some(image);
        self.to_secondary_core(SecondaryEvent::Staged { epoch });
        self.pass("staged");
    }

    fn stop_svm(&mut self, epoch: u64) {
        self.pass("stop_svm_received");
        self.p.runs = false;
        self.take_guest_output();
        let Some(guest) = &self.p.guest else { return };
        let digest = guest.digest();
        let Some(side) = self.secondary() else { return };
        side.path.stop();
        side.stopped = true;
        side.digest_at_stop = Some(digest);
        self.secondary_path_actions();
        self.to_secondary_core(SecondaryEvent::SvmStopped { epoch, dirty: Vec::new() });
    }

    fn apply(&mut self, epoch: u64) {
        let now = self.local_us();
        let p = &mut *self.p;
        let Role::Secondary(side) = &mut p.role else { return };
        let Some(image) = side.staged.take() else {
            return self.fail("all or nothing", format!("epoch {epoch} is applied without a stage"));
        };
        let pending =
            image.pending.iter().filter_map(|f| p.frames.insert(f)).collect::<Vec<_>>();
        let result = side.path.commit(now, &mut p.frames, image.epoch, pending, &image.record);
        p.guest = Some(image.guest.clone());
        p.runs = true;
        (side.stopped, side.digest_at_stop) = (false, None);
        let digest = p.guest.as_ref().map(Guest::digest);
        if image.epoch != epoch || digest != Some(image.digest) {
            self.fail("all or nothing", format!("epoch {epoch}: not what was captured"));
        }
        if let Err(e) = result {
            return self.fail("protocol", format!("commit on the secondary: {e}"));
        }
        self.to_secondary_core(SecondaryEvent::Applied { epoch });
        self.pass("applied");
    }

    fn resume_unchanged(&mut self) {
        let digest = self.p.guest.as_ref().map(Guest::digest);
        let Some(side) = self.secondary() else { return };
        side.path.resume_unchanged();
        (side.stopped, side.staged, side.arriving) = (false, None, None);
        let unchanged = side.digest_at_stop.is_none_or(|before| digest == Some(before));
        side.digest_at_stop = None;
        self.p.runs = true;
        if !unchanged {
            self.fail("all or nothing", "the SVM goes on from another state than it stopped in".into());
        }
    }

    fn take_over(&mut self, generation: u64) {
        let now = self.local_us();
        let p = &mut *self.p;
        let side = match std::mem::replace(&mut p.role, Role::None) {
            Role::Secondary(side) => side,
            other => {
                p.role = other;
                return;
            }
        };
        if let Some(link) = side.link {
            self.world.close(link, self.host, true);
        }
        let path = side.path.take_over(now, &mut p.frames);
        let record = Record { generation, holder: NAMES[self.host].into(), standing: Standing::Alone };
        let primary = PrimarySide::new(&self.world.plan, self.host, path, record);
        p.role = Role::Primary(Box::new(primary));
        p.link = None;
        self.world.outcome.takeovers += 1;
        self.pass("took_over");
    }

    // ---- the link ----

    fn from_link(&mut self, link: usize, channel: Channel, msg: LinkMsg) {
        let now = self.local_us();
        match msg {
            LinkMsg::Up => self.link_up(link),
            LinkMsg::Down => self.link_down(link),
            LinkMsg::Control(bytes) => {
                if let Ok(Some((Some(msg), _))) = Msg::decode(&bytes) {
                    self.control_msg(msg);
                }
            }
            LinkMsg::Chunk { index, of, image } => self.receive_chunk(index, of, image),
            LinkMsg::CheckpointWanted => self.tell_primary_core(PrimaryEvent::CheckpointWanted),
            packet => {
                debug_assert_eq!(channel, Channel::Packets);
                self.packet_msg(now, packet);
            }
        }
    }

    fn control_msg(&mut self, msg: Msg) {
        match msg {
            Msg::Heartbeat { .. } | Msg::Echo { .. } => {}
            _ => self.trace(|| format!("hears {msg:?}")),
        }
        match msg {
            Msg::SvmStopped { .. } => self.pass("svm_stopped_received"),
            Msg::Committed { .. } => self.pass("committed_received"),
            _ => {}
        }
        match self.p.role {
            Role::Primary(_) => self.to_primary_core(PrimaryEvent::Msg(msg)),
            _ => self.to_secondary_core(SecondaryEvent::Msg(msg)),
        }
    }

    fn packet_msg(&mut self, now: u64, msg: LinkMsg) {
        let p = &mut *self.p;
        match (&mut p.role, msg) {
            (Role::Primary(side), LinkMsg::Output { epoch, seq, frame }) => {
                self.world.trace(|| format!("svm out {epoch} {seq} {}", show(&frame)));
                if let Some(token) = p.frames.insert(&frame) {
                    side.path.handle_svm_output(now, &mut p.frames, epoch, seq, token);
                }
            }
            (Role::Primary(side), LinkMsg::InputAck { up_to }) => {
                side.path.handle_input_ack(now, &mut p.frames, up_to);
            }
            (Role::Primary(side), LinkMsg::CaughtUp { epoch }) => side.path.caught_up(now, epoch),
            (Role::Secondary(side), LinkMsg::Input { epoch, seq, frame }) => {
                if let Some(token) = p.frames.insert(&frame)
                    && let Err(e) = side.path.handle_mirror(now, &mut p.frames, epoch, seq, token)
                {
                    self.fail("protocol", e.to_string());
                }
            }
            (Role::Secondary(side), LinkMsg::Released { seq }) => {
                side.path.handle_released(&mut p.frames, seq);
            }
            (Role::Secondary(side), LinkMsg::PendingReleased { epoch }) => {
                side.path.handle_pending_released(&mut p.frames, epoch);
            }
            _ => {}
        }
    }

    fn link_up(&mut self, link: usize) {
        if self.p.link.is_some() {
            return;
        }
        self.p.link = Some(link);
        match &mut self.p.role {
            Role::Primary(_) => self.to_primary_core(PrimaryEvent::LinkUp),
            Role::Secondary(side) => {
                side.link = Some(link);
                self.to_secondary_core(SecondaryEvent::LinkUp);
            }
            Role::None => {}
        }
    }

    fn link_down(&mut self, link: usize) {
        if self.p.link != Some(link) {
            return;
        }
        self.close_link();
        let reason: String = "reset".into();
        match self.p.role {
            Role::Primary(_) => self.to_primary_core(PrimaryEvent::LinkDown { reason }),
            _ => self.to_secondary_core(SecondaryEvent::LinkDown { reason }),
        }
    }

    fn close_link(&mut self) {
        let Some(link) = self.p.link.take() else { return };
        self.trace(|| "closes the link".into());
        let is_primary = match &mut self.p.role {
            Role::Primary(side) => {
                (side.packets, side.mirrors) = (None, false);
                true
            }
            _ => false,
        };
        // The secondary reads what is in the packet channel until it takes over.
        self.world.close(link, self.host, is_primary);
    }

    fn send(&mut self, channel: Channel, msg: LinkMsg) {
        let link = match &self.p.role {
            Role::Primary(side) if channel == Channel::Packets => side.packets,
            _ => self.p.link,
        };
        if let Some(link) = link {
            self.world.link_send(link, self.host, channel, msg);
        }
    }

    fn send_control(&mut self, msg: &Msg) {
        if !matches!(msg, Msg::Heartbeat { .. } | Msg::Echo { .. }) {
            self.trace(|| format!("says {msg:?}"));
        }
        let mut bytes = Vec::new();
        msg.encode(&mut bytes);
        self.send(Channel::Control, LinkMsg::Control(bytes));
        match msg {
            Msg::StopSvm { .. } => self.pass("stop_svm_sent"),
            Msg::SvmStopped { .. } => self.pass("svm_stopped_sent"),
            Msg::Committed { .. } => self.pass("committed_sent"),
            Msg::Paired { .. } => self.pass("paired_sent"),
            _ => {}
        }
    }

    // ---- doing what the cores say ----

    fn pump(&mut self) {
        self.core_timeout();
        self.path_timeout();
        for round in 0.. {
            if round > MOST_ROUNDS {
                self.fail("liveness", "the paths do not come to rest".into());
                break;
            }
            let mut busy = self.core_actions();
            busy |= self.take_guest_output() > 0;
            busy |= self.give_guest_input() > 0;
            busy |= self.primary_path_actions();
            busy |= self.secondary_path_actions();
            if !busy || !self.p.alive {
                break;
            }
        }
        if self.p.alive {
            self.announce();
        }
    }

    fn core_timeout(&mut self) {
        let now = self.local_us();
        match &mut self.p.role {
            Role::Primary(side) if side.core.next_deadline().is_some_and(|at| at <= now) => {
                side.core.handle_timeout(now);
            }
            Role::Secondary(side) if side.core.next_deadline().is_some_and(|at| at <= now) => {
                side.core.handle_timeout(now);
            }
            _ => {}
        }
    }

    fn path_timeout(&mut self) {
        let now = self.local_us();
        let p = &mut *self.p;
        if let Role::Primary(side) = &mut p.role
            && side.path.next_deadline().is_some_and(|at| at <= now)
        {
            side.path.handle_timeout(now, &mut p.frames);
        }
    }

    fn core_actions(&mut self) -> bool {
        let mut busy = false;
        while self.p.alive {
            let action = match &mut self.p.role {
                Role::Primary(side) => side.core.poll_action(),
                Role::Secondary(side) => side.core.poll_action(),
                Role::None => None,
            };
            let Some(action) = action else { break };
            busy = true;
            self.act(action);
        }
        busy
    }

    fn act(&mut self, action: Action) {
        if !matches!(action, Action::Send(_) | Action::Lease { .. }) {
            self.trace(|| format!("must {action:?}"));
        }
        match action {
            Action::Send(msg) => self.send_control(&msg),
            Action::Arbiter(cas) => self.ask(cas),
            Action::StartSync => {
                if let Some(link) = self.p.link {
                    self.tell_worker(Command::Attach(link), 200);
                }
                let at = self.world.now + 500 + self.below(30_000);
                let event = HostEvent::PrimaryCore(PrimaryEvent::SyncReady);
                self.world.host_event(at, self.host, self.p.inc, event);
            }
            Action::Capture { epoch, first, .. } => {
                self.tell_worker(Command::Capture { epoch, first }, 300);
            }
            Action::Commit { epoch } => self.tell_worker(Command::Commit { epoch }, 200),
            Action::Abort { epoch } => match self.p.role {
                Role::Primary(_) => self.tell_worker(Command::Abort { epoch }, 200),
                _ => self.resume_unchanged(),
            },
            Action::GoAlone => self.tell_worker(Command::GoAlone, 200),
            Action::Mute(mute) => {
                let gaps = self.primary().map_or(0, |side| side.gaps_told);
                self.tell_worker(Command::Mute(mute, gaps), 200);
            }
            Action::Lease { until_us } => self.tell_worker(Command::Lease(until_us), 200),
            Action::CloseLink { .. } => self.close_link(),
            Action::StopSvm { epoch } => self.stop_svm(epoch),
            Action::Apply { epoch } => {
                let most_us = self.world.plan.pause_us;
                self.tell_worker(Command::Apply { epoch }, most_us);
            }
            Action::TakeOver { generation } => self.take_over(generation),
            Action::Stop(outcome) => {
                self.close_link();
                self.p.die();
                self.world.ended(self.host, &outcome);
            }
        }
    }

    fn ask(&mut self, cas: Cas) {
        let (host, inc) = (self.host, self.p.inc);
        if let Cas::Swap { standing, holder, .. } = &cas {
            let is_primary = matches!(self.p.role, Role::Primary(_));
            let unasked = match is_primary {
                true => self.mutated(Mutation::GoAloneUnasked) && *standing == Standing::Alone,
                false => self.mutated(Mutation::TakeOverUnasked),
            };
            self.pass(if is_primary { "paired_asked" } else { "take_over_asked" });
            if unasked {
                let (holder, standing) = (holder.clone(), *standing);
                let record = Record { generation: 1_000_000, holder, standing };
                return self.world.reply(host, inc, 10, Reply::Won(record));
            }
        }
        self.world.ask(host, inc, cas);
    }

    fn primary_path_actions(&mut self) -> bool {
        let mut busy = false;
        while self.p.alive {
            let Some(action) = self.primary().and_then(|side| side.path.poll_action()) else { break };
            busy = true;
            match action {
                PathAction::Release { token, right, .. } => {
                    let frame = self.p.frames.take(token);
                    self.world.trace(|| format!("out {right:?} {}", show(&frame)));
                    self.world.outcome.matches += u64::from(right == colo_compare::Right::Match);
                    self.world.from_nic(self.host, &frame);
                    self.pass("released");
                }
                PathAction::Mirror { epoch, input_seq, token } => {
                    let frame = self.p.frames.take(token);
                    if self.primary().is_some_and(|side| side.mirrors) {
                        let msg = LinkMsg::Input { epoch, seq: input_seq, frame };
                        self.send(Channel::Packets, msg);
                    }
                    self.pass("mirrored");
                    if self.mutated(Mutation::AckUnkept) {
                        let now = self.local_us();
                        let p = &mut *self.p;
                        if let Role::Primary(side) = &mut p.role {
                            side.path.handle_input_ack(now, &mut p.frames, input_seq);
                        }
                    }
                }
                PathAction::SvmReleased { svm_seq } => {
                    self.send(Channel::Packets, LinkMsg::Released { seq: svm_seq });
                }
                PathAction::PendingReleased { epoch } => {
                    self.send(Channel::Packets, LinkMsg::PendingReleased { epoch });
                }
                PathAction::Checkpoint(divergence) => {
                    self.trace(|| format!("wants a checkpoint: {divergence:?}"));
                    self.tell_primary_core(PrimaryEvent::CheckpointWanted);
                }
            }
        }
        busy
    }

    fn secondary_path_actions(&mut self) -> bool {
        let mut busy = false;
        while self.p.alive {
            let p = &mut *self.p;
            let Role::Secondary(side) = &mut p.role else { break };
            let Some(action) = side.path.poll_action() else { break };
            busy = true;
            let msg = match action {
                SecondaryAction::AckInput { up_to } => LinkMsg::InputAck { up_to },
                SecondaryAction::SendOutput { epoch, svm_seq } => {
                    let Some(token) = side.path.output(svm_seq) else { continue };
                    let frame = p.frames.bytes(token).to_vec();
                    LinkMsg::Output { epoch, seq: svm_seq, frame }
                }
                SecondaryAction::CaughtUp { epoch } => LinkMsg::CaughtUp { epoch },
                SecondaryAction::RequestCheckpoint(_) => LinkMsg::CheckpointWanted,
            };
            let point = matches!(msg, LinkMsg::Output { .. });
            self.send(Channel::Packets, msg);
            if point {
                self.pass("output_sent");
            }
        }
        busy
    }

    /// Announcements of a takeover.
    fn announce(&mut self) {
        let now = self.local_us();
        let mut frame = [0; ANNOUNCEMENT_MAX];
        while let Some(len) =
            self.primary().and_then(|side| side.path.poll_announcement(now, &mut frame))
        {
            self.world.from_nic(self.host, &frame[..len]);
        }
    }

    // ---- the guest ----

    fn wake_guest(&mut self) {
        self.p.wake_planned = false;
        if !self.p.runs {
            return;
        }
        let now = self.world.now;
        let chance = &mut self.world.hosts[self.host].chance;
        if let Some(guest) = &mut self.p.guest {
            guest.wake(now, chance);
            if let Some(text) = guest.complaint().cloned() {
                self.fail("output commit", format!("the guest sees: {text}"));
            }
        }
    }

    fn take_guest_output(&mut self) -> usize {
        let now = self.local_us();
        let ignore_room = self.mutated(Mutation::IgnoreRoom);
        let p = &mut *self.p;
        let Some(guest) = &mut p.guest else { return 0 };
        let mut n = 0;
        while !guest.sent.is_empty() {
            let room = match &p.role {
                Role::Primary(side) => side.path.room() || ignore_room,
                Role::Secondary(side) => side.path.room() && !side.stopped,
                Role::None => false,
            };
            if !room {
                break;
            }
            let Some(frame) = guest.sent.pop_front() else { break };
            let Some(token) = p.frames.insert(&frame) else { break };
            n += 1;
            match &mut p.role {
                Role::Primary(side) => side.path.handle_guest_tx(now, &mut p.frames, token),
                Role::Secondary(side) => side.path.handle_guest_tx(now, &mut p.frames, token),
                Role::None => {}
            }
        }
        n
    }

    fn give_guest_input(&mut self) -> usize {
        let now = self.local_us();
        let p = &mut *self.p;
        let Some(guest) = &mut p.guest else { return 0 };
        let mut n = 0;
        match &mut p.role {
            // A captured guest's ring must not change under the capture.
            Role::Primary(side) if p.runs => {
                while guest.has_room() && side.path.nic_room() {
                    let token = match side.path.poll_deliver(now, &mut p.frames) {
                        Some(token) => token,
                        None => {
                            let Some(frame) = side.nic.pop_front() else { break };
                            let Some(token) = p.frames.insert(&frame) else { break };
                            side.path.handle_nic(now, &mut p.frames, token)
                        }
                    };
                    guest.deliver(p.frames.bytes(&token).to_vec());
                    side.path.handle_delivered(now, &mut p.frames, token);
                    n += 1;
                }
            }
            Role::Secondary(side) if !side.stopped => {
                while guest.has_room() {
                    let Some(token) = side.path.poll_deliver(now, &mut p.frames) else { break };
                    let frame = p.frames.take(token);
                    guest.deliver(frame);
                    n += 1;
                }
            }
            _ => {}
        }
        n
    }

    // ---- afterwards ----

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
        {
            let due = guest.is_busy() || guest.deadline().is_some_and(|at| at <= now);
            if !due {
                next = [next, guest.deadline()].into_iter().flatten().min();
            } else if !self.p.wake_planned {
                self.p.wake_planned = true;
                let most = self.world.plan.guest_delay_us[host];
                let at = now + 5 + self.below(most);
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
