//! What a run of the demo gave, and whether it was good.
//!
//! Invariant: every claim of the verdict is a number of the report.
//!
//! Does not measure.

use std::time::Duration;

use colo_lab::load::LoadReport;
use serde_json::Value;

use super::figures::Figures;
use super::numbers::grouped;

/// Everything a run gave.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) load: LoadReport,
    /// From the primary's last status.
    pub(super) figures: Figures,
    /// Last status of the host that serves at the end.
    pub(super) survivor: Value,
    /// The primary was killed.
    pub(super) failover: bool,
    /// Requests were made whose answers differ between the guests.
    pub(super) diverging: bool,
    /// From the kill to the survivor's word that it is alone.
    pub(super) takeover_ms: Option<f64>,
    pub(super) killed_at: Option<Duration>,
    /// Answers per sample.
    pub(super) samples: Vec<u64>,
    /// The first sample after the kill.
    pub(super) kill_sample: Option<usize>,
}

impl Outcome {
    /// Longest silence of the probe around the kill.
    pub(super) fn outage_ms(&self) -> Option<f64> {
        let outage_us = self.load.probe.as_ref()?.outage_us?;
        Some(outage_us as f64 / 1e3)
    }

    /// What was not as it must be; empty for a good run.
    pub(super) fn failures(&self) -> Vec<String> {
        let checks = self.checks();
        checks
            .into_iter()
            .filter(|check| !check.holds)
            .map(|check| check.failure)
            .collect()
    }

    /// All claims about a run.
    pub(super) fn checks(&self) -> Vec<Check> {
        let load = &self.load;
        let (asked, answered) = (load.requests, load.responses);
        let mut checks = vec![
            Check {
                holds: answered > 0 && asked == answered && load.client_errors == 0,
                success: format!("{} requests, each answered, no error", grouped(asked)),
                failure: format!(
                    "{} of {} requests were not answered; {} errors",
                    grouped(asked.saturating_sub(answered)),
                    grouped(asked),
                    grouped(load.client_errors)
                ),
            },
            Check {
                holds: load.wrong_responses == 0,
                success: format!(
                    "every answer right; {} acknowledged facts asked for again",
                    grouped(load.audited)
                ),
                failure: format!("{} answers were wrong", grouped(load.wrong_responses)),
            },
            Check {
                holds: self.figures.compared > 0,
                success: format!("{} packets compared", grouped(self.figures.compared)),
                failure: "no packet was compared".to_owned(),
            },
        ];
        checks.extend(self.divergence_check());
        checks.push(self.role_check());
        checks.extend(self.survival_check());
        checks
    }

    fn divergence_check(&self) -> Option<Check> {
        let count = self.figures.divergence_count();
        self.diverging.then(|| Check {
            holds: count > 0 && self.figures.checkpoints > 0,
            success: format!(
                "{} divergences, {} checkpoints",
                grouped(count),
                grouped(self.figures.checkpoints)
            ),
            failure: "the guests never differed, although the requests make them differ".to_owned(),
        })
    }

    fn role_check(&self) -> Check {
        if self.failover {
            return Check {
                holds: self.takeover_ms.is_some(),
                success: "the secondary took over".to_owned(),
                failure: "the secondary did not take over".to_owned(),
            };
        }
        Check {
            holds: self.figures.protected,
            success: "still protected at the end".to_owned(),
            failure: "no longer protected at the end".to_owned(),
        }
    }

    fn survival_check(&self) -> Option<Check> {
        let survival = self.load.survival?;
        let (before, lost) = (survival.connections_before, survival.connections_lost);
        Some(Check {
            holds: lost == 0 && before > 0,
            success: format!("{before} connections open at the kill, none lost"),
            failure: format!("{lost} of {before} connections open at the kill were lost"),
        })
    }
}

/// A claim about a run, in words for both cases.
pub(super) struct Check {
    pub(super) holds: bool,
    pub(super) success: String,
    pub(super) failure: String,
}
