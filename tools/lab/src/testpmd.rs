//! DPDK's `dpdk-testpmd`: a program that drives vhost-user sockets as a guest does, or serves them.
//!
//! Invariants: it touches no device of this machine and leaves no file behind; it dies with its
//! [`Testpmd`]; reserved huge pages are given back.
//!
//! Does not know what is at the other end of a socket.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::process::{Process, ProcessError};

/// The program, of the Debian package `dpdk-dev`.
pub const PROGRAM: &str = "dpdk-testpmd";

const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
/// How often its output is looked at.
const POLL: Duration = Duration::from_millis(20);

/// Which end of the sockets it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The driver: a guest.
    Driver,
    /// The device: what serves guests.
    Device,
}

/// How to run it.
#[derive(Clone, Debug)]
pub struct TestpmdOptions {
    /// Name of the process and prefix of its shared names; unique on this machine.
    pub name: String,
    /// Which end it is.
    pub end: End,
    /// One port a socket.
    pub sockets: Vec<PathBuf>,
    /// `txonly`, `rxonly`, `io`, ...
    pub mode: &'static str,
    /// Length of the frames of `txonly`.
    pub frame_bytes: usize,
    /// CPU of the main thread and of the one that forwards.
    pub cpus: [usize; 2],
    /// Whether memory is of 2 MiB pages.
    pub huge_pages: bool,
    /// More device arguments of every driver port: `mac=...`.
    pub device_arguments: String,
}

/// A running testpmd.
#[derive(Debug)]
pub struct Testpmd {
    /// The process.
    pub process: Process,
}

/// What a port had done when it was stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortTotals {
    /// Frames received.
    pub rx_packets: u64,
    /// Frames sent.
    pub tx_packets: u64,
}

impl Testpmd {
    /// MiB of memory it is given.
    pub const MEMORY_MIB: usize = 128;

    /// Starts it; it forwards as soon as its ports are up.
    pub fn start(options: &TestpmdOptions, dir: &Path) -> Result<Self, ProcessError> {
        let mut command = Command::new(PROGRAM);
        let [main, forward] = options.cpus;
        let lcores = format!("0@{main},1@{forward}");
        // Where it puts its runtime files if it has any.
        command.env("RUNTIME_DIRECTORY", dir);
        command.args(["--lcores", &lcores, "--no-pci"]);
        command.args(["--file-prefix", &options.name]);
        command.args(["-m", &Self::MEMORY_MIB.to_string()]);
        match options.huge_pages {
            true => command.args(["--in-memory", "--single-file-segments"]),
            false => command.arg("--no-huge"),
        };
        for (index, socket) in options.sockets.iter().enumerate() {
            command.args(["--vdev", &options.device(index, socket)]);
        }
        command.args([
            "--",
            "--nb-cores=1",
            "--stats-period=1",
            "--total-num-mbufs=8192",
        ]);
        command.arg(format!("--forward-mode={}", options.mode));
        if options.mode == "txonly" {
            command.arg(format!("--txpkts={}", options.frame_bytes));
            // Ports with one address of their own send the same.
            for port in 0..options.sockets.len() {
                command.arg(format!("--eth-peer={port},02:00:00:00:00:00"));
            }
        }
        let process = Process::spawn(&options.name, command, dir)?;
        Ok(Self { process })
    }

    /// Waits until it forwards.
    pub fn wait_forwarding(&mut self, patience: Duration) -> Result<(), ProcessError> {
        self.wait(patience, |log| log.contains("Port statistics"))
    }

    /// Frames a second that its ports received, port after port in each second that it has shown.
    pub fn rx_rates(&self) -> Vec<f64> {
        rates(&self.process.log())
    }

    /// Waits until there are so many of them.
    pub fn wait_rx_rates(
        &mut self,
        count: usize,
        patience: Duration,
    ) -> Result<Vec<f64>, ProcessError> {
        let mut found = Vec::new();
        self.wait(patience, |log| {
            found = rates(log);
            found.len() >= count
        })?;
        Ok(found)
    }

    fn wait(
        &mut self,
        patience: Duration,
        mut is_there: impl FnMut(&str) -> bool,
    ) -> Result<(), ProcessError> {
        let deadline = Instant::now() + patience;
        while !is_there(&self.process.log()) {
            if let Some(status) = self.process.poll_exit()? {
                return Err(self.process.ended(status, "forwarding"));
            }
            if Instant::now() >= deadline {
                return self.process.wait_exit(Duration::ZERO).map(drop);
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Asks it to stop and gives what each port has done.
    pub fn stop(mut self, patience: Duration) -> Result<Vec<PortTotals>, ProcessError> {
        self.process.terminate()?;
        self.process.wait_exit(patience)?;
        Ok(totals(&self.process.log()))
    }
}

impl TestpmdOptions {
    fn device(&self, index: usize, socket: &Path) -> String {
        let socket = socket.display();
        match self.end {
            End::Driver => {
                let more = match self.device_arguments.as_str() {
                    "" => String::new(),
                    more => format!(",{more}"),
                };
                format!("net_virtio_user{index},path={socket},queues=1,queue_size=256{more}")
            }
            End::Device => format!("net_vhost{index},iface={socket},queues=1"),
        }
    }
}

/// The totals of every port, in order, from the output of a testpmd that was stopped.
fn totals(log: &str) -> Vec<PortTotals> {
    let mut all = Vec::new();
    let sections = log.split("Forward statistics for port").skip(1);
    for section in sections {
        let number = |name: &str| {
            let after = section.split_once(name)?.1;
            after.split_whitespace().next()?.parse().ok()
        };
        all.push(PortTotals {
            rx_packets: number("RX-packets:").unwrap_or(0),
            tx_packets: number("TX-packets:").unwrap_or(0),
        });
    }
    all
}

fn rates(log: &str) -> Vec<f64> {
    let number = |after: &str| after.split_whitespace().next()?.parse().ok();
    log.split("Rx-pps:").skip(1).filter_map(number).collect()
}

/// Huge pages that were reserved for somebody; given back when dropped.
#[derive(Debug)]
pub struct HugePages {
    count: u64,
}

impl HugePages {
    /// Reserves pages for `mib` MiB in addition to those that there are. An error when the machine
    /// has not enough contiguous memory.
    pub fn reserve(mib: usize) -> io::Result<Self> {
        let wanted = mib.div_ceil(2) as u64;
        let before = reserved()?;
        fs::write(HUGE_PAGES, (before + wanted).to_string())?;
        let count = reserved()?.saturating_sub(before);
        let pages = Self { count };
        if count < wanted {
            let text = format!("only {count} of {wanted} pages of 2 MiB can be reserved");
            return Err(io::Error::other(text));
        }
        Ok(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Ok(now) = reserved() {
            // Nothing can be done about a failure here.
            let _ = fs::write(HUGE_PAGES, now.saturating_sub(self.count).to_string());
        }
    }
}

fn reserved() -> io::Result<u64> {
    let text = fs::read_to_string(HUGE_PAGES)?;
    text.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_those_of_each_port() {
        let log = "
  ---------------------- Forward statistics for port 0  ----------------------
  RX-packets: 7              RX-dropped: 0             RX-total: 7
  TX-packets: 1838528        TX-dropped: 19     TX-total: 199958368
  ---------------------- Forward statistics for port 1  ----------------------
  RX-packets: 0              RX-dropped: 0             RX-total: 0
  TX-packets: 5        TX-dropped: 198119840     TX-total: 199958368
  +++++++++++++++ Accumulated forward statistics for all ports+++++++++++++++
  RX-packets: 7              RX-dropped: 0             RX-total: 0
";
        let port = |rx_packets, tx_packets| PortTotals {
            rx_packets,
            tx_packets,
        };
        assert_eq!(totals(log), [port(7, 1_838_528), port(0, 5)]);
        assert_eq!(totals("EAL: no"), []);
        assert_eq!(rates("Rx-pps:   12   Rx-bps: 3\n  Rx-pps: 5 "), [12.0, 5.0]);
    }
}
