//! Takes the payload out of a TCP segment without moving a byte: the network length shrinks, the
//! rest of the frame becomes padding.
//!
//! Invariant: both checksums are right afterwards, for the shorter packet.

use super::checksum::{OnesSum, ones_sum};
use super::tcp::{FIN, PSH, URG};
use super::{Layout, Network};

/// Makes a bare ACK at `seq` of the segment. Nothing happens to what is not TCP.
pub(crate) fn strip_payload(header: &mut [u8], packet: &mut Layout, seq: u32) {
    let Some(tcp) = packet.tcp.as_mut() else {
        return;
    };
    let (l3, l4, end) = (
        usize::from(packet.l3),
        usize::from(packet.l4),
        usize::from(tcp.payload_at),
    );
    tcp.flags &= !(FIN | PSH | URG);
    (tcp.seq, tcp.payload_len, tcp.is_plain_data) = (seq, 0, false);
    packet.end = tcp.payload_at;
    header[l4 + 4..l4 + 8].copy_from_slice(&seq.to_be_bytes());
    header[l4 + 13] = tcp.flags;
    let addresses = match packet.network {
        Network::V4 => {
            header[l3 + 2..l3 + 4].copy_from_slice(&((end - l3) as u16).to_be_bytes());
            header[l3 + 10..l3 + 12].fill(0);
            let sum = !ones_sum(&header[l3..l4]);
            header[l3 + 10..l3 + 12].copy_from_slice(&sum.to_be_bytes());
            l3 + 12..l3 + 20
        }
        _ => {
            header[l3 + 4..l3 + 6].copy_from_slice(&((end - l3 - 40) as u16).to_be_bytes());
            l3 + 8..l3 + 40
        }
    };
    header[l4 + 16..l4 + 18].fill(0);
    let mut sum = OnesSum::default();
    sum.add(&header[addresses]);
    sum.add(&((end - l4) as u16).to_be_bytes());
    sum.add(&[0, 6]);
    sum.add(&header[l4..end]);
    header[l4 + 16..l4 + 18].copy_from_slice(&(!sum.word()).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::Direction;
    use crate::testing::{Segment, Side, checksums_are_right};
    use crate::wire::parse;

    #[test]
    fn a_stripped_segment_is_a_bare_ack() {
        for side in [Side::V4, Side::V6] {
            let mut bytes = Segment::new(side).seq(9).ack(8).payload(b"secret").bytes();
            let mut packet = parse(&bytes, bytes.len(), Direction::FromGuest);
            strip_payload(&mut bytes, &mut packet.layout, 7);
            let again = parse(&bytes, bytes.len(), Direction::FromGuest);
            assert_eq!(again, packet);
            let tcp = again.tcp.unwrap();
            assert!(tcp.is_pure_ack() && (tcp.seq, tcp.ack) == (7, 8));
            bytes.truncate(usize::from(again.end));
            assert!(checksums_are_right(&bytes));
        }
    }
}
