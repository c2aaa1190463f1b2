//! `forward`: frames from one veth port to another, through the worker's loop with a driver's rings in
//! place of a guest, and, as the baseline, by AF_XDP alone.
//!
//! Invariants: one thread each, which finds a burst of frames waiting and is done when the far port has
//! given all of them back; the time is that thread's own CPU time, the driver's part included. The
//! two take turns on the same ports.
//!
//! The ports carry nothing else, and the far end throws everything away.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use colo_compare::Token;
use colo_fastpath::Mac;
use colo_fastpath::frame::{FramePool, TxMode};
use colo_fastpath::nic::{Filter, Nic, Sent, XdpNic, XdpNicConfig};
use colo_fastpath::ring::{Call, GuestRam, MemoryError, Pages};
use colo_fastpath::worker::{
    Edge, PollMode, PortWiring, Role, Solo, WorkerConfig, WorkerHandle, spawn,
};
use colo_lab::netns::Netns;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::datapath::DatapathArgs;
use crate::datapath_bare::{BareError, BareForward, Source};
use crate::datapath_cpu::thread_cpu_ns;
use crate::datapath_driver::{Forwarder, RAM_BYTES};
use crate::datapath_row::{Figures, Row};
use crate::figures::Range;
use crate::place::BenchError;

/// Whose frames the ports take.
pub(crate) const GUEST: Mac = [0x52, 0x54, 0, 0xc0, 0x10, 1];
/// Frames that wait in a ring when the time begins.
const BURST: u64 = 1024;
/// Bursts of a round.
const BURSTS: usize = 100;
/// Both NICs lend slots to their ports; the others are for what is under way.
const FRAME_SLOTS: u32 = 8192;
/// Headers in front of the payload, as many bytes as those of a datagram.
const HEADER_BYTES: usize = 14 + 20 + 8;
const MTU: u16 = 1500;
/// Longest wait for a burst.
const PATIENCE: Duration = Duration::from_secs(10);
const NEAR: &str = "near";
const FAR: &str = "far";
const SOURCE: &str = "source";

static SERIAL: AtomicU32 = AtomicU32::new(0);

/// What a burst took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Drained {
    frames: u64,
    cpu_ns: u64,
    wall: Duration,
}

/// Measures this thread.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    begun: Instant,
    cpu_ns: u64,
}

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self {
            begun: Instant::now(),
            cpu_ns: thread_cpu_ns(),
        }
    }

    pub(crate) fn stop(self, frames: u64) -> Drained {
        Drained {
            frames,
            cpu_ns: thread_cpu_ns() - self.cpu_ns,
            wall: self.begun.elapsed(),
        }
    }
}

/// Runs it.
pub(crate) fn run(args: &DatapathArgs) -> Result<Vec<Row>, BenchError> {
    let ports = Ports::new()?;
    let mut rows = Vec::new();
    for payload in args.payloads() {
        let mut source = ports.source(payload)?;
        let mut rounds = Vec::new();
        for round in 1..=args.rounds {
            eprintln!("forward, {payload} bytes, round {round} of {}", args.rounds);
            let own = figures(&ports.forward(&mut source, false)?);
            let timed = figures(&ports.forward(&mut source, true)?);
            let peer = figures(&ports.forward_bare(&mut source)?);
            rounds.push(own.with_all("stages_", timed).with_all("peer_", peer));
        }
        let mut figures = Figures::median(&rounds);
        if let Some(ratio) = figures.against_peer("packets_per_cpu_s") {
            figures = figures.with("ratio", ratio);
        }
        rows.push(Row::new("forward", Some(payload), figures).label("peer", "AF_XDP rings alone"));
    }
    Ok(rows)
}

fn figures(bursts: &[Drained]) -> Figures {
    let median = |of: fn(&Drained) -> f64| Range::of(bursts.iter().map(of)).median;
    let cpu_ns = median(|burst| burst.cpu_ns as f64 / burst.frames as f64);
    let wall_s = median(|burst| burst.wall.as_secs_f64() / burst.frames as f64);
    Figures::default()
        .with("packets_per_s", 1.0 / wall_s)
        .with("packets_per_cpu_s", 1e9 / cpu_ns)
        .with("cpu_ns_per_packet", cpu_ns)
}

/// `source` — `near` | the worker | `far` — the end.
#[derive(Debug)]
struct Ports {
    sender: Netns,
    host: Netns,
    _end: Netns,
}

impl Ports {
    fn new() -> Result<Self, BenchError> {
        let (pid, serial) = (std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let make = |part: &str| Netns::create(&format!("colo-{pid}-forward{serial}-{part}"));
        let (sender, host, end) = (make("sender")?, make("host")?, make("end")?);
        for netns in [&sender, &host, &end] {
            netns.set_sysctl("ipv6/conf/all/disable_ipv6", "1")?;
            netns.set_sysctl("ipv6/conf/default/disable_ipv6", "1")?;
        }
        host.batch(&format!(
            "link add {NEAR} type veth peer name {SOURCE} netns {}\n\
             link add {FAR} type veth peer name end netns {}\n\
             link set {NEAR} up\nlink set {FAR} up\n",
            sender.name(),
            end.name()
        ))?;
        sender.batch(&format!("link set {SOURCE} up\n"))?;
        end.batch("link set end up\n")?;
        Ok(Self {
            sender,
            host,
            _end: end,
        })
    }

    fn source(&self, payload: usize) -> Result<Source, BenchError> {
        let source = self
            .sender
            .run(|| Source::new(SOURCE, HEADER_BYTES + payload))?;
        source.map_err(failed)
    }

    /// Through the worker, which times the stages if told.
    fn forward(&self, source: &mut Source, stages: bool) -> Result<Vec<Drained>, BenchError> {
        let worker = self.host.run(|| start_worker(stages))?.map_err(failed)?;
        let mut bursts = Vec::with_capacity(BURSTS);
        for _ in 0..BURSTS {
            worker.0.quiesce().map_err(failed)?;
            source.burst(BURST).map_err(failed)?;
            let (reply, drained) = channel();
            let begun = worker.0.execute(move |_, role| {
                let role = (role as &mut dyn Any).downcast_mut::<Forward>();
                role.is_some_and(|role| role.await_frames(BURST, reply))
            });
            if !begun.map_err(failed)? {
                return Err(failed("the worker has another role"));
            }
            worker.0.resume().map_err(failed)?;
            let drained = drained
                .recv_timeout(PATIENCE)
                .map_err(|_| failed(format!("not all frames came: {:?}", worker.0.stats())))?;
            bursts.push(drained);
        }
        Ok(bursts)
    }

    /// The baseline.
    fn forward_bare(&self, source: &mut Source) -> Result<Vec<Drained>, BenchError> {
        let bare = self.host.run(|| BareForward::new(NEAR, FAR))?;
        let mut bare = bare.map_err(failed)?;
        let bursts = (0..BURSTS).map(|_| {
            source.burst(BURST)?;
            bare.drain(BURST)
        });
        let bursts: Result<_, BareError> = bursts.collect();
        bursts.map_err(failed)
    }
}

fn failed(error: impl ToString) -> BenchError {
    BenchError::Failed(error.to_string())
}

/// Ends the worker also when something fails.
#[derive(Debug)]
struct Stopping(WorkerHandle);

impl Drop for Stopping {
    fn drop(&mut self) {
        self.0.stop();
    }
}

fn start_worker(stages: bool) -> Result<Stopping, BareError> {
    let ram = Arc::new(GuestRam::new(RAM_BYTES, Pages::Small)?);
    let driver = Forwarder::new(&ram)?;
    let nic = TwoPorts {
        near: XdpNic::open(XdpNicConfig::new(NEAR, GUEST, MTU, Filter::Guest(GUEST)))?,
        far: XdpNic::open(XdpNicConfig::new(FAR, GUEST, MTU, Filter::DropAll))?,
    };
    let wiring = PortWiring {
        ram,
        call: Arc::new(Call::of_queues([None, None], [None, None])),
        kick: EventFd::new(EFD_NONBLOCK)?,
    };
    let config = WorkerConfig {
        name: "worker".to_owned(),
        poll: PollMode::Busy,
        cpu: None,
        frame_slots: FRAME_SLOTS,
        tx: TxMode::default(),
        stages,
    };
    let worker = Stopping(spawn(config, Box::new(nic), wiring)?);
    worker.0.activate(driver.queue_states())?;
    worker.0.set_role(Box::new(Forward {
        solo: Solo::default(),
        driver,
        awaited: None,
    }))?;
    Ok(worker)
}

/// What is received at one port and sent by another.
#[derive(Debug)]
struct TwoPorts {
    near: XdpNic,
    far: XdpNic,
}

impl Nic for TwoPorts {
    fn name(&self) -> &str {
        self.near.name()
    }

    fn describe(&self) -> String {
        format!("{} to {}", self.near.describe(), self.far.describe())
    }

    fn slot_bytes(&self) -> usize {
        self.near.slot_bytes()
    }

    fn start(&mut self, frames: &mut FramePool) -> io::Result<()> {
        self.far.start(frames)?;
        self.near.start(frames)
    }

    fn receive(
        &mut self,
        frames: &mut FramePool,
        out: &mut VecDeque<Token>,
        max: usize,
    ) -> io::Result<()> {
        self.near.receive(frames, out, max)
    }

    fn send(&mut self, frames: &mut FramePool, token: Token) -> Sent {
        self.far.send(frames, token)
    }

    fn flush(&mut self, frames: &mut FramePool) -> io::Result<()> {
        self.far.flush(frames)?;
        self.near.flush(frames)
    }

    fn poll_fds(&self, wants_frames: bool, wants_room: bool, fds: &mut Vec<libc::pollfd>) {
        self.near.poll_fds(wants_frames, false, fds);
        self.far.poll_fds(false, wants_room, fds);
    }

    fn mtu(&self) -> u16 {
        MTU
    }

    fn set_filter(&mut self, filter: Filter) -> io::Result<()> {
        self.near.set_filter(filter)
    }

    fn recall(&mut self, frames: &mut FramePool) {
        self.near.recall(frames);
        self.far.recall(frames);
    }
}

/// The role of an unreplicated VM whose guest is the driver, on the same thread.
struct Forward {
    solo: Solo,
    driver: Forwarder,
    awaited: Option<Awaited>,
}

struct Awaited {
    frames: u64,
    /// When the driver has so many frames back, all are through.
    until: u64,
    watch: Option<Stopwatch>,
    reply: Sender<Drained>,
}

impl Forward {
    fn await_frames(&mut self, frames: u64, reply: Sender<Drained>) -> bool {
        self.awaited = Some(Awaited {
            frames,
            until: self.driver.sent + frames,
            watch: None,
            reply,
        });
        true
    }

    /// A frame that the driver has back may have been copied, and leave only at the end of the step.
    fn note_time(&mut self) {
        let Some(awaited) = &mut self.awaited else {
            return;
        };
        if self.driver.sent < awaited.until {
            awaited.watch.get_or_insert_with(Stopwatch::start);
        } else if let Some(watch) = awaited.watch.take() {
            // Who does not wait any more has given up.
            awaited.reply.send(watch.stop(awaited.frames)).ok();
            self.awaited = None;
        }
    }

    fn turn(&mut self) -> Result<bool, MemoryError> {
        self.driver.turn()
    }
}

impl Role for Forward {
    fn name(&self) -> &'static str {
        "forward"
    }

    fn step(&mut self, edge: &mut Edge, now_us: u64) -> bool {
        self.note_time();
        let moved = self.solo.step(edge, now_us);
        // The memory is there, or the worker had not started.
        self.turn().unwrap_or(false) || moved
    }

    fn leave(&mut self, edge: &mut Edge) {
        self.solo.leave(edge);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forward_every_frame() {
        let ports = Ports::new().unwrap();
        for payload in [64, 1400] {
            let mut source = ports.source(payload).unwrap();
            for bursts in [
                ports.forward(&mut source, false).unwrap(),
                ports.forward_bare(&mut source).unwrap(),
            ] {
                assert_eq!(bursts.len(), BURSTS);
                assert!(bursts.iter().all(|b| b.frames == BURST && b.cpu_ns > 0));
            }
        }
    }
}
