//! Two frames side by side whose headers are the same wherever they count: they are read once.
//!
//! Invariants: what is given is what [`super::parse`] gives of each; nothing that counts differs in the
//! headers. Congestion marks and all flags count here, so `None` says nothing about two frames.

use super::checksum::{be16, be32};
use super::{L3, L4, Layout, PLAIN_BYTES, Packet, PlainHeaders, Tcp};
use crate::flow::Direction;

/// What counts of the bytes before the TCP header's window, by words of 8 in the order of memory: all
/// but IPv4 identification and checksum, and the acknowledgement number.
const COUNTED: [u64; 6] = [
    u64::MAX,
    u64::MAX,
    0xffff_ffff_0000_ffff,
    0xffff_ffff_ffff_0000,
    u64::MAX,
    0xffff_0000_0000_ffff,
];
/// Of the last word, when that is of UDP: its checksum is there, and payload.
const COUNTED_OF_UDP: u64 = 0;

/// Two frames of one flow: plain TCP data, or UDP.
#[derive(Debug)]
pub(crate) struct Twins<'a> {
    /// The PVM's frame.
    pub(crate) packet: Packet,
    pvm: &'a [u8; PLAIN_BYTES],
    svm: &'a [u8; PLAIN_BYTES],
}

impl<'a> Twins<'a> {
    /// The frames of the PVM and of the SVM, by their headers and lengths.
    #[inline(always)]
    pub(crate) fn of(pvm: (&'a [u8], usize), svm: (&'a [u8], usize)) -> Option<Self> {
        if pvm.1 != svm.1 {
            return None;
        }
        let plain = PlainHeaders::of(pvm.0, pvm.1)?;
        let (pvm, svm) = (plain.fixed, svm.0.first_chunk()?);
        let last = match &plain.tcp {
            Some(tcp) if tcp.is_plain_data => COUNTED[5],
            Some(_) => return None,
            None => COUNTED_OF_UDP,
        };
        let differing = |n: usize| (word(pvm, n) ^ word(svm, n)) & COUNTED[n];
        let all = differing(0) | differing(1) | differing(2) | differing(3) | differing(4);
        let packet = plain.packet(Direction::FromGuest);
        (all | differing(5) & last == 0).then_some(Self { packet, pvm, svm })
    }

    /// The PVM's addresses as they are on the wire, for a look at whether they are known: hardware
    /// address and EtherType, IPv4 address.
    #[inline(always)]
    pub(crate) fn sender(&self) -> (u64, u32) {
        let mut ip = [0; 4];
        ip.copy_from_slice(&self.pvm[L3 + 12..L3 + 16]);
        (word_at(self.pvm, 6), u32::from_le_bytes(ip))
    }

    /// What the SVM's frame is.
    #[inline(always)]
    pub(crate) fn svm_layout(&self) -> Layout {
        let tcp = self.packet.tcp.map(|tcp| Tcp {
            ack: be32(self.svm, L4 + 8),
            urgent: be16(self.svm, L4 + 18),
            ..tcp
        });
        Layout {
            tcp,
            ..self.packet.layout
        }
    }
}

/// Word `n` of the frame, whose first byte is the least significant.
#[inline(always)]
fn word(bytes: &[u8; PLAIN_BYTES], n: usize) -> u64 {
    word_at(bytes, 8 * n)
}

#[inline(always)]
fn word_at(bytes: &[u8; PLAIN_BYTES], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Segment, Side, udp};
    use crate::wire::{header_difference, parse};

    fn frames() -> [Vec<u8>; 3] {
        let segment = Segment::new(Side::V4).seq(7).ack(9).timestamps(1, 2);
        [
            segment.option(&[1, 1]).payload(b"some payload").bytes(),
            Segment::new(Side::V4).payload(b"none").bytes(),
            udp(Side::V4, false, 53, 4000, b"a question and more"),
        ]
    }

    proptest! {
        /// Whatever else one frame says: twins are read as they would be alone, and count as equal.
        #[test]
        fn twins_are_what_they_are_alone(which in 0usize..3, changes in proptest::collection::vec((0usize..54, any::<u8>()), 0..4)) {
            let pvm = &frames()[which];
            let mut svm = pvm.clone();
            for (at, byte) in changes {
                svm[at] = byte;
            }
            let alone = |frame: &[u8]| parse(frame, frame.len(), Direction::FromGuest);
            if let Some(twins) = Twins::of((pvm, pvm.len()), (&svm, svm.len())) {
                prop_assert_eq!(twins.packet, alone(pvm));
                prop_assert_eq!(twins.svm_layout(), alone(&svm).layout);
                prop_assert_eq!(alone(&svm).key, alone(pvm).key);
                let (a, b) = (alone(pvm).layout, alone(&svm).layout);
                prop_assert_eq!(header_difference(pvm, &a, &svm, &b), None);
            }
        }
    }

    #[test]
    fn guests_may_differ_in_what_does_not_count_and_in_nothing_else() {
        for (pvm, is_tcp) in frames().iter().zip([true, true, false]) {
            let ignored: &[usize] = if is_tcp {
                &[18, 19, 24, 25, 42, 43, 44, 45, 48, 49, 50, 51, 52, 53]
            } else {
                // Behind its header, payload is not looked at.
                &[
                    18, 19, 24, 25, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53,
                ]
            };
            for at in 0..PLAIN_BYTES {
                let mut svm = pvm.clone();
                svm[at] ^= 0x20;
                let twins = Twins::of((pvm, pvm.len()), (&svm, svm.len()));
                assert_eq!(twins.is_some(), ignored.contains(&at), "byte {at}");
            }
            let mut longer = pvm.clone();
            longer.push(0);
            assert!(Twins::of((pvm, pvm.len()), (&longer, longer.len())).is_none());
        }
    }
}
