//! `datapath --kind virtqueues`: one dpdk-testpmd with two virtio-user ports, a PVM and an SVM that send the
//! same flow from one core. On the other core one polling thread takes both, compares them and releases
//! what is equal; in its place, for the baseline, DPDK's own vhost takes both ports and drops the packets.
//!
//! Invariants: a round is ours and DPDK's, one right after the other, and the ratio is the median of the rounds' own; a
//! round in which the distance of the two cores changed ([`round_trip_ns`]) is measured again, and counted; a figure is
//! given only when every pair was released by match and no checkpoint was asked for; reserved huge pages are given back.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use colo_compare::Limits;
use colo_fastpath::frame::{IN_PLACE_MIN, TxMode};
use colo_fastpath::net_offer::NetOffer;
use colo_fastpath::nic::Sink;
use colo_fastpath::pair::{LocalPairRole, LocalReport, SvmSide};
use colo_fastpath::vhost_user::VhostUserServer;
use colo_fastpath::worker::{PollMode, WorkerConfig, WorkerHandle, spawn_unattached};
use colo_lab::testpmd::{End, HugePages, Testpmd, TestpmdOptions};
use serde::Serialize;
use serde_json::{Value, json};

use crate::datapath_apart::round_trip_ns;
use crate::figures::{Range, table};
use crate::place::{BenchError, Place};

/// How long ours is measured in a round.
const ROUND: Duration = Duration::from_secs(2);
/// Seconds of DPDK's own statistics.
const PEER_PERIODS: usize = 2;
/// The distance of the cores has changed when it is so many times what it was.
const MOVED: f64 = 1.5;
/// For each round that is asked for, so many are tried.
const TRIES: usize = 3;
/// Longest wait for a testpmd.
const PATIENCE: Duration = Duration::from_secs(60);
/// The core of who takes, and of who sends.
const CPUS: [usize; 2] = [0, 1];
const FRAME_SLOTS: u32 = 8192;

/// One measurement of each, in turn.
#[derive(Debug, Clone, Copy, Serialize)]
struct Round {
    /// Pairs that were compared and released.
    pairs_per_s: f64,
    /// Packets of both ports together that DPDK took.
    peer_packets_per_s: f64,
    /// Between the two cores: before, between and after the two measurements.
    round_trip_ns: [f64; 3],
}

impl Round {
    fn ratio(&self) -> f64 {
        self.pairs_per_s / self.peer_packets_per_s
    }

    /// Whether the machine was another one at its end.
    fn has_moved(&self) -> bool {
        let trips = Range::of(self.round_trip_ns);
        trips.max > MOVED * trips.min
    }
}

/// The result of one frame length.
#[derive(Debug, Clone, Serialize)]
struct Row {
    kind: &'static str,
    /// Bytes of a frame, Ethernet header included.
    payload: u16,
    /// With which bytes frames leave.
    tx: TxMode,
    pairs_per_s: f64,
    peer_packets_per_s: f64,
    ratio: f64,
    ratio_min: f64,
    ratio_max: f64,
    round_trip_ns: f64,
    /// Rounds that do not count, because the cores' distance changed in them.
    moved_rounds: usize,
    rounds: Vec<Round>,
}

impl Row {
    fn of(payload: u16, tx: TxMode, rounds: Vec<Round>, moved_rounds: usize) -> Self {
        let range = |value: fn(&Round) -> f64| Range::of(rounds.iter().map(value));
        let ratio = range(Round::ratio);
        Self {
            kind: "virtqueues",
            payload,
            tx,
            pairs_per_s: range(|round| round.pairs_per_s).median,
            peer_packets_per_s: range(|round| round.peer_packets_per_s).median,
            ratio: ratio.median,
            ratio_min: ratio.min,
            ratio_max: ratio.max,
            round_trip_ns: range(|round| Range::of(round.round_trip_ns).median).median,
            moved_rounds,
            rounds,
        }
    }
}

/// For people and for programs.
pub(crate) struct VhostOutcome {
    pub(crate) text: String,
    pub(crate) rows: Vec<Value>,
}

/// Measures every length.
pub(crate) fn run(
    place: &Place,
    lengths: &[u16],
    wanted: &[TxMode],
    rounds: usize,
) -> Result<VhostOutcome, BenchError> {
    // Two testpmds at most at a time, and something for the pages that each cannot fill.
    let _pages = HugePages::reserve(3 * Testpmd::MEMORY_MIB)
        .map_err(BenchError::io("reserve huge pages"))?;
    let mut rows = Vec::new();
    for &payload in lengths {
        for tx in modes(payload, wanted) {
            rows.push(row(place, payload, tx, rounds)?);
        }
    }
    Ok(VhostOutcome {
        text: text(&rows),
        rows: rows.iter().map(|row| json!(row)).collect(),
    })
}

/// What there is to measure of one length.
fn modes(payload: u16, wanted: &[TxMode]) -> Vec<TxMode> {
    // Short frames are copied in any case.
    let all = match usize::from(payload) < IN_PLACE_MIN {
        true => &[TxMode::Twin][..],
        false => &[TxMode::Twin, TxMode::InPlace, TxMode::Exact],
    };
    let asked = |tx: &TxMode| wanted.is_empty() || wanted.contains(tx);
    all.iter().copied().filter(asked).collect()
}

fn row(place: &Place, payload: u16, tx: TxMode, rounds: usize) -> Result<Row, BenchError> {
    let (mut still, mut moved) = (Vec::new(), Vec::new());
    while still.len() < rounds && still.len() + moved.len() < TRIES * rounds {
        let apart = || round_trip_ns(CPUS).map_err(BenchError::io("measure the cores"));
        let before = apart()?;
        let pairs_per_s = pairs(place, payload, tx)?;
        let between = apart()?;
        let peer_packets_per_s = peer_packets(place, payload)?;
        let round = Round {
            pairs_per_s,
            peer_packets_per_s,
            round_trip_ns: [before, between, apart()?],
        };
        match round.has_moved() {
            true => moved.push(round),
            false => still.push(round),
        }
    }
    // If the machine never stood still, these are what there is.
    let moved_rounds = moved.len();
    let counted = if still.is_empty() { moved } else { still };
    Ok(Row::of(payload, tx, counted, moved_rounds))
}

fn text(rows: &[Row]) -> String {
    let heads = [
        "kind",
        "payload",
        "tx",
        "pairs/s",
        "DPDK packets/s",
        "ratio",
        "min..max",
        "cores apart ns",
        "moved",
    ];
    let mut lines = vec![heads.map(str::to_owned).to_vec()];
    for row in rows {
        lines.push(vec![
            row.kind.to_owned(),
            row.payload.to_string(),
            match row.tx {
                TxMode::InPlace => "in-place",
                TxMode::Exact => "exact",
                TxMode::Twin => "twin",
            }
            .to_owned(),
            format!("{:.0}", row.pairs_per_s),
            format!("{:.0}", row.peer_packets_per_s),
            format!("{:.3}", row.ratio),
            format!("{:.2}..{:.2}", row.ratio_min, row.ratio_max),
            format!("{:.0}", row.round_trip_ns),
            row.moved_rounds.to_string(),
        ]);
    }
    table(&lines)
}

/// Ends the worker also when something fails.
struct Stopping(WorkerHandle);

impl Drop for Stopping {
    fn drop(&mut self) {
        self.0.stop();
    }
}

fn pairs(place: &Place, payload: u16, tx: TxMode) -> Result<f64, BenchError> {
    let dir = place.scratch()?;
    let sockets = sockets(dir.path());
    let failed = |e: &dyn std::fmt::Display| BenchError::Failed(e.to_string());
    let config = WorkerConfig {
        name: "worker".into(),
        poll: PollMode::Busy,
        cpu: Some(CPUS[0]),
        frame_slots: FRAME_SLOTS,
        tx,
        stages: false,
    };
    let worker = spawn_unattached(config, Box::new(Sink::new(1500)))
        .map_err(BenchError::io("start a worker"))?;
    let worker = Stopping(worker);
    // A sender that loses its core for a while is no divergence.
    let limits = Limits {
        compare_deadline_us: 2_000_000,
        extra_deadline_us: 2_000_000,
        ..Limits::default()
    };
    let role = LocalPairRole::new(limits);
    role.start(&worker.0).map_err(|e| failed(&e))?;
    let offer = NetOffer::new([0x52, 0x54, 0, 0xc0, 0x10, 1], 1500);
    let [pvm, svm] = &sockets;
    let pvm = VhostUserServer::bind(pvm, worker.0.clone(), offer).map_err(|e| failed(&e))?;
    let svm = VhostUserServer::bind(svm, SvmSide(worker.0.clone()), offer);
    let svm = svm.map_err(|e| failed(&e))?;
    let mut sender = sender(&sockets, payload, dir.path())?;
    sender.wait_forwarding(PATIENCE)?;
    let gone = || BenchError::Failed("the worker is gone".to_owned());
    let report = || LocalPairRole::report(&worker.0).ok_or_else(gone);
    let (before, begun) = (report()?, Instant::now());
    thread::sleep(ROUND);
    let (after, took) = (report()?, begun.elapsed());
    sender.stop(PATIENCE)?;
    drop((pvm, svm));
    let matched = after.matched - before.matched;
    let clean = LocalReport {
        checkpoints: 0,
        otherwise: 0,
        ..after
    };
    if after != clean || matched == 0 {
        return Err(BenchError::Failed(format!("not all were pairs: {after:?}")));
    }
    Ok(matched as f64 / took.as_secs_f64())
}

/// What DPDK's vhost takes from both ports.
fn peer_packets(place: &Place, payload: u16) -> Result<f64, BenchError> {
    let dir = place.scratch()?;
    let sockets = sockets(dir.path());
    let options = TestpmdOptions {
        name: format!("colo-bench-device-{}", std::process::id()),
        end: End::Device,
        sockets: sockets.to_vec(),
        mode: "rxonly",
        frame_bytes: 0,
        cpus: [CPUS[1], CPUS[0]],
        huge_pages: true,
        device_arguments: String::new(),
    };
    let mut device = Testpmd::start(&options, dir.path())?;
    device.wait_forwarding(PATIENCE)?;
    let mut sender = sender(&sockets, payload, dir.path())?;
    sender.wait_forwarding(PATIENCE)?;
    let ports = sockets.len();
    let begun = device.rx_rates().len() / ports;
    // The period that runs already counts for nothing.
    let wanted = begun + 1 + PEER_PERIODS;
    let rates = device.wait_rx_rates(wanted * ports, PATIENCE)?;
    sender.stop(PATIENCE)?;
    device.stop(PATIENCE)?;
    let total: f64 = rates[(begun + 1) * ports..wanted * ports].iter().sum();
    Ok(total / PEER_PERIODS as f64)
}

fn sockets(dir: &Path) -> [PathBuf; 2] {
    ["pvm", "svm"].map(|name| dir.join(name))
}

fn sender(sockets: &[PathBuf; 2], payload: u16, dir: &Path) -> Result<Testpmd, BenchError> {
    let options = TestpmdOptions {
        name: format!("colo-bench-guests-{}", std::process::id()),
        end: End::Driver,
        sockets: sockets.to_vec(),
        mode: "txonly",
        frame_bytes: payload.into(),
        cpus: CPUS,
        huge_pages: true,
        // The same guest: the frames carry its address.
        device_arguments: "mac=52:54:00:c0:10:01".to_owned(),
    };
    Ok(Testpmd::start(&options, dir)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(pairs: f64, packets: f64, round_trip_ns: [f64; 3]) -> Round {
        Round {
            pairs_per_s: pairs,
            peer_packets_per_s: packets,
            round_trip_ns,
        }
    }

    #[test]
    fn the_ratio_is_the_median_of_the_rounds_own_and_not_that_of_the_medians() {
        let rounds = [(4.0, 10.0), (5.0, 9.0), (20.0, 40.0)];
        let rounds = rounds.map(|(pairs, packets)| round(pairs, packets, [1.0; 3]));
        let row = Row::of(1400, TxMode::InPlace, rounds.to_vec(), 2);
        assert_eq!((row.pairs_per_s, row.peer_packets_per_s), (5.0, 10.0));
        assert_eq!((row.ratio_min, row.ratio), (0.4, 0.5));
        assert_eq!(row.ratio_max, 5.0 / 9.0);
    }

    #[test]
    fn a_round_counts_only_when_the_cores_are_where_they_were() {
        for trips in [
            [600.0, 140.0, 140.0],
            [140.0, 600.0, 140.0],
            [140.0, 140.0, 600.0],
        ] {
            assert!(round(1.0, 1.0, trips).has_moved());
        }
        assert!(!round(1.0, 1.0, [600.0, 650.0, 560.0]).has_moved());
    }

    #[test]
    fn short_frames_have_one_way_to_leave() {
        assert_eq!(modes(64, &[]), [TxMode::Twin]);
        assert_eq!(modes(1400, &[TxMode::InPlace]), [TxMode::InPlace]);
        assert_eq!(modes(1400, &[]).len(), 3);
        assert!(modes(64, &[TxMode::InPlace]).is_empty());
    }
}
