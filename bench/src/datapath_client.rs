//! The client of `datapath`: datagrams that come back, with their round trips.
//!
//! Invariants: at most a window is under way; every answer must be one that is awaited and carry the
//! bytes that were sent; what does not come back is counted as lost, once.
//!
//! Does not send again.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::datapath_udp::{BATCH, BatchSocket};

/// Number and time stamp at the start of each datagram.
pub(crate) const HEADER_BYTES: usize = 16;
/// So many later answers make a datagram lost: paths that change cores reorder a little.
const REORDER: u64 = 64;
/// Most that can be under way.
pub(crate) const WINDOW_MAX: u64 = 1024;
/// Longest round trip that is told apart.
const ROUND_TRIP_MAX_NS: u64 = 60_000_000_000;

/// What became of the datagrams of one measurement.
#[derive(Debug)]
pub(crate) struct Echoes {
    pub(crate) sent: u64,
    pub(crate) received: u64,
    pub(crate) lost: u64,
    /// Answers that nobody waits for (any more), or with other bytes than were sent.
    pub(crate) foreign: u64,
    pub(crate) seconds: f64,
    pub(crate) round_trip_ns: Histogram<u64>,
}

impl Echoes {
    pub(crate) fn new() -> Self {
        let histogram = Histogram::new_with_max(ROUND_TRIP_MAX_NS, 3);
        Self {
            sent: 0,
            received: 0,
            lost: 0,
            foreign: 0,
            seconds: 0.0,
            round_trip_ns: histogram.expect("constant bounds are valid"),
        }
    }

    pub(crate) fn per_s(&self) -> f64 {
        self.received as f64 / self.seconds
    }

    /// The round trip that `quantile` of all are not above.
    pub(crate) fn us(&self, quantile: f64) -> f64 {
        self.round_trip_ns.value_at_quantile(quantile) as f64 / 1e3
    }

    pub(crate) fn count(&mut self, round_trip_ns: u64) {
        self.received += 1;
        self.round_trip_ns.saturating_record(round_trip_ns);
    }
}

/// One socket and what it is waiting for.
#[derive(Debug)]
pub(crate) struct Client {
    socket: BatchSocket,
    datagram_bytes: usize,
    origin: Instant,
    flight: Flight,
}

impl Client {
    /// For datagrams of one length, at least [`HEADER_BYTES`].
    pub(crate) fn connect(target: SocketAddr, datagram_bytes: usize) -> io::Result<Self> {
        if datagram_bytes < HEADER_BYTES {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut socket = BatchSocket::connect(target, datagram_bytes)?;
        for datagram in socket.outgoing() {
            for (at, byte) in datagram.iter_mut().enumerate() {
                *byte = pattern(at);
            }
        }
        Ok(Self {
            socket,
            datagram_bytes,
            origin: Instant::now(),
            flight: Flight::default(),
        })
    }

    /// As many as a window allows, for so long. They are sent by half windows: who answers each
    /// datagram with the next makes everybody on the path take them one by one.
    pub(crate) fn saturate(&mut self, window: u64, time: Duration) -> io::Result<Echoes> {
        let (mut echoes, begun) = (Echoes::new(), Instant::now());
        let window = window.min(WINDOW_MAX);
        while begun.elapsed() < time {
            let mut room = self.flight.room(window);
            if room < window.div_ceil(2) {
                room = 0;
            }
            while room > 0 {
                let count = room.min(BATCH as u64);
                self.send(count as usize, &mut echoes)?;
                room -= count;
            }
            if self.receive(true, &mut echoes)? == 0 {
                echoes.lost += self.flight.give_up();
            }
        }
        echoes.seconds = begun.elapsed().as_secs_f64();
        self.drain(&mut echoes)?;
        Ok(echoes)
    }

    /// One each `period`, for so long. One that is due while this thread does not run is skipped.
    pub(crate) fn pace(&mut self, period: Duration, time: Duration) -> io::Result<Echoes> {
        let (mut echoes, begun) = (Echoes::new(), Instant::now());
        let mut due = Duration::ZERO;
        while due < time {
            let elapsed = begun.elapsed();
            if elapsed < due {
                self.socket.wait(due - elapsed);
                self.receive(false, &mut echoes)?;
                continue;
            }
            if self.flight.room(WINDOW_MAX) == 0 {
                echoes.lost += self.flight.give_up();
            }
            self.send(1, &mut echoes)?;
            let periods = elapsed.as_nanos() / period.as_nanos() + 1;
            due = period.saturating_mul(u32::try_from(periods).unwrap_or(u32::MAX));
        }
        echoes.seconds = begun.elapsed().as_secs_f64();
        self.drain(&mut echoes)?;
        Ok(echoes)
    }

    /// One after the other, `count` times.
    pub(crate) fn ping_pong(&mut self, count: usize) -> io::Result<Echoes> {
        let (mut echoes, begun) = (Echoes::new(), Instant::now());
        for _ in 0..count {
            self.send(1, &mut echoes)?;
            while self.flight.room(1) == 0 {
                if self.receive(true, &mut echoes)? == 0 {
                    echoes.lost += self.flight.give_up();
                }
            }
        }
        echoes.seconds = begun.elapsed().as_secs_f64();
        Ok(echoes)
    }

    /// Waits for the rest, which is not counted as received within the time.
    fn drain(&mut self, echoes: &mut Echoes) -> io::Result<()> {
        let received = echoes.received;
        while !self.flight.is_empty() {
            if self.receive(true, echoes)? == 0 {
                echoes.lost += self.flight.give_up();
            }
        }
        echoes.received = received;
        Ok(())
    }

    fn send(&mut self, count: usize, echoes: &mut Echoes) -> io::Result<()> {
        if count == 0 {
            return Ok(());
        }
        let now_ns = self.now_ns();
        let numbers = self.flight.next..;
        for (datagram, number) in self.socket.outgoing().take(count).zip(numbers) {
            datagram[..8].copy_from_slice(&number.to_le_bytes());
            datagram[8..HEADER_BYTES].copy_from_slice(&now_ns.to_le_bytes());
        }
        let sent = self.socket.send(count)? as u64;
        self.flight.next += sent;
        echoes.sent += sent;
        Ok(())
    }

    /// Takes what has come, and gives how much that was.
    fn receive(&mut self, wait: bool, echoes: &mut Echoes) -> io::Result<usize> {
        let count = self.socket.receive(wait)?;
        let now_ns = self.now_ns();
        for datagram in self.socket.received(count) {
            let known = read_header(datagram, self.datagram_bytes)
                .filter(|(number, _)| self.flight.answer(*number));
            match known {
                Some((_, sent_ns)) => echoes.count(now_ns.saturating_sub(sent_ns)),
                None => echoes.foreign += 1,
            }
        }
        echoes.lost += self.flight.take_lost();
        Ok(count)
    }

    fn now_ns(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }
}

fn pattern(at: usize) -> u8 {
    (at as u8).wrapping_mul(31)
}

/// Number and time stamp of an answer that is as it should be.
fn read_header(datagram: &[u8], datagram_bytes: usize) -> Option<(u64, u64)> {
    let (number, rest) = datagram.split_first_chunk()?;
    let (sent_ns, body) = rest.split_first_chunk()?;
    let as_sent = body
        .iter()
        .zip(HEADER_BYTES..)
        .all(|(byte, at)| *byte == pattern(at));
    let whole = datagram.len() == datagram_bytes;
    (as_sent && whole).then_some((u64::from_le_bytes(*number), u64::from_le_bytes(*sent_ns)))
}

/// Which numbers are under way.
#[derive(Debug)]
struct Flight {
    /// Below it, all are answered or lost.
    oldest: u64,
    next: u64,
    answered: Vec<bool>,
    lost: u64,
}

impl Default for Flight {
    fn default() -> Self {
        Self {
            oldest: 0,
            next: 0,
            answered: vec![false; WINDOW_MAX as usize],
            lost: 0,
        }
    }
}

impl Flight {
    fn is_empty(&self) -> bool {
        self.oldest == self.next
    }

    fn room(&self, window: u64) -> u64 {
        window.saturating_sub(self.next - self.oldest)
    }

    /// Notes an answer; `false` if it was not awaited.
    fn answer(&mut self, number: u64) -> bool {
        if !(self.oldest..self.next).contains(&number) {
            return false;
        }
        if std::mem::replace(&mut self.answered[place(number)], true) {
            return false;
        }
        while self.oldest < self.next {
            let answered = self.answered[place(self.oldest)];
            if !answered && number.saturating_sub(self.oldest) <= REORDER {
                break;
            }
            self.forget_oldest();
        }
        true
    }

    /// Counts everything under way as lost, and gives how many those were.
    fn give_up(&mut self) -> u64 {
        while !self.is_empty() {
            self.forget_oldest();
        }
        self.take_lost()
    }

    fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }

    fn forget_oldest(&mut self) {
        let answered = std::mem::take(&mut self.answered[place(self.oldest)]);
        self.lost += u64::from(!answered);
        self.oldest += 1;
    }
}

fn place(number: u64) -> usize {
    (number % WINDOW_MAX) as usize
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, UdpSocket};
    use std::thread;

    use super::*;

    #[test]
    fn answers_count_once_and_gaps_are_lost_when_enough_has_passed_them() {
        let mut flight = Flight {
            next: 200,
            ..Flight::default()
        };
        assert!(flight.answer(1));
        assert!(!flight.answer(1), "twice");
        assert!(!flight.answer(200), "not sent");
        assert_eq!((flight.oldest, flight.room(256)), (0, 56));
        assert!(flight.answer(64));
        assert_eq!(flight.take_lost(), 0);
        assert!(flight.answer(65));
        assert_eq!((flight.take_lost(), flight.oldest), (1, 2));
        assert!(!flight.answer(0), "given up");
        assert_eq!(flight.give_up(), 196);
        assert!(flight.is_empty());
    }

    /// Echoes all but each `skip`th datagram, changing each `spoil`th.
    fn echo(skip: u64, spoil: u64) -> SocketAddr {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = socket.local_addr().unwrap();
        thread::spawn(move || {
            let mut datagram = [0; 2048];
            for n in 1_u64.. {
                let Ok((len, from)) = socket.recv_from(&mut datagram) else {
                    return;
                };
                if n.is_multiple_of(spoil) {
                    datagram[len - 1] ^= 1;
                }
                if !n.is_multiple_of(skip) {
                    socket.send_to(&datagram[..len], from).ok();
                }
            }
        });
        address
    }

    #[test]
    fn a_whole_path_loses_nothing() {
        let mut client = Client::connect(echo(u64::MAX, u64::MAX), 64).unwrap();
        let echoes = client.ping_pong(500).unwrap();
        assert_eq!((echoes.sent, echoes.received, echoes.lost), (500, 500, 0));
        assert_eq!(echoes.round_trip_ns.len(), 500);
        assert!(echoes.us(0.5) > 0.0 && echoes.us(0.5) <= echoes.us(0.99));
        let all = client.saturate(64, Duration::from_millis(50)).unwrap();
        assert!(all.sent > 64, "{all:?}");
        assert_eq!((all.round_trip_ns.len(), all.lost), (all.sent, 0));
        let paced = client.pace(Duration::from_millis(1), Duration::from_millis(20));
        let paced = paced.unwrap();
        assert!(paced.sent <= 21 && paced.lost == 0, "{paced:?}");
    }

    #[test]
    fn lost_and_changed_answers_are_counted() {
        let mut client = Client::connect(echo(100, 77), 64).unwrap();
        let echoes = client.saturate(256, Duration::from_millis(100)).unwrap();
        let answered = echoes.round_trip_ns.len();
        assert_eq!(answered + echoes.lost, echoes.sent, "{echoes:?}");
        assert!(echoes.lost >= echoes.sent / 100, "{echoes:?}");
        assert!(echoes.foreign > 0 && answered > 0, "{echoes:?}");
    }

    #[test]
    fn a_datagram_without_room_for_its_header_is_refused() {
        let target = (Ipv4Addr::LOCALHOST, 9).into();
        assert!(Client::connect(target, HEADER_BYTES - 1).is_err());
    }
}
