//! The joining side of the link: it connects all channels, and streams of pages anew when those it had broke.
//!
//! Invariant: nobody waits for the primary longer than the preamble may take.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::{
    AGAIN, Channels, LinkError, More, PAGE_STREAMS_MAX, PREAMBLE_TIMEOUT, QUESTION, SHARDS_MAX,
    preamble,
};

/// Joins: connects all channels to a primary; `shards` is 1 to [`SHARDS_MAX`]. There are at most `page_streams` (up to
/// [`PAGE_STREAMS_MAX`]) streams of pages, or as many as the primary takes.
pub fn connect(
    address: SocketAddr,
    session: u64,
    shards: usize,
    page_streams: usize,
) -> Result<Channels, LinkError> {
    let open = |channel: u8, more: u8| open(address, channel, more, session);
    let open_all = || {
        let page_streams = match page_streams.clamp(1, PAGE_STREAMS_MAX) {
            1 => 1,
            wanted => answer(open(QUESTION, 0)?)?.clamp(1, wanted),
        };
        let more = More {
            shards: shards.clamp(1, SHARDS_MAX) - 1,
            page_streams: page_streams - 1,
        };
        let streams = (0..more.channels()).map(|channel| open(channel as u8, more.to_byte()));
        let streams = streams.collect::<io::Result<Vec<_>>>()?;
        let session_of = Channels::of(session, more, streams);
        session_of.ok_or_else(|| io::ErrorKind::NotConnected.into())
    };
    open_all().map_err(|source| LinkError::Connect { address, source })
}

/// Opens streams of pages anew, as many as there were, for a session that goes on; waits for the primary's word.
pub fn connect_pages_again(
    address: SocketAddr,
    session: u64,
    count: usize,
) -> Result<Vec<TcpStream>, LinkError> {
    let more = More {
        shards: 0,
        page_streams: count.clamp(1, PAGE_STREAMS_MAX) - 1,
    };
    let open = |stream: usize| open(address, AGAIN + stream as u8, more.to_byte(), session);
    let open_all = || {
        let streams = (0..=more.page_streams).map(open);
        let mut streams = streams.collect::<io::Result<Vec<_>>>()?;
        if let Some(first) = streams.first_mut() {
            first.set_read_timeout(Some(PREAMBLE_TIMEOUT))?;
            first.read_exact(&mut [0])?;
            first.set_read_timeout(None)?;
        }
        Ok(streams)
    };
    open_all().map_err(|source| LinkError::Connect { address, source })
}

fn open(address: SocketAddr, channel: u8, more: u8, session: u64) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&address, PREAMBLE_TIMEOUT)?;
    stream.set_nodelay(true)?;
    stream.write_all(&preamble(channel, more, session))?;
    Ok(stream)
}

/// How many streams of pages a primary takes; one if it closes the question.
fn answer(mut question: TcpStream) -> io::Result<usize> {
    question.set_read_timeout(Some(PREAMBLE_TIMEOUT))?;
    let mut byte = [0];
    match question.read_exact(&mut byte) {
        Ok(()) => Ok(usize::from(byte[0])),
        Err(e) => match e.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => Ok(1),
            _ => Err(e),
        },
    }
}
