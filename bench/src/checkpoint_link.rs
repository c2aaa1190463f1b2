//! Bare streams over the link of a pair, by iperf3 and by io_uring: what the transfer of checkpoints is measured against.
//!
//! Invariant: they run between the hosts' namespaces, over the addresses of the link, one after the other, while no
//! guest runs, or the guests are idle.
//!
//! Does not use more than one TCP connection at a time, as checkpoints do unless told otherwise.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use colo_lab::process::Process;
use colo_lab::topology::{Host, Topology};
use serde_json::Value;

use crate::figures::Range;
use crate::place::BenchError;
use crate::transfer::{self, Way};

const PORT: &str = "7655";
const SECONDS: &str = "2";
const RUN_MAX: Duration = Duration::from_secs(30);
/// Attempts to reach a server that is starting.
const ATTEMPTS: u32 = 50;
/// What each way of io_uring sends, and how often; its median counts.
const URING_BYTES: u64 = 256 << 20;
const URING_ROUNDS: u32 = 3;
/// Bursts of as many bytes as a checkpoint has, how many of them, and how long the connection rests before each.
const BURSTS_BYTES: usize = 1 << 30;
const BURSTS: (usize, usize) = (3, 24);
const BURST_REST: Duration = Duration::from_millis(50);

/// Payload bytes a second of one TCP connection from the primary's host to the secondary's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawLink {
    pub(crate) iperf3_bytes_per_s: f64,
    /// Of the way of io_uring that serves this link best.
    pub(crate) uring_bytes_per_s: f64,
    pub(crate) uring_way: Way,
    /// Of io_uring that sends as much as a checkpoint, after a rest.
    pub(crate) burst_bytes_per_s: f64,
}

impl RawLink {
    /// All of them, for checkpoints of so many bytes.
    pub(crate) fn measure(
        topology: &Topology,
        dir: &Path,
        burst_bytes: usize,
    ) -> Result<Self, BenchError> {
        let iperf3_bytes_per_s = iperf3(topology, dir)?;
        let (uring_bytes_per_s, uring_way) = uring(topology)?;
        let bursts = (BURSTS_BYTES / burst_bytes.max(1)).clamp(BURSTS.0, BURSTS.1) as u32;
        let ends = connection(topology)?;
        let burst = transfer::burst_bytes_per_s(ends, burst_bytes, bursts, BURST_REST)?;
        Ok(Self {
            iperf3_bytes_per_s,
            uring_bytes_per_s,
            uring_way,
            burst_bytes_per_s: burst,
        })
    }

    /// The better of both streams.
    pub(crate) fn best_bytes_per_s(&self) -> f64 {
        self.iperf3_bytes_per_s.max(self.uring_bytes_per_s)
    }
}

fn uring(topology: &Topology) -> Result<(f64, Way), BenchError> {
    let mut rates = Way::BARE_URING.map(|way| (Vec::new(), way));
    for _ in 0..URING_ROUNDS {
        for (rates, way) in &mut rates {
            let ends = connection(topology)?;
            rates.push(transfer::bytes_per_s(*way, ends, URING_BYTES)?);
        }
    }
    let medians = rates.map(|(rates, way)| (Range::of(rates).median, way));
    Ok(best(medians))
}

fn best(rates: [(f64, Way); Way::BARE_URING.len()]) -> (f64, Way) {
    let first = rates[0];
    let faster = |best: (f64, Way), rate: (f64, Way)| if rate.0 > best.0 { rate } else { best };
    rates.into_iter().fold(first, faster)
}

/// The secondary's end of a connection over the link, and the primary's.
fn connection(topology: &Topology) -> Result<(TcpStream, TcpStream), BenchError> {
    let failed = || BenchError::io("connect over the link");
    let address = Host::B.link_address();
    let listen = || TcpListener::bind((address, 0));
    let listener = topology.host(Host::B).run(listen)?.map_err(failed())?;
    let port = listener.local_addr().map_err(failed())?.port();
    let connect = || TcpStream::connect((address, port));
    let far = topology.host(Host::A).run(connect)?.map_err(failed())?;
    let (near, _) = listener.accept().map_err(failed())?;
    Ok((near, far))
}

fn iperf3(topology: &Topology, dir: &Path) -> Result<f64, BenchError> {
    let mut server = topology.host(Host::B).command("iperf3");
    server.args(["-s", "-1", "-p", PORT]);
    let _server = Process::spawn("iperf3-server", server, dir)?;
    let mut output = String::new();
    for _ in 0..ATTEMPTS {
        let mut client = topology.host(Host::A).command("iperf3");
        let address = Host::B.link_address();
        client.args(["-c", address, "-p", PORT, "-t", SECONDS, "--json"]);
        let mut client = Process::spawn("iperf3", client, dir)?;
        client.wait_exit(RUN_MAX)?;
        output = client.log();
        if let Some(rate) = received(&output) {
            return Ok(rate);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(BenchError::Unreadable {
        program: "iperf3",
        what: "rate",
        output,
    })
}

fn received(report: &str) -> Option<f64> {
    let report: Value = serde_json::from_str(report).ok()?;
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64()?;
    (bits > 0.0).then_some(bits / 8.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_what_arrived() {
        let report = r#"{"end": {"sum_sent": {"bits_per_second": 9e9}, "sum_received": {"bits_per_second": 8e9}}}"#;
        assert_eq!(received(report), Some(1e9));
        assert_eq!(received(r#"{"error": "unable to connect"}"#), None);
        assert_eq!(received(""), None);
    }

    #[test]
    fn the_better_stream_counts() {
        for (iperf3_bytes_per_s, uring_bytes_per_s) in [(2e9, 3e9), (3e9, 2e9)] {
            let link = RawLink {
                iperf3_bytes_per_s,
                uring_bytes_per_s,
                uring_way: Way::UringDeep,
                burst_bytes_per_s: 4e9,
            };
            assert_eq!(link.best_bytes_per_s(), 3e9);
        }
        let mut rates = Way::BARE_URING.map(|way| (1e9, way));
        rates[3].0 = 2e9;
        assert_eq!(best(rates), (2e9, Way::BARE_URING[3]));
    }
}
