//! Datagrams of the packet channel over UDP: many per system call.
//!
//! Invariants: every slot is free, received or lent; the kernel writes into free slots only, and only during a call.
//!
//! Looks at no datagram: what comes from elsewhere is the reliable layer's to refuse.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};

use super::datagram::HEADER_BYTES;
use super::msg::HEAD_BYTES;
use super::port::{DatagramPort, PortAddress, Slot};
use super::reliable::RECEIVE_WINDOW;

/// Datagrams per system call.
const BATCH: usize = 32;
/// Datagrams kept for one flush.
const SEND_MAX: usize = 256;
/// Slots beside those that the receive window can hold: for acknowledgements and what is refused.
const SPARE_SLOTS: usize = 64;
const BUFFER_BYTES: libc::c_int = 8 << 20;
const MTU_MIN: usize = 576;
/// The longest frame of a guest with the largest `net.mtu`, with what is put before it, over IPv6.
const MTU_MAX: usize = 9216 + 14 + HEAD_BYTES + HEADER_BYTES + 40 + 8;

/// A UDP socket between the two ends of a TCP connection.
#[derive(Debug)]
pub struct UdpPort {
    socket: UdpSocket,
    address: SocketAddr,
    peer: libc::sockaddr_storage,
    peer_len: libc::socklen_t,
    mtu: usize,
    slots: Box<[u8]>,
    lens: Box<[usize]>,
    free: Vec<u32>,
    received: VecDeque<u32>,
    out: Box<[u8]>,
    out_lens: VecDeque<usize>,
    out_first: usize,
    /// This look has found all that there was.
    is_drained: bool,
    calls: u64,
    errors: u64,
}

impl UdpPort {
    /// On the local address of `stream`, for datagrams that its path takes whole.
    pub fn beside(stream: &TcpStream) -> io::Result<Self> {
        let local = stream.local_addr()?;
        let socket = UdpSocket::bind(with_port(local, 0))?;
        socket.set_nonblocking(true)?;
        for option in [libc::SO_RCVBUF, libc::SO_SNDBUF] {
            // Less is only slower.
            let _ = set_option(socket.as_raw_fd(), option, BUFFER_BYTES);
        }
        // More than the administrator's limit needs a privilege.
        let _ = set_option(socket.as_raw_fd(), libc::SO_RCVBUFFORCE, BUFFER_BYTES);
        let headers = if local.is_ipv4() { 20 + 8 } else { 40 + 8 };
        let mtu = path_mtu(stream)?.clamp(MTU_MIN, MTU_MAX) - headers;
        let count = RECEIVE_WINDOW + SPARE_SLOTS;
        let address = socket.local_addr()?;
        let (peer, peer_len) = raw_address(address);
        Ok(Self {
            socket,
            address,
            peer,
            peer_len,
            mtu,
            slots: vec![0; count * mtu].into_boxed_slice(),
            lens: vec![0; count].into_boxed_slice(),
            free: (0..count as u32).collect(),
            received: VecDeque::with_capacity(count),
            out: vec![0; SEND_MAX * mtu].into_boxed_slice(),
            out_lens: VecDeque::with_capacity(SEND_MAX),
            out_first: 0,
            is_drained: false,
            calls: 0,
            errors: 0,
        })
    }

    /// Sends up to a batch of what waits. `Ok(0)`: the socket has no room.
    fn send_batch(&mut self) -> io::Result<usize> {
        let count = self.out_lens.len().min(BATCH);
        let mut vectors = [empty_vector(); BATCH];
        let mut messages = [empty_message(); BATCH];
        for (n, len) in self.out_lens.iter().take(count).enumerate() {
            let at = (self.out_first + n) % SEND_MAX * self.mtu;
            vectors[n].iov_base = self.out[at..at + len].as_mut_ptr().cast();
            vectors[n].iov_len = *len;
            messages[n].msg_hdr.msg_iov = &raw mut vectors[n];
            messages[n].msg_hdr.msg_iovlen = 1;
            messages[n].msg_hdr.msg_name = (&raw mut self.peer).cast();
            messages[n].msg_hdr.msg_namelen = self.peer_len;
        }
        let fd = self.socket.as_raw_fd();
        self.calls += 1;
        // SAFETY: `count` messages are initialised; each points to one vector of `vectors` and to `self.peer`, and each
        // vector to bytes inside `self.out`. All of them live, unchanged, through the call; the kernel only reads.
        let n = unsafe {
            libc::sendmmsg(
                fd,
                messages.as_mut_ptr(),
                count as libc::c_uint,
                libc::MSG_DONTWAIT,
            )
        };
        outcome(n)
    }

    /// Receives a batch into free slots; how many.
    fn receive_batch(&mut self) -> io::Result<usize> {
        let count = self.free.len().min(BATCH);
        let mut vectors = [empty_vector(); BATCH];
        let mut messages = [empty_message(); BATCH];
        let free = self.free.len();
        for (n, slot) in self.free[free - count..].iter().rev().enumerate() {
            let at = *slot as usize * self.mtu;
            vectors[n].iov_base = self.slots[at..at + self.mtu].as_mut_ptr().cast();
            vectors[n].iov_len = self.mtu;
            messages[n].msg_hdr.msg_iov = &raw mut vectors[n];
            messages[n].msg_hdr.msg_iovlen = 1;
        }
        let fd = self.socket.as_raw_fd();
        self.calls += 1;
        // SAFETY: `count` messages are initialised; each points to one vector of `vectors`, which points to one free slot
        // of `self.slots`; different slots do not overlap. All of them live through the call, nothing else uses them.
        let n = unsafe {
            libc::recvmmsg(
                fd,
                messages.as_mut_ptr(),
                count as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let n = outcome(n)?;
        for message in &messages[..n] {
            let Some(slot) = self.free.pop() else { break };
            self.lens[slot as usize] = message.msg_len as usize;
            self.received.push_back(slot);
        }
        self.is_drained = n < count;
        Ok(n)
    }

    fn failed(&mut self, error: &io::Error) {
        tracing::debug!("packet channel: UDP: {error}");
        self.errors += 1;
    }
}

impl DatagramPort for UdpPort {
    fn address(&self) -> PortAddress {
        PortAddress::Udp(self.address)
    }

    fn mtu(&self) -> usize {
        self.mtu
    }

    fn set_peer(&mut self, peer: PortAddress) {
        if let PortAddress::Udp(address) = peer {
            (self.peer, self.peer_len) = raw_address(address);
        }
    }

    fn has_room(&self) -> bool {
        self.out_lens.len() < SEND_MAX
    }

    fn send(&mut self, head: &[u8], payload: &[u8]) -> bool {
        let len = head.len() + payload.len();
        if !self.has_room() || len > self.mtu {
            return false;
        }
        let at = (self.out_first + self.out_lens.len()) % SEND_MAX * self.mtu;
        self.out[at..at + head.len()].copy_from_slice(head);
        self.out[at + head.len()..at + len].copy_from_slice(payload);
        self.out_lens.push_back(len);
        true
    }

    fn flush(&mut self) {
        while !self.out_lens.is_empty() {
            let n = match self.send_batch() {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => {
                    self.failed(&e);
                    1
                }
            };
            self.out_lens.drain(..n);
            self.out_first = (self.out_first + n) % SEND_MAX;
        }
    }

    fn look(&mut self) {
        self.is_drained = false;
    }

    fn receive(&mut self) -> Option<Slot> {
        if self.received.is_empty() && !self.is_drained {
            match self.receive_batch() {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => self.failed(&e),
            }
        }
        self.received.pop_front().map(Slot)
    }

    fn bytes(&self, slot: &Slot) -> &[u8] {
        let at = slot.0 as usize * self.mtu;
        &self.slots[at..at + self.lens[slot.0 as usize]]
    }

    fn release(&mut self, slot: Slot) {
        self.free.push(slot.0);
    }

    fn poll_fds(&self, fds: &mut Vec<libc::pollfd>) {
        let out = match self.out_lens.is_empty() {
            true => 0,
            false => libc::POLLOUT,
        };
        fds.push(libc::pollfd {
            fd: self.socket.as_raw_fd(),
            events: libc::POLLIN | out,
            revents: 0,
        });
    }

    fn errors(&self) -> u64 {
        self.errors
    }

    fn receive_drops(&self) -> u64 {
        // A socket that does not tell has told of none.
        dropped_by(self.socket.as_raw_fd()).unwrap_or(0).into()
    }

    fn calls(&self) -> u64 {
        self.calls
    }
}

/// The same host and scope, another port.
pub(super) fn with_port(address: SocketAddr, port: u16) -> SocketAddr {
    let mut address = address;
    address.set_port(port);
    address
}

fn outcome(n: libc::c_int) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

fn empty_vector() -> libc::iovec {
    libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }
}

fn empty_message() -> libc::mmsghdr {
    // SAFETY: integers and pointers only; all zero is a message without anything.
    unsafe { std::mem::zeroed() }
}

fn raw_address(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: integers only; all zero is the unspecified family.
    let mut raw: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let len = match address {
        SocketAddr::V4(v4) => {
            let at = (&raw mut raw).cast::<libc::sockaddr_in>();
            let address = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: `raw` is ours, larger than a `sockaddr_in` and aligned for all kinds of address.
            unsafe { at.write(address) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(v6) => {
            let at = (&raw mut raw).cast::<libc::sockaddr_in6>();
            let address = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr {
                    s6_addr: v6.ip().octets(),
                },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: `raw` is ours, larger than a `sockaddr_in6` and aligned for all kinds of address.
            unsafe { at.write(address) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (raw, len as libc::socklen_t)
}

fn set_option(fd: RawFd, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: reads one integer that lives through the call.
    let status = unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    outcome(status).map(drop)
}

/// Datagrams for a socket that the kernel had no room for.
fn dropped_by(fd: RawFd) -> io::Result<u32> {
    const DROPS: usize = libc::SK_MEMINFO_DROPS as usize;
    let mut words = [0_u32; DROPS + 1];
    let mut len = size_of_val(&words) as libc::socklen_t;
    // SAFETY: writes at most `len` bytes, words of the array, and the length, both on this stack.
    let status = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            words.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    outcome(status)?;
    Ok(words[DROPS])
}

/// What the kernel believes about the path of a connection.
fn path_mtu(stream: &TcpStream) -> io::Result<usize> {
    let (level, option) = match stream.peer_addr()?.ip() {
        IpAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU),
        IpAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let mut mtu: libc::c_int = 0;
    let mut len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: writes at most `len` bytes, one integer, and the length, both on this stack.
    let status = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            level,
            option,
            (&raw mut mtu).cast(),
            &raw mut len,
        )
    };
    outcome(status)?;
    Ok(usize::try_from(mtu).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::time::{Duration, Instant};

    use crate::link::{PacketLink, PacketMsg};

    const PATIENCE: Duration = Duration::from_secs(60);

    fn streams(address: &str) -> [TcpStream; 2] {
        let listener = TcpListener::bind(address).unwrap();
        let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        [a, listener.accept().unwrap().0]
    }

    fn ports(address: &str) -> [UdpPort; 2] {
        let mut ports = streams(address).map(|s| UdpPort::beside(&s).unwrap());
        let [a, b] = ports.each_ref().map(UdpPort::address);
        ports[0].set_peer(b);
        ports[1].set_peer(a);
        ports
    }

    #[test]
    fn batches_arrive_and_slots_come_back() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let [mut a, mut b] = ports(address);
            let slots = b.free.len();
            for round in 0..20u8 {
                let mut sent = 0;
                while a.has_room() && sent < 100 {
                    assert!(a.send(&[round, sent], &vec![sent; usize::from(sent) * 80]));
                    sent += 1;
                }
                let mut heard = 0;
                while heard < sent {
                    a.flush();
                    b.look();
                    let Some(slot) = b.receive() else { continue };
                    let bytes = b.bytes(&slot);
                    assert_eq!(bytes[..2], [round, heard]);
                    assert_eq!(bytes.len(), 2 + usize::from(heard) * 80);
                    assert!(bytes[2..].iter().all(|&byte| byte == heard));
                    b.release(slot);
                    heard += 1;
                }
            }
            assert_eq!(b.free.len() + b.received.len(), slots);
            assert_eq!((a.errors(), b.errors()), (0, 0));
        }
    }

    /// The kernel makes it as small as a socket may be.
    fn make_small(port: &UdpPort) {
        set_option(port.socket.as_raw_fd(), libc::SO_RCVBUF, 1).unwrap();
    }

    /// Each of them is received, or counted.
    #[test]
    fn what_a_full_socket_drops_is_counted() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let [mut a, mut b] = ports(address);
            assert_eq!(b.receive_drops(), 0);
            make_small(&b);
            let mut sent = 0;
            while sent < 5 * SEND_MAX as u64 || b.receive_drops() == 0 {
                while a.send(&[7], &[7; 1000]) {
                    sent += 1;
                }
                a.flush();
            }
            let mut heard = 0;
            while heard + b.receive_drops() < sent {
                a.flush();
                b.look();
                while let Some(slot) = b.receive() {
                    heard += 1;
                    b.release(slot);
                }
            }
            assert_eq!(heard + b.receive_drops(), sent);
            assert!(heard > 0 && b.receive_drops() > heard, "{heard} of {sent}");
            assert_eq!((a.errors(), b.errors(), a.receive_drops()), (0, 0, 0));
        }
    }

    /// What was dropped is sent again, and the channel's counters tell.
    #[test]
    fn a_channel_hears_all_though_its_socket_drops_some() {
        let mut links = streams("127.0.0.1:0").map(|stream| {
            let port = UdpPort::beside(&stream).unwrap();
            make_small(&port);
            PacketLink::with_ports(stream, vec![Box::new(port)], 5, 60_000_000).unwrap()
        });
        let (mut said, mut heard) = (0, 0);
        let begun = Instant::now();
        loop {
            let [near, far] = links.each_ref().map(PacketLink::stats);
            let is_dropped = near.retransmitted > 0 && far.receive_drops > 0;
            if is_dropped && heard == said {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "{near:?} {far:?}");
            let [near, far] = &mut links;
            // Several datagrams at once, of which the socket has room for one.
            for seq in 0..8 {
                if is_dropped || !near.has_room() {
                    break;
                }
                let frame = &[7; 1400];
                near.push(&PacketMsg::Input {
                    epoch: 1,
                    seq,
                    frame,
                });
                said += 1;
            }
            for link in [near, far] {
                link.flush().unwrap();
                link.fill().unwrap();
                while link.next_msg().unwrap().is_some() {
                    heard += 1;
                }
            }
        }
    }

    #[test]
    fn what_is_too_long_is_not_taken_and_without_slots_nothing_is_received() {
        let [mut a, mut b] = ports("127.0.0.1:0");
        assert!(!a.send(&[0; 48], &vec![0; a.mtu()]));
        let mut kept = Vec::new();
        while kept.len() < RECEIVE_WINDOW + SPARE_SLOTS {
            a.send(&[1], &[]);
            a.flush();
            b.look();
            kept.extend(b.receive());
        }
        a.send(&[2], &[]);
        a.flush();
        b.look();
        assert_eq!(b.receive(), None);
        b.release(kept.pop().unwrap());
        let slot = b.receive().unwrap();
        assert_eq!(b.bytes(&slot), [2]);
    }
}
