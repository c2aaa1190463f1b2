//! The checksum that a guest leaves to its device (`VIRTIO_NET_F_CSUM`, virtio 1.3 section 5.1.6.2).
//!
//! Invariants: a frame that leaves this module has its whole checksum, so comparator and wire see the same;
//! the place that the guest names is checked against what of the frame is in host memory.
//!
//! Does not parse frames: the guest says where the sum begins and where it goes.

use colo_compare::wire::checksum::OnesSum;

use crate::ring::{GuestRam, RingError, Segment};

use super::port::NET_HEADER_BYTES;

/// `virtio_net_hdr.flags`: the checksum is partial.
const NEEDS_CSUM: u8 = 1;

/// Bytes of the guest that are summed at a time.
const CHUNK_BYTES: usize = 512;

/// What a header asks the device to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Nothing,
    Checksum(PartialChecksum),
    /// Something that was not offered.
    Refused,
}

/// Where a checksum is to be completed, in bytes of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PartialChecksum {
    start: usize,
    field: usize,
}

impl Request {
    /// Reads a header; `checksum`: the feature was negotiated.
    #[inline]
    pub(super) fn of(header: &[u8; NET_HEADER_BYTES], checksum: bool) -> Self {
        let [flags, gso_type, _, _, _, _, s0, s1, o0, o1, ..] = *header;
        match (flags, gso_type) {
            (0, 0) => Self::Nothing,
            (NEEDS_CSUM, 0) if checksum => {
                let start = usize::from(u16::from_le_bytes([s0, s1]));
                let offset = usize::from(u16::from_le_bytes([o0, o1]));
                let field = start + offset;
                Self::Checksum(PartialChecksum { start, field })
            }
            _ => Self::Refused,
        }
    }
}

impl PartialChecksum {
    /// Completes the checksum of a frame whose first bytes are `held` and whose others lie in `rest`. `false`:
    /// the guest named a place that is not in the frame's first bytes.
    pub(super) fn complete(
        &self,
        held: &mut [u8],
        rest: &[Segment],
        ram: &GuestRam,
    ) -> Result<bool, RingError> {
        let Some(front) = held.get(self.start..) else {
            return Ok(false);
        };
        if self.field + 2 > held.len() {
            return Ok(false);
        }
        let mut sum = OnesSum::default();
        sum.add(front);
        let mut chunk = [0; CHUNK_BYTES];
        for segment in rest {
            let bytes = ram.view(segment.gpa, segment.len)?;
            for at in (0..bytes.len()).step_by(CHUNK_BYTES) {
                let chunk = &mut chunk[..CHUNK_BYTES.min(bytes.len() - at)];
                bytes.copy_to(at, chunk);
                sum.add(chunk);
            }
        }
        let checksum = match !sum.word() {
            // UDP takes 0 for "none" (RFC 768); to others it is the same.
            0 => 0xffff,
            checksum => checksum,
        };
        held[self.field..self.field + 2].copy_from_slice(&checksum.to_be_bytes());
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::Pages;

    #[test]
    fn places_outside_of_what_is_held_are_refused() {
        let ram = GuestRam::new(4096, Pages::Small).unwrap();
        let mut held = [1; 60];
        for (start, field) in [(61, 62), (60, 60), (0, 59), (10, 70), (65_535, 131_070)] {
            let request = PartialChecksum { start, field };
            assert!(!request.complete(&mut held, &[], &ram).unwrap());
        }
        assert_eq!(held, [1; 60]);
        let request = PartialChecksum {
            start: 34,
            field: 58,
        };
        assert!(request.complete(&mut held, &[], &ram).unwrap());
    }

    #[test]
    fn a_checksum_is_never_zero() {
        let ram = GuestRam::new(4096, Pages::Small).unwrap();
        let mut held = [0; 60];
        held[36..38].fill(0xff);
        let request = PartialChecksum {
            start: 34,
            field: 40,
        };
        assert!(request.complete(&mut held, &[], &ram).unwrap());
        assert_eq!(held[40..42], [0xff, 0xff]);
    }

    #[test]
    fn only_what_was_negotiated_is_done() {
        let mut header = [0; NET_HEADER_BYTES];
        assert_eq!(Request::of(&header, false), Request::Nothing);
        header[0] = 1;
        header[6] = 34;
        header[8] = 16;
        assert_eq!(Request::of(&header, false), Request::Refused);
        let place = PartialChecksum {
            start: 34,
            field: 50,
        };
        assert_eq!(Request::of(&header, true), Request::Checksum(place));
        header[1] = 1;
        assert_eq!(Request::of(&header, true), Request::Refused, "no GSO");
        header[..2].copy_from_slice(&[2, 0]);
        assert_eq!(Request::of(&header, true), Request::Refused);
    }
}
