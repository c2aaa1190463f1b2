//! Where a socket is and which end of it is ours, in the two forms that QEMU's `-chardev socket` knows:
//! `path=` and `host=,port=`, each with and without `server=on`.
//!
//! Invariants: all listeners exist before anything is connected, and everything is connected before
//! anything is accepted, so that two processes that name each other's sockets always meet; a path
//! that was made here is removed once its peer has come, and on failure.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::SocketsError;

/// Which end is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Unix: connect where somebody listens, else listen. TCP: connect.
    Either,
    Listen,
    Connect,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Unix(PathBuf),
    /// `HOST:PORT`.
    Tcp(String),
}

/// The address of one socket: `[listen:|connect:]PATH` or `[listen:|connect:]HOST:PORT`.
///
/// `listen:` stands for `server=on` in QEMU, `connect:` for its absence. Without either, a path
/// where somebody listens is connected to, any other is made and listened on; `HOST:PORT` is
/// connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    end: End,
    place: Place,
}

impl FromStr for Address {
    type Err = SocketsError;

    fn from_str(text: &str) -> Result<Self, SocketsError> {
        let refused = |reason| SocketsError::Address {
            address: text.to_owned(),
            reason,
        };
        let (end, rest) = if let Some(rest) = text.strip_prefix("listen:") {
            (End::Listen, rest)
        } else if let Some(rest) = text.strip_prefix("connect:") {
            (End::Connect, rest)
        } else {
            (End::Either, text)
        };
        if rest.is_empty() {
            return Err(refused("it is empty"));
        }
        let place = match rest.rsplit_once(':') {
            Some((host, port)) if !rest.contains('/') => {
                if host.is_empty() || port.parse::<u16>().is_err() {
                    return Err(refused("without a slash it must be HOST:PORT"));
                }
                Place::Tcp(rest.to_owned())
            }
            _ => Place::Unix(PathBuf::from(rest)),
        };
        Ok(Self { end, place })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.end {
            End::Either => "",
            End::Listen => "listen:",
            End::Connect => "connect:",
        })?;
        match &self.place {
            Place::Unix(path) => write!(f, "{}", path.display()),
            Place::Tcp(place) => f.write_str(place),
        }
    }
}

/// A path in the file system that is ours until it has served.
#[derive(Debug)]
struct OwnPath(PathBuf);

impl Drop for OwnPath {
    fn drop(&mut self) {
        // Gone already is as good.
        fs::remove_file(&self.0).ok();
    }
}

#[derive(Debug)]
enum Listener {
    /// The path goes away with it.
    Unix(
        UnixListener,
        #[expect(dead_code, reason = "dropped for its effect")] OwnPath,
    ),
    Tcp(TcpListener),
}

/// A socket on its way: what is ours is bound, what is the peer's is not yet looked for.
#[derive(Debug)]
pub(crate) struct Opening {
    name: String,
    address: Address,
    listener: Option<Listener>,
    connected: Option<OwnedFd>,
}

impl Opening {
    /// Binds what is to be listened on. `part` is the socket's part in the set-up, for errors.
    pub(crate) fn bind(part: &str, address: &Address) -> Result<Self, SocketsError> {
        let mut opening = Self {
            name: format!("{part} ({address})"),
            address: address.clone(),
            listener: None,
            connected: None,
        };
        let listener = match (&address.place, address.end) {
            (_, End::Connect) | (Place::Tcp(_), End::Either) => None,
            (Place::Tcp(place), End::Listen) => {
                let bound = TcpListener::bind(place).map_err(|e| opening.error("listen", e))?;
                Some(Listener::Tcp(bound))
            }
            (Place::Unix(path), End::Listen) => Some(opening.bind_unix(path)?),
            (Place::Unix(path), End::Either) => match UnixStream::connect(path) {
                Ok(stream) => {
                    opening.connected = Some(stream.into());
                    None
                }
                Err(e) if nobody_listens(&e) => Some(opening.bind_unix(path)?),
                Err(e) => return Err(opening.error("connect", e)),
            },
        };
        if listener.is_some() {
            tracing::info!("{}: listening", opening.name);
        }
        opening.listener = listener;
        Ok(opening)
    }

    /// Takes the place of a socket that a killed process left, but of nothing else.
    fn bind_unix(&self, path: &Path) -> Result<Listener, SocketsError> {
        if let Ok(found) = fs::symlink_metadata(path) {
            if !found.file_type().is_socket() {
                let source = io::Error::from(io::ErrorKind::AlreadyExists);
                return Err(self.error("listen: there is something that is no socket", source));
            }
            if UnixStream::connect(path).is_ok() {
                let source = io::Error::from(io::ErrorKind::AddrInUse);
                return Err(self.error("listen", source));
            }
            fs::remove_file(path).map_err(|e| self.error("replace a stale socket", e))?;
        }
        let listener = UnixListener::bind(path).map_err(|e| self.error("listen", e))?;
        Ok(Listener::Unix(listener, OwnPath(path.to_owned())))
    }

    /// Connects what is to be connected.
    pub(crate) fn connect(&mut self) -> Result<(), SocketsError> {
        if self.listener.is_some() || self.connected.is_some() {
            return Ok(());
        }
        let connected = match &self.address.place {
            Place::Unix(path) => UnixStream::connect(path).map(OwnedFd::from),
            Place::Tcp(place) => TcpStream::connect(place).and_then(without_delay),
        };
        self.connected = Some(connected.map_err(|e| self.error("connect", e))?);
        Ok(())
    }

    /// Waits for the peer where we listen. Gives the socket, set not to block.
    pub(crate) fn accept(self) -> Result<Socket, SocketsError> {
        let accepted = match (&self.listener, self.connected) {
            (_, Some(connected)) => Ok(connected),
            (Some(Listener::Unix(listener, _)), None) => listener.accept().map(|(s, _)| s.into()),
            (Some(Listener::Tcp(listener)), None) => listener
                .accept()
                .and_then(|(stream, _)| without_delay(stream)),
            (None, None) => Err(io::ErrorKind::NotConnected.into()),
        };
        let open = |source| SocketsError::Open {
            socket: self.name.clone(),
            what: "accept",
            source,
        };
        // `UnixStream` only for its setter: any socket will do.
        let stream = UnixStream::from(accepted.map_err(open)?);
        stream.set_nonblocking(true).map_err(open)?;
        tracing::info!("{}: connected", self.name);
        Ok(Socket {
            name: self.name,
            file: File::from(OwnedFd::from(stream)),
        })
    }

    fn error(&self, what: &'static str, source: io::Error) -> SocketsError {
        SocketsError::Open {
            socket: self.name.clone(),
            what,
            source,
        }
    }
}

fn nobody_listens(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

fn without_delay(stream: TcpStream) -> io::Result<OwnedFd> {
    stream.set_nodelay(true)?;
    Ok(stream.into())
}

/// A connected socket with the name that errors give it.
#[derive(Debug)]
pub(crate) struct Socket {
    pub(crate) name: String,
    pub(crate) file: File,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (End, Place) {
        let Address { end, place } = text.parse().unwrap();
        (end, place)
    }

    #[test]
    fn addresses_are_read_as_they_are_written() {
        let unix = |path: &str| Place::Unix(path.into());
        let tcp = |place: &str| Place::Tcp(place.into());
        assert_eq!(parsed("/run/p"), (End::Either, unix("/run/p")));
        assert_eq!(parsed("listen:p.sock"), (End::Listen, unix("p.sock")));
        assert_eq!(parsed("connect:/a:1/p"), (End::Connect, unix("/a:1/p")));
        assert_eq!(parsed("localhost:7"), (End::Either, tcp("localhost:7")));
        assert_eq!(parsed("listen:[::1]:7"), (End::Listen, tcp("[::1]:7")));
        for text in ["", "listen:", ":7", "host:port", "host:70000"] {
            assert!(text.parse::<Address>().is_err(), "{text:?}");
        }
        assert_eq!(
            "listen:/p".parse::<Address>().unwrap().to_string(),
            "listen:/p"
        );
    }

    fn meet(ours: &str, theirs: &str) -> Result<(), SocketsError> {
        // Bound on both sides, then connected on both, then accepted.
        let mut ours = Opening::bind("ours", &ours.parse()?)?;
        let mut theirs = Opening::bind("theirs", &theirs.parse()?)?;
        ours.connect()?;
        theirs.connect()?;
        ours.accept()?;
        theirs.accept()?;
        Ok(())
    }

    #[test]
    fn two_ends_meet_and_leave_no_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let text = path.display();
        for ours in ["", "listen:"] {
            for theirs in ["", "connect:"] {
                meet(&format!("{ours}{text}"), &format!("{theirs}{text}")).unwrap();
                assert!(!path.exists());
            }
        }
        let free = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        meet(&format!("listen:{free}"), &free.to_string()).unwrap();
    }

    #[test]
    fn a_stale_socket_is_replaced_and_nothing_else_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let text = format!("listen:{}", path.display());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        meet(&text, &path.display().to_string()).unwrap();

        let _somebody = UnixListener::bind(&path).unwrap();
        let error = meet(&text, "").unwrap_err().to_string();
        assert!(
            error.contains("cannot listen") && error.contains("ours (listen:"),
            "{error}"
        );
        fs::remove_file(&path).unwrap();

        fs::write(&path, "a file").unwrap();
        let error = meet(&text, "").unwrap_err().to_string();
        assert!(error.contains("no socket"), "{error}");
        assert!(path.exists());
    }

    #[test]
    fn a_path_where_nobody_listens_cannot_be_connected_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let address = format!("connect:{}", path.display());
        let error = meet(&address, &address).unwrap_err().to_string();
        assert!(
            error.starts_with("ours (connect:/") && error.contains("cannot connect"),
            "{error}"
        );
        let no_directory = format!("listen:{}", path.join("x").display());
        assert!(meet(&no_directory, "").is_err());
    }
}
