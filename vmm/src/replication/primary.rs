//! The primary's control thread: carries out what `colo_control::Primary` decides.
//!
//! Invariants: it is the only owner of the core, the control channel and the distributions of checkpoints; it never
//! waits for the peer.
//!
//! Does not decide anything about roles. Here is what comes in; what follows from it is in `acts`.

mod acts;
mod link;
mod status;

use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use colo_compare::Cause;
use colo_control::{Geometry, Msg, Outcome, Primary, PrimaryEvent, PrimaryState, Record};
use colo_fastpath::clock::now_us;
use colo_fastpath::link::PacketLink;
use colo_fastpath::mailbox::{Mailbox, Post};
use colo_fastpath::pair::PairEvent;

use super::asking::Asking;
use super::host::{Replica, ReplicaError, unix_seconds};
use super::link::Listener;
use super::opening::Opener;
use super::report::CheckpointTimes;
use super::wait::Waiter;
use crate::checkpoint::capture::{CaptureCommand, CaptureEvent, CaptureThread};
use crate::testpoint::{Point, reached};
use link::Link;

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
    /// What asked for the next checkpoint first,
    cause: Option<&'static str>,
    /// and for the one in flight: should it be aborted, for the next.
    asked: Option<&'static str>,
    unprotected: Option<(String, u64)>,
    /// Why a link was given up last though both hosts lived.
    given_up: String,
    takeovers: u64,
    /// Shards without room for more held output.
    full_shards: usize,
    /// When the log was told last how fast the guest may run.
    pace_told_us: u64,
    /// Gaps of the worker's clock that the core has heard of.
    gaps: u64,
    outcome: Option<Outcome>,
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
            asked: None,
            unprotected: Some((reason.to_owned(), unix_seconds())),
            given_up: String::new(),
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
        // The core's counters say already what the actions are about to.
        self.perform();
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
                    tracing::warn!("the link is given up: {reason}");
                    self.core.handle(now, PrimaryEvent::PagesGone { reason });
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
