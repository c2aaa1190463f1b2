//! The packet channel of the link: mirrored input, SVM output and their acknowledgements.
//!
//! It begins on one TCP connection. When both ends have a datagram transport in common that proves to work, what they say
//! moves over to it: numbered units, acknowledged, sent again when lost (`reliable`). TCP stays: its end is the end of the
//! channel, and it carries everything again when datagrams do not arrive (`transport`). A peer of an earlier version
//! stays on TCP.
//!
//! Invariants: every message arrives once and in order, whatever carries it, or the channel ends. Buffers are bounded: the
//! writer asks [`PacketLink::has_room`] before it takes more work in.
//!
//! Does not interpret frames.

use std::cell::Cell;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};

use colo_compare::Token;

mod datagram;
mod digests;
mod heard;
mod msg;
mod offer;
mod open;
pub mod port;
mod reading;
mod reliable;
mod stats;
mod stream;
mod transport;
mod udp;
mod xdp;

#[cfg(test)]
mod tests;

use crate::clock::now_us;
use crate::frame::FramePool;
use crate::nic::Nic;
use crate::shard::Seat;
use msg::{BODY_MAX, HEAD_BYTES};
use port::DatagramPort;
use reading::Reading;
use stream::Stream;
use transport::Datagrams;
use transport::crossing::Crossing;

pub use digests::{BadEntry, DIGEST_MIN, DIGESTS_MAX, Digest, DigestReader, DigestWriter};
pub use heard::PeerHeard;
pub use msg::{Malformed, PacketMsg};
pub use open::{LinkEnd, Packets, Ports, open_all_ports, open_ports};
pub use stats::LinkStats;
pub(crate) use transport::crossing::DATAGRAM_BYTES_MAX;
pub use transport::crossing::LinkKeys;
pub use udp::UdpPort;
pub use xdp::{GuestNicPort, PoolMemory, XDP_SLOTS_MAX, XdpPort, XdpPortError};

/// While datagrams carry both directions, TCP is looked at this often, and after each wait for it.
const STREAM_LOOKS_US: u64 = 500;
/// Looks at the datagrams after the end of the connection; the receive window needs fewer.
const DRAINS_MAX: usize = 8;
/// So long a channel that is one of several shards' goes on after the end of its connection.
const CROSSING_END_US: u64 = 5_000;

/// Why the packet channel is unusable.
#[derive(Debug, thiserror::Error)]
pub enum PacketLinkError {
    /// The peer closed it.
    #[error("packet channel: closed by the peer")]
    Closed,
    /// The socket failed.
    #[error("packet channel: {0}")]
    Io(#[from] io::Error),
    /// The bytes are no message.
    #[error("packet channel: {0}")]
    Malformed(#[from] Malformed),
    /// Nor are the entries in it.
    #[error("packet channel: {0}")]
    BadEntry(#[from] BadEntry),
    /// A frame that is longer than the slots of this host.
    #[error(
        "packet channel: a frame of {len} bytes, at most {max} go into a slot; give both hosts the same net.mtu"
    )]
    LongFrame {
        /// Its length.
        len: usize,
        /// What a slot holds.
        max: usize,
    },
}

/// What a role is told.
#[derive(Debug)]
pub enum Incoming<'a> {
    /// [`PacketMsg::Input`], in a slot of the pool.
    Input {
        /// Epoch it was delivered in.
        epoch: u64,
        /// Its place in the order of delivery.
        seq: u64,
        /// From the Ethernet header on.
        token: Token,
    },
    /// [`PacketMsg::Output`], in a slot of the pool.
    Output {
        /// The SVM's epoch.
        epoch: u64,
        /// Names it in `Released`.
        seq: u64,
        /// From the Ethernet header on.
        token: Token,
    },
    /// Any other message.
    Msg(PacketMsg<'a>),
}

/// One end of the packet channel.
#[derive(Debug)]
pub struct PacketLink {
    stream: Stream,
    peer: Option<SocketAddr>,
    datagrams: Option<Box<Datagrams>>,
    /// Whether the peer's messages come as units.
    units: bool,
    reading: Reading,
    /// A message of several units, as far as it has come.
    whole: Vec<u8>,
    streamed_us: u64,
    /// What wakes a thread was asked for since.
    waited: Cell<bool>,
    eager: bool,
    /// The connection has ended, and what had come as datagrams was taken.
    drained: bool,
    drains: usize,
    ended_us: Option<u64>,
    frames: FrameCounts,
    transport_refusals: u64,
}

/// What became of received frames.
#[derive(Debug, Default)]
struct FrameCounts {
    in_place: u64,
    copied: u64,
    slot_waits: u64,
}

impl PacketLink {
    /// Over a connected stream alone, which becomes non-blocking.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        Self::with_ports(stream, Vec::new(), 0, 0)
    }

    /// Over a connected stream and the datagram transports that both ends have. `key`: a random number. Without hearing
    /// the peer over TCP for `patience_us`, nothing more is sent.
    pub fn with_ports(
        stream: TcpStream,
        ports: Vec<Box<dyn DatagramPort>>,
        key: u64,
        patience_us: u64,
    ) -> io::Result<Self> {
        // Gone already: the first read will say so.
        let peer = stream.peer_addr().ok();
        let datagrams =
            (!ports.is_empty()).then(|| Box::new(Datagrams::new(ports, key, patience_us)));
        let (reserve, whole) = match datagrams {
            Some(_) => (transport::TAKEN_BACK_MAX, HEAD_BYTES + BODY_MAX),
            None => (0, 0),
        };
        let mut stream = Stream::new(stream, reserve)?;
        if let Some(datagrams) = &datagrams {
            datagrams.offer(&mut stream);
        }
        Ok(Self {
            stream,
            peer,
            datagrams,
            units: false,
            reading: Reading::Nothing,
            whole: Vec::with_capacity(whole),
            streamed_us: 0,
            waited: Cell::new(false),
            eager: false,
            frames: FrameCounts::default(),
            transport_refusals: 0,
            drained: false,
            drains: 0,
            ended_us: None,
        })
    }

    /// The peer is heard on the control channel, too: that is as good as over this connection, which is then asked only when
    /// datagrams are not answered.
    #[must_use]
    pub fn beside(mut self, control: PeerHeard) -> Self {
        if let Some(datagrams) = &mut self.datagrams {
            datagrams.control = Some(control);
        }
        self
    }

    /// It is the channel of one of several shards, made with its key of these: datagrams may come to any of them.
    #[must_use]
    pub fn among(mut self, keys: LinkKeys, shard: usize) -> Self {
        if let Some(datagrams) = &mut self.datagrams {
            datagrams.crossing = Some(Crossing::new(keys, shard));
        }
        self
    }

    /// So many transports were wanted for it and could not be had.
    #[must_use]
    pub fn without(mut self, transports: u64) -> Self {
        self.transport_refusals = transports;
        self
    }

    /// Adds what to wait for.
    pub fn poll_fds(&self, fds: &mut Vec<libc::pollfd>) {
        self.waited.set(true);
        fds.push(self.stream.pollfd());
        if let Some(datagrams) = &self.datagrams {
            datagrams.poll_fds(fds);
        }
    }

    /// When [`Self::fill`] and [`Self::flush`] are to be called though nothing has come.
    pub fn deadline_us(&self) -> Option<u64> {
        let datagrams = self.datagrams.as_ref().filter(|_| !self.stream.is_ended());
        datagrams.and_then(|d| d.deadline_us())
    }

    /// Ends the connection.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.stream.shutdown(how)
    }

    /// From now on everything there is is read at once: nothing more is said.
    pub fn read_all(&mut self) {
        self.eager = true;
    }

    /// True while more may be pushed.
    pub fn has_room(&self) -> bool {
        match self.carrying() {
            Some(datagrams) => datagrams.has_room(),
            None => self.stream.has_room(),
        }
    }

    /// True while bytes wait for a socket.
    pub fn has_unsent(&self) -> bool {
        self.stream.has_unsent() || self.datagrams.as_ref().is_some_and(|d| d.has_unsent())
    }

    /// Takes a message to send; [`Self::flush`] sends it.
    pub fn push(&mut self, msg: &PacketMsg<'_>) {
        let encoded = msg.encode();
        match &mut self.datagrams {
            Some(datagrams) if datagrams.carries() => datagrams.push(encoded.head(), encoded.body),
            _ => self.stream.push(encoded.head(), encoded.body),
        }
    }

    /// Sends what the sockets take. An error comes from [`Self::fill`], after what the peer said before it.
    pub fn flush(&mut self) -> Result<(), PacketLinkError> {
        if let Some(datagrams) = self.datagrams.as_mut().filter(|_| !self.stream.is_ended()) {
            datagrams.flush(now_us(), &mut self.stream);
        }
        // Datagrams go first: a peer that hears an answer over TCP alone takes it that they are lost.
        if !self.has_written() {
            self.stream.flush();
        }
        Ok(())
    }

    /// Whether what was flushed is still to be given to the guest's NIC, and what goes over TCP waits for that.
    pub fn has_written(&self) -> bool {
        let datagrams = self.datagrams.as_ref();
        datagrams.is_some_and(|datagrams| datagrams.has_written())
    }

    /// Reads what the sockets have, as far as the buffers hold it. True if there was anything. Fails when the channel has
    /// ended and everything that came before was taken.
    pub fn fill(&mut self) -> Result<bool, PacketLinkError> {
        let Some(datagrams) = &mut self.datagrams else {
            let any = self.stream.fill();
            return self.end().map_or(Ok(any), Err);
        };
        let now_us = now_us();
        let mut any = !self.drained && datagrams.fill(now_us);
        let is_spared = self.units && datagrams.carries() && !self.eager;
        let spared_us = match is_spared && !self.waited.take() {
            true => STREAM_LOOKS_US,
            false => 0,
        };
        if now_us >= self.streamed_us + spared_us {
            self.streamed_us = now_us;
            any |= self.stream.fill();
        }
        if self.stream.is_ended() && !self.drained {
            // What was sent before the end of the connection has arrived by now; what comes later is not heard.
            let rest = (0..DRAINS_MAX).take_while(|_| datagrams.fill(now_us));
            any |= rest.count() > 0;
            self.drains += 1;
            self.drained = match datagrams.crossing {
                // It may have come to another shard, whose worker is about to hand it on.
                Some(_) => now_us >= *self.ended_us.get_or_insert(now_us) + CROSSING_END_US,
                // From the guest's NIC it comes in parts, and only what was fetched before this look.
                None if datagrams.shares_nic() => {
                    self.drains == DRAINS_MAX || (!any && self.drains > 1)
                }
                None => true,
            };
            any |= !self.drained;
        }
        match any {
            true => Ok(true),
            false => self.end().map_or(Ok(false), Err),
        }
    }

    /// The next whole message that was read.
    pub fn next_msg(&mut self) -> Result<Option<PacketMsg<'_>>, PacketLinkError> {
        let Some((head, place, range)) = self.locate()? else {
            return Ok(None);
        };
        Ok(Some(PacketMsg::decode(head, self.body(&place, range))?))
    }

    /// Lets a transport that shares the memory of this pool take the slots that it lacks, and one that uses this NIC, which is
    /// the same worker's, take what has come by it. To be called before [`Self::fill`], always with the same pool.
    pub fn take_in(&mut self, nic: &mut dyn Nic, frames: &mut FramePool) {
        if let Some(datagrams) = &mut self.datagrams {
            datagrams.take_in(nic, frames);
        }
    }

    /// Hands on what has come for other shards, and takes what has come to them for this one; after [`Self::take_in`]. Gives
    /// whether anything crossed; `None`: nothing ever does.
    pub(crate) fn cross(&mut self, seat: &mut Seat, frames: &mut FramePool) -> Option<bool> {
        self.datagrams.as_mut()?.cross(seat, frames)
    }

    /// Gives that NIC what [`Self::flush`] has said over it. True: there was no room for all of it; to be called again. When
    /// the NIC has sent it, [`Self::flush_stream`] is due.
    pub fn hand_over(&mut self, nic: &mut dyn Nic, frames: &mut FramePool) -> bool {
        let datagrams = self.datagrams.as_mut();
        datagrams.is_some_and(|datagrams| datagrams.hand_over(nic, frames))
    }

    /// Sends what the connection takes.
    pub fn flush_stream(&mut self) {
        self.stream.flush();
    }

    /// Gives all slots of the pool back.
    pub fn leave(mut self, frames: &mut FramePool) {
        if let Some(datagrams) = &mut self.datagrams {
            datagrams.leave(frames);
        }
    }

    /// The next whole message that was read. A frame is given in a slot of the pool: in the one where it was received,
    /// where that is possible, else as a copy. Nothing is read as long as no slot is free.
    pub fn next(
        &mut self,
        frames: &mut FramePool,
    ) -> Result<Option<Incoming<'_>>, PacketLinkError> {
        if frames.free_slots() == 0 {
            self.frames.slot_waits += 1;
            return Ok(None);
        }
        let Some((head, place, range)) = self.locate()? else {
            return Ok(None);
        };
        let (epoch, seq) = (head.epoch, head.seq);
        let is_input = match PacketMsg::decode(head, self.body(&place, range.clone()))? {
            PacketMsg::Input { .. } => true,
            PacketMsg::Output { .. } => false,
            _ => {
                let msg = PacketMsg::decode(head, self.body(&place, range))?;
                return Ok(Some(Incoming::Msg(msg)));
            }
        };
        let token = self.take_frame(&place, range, frames)?;
        Ok(Some(match is_input {
            true => Incoming::Input { epoch, seq, token },
            false => Incoming::Output { epoch, seq, token },
        }))
    }

    /// Counters.
    pub fn stats(&self) -> LinkStats {
        let mut stats = match &self.datagrams {
            Some(datagrams) => datagrams.stats(),
            None => LinkStats::default(),
        };
        stats.carrier = match self.carrying().and_then(|d| d.carrier()) {
            Some(kind) => kind.name(),
            None => "tcp",
        };
        stats.sent_bytes += self.stream.sent_bytes;
        stats.received_bytes += self.stream.received_bytes;
        stats.stream_calls = self.stream.calls;
        stats.frames_in_place = self.frames.in_place;
        stats.frames_copied = self.frames.copied;
        stats.slot_waits = self.frames.slot_waits;
        stats.transport_refusals = self.transport_refusals;
        stats
    }

    fn carrying(&self) -> Option<&Datagrams> {
        self.datagrams.as_deref().filter(|d| d.carries())
    }

    /// Why nothing more comes, if so.
    fn end(&mut self) -> Option<PacketLinkError> {
        let ready = |d: &Datagrams| self.units && d.core.receiver.is_ready();
        let more = !matches!(self.reading, Reading::Nothing)
            || self.datagrams.as_deref().is_some_and(ready);
        if more { None } else { self.stream.take_end() }
    }
}
