//! The socket of a vhost-user back-end and the thread that reads it.
//!
//! Invariants: one front-end at a time, the next one waits in the socket's queue; whatever a
//! front-end does, the rings are out of service when its connection ends; the socket file goes away
//! with the server.
//!
//! Does not see packets.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use tracing::{info, warn};
use vhost::vhost_user::{BackendReqHandler, Error, VhostUserBackendReqHandlerMut};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::lock::{Lock, Locked};
use crate::net_offer::NetOffer;

use super::device::Device;
use super::{GuestSide, VhostUserSnapshot, VhostUserStats};

/// The socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error("net.vhost_user: {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// Something else is there.
    #[error("net.vhost_user: {} exists and is not a socket; remove it", .0.display())]
    NotASocket(PathBuf),
    /// A call failed.
    #[error("net.vhost_user: {}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A device as the crate `vhost` asks for it. One thread takes it, for a request.
#[allow(
    clippy::disallowed_types,
    reason = "no packets: those are the worker's, which has the rings"
)]
type LockedDevice<G> = std::sync::Mutex<Device<G>>;

/// A listening back-end.
#[derive(Debug)]
pub struct VhostUserServer {
    shared: Arc<Shared>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

/// What the thread and its owner both see.
#[derive(Debug)]
struct Shared {
    stats: Arc<VhostUserStats>,
    stop: EventFd,
    stopping: AtomicBool,
    /// The connection, so that a request that never ends can be cut off.
    peer: Lock<Option<UnixStream>>,
}

impl VhostUserServer {
    /// Listens at `path` and serves whoever connects with `side`.
    pub fn bind<G: GuestSide>(path: &Path, side: G, offer: NetOffer) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Io {
            path: path.to_owned(),
            source,
        };
        let listener = listen(path)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let stats = Arc::new(VhostUserStats::default());
        let shared = Arc::new(Shared {
            stats: stats.clone(),
            stop: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(failed)?,
            stopping: AtomicBool::new(false),
            peer: Lock::new(None),
        });
        let device = Arc::new(LockedDevice::new(Device::new(side, offer, stats)));
        let of_thread = shared.clone();
        let thread = thread::Builder::new()
            .name("vhost-user".into())
            .spawn(move || of_thread.run(&listener, &device))
            .map_err(failed)?;
        Ok(Self {
            shared,
            path: path.to_owned(),
            thread: Some(thread),
        })
    }

    /// The counters of this moment.
    pub fn stats(&self) -> VhostUserSnapshot {
        self.shared.stats.snapshot()
    }

    /// Whether a front-end is there.
    pub fn is_connected(&self) -> bool {
        self.shared.peer().is_some()
    }
}

impl Drop for VhostUserServer {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // A full counter is a wake-up already.
        let _ = self.shared.stop.write(1);
        if let Some(peer) = &*self.shared.peer() {
            let _ = peer.shutdown(std::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the vhost-user thread panicked");
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Shared {
    fn peer(&self) -> Locked<'_, Option<UnixStream>> {
        self.peer.lock()
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    fn run<G: GuestSide>(&self, listener: &UnixListener, device: &Arc<LockedDevice<G>>) {
        while !self.is_stopping() {
            match listener.accept() {
                Ok((stream, _)) => self.connected(stream, device),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(listener.as_raw_fd());
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Too many descriptors, say: it may pass, but must not spin.
                Err(e) => {
                    warn!("net.vhost_user: no connection can be accepted: {e}");
                    thread::sleep(std::time::Duration::from_millis(100));
                }
            }
        }
    }

    fn connected<G: GuestSide>(&self, stream: UnixStream, device: &Arc<LockedDevice<G>>) {
        self.stats.connections.add(1);
        info!("vhost-user: a front-end connects");
        match stream
            .set_nonblocking(false)
            .and_then(|()| stream.try_clone())
        {
            Ok(clone) => *self.peer() = Some(clone),
            Err(e) => {
                warn!("vhost-user: the connection is of no use: {e}");
                return;
            }
        }
        let mut handler = BackendReqHandler::from_stream(stream, device.clone());
        let reason = loop {
            self.wait(handler.as_raw_fd());
            if self.is_stopping() {
                break "this side stops".to_owned();
            }
            let early = peek_enable(&handler);
            match handler.handle_request() {
                Ok(()) => self.stats.requests.add(1),
                // QEMU enables rings once it knows that there is such a request, and only later acknowledges
                // the feature, for which the crate waits.
                Err(Error::InactiveFeature(_)) if early.is_some() => {
                    self.stats.requests.add(1);
                    if let Some((index, on)) = early
                        && let Err(e) = locked(device).set_vring_enable(index, on)
                    {
                        self.stats.refused.add(1);
                        break format!("it is sent away: {e}");
                    }
                }
                Err(e @ (Error::Disconnected | Error::SocketBroken(_))) => break e.to_string(),
                Err(e) => {
                    self.stats.refused.add(1);
                    break format!("it is sent away: {e}");
                }
            }
        };
        *self.peer() = None;
        if locked(device).disconnected().is_err() {
            warn!("vhost-user: the packet worker has ended");
        }
        self.stats.disconnections.add(1);
        info!("vhost-user: the front-end is gone: {reason}");
    }

    /// Until the descriptor is readable or closed, or the owner stops.
    fn wait(&self, fd: libc::c_int) {
        let mut fds = [fd, self.stop.as_raw_fd()].map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        // SAFETY: two pollfds on this stack.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
    }
}

fn locked<G>(device: &LockedDevice<G>) -> MutexGuard<'_, Device<G>> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The ring and the wish of the request that waits, if it is one to enable or disable a ring.
fn peek_enable(connection: &impl AsRawFd) -> Option<(u32, bool)> {
    /// `VHOST_USER_SET_VRING_ENABLE`
    const CODE: u32 = 18;
    let mut words = [0_u32; 5];
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the buffer lives through the call and is as long as said; descriptors that come with the request
    // stay in the socket, as the call does not ask for them.
    let got = unsafe {
        let buffer = words.as_mut_ptr().cast();
        libc::recv(connection.as_raw_fd(), buffer, size_of_val(&words), flags)
    };
    let [code, _, size, index, on] = words;
    let whole = got == size_of_val(&words) as isize;
    (whole && code == CODE && size == 8 && on < 2).then_some((index, on == 1))
}

fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    let failed = |source| SocketError::Io {
        path: path.to_owned(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(SocketError::InUse(path.to_owned()));
        }
        Ok(_) => std::fs::remove_file(path).map_err(failed)?,
        Err(_) => {}
    }
    UnixListener::bind(path).map_err(failed)
}
