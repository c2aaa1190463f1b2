//! Requests to a running machine: a socket beside the status socket, one line in, one JSON line out.
//!
//! The socket is `host.status` with `.requests` behind it. Who may look at a machine may not order it
//! about: the two have permissions of their own. A request is `snapshot PATH`; the answer has `ok`, or
//! `error` with the reason in words.
//!
//! Invariants: a client that does not write or read holds nothing up for longer than 100 ms;
//! every request gets one answer, also when nobody handled it.
//!
//! Does not carry requests out.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::status::{StatusError, bind_socket};

/// A client writes its line at once.
const LINE_TIMEOUT: Duration = Duration::from_millis(100);
const LINE_BYTES_MAX: u64 = 8192;
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
    // A client that left or does not read is its own problem.
    let _ = client.set_write_timeout(Some(LINE_TIMEOUT));
    let _ = client.write_all(format!("{answer}\n").as_bytes());
}

/// A listening socket. Its file goes away with it.
#[derive(Debug)]
pub struct RequestSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl RequestSocket {
    /// Listens beside the status socket `status`.
    pub fn bind(status: &Path) -> Result<Self, StatusError> {
        let path = socket_of(status);
        let listener = bind_socket(&path)?;
        Ok(Self { listener, path })
    }

    /// Readable when [`RequestSocket::next`] may have something.
    pub fn poll_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }

    /// The next request that makes sense; others are answered here.
    pub fn next(&self) -> Option<Request> {
        while let Ok((client, _)) = self.listener.accept() {
            match read_order(&client) {
                Ok(order) => {
                    return Some(Request {
                        order,
                        client: Some(client),
                    });
                }
                Err(reason) => answer_to(client, &serde_json::json!({ "error": reason })),
            }
        }
        None
    }
}

impl Drop for RequestSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn read_order(client: &UnixStream) -> Result<Order, String> {
    let mut line = Vec::new();
    client
        .set_read_timeout(Some(LINE_TIMEOUT))
        .and_then(|()| BufReader::new(client.take(LINE_BYTES_MAX)).read_until(b'\n', &mut line))
        .map_err(|e| format!("no request came: {e}"))?;
    let line = line.strip_suffix(b"\n").ok_or("the request has no end")?;
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
        // One that says nothing.
        let silent = UnixStream::connect(socket_of(&status)).unwrap();
        assert!(socket.next().is_none());
        drop(silent);
    }
}
