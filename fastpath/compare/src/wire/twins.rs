//! Two frames side by side whose headers are the same wherever they count: they are read once.
//!
//! Invariants: what is given is what [`super::parse`] gives of each; nothing that counts differs in the
//! headers. Congestion marks and all flags count here, so `None` says nothing about two frames.

use core::ops::Range;

use super::checksum::{be16, be32};
use super::tcp::{FIN, RST, SYN, URG};
use super::{L3, L4, Layout, PLAIN_BYTES, Packet, PlainHeaders, TCP_PROTOCOL, Tcp, UDP_PROTOCOL};
use crate::flow::Direction;
use crate::recent::WireName;

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

/// EtherType, version and header length of what is read here, and the bytes of a word in which they lie.
const PLAIN: (u32, u32) = (0x0045_0008, 0x00ff_ffff);
/// In the word of fragment flags and place, as it lies in memory: everything but "do not fragment".
const FRAGMENT: u16 = 0xff3f;

/// Two frames of one flow: plain TCP data, or UDP.
#[derive(Debug)]
pub(crate) struct Twins<'a> {
    pvm: &'a [u8; PLAIN_BYTES],
    svm: &'a [u8; PLAIN_BYTES],
    payload: Range<usize>,
}

impl<'a> Twins<'a> {
    /// Plain TCP data of the PVM and of the SVM, by their headers and lengths.
    #[inline(always)]
    pub(crate) fn segments(pvm: (&'a [u8], usize), svm: (&'a [u8], usize)) -> Option<Self> {
        let (fixed, end) = plain(pvm, svm)?;
        let payload_at = L4 + usize::from(fixed[L4 + 12] >> 4) * 4;
        let is_right = fixed[L3 + 9] == TCP_PROTOCOL && payload_at >= L4 + 20;
        let is_plain_data = payload_at < end
            && payload_at <= pvm.0.len()
            && fixed[L4 + 13] & (SYN | FIN | RST | URG) == 0;
        let twins = Self {
            pvm: fixed,
            svm: svm.0.first_chunk()?,
            payload: payload_at..end,
        };
        (is_right && is_plain_data && twins.are_alike(COUNTED[5])).then_some(twins)
    }

    /// The same of UDP datagrams.
    #[inline(always)]
    pub(crate) fn datagrams(pvm: (&'a [u8], usize), svm: (&'a [u8], usize)) -> Option<Self> {
        let (fixed, end) = plain(pvm, svm)?;
        let is_right = fixed[L3 + 9] == UDP_PROTOCOL && end >= L4 + 8;
        let twins = Self {
            pvm: fixed,
            svm: svm.0.first_chunk()?,
            payload: L4 + 8..end,
        };
        (is_right && twins.are_alike(COUNTED_OF_UDP)).then_some(twins)
    }

    #[inline(always)]
    fn are_alike(&self, last: u64) -> bool {
        let differing = |n: usize| (word(self.pvm, n) ^ word(self.svm, n)) & COUNTED[n];
        let all = differing(0) | differing(1) | differing(2) | differing(3) | differing(4);
        all | (word(self.pvm, 5) ^ word(self.svm, 5)) & last == 0
    }

    /// The PVM's frame, which is `header` as far as that goes.
    pub(crate) fn packet(&self, header: &[u8]) -> Option<Packet> {
        let plain = PlainHeaders::of(header, self.payload.end)?;
        Some(plain.packet(Direction::FromGuest))
    }

    /// What names the flow on the wire.
    #[inline(always)]
    pub(crate) fn name(&self) -> WireName {
        WireName::new(word_at(self.pvm, L3 + 8), word_at(self.pvm, L3 + 16))
    }

    /// Where both payloads lie.
    #[inline(always)]
    pub(crate) fn payload(&self) -> Range<usize> {
        self.payload.clone()
    }

    /// TCP: where the segment begins in its stream.
    #[inline(always)]
    pub(crate) fn seq(&self) -> u32 {
        be32(self.pvm, L4 + 4)
    }

    /// The PVM's addresses as they are on the wire, for a look at whether they are known: hardware
    /// address and EtherType, IPv4 address.
    #[inline(always)]
    pub(crate) fn sender(&self) -> (u64, u32) {
        let mut ip = [0; 4];
        ip.copy_from_slice(&self.pvm[L3 + 12..L3 + 16]);
        (word_at(self.pvm, 6), u32::from_le_bytes(ip))
    }

    /// TCP: what the SVM's frame is.
    #[inline(always)]
    pub(crate) fn svm_segment(&self) -> SvmSegment {
        SvmSegment {
            seq: self.seq(),
            ack: be32(self.svm, L4 + 8),
            urgent: be16(self.svm, L4 + 18),
            payload_at: self.payload.start as u16,
            end: self.payload.end as u16,
            flags: self.svm[L4 + 13],
        }
    }
}

/// Plain TCP data of the SVM, in few words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SvmSegment {
    seq: u32,
    ack: u32,
    urgent: u16,
    payload_at: u16,
    end: u16,
    flags: u8,
}

impl SvmSegment {
    #[inline(always)]
    pub(crate) fn payload_len(&self) -> u16 {
        self.end - self.payload_at
    }

    #[inline(always)]
    pub(crate) fn layout(&self) -> Layout {
        let tcp = Tcp {
            seq: self.seq,
            ack: self.ack,
            urgent: self.urgent,
            at: L4 as u16,
            payload_at: self.payload_at,
            payload_len: self.payload_len(),
            flags: self.flags,
            is_plain_data: true,
        };
        Layout::plain(self.end, Some(tcp))
    }
}

/// The part of the PVM's headers that is always there, and where the packet ends: untagged IPv4 without options or
/// fragments, in a frame that is as long as the SVM's.
#[inline(always)]
fn plain<'a>(
    (header, len): (&'a [u8], usize),
    svm: (&'a [u8], usize),
) -> Option<(&'a [u8; PLAIN_BYTES], usize)> {
    let fixed: &[u8; PLAIN_BYTES] = header.first_chunk()?;
    let end = L3 + usize::from(be16(fixed, L3 + 2));
    let mut version = [0; 4];
    version.copy_from_slice(&fixed[12..16]);
    let fragment = u16::from_le_bytes([fixed[L3 + 6], fixed[L3 + 7]]);
    let is_plain = u32::from_le_bytes(version) & PLAIN.1 == PLAIN.0 && fragment & FRAGMENT == 0;
    let fits = len == svm.1 && end <= len && len <= usize::from(u16::MAX);
    (is_plain && fits).then_some((fixed, end))
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

    fn twins<'a>(pvm: &'a [u8], svm: &'a [u8]) -> Option<Twins<'a>> {
        let (pvm, svm) = ((pvm, pvm.len()), (svm, svm.len()));
        match pvm.0[L3 + 9] {
            TCP_PROTOCOL => Twins::segments(pvm, svm),
            _ => Twins::datagrams(pvm, svm),
        }
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
            if let Some(twins) = twins(pvm, &svm) {
                prop_assert_eq!(twins.packet(pvm), Some(alone(pvm)));
                let end = alone(&svm).end;
                prop_assert_eq!(twins.payload(), alone(&svm).payload_at().into()..end.into());
                if which < 2 {
                    prop_assert_eq!(twins.svm_segment().layout(), alone(&svm).layout);
                    prop_assert_eq!(Some(twins.seq()), alone(pvm).tcp.map(|tcp| tcp.seq));
                }
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
                assert_eq!(
                    twins(pvm, &svm).is_some(),
                    ignored.contains(&at),
                    "byte {at}"
                );
            }
            let mut longer = pvm.clone();
            longer.push(0);
            assert!(twins(pvm, &longer).is_none());
        }
    }
}
