//! The load generator's loop: one thread, all connections, asleep in epoll when nothing happens.
//!
//! Invariants: a connection has at most one `ask` outstanding; every connection's end is either the
//! client's own wish or a counted error.
//!
//! Does not know protocols: see [`Conversation`].

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

use super::conversation::{Conversation, Kind};
use super::facts::Facts;
use super::{
    Inbox, Latency, LoadConfig, LoadReport, Order, Share, Shown, Survival, echo, http, ports, resp,
};
use crate::netns::NetError;

/// Wakes the loop for an order.
pub(super) const WAKER: Token = Token(usize::MAX);
/// Requests of a connection that comes and goes.
const VISIT: u64 = 25;
/// Time until a lost connection is opened again.
const REOPEN: Duration = Duration::from_millis(200);
/// Longest sleep, so that timeouts are seen.
const TICK: Duration = Duration::from_millis(100);
/// Longest latency that is told apart, in microseconds.
const LATENCY_MAX_US: u64 = 120_000_000;
/// After the stop, how often a connection looks whether all others have their answers.
const SETTLE: Duration = Duration::from_millis(2);
const READ_MAX: usize = 64 << 10;

/// Runs the load until it is told to finish.
pub(super) fn run(
    poll: Poll,
    inbox: Inbox,
    shown: &Shown,
    config: &LoadConfig,
) -> Result<LoadReport, NetError> {
    let mut engine = Engine::new(poll, inbox, config);
    let outcome = engine.run(shown);
    outcome.map_err(|source| NetError::Io {
        what: "load generator".to_owned(),
        source,
    })?;
    Ok(engine.report())
}

/// An empty histogram of microseconds, three digits exact.
pub(super) fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_max(LATENCY_MAX_US, 3).expect("constant bounds are valid")
}

/// The percentiles that reports show.
pub(super) fn latency(histogram: &Histogram<u64>) -> Latency {
    Latency {
        count: histogram.len(),
        p50: histogram.value_at_quantile(0.5),
        p99: histogram.value_at_quantile(0.99),
        p999: histogram.value_at_quantile(0.999),
        max: histogram.max(),
    }
}

enum Link {
    /// Not connected; to be opened at this time.
    Down { reopen_at: Instant },
    /// The handshake is under way.
    Connecting { stream: TcpStream, since: Instant },
    /// Connected.
    Up(Up),
    /// Nothing more to do.
    Done,
}

struct Up {
    stream: TcpStream,
    out: Vec<u8>,
    written: usize,
    outstanding: usize,
    sent_at: Instant,
    ask_at: Instant,
    auditing: bool,
}

struct Connection {
    conversation: Box<dyn Conversation>,
    target: SocketAddr,
    link: Link,
    before_kill: bool,
    audit_due: bool,
}

#[derive(Default)]
struct Counts {
    requests: u64,
    responses: u64,
    received_bytes: u64,
    client_errors: u64,
    audited: u64,
}

struct Engine<'a> {
    config: &'a LoadConfig,
    poll: Poll,
    inbox: Inbox,
    facts: Facts,
    counts: Counts,
    connections: Vec<Connection>,
    histograms: [Histogram<u64>; 3],
    in_flight: Histogram<u64>,
    started: Instant,
    stopped: Option<Instant>,
    killed: Option<Instant>,
    survival: Option<Survival>,
    scratch: Vec<u8>,
}

impl<'a> Engine<'a> {
    fn new(poll: Poll, inbox: Inbox, config: &'a LoadConfig) -> Self {
        let now = Instant::now();
        let clock = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let tag = format!("{:x}-{:x}", config.seed, clock.as_nanos());
        let connections = (0..config.clients).map(|number| connection(config, number, now));
        Self {
            config,
            poll,
            inbox,
            facts: Facts::new(tag, config.deterministic),
            counts: Counts::default(),
            connections: connections.collect(),
            histograms: [new_histogram(), new_histogram(), new_histogram()],
            in_flight: new_histogram(),
            started: now,
            stopped: None,
            killed: None,
            survival: None,
            scratch: vec![0; READ_MAX],
        }
    }

    fn run(&mut self, shown: &Shown) -> io::Result<()> {
        let mut events = Events::with_capacity(256);
        while !self.finished() {
            match self.poll.poll(&mut events, Some(self.sleep())) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            for event in &events {
                if event.token() == WAKER {
                    self.take_orders();
                } else {
                    self.ready(event.token().0);
                }
            }
            self.timers(Instant::now());
            shown
                .responses
                .store(self.counts.responses, Ordering::Relaxed);
            shown
                .client_errors
                .store(self.counts.client_errors, Ordering::Relaxed);
            shown
                .wrong_responses
                .store(self.facts.wrong_count(), Ordering::Relaxed);
        }
        Ok(())
    }

    fn finished(&self) -> bool {
        self.stopped.is_some()
            && self
                .connections
                .iter()
                .all(|connection| matches!(connection.link, Link::Done))
    }

    fn sleep(&self) -> Duration {
        let now = Instant::now();
        let until = |at: Instant| at.saturating_duration_since(now);
        let waits = self
            .connections
            .iter()
            .map(|connection| match &connection.link {
                Link::Down { reopen_at } => until(*reopen_at),
                Link::Up(up) if up.outstanding == 0 => until(up.ask_at),
                _ => TICK,
            });
        waits.min().unwrap_or(TICK).min(TICK)
    }

    fn take_orders(&mut self) {
        while let Ok(order) = self.inbox.try_recv() {
            for connection in &mut self.connections {
                connection.conversation.begin_audit();
                connection.audit_due = true;
            }
            match order {
                Order::Kill(answer) => {
                    self.killed = Some(Instant::now());
                    let mut before = 0;
                    for connection in &mut self.connections {
                        connection.before_kill = matches!(connection.link, Link::Up(_));
                        before += usize::from(connection.before_kill);
                    }
                    self.survival = Some(Survival {
                        connections_before: before,
                        ..Survival::default()
                    });
                    // The caller may have given up waiting.
                    answer.send(before).ok();
                }
                Order::Finish => self.stopped = Some(Instant::now()),
            }
        }
    }

    fn timers(&mut self, now: Instant) {
        let timeout = self.config.request_timeout;
        // Every connection may use up one timeout to answer, one to reconnect, one to audit.
        let out_of_time = self.stopped.is_some_and(|at| now > at + 3 * timeout);
        for index in 0..self.connections.len() {
            if out_of_time && !matches!(self.connections[index].link, Link::Done) {
                self.lose(index, "the audit was not finished");
                self.connections[index].link = Link::Done;
                continue;
            }
            match &self.connections[index].link {
                Link::Down { reopen_at } if *reopen_at <= now => self.open(index, now),
                Link::Connecting { since, .. } if now - *since > timeout => {
                    self.lose(index, "connecting timed out");
                }
                Link::Up(up) if up.outstanding == 0 && up.ask_at <= now => self.ask(index, now),
                Link::Up(up) if up.outstanding > 0 && now - up.sent_at > timeout => {
                    self.lose(index, "an answer timed out");
                }
                _ => {}
            }
        }
    }

    fn open(&mut self, index: usize, now: Instant) {
        let opened = TcpStream::connect(self.connections[index].target).and_then(|mut stream| {
            let interest = Interest::READABLE | Interest::WRITABLE;
            self.poll
                .registry()
                .register(&mut stream, Token(index), interest)?;
            Ok(stream)
        });
        match opened {
            Ok(stream) => self.connections[index].link = Link::Connecting { stream, since: now },
            Err(error) => self.lose(index, &format!("connect: {error}")),
        }
    }

    /// The socket of a connection may be read or written.
    fn ready(&mut self, index: usize) {
        let now = Instant::now();
        if let Link::Connecting { .. } = self.connections[index].link {
            self.handshake(index, now);
        }
        let Link::Up(_) = self.connections[index].link else {
            return;
        };
        if let Err(error) = self.flush(index).and_then(|()| self.read(index)) {
            self.lose(index, &error.to_string());
        }
    }

    fn handshake(&mut self, index: usize, now: Instant) {
        let Link::Connecting { stream, .. } = &self.connections[index].link else {
            return;
        };
        let error = match stream.take_error() {
            Ok(None) => match stream.peer_addr() {
                Ok(_) => None,
                Err(error) if error.kind() == io::ErrorKind::NotConnected => return,
                Err(error) => Some(error),
            },
            Ok(error) => error,
            Err(error) => Some(error),
        };
        if let Some(error) = error {
            self.lose(index, &format!("connect: {error}"));
            return;
        }
        let old = std::mem::replace(&mut self.connections[index].link, Link::Done);
        let Link::Connecting { stream, .. } = old else {
            return;
        };
        // Without it requests wait for ACKs; the load is only slower.
        stream.set_nodelay(true).ok();
        self.connections[index].link = Link::Up(Up {
            stream,
            out: Vec::new(),
            written: 0,
            outstanding: 0,
            sent_at: now,
            ask_at: now,
            auditing: false,
        });
        self.ask(index, now);
    }

    fn ask(&mut self, index: usize, now: Instant) {
        let wait = self.stopped.is_some() && !self.quiet();
        let connection = &mut self.connections[index];
        let Link::Up(up) = &mut connection.link else {
            return;
        };
        if wait {
            up.ask_at = now + SETTLE;
            return;
        }
        up.out.clear();
        up.written = 0;
        up.outstanding = 0;
        up.auditing = connection.audit_due;
        if up.auditing {
            up.outstanding = connection.conversation.audit(&mut self.facts, &mut up.out);
            connection.audit_due = up.outstanding > 0;
        }
        if up.outstanding == 0 {
            up.auditing = false;
            if self.stopped.is_some() {
                connection.link = Link::Done;
                return;
            }
            if connection.conversation.leaving() {
                connection.conversation.hang_up(&mut self.facts);
                connection.before_kill = false;
                connection.link = Link::Down { reopen_at: now };
                return;
            }
            up.outstanding = connection.conversation.ask(&mut self.facts, &mut up.out);
        }
        up.sent_at = now;
        self.counts.requests += up.outstanding as u64;
        if let Err(error) = self.flush(index) {
            self.lose(index, &error.to_string());
        }
    }

    /// After the stop: nothing but audits is under way, so that a shared counter stands still.
    fn quiet(&mut self) -> bool {
        let raising = |connection: &Connection| matches!(&connection.link, Link::Up(up) if up.outstanding > 0 && !up.auditing);
        self.facts.quiet = self.facts.quiet || !self.connections.iter().any(raising);
        self.facts.quiet
    }

    fn flush(&mut self, index: usize) -> io::Result<()> {
        let Link::Up(up) = &mut self.connections[index].link else {
            return Ok(());
        };
        while up.written < up.out.len() {
            match up.stream.write(&up.out[up.written..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => up.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read(&mut self, index: usize) -> io::Result<()> {
        loop {
            let Link::Up(up) = &mut self.connections[index].link else {
                return Ok(());
            };
            let count = match up.stream.read(&mut self.scratch) {
                Ok(0) => return Err(io::Error::other("closed by the guest")),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            self.hear(index, count);
            if count < self.scratch.len() {
                // A short read empties the socket; new bytes make a new event.
                return Ok(());
            }
        }
    }

    fn hear(&mut self, index: usize, count: usize) {
        let now = Instant::now();
        let connection = &mut self.connections[index];
        let Link::Up(up) = &mut connection.link else {
            return;
        };
        self.counts.received_bytes += count as u64;
        let heard = connection
            .conversation
            .hear(&mut self.facts, &self.scratch[..count]);
        let answers = match heard {
            Ok(answers) => answers,
            Err(broken) => {
                self.facts.wrong(broken.0);
                self.lose(index, "answers cannot be followed");
                return;
            }
        };
        if answers == 0 {
            return;
        }
        let waited_us = ((now - up.sent_at).as_micros() as u64).max(1);
        let histogram = &mut self.histograms[connection.conversation.kind() as usize];
        histogram.saturating_record_n(waited_us, answers as u64);
        if self.killed.is_some_and(|killed| up.sent_at < killed) {
            self.in_flight
                .saturating_record_n(waited_us, answers as u64);
        }
        self.counts.responses += answers as u64;
        self.counts.audited += if up.auditing { answers as u64 } else { 0 };
        up.outstanding = up.outstanding.saturating_sub(answers);
        if up.outstanding == 0 {
            let hurry = self.config.think.is_zero() || up.auditing;
            up.ask_at = if hurry { now } else { now + self.config.think };
            if hurry {
                self.ask(index, now);
            }
        }
    }

    /// Counts a lost connection and plans the next one.
    fn lose(&mut self, index: usize, why: &str) {
        let connection = &mut self.connections[index];
        self.counts.client_errors += 1;
        let lost = std::mem::take(&mut connection.before_kill);
        if let Some(survival) = self.survival.as_mut().filter(|_| lost) {
            survival.connections_lost += 1;
        }
        let kind = connection.conversation.kind();
        let at_ms = self.started.elapsed().as_millis();
        self.facts.note(format!(
            "error: {kind:?} connection {index} to {} at {at_ms} ms: {why}",
            connection.target
        ));
        connection.conversation.hang_up(&mut self.facts);
        connection.link = Link::Down {
            reopen_at: Instant::now() + REOPEN,
        };
    }

    fn report(&self) -> LoadReport {
        let mut all = new_histogram();
        for histogram in &self.histograms {
            // All have the same bounds.
            all.add(histogram).ok();
        }
        let kinds = [
            (Kind::Http, "HTTP"),
            (Kind::Resp, "RESP"),
            (Kind::Echo, "TCP echo"),
        ];
        let shares = kinds.into_iter().map(|(kind, protocol)| Share {
            protocol,
            connections: self
                .connections
                .iter()
                .filter(|connection| connection.conversation.kind() == kind)
                .count(),
            latency_us: latency(&self.histograms[kind as usize]),
        });
        let stopped = self.stopped.unwrap_or_else(Instant::now);
        LoadReport {
            seconds: (stopped - self.started).as_secs_f64(),
            requests: self.counts.requests,
            responses: self.counts.responses,
            received_bytes: self.counts.received_bytes,
            client_errors: self.counts.client_errors,
            wrong_responses: self.facts.wrong_count(),
            audited: self.counts.audited,
            latency_us: latency(&all),
            shares: shares.collect(),
            survival: self.survival.map(|survival| Survival {
                in_flight_us: latency(&self.in_flight),
                ..survival
            }),
            probe: None,
            notes: self.facts.notes().to_vec(),
        }
    }
}

fn connection(config: &LoadConfig, number: usize, now: Instant) -> Connection {
    let seed = config
        .seed
        .wrapping_add(1 + number as u64)
        .wrapping_mul(0x2545_f491_4f6c_dd1d);
    let name = number as u64;
    let (conversation, port): (Box<dyn Conversation>, u16) = match number % 8 {
        0 | 3 => (Box::new(http::Http::new(name, seed, None)), ports::HTTP),
        6 => (
            Box::new(http::Http::new(name, seed, Some(VISIT))),
            ports::HTTP,
        ),
        2 => (Box::new(echo::Echo::new(name, seed)), ports::ECHO),
        _ => (Box::new(resp::Resp::new(name, seed)), ports::RESP),
    };
    let address = config.guest[(number / 2) % config.guest.len()];
    Connection {
        conversation,
        target: SocketAddr::new(address, port),
        link: Link::Down { reopen_at: now },
        before_kill: false,
        audit_due: false,
    }
}
