//! The primary's control thread: carries out what `colo_control::Primary` decides.
//!
//! Invariants: it is the only owner of the core, the control channel and the distributions of checkpoints; it never
//! waits for the peer; link loss is told to the worker before the core, so that a late cut finds no link.
//!
//! Does not decide anything about roles.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use colo_compare::Cause;
use colo_control::{
    Action, Geometry, Msg, Notice, Outcome, Primary, PrimaryEvent, PrimaryState, Record,
    VERSION_BULK,
};
use colo_fastpath::clock::now_us;
use colo_fastpath::link::PacketLink;
use colo_fastpath::mailbox::{Mailbox, Post};
use colo_fastpath::pair::{OnWorkers, PairEvent, PrimaryReport, PrimaryRole};
use colo_fastpath::worker::Edge;

use super::asking::Asking;
use super::control_link::ControlLink;
use super::host::{Replica, ReplicaError, page_key, unix_seconds};
use super::link::{Channels, Listener};
use super::opening::Opener;
use super::report::{CheckpointTimes, PairStatus, Standing, mode_name};
use super::wait::Waiter;
use crate::checkpoint::capture::{CaptureCommand, CaptureEvent, CaptureThread};
use crate::testpoint::{Point, reached};

/// How often the log tells how fast the guest may run; the status does always.
const PACE_TOLD_EVERY_US: u64 = 1_000_000;

/// A running primary.
pub struct PrimaryShell {
    core: Primary,
    replica: Replica,
    asking: Asking,
    listener: Listener,
    link: Option<Link>,
    /// Opens the packet channels of the link, which takes long.
    opener: Opener<Vec<PacketLink>>,
    pair_events: Mailbox<PairEvent>,
    capture_events: Mailbox<CaptureEvent>,
    capture: Sender<CaptureCommand>,
    capture_thread: Option<JoinHandle<()>>,
    times: CheckpointTimes,
    checkpoint_begun_us: u64,
    /// What asked for the next checkpoint first.
    cause: Option<&'static str>,
    unprotected: Option<(String, u64)>,
    takeovers: u64,
    /// Shards without room for more held output.
    full_shards: usize,
    /// When the log was told last how fast the guest may run.
    pace_told_us: u64,
    /// Gaps of the worker's clock that the core has heard of.
    gaps: u64,
    outcome: Option<Outcome>,
}

/// The channels to the secondary.
struct Link {
    session: u64,
    control: ControlLink,
    /// Handed to worker and checkpoint thread when the synchronisation starts.
    packets: Option<Vec<TcpStream>>,
    pages: Option<Vec<TcpStream>>,
    /// To end them while the checkpoint thread writes.
    pages_end: Vec<TcpStream>,
    /// How often they were opened anew.
    pages_opened: u64,
}

impl PrimaryShell {
    /// A primary that holds `record`, for a worker that is (or is about to be) in the primary's role and
    /// posts to `pair_events`.
    pub fn new(
        replica: Replica,
        listener: Listener,
        geometry: Geometry,
        record: Record,
        epoch: u64,
        takeovers: u64,
        pair_events: Mailbox<PairEvent>,
    ) -> Result<Self, ReplicaError> {
        let core = Primary::new(
            replica.host.clone(),
            replica.timing(),
            replica.block_alone(),
            geometry,
            record,
            epoch,
        )
        .protected_by(replica.protection());
        let (post, capture_events) = Mailbox::new().map_err(ReplicaError::System)?;
        let (capture, capture_thread) = spawn_capture(&replica, post)?;
        let opening = replica.link_opening();
        let opener = Opener::start(move |streams| opening.open(streams));
        let reason = match takeovers {
            0 => "no secondary has joined yet",
            _ => "this host took over; no secondary has joined since",
        };
        let asking = Asking::start(replica.arbiter.clone()).map_err(ReplicaError::System)?;
        Ok(Self {
            core,
            replica,
            asking,
            listener,
            link: None,
            opener: opener.map_err(ReplicaError::System)?,
            pair_events,
            capture_events,
            capture,
            capture_thread: Some(capture_thread),
            times: CheckpointTimes::default(),
            checkpoint_begun_us: 0,
            cause: None,
            unprotected: Some((reason.to_owned(), unix_seconds())),
            takeovers,
            full_shards: 0,
            pace_told_us: 0,
            gaps: 0,
            outcome: None,
        })
    }

    /// Runs until the role ends.
    pub fn run(mut self) -> Outcome {
        let mut waiter = Waiter::default();
        let outcome = loop {
            self.events(&waiter);
            let now = now_us();
            self.look_at_answers(now);
            if self.core.next_deadline().is_some_and(|at| at <= now) {
                self.core.handle_timeout(now);
            }
            self.perform();
            if let Some(outcome) = self.outcome.take() {
                break outcome;
            }
            self.wait(&mut waiter);
        };
        self.close_link("this host ends");
        drop(self.opener);
        drop(self.capture);
        if let Some(thread) = self.capture_thread.take() {
            let _ = thread.join();
        }
        outcome
    }

    fn wait(&mut self, waiter: &mut Waiter) {
        waiter.clear();
        waiter.readable(self.pair_events.poll_fd());
        waiter.readable(self.capture_events.poll_fd());
        waiter.readable(self.asking.poll_fd());
        waiter.readable(self.opener.poll_fd());
        self.listener.fds().for_each(|fd| waiter.readable(fd));
        if let Some(link) = &self.link {
            waiter.push(link.control.pollfd());
        }
        self.replica.add_fds(waiter);
        let mut deadline = self.core.next_deadline();
        if self.listener.is_busy() {
            let soon = now_us() + 100_000;
            deadline = Some(deadline.map_or(soon, |at| at.min(soon)));
        }
        waiter.wait(deadline);
    }

    // ---- events in ----

    fn events(&mut self, waiter: &Waiter) {
        if waiter.may_be_ready(self.capture_events.poll_fd()) {
            self.read_captures();
        }
        if waiter.may_be_ready(self.pair_events.poll_fd()) {
            while let Some(event) = self.pair_events.try_next() {
                self.pair_event(event);
            }
        }
        if waiter.may_be_ready(self.opener.poll_fd())
            && let Some(links) = self.opener.try_next()
        {
            self.sync_over(links);
        }
        let control = self.link.as_ref().map(|link| link.control.fd());
        if control.is_some_and(|fd| waiter.may_be_ready(fd)) {
            self.read_control();
        }
        if waiter.may_be_ready(self.asking.poll_fd()) {
            while let Some(reply) = self.asking.answer() {
                self.core.handle(now_us(), PrimaryEvent::Arbiter(reply));
            }
        }
        let calls = self.listener.fds().any(|fd| waiter.may_be_ready(fd));
        if calls || self.listener.is_busy() {
            if let Some(channels) = self.listener.poll() {
                self.link_up(channels);
            }
            self.take_pages();
        }
        let is_asked = self.replica.may_be_asked(waiter);
        if is_asked && let Some(fault) = self.replica.guest.fault() {
            tracing::error!("the guest faulted: {fault}");
            self.outcome = Some(Outcome::Failed { reason: fault });
        }
        if self.replica.wants_stop() {
            self.core.handle(now_us(), PrimaryEvent::ShutDown);
            if self.asking.is_open() {
                self.replica.tell_of_wait();
            }
        }
        if !is_asked {
            return;
        }
        self.replica.answer_status(|| self.status());
        while let Some(request) = self.replica.next_request() {
            let config = Box::new(self.replica.config.clone());
            self.order(CaptureCommand::Snapshot { request, config });
        }
    }

    /// Heartbeats wake this thread often enough for it.
    fn look_at_answers(&mut self, now: u64) {
        if self.core.state() == PrimaryState::Paired {
            let (answers, late_us) = self.replica.answers.take();
            self.core
                .handle(now, PrimaryEvent::Answers { answers, late_us });
        }
    }

    fn read_captures(&mut self) {
        while let Some(event) = self.capture_events.try_next() {
            self.capture_event(event);
        }
    }

    fn capture_event(&mut self, event: CaptureEvent) {
        let now = now_us();
        match event {
            CaptureEvent::SyncRound {
                sent_pages,
                dirty_pages,
                took_us,
            } => {
                tracing::debug!(
                    "live round: {sent_pages} pages sent in {took_us} us, {dirty_pages} dirty again"
                );
                self.times.sync_rounds += 1;
                self.times.sync_pages += sent_pages;
                let event = PrimaryEvent::SyncRound {
                    sent_pages,
                    dirty_pages,
                    took_us,
                };
                self.core.handle(now, event);
            }
            CaptureEvent::Captured { epoch, cost } => {
                tracing::debug!("epoch {epoch} captured: {cost:?}");
                self.times.captured(&cost);
                self.core.handle(now, PrimaryEvent::Captured { epoch });
            }
            CaptureEvent::Cut { epoch } => {
                self.core.handle(now, PrimaryEvent::Captured { epoch });
            }
            CaptureEvent::Ahead(counters) => self.times.ahead(&counters),
            CaptureEvent::Sent {
                epoch,
                sent,
                stall_us,
            } => {
                tracing::debug!("epoch {epoch} sent: {sent:?}");
                self.times.sent(epoch, &sent, stall_us);
                self.core.handle(now, PrimaryEvent::Sent { epoch });
            }
            CaptureEvent::Failed { epoch, reason } => {
                tracing::warn!("checkpoint of epoch {epoch} failed: {reason}");
                self.core
                    .handle(now, PrimaryEvent::CheckpointFailed { epoch, reason });
            }
            CaptureEvent::StreamsBroken {
                session,
                opened,
                reason,
            } => {
                let link = self.link.as_ref();
                if let Some(link) =
                    link.filter(|l| (l.session, l.pages_opened) == (session, opened))
                {
                    tracing::warn!("the page streams are of no use, others are needed: {reason}");
                    // The secondary sees their end.
                    link.shut_pages();
                }
            }
            CaptureEvent::LinkDown { session, reason } => {
                if self
                    .link
                    .as_ref()
                    .is_some_and(|link| link.session == session)
                {
                    self.link_down(&reason);
                }
            }
        }
    }

    fn pair_event(&mut self, event: PairEvent) {
        match event {
            PairEvent::CheckpointWanted(divergence) => {
                tracing::debug!("checkpoint wanted: {divergence}");
                self.cause.get_or_insert(divergence.cause.name());
                self.waited_in_vain(divergence.cause);
                self.core.handle(now_us(), PrimaryEvent::CheckpointWanted);
            }
            PairEvent::PeerWantsCheckpoint => {
                self.cause.get_or_insert("secondary");
                self.core.handle(now_us(), PrimaryEvent::CheckpointWanted);
            }
            PairEvent::LinkDown { reason } => self.link_down(&reason),
            PairEvent::HoldFull(is_full) => self.hold_full(is_full),
            PairEvent::ClockGap { gap_us, gaps } => {
                self.gaps = gaps;
                tracing::warn!("this process stood still for {gap_us} us; asking the arbiter");
                self.core.handle(now_us(), PrimaryEvent::ClockGap);
            }
        }
    }

    /// An answer that did not come in time is at least as late as that.
    fn waited_in_vain(&mut self, cause: Cause) {
        let late_us = match cause {
            Cause::Deadline => self.replica.limits.compare_deadline_us,
            Cause::Lag => self.replica.limits.lag_deadline_us,
            _ => return,
        };
        let answers = 1;
        self.core
            .handle(now_us(), PrimaryEvent::Answers { answers, late_us });
    }

    fn read_control(&mut self) {
        loop {
            let Some(link) = &mut self.link else { return };
            match link.control.flush().and_then(|()| link.control.receive()) {
                Ok(messages) if messages.is_empty() => return,
                Ok(messages) => {
                    // What the peer answers to was reported by our own thread before.
                    self.read_captures();
                    for msg in messages {
                        self.note(&msg);
                        self.core.handle(now_us(), PrimaryEvent::Msg(msg));
                    }
                    self.replica.heard.note(self.core.heard_us());
                    self.perform();
                    if !self
                        .link
                        .as_ref()
                        .is_some_and(|link| link.control.has_rest())
                    {
                        return;
                    }
                }
                Err(e) => {
                    self.link_down(&e.to_string());
                    return;
                }
            }
        }
    }

    fn note(&mut self, msg: &Msg) {
        match msg {
            Msg::Committed { epoch, .. } => {
                reached(Point::CommitReceived);
                tracing::debug!("epoch {epoch} is committed");
            }
            Msg::Aborted { epoch, reason, .. } => {
                tracing::warn!("the secondary refused the checkpoint of epoch {epoch}: {reason}");
            }
            _ => {}
        }
    }

    fn link_up(&mut self, channels: Channels) {
        if self.link.is_some() {
            tracing::warn!("a second secondary tried to join; it was sent away");
            return;
        }
        match Link::new(channels) {
            Ok(link) => {
                tracing::info!("a secondary has connected");
                self.link = Some(link);
                self.core.handle(now_us(), PrimaryEvent::LinkUp);
            }
            Err(e) => tracing::warn!("a secondary's connection failed at once: {e}"),
        }
    }

    /// The secondary has opened its streams of pages anew: whatever goes over the old ones fails.
    fn take_pages(&mut self) {
        let follows = matches!(
            self.core.state(),
            PrimaryState::Pairing | PrimaryState::Paired
        );
        let Some(link) = self.link.as_mut().filter(|_| follows) else {
            return;
        };
        let Some(streams) = self.listener.take_pages(link.session) else {
            return;
        };
        link.shut_pages();
        match streams.iter().map(TcpStream::try_clone).collect() {
            Ok(ends) => {
                link.pages_end = ends;
                link.pages_opened += 1;
                let opened = link.pages_opened;
                tracing::warn!("the page streams were opened anew");
                self.order(CaptureCommand::Reopen { streams, opened });
            }
            Err(e) => self.link_down(&e.to_string()),
        }
    }

    fn link_down(&mut self, reason: &str) {
        if self.link.is_none() {
            return;
        }
        tracing::warn!("the link is lost: {reason}");
        self.close_link(reason);
        let reason = reason.to_owned();
        self.core
            .handle(now_us(), PrimaryEvent::LinkDown { reason });
    }

    fn close_link(&mut self, reason: &str) {
        let Some(mut link) = self.link.take() else {
            return;
        };
        // The peer takes a closed channel as our end: be silent before it can see one (rule 18).
        self.end_lease();
        self.on_role(|role, edge| role.detach(edge));
        self.opener.forget();
        let _ = link.control.flush();
        link.shut_pages();
        self.unprotected
            .get_or_insert((reason.to_owned(), unix_seconds()));
    }

    // ---- actions out ----

    fn perform(&mut self) {
        while let Some(action) = self.core.poll_action() {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(msg) => self.send(&msg),
            Action::Arbiter(cas) => self.asking.ask(cas),
            Action::StartSync => self.start_sync(),
            Action::Capture {
                epoch,
                first,
                svm_dirty,
                buffer,
            } => {
                let since_us = now_us().saturating_sub(self.checkpoint_begun_us);
                self.times.svm_stopped(since_us);
                let generation = self.core.record().generation;
                self.order(CaptureCommand::Capture {
                    epoch,
                    first,
                    svm_stopped: svm_dirty,
                    buffer,
                    generation,
                });
            }
            Action::Commit { epoch } => self.commit(epoch),
            Action::Abort { epoch } => {
                self.times.aborted += 1;
                self.on_role(move |role, edge| role.abort(edge, epoch));
                self.order(CaptureCommand::Aborted);
            }
            Action::GoAlone => {
                self.on_role(|role, edge| role.go_alone(edge));
                self.order(CaptureCommand::Detach);
                tracing::warn!("unprotected: this host runs the VM alone");
            }
            Action::Detach => {
                self.order(CaptureCommand::Detach);
                tracing::warn!("all output is held until a secondary joins: alone = \"block\"");
            }
            Action::Mute(true) => self.on_role(|role, _| role.mute()),
            Action::Mute(false) => {
                let gaps = self.gaps;
                self.on_role(move |role, edge| role.unmute(edge, gaps));
            }
            // Nobody waits for more time; that there is none any more is to be heeded before anything else is done.
            Action::Lease { until_us } if until_us > 0 => told(PrimaryRole::extend_lease(
                self.replica.machine.workers(),
                &self.replica.lease,
                until_us,
            )),
            Action::Lease { .. } => self.end_lease(),
            Action::CloseLink { reason } => {
                tracing::info!("closing the link: {reason}");
                self.close_link(&reason);
            }
            Action::Stop(outcome) => self.outcome = Some(outcome),
            Action::Tell(notice) => self.tell(notice),
            Action::SyncRound => self.order(CaptureCommand::SyncRound),
            Action::Throttle { run_pct } => self.throttle(run_pct),
            Action::StopSvm { .. }
            | Action::Discard { .. }
            | Action::Apply { .. }
            | Action::TakeOver { .. } => {}
        }
    }

    fn tell(&mut self, notice: Notice) {
        let now = now_us();
        match notice {
            // A guest at its limits is stopped and let go again many times a second.
            Notice::Throttled { .. } if now < self.pace_told_us + PACE_TOLD_EVERY_US => {
                tracing::debug!("{notice}");
            }
            Notice::Throttled { .. } => {
                self.pace_told_us = now;
                tracing::warn!("{notice}");
            }
            _ => tracing::warn!("{notice}"),
        }
        if let Notice::CannotFollow { reason } | Notice::Refused { reason } = notice {
            // What a client of the status wants to know until a secondary has joined.
            let since = self.unprotected.take().map(|(_, since)| since);
            self.unprotected = Some((reason, since.unwrap_or_else(unix_seconds)));
        }
    }

    fn throttle(&self, run_pct: u8) {
        if let Err(e) = self.replica.machine.throttle_vcpus(run_pct) {
            tracing::error!("the guest cannot be slowed down: {e}");
        }
    }

    /// The vCPUs stand still as long as any shard has no room for output (rule 14).
    fn hold_full(&mut self, is_full: bool) {
        let before = self.full_shards;
        self.full_shards = match is_full {
            true => before + 1,
            false => before.saturating_sub(1),
        };
        self.times.hold_full += u64::from(is_full);
        if (before == 0) != (self.full_shards == 0) {
            self.core.handle(now_us(), PrimaryEvent::HoldFull(is_full));
        }
    }

    fn send(&mut self, msg: &Msg) {
        if let Msg::StopSvm { epoch, .. } = msg {
            self.checkpoint_begun_us = now_us();
            let cause = self.cause.take().unwrap_or("periodic");
            self.times.begun(*epoch, cause);
        }
        let Some(link) = &mut self.link else { return };
        if let Err(e) = link.control.send(msg) {
            self.link_down(&e.to_string());
        }
    }

    fn start_sync(&mut self) {
        let Some(link) = &mut self.link else { return };
        let Some(packets) = link.packets.take() else {
            return;
        };
        self.checkpoint_begun_us = now_us();
        (self.times.sync_rounds, self.times.sync_pages) = (0, 0);
        self.opener.ask(packets);
    }

    /// The packet channels are open, and pages may follow.
    fn sync_over(&mut self, links: io::Result<Vec<PacketLink>>) {
        let links = match links {
            Ok(links) => links,
            Err(e) => return self.link_down(&e.to_string()),
        };
        let Some(link) = &mut self.link else { return };
        let Some(streams) = link.pages.take() else {
            return;
        };
        let session = link.session;
        let workers = self.replica.machine.workers();
        let attached = PrimaryRole::on_each(workers, links, PrimaryRole::attach);
        told(attached);
        let generation = self.core.record().generation;
        let theirs = usize::try_from(self.core.peer_ahead_mib()).unwrap_or(usize::MAX);
        let ahead_mib = self.replica.config.checkpoint.ahead_mib.min(theirs);
        let lends = self.core.peer_version() >= VERSION_BULK;
        match page_key() {
            Ok(key) => self.order(CaptureCommand::Sync {
                streams,
                generation,
                key,
                session,
                ahead_mib,
                lends,
            }),
            Err(e) => self.link_down(&e.to_string()),
        }
    }

    fn commit(&mut self, epoch: u64) {
        let generation = self.core.record().generation;
        self.order(CaptureCommand::Committed { generation });
        let since_us = now_us().saturating_sub(self.checkpoint_begun_us);
        let first = self.core.state() == PrimaryState::Paired && self.unprotected.take().is_some();
        if first {
            self.times.sync_us = since_us;
            tracing::info!("protected: the secondary has the state");
        }
        let workers = self.replica.machine.workers();
        let held = PrimaryRole::on_workers(workers, move |role, edge| role.commit(edge, epoch));
        reached(Point::CommitReleased);
        if !first {
            let hold_us = held.iter().flatten().copied().max().unwrap_or(0);
            self.times.committed(since_us, hold_us);
        }
        told(held);
    }

    fn order(&self, command: CaptureCommand) {
        if self.capture.send(command).is_err() {
            tracing::error!("the checkpoint thread has ended");
        }
    }

    fn end_lease(&self) {
        let (workers, lease) = (self.replica.machine.workers(), &self.replica.lease);
        told(PrimaryRole::end_lease(workers, lease));
    }

    fn on_role(&self, task: impl Fn(&mut PrimaryRole, &mut Edge) + Clone + Send + 'static) {
        told(PrimaryRole::on_workers(
            self.replica.machine.workers(),
            task,
        ));
    }

    // ---- status ----

    fn standing(&self) -> Standing {
        let state = match self.core.state() {
            PrimaryState::Alone => "alone",
            PrimaryState::Syncing | PrimaryState::FirstCheckpoint | PrimaryState::Pairing => {
                "syncing"
            }
            PrimaryState::Paired => "paired",
            PrimaryState::Deciding => "deciding",
            PrimaryState::Blocked => "blocked",
            PrimaryState::ShuttingDown | PrimaryState::Ended => "stopping",
        };
        let (reason, since) = self.unprotected.clone().unwrap_or_default();
        Standing {
            role: "primary",
            state,
            protected: self.core.state() == PrimaryState::Paired,
            dirty_logging: self.replica.machine.logs_dirty_pages(),
            page_streams: self.link.as_ref().map_or(0, |link| link.pages_end.len()),
            streams_reopened: self.link.as_ref().map_or(0, |link| link.pages_opened),
            unprotected_reason: reason,
            unprotected_since: since,
            generation: self.core.record().generation,
            epoch: self.core.epoch(),
            takeovers: self.takeovers,
            mode: mode_name(self.core.mode()),
            run_pct: self.core.run_pct(),
            lag_us: self.core.lag_us(),
            throttled_us: self.replica.machine.throttled_us(),
            refused_connections: self.listener.refused,
            checkpoint_share_pct: self.core.checkpoint_share_pct(now_us()),
            ..Standing::default()
        }
        .counted(self.core.counters())
    }

    fn status(&self) -> Option<PairStatus> {
        let standing = self.standing();
        let workers = self.replica.machine.workers();
        let reports = PrimaryRole::on_workers(workers, |role, _| role.report())?;
        let report = PrimaryReport::sum(reports)?;
        Some(PairStatus::of_primary(standing, &report, &self.times))
    }
}

/// Complains if not all workers were there.
fn told<T>(answers: Option<T>) {
    if answers.is_none() {
        tracing::error!("a packet worker has ended or is in another role");
    }
}

impl Link {
    fn shut_pages(&self) {
        for stream in &self.pages_end {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn new(channels: Channels) -> io::Result<Self> {
        Ok(Self {
            session: channels.session,
            control: ControlLink::new(channels.control)?,
            pages_end: channels
                .pages
                .iter()
                .map(TcpStream::try_clone)
                .collect::<io::Result<_>>()?,
            pages_opened: 0,
            packets: Some(channels.packets),
            pages: Some(channels.pages),
        })
    }
}

fn spawn_capture(
    replica: &Replica,
    post: Post<CaptureEvent>,
) -> Result<(Sender<CaptureCommand>, JoinHandle<()>), ReplicaError> {
    let (sender, commands) = channel();
    let settings = replica.capture_settings();
    let machine = replica.machine.clone();
    let thread = std::thread::Builder::new()
        .name("checkpoint".to_owned())
        .spawn(move || CaptureThread::new(machine, settings, post).run(&commands))
        .map_err(ReplicaError::System)?;
    Ok((sender, thread))
}
