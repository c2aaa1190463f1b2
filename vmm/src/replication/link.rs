//! The link between the two hosts: the TCP channels of one session.
//!
//! Each channel starts with a preamble `"COLOLINK" version:u16 channel:u8 more:u8 session:u64` (little-endian), which
//! the joining side sends. Channel 0, *control*, carries [`colo_control::Msg`]; 1, *packets*, mirrored input and SVM
//! output of the first shard; 2, *pages*, checkpoints; from 3 on the packets of further shards, then further streams of
//! the pages: as many as the lower and the upper four bits of `more` say. Separate channels, so that bulk pages never
//! stand before a heartbeat or a packet.
//!
//! Who joins and wants several streams of pages asks first, on a connection of its own with channel 255, and gets one
//! byte: how many the primary takes at most. A primary that does not know the question closes it, and there is one
//! stream (rule 22).
//!
//! Streams of pages that broke are opened anew (`again`) while the session goes on: channels 240 and up, of the same session,
//! all of them answered by one byte on the first. A primary that does not know them closes them, and the session ends.
//!
//! Does not interpret what the channels carry. What the joining side does is in `dial`, what the primary does in `listener`.

mod dial;
mod listener;

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

pub use dial::{connect, connect_pages_again};
pub use listener::Listener;

const MAGIC: &[u8; 8] = b"COLOLINK";
const PREAMBLE_LEN: usize = 8 + 2 + 1 + 1 + 8;
const LINK_VERSION: u16 = 1;
/// A peer that has not sent its preamble and all channels by then is dropped.
const PREAMBLE_TIMEOUT: Duration = Duration::from_secs(2);
/// Shards of a VM at most.
pub const SHARDS_MAX: usize = 8;
/// Streams of a session's pages at most.
pub const PAGE_STREAMS_MAX: usize = 8;
/// Channels besides the packets of further shards and further streams of pages.
const CHANNELS: usize = 3;
/// Streams of pages of a session that goes on, in the place of broken ones.
const AGAIN: u8 = 240;
/// Not a channel: how many streams of pages does the primary take?
const QUESTION: u8 = 255;

/// Why a link could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The listening address can't be used.
    #[error(
        "replication.link_listen {address}: {source}; choose an address of this host and a free port"
    )]
    Listen {
        /// From the configuration.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// The peer can't be reached.
    #[error("replication.link_peer {address}: {source}; is the primary running?")]
    Connect {
        /// From the configuration.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
}

/// The connected channels.
#[derive(Debug)]
pub struct Channels {
    /// The session that the joining side chose.
    pub session: u64,
    /// Control messages.
    pub control: TcpStream,
    /// Packets, of each shard.
    pub packets: Vec<TcpStream>,
    /// Checkpoints, on one stream or more.
    pub pages: Vec<TcpStream>,
}

/// How many channels there are besides one of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct More {
    shards: usize,
    page_streams: usize,
}

impl More {
    fn to_byte(self) -> u8 {
        (self.shards | self.page_streams << 4) as u8
    }

    fn from_byte(byte: u8) -> Self {
        Self {
            shards: usize::from(byte & 0xf),
            page_streams: usize::from(byte >> 4),
        }
    }

    fn channels(self) -> usize {
        CHANNELS + self.shards + self.page_streams
    }
}

impl Channels {
    fn of(session: u64, more: More, streams: Vec<TcpStream>) -> Option<Self> {
        let mut streams = streams.into_iter();
        let control = streams.next()?;
        let mut packets = vec![streams.next()?];
        let mut pages = vec![streams.next()?];
        packets.extend(streams.by_ref().take(more.shards));
        pages.extend(streams);
        Some(Self {
            session,
            control,
            packets,
            pages,
        })
    }
}

fn preamble(channel: u8, more: u8, session: u64) -> [u8; PREAMBLE_LEN] {
    let mut out = [0; PREAMBLE_LEN];
    out[..8].copy_from_slice(MAGIC);
    out[8..10].copy_from_slice(&LINK_VERSION.to_le_bytes());
    out[10] = channel;
    out[11] = more;
    out[12..].copy_from_slice(&session.to_le_bytes());
    out
}
