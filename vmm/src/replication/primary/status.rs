//! What the primary tells about itself.

use colo_control::PrimaryState;
use colo_fastpath::clock::now_us;
use colo_fastpath::pair::{OnWorkers, PrimaryReport, PrimaryRole};

use super::PrimaryShell;
use crate::replication::report::{PairStatus, Standing, mode_name};

impl PrimaryShell {
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
            dirty_log: Some(self.replica.machine.dirty_stats()),
            unhurried_pauses: self.replica.machine.unhurried_pauses(),
            page_streams: self.link.as_ref().map_or(0, |link| link.pages_end.len()),
            streams_reopened: self.link.as_ref().map_or(0, |link| link.pages_opened),
            unprotected_reason: reason,
            unprotected_since: since,
            link_given_up_reason: self.given_up.clone(),
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

    pub(super) fn status(&self) -> Option<PairStatus> {
        let standing = self.standing();
        let workers = self.replica.machine.workers();
        let reports = PrimaryRole::on_workers(workers, |role, _| role.report())?;
        let report = PrimaryReport::sum(reports)?;
        Some(PairStatus::of_primary(standing, &report, &self.times))
    }
}
