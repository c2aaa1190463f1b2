//! Checked load: many connections that compare every answer with what must come, and a UDP probe that
//! measures outages.
//!
//! Invariants: no answer is taken unchecked; a lost connection, a timeout and a wrong byte are counted, never
//! retried in silence; everything a client was told before a takeover is asked for again after it.
//!
//! Does not know whether a single guest or a pair answers.

mod conversation;
mod echo;
mod engine;
mod facts;
mod http;
mod probe;
mod random;
mod reply;
mod resp;

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::netns::{NetError, Netns};
pub use probe::ProbeReport;

/// Between two looks at something that is waited for.
const POLL_PERIOD: Duration = Duration::from_millis(10);

/// Largest page that is asked for (and that the demo guest has).
pub const PAGE_MAX: usize = 1 << 20;
/// Sessions that are opened and asked for again.
pub const SESSIONS_MAX: usize = 512;

/// The demo guest's ports.
pub mod ports {
    /// TCP and UDP echo.
    pub const ECHO: u16 = 7;
    /// HTTP.
    pub const HTTP: u16 = 80;
    /// RESP.
    pub const RESP: u16 = 6379;
}

/// What to send.
#[derive(Debug, Clone)]
pub struct LoadConfig {
    /// The guest's addresses; connections alternate.
    pub guest: Vec<IpAddr>,
    /// Connections: 3 of 8 HTTP, 4 of 8 RESP, 1 of 8 echo.
    pub clients: usize,
    /// Random choices follow from it.
    pub seed: u64,
    /// Only requests whose answers do not depend on time, random numbers or the order between
    /// connections.
    pub deterministic: bool,
    /// Time between an answer and the next request; zero for a closed loop.
    pub think: Duration,
    /// An answer later than this is an error.
    pub request_timeout: Duration,
    /// Time between two datagrams of the UDP probe; `None` for no probe.
    pub probe_period: Option<Duration>,
}

impl LoadConfig {
    /// The usual load against the demo guest.
    pub fn new(clients: usize, seed: u64) -> Self {
        Self {
            guest: crate::topology::GUEST.to_vec(),
            clients,
            seed,
            deterministic: false,
            think: Duration::ZERO,
            request_timeout: Duration::from_secs(10),
            probe_period: Some(Duration::from_millis(1)),
        }
    }
}

/// Percentiles of something in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Latency {
    /// How many values.
    pub count: u64,
    /// Median.
    pub p50: u64,
    /// 99 of 100 are not above it.
    pub p99: u64,
    /// 999 of 1000 are not above it.
    pub p999: u64,
    /// Largest.
    pub max: u64,
}

/// One protocol's share.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Share {
    /// Name of the protocol.
    pub protocol: &'static str,
    /// Connections used.
    pub connections: usize,
    /// From request to the answer's last byte.
    pub latency_us: Latency,
}

/// What became of the connections at a kill.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Survival {
    /// Established connections at the kill.
    pub connections_before: usize,
    /// Those that were reset, closed or silent for the whole request timeout afterwards.
    pub connections_lost: usize,
    /// Requests under way at the kill and answered later.
    pub in_flight_us: Latency,
}

/// The outcome of a run.
#[derive(Debug, Clone, Serialize)]
pub struct LoadReport {
    /// How long requests were made.
    pub seconds: f64,
    /// Requests sent.
    pub requests: u64,
    /// Answers received whole.
    pub responses: u64,
    /// Payload bytes received.
    pub received_bytes: u64,
    /// Connections reset, refused, closed by the guest or timed out.
    pub client_errors: u64,
    /// Answers with other content than must be.
    pub wrong_responses: u64,
    /// Acknowledged facts asked for again after a kill and at the end.
    pub audited: u64,
    /// All answers.
    pub latency_us: Latency,
    /// By protocol.
    pub shares: Vec<Share>,
    /// Set when a kill was announced.
    pub survival: Option<Survival>,
    /// Set when the probe ran.
    pub probe: Option<ProbeReport>,
    /// The first errors and wrong answers, in words.
    pub notes: Vec<String>,
}

/// A look at a run under way.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Answers so far.
    pub responses: u64,
    /// Errors so far.
    pub client_errors: u64,
    /// Wrong answers so far.
    pub wrong_responses: u64,
}

#[derive(Debug, Default)]
struct Shown {
    responses: AtomicU64,
    client_errors: AtomicU64,
    wrong_responses: AtomicU64,
}

enum Order {
    /// Remember which connections are open, begin an audit, and say how many are open.
    Kill(Sender<usize>),
    /// Answer what is outstanding, audit everything, end.
    Finish,
}

/// A running load.
pub struct Load {
    orders: Sender<Order>,
    waker: Arc<mio::Waker>,
    shown: Arc<Shown>,
    engine: JoinHandle<Result<Result<LoadReport, NetError>, NetError>>,
    probe: Option<probe::Probe>,
}

impl Load {
    /// Starts the threads inside the client's namespace.
    pub fn start(client: &Netns, config: LoadConfig) -> Result<Self, NetError> {
        let io = |what: &str, source| NetError::Io {
            what: what.to_owned(),
            source,
        };
        let poll = mio::Poll::new().map_err(|source| io("open an epoll instance", source))?;
        let waker = mio::Waker::new(poll.registry(), engine::WAKER)
            .map_err(|source| io("open an eventfd", source))?;
        let (orders, inbox) = mpsc::channel();
        let shown = Arc::new(Shown::default());
        let probe = match (config.probe_period, config.guest.first()) {
            (Some(period), Some(&guest)) => {
                let target = SocketAddr::new(guest, ports::ECHO);
                Some(probe::Probe::start(client, target, period)?)
            }
            _ => None,
        };
        let engine = {
            let shown = Arc::clone(&shown);
            let body = move || engine::run(poll, inbox, &shown, &config);
            client.spawn("load", body)?
        };
        Ok(Self {
            orders,
            waker: Arc::new(waker),
            shown,
            engine,
            probe,
        })
    }

    /// Counts so far.
    pub fn progress(&self) -> Progress {
        Progress {
            responses: self.shown.responses.load(Ordering::Relaxed),
            client_errors: self.shown.client_errors.load(Ordering::Relaxed),
            wrong_responses: self.shown.wrong_responses.load(Ordering::Relaxed),
        }
    }

    /// Waits until `more` answers have come. False when that takes longer than `timeout`: the service stands still.
    pub fn wait_answers(&self, more: u64, timeout: Duration) -> bool {
        let begun = Instant::now();
        let wanted = self.progress().responses + more;
        while self.progress().responses < wanted {
            if begun.elapsed() > timeout {
                return false;
            }
            thread::sleep(POLL_PERIOD);
        }
        true
    }

    /// To be called right before a host is killed: later gaps of the probe are the outage, and the
    /// connections open now may not be lost. Gives how many those are. Everything acknowledged so far is
    /// asked for again, in between.
    pub fn mark_kill(&self) -> usize {
        let (answer, answered) = mpsc::channel();
        if let Some(probe) = &self.probe {
            probe.mark_kill();
        }
        self.order(Order::Kill(answer));
        answered.recv().unwrap_or(0)
    }

    /// Stops making requests, waits for what is outstanding, asks for everything acknowledged, and
    /// gives the report.
    pub fn finish(self) -> Result<LoadReport, NetError> {
        // The probe first: the gap until its last answer is a measurement, not the end of the load.
        let probe = self.probe.as_ref().map(probe::Probe::stop);
        self.order(Order::Finish);
        let joined = self
            .engine
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let mut report = joined??;
        if let Some(Some(probe)) = probe {
            report.wrong_responses += probe.wrong;
            report.probe = Some(probe);
        }
        Ok(report)
    }

    fn order(&self, order: Order) {
        // Both fail only when the engine has ended; `finish` then tells why.
        self.orders.send(order).ok();
        self.waker.wake().ok();
    }
}

/// Waits until the guest accepts TCP connections on a port, seen from a namespace, as long as
/// `worthwhile` says so.
pub fn wait_for_guest(
    client: &Netns,
    target: SocketAddr,
    timeout: Duration,
    mut worthwhile: impl FnMut() -> bool + Send,
) -> Result<(), NetError> {
    let deadline = Instant::now() + timeout;
    client.run(|| {
        loop {
            match TcpStream::connect_timeout(&target, Duration::from_millis(200)) {
                Ok(_) => return Ok(()),
                Err(source) if Instant::now() >= deadline || !worthwhile() => {
                    let what = format!("connect to the guest at {target}");
                    return Err(NetError::Io { what, source });
                }
                Err(_) => thread::sleep(POLL_PERIOD),
            }
        }
    })?
}

type Inbox = Receiver<Order>;
