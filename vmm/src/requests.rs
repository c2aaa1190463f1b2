//! Requests to a running machine: a socket beside the status socket, one line in, one JSON line out.
//!
//! The socket is `host.status` with `.requests` behind it. Who may look at a machine may not order it
//! about: the two have permissions of their own. A request is `snapshot PATH`; the answer has `ok`, or
//! `error` with the reason in words.
//!
//! Invariants: nobody waits for a client, whether it writes nothing, or slowly, or does not read; there are at
//! most [`CLIENTS_MAX`] of them; every request gets one answer, also when nobody handled it.
//!
//! Does not carry requests out.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::status::{StatusError, bind_socket};

/// A client writes its line at once; one that has not by then gives its place up to others.
const LINE_TIMEOUT: Duration = Duration::from_secs(2);
const LINE_BYTES_MAX: usize = 8192;
/// Clients that may have begun a line.
const CLIENTS_MAX: usize = 16;
const SNAPSHOT: &[u8] = b"snapshot ";

/// Where the requests to the machine with this status socket go.
pub fn socket_of(status: &Path) -> PathBuf {
    let mut name = OsString::from(status);
    name.push(".requests");
    name.into()
}

/// What is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// A snapshot into this file.
    Snapshot(PathBuf),
}

/// An order, and who waits for its answer. Dropped without one, it answers that nothing was done.
#[derive(Debug)]
pub struct Request {
    /// What is wanted.
    pub order: Order,
    client: Option<UnixStream>,
}

impl Request {
    /// Done, with what is to be told about it.
    pub fn done(mut self, report: &impl Serialize) {
        self.tell(&serde_json::json!({ "ok": report }));
    }

    /// Not done.
    pub fn refuse(mut self, reason: &str) {
        self.tell(&serde_json::json!({ "error": reason }));
    }

    fn tell(&mut self, answer: &serde_json::Value) {
        if let Some(client) = self.client.take() {
            answer_to(client, answer);
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.tell(&serde_json::json!({ "error": "the machine ended before it was done" }));
    }
}

fn answer_to(mut client: UnixStream, answer: &serde_json::Value) {
    // Does not block. A client that left or does not read is its own problem.
    let _ = client.write_all(format!("{answer}\n").as_bytes());
}

fn refuse(client: UnixStream, reason: &str) {
    answer_to(client, &serde_json::json!({ "error": reason }));
}

/// A listening socket. Its file goes away with it.
#[derive(Debug)]
pub struct RequestSocket {
    listener: UnixListener,
    /// Readable when the listener is, or a client.
    ready: Epoll,
    clients: Mutex<Vec<Client>>,
    path: PathBuf,
}

/// A client that has not written a whole line.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    since: Instant,
    line: Vec<u8>,
}

impl RequestSocket {
    /// Listens beside the status socket `status`.
    pub fn bind(status: &Path) -> Result<Self, StatusError> {
        let path = socket_of(status);
        let listener = bind_socket(&path)?;
        let watch = || {
            let ready = Epoll::new()?;
            let event = EpollEvent::new(EventSet::IN, 0);
            ready.ctl(ControlOperation::Add, listener.as_raw_fd(), event)?;
            Ok(ready)
        };
        let ready = watch().map_err(|source| StatusError::Io {
            path: path.clone(),
            source,
        })?;
        Ok(Self {
            listener,
            ready,
            clients: Mutex::default(),
            path,
        })
    }

    /// Readable when [`RequestSocket::next`] may have something.
    pub fn poll_fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }

    /// The next request that is whole and makes sense; those that do not are answered here.
    pub fn next(&self) -> Option<Request> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        self.accept(&mut clients);
        let mut n = 0;
        while let Some(client) = clients.get_mut(n) {
            match client.read_order() {
                Ok(None) => n += 1,
                Ok(Some(order)) => {
                    let client = Some(self.take(&mut clients, n));
                    return Some(Request { order, client });
                }
                Err(reason) => refuse(self.take(&mut clients, n), &reason),
            }
        }
        None
    }

    fn accept(&self, clients: &mut MutexGuard<'_, Vec<Client>>) {
        while let Ok((stream, _)) = self.listener.accept() {
            // The oldest comes first.
            if clients.len() >= CLIENTS_MAX && clients[0].since.elapsed() > LINE_TIMEOUT {
                refuse(self.take(clients, 0), "no request came");
            }
            let event = EpollEvent::new(EventSet::IN, 0);
            let watch = || {
                self.ready
                    .ctl(ControlOperation::Add, stream.as_raw_fd(), event)
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if clients.len() >= CLIENTS_MAX || watch().is_err() {
                refuse(stream, "too many clients at once; try again");
                continue;
            }
            clients.push(Client {
                stream,
                since: Instant::now(),
                line: Vec::new(),
            });
        }
    }

    /// A client of which no more is to be read.
    fn take(&self, clients: &mut MutexGuard<'_, Vec<Client>>, n: usize) -> UnixStream {
        let stream = clients.remove(n).stream;
        let fd = stream.as_raw_fd();
        // Otherwise its end would wake the machine again and again until it has its answer.
        let _ = self
            .ready
            .ctl(ControlOperation::Delete, fd, EpollEvent::default());
        stream
    }
}

impl Drop for RequestSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Client {
    /// What it wants, once its line is whole.
    fn read_order(&mut self) -> Result<Option<Order>, String> {
        let mut bytes = [0; 1024];
        loop {
            if let Some(end) = self.line.iter().position(|&byte| byte == b'\n') {
                return order_of(&self.line[..end]).map(Some);
            }
            if self.line.len() >= LINE_BYTES_MAX {
                return Err(format!("the request is longer than {LINE_BYTES_MAX} bytes"));
            }
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err("the request has no end".to_owned()),
                Ok(n) => self.line.extend_from_slice(&bytes[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(format!("no request came: {e}")),
            }
        }
        match self.since.elapsed() > LINE_TIMEOUT {
            true => Err(format!("no request came within {LINE_TIMEOUT:?}")),
            false => Ok(None),
        }
    }
}

fn order_of(line: &[u8]) -> Result<Order, String> {
    match line.strip_prefix(SNAPSHOT) {
        Some(path) if path.starts_with(b"/") => {
            Ok(Order::Snapshot(OsString::from_vec(path.to_vec()).into()))
        }
        Some(_) => Err("the path of a snapshot must be absolute".to_owned()),
        None => Err(format!(
            "unknown request {:?}; there is \"snapshot PATH\"",
            String::from_utf8_lossy(line)
        )),
    }
}

/// A request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody is there.
    #[error("{}: {source}; is the machine running?", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The machine says why not.
    #[error("{0}")]
    Refused(String),
}

/// Asks the machine with this status socket for a snapshot and waits for it. `path` is absolute.
pub fn ask_for_snapshot<R: DeserializeOwned>(status: &Path, path: &Path) -> Result<R, AskError> {
    let socket = socket_of(status);
    let failed = |source| AskError::Io {
        path: socket.clone(),
        source,
    };
    let mut stream = UnixStream::connect(&socket).map_err(failed)?;
    let line = [SNAPSHOT, path.as_os_str().as_bytes(), b"\n"].concat();
    stream.write_all(&line).map_err(failed)?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(failed)?;
    let mut answer: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| failed(e.into()))?;
    if let Some(reason) = answer["error"].as_str() {
        return Err(AskError::Refused(reason.to_owned()));
    }
    serde_json::from_value(answer["ok"].take()).map_err(|e| failed(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket() -> (tempfile::TempDir, PathBuf, RequestSocket) {
        let dir = tempfile::tempdir().unwrap();
        let status = dir.path().join("vm.sock");
        let socket = RequestSocket::bind(&status).unwrap();
        (dir, status, socket)
    }

    /// What `ask` answers while `serve` sees one request at a time.
    fn served<R: Send + 'static>(
        socket: &RequestSocket,
        ask: impl FnOnce() -> R + Send + 'static,
        serve: impl Fn(Request),
    ) -> R {
        let asking = std::thread::spawn(ask);
        while !asking.is_finished() {
            match socket.next() {
                Some(request) => serve(request),
                None => std::thread::yield_now(),
            }
        }
        asking.join().unwrap()
    }

    #[test]
    fn a_request_gets_its_answer() {
        let (_dir, status, socket) = socket();
        let path = PathBuf::from("/somewhere/with a space");
        let ask = {
            let (status, path) = (status.clone(), path.clone());
            move || ask_for_snapshot::<u64>(&status, &path)
        };
        let answer = served(&socket, ask, |request| {
            assert_eq!(request.order, Order::Snapshot(path.clone()));
            request.done(&42);
        });
        assert_eq!(answer.unwrap(), 42);
        let ask = {
            let status = status.clone();
            move || ask_for_snapshot::<u64>(&status, Path::new("/x")).unwrap_err()
        };
        let refused = served(&socket, ask.clone(), |request| request.refuse("no"));
        assert_eq!(refused.to_string(), "no");
        let forgotten = served(&socket, ask, drop).to_string();
        assert!(forgotten.contains("ended"), "{forgotten}");
        drop(socket);
        assert!(!socket_of(&status).exists());
    }

    #[test]
    fn nonsense_is_answered_and_hurts_nobody() {
        let (_dir, status, socket) = socket();
        for (line, reason) in [
            ("reboot\n", "unknown request"),
            ("snapshot here\n", "absolute"),
            ("snapshot /x", "no end"),
            ("\n", "unknown request"),
        ] {
            let path = socket_of(&status);
            let ask = move || {
                let mut stream = UnixStream::connect(path).unwrap();
                stream.write_all(line.as_bytes()).unwrap();
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                answer
            };
            let answer = served(&socket, ask, |request| panic!("{request:?}"));
            assert!(answer.contains(reason), "{line:?}: {answer}");
        }
    }

    fn is_readable(socket: &RequestSocket) -> bool {
        let mut fd = libc::pollfd {
            fd: socket.poll_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd, no wait.
        unsafe { libc::poll(&mut fd, 1, 0) == 1 }
    }

    #[test]
    fn a_slow_client_is_not_waited_for_and_served_when_its_line_is_whole() {
        let (_dir, status, socket) = socket();
        let mut slow = UnixStream::connect(socket_of(&status)).unwrap();
        for piece in [&b""[..], b"snap", b"shot /x"] {
            slow.write_all(piece).unwrap();
            assert!(socket.next().is_none());
            assert!(!is_readable(&socket), "it would be looked at without end");
        }
        // Who comes later is not behind it.
        let mut quick = UnixStream::connect(socket_of(&status)).unwrap();
        quick.write_all(b"snapshot /y\n").unwrap();
        let request = socket.next().unwrap();
        assert_eq!(request.order, Order::Snapshot("/y".into()));
        drop(quick);
        assert!(!is_readable(&socket), "nor is one that left");
        drop(request);
        slow.write_all(b"\n").unwrap();
        assert!(is_readable(&socket));
        let request = socket.next().unwrap();
        assert_eq!(request.order, Order::Snapshot("/x".into()));
    }

    #[test]
    fn silent_clients_are_bounded() {
        let (_dir, status, socket) = socket();
        let connect = || UnixStream::connect(socket_of(&status)).unwrap();
        let silent: Vec<_> = (0..CLIENTS_MAX).map(|_| connect()).collect();
        let mut late = connect();
        assert!(socket.next().is_none());
        let mut answer = String::new();
        late.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("too many"), "{answer}");
        drop(silent);
        assert!(socket.next().is_none());
        assert!(socket.clients.lock().unwrap().is_empty());
    }
}
