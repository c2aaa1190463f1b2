//! What the primary's core orders: carried out, in its order.
//!
//! Does not wait for the peer, and decides nothing.

use std::io;

use colo_control::{Action, Msg, Notice, PrimaryEvent, PrimaryState, Step};
use colo_fastpath::clock::now_us;
use colo_fastpath::link::PacketLink;
use colo_fastpath::pair::{OnWorkers, PrimaryRole};
use colo_fastpath::worker::Edge;

use super::PrimaryShell;
use crate::checkpoint::capture::CaptureCommand;
use crate::replication::host::{page_key, unix_seconds};
use crate::testpoint::{Point, reached};

/// How often the log tells how fast the guest may run; the status does always.
const PACE_TOLD_EVERY_US: u64 = 1_000_000;

impl PrimaryShell {
    pub(super) fn perform(&mut self) {
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
                // What was asked for while the SVM stopped is covered by this one.
                self.asked = self.asked.or(self.cause.take());
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
                self.cause = self.asked.take().or(self.cause);
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
        if let Notice::StepTimedOut {
            step: Step::Send | Step::Begin | Step::Commit,
            ..
        } = notice
            && let Some(link) = &self.link
        {
            // What was sent may be stuck in the streams, and the next checkpoint would be stuck behind it.
            link.shut_pages();
        }
        if let Notice::GivenUp { reason } = &notice {
            self.given_up.clone_from(reason);
        }
        if let Notice::CannotFollow { reason }
        | Notice::Refused { reason }
        | Notice::GivenUp { reason } = notice
        {
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
    pub(super) fn hold_full(&mut self, is_full: bool) {
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
            self.asked = self.cause.take();
            self.times.begun(*epoch, self.asked.unwrap_or("periodic"));
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
        (self.cause, self.asked) = (None, None);
        (self.times.sync_rounds, self.times.sync_pages) = (0, 0);
        self.opener.ask(packets);
    }

    /// The packet channels are open, and pages may follow.
    pub(super) fn sync_over(&mut self, links: io::Result<Vec<PacketLink>>) {
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
        let version = self.core.peer_version();
        match page_key() {
            Ok(key) => self.order(CaptureCommand::Sync {
                streams,
                generation,
                key,
                session,
                ahead_mib,
                version,
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

    pub(super) fn order(&self, command: CaptureCommand) {
        if self.capture.send(command).is_err() {
            tracing::error!("the checkpoint thread has ended");
        }
    }

    pub(super) fn end_lease(&self) {
        let (workers, lease) = (self.replica.machine.workers(), &self.replica.lease);
        told(PrimaryRole::end_lease(workers, lease));
    }

    pub(super) fn on_role(
        &self,
        task: impl Fn(&mut PrimaryRole, &mut Edge) + Clone + Send + 'static,
    ) {
        told(PrimaryRole::on_workers(
            self.replica.machine.workers(),
            task,
        ));
    }
}

/// Complains if not all workers were there.
fn told<T>(answers: Option<T>) {
    if answers.is_none() {
        tracing::error!("a packet worker has ended or is in another role");
    }
}
