//! The numbers of a run: what the primary's status said, and the JSON file.
//!
//! Invariants: a missing field counts as 0, so an incomplete status fails the verdict instead of the parser;
//! the JSON keys are fixed (a test names them).

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::outcome::Outcome;

/// Percentiles as a status document gives them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Spread {
    pub(super) p50: u64,
    pub(super) p99: u64,
    pub(super) max: u64,
}

/// What the primary counted.
#[derive(Debug, Clone, Default)]
pub(super) struct Figures {
    pub(super) compared: u64,
    pub(super) released_by_match: u64,
    pub(super) released_by_checkpoint: u64,
    pub(super) data_by_match: u64,
    pub(super) data_by_checkpoint: u64,
    pub(super) divergences: BTreeMap<String, u64>,
    pub(super) checkpoints: u64,
    pub(super) pause_us: Spread,
    pub(super) stolen_us: Spread,
    pub(super) commit_us: Spread,
    pub(super) hold_us: Spread,
    pub(super) dirty_pages: Spread,
    pub(super) link_bytes: u64,
    pub(super) protected: bool,
}

impl Figures {
    pub(super) fn from_status(status: &Value) -> Self {
        let number = |key: &str| status[key].as_u64().unwrap_or(0);
        let spread = |key: &str| {
            let part = |name: &str| status[key][name].as_u64().unwrap_or(0);
            Spread {
                p50: part("p50"),
                p99: part("p99"),
                max: part("max"),
            }
        };
        let causes = status["divergences"].as_object().into_iter().flatten();
        Self {
            compared: number("compared"),
            released_by_match: number("released_by_match"),
            released_by_checkpoint: number("released_by_checkpoint"),
            data_by_match: number("released_data_by_match"),
            data_by_checkpoint: number("released_data_by_checkpoint"),
            divergences: causes
                .filter_map(|(cause, count)| Some((cause.clone(), count.as_u64()?)))
                .filter(|(_, count)| *count > 0)
                .collect(),
            checkpoints: number("checkpoints"),
            pause_us: spread("checkpoint_pause_us"),
            stolen_us: spread("stolen_us"),
            commit_us: spread("commit_us"),
            hold_us: spread("hold_us"),
            dirty_pages: spread("dirty_pages"),
            link_bytes: number("link_bytes"),
            protected: status["protected"] == true,
        }
    }

    pub(super) fn divergence_count(&self) -> u64 {
        self.divergences.values().sum()
    }
}

#[derive(Serialize)]
struct Document {
    requests: u64,
    responses: u64,
    client_errors: u64,
    wrong_responses: u64,
    compared: u64,
    released_by_match: u64,
    released_by_checkpoint: u64,
    divergences: u64,
    checkpoints: u64,
    checkpoint_pause_us: Spread,
    stolen_us: Spread,
    commit_us: Spread,
    hold_us: Spread,
    failover: Option<Failover>,
    latency_us: Percentiles,
}

#[derive(Serialize)]
struct Failover {
    outage_ms: Option<f64>,
    connections_before: usize,
    connections_lost: usize,
}

#[derive(Serialize)]
struct Percentiles {
    p50: u64,
    p99: u64,
    p999: u64,
}

/// The text of the `--json` file. `failover` is null when nothing was killed.
pub(super) fn json(outcome: &Outcome) -> String {
    let (load, figures) = (&outcome.load, &outcome.figures);
    let failover = load.survival.map(|survival| Failover {
        outage_ms: outcome.outage_ms(),
        connections_before: survival.connections_before,
        connections_lost: survival.connections_lost,
    });
    let latency = load.latency_us;
    let document = Document {
        requests: load.requests,
        responses: load.responses,
        client_errors: load.client_errors,
        wrong_responses: load.wrong_responses,
        compared: figures.compared,
        released_by_match: figures.released_by_match,
        released_by_checkpoint: figures.released_by_checkpoint,
        divergences: figures.divergence_count(),
        checkpoints: figures.checkpoints,
        checkpoint_pause_us: figures.pause_us,
        stolen_us: figures.stolen_us,
        commit_us: figures.commit_us,
        hold_us: figures.hold_us,
        failover,
        latency_us: Percentiles {
            p50: latency.p50,
            p99: latency.p99,
            p999: latency.p999,
        },
    };
    let mut text = serde_json::to_string_pretty(&document).unwrap_or_default();
    text.push('\n');
    text
}
