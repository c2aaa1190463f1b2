//! A UDP echo probe on an absolute schedule: the longest time without an answer is the outage.
//!
//! Invariants: one thread, asleep between two datagrams; a datagram that is late because this thread did not
//! run is skipped, not sent in a burst.
//!
//! Does not send again: datagrams may be lost, and the report says how many.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::Latency;
use super::engine::{latency, new_histogram};
use crate::netns::{NetError, Netns};

const PAYLOAD: usize = 64;
/// After the last datagram, answers are waited for this long.
const LINGER: Duration = Duration::from_millis(500);
const NEVER: u64 = u64::MAX;

/// What the probe saw.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct ProbeReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Different ones answered.
    pub answered: u64,
    /// Answers that came more than once (allowed around a takeover).
    pub duplicates: u64,
    /// Answers with wrong content.
    pub wrong: u64,
    /// Datagrams not sent because the probe's thread was not scheduled in time.
    pub skipped: u64,
    /// Longest time between two answers that ended before the kill.
    pub longest_gap_us: u64,
    /// Longest time between two answers that ended after the kill.
    pub outage_us: Option<u64>,
    /// Round trips.
    pub round_trip_us: Latency,
}

/// A running probe.
pub(super) struct Probe {
    stop: Sender<()>,
    /// Microseconds after `origin`, [`NEVER`] before the kill.
    killed_at_us: Arc<AtomicU64>,
    origin: Instant,
    thread: Mutex<Option<JoinHandle<Result<ProbeReport, NetError>>>>,
}

impl Probe {
    pub(super) fn start(
        client: &Netns,
        target: SocketAddr,
        period: Duration,
    ) -> Result<Self, NetError> {
        let (stop, stopped) = mpsc::channel();
        let killed_at_us = Arc::new(AtomicU64::new(NEVER));
        let origin = Instant::now();
        let killed = Arc::clone(&killed_at_us);
        let thread = client.spawn("probe", move || {
            let mut run = Run::new(origin, period, killed);
            run.all(target, &stopped).ok();
            run.report()
        })?;
        Ok(Self {
            stop,
            killed_at_us,
            origin,
            thread: Mutex::new(Some(thread)),
        })
    }

    pub(super) fn mark_kill(&self) {
        let now_us = self.origin.elapsed().as_micros() as u64;
        self.killed_at_us.store(now_us, Ordering::Relaxed);
    }

    /// Ends it. `None` when it was ended before, or could not run.
    pub(super) fn stop(&self) -> Option<ProbeReport> {
        self.stop.send(()).ok();
        let thread = self.thread.lock().ok()?.take()?;
        thread.join().ok()?.ok()
    }
}

struct Run {
    origin: Instant,
    period: Duration,
    killed_at_us: Arc<AtomicU64>,
    report: ProbeReport,
    histogram: Histogram<u64>,
    /// One bit per datagram: answered.
    answered: Vec<u64>,
    last_answer_us: Option<u64>,
}

impl Run {
    fn new(origin: Instant, period: Duration, killed_at_us: Arc<AtomicU64>) -> Self {
        Self {
            origin,
            period,
            killed_at_us,
            report: ProbeReport::default(),
            histogram: new_histogram(),
            answered: Vec::new(),
            last_answer_us: None,
        }
    }

    fn all(&mut self, target: SocketAddr, stopped: &Receiver<()>) -> io::Result<()> {
        let any: IpAddr = match target {
            SocketAddr::V4(_) => [0; 4].into(),
            SocketAddr::V6(_) => [0; 16].into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_nonblocking(true)?;
        let mut next = Instant::now();
        while matches!(stopped.try_recv(), Err(mpsc::TryRecvError::Empty)) {
            self.wait(&socket, next)?;
            let now = Instant::now();
            if now < next {
                continue;
            }
            self.send(&socket, target);
            next += self.period;
            while next <= now {
                self.report.skipped += 1;
                next += self.period;
            }
        }
        let deadline = Instant::now() + LINGER;
        while Instant::now() < deadline && self.report.answered < self.report.sent {
            self.wait(&socket, deadline)?;
        }
        Ok(())
    }

    /// Sleeps until `deadline` or an answer, and takes the answers that are there.
    fn wait(&mut self, socket: &UdpSocket, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut entry = libc::pollfd {
            fd: socket.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let timeout = libc::timespec {
            tv_sec: left.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(left.subsec_nanos() as i32),
        };
        // SAFETY: one valid pollfd and a valid timespec, both alive during the call; no signal mask.
        let ready = unsafe { libc::ppoll(&raw mut entry, 1, &raw const timeout, std::ptr::null()) };
        if ready < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return Err(io::Error::last_os_error());
        }
        let mut answer = [0; PAYLOAD * 2];
        loop {
            match socket.recv(&mut answer) {
                Ok(length) => self.hear(&answer[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // ICMP errors of earlier datagrams: counted by their missing answers.
                Err(_) => {}
            }
        }
    }

    fn send(&mut self, socket: &UdpSocket, target: SocketAddr) {
        let number = self.report.sent;
        let datagram = datagram(number, self.now_us());
        self.report.sent += 1;
        // An error (no route, ICMP) shows as a missing answer.
        socket.send_to(&datagram, target).ok();
    }

    fn hear(&mut self, answer: &[u8]) {
        let now_us = self.now_us();
        let field = |at: usize| {
            let bytes = answer.get(at..at + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        let (Some(number), Some(sent_us)) = (field(0), field(8)) else {
            self.report.wrong += 1;
            return;
        };
        if number >= self.report.sent || sent_us > now_us || answer != datagram(number, sent_us) {
            self.report.wrong += 1;
            return;
        }
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        if self.answered.len() <= word {
            self.answered.resize(word + 1, 0);
        }
        if self.answered[word] & bit != 0 {
            self.report.duplicates += 1;
            return;
        }
        self.answered[word] |= bit;
        self.report.answered += 1;
        self.histogram.saturating_record((now_us - sent_us).max(1));
        self.gap_ends(now_us);
    }

    fn gap_ends(&mut self, now_us: u64) {
        let gap_us = now_us - self.last_answer_us.unwrap_or(now_us);
        self.last_answer_us = Some(now_us);
        if now_us < self.killed_at_us.load(Ordering::Relaxed) {
            self.report.longest_gap_us = self.report.longest_gap_us.max(gap_us);
        } else {
            self.report.outage_us = Some(self.report.outage_us.unwrap_or(0).max(gap_us));
        }
    }

    fn report(&mut self) -> ProbeReport {
        let killed_at_us = self.killed_at_us.load(Ordering::Relaxed);
        if killed_at_us != NEVER && self.last_answer_us.is_none_or(|at| at < killed_at_us) {
            // Nothing came after the kill: the outage lasts until now.
            let from = self.last_answer_us.unwrap_or(killed_at_us);
            self.report.outage_us = Some(self.now_us().saturating_sub(from));
        }
        self.report.round_trip_us = latency(&self.histogram);
        self.report
    }

    fn now_us(&self) -> u64 {
        self.origin.elapsed().as_micros() as u64
    }
}

fn datagram(number: u64, sent_us: u64) -> [u8; PAYLOAD] {
    let mut bytes = [0; PAYLOAD];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..16].copy_from_slice(&sent_us.to_le_bytes());
    for (at, byte) in bytes.iter_mut().enumerate().skip(16) {
        *byte = (number as u8).wrapping_add(at as u8);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicates_and_foreign_answers_are_told_apart() {
        let killed = Arc::new(AtomicU64::new(NEVER));
        let mut run = Run::new(Instant::now(), Duration::from_millis(1), killed);
        run.report.sent = 2;
        run.hear(&datagram(1, 0));
        run.hear(&datagram(1, 0));
        run.hear(&datagram(2, 0));
        run.hear(b"short");
        let mut changed = datagram(0, 0);
        changed[40] ^= 1;
        run.hear(&changed);
        let report = run.report();
        assert_eq!(
            (report.answered, report.duplicates, report.wrong),
            (1, 1, 3)
        );
    }

    #[test]
    fn silence_after_a_kill_is_an_outage() {
        let killed = Arc::new(AtomicU64::new(NEVER));
        let mut run = Run::new(
            Instant::now(),
            Duration::from_millis(1),
            Arc::clone(&killed),
        );
        run.gap_ends(10);
        run.gap_ends(30);
        assert_eq!(run.report().outage_us, None);
        killed.store(35, Ordering::Relaxed);
        assert!(run.report().outage_us.is_some());
        run.report.outage_us = None;
        run.gap_ends(130);
        assert_eq!(
            (run.report().longest_gap_us, run.report().outage_us),
            (20, Some(100))
        );
    }
}
