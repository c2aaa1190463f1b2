//! A TAP device as the guest's NIC.
//!
//! Invariants: no offloads and no packet information, so what is read and written is plain Ethernet
//! that the kernel has segmented and checksummed; the filter is in place before anything is read. The link
//! is looked after before each sleep and every so many batches. A device that is deleted is counted, and used
//! again when there is one of its name: meanwhile what is sent is lost, as on a wire.
//!
//! Does not configure addresses or bridges, and does not make a device again that somebody has deleted.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use colo_bpf::{attach_to_tap, detach_from_tap, drop_all, for_guest};

use colo_compare::{Frames, Token};
use tracing::{info, warn};

use super::rtnetlink::Rtnetlink;
use super::timer::Timer;
use super::{Filter, Nic, Sent, poll_for, read_frames};
use crate::counters;
use crate::frame::{FramePool, PIECES_MAX};
use crate::lock::Lock;
use crate::ring::xsk::Interface;

const TUN_PATH: &str = "/dev/net/tun";

/// Batches between two looks for news of the link.
const LOOK_BATCHES: u32 = 256;

/// Between two attempts to use a device again that somebody else has, as who makes it does for a moment.
const RETRY_US: u64 = 50_000;

/// Frames that a device keeps for its reader at most, about (TUN_READQ_SIZE and more than one queue of it).
const WAITING_MAX: usize = 1024;

/// A TAP device could not be used. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is empty, too long or not printable.
    #[error("net.tap: \"{0}\" is not an interface name (1 to 15 printable characters, no '/')")]
    BadName(String),
    /// The control device is missing or closed to us.
    #[error("net.tap: {TUN_PATH}: {0}; run as root and load the tun module (modprobe tun)")]
    Control(#[source] io::Error),
    /// Not permitted.
    #[error("net.tap: no permission to attach to \"{0}\"; run as root or with CAP_NET_ADMIN")]
    NotPermitted(String),
    /// Another process has it.
    #[error("net.tap: \"{0}\" is in use by another process; stop it or name another interface")]
    Busy(String),
    /// The name belongs to something else.
    #[error("net.tap: \"{0}\" exists and is not a single-queue TAP device; name another one")]
    NotATap(String),
    /// The device exists and has one queue only, or is no TAP device.
    #[error(
        "net.tap: \"{name}\" exists and is not a TAP device with several queues, of which \
         host.shards = {queues} needs one each; make it with \
         `ip tuntap add dev {name} mode tap multi_queue`, or name another one"
    )]
    NotMultiQueue {
        /// The interface.
        name: String,
        /// How many queues are wanted.
        queues: usize,
    },
    /// Any other refusal.
    #[error("net.tap: cannot {action} \"{name}\": {source}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// The interface.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

counters! {
    /// What a TAP device has met with.
    TapStats => TapSnapshot {
        /// Frames not sent because the device was down or gone.
        tx_without_link,
        /// Times that the link went.
        link_losses,
        /// Times that the device itself went.
        nic_losses,
        /// Times that it came back.
        nic_returns,
        /// Attempts to use it again that failed.
        return_failures,
    }
}

/// An attached TAP device. A device that this made disappears with it.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    mtu: u16,
    /// How many queues the device must have, of which this is one.
    queues: usize,
    /// Of the device, whichever queue set it.
    filter: Arc<Lock<Filter>>,
    /// Of the device that `file` is attached to; `None`: it is gone.
    index: Option<u32>,
    link: Link,
    stats: TapStats,
}

/// What is known of the device's link.
#[derive(Debug)]
struct Link {
    news: Rtnetlink,
    is_up: bool,
    /// Batches until the next look; none are left after a sleep.
    batches_left: Cell<u32>,
    /// There is a device, and it could not be used: no news will tell.
    must_retry: bool,
    timer: Timer,
}

impl Link {
    /// Whether it is time to look and there is something new.
    fn has_news(&self) -> bool {
        let left = self.batches_left.get();
        if left > 0 {
            self.batches_left.set(left - 1);
            return false;
        }
        self.batches_left.set(LOOK_BATCHES);
        self.news.drain() | self.must_retry
    }
}

impl Tap {
    /// Attaches to the device `name`, making it when it does not exist, sets its MTU, filters it
    /// and brings it up.
    pub fn open(name: &str, mtu: u16, filter: Filter) -> Result<Self, TapError> {
        let mut tap = Self::attach(name, mtu, 1, &Arc::new(Lock::new(filter)))?;
        tap.bring_up()?;
        Ok(tap)
    }

    /// The same with `queues` queues, one for each shard. The filter is that of the device, whichever
    /// queue sets it; a flow comes by the queue that it was last sent by.
    pub fn open_queues(
        name: &str,
        mtu: u16,
        filter: Filter,
        queues: usize,
    ) -> Result<Vec<Self>, TapError> {
        let filter = Arc::new(Lock::new(filter));
        let mut taps = Vec::with_capacity(queues);
        for _ in 0..queues {
            taps.push(Self::attach(name, mtu, queues, &filter)?);
        }
        for tap in &mut taps {
            tap.bring_up()?;
        }
        Ok(taps)
    }

    /// What it has counted.
    pub fn stats(&self) -> &TapStats {
        &self.stats
    }

    /// One of the queues of a device, which need not be up.
    fn attach(
        name: &str,
        mtu: u16,
        queues: usize,
        filter: &Arc<Lock<Filter>>,
    ) -> Result<Self, TapError> {
        let plain = name.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || !plain {
            return Err(TapError::BadName(name.to_owned()));
        }
        let file = open_control()?;
        attach_queue(&file, name, queues)?;
        let refused = |source| TapError::Refused {
            action: "watch the link of",
            name: name.to_owned(),
            source,
        };
        let link = Link {
            news: Rtnetlink::open(false).map_err(refused)?,
            is_up: true,
            batches_left: Cell::new(0),
            must_retry: false,
            timer: Timer::new().map_err(refused)?,
        };
        Ok(Self {
            file,
            name: name.to_owned(),
            mtu,
            queues,
            filter: filter.clone(),
            index: None,
            link,
            stats: TapStats::default(),
        })
    }

    /// Filters before anything is read.
    fn bring_up(&mut self) -> Result<(), TapError> {
        self.attach_filter()
            .map_err(|e| self.refused("filter", e))?;
        // A device that was up already may have taken frames before (rule 24).
        let mut early = [0; 1];
        for _ in 0..WAITING_MAX {
            if self.file.read(&mut early).is_err() {
                break;
            }
        }
        self.configure()?;
        self.index = index_of(&self.name);
        self.link.is_up = self.is_up();
        Ok(())
    }

    /// Looks after the device, which somebody may have changed.
    fn look(&mut self) {
        let index = index_of(&self.name);
        if self.index.is_some() && index != self.index {
            self.lose();
        }
        if self.index.is_none() && index.is_some() {
            self.come_back();
        } else {
            self.link.must_retry = false;
        }
        let is_up = self.is_up();
        if self.link.is_up == is_up {
            return;
        }
        self.link.is_up = is_up;
        if is_up {
            info!("{}: the link is back", self.name);
        } else {
            self.stats.link_losses.add(1);
            warn!("{}: the link is gone", self.name);
        }
    }

    /// A device that is gone has no link either.
    fn is_up(&self) -> bool {
        self.index.is_some()
            && Interface::find(&self.name).is_ok_and(|it| it.has_link().unwrap_or(false))
    }

    /// The device is gone, and `file` with it.
    fn lose(&mut self) {
        warn!("{}: lost; it is used again when it is back", self.name);
        self.stats.nic_losses.add(1);
        self.index = None;
        // The next look finds out whether there is another one.
        self.link.batches_left.set(0);
    }

    /// Somebody has made another device of this name.
    fn come_back(&mut self) {
        let attached = open_control().and_then(|file| {
            // Gives up what an earlier attempt has got.
            self.file = file;
            attach_queue(&self.file, &self.name, self.queues)?;
            self.bring_up()
        });
        let had_failed = std::mem::replace(&mut self.link.must_retry, attached.is_err());
        match attached {
            Ok(()) => {
                self.stats.nic_returns.add(1);
                info!("{}: back", self.name);
            }
            Err(e) => {
                self.stats.return_failures.add(1);
                if !had_failed {
                    warn!("{}: still lost: {e}", self.name);
                }
            }
        }
    }

    fn attach_filter(&self) -> io::Result<()> {
        let fd = self.file.as_fd();
        // Held, so that no other queue attaches an older one afterwards.
        let filter = self.filter.lock();
        match *filter {
            Filter::Open => detach_from_tap(fd),
            Filter::Guest(mac) => attach_to_tap(fd, &for_guest(&[mac])),
            Filter::DropAll => attach_to_tap(fd, &drop_all()),
        }
        .map_err(io::Error::other)
    }

    fn configure(&self) -> Result<(), TapError> {
        let socket = control_socket().map_err(|e| self.refused("configure", e))?;
        let fd = socket.as_raw_fd();
        let mut request = request_for(&self.name);
        request.ifr_ifru.ifru_mtu = libc::c_int::from(self.mtu);
        interface_ioctl(fd, libc::SIOCSIFMTU, &mut request)
            .map_err(|e| self.refused("set the MTU of", e))?;
        interface_ioctl(fd, libc::SIOCGIFFLAGS, &mut request)
            .map_err(|e| self.refused("read the flags of", e))?;
        // SAFETY: SIOCGIFFLAGS has just filled this member of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
        interface_ioctl(fd, libc::SIOCSIFFLAGS, &mut request)
            .map_err(|e| self.refused("bring up", e))
    }

    fn refused(&self, action: &'static str, source: io::Error) -> TapError {
        TapError::Refused {
            action,
            name: self.name.clone(),
            source,
        }
    }
}

impl Nic for Tap {
    fn name(&self) -> &str {
        &self.name
    }

    fn describe(&self) -> String {
        let lost = match (self.index, self.link.is_up) {
            (None, _) => ", lost",
            (_, false) => ", no link",
            _ => "",
        };
        format!("tap {}{lost}", self.name)
    }

    fn receive(
        &mut self,
        frames: &mut FramePool,
        out: &mut VecDeque<Token>,
        max: usize,
    ) -> io::Result<()> {
        if self.index.is_none() {
            return Ok(());
        }
        let file = &mut self.file;
        let read = read_frames(frames, out, max, |buf| file.read(buf));
        if read.as_ref().is_err_and(is_gone) {
            self.lose();
        }
        read
    }

    fn send(&mut self, frames: &mut FramePool, token: Token) -> Sent {
        if self.index.is_none() {
            self.stats.tx_without_link.add(1);
            frames.release(token);
            return Sent::Refused(io::Error::from_raw_os_error(libc::ENETDOWN));
        }
        let sent = write_pieces(self.file.as_raw_fd(), frames, &token);
        match sent {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Sent::Full(token),
            _ => frames.release(token),
        }
        let Err(e) = sent else { return Sent::Done };
        if is_gone(&e) {
            self.lose();
        }
        if is_gone(&e) || e.raw_os_error() == Some(libc::EIO) {
            self.stats.tx_without_link.add(1);
        }
        Sent::Refused(e)
    }

    fn flush(&mut self, _frames: &mut FramePool) -> io::Result<()> {
        if self.link.has_news() {
            self.look();
        }
        Ok(())
    }

    fn poll_fds(&self, wants_frames: bool, wants_room: bool, fds: &mut Vec<libc::pollfd>) {
        if self.index.is_some() {
            // Without a device it would say at once that it has failed.
            fds.extend(poll_for(self.file.as_raw_fd(), wants_frames, wants_room));
        }
        fds.extend(poll_for(self.link.news.poll_fd(), true, false));
        if self.link.must_retry && self.link.timer.arm(RETRY_US).is_ok() {
            fds.extend(poll_for(self.link.timer.poll_fd(), true, false));
        }
        self.link.batches_left.set(0);
    }

    fn has_link(&self) -> bool {
        self.index.is_some() && self.link.is_up
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.stats.snapshot().entries()
    }

    fn set_filter(&mut self, filter: Filter) -> io::Result<()> {
        *self.filter.lock() = filter;
        match self.attach_filter() {
            // It holds when there is a device again.
            Err(_) if self.index.is_none() => Ok(()),
            set => set,
        }
    }
}

fn open_control() -> Result<File, TapError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN_PATH)
        .map_err(TapError::Control)
}

/// Makes `file` one more queue of the device `name`.
fn attach_queue(file: &File, name: &str, queues: usize) -> Result<(), TapError> {
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI;
    if queues > 1 {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    let mut request = request_for(name);
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    interface_ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request)
        .map_err(|e| attach_error(name, queues, e))
}

fn index_of(name: &str) -> Option<u32> {
    Some(Interface::find(name).ok()?.index())
}

/// What a read or write says when the device was deleted.
fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADFD)
}

/// Writes a frame from where it lies: one frame is one write.
fn write_pieces(fd: RawFd, frames: &mut FramePool, token: &Token) -> io::Result<()> {
    let pieces = frames.pieces(token);
    let mut list = [libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }; PIECES_MAX];
    for (to, piece) in list.iter_mut().zip(pieces.as_slice()) {
        to.iov_base = piece.address.cast_mut().cast();
        to.iov_len = piece.len;
    }
    let count = pieces.as_slice().len() as libc::c_int;
    // SAFETY: the pieces are mapped as long as the token's frame is not released, which is after
    // this call; the kernel only reads them.
    let written = unsafe { libc::writev(fd, list.as_ptr(), count) };
    if written < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn attach_error(name: &str, queues: usize, source: io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => TapError::NotPermitted(name),
        Some(libc::EBUSY) => TapError::Busy(name),
        Some(libc::EINVAL) if queues > 1 => TapError::NotMultiQueue { name, queues },
        Some(libc::EINVAL) => TapError::NotATap(name),
        _ => TapError::Refused {
            action: "attach to",
            name,
            source,
        },
    }
}

fn request_for(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain data for which all zeroes is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn interface_ioctl(fd: RawFd, command: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: every command used here takes an ifreq, which is exclusively borrowed for the call.
    if unsafe { libc::ioctl(fd, command, &raw mut *request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: plain system call that gives a new descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made by the kernel and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
#[path = "tap_tests.rs"]
mod tests;
