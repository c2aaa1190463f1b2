//! A UDP socket that sends and receives datagrams in batches, one system call for each.
//!
//! Invariants: all memory is taken at the start; what is received lies in buffers of its own, cut to
//! its length.
//!
//! Does not know what the datagrams say.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

/// Datagrams in one system call.
pub(crate) const BATCH: usize = 32;
/// Room for a received datagram.
const SLOT_BYTES: usize = 2048;
/// Whatever is under way fits: nothing is lost here.
const SOCKET_BUFFER_BYTES: libc::c_int = 8 << 20;
/// How long [`BatchSocket::receive`] waits.
pub(crate) const PATIENCE: Duration = Duration::from_millis(200);

/// A socket with a peer.
#[derive(Debug)]
pub(crate) struct BatchSocket {
    socket: UdpSocket,
    datagram_bytes: usize,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    lengths: [usize; BATCH],
}

impl BatchSocket {
    /// Connects to `target`, for datagrams of one length.
    pub(crate) fn connect(target: SocketAddr, datagram_bytes: usize) -> io::Result<Self> {
        let any: IpAddr = match target {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(target)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
            enlarge(&socket, option)?;
        }
        Ok(Self {
            socket,
            datagram_bytes,
            outgoing: vec![0; BATCH * datagram_bytes],
            incoming: vec![0; BATCH * SLOT_BYTES],
            lengths: [0; BATCH],
        })
    }

    /// The next batch's datagrams.
    pub(crate) fn outgoing(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.outgoing.chunks_exact_mut(self.datagram_bytes)
    }

    /// Sends the first `count` datagrams of [`Self::outgoing`] and gives how many were taken.
    pub(crate) fn send(&mut self, count: usize) -> io::Result<usize> {
        let mut vectors = Vectors::new(&mut self.outgoing, self.datagram_bytes);
        let sent = vectors.transfer(count, |messages, count| {
            // SAFETY: the first `count` headers point to vectors and buffers that are exclusively
            // borrowed for this call; the kernel reads them only during it.
            unsafe { libc::sendmmsg(self.socket.as_raw_fd(), messages, count, 0) }
        });
        or_none(sent)
    }

    /// Receives what is there, up to [`BATCH`] datagrams; with `wait`, waits [`PATIENCE`] for the
    /// first. None is 0.
    pub(crate) fn receive(&mut self, wait: bool) -> io::Result<usize> {
        let flags = match wait {
            true => libc::MSG_WAITFORONE,
            false => libc::MSG_DONTWAIT,
        };
        let mut vectors = Vectors::new(&mut self.incoming, SLOT_BYTES);
        let no_limit = std::ptr::null_mut();
        let received = vectors.transfer(BATCH, |messages, count| {
            // SAFETY: as for `send`; the kernel writes the buffers within their lengths.
            unsafe { libc::recvmmsg(self.socket.as_raw_fd(), messages, count, flags, no_limit) }
        });
        let received = or_none(received)?;
        for (length, message) in self.lengths.iter_mut().zip(&vectors.messages) {
            *length = (message.msg_len as usize).min(SLOT_BYTES);
        }
        Ok(received)
    }

    /// The first `count` datagrams of the last [`Self::receive`].
    pub(crate) fn received(&self, count: usize) -> impl Iterator<Item = &[u8]> {
        let slots = self.incoming.chunks_exact(SLOT_BYTES);
        let cut = slots.zip(self.lengths).map(|(slot, len)| &slot[..len]);
        cut.take(count)
    }

    /// Sleeps until something can be received, `at_most` so long.
    pub(crate) fn wait(&self, at_most: Duration) {
        let mut poll = libc::pollfd {
            fd: self.socket.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let at_most = libc::timespec {
            tv_sec: at_most.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(at_most.subsec_nanos()),
        };
        // SAFETY: one pollfd and one timespec on this stack; no signal mask is given.
        unsafe { libc::ppoll(&raw mut poll, 1, &raw const at_most, std::ptr::null()) };
    }
}

/// A batch as the kernel wants it described.
struct Vectors {
    vectors: [libc::iovec; BATCH],
    messages: [libc::mmsghdr; BATCH],
}

impl Vectors {
    /// For the equal pieces of `bytes`.
    fn new(bytes: &mut [u8], piece_bytes: usize) -> Self {
        let mut vectors = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; BATCH];
        for (vector, piece) in vectors.iter_mut().zip(bytes.chunks_exact_mut(piece_bytes)) {
            vector.iov_base = piece.as_mut_ptr().cast();
            vector.iov_len = piece.len();
        }
        // SAFETY: mmsghdr is plain data for which all zeroes is valid.
        let messages = unsafe { std::mem::zeroed() };
        Self { vectors, messages }
    }

    /// Calls the kernel for the first `count`; negative is its error.
    fn transfer(
        &mut self,
        count: usize,
        call: impl FnOnce(*mut libc::mmsghdr, libc::c_uint) -> libc::c_int,
    ) -> io::Result<usize> {
        for (message, vector) in self.messages.iter_mut().zip(&mut self.vectors) {
            message.msg_hdr.msg_iov = vector;
            message.msg_hdr.msg_iovlen = 1;
        }
        let done = call(self.messages.as_mut_ptr(), count.min(BATCH) as libc::c_uint);
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }
}

/// A full or empty socket, a signal, and a peer that was not there a moment ago (ICMP) are no errors.
fn or_none(done: io::Result<usize>) -> io::Result<usize> {
    use io::ErrorKind::{ConnectionRefused, Interrupted, WouldBlock};
    match done {
        Err(e) if [WouldBlock, Interrupted, ConnectionRefused].contains(&e.kind()) => Ok(0),
        done => done,
    }
}

fn enlarge(socket: &UdpSocket, option: libc::c_int) -> io::Result<()> {
    let bytes = SOCKET_BUFFER_BYTES;
    // SAFETY: the option's value is a live int of the given size, which the kernel reads.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const bytes).cast(),
            size_of_val(&bytes) as libc::socklen_t,
        )
    };
    match answer {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_arrive_whole_and_cut_to_length() {
        let peer = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        peer.set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let mut socket = BatchSocket::connect(peer.local_addr().unwrap(), 100).unwrap();
        assert_eq!(socket.receive(false).unwrap(), 0);
        for (n, datagram) in socket.outgoing().enumerate() {
            datagram.fill(n as u8);
        }
        assert_eq!(socket.send(5).unwrap(), 5);
        for n in 0..5 {
            let mut datagram = [0; 200];
            let (len, from) = peer.recv_from(&mut datagram).unwrap();
            assert_eq!(datagram[..len], [n; 100]);
            peer.send_to(&datagram[..10 + usize::from(n)], from)
                .unwrap();
        }
        let mut lengths = Vec::new();
        while lengths.len() < 5 {
            let count = socket.receive(true).unwrap();
            assert_ne!(count, 0, "{lengths:?}");
            for datagram in socket.received(count) {
                assert!(datagram.iter().all(|&byte| byte == datagram[0]));
                lengths.push(datagram.len());
            }
        }
        assert_eq!(lengths, [10, 11, 12, 13, 14]);
    }
}
