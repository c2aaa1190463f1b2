//! The client that makes a pair checkpoint: it has memory dirtied, then asks for what differs.
//!
//! Invariant: one request at a time over one connection, so each checkpoint covers exactly what was dirtied before it.
//!
//! Knows only as much HTTP as the demo guest speaks.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use colo_lab::topology::GUEST_V4;

/// Longest time for an answer; dirtying the memory of a large guest takes seconds.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// A connection to the guest's HTTP service.
#[derive(Debug)]
pub(crate) struct GuestClient {
    stream: BufReader<TcpStream>,
}

impl GuestClient {
    /// Connects; in the client's namespace.
    pub(crate) fn connect() -> io::Result<Self> {
        let stream = TcpStream::connect(SocketAddr::from((GUEST_V4, 80)))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        Ok(Self {
            stream: BufReader::new(stream),
        })
    }

    /// Has so many pages changed, each as a whole, so many per cent of them alike on both guests.
    pub(crate) fn dirty(&mut self, pages: u32, same_pct: u32) -> io::Result<()> {
        let answer = self.ask("POST", &format!("/dirty/{pages}/{same_pct}/4096"))?;
        match answer.trim() == pages.to_string() {
            true => Ok(()),
            false => Err(odd(&answer)),
        }
    }

    /// Asks for a random number, which differs between the guests and leaves by a checkpoint. Gives how long the answer
    /// took.
    pub(crate) fn diverge(&mut self) -> io::Result<Duration> {
        let begun = Instant::now();
        self.ask("GET", "/random")?;
        Ok(begun.elapsed())
    }

    fn ask(&mut self, method: &str, path: &str) -> io::Result<String> {
        let request = format!("{method} {path} HTTP/1.1\r\nHost: guest\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes())?;
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        if !line.starts_with("HTTP/1.1 200 ") {
            return Err(odd(&line));
        }
        let mut length = 0;
        loop {
            line.clear();
            self.stream.read_line(&mut line)?;
            match line.trim_end().split_once(": ") {
                Some(("Content-Length", value)) => {
                    length = value.parse().map_err(|_| odd(value))?
                }
                Some(_) => {}
                None => break,
            }
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        String::from_utf8(body).map_err(|_| odd("bytes"))
    }
}

fn odd(answer: &str) -> io::Error {
    io::Error::other(format!("the guest answered {:?}", answer.trim_end()))
}
