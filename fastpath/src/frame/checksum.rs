//! The transport checksum of a frame whose payload was summed where it lies (rule 10).
//!
//! Invariant: headers are host memory here; what the guest wrote into the checksum field does not
//! count.
//!
//! Does not read payload.

use colo_compare::wire::checksum::OnesSum;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// Where the headers of a TCP or UDP frame are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    addresses: (usize, usize),
    l4: usize,
    protocol: u8,
}

/// Writes the checksum of an unfragmented TCP or UDP frame of `len` bytes whose payload begins at
/// `payload_at` and has the sum `payload`. `false`: it is something else, nothing is written.
pub(super) fn write(header: &mut [u8], len: usize, payload_at: usize, payload: u16) -> bool {
    let Some(layout) = layout(header, len) else {
        return false;
    };
    let field = layout.l4 + if layout.protocol == TCP { 16 } else { 6 };
    if field + 2 > payload_at || payload_at > header.len() {
        return false;
    }
    header[field..field + 2].fill(0);
    let (from, end) = layout.addresses;
    let l4_len = (len - layout.l4) as u32;
    let mut total = OnesSum::default();
    total.add(&header[from..end]);
    total.add(&l4_len.to_be_bytes());
    total.add(&[0, layout.protocol]);
    total.add(&header[layout.l4..payload_at]);
    total.add_sum(payload, len - payload_at);
    let sum = match !total.word() {
        // Zero would say that there is none (RFC 768).
        0 if layout.protocol == UDP => 0xffff,
        sum => sum,
    };
    header[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    true
}

/// Whether [`write`] takes such a frame.
pub(super) fn applies(header: &[u8], len: usize, payload_at: usize) -> bool {
    let field_end = |layout: Layout| layout.l4 + if layout.protocol == TCP { 18 } else { 8 };
    // The words of the header and those of the payload are summed apart.
    layout(header, len).is_some_and(|found| {
        field_end(found) <= payload_at && (payload_at - found.l4).is_multiple_of(2)
    })
}

fn layout(header: &[u8], len: usize) -> Option<Layout> {
    let mut l3 = 14;
    let mut ethertype = half(header, 12)?;
    while matches!(ethertype, 0x8100 | 0x88a8) {
        ethertype = half(header, l3 + 2)?;
        l3 += 4;
        if l3 > 14 + 8 {
            return None;
        }
    }
    let (addresses, l4, protocol, end) = match ethertype {
        0x0800 => {
            let first = *header.get(l3)?;
            let is_fragment = half(header, l3 + 6)? & 0x3fff != 0;
            if first >> 4 != 4 || is_fragment {
                return None;
            }
            let l4 = l3 + usize::from(first & 15) * 4;
            let end = l3 + usize::from(half(header, l3 + 2)?);
            ((l3 + 12, l3 + 20), l4, *header.get(l3 + 9)?, end)
        }
        0x86dd => {
            let end = l3 + 40 + usize::from(half(header, l3 + 4)?);
            ((l3 + 8, l3 + 40), l3 + 40, *header.get(l3 + 6)?, end)
        }
        _ => return None,
    };
    let known = matches!(protocol, TCP | UDP) && end == len && l4 + 8 <= header.len();
    known.then_some(Layout {
        addresses,
        l4,
        protocol,
    })
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use colo_compare::wire::checksum::ones_sum;

    /// A UDP datagram over IPv4 whose checksum is known: computed by hand from RFC 768.
    fn datagram(payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 14];
        frame[12..14].copy_from_slice(&[8, 0]);
        let total = (28 + payload.len()) as u16;
        frame.extend([0x45, 0]);
        frame.extend(total.to_be_bytes());
        frame.extend([0, 0, 0x40, 0, 64, UDP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x12, 0x34, 0, 7]);
        frame.extend((total - 20).to_be_bytes());
        frame.extend([0xaa, 0xaa]);
        frame.extend(payload);
        frame
    }

    #[test]
    fn a_written_checksum_verifies() {
        for payload in [vec![1, 2, 3, 4], vec![0xff; 601], vec![]] {
            let mut frame = datagram(&payload);
            let len = frame.len();
            assert!(applies(&frame, len, 42));
            assert!(write(&mut frame[..42], len, 42, ones_sum(&payload)));
            // Everything with the pseudo header sums to all ones.
            let l4 = &frame[34..];
            let mut all = OnesSum::default();
            all.add(&frame[26..34]);
            all.add(&[0, UDP]);
            all.add(&(l4.len() as u32).to_be_bytes());
            all.add(l4);
            assert_eq!(all.word(), 0xffff);
        }
    }

    #[test]
    fn what_has_no_such_checksum_is_left_alone() {
        let good = datagram(&[0; 100]);
        let len = good.len();
        for (at, value) in [(12, 9), (20, 0x20), (21, 1), (23, 1), (17, 1), (14, 0x65)] {
            let mut frame = good.clone();
            frame[at] = value;
            let before = frame.clone();
            assert!(!applies(&frame, len, 42), "byte {at}");
            assert!(!write(&mut frame[..42], len, 42, 0));
            assert_eq!(frame, before);
        }
        assert!(!applies(&good, len, 40), "payload inside the header");
    }
}
