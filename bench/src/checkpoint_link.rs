//! A bare stream over the link of a pair, by iperf3: what the transfer of checkpoints is measured against.
//!
//! Invariant: it runs between the hosts' namespaces, over the addresses of the link, while no guest runs.

use std::path::Path;
use std::time::Duration;

use colo_lab::process::Process;
use colo_lab::topology::{Host, Topology};
use serde_json::Value;

use crate::place::BenchError;

const PORT: &str = "7655";
const SECONDS: &str = "2";
const RUN_MAX: Duration = Duration::from_secs(30);
/// Attempts to reach a server that is starting.
const ATTEMPTS: u32 = 50;

/// Payload bytes a second of one TCP connection from the primary's host to the secondary's.
pub(crate) fn link_bytes_per_s(topology: &Topology, dir: &Path) -> Result<f64, BenchError> {
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
}
