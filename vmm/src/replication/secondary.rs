//! The secondary's control thread: carries out what `colo_control::Secondary` decides.
//!
//! Invariants: it is the only owner of the core, the control channel and the SVM's accumulated dirty set; the SVM is
//! stopped and let go only as the core says.
//!
//! Does not decide anything about roles.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;

use colo_control::{
    Action, Geometry, Mode, Outcome, Record, Secondary, SecondaryEvent, SecondaryState,
};
use colo_fastpath::clock::now_us;
use colo_fastpath::mailbox::{Mailbox, Post};
use colo_fastpath::pair::{
    OnWorkers, PairEvent, PrimaryRole, SecondaryReport, SecondaryRole, SecondaryRoleConfig,
};
use colo_fastpath::worker::Edge;

use super::again::PagesAgain;
use super::applied::ApplyTimes;
use super::asking::Asking;
use super::control_link::ControlLink;
use super::host::{Replica, ReplicaError};
use super::link::Channels;
use super::report::{PairStatus, Standing, mode_name};
use super::wait::Waiter;
use crate::checkpoint::pages::PageBitmap;
use crate::checkpoint::stage::{self, StageCommand, StageEvent, StageOrders};
use crate::checkpoint::stop::{self, StopNumber};
use crate::testpoint::{Point, reached};

/// How a secondary's life ended.
pub enum SecondaryEnd {
    /// It is the VM now.
    TookOver {
        /// The record it won.
        record: Record,
        /// The epoch its packet path is in.
        epoch: u64,
        /// What its worker's new role posts to.
        pair_events: Mailbox<PairEvent>,
        /// What goes on.
        replica: Box<Replica>,
    },
    /// It is not.
    Ended(Outcome),
}

/// A running secondary.
pub struct SecondaryShell {
    core: Secondary,
    replica: Replica,
    asking: Asking,
    control: Option<ControlLink>,
    pages_end: Vec<TcpStream>,
    /// Opens others in their place.
    pages_again: PagesAgain,
    pair_post: Post<PairEvent>,
    pair_events: Mailbox<PairEvent>,
    stage_events: Mailbox<StageEvent>,
    stage: Option<StageOrders>,
    stage_thread: Option<JoinHandle<()>>,
    /// Pages that the SVM dirtied since the last commit.
    dirty: PageBitmap,
    stop: StopNumber,
    times: ApplyTimes,
    applied_epoch: u64,
    path_epoch: u64,
    end: Option<End>,
}

enum End {
    TookOver(Record),
    Ended(Outcome),
}

impl SecondaryShell {
    /// Starts over connected channels, with a machine that has never run.
    pub fn new(
        replica: Replica,
        geometry: Geometry,
        channels: Channels,
    ) -> Result<Self, ReplicaError> {
        let system = ReplicaError::System;
        let (pair_post, pair_events) = Mailbox::new().map_err(system)?;
        let (stage_post, stage_events) = Mailbox::new().map_err(system)?;
        let pages_end = channels.pages.iter().map(TcpStream::try_clone);
        let pages_end = pages_end.collect::<Result<Vec<_>, _>>().map_err(system)?;
        let (peer, session) = (replica.replication.link_peer, channels.session);
        let pages_again = PagesAgain::new(peer, session, pages_end.len()).map_err(system)?;
        let links = replica.link_opening().open(channels.packets);
        let links = links.map_err(system)?;
        let role = SecondaryRoleConfig {
            limits: replica.limits,
            mac: replica.mac,
        };
        for (worker, link) in replica.machine.workers().iter().zip(links) {
            let role = SecondaryRole::new(&role, link, pair_post.clone());
            let set = worker.set_role(Box::new(role));
            set.map_err(|_| ReplicaError::WorkerGone)?;
        }
        let (machine, settings) = (replica.machine.clone(), replica.stage_settings());
        let (stage, stage_thread) = stage::spawn(machine, channels.pages, settings, stage_post)
            .map_err(ReplicaError::Stage)?;
        let core = Secondary::new(
            replica.host.clone(),
            replica.timing(),
            channels.session,
            geometry,
        )
        .keeping_ahead(u32::try_from(settings.ahead_mib).unwrap_or(u32::MAX));
        let dirty = PageBitmap::new(replica.machine.ram().page_count());
        let asking = Asking::start(replica.arbiter.clone()).map_err(system)?;
        Ok(Self {
            core,
            asking,
            control: Some(ControlLink::new(channels.control).map_err(system)?),
            pages_end,
            pages_again,
            pair_post,
            pair_events,
            stage_events,
            stage: Some(stage),
            stage_thread: Some(stage_thread),
            dirty,
            stop: StopNumber::default(),
            times: ApplyTimes::default(),
            applied_epoch: 0,
            path_epoch: 1,
            end: None,
            replica,
        })
    }

    /// Runs until the role ends.
    pub fn run(mut self) -> SecondaryEnd {
        self.core.handle(now_us(), SecondaryEvent::LinkUp);
        let mut waiter = Waiter::default();
        let end = loop {
            self.events(&waiter);
            let now = now_us();
            if self.core.next_deadline().is_some_and(|at| at <= now) {
                self.core.handle_timeout(now);
            }
            self.perform();
            if let Some(end) = self.end.take() {
                break end;
            }
            self.wait(&mut waiter);
        };
        self.close_link();
        self.stage = None;
        if let Some(thread) = self.stage_thread.take() {
            let _ = thread.join();
        }
        match end {
            End::Ended(outcome) => SecondaryEnd::Ended(outcome),
            End::TookOver(record) => SecondaryEnd::TookOver {
                record,
                epoch: self.path_epoch,
                pair_events: self.pair_events,
                replica: Box::new(self.replica),
            },
        }
    }

    fn wait(&mut self, waiter: &mut Waiter) {
        waiter.clear();
        waiter.readable(self.pair_events.poll_fd());
        waiter.readable(self.stage_events.poll_fd());
        waiter.readable(self.asking.poll_fd());
        waiter.readable(self.pages_again.poll_fd());
        if let Some(control) = &self.control {
            waiter.push(control.pollfd());
        }
        self.replica.add_fds(waiter);
        waiter.wait(self.core.next_deadline());
    }

    // ---- events in ----

    fn events(&mut self, waiter: &Waiter) {
        let control = self.control.as_ref().map(ControlLink::fd);
        if control.is_some_and(|fd| waiter.may_be_ready(fd)) {
            self.read_control();
        }
        if waiter.may_be_ready(self.stage_events.poll_fd()) {
            while let Some(event) = self.stage_events.try_next() {
                self.stage_event(event);
            }
        }
        if waiter.may_be_ready(self.pages_again.poll_fd()) {
            while let Some(opened) = self.pages_again.try_next() {
                match opened {
                    Ok(streams) => self.pages_opened(streams),
                    Err(e) => self.pages_gone(e.to_string()),
                }
            }
        }
        if waiter.may_be_ready(self.pair_events.poll_fd()) {
            while let Some(event) = self.pair_events.try_next() {
                self.pair_event(event);
            }
        }
        if waiter.may_be_ready(self.asking.poll_fd()) {
            while let Some(reply) = self.asking.answer() {
                self.core.handle(now_us(), SecondaryEvent::Arbiter(reply));
            }
        }
        if !self.replica.may_be_asked(waiter) {
            return;
        }
        // The SVM may run into what the PVM never sees: a divergence like others.
        if self.note_svm_end() {
            self.on_first_role(SecondaryRole::want_checkpoint);
        }
        if self.replica.wants_stop() {
            self.stop_when_answered();
        }
        self.replica.answer_status(|| self.status());
        self.replica.refuse_requests();
    }

    /// The answer to an open question may make this host the one that holds the VM. Then it takes over, and who runs the
    /// VM ends it.
    fn stop_when_answered(&mut self) {
        if self.core.has_won() {
            return;
        }
        if !self.asking.is_open() {
            tracing::info!("stopping; the primary goes on alone");
            self.end = Some(End::Ended(Outcome::Off));
        } else {
            self.replica.tell_of_wait();
        }
    }

    fn stage_event(&mut self, event: StageEvent) {
        let now = now_us();
        match event {
            StageEvent::Staged { epoch } => {
                let before = self.core.state();
                self.core.handle(now, SecondaryEvent::Staged { epoch });
                self.perform();
                if before == SecondaryState::TookOver {
                    self.order(StageCommand::Discard);
                }
            }
            StageEvent::Failed {
                epoch,
                reason,
                unfit,
            } => {
                tracing::warn!("checkpoint of epoch {epoch} refused: {reason}");
                let event = match unfit {
                    true => SecondaryEvent::Unfit { epoch, reason },
                    false => SecondaryEvent::StageFailed { epoch, reason },
                };
                self.core.handle(now, event);
            }
            StageEvent::Applied { epoch, cost } => {
                tracing::debug!("epoch {epoch} applied: {cost:?}");
                self.dirty.clear();
                self.pages_again.committed();
                self.times.applied(epoch, &cost);
                self.applied_epoch = epoch;
                self.core.handle(now, SecondaryEvent::Applied { epoch });
            }
            StageEvent::ApplyFailed { reason } => {
                tracing::error!("a committed checkpoint could not be applied: {reason}");
                self.core
                    .handle(now, SecondaryEvent::ApplyFailed { reason });
            }
            StageEvent::StreamsBroken { reason } => self.streams_broken(reason),
            StageEvent::Reopened { waker } => {
                if let Some(stage) = &mut self.stage {
                    stage.rewire(waker);
                }
            }
            StageEvent::LinkDown { reason } => self.pages_gone(reason),
        }
    }

    /// The pair lives on, if the primary does: it sees the end of the old streams and gets others.
    fn streams_broken(&mut self, reason: String) {
        if self.control.is_none() {
            return;
        }
        self.shut_pages();
        if !self.pages_again.ask() {
            return self.pages_gone(reason);
        }
        tracing::warn!("the page streams are opened anew: {reason}");
        self.core
            .handle(now_us(), SecondaryEvent::PagesLost { reason });
    }

    fn pages_opened(&mut self, streams: Vec<TcpStream>) {
        if self.control.is_none() {
            return;
        }
        match streams.iter().map(TcpStream::try_clone).collect() {
            Ok(ends) => {
                self.pages_end = ends;
                self.order(StageCommand::Reopen(streams));
            }
            Err(e) => self.pages_gone(e.to_string()),
        }
    }

    /// No page comes over this link any more, but the primary can be told.
    fn pages_gone(&mut self, reason: String) {
        if self.control.is_some() {
            tracing::warn!("the link is given up: {reason}");
        }
        self.core
            .handle(now_us(), SecondaryEvent::PagesGone { reason });
    }

    fn pair_event(&mut self, event: PairEvent) {
        match event {
            PairEvent::LinkDown { reason } => self.link_down(reason),
            PairEvent::CheckpointWanted(_)
            | PairEvent::HoldFull(_)
            | PairEvent::PeerWantsCheckpoint
            | PairEvent::ClockGap { .. } => {}
        }
    }

    fn read_control(&mut self) {
        loop {
            let Some(control) = &mut self.control else {
                return;
            };
            match control.flush().and_then(|()| control.receive()) {
                Ok(messages) if messages.is_empty() => return,
                Ok(messages) => {
                    if let Some(stage) = &self.stage {
                        self.core.note_begun(stage.begun_epoch());
                    }
                    for msg in messages {
                        self.core.handle(now_us(), SecondaryEvent::Msg(msg));
                    }
                    self.replica.heard.note(self.core.heard_us());
                    self.perform();
                    if !self.control.as_ref().is_some_and(ControlLink::has_rest) {
                        return;
                    }
                }
                Err(e) => return self.link_down(e.to_string()),
            }
        }
    }

    fn link_down(&mut self, reason: String) {
        if self.control.is_none() {
            return;
        }
        tracing::warn!("the link is lost: {reason}");
        self.close_link();
        self.core
            .handle(now_us(), SecondaryEvent::LinkDown { reason });
    }

    fn close_link(&mut self) {
        if let Some(mut control) = self.control.take() {
            let _ = control.flush();
        }
        // The packet channel stays until the takeover has read what is in it; the peer is gone or told.
        self.shut_pages();
    }

    fn shut_pages(&self) {
        for stream in &self.pages_end {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    // ---- actions out ----

    fn perform(&mut self) {
        while self.end.is_none()
            && let Some(action) = self.core.poll_action()
        {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(msg) => {
                let Some(control) = &mut self.control else {
                    return;
                };
                if let Err(e) = control.send(&msg) {
                    self.link_down(e.to_string());
                }
            }
            Action::Arbiter(cas) => self.asking.ask(cas),
            Action::StopSvm { epoch } => match self.stop_svm() {
                Ok(()) => {
                    reached(Point::Stopped);
                    let stop = self.stop.advance();
                    let dirty = Box::new(self.dirty.clone());
                    let generation = self.core.generation();
                    self.order(StageCommand::Digests {
                        epoch,
                        generation,
                        stop,
                        dirty,
                    });
                    let dirty = stop::to_bytes(&self.dirty, stop, self.core.version());
                    self.core
                        .handle(now_us(), SecondaryEvent::SvmStopped { epoch, dirty });
                }
                Err(e) => {
                    let outcome = Outcome::Failed {
                        reason: e.to_string(),
                    };
                    self.end = Some(End::Ended(outcome));
                }
            },
            Action::Apply { halt, .. } => {
                self.replica.guest.forget();
                self.order(StageCommand::Apply { halt });
            }
            Action::Discard { .. } => self.order(StageCommand::Discard),
            Action::Tell(notice) => tracing::warn!("{notice}"),
            Action::Abort { .. } => self.resume_unchanged(),
            Action::CloseLink { reason } => {
                tracing::info!("closing the link: {reason}");
                self.close_link();
            }
            Action::TakeOver { generation } => self.take_over(generation),
            Action::Stop(outcome) => self.end = Some(End::Ended(outcome)),
            Action::StartSync
            | Action::Capture { .. }
            | Action::Commit { .. }
            | Action::GoAlone
            | Action::Detach
            | Action::Mute(_)
            | Action::SyncRound
            | Action::Throttle { .. }
            | Action::Lease { .. } => {}
        }
    }

    fn order(&mut self, command: StageCommand) {
        if let Some(stage) = &self.stage
            && !stage.give(command)
        {
            tracing::error!("the checkpoint thread has ended");
        }
    }

    fn stop_svm(&mut self) -> Result<(), ReplicaError> {
        let machine = &self.replica.machine;
        machine.pause_vcpus()?;
        // What it may have run into until now belongs to the state that the commit replaces.
        self.note_svm_end();
        let machine = &self.replica.machine;
        // What is under way between the shards arrives first (rule 4).
        machine.quiesce_workers()?;
        self.on_role(|role, edge| role.stop(edge));
        self.replica.machine.resume_workers()?;
        self.replica.machine.take_dirty(&mut self.dirty)?;
        Ok(())
    }

    /// Whether the SVM has come to an end that is news.
    fn note_svm_end(&mut self) -> bool {
        let mut is_news = false;
        while let Some(exit) = self.replica.guest.svm_ended() {
            tracing::warn!("the SVM stopped ({exit}); only a checkpoint lets it go on");
            is_news = true;
        }
        is_news
    }

    fn resume_unchanged(&mut self) {
        self.on_role(|role, _| role.resume_unchanged());
        if let Err(e) = self.replica.machine.resume_vcpus() {
            tracing::error!("the SVM does not resume: {e}");
        }
    }

    fn take_over(&mut self, generation: u64) {
        self.path_epoch = self.promote().unwrap_or_else(|| {
            tracing::error!("a packet worker has ended; the guest is cut off");
            1
        });
        if let Err(e) = self.replica.machine.set_dirty_logging(false) {
            tracing::warn!("dirty logging stays on, the guest runs slower than it could: {e}");
        }
        tracing::warn!("took over: this host runs the VM now, generation {generation}");
        let record = Record {
            generation,
            holder: self.replica.host.clone(),
            standing: colo_control::Standing::Alone,
        };
        self.end = Some(End::TookOver(record));
    }

    /// Puts all workers into the role of the primary. Gives the epoch that they are in.
    fn promote(&self) -> Option<u64> {
        let workers = self.replica.machine.workers();
        let config = Arc::new(self.replica.primary_role());
        let post = self.pair_post.clone();
        if workers.len() > 1 {
            SecondaryRole::on_workers(workers, SecondaryRole::hear_rest)?;
        }
        let roles = SecondaryRole::on_workers(workers, move |role, edge| {
            role.take_over(edge, &config, post.clone())
        })?;
        for (worker, role) in workers.iter().zip(roles) {
            worker.set_role(role?).ok()?;
        }
        // Each shard has counted the input that it had.
        let epoch = PrimaryRole::begin_in_one_epoch(workers)?;
        PrimaryRole::on_workers(workers, |role, edge| role.speak(edge))?;
        Some(epoch)
    }

    fn on_role(&self, task: impl Fn(&mut SecondaryRole, &mut Edge) + Clone + Send + 'static) {
        if SecondaryRole::on_workers(self.replica.machine.workers(), task).is_none() {
            tracing::error!("a packet worker has ended or is in another role");
        }
    }

    /// Says something that the peer needs to hear once.
    fn on_first_role(&self, task: impl FnOnce(&mut SecondaryRole) + Send + 'static) {
        let first = self.replica.machine.workers().first();
        let done = first.and_then(|w| SecondaryRole::on_worker(w, |role, _| task(role)));
        if done.is_none() {
            tracing::error!("the packet worker has ended or is in another role");
        }
    }

    fn status(&self) -> Option<PairStatus> {
        let workers = self.replica.machine.workers();
        let reports = SecondaryRole::on_workers(workers, |role, _| role.report())?;
        let report = SecondaryReport::sum(reports)?;
        Some(PairStatus::of_secondary(
            self.standing(),
            &report,
            &self.times,
        ))
    }

    fn standing(&self) -> Standing {
        let state = match self.core.state() {
            SecondaryState::Joining => "joining",
            SecondaryState::Syncing => "syncing",
            SecondaryState::Standby => "standby",
            SecondaryState::TakingOver | SecondaryState::TookOver => "taking over",
            SecondaryState::Ended => "stopping",
        };
        Standing {
            role: "secondary",
            state,
            protected: self.core.state() == SecondaryState::Standby,
            dirty_logging: self.replica.machine.logs_dirty_pages(),
            dirty_log: Some(self.replica.machine.dirty_stats()),
            unhurried_pauses: self.replica.machine.unhurried_pauses(),
            page_streams: self.pages_end.len(),
            streams_reopened: self.pages_again.reopened(),
            generation: self.core.generation(),
            epoch: self.applied_epoch + 1,
            mode: mode_name(match self.core.is_halted() {
                true => Mode::Remus,
                false => Mode::Colo,
            }),
            ..Standing::default()
        }
        .counted(self.core.counters())
    }
}
