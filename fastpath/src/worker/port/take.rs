//! Frames out of the guest's transmit queue: in place, or copied.
//!
//! Invariants: the length of a chain and what its header asks for are checked before any of it is used; a buffer whose frame
//! was copied is the guest's again at once, also when the frame was of no use.
//!
//! Does not know what becomes of the frames.

use colo_compare::{HEADER_MAX, Token};

use crate::frame::{Buffer, CopyCause, FramePool, IN_PLACE_MIN, PIECES_MAX};
use crate::ring::{Chain, GuestBytes, GuestRam, RingError, Segment, Virtqueue};

use super::super::offload::Request;
use super::{FRAME_MIN, NET_HEADER_BYTES, Queues};

/// What of a frame of the guest stays in the guest's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stays {
    /// Nothing, for this reason.
    Nothing(CopyCause),
    /// All behind the header, of long frames.
    Payload,
    /// All of long frames that the guest has completed and that lie in one piece, of others what lies behind
    /// the header: for who looks at none.
    Whole,
}

impl Stays {
    /// Why a frame of this length is copied whatever its buffers are like, if it is. A short one would be without pressure,
    /// too.
    #[inline]
    fn cause_of_copy(self, len: usize) -> Option<CopyCause> {
        match self {
            Self::Payload | Self::Whole | Self::Nothing(CopyCause::Pressure)
                if len < IN_PLACE_MIN =>
            {
                Some(CopyCause::Small)
            }
            Self::Nothing(cause) => Some(cause),
            Self::Payload | Self::Whole => None,
        }
    }
}

/// Where a frame of the guest is to go.
pub(super) struct Out<'a> {
    pub(super) frames: &'a mut FramePool,
    /// Longest frame.
    pub(super) max: usize,
    pub(super) life: u32,
    pub(super) stays: Stays,
}

/// What was at the front of the queue.
pub(super) enum Taken {
    Nothing,
    Bad,
    /// The frame, its length, why it was copied if it was.
    Frame(Token, usize, Option<CopyCause>),
}

/// Takes what is there.
pub(super) fn take(
    queues: &mut Queues,
    chain: &mut Chain,
    ram: &GuestRam,
    out: Out<'_>,
) -> Result<Taken, RingError> {
    let queue = &mut queues.guest_tx;
    let checksum = queues.checksum;
    let is_waiting = match out.stays {
        Stays::Whole => queue.pop_and_fetch(chain, NET_HEADER_BYTES + IN_PLACE_MIN)?,
        Stays::Payload | Stays::Nothing(_) => queue.pop(chain)?,
    };
    if !is_waiting {
        return Ok(Taken::Nothing);
    }
    if !chain.writable().is_empty() {
        return Err(RingError::Direction);
    }
    if let [segment] = *chain.readable()
        && (segment.len as usize) < NET_HEADER_BYTES + IN_PLACE_MIN.min(out.max)
        && segment.len as usize >= NET_HEADER_BYTES + FRAME_MIN
    {
        let buffer = ram.view(segment.gpa, segment.len)?;
        let mut header = [0; NET_HEADER_BYTES];
        buffer.copy_to(0, &mut header);
        if Request::of(&header, checksum) == Request::Nothing {
            return take_short(queue, chain.head(), buffer, out);
        }
    }
    let total = Chain::bytes_of(chain.readable());
    let good = (NET_HEADER_BYTES + FRAME_MIN) as u64..=(NET_HEADER_BYTES + out.max) as u64;
    let mut request = Request::Refused;
    if good.contains(&total) {
        let mut header = [0; NET_HEADER_BYTES];
        copy_range(chain.readable(), ram, 0, &mut header)?;
        request = Request::of(&header, checksum);
    }
    if request == Request::Refused {
        queue.complete(chain.head(), 0)?;
        return Ok(Taken::Bad);
    }
    let len = total as usize - NET_HEADER_BYTES;
    let mut rest = [Segment { gpa: 0, len: 0 }; PIECES_MAX - 1];
    let cause = out.stays.cause_of_copy(len);
    if (cause, out.stays, request) == (None, Stays::Whole, Request::Nothing)
        && let Some([frame]) = behind(chain.readable(), NET_HEADER_BYTES, &mut rest)
    {
        return keep_whole(queue, chain.head(), *frame, out);
    }
    let front = NET_HEADER_BYTES + HEADER_MAX;
    let rest = match cause {
        Some(cause) => Err(cause),
        None => behind(chain.readable(), front, &mut rest).ok_or(CopyCause::Scattered),
    };
    let behind = rest.unwrap_or(&[]);
    let mut filled = Ok(false);
    let fill = |slot: &mut [u8], n: usize| {
        let held = &mut slot[..n];
        filled =
            copy_range(chain.readable(), ram, NET_HEADER_BYTES, held).and_then(
                |()| match request {
                    Request::Checksum(partial) => partial.complete(held, behind, ram),
                    Request::Nothing | Request::Refused => Ok(true),
                },
            );
        matches!(filled, Ok(true)).then_some(n)
    };
    let (token, cause) = place(out, chain.head(), rest, len, fill);
    filled?;
    // What is not in place is the guest's again, also when it was of no use.
    if cause.is_some() || token.is_none() {
        queue.complete(chain.head(), 0)?;
    }
    match token {
        Some(token) => Ok(Taken::Frame(token, len, cause)),
        None => Ok(Taken::Bad),
    }
}

/// The common case of short frames: header and frame in one buffer, which is long enough and not too
/// long, and nothing asked for.
#[inline]
fn take_short(
    queue: &mut Virtqueue,
    head: u16,
    buffer: GuestBytes<'_>,
    out: Out<'_>,
) -> Result<Taken, RingError> {
    let len = buffer.len() - NET_HEADER_BYTES;
    let token = out.frames.fill(|slot| {
        buffer.copy_to(NET_HEADER_BYTES, &mut slot[..len]);
        Some(len)
    });
    // After the copy: it may show the guest that the buffer is its own again.
    queue.complete(head, 0)?;
    let cause = out.stays.cause_of_copy(len);
    Ok(token.map_or(Taken::Bad, |token| Taken::Frame(token, len, cause)))
}

/// A frame that nobody looks at: none of it is read here.
fn keep_whole(
    queue: &mut Virtqueue,
    head: u16,
    frame: Segment,
    out: Out<'_>,
) -> Result<Taken, RingError> {
    let life = out.life;
    match out.frames.keep_whole(Buffer { life, head }, frame) {
        Some(token) => Ok(Taken::Frame(token, frame.len as usize, None)),
        None => {
            queue.complete(head, 0)?;
            Ok(Taken::Bad)
        }
    }
}

/// Makes a frame in place if it may stay there, else a copy.
fn place(
    out: Out<'_>,
    head: u16,
    rest: Result<&[Segment], CopyCause>,
    len: usize,
    fill: impl FnOnce(&mut [u8], usize) -> Option<usize>,
) -> (Option<Token>, Option<CopyCause>) {
    let life = out.life;
    match rest {
        Ok(rest) => {
            let in_slot = |slot: &mut [u8]| fill(slot, HEADER_MAX);
            let token = out
                .frames
                .keep_in_place(Buffer { life, head }, rest, in_slot);
            (token, None)
        }
        Err(cause) => {
            let token = out.frames.fill(|slot| fill(slot, len));
            (token, Some(cause))
        }
    }
}

/// Copies `out.len()` bytes that begin `skip` bytes into the segments; the caller has checked that
/// they are there.
fn copy_range(
    segments: &[Segment],
    ram: &GuestRam,
    mut skip: usize,
    out: &mut [u8],
) -> Result<(), RingError> {
    let mut done = 0;
    for segment in segments {
        let len = segment.len as usize;
        if skip >= len {
            skip -= len;
            continue;
        }
        let n = (len - skip).min(out.len() - done);
        ram.read(segment.gpa + skip as u64, &mut out[done..done + n])?;
        done += n;
        skip = 0;
        if done == out.len() {
            break;
        }
    }
    Ok(())
}

/// What of the segments lies behind their first `skip` bytes; `None` when it is in too many pieces.
fn behind<'a>(
    segments: &[Segment],
    mut skip: usize,
    out: &'a mut [Segment],
) -> Option<&'a [Segment]> {
    let mut count = 0;
    for segment in segments {
        let len = segment.len as usize;
        if skip >= len {
            skip -= len;
            continue;
        }
        *out.get_mut(count)? = Segment {
            gpa: segment.gpa + skip as u64,
            len: segment.len - skip as u32,
        };
        count += 1;
        skip = 0;
    }
    Some(&out[..count])
}
