//! How fast checkpoints go through the page channel over loopback, beside bare streams over the same sort of sockets.
//!
//! Invariants: each round measures every way in turn, so that what disturbs the machine disturbs all; both ends are
//! threads of this process; a way that lost a byte gives no figure.
//!
//! Does not measure encoding: the sender sends what is in its buffers, the receiver looks at nothing but the channel's
//! checksums.

use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use serde_json::json;

use crate::datapath_cpu::thread_cpu_ns;
use crate::figures::{Range, table};
use crate::place::{BenchError, Outcome};
use crate::{transfer_uring, transfer_ways};

const MIB: u64 = 1 << 20;
/// Bytes of each send and receive, and of a chunk's payload.
pub(crate) const CHUNK_BYTES: usize = 256 << 10;

/// Options of `transfer`.
#[derive(Debug, Args)]
pub(crate) struct TransferArgs {
    /// How many streams carry the bytes
    #[arg(long, value_delimiter = ',', default_value = "1,2,4",
        value_parser = clap::value_parser!(u16).range(1..=16))]
    streams: Vec<u16>,
    /// How much goes through in each measurement
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(16..=1_048_576))]
    mib: u64,
    /// How often each is measured; the median counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
}

/// How bytes travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Way {
    /// The page channel.
    Channel,
    /// The page channel, which is not to try zero copy.
    ChannelPlain,
    /// write(2) and read(2), a thread for each stream at each end.
    Blocking,
    /// IORING_OP_SEND and IORING_OP_RECV.
    Uring,
    /// IORING_OP_WRITE_FIXED and IORING_OP_READ_FIXED.
    UringFixed,
    /// IORING_OP_SEND_ZC of registered buffers and IORING_OP_RECV.
    UringZeroCopy,
    /// IORING_OP_SEND and multishot IORING_OP_RECV into provided buffers.
    UringMultishot,
    /// IORING_OP_SEND and IORING_OP_RECV, which is woken for whole chunks.
    UringLowWater,
    /// IORING_OP_WRITE_FIXED, several of them under way on each stream, and multishot IORING_OP_RECV, woken for whole chunks.
    UringDeep,
}

impl Way {
    const ALL: [Self; 9] = [
        Self::Channel,
        Self::ChannelPlain,
        Self::Blocking,
        Self::Uring,
        Self::UringFixed,
        Self::UringZeroCopy,
        Self::UringMultishot,
        Self::UringLowWater,
        Self::UringDeep,
    ];
    /// Those on a bare io_uring.
    pub(crate) const BARE_URING: [Self; 6] = [
        Self::Uring,
        Self::UringFixed,
        Self::UringZeroCopy,
        Self::UringMultishot,
        Self::UringLowWater,
        Self::UringDeep,
    ];

    fn is_bare(self) -> bool {
        !matches!(self, Self::Channel | Self::ChannelPlain)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Channel => "page channel",
            Self::ChannelPlain => "page channel, plain sends",
            Self::Blocking => "write, read",
            Self::Uring => "io_uring send, recv",
            Self::UringFixed => "io_uring write_fixed, read_fixed",
            Self::UringZeroCopy => "io_uring send_zc, recv",
            Self::UringMultishot => "io_uring send, multishot recv",
            Self::UringLowWater => "io_uring send, recv of chunks",
            Self::UringDeep => "io_uring write_fixed x 4, multishot recv of chunks",
        }
    }
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
struct Sample {
    bytes_per_s: f64,
    send_cpu_s_per_gib: f64,
    receive_cpu_s_per_gib: f64,
}

/// A way with a number of streams.
#[derive(Debug, Serialize)]
struct Row {
    way: Way,
    streams: u16,
    bytes_per_s: Range,
    send_cpu_s_per_gib: Range,
    receive_cpu_s_per_gib: Range,
    /// Its median beside that of the best bare way with as many streams.
    share_of_best_bare: f64,
}

/// Runs the benchmark.
pub(crate) fn run(args: &TransferArgs) -> Result<Outcome, BenchError> {
    let mut rows = Vec::new();
    for &streams in &args.streams {
        eprintln!("{streams} streams");
        rows.extend(measure(args, streams)?);
    }
    Ok(Outcome {
        text: text(&rows, args),
        json: json!({
            "benchmark": "transfer", "mib": args.mib, "rounds": args.rounds,
            "chunk_bytes": CHUNK_BYTES, "rows": rows,
        }),
        clean: true,
    })
}

fn measure(args: &TransferArgs, streams: u16) -> Result<Vec<Row>, BenchError> {
    let mut samples = Way::ALL.map(|way| (way, Vec::new()));
    for _ in 0..args.rounds {
        for (way, samples) in &mut samples {
            samples.push(once(*way, usize::from(streams), args.mib * MIB)?);
        }
    }
    let range = |samples: &[Sample], part: fn(&Sample) -> f64| Range::of(samples.iter().map(part));
    let row = |(way, samples): (Way, Vec<Sample>)| Row {
        way,
        streams,
        bytes_per_s: range(&samples, |s| s.bytes_per_s),
        send_cpu_s_per_gib: range(&samples, |s| s.send_cpu_s_per_gib),
        receive_cpu_s_per_gib: range(&samples, |s| s.receive_cpu_s_per_gib),
        share_of_best_bare: 0.0,
    };
    let mut rows: Vec<Row> = samples.into_iter().map(row).collect();
    let bare = rows.iter().filter(|row| row.way.is_bare());
    let best = bare.map(|row| row.bytes_per_s.median).fold(0.0, f64::max);
    for row in &mut rows {
        row.share_of_best_bare = row.bytes_per_s.median / best;
    }
    Ok(rows)
}

/// So many bytes once, spread evenly over the streams.
fn once(way: Way, streams: usize, bytes: u64) -> Result<Sample, BenchError> {
    let chunks = bytes.div_ceil((streams * CHUNK_BYTES) as u64).max(1);
    let (near, far) = sockets(streams)?;
    between(way, near, far, chunks)
}

/// So many chunks on each of these connections.
fn between(
    way: Way,
    near: Vec<TcpStream>,
    far: Vec<TcpStream>,
    chunks: u64,
) -> Result<Sample, BenchError> {
    let bytes = chunks * (far.len() * CHUNK_BYTES) as u64;
    let begun = Instant::now();
    // Each end has a core of its own, as on two hosts; its threads inherit that.
    let receiver = thread::spawn(move || {
        pin(1);
        let got = match way {
            Way::Channel | Way::ChannelPlain => transfer_ways::receive_channel(near),
            Way::Blocking => transfer_ways::receive_blocking(near),
            _ => transfer_uring::receive(&near, way),
        };
        got.map(|(bytes, more_ns)| (bytes, thread_cpu_ns() + more_ns))
    });
    let sender = thread::spawn(move || {
        pin(0);
        let more_ns = match way {
            Way::Channel => transfer_ways::send_channel(far, chunks, true),
            Way::ChannelPlain => transfer_ways::send_channel(far, chunks, false),
            Way::Blocking => transfer_ways::send_blocking(far, chunks),
            _ => transfer_uring::send(far, chunks, way).map(|()| 0),
        };
        more_ns.map(|more_ns| thread_cpu_ns() + more_ns)
    });
    let panicked = |_| BenchError::Failed("an end panicked".to_owned());
    let (sent, received) = (sender.join(), receiver.join());
    let send_ns = sent.map_err(panicked)??;
    let (got, receive_ns) = received.map_err(panicked)??;
    let seconds = begun.elapsed().as_secs_f64();
    if got != bytes {
        let what = format!("{}: {got} of {bytes} bytes came", way.name());
        return Err(BenchError::Failed(what));
    }
    let gib = bytes as f64 / (1 << 30) as f64;
    Ok(Sample {
        bytes_per_s: bytes as f64 / seconds,
        send_cpu_s_per_gib: send_ns as f64 / 1e9 / gib,
        receive_cpu_s_per_gib: receive_ns as f64 / 1e9 / gib,
    })
}

/// How fast one connection carries about so many bytes from its second end to its first.
pub(crate) fn bytes_per_s(
    way: Way,
    (near, far): (TcpStream, TcpStream),
    bytes: u64,
) -> Result<f64, BenchError> {
    let chunks = bytes.div_ceil(CHUNK_BYTES as u64).max(1);
    Ok(between(way, vec![near], vec![far], chunks)?.bytes_per_s)
}

/// How fast the kernel takes so many bytes at a time after a rest, for the other end of a connection; the median.
pub(crate) fn burst_bytes_per_s(
    (near, far): (TcpStream, TcpStream),
    bytes: usize,
    count: u32,
    rest: Duration,
) -> Result<f64, BenchError> {
    let receiver = thread::spawn(move || {
        pin(1);
        transfer_uring::receive(&[near], Way::UringLowWater)
    });
    let sender = thread::spawn(move || {
        pin(0);
        transfer_uring::bursts(far, bytes, count, rest)
    });
    let panicked = |_| BenchError::Failed("an end panicked".to_owned());
    let (rates, got) = (sender.join(), receiver.join());
    let rates = rates.map_err(panicked)??;
    let (got, _) = got.map_err(panicked)??;
    let sent = bytes as u64 * u64::from(count);
    if got != sent {
        let what = format!("bursts: {got} of {sent} bytes came");
        return Err(BenchError::Failed(what));
    }
    Ok(Range::of(rates).median)
}

/// To one of the cores; without it the scheduler may have both ends take turns on one.
fn pin(index: usize) {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    if let Some(core) = cores.get(index % cores.len().max(1)) {
        core_affinity::set_for_current(*core);
    }
}

/// Connected over loopback.
fn sockets(streams: usize) -> Result<(Vec<TcpStream>, Vec<TcpStream>), BenchError> {
    let failed = || BenchError::io("connect over loopback");
    let listener = TcpListener::bind("127.0.0.1:0").map_err(failed())?;
    let address = listener.local_addr().map_err(failed())?;
    let connect = |_| {
        let near = TcpStream::connect(address).map_err(failed())?;
        Ok((near, listener.accept().map_err(failed())?.0))
    };
    let pairs: Result<Vec<_>, BenchError> = (0..streams).map(connect).collect();
    Ok(pairs?.into_iter().unzip())
}

fn text(rows: &[Row], args: &TransferArgs) -> String {
    let header = [
        "way",
        "streams",
        "GB/s",
        "min",
        "max",
        "of best bare",
        "send CPU s/GiB",
        "receive CPU s/GiB",
    ];
    let mut cells = vec![header.map(str::to_owned).to_vec()];
    for row in rows {
        let speed = |bytes_per_s: f64| format!("{:.2}", bytes_per_s / 1e9);
        cells.push(vec![
            row.way.name().to_owned(),
            row.streams.to_string(),
            speed(row.bytes_per_s.median),
            speed(row.bytes_per_s.min),
            speed(row.bytes_per_s.max),
            format!("{:.0} %", row.share_of_best_bare * 100.0),
            format!("{:.3}", row.send_cpu_s_per_gib.median),
            format!("{:.3}", row.receive_cpu_s_per_gib.median),
        ]);
    }
    format!(
        "\n{} MiB over loopback in sends of {} KiB; medians of {} rounds.\n\n{}",
        args.mib,
        CHUNK_BYTES >> 10,
        args.rounds,
        table(&cells),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_brings_all_bytes() {
        for way in Way::ALL {
            for streams in [1, 3] {
                let sample = once(way, streams, 16 * MIB).unwrap();
                assert!(sample.bytes_per_s > 0.0, "{way:?}");
                assert!(sample.send_cpu_s_per_gib > 0.0 && sample.receive_cpu_s_per_gib > 0.0);
            }
        }
    }
}
