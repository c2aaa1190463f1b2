//! `latency`: one request at a time, to a pair and, as the baseline, to a guest that is not replicated.
//!
//! Invariants: the same client asks both, in turn; an answer that is not whole is an error, never a
//! figure. What the pair adds contains a round trip between the hosts, which is measured bare in the
//! same run.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use colo_lab::load::ports;
use colo_lab::netns::Netns;
use colo_lab::pair::{Pair, Settings, Single};
use colo_lab::topology::{GUEST_V4, Host, Topology};

use crate::datapath::DatapathArgs;
use crate::datapath_client::{Client, Echoes};
use crate::datapath_echo::check;
use crate::datapath_row::{Figures, Row};
use crate::datapath_udp::PATIENCE;
use crate::datapath_wakeup;
use crate::place::{BenchError, Place};

/// Where the bare link is answered.
const LINK_ECHO_PORT: u16 = 7007;
/// Bytes of a datagram that is to be short.
const LINK_PAYLOAD: usize = 64;
/// Requests before those that count.
const WARM_UP: usize = 200;
/// Longest wait for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A sort of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    /// An echo of so many bytes.
    Udp(usize),
    Http,
    Resp,
}

impl Sort {
    fn all(payloads: impl Iterator<Item = usize>) -> Vec<Self> {
        let datagrams = payloads.map(Self::Udp);
        datagrams.chain([Self::Http, Self::Resp]).collect()
    }

    fn name(self) -> &'static str {
        match self {
            Self::Udp(_) => "udp",
            Self::Http => "http",
            Self::Resp => "resp",
        }
    }

    /// Bytes of what is answered; of HTTP, the body's.
    fn payload(self) -> usize {
        match self {
            Self::Udp(bytes) => bytes,
            Self::Http => 100,
            Self::Resp => PONG.len(),
        }
    }
}

const PING: &[u8] = b"PING\r\n";
const PONG: &[u8] = b"+PONG\r\n";

/// Runs it.
pub(crate) fn run(args: &DatapathArgs, place: &Place) -> Result<Vec<Row>, BenchError> {
    let mut settings = place.settings();
    settings.poll = args.poll();
    settings.xdp = args.xdp();
    settings.tx = args.pair_tx();
    let requests = args.requests as usize;
    let sorts = Sort::all(args.payloads());
    let mut rounds = vec![Vec::new(); sorts.len()];
    for round in 1..=args.rounds {
        eprintln!("latency, round {round} of {}", args.rounds);
        let peer = measure_run(&settings, place, &sorts, requests)?;
        let (own, link) = measure_pair(&settings, place, &sorts, requests)?;
        let wakeup = datapath_wakeup::measure();
        let wakeup = wakeup.map_err(BenchError::io("measure wake-ups"))?;
        for ((rounds, own), peer) in rounds.iter_mut().zip(own).zip(peer) {
            let figures = added(own, peer).with_all("link_", link.clone());
            rounds.push(figures.with_all("", wakeup.clone()));
        }
    }
    let rows = sorts.iter().zip(rounds).map(|(sort, rounds)| {
        let mut figures = Figures::median(&rounds);
        if let Some(ratio) = figures.against_peer("p50_us") {
            figures = figures.with("ratio", ratio);
        }
        Row::new("latency", Some(sort.payload()), figures)
            .label("request", sort.name())
            .label("poll", settings.poll.clone())
            .label("tx", settings.tx.clone())
    });
    Ok(rows.collect())
}

/// What the pair adds, beside both.
fn added(own: Figures, peer: Figures) -> Figures {
    let both = own.with_all("peer_", peer);
    let differences = ["p50_us", "p99_us"].map(|name| {
        let difference = both.get(name)? - both.get(&format!("peer_{name}"))?;
        Some((format!("added_{name}"), difference))
    });
    differences
        .into_iter()
        .flatten()
        .fold(both, |all, (name, value)| all.with(name, value))
}

fn measure_run(
    settings: &Settings,
    place: &Place,
    sorts: &[Sort],
    requests: usize,
) -> Result<Vec<Figures>, BenchError> {
    let dir = place.scratch()?;
    let single = Single::start(settings, dir.path())?;
    ask_all(&single.topology.client, sorts, requests)
}

/// Gives the requests' figures, then the bare link's.
fn measure_pair(
    settings: &Settings,
    place: &Place,
    sorts: &[Sort],
    requests: usize,
) -> Result<(Vec<Figures>, Figures), BenchError> {
    let dir = place.scratch()?;
    let pair = Pair::start(settings, dir.path())?;
    let figures = ask_all(&pair.topology.client, sorts, requests)?;
    let status = pair.primary.status();
    let status = status.map_err(BenchError::io("read the primary's status"))?;
    if status["protected"] != true {
        return Err(BenchError::Unprotected(status));
    }
    Ok((figures, bare_link(&pair.topology, requests)?))
}

fn ask_all(client: &Netns, sorts: &[Sort], requests: usize) -> Result<Vec<Figures>, BenchError> {
    let each = sorts.iter().map(|&sort| {
        let asked = client.run(|| ask(sort, requests))?;
        let what = format!("ask the guest over {}", sort.name());
        let echoes = asked.map_err(BenchError::io(what))?;
        check(&echoes)?;
        Ok(figures(&echoes))
    });
    each.collect()
}

fn figures(echoes: &Echoes) -> Figures {
    Figures::default()
        .with("p50_us", echoes.us(0.5))
        .with("p99_us", echoes.us(0.99))
}

fn ask(sort: Sort, requests: usize) -> io::Result<Echoes> {
    match sort {
        Sort::Udp(bytes) => ping_pong((GUEST_V4, ports::ECHO).into(), bytes, requests),
        Sort::Http => {
            let request = format!(
                "GET /bytes/{} HTTP/1.1\r\nHost: guest\r\n\r\n",
                sort.payload()
            );
            let mut stream = connect(ports::HTTP)?;
            converse(&mut stream, request.as_bytes(), requests, read_page)
        }
        Sort::Resp => {
            let mut stream = connect(ports::RESP)?;
            converse(&mut stream, PING, requests, read_pong)
        }
    }
}

fn ping_pong(target: SocketAddr, payload: usize, requests: usize) -> io::Result<Echoes> {
    let mut client = Client::connect(target, payload)?;
    client.ping_pong(WARM_UP)?;
    client.ping_pong(requests)
}

fn connect(port: u16) -> io::Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect((GUEST_V4, port))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    Ok(BufReader::new(stream))
}

/// Request, answer, request, answer.
fn converse<S: Read + Write>(
    stream: &mut BufReader<S>,
    request: &[u8],
    requests: usize,
    mut read_answer: impl FnMut(&mut BufReader<S>) -> io::Result<()>,
) -> io::Result<Echoes> {
    let mut echoes = Echoes::new();
    for number in 0..WARM_UP + requests {
        let begun = Instant::now();
        stream.get_mut().write_all(request)?;
        read_answer(stream)?;
        if number >= WARM_UP {
            echoes.sent += 1;
            echoes.count(begun.elapsed().as_nanos() as u64);
        }
    }
    Ok(echoes)
}

fn read_page<R: Read>(stream: &mut BufReader<R>) -> io::Result<()> {
    let mut line = String::new();
    let mut content_length = 0;
    loop {
        line.clear();
        if stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match line.trim_end().split_once(": ") {
            Some(("Content-Length", length)) => content_length = length.parse().unwrap_or(0),
            None if line.trim_end().is_empty() => break,
            _ => {}
        }
    }
    let mut body = [0; 100];
    if content_length != body.len() {
        return Err(wrong(format!("a page of {content_length} bytes")));
    }
    stream.read_exact(&mut body)
}

fn read_pong<R: Read>(stream: &mut BufReader<R>) -> io::Result<()> {
    let mut answer = [0; PONG.len()];
    stream.read_exact(&mut answer)?;
    match answer == PONG {
        true => Ok(()),
        false => Err(wrong(String::from_utf8_lossy(&answer).into_owned())),
    }
}

fn wrong(answer: String) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("wrong answer: {answer}"),
    )
}

/// Datagrams between the two hosts, answered by a thread that does nothing else.
fn bare_link(topology: &Topology, requests: usize) -> Result<Figures, BenchError> {
    let failed = || BenchError::io("exchange datagrams between the hosts");
    let address: std::net::IpAddr = Host::B
        .link_address()
        .parse()
        .map_err(|_| BenchError::Failed("the link has no address".to_owned()))?;
    let target = SocketAddr::from((address, LINK_ECHO_PORT));
    let socket = topology.host(Host::B).run(|| UdpSocket::bind(target))?;
    let socket = socket.map_err(failed())?;
    socket.set_read_timeout(Some(PATIENCE)).map_err(failed())?;
    let done = Arc::new(AtomicBool::new(false));
    let ended = done.clone();
    let answering = std::thread::spawn(move || {
        let mut datagram = [0; 2048];
        while !ended.load(Ordering::Relaxed) {
            if let Ok((len, from)) = socket.recv_from(&mut datagram) {
                socket.send_to(&datagram[..len], from).ok();
            }
        }
    });
    let asked = topology
        .host(Host::A)
        .run(|| ping_pong(target, LINK_PAYLOAD, requests));
    done.store(true, Ordering::Relaxed);
    answering.join().ok();
    let echoes = asked?.map_err(failed())?;
    check(&echoes)?;
    Ok(figures(&echoes))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers from memory.
    struct Script(io::Cursor<Vec<u8>>);

    impl Read for Script {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.0.read(buf)
        }
    }

    impl Write for Script {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn script(answer: &[u8], times: usize) -> BufReader<Script> {
        BufReader::new(Script(io::Cursor::new(answer.repeat(times))))
    }

    #[test]
    fn whole_answers_count_and_others_fail() {
        let mut pongs = script(PONG, WARM_UP + 5);
        let echoes = converse(&mut pongs, PING, 5, read_pong).unwrap();
        assert_eq!((echoes.sent, echoes.received), (5, 5));
        let cut = converse(&mut script(PONG, WARM_UP + 4), PING, 5, read_pong);
        assert_eq!(cut.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(read_pong(&mut script(b"+PANG\r\n", 1)).is_err());
    }

    #[test]
    fn pages_are_read_to_their_end() {
        let page = |bytes: usize| {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {bytes}\r\n\r\n");
            [head.as_bytes(), &vec![b'x'; bytes]].concat()
        };
        let mut pages = script(&page(100), 2);
        read_page(&mut pages).unwrap();
        read_page(&mut pages).unwrap();
        assert!(read_page(&mut pages).is_err(), "nothing is left");
        assert!(read_page(&mut script(&page(99), 1)).is_err());
    }

    #[test]
    fn what_is_added_is_the_difference() {
        let of = |p50, p99| Figures::default().with("p50_us", p50).with("p99_us", p99);
        let figures = added(of(150.0, 300.0), of(100.0, 310.0));
        assert_eq!(figures.get("added_p50_us"), Some(50.0));
        assert_eq!(figures.get("added_p99_us"), Some(-10.0));
        assert_eq!(figures.get("peer_p50_us"), Some(100.0));
    }
}
