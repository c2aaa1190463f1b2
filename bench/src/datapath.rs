//! `datapath`: what the packet path costs, beside its baselines.
//!
//! Invariants: a baseline is measured in the same run and in turn with what stands beside it; a figure
//! is the median of the rounds. The JSON document is the list of rows.

use std::time::Duration;

use clap::{Args, ValueEnum};
use colo_fastpath::frame::TxMode;
use serde_json::Value;

use crate::place::{BenchError, Outcome, Place};
use crate::{datapath_echo, datapath_forward, datapath_idle, datapath_latency, datapath_vhost};

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// A UDP echo through a guest: AF_XDP beside the same program on a TAP device
    Echo,
    /// One request at a time: a pair beside a guest that is not replicated
    Latency,
    /// CPU of a pair with nothing to do, beside a guest that is not replicated
    Idle,
    /// From one port to another through a driver's rings, beside AF_XDP rings alone
    Forward,
    /// Compared pairs of two guests' virtqueues, beside DPDK's vhost that only takes the packets
    Virtqueues,
}

/// How workers wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PollArg {
    Adaptive,
    Busy,
    Interrupt,
}

/// Which frames AF_XDP gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum XdpArg {
    /// What the NIC can do
    Auto,
    /// In the driver
    Driver,
    /// In the network stack
    Generic,
    /// None: TAP devices everywhere, so that `echo` shows the noise
    Off,
}

/// With which bytes compared frames leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TxArg {
    Twin,
    InPlace,
    Exact,
}

/// Options of `datapath`.
#[derive(Debug, Args)]
pub(crate) struct DatapathArgs {
    /// What is measured [default: all]
    #[arg(long, value_delimiter = ',')]
    kind: Vec<Kind>,
    /// Bytes of payload of `echo` and `forward`, of a whole frame of `virtqueues`
    #[arg(long, value_delimiter = ',', default_value = "64,1400",
        value_parser = clap::value_parser!(u16).range(60..=1472))]
    payload: Vec<u16>,
    /// How often each is measured; the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,
    /// How long each measurement takes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Datagrams under way at saturation
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) window: u32,
    /// Datagrams a second of `echo` at a low rate
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub(crate) rate: u32,
    /// Requests of `latency` of each sort in each round
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(100..))]
    pub(crate) requests: u32,
    /// How workers wait
    #[arg(long, value_enum, default_value = "adaptive")]
    poll: PollArg,
    /// The mode of AF_XDP
    #[arg(long, value_enum, default_value = "auto")]
    xdp: XdpArg,
    /// With which bytes frames leave in `virtqueues` [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    tx: Vec<TxArg>,
}

impl DatapathArgs {
    pub(crate) fn payloads(&self) -> impl Iterator<Item = usize> {
        self.payload.iter().map(|&bytes| usize::from(bytes))
    }

    pub(crate) fn time(&self) -> Duration {
        Duration::from_secs(self.seconds.into())
    }

    pub(crate) fn poll(&self) -> String {
        let mode = match self.poll {
            PollArg::Adaptive => "adaptive",
            PollArg::Busy => "busy",
            PollArg::Interrupt => "interrupt",
        };
        mode.to_owned()
    }

    fn tx(&self) -> Vec<TxMode> {
        let mode = |tx: &TxArg| match tx {
            TxArg::Twin => TxMode::Twin,
            TxArg::InPlace => TxMode::InPlace,
            TxArg::Exact => TxMode::Exact,
        };
        self.tx.iter().map(mode).collect()
    }

    /// The mode of AF_XDP, unless it is off.
    pub(crate) fn xdp(&self) -> Option<String> {
        let mode = match self.xdp {
            XdpArg::Auto => "auto",
            XdpArg::Driver => "driver",
            XdpArg::Generic => "generic",
            XdpArg::Off => return None,
        };
        Some(mode.to_owned())
    }
}

/// Runs the benchmark.
pub(crate) fn run(args: &DatapathArgs, place: &Place) -> Result<Outcome, BenchError> {
    let measures = |kind| args.kind.is_empty() || args.kind.contains(&kind);
    let mut rows = Vec::new();
    if measures(Kind::Echo) {
        rows.extend(datapath_echo::run(args, place)?);
    }
    if measures(Kind::Latency) {
        rows.extend(datapath_latency::run(args, place)?);
    }
    if measures(Kind::Idle) {
        rows.extend(datapath_idle::run(args, place)?);
    }
    if measures(Kind::Forward) {
        rows.extend(datapath_forward::run(args)?);
    }
    let mut text: String = rows.iter().map(|row| row.text()).collect();
    let mut json: Vec<Value> = rows.iter().map(|row| row.json()).collect();
    if measures(Kind::Virtqueues) {
        let outcome = datapath_vhost::run(place, &args.payload, &args.tx(), args.rounds as usize)?;
        text.push('\n');
        text += &outcome.text;
        json.extend(outcome.rows);
    }
    Ok(Outcome {
        text,
        json: Value::Array(json),
        clean: true,
    })
}
