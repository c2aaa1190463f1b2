//! Frames into the guest's receive queue, one buffer each.
//!
//! Invariants: a buffer that is too short goes back untouched; every byte goes through [`GuestRam::write`] (rule 15).
//!
//! Does not spread a frame over several buffers.

use crate::ring::{Chain, GuestRam, RingError, Segment, Virtqueue};

use super::NET_HEADER_BYTES;

/// `virtio_net_hdr.flags`: the checksum has been verified.
const DATA_VALID: u8 = 2;

/// What became of a frame for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It is in the guest's memory.
    Done,
    /// The guest has no buffer (or no driver): keep the frame.
    NoRoom,
    /// The guest's buffer is smaller than the frame, which is lost.
    TooSmall,
}

/// Puts a frame into one buffer of the guest.
pub(super) fn deliver(
    queue: &mut Virtqueue,
    chain: &mut Chain,
    ram: &GuestRam,
    frame: &[u8],
    verified: bool,
) -> Result<Delivery, RingError> {
    if !queue.pop(chain)? {
        return Ok(Delivery::NoRoom);
    }
    if !chain.readable().is_empty() {
        return Err(RingError::Direction);
    }
    let need = NET_HEADER_BYTES + frame.len();
    if Chain::bytes_of(chain.writable()) < need as u64 {
        queue.undo_pop();
        return Ok(Delivery::TooSmall);
    }
    let header = header_of(1, verified);
    let mut at = 0;
    for segment in chain.writable() {
        at += scatter(ram, *segment, at, &header, frame)?;
    }
    queue.complete(chain.head(), need as u32)?;
    Ok(Delivery::Done)
}

/// `virtio_net_hdr` in front of a frame for the guest (virtio 1.3 section 5.1.6.4.1).
pub(in crate::worker) fn header_of(buffers: u16, verified: bool) -> [u8; NET_HEADER_BYTES] {
    let mut header = [0; NET_HEADER_BYTES];
    if verified {
        header[0] = DATA_VALID;
    }
    header[10..].copy_from_slice(&buffers.to_le_bytes());
    header
}

/// Writes what belongs into one segment, `at` bytes into header and frame. Gives how much.
pub(in crate::worker) fn scatter(
    ram: &GuestRam,
    segment: Segment,
    at: usize,
    header: &[u8],
    frame: &[u8],
) -> Result<usize, RingError> {
    let room = segment.len as usize;
    let head = header.get(at..).unwrap_or(&[]);
    let head = &head[..head.len().min(room)];
    ram.write(segment.gpa, head)?;
    let body = &frame[(at + head.len())
        .saturating_sub(header.len())
        .min(frame.len())..];
    let body = &body[..body.len().min(room - head.len())];
    ram.write(segment.gpa + head.len() as u64, body)?;
    Ok(head.len() + body.len())
}
