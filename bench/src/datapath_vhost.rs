//! `datapath --kind virtqueues`: one dpdk-testpmd with two virtio-user ports, a PVM and an SVM that send the
//! same flow from one core. On the other core one polling thread takes both, compares them and releases
//! what is equal; in its place, for the baseline, DPDK's own vhost takes both ports and drops the packets.
//!
//! Invariants: the rounds take turns, ours and DPDK's; a figure is given only when every pair was released by
//! match and no checkpoint was asked for; reserved huge pages are given back.

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

use crate::figures::{Range, table};
use crate::place::{BenchError, Place};

/// How long a round is measured.
const ROUND: Duration = Duration::from_secs(3);
/// Seconds of DPDK's own statistics.
const PEER_PERIODS: usize = 3;
/// Longest wait for a testpmd.
const PATIENCE: Duration = Duration::from_secs(60);
/// The core of who takes, and of who sends.
const CPUS: [usize; 2] = [0, 1];
const FRAME_SLOTS: u32 = 8192;

/// The result of one frame length.
#[derive(Debug, Clone, Serialize)]
struct Row {
    kind: &'static str,
    /// Bytes of a frame, Ethernet header included.
    payload: u16,
    /// With which bytes frames leave.
    tx: TxMode,
    /// Pairs that were compared and released.
    pairs_per_s: f64,
    /// Packets of both ports together that DPDK took.
    peer_packets_per_s: f64,
    ratio: f64,
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
    rounds: usize,
) -> Result<VhostOutcome, BenchError> {
    // Two testpmds at most at a time, and something for the pages that each cannot fill.
    let _pages = HugePages::reserve(3 * Testpmd::MEMORY_MIB)
        .map_err(BenchError::io("reserve huge pages"))?;
    let mut rows = Vec::new();
    for &payload in lengths {
        // Short frames are copied in any case.
        let modes = match usize::from(payload) < IN_PLACE_MIN {
            true => &[TxMode::Twin][..],
            false => &[TxMode::Twin, TxMode::InPlace, TxMode::Exact],
        };
        let (mut ours, mut peer) = (vec![Vec::new(); modes.len()], Vec::new());
        for _ in 0..rounds {
            for (ours, &tx) in ours.iter_mut().zip(modes) {
                ours.push(pairs(place, payload, tx)?);
            }
            peer.push(peer_packets(place, payload)?);
        }
        let peer_packets_per_s = Range::of(peer).median;
        for (ours, &tx) in ours.into_iter().zip(modes) {
            let pairs_per_s = Range::of(ours).median;
            rows.push(Row {
                kind: "virtqueues",
                payload,
                tx,
                pairs_per_s,
                peer_packets_per_s,
                ratio: pairs_per_s / peer_packets_per_s,
            });
        }
    }
    Ok(VhostOutcome {
        text: text(&rows),
        rows: rows.iter().map(|row| json!(row)).collect(),
    })
}

fn text(rows: &[Row]) -> String {
    let heads = [
        "kind",
        "payload",
        "tx",
        "pairs/s",
        "DPDK packets/s",
        "ratio",
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
