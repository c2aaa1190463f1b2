//! The TCP header view: fields, options, and where they are.
//!
//! Invariant: all offsets are within the header bytes that were checked at construction.

use super::checksum::{be16, be32, replace_u32};

/// FIN flag.
pub const FIN: u8 = 0x01;
/// SYN flag.
pub const SYN: u8 = 0x02;
/// RST flag.
pub const RST: u8 = 0x04;
/// PSH flag.
pub const PSH: u8 = 0x08;
/// ACK flag.
pub const ACK: u8 = 0x10;
/// URG flag.
pub const URG: u8 = 0x20;
/// ECN-Echo flag.
pub const ECE: u8 = 0x40;
/// Congestion window reduced flag.
pub const CWR: u8 = 0x80;

/// The options of a SYN that bind the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SynOptions {
    /// Maximum segment size.
    pub mss: Option<u16>,
    /// Window scale.
    pub window_scale: Option<u8>,
    /// Selective acknowledgements are permitted.
    pub sack_permitted: bool,
    /// Timestamps are offered.
    pub timestamps: bool,
}

/// A checked TCP segment. Options are read when somebody asks for them: few segments need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tcp {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number; meaningful with [`ACK`].
    pub ack: u32,
    /// Urgent pointer.
    pub urgent: u16,
    /// Offset of the TCP header in the frame.
    pub at: u16,
    /// Offset of the payload in the frame.
    pub payload_at: u16,
    /// Bytes of payload.
    pub payload_len: u16,
    /// The flags octet.
    pub flags: u8,
    /// Payload, and no flag that a comparison looks at.
    pub(crate) is_plain_data: bool,
}

/// One option: its kind, where its value is, and how long that is.
struct TcpOption {
    kind: u8,
    at: usize,
    len: usize,
}

/// The options between `at` and `end`; ends early where they make no sense (RFC 9293 section 3.2).
fn options(header: &[u8], mut at: usize, end: usize) -> impl Iterator<Item = TcpOption> + '_ {
    let header = header.get(..end).unwrap_or_default();
    core::iter::from_fn(move || {
        while header.get(at) == Some(&1) {
            at += 1;
        }
        let (kind, len) = (*header.get(at)?, usize::from(*header.get(at + 1)?));
        if kind == 0 || len < 2 || at + len > header.len() {
            return None;
        }
        let option = TcpOption {
            kind,
            at: at + 2,
            len: len - 2,
        };
        at += len;
        Some(option)
    })
}

impl Tcp {
    /// Checks the segment whose header starts at `at` and whose packet ends at `end`.
    pub(super) fn parse(header: &[u8], at: usize, end: usize) -> Option<Self> {
        let fixed: &[u8; 20] = header.get(at..)?.first_chunk()?;
        Self::parse_fixed(fixed, header.len(), at, end)
    }

    /// The same with the part that every header has, of `header_len` bytes at hand.
    #[inline(always)]
    pub(super) fn parse_fixed(
        fixed: &[u8; 20],
        header_len: usize,
        at: usize,
        end: usize,
    ) -> Option<Self> {
        let payload_at = at + usize::from(fixed[12] >> 4) * 4;
        if payload_at < at + 20 || payload_at > end || payload_at > header_len {
            return None;
        }
        Some(Self {
            seq: be32(fixed, 4),
            ack: be32(fixed, 8),
            flags: fixed[13],
            urgent: be16(fixed, 18),
            at: at as u16,
            payload_at: payload_at as u16,
            payload_len: (end - payload_at) as u16,
            is_plain_data: end > payload_at && fixed[13] & (SYN | FIN | RST | URG) == 0,
        })
    }

    fn options<'a>(&self, header: &'a [u8]) -> impl Iterator<Item = TcpOption> + 'a {
        options(
            header,
            usize::from(self.at) + 20,
            usize::from(self.payload_at),
        )
    }

    /// Where the value of an option with this kind and length is.
    fn option_at(&self, header: &[u8], kind: u8, len: usize) -> Option<usize> {
        if self.payload_at == self.at + 20 {
            return None;
        }
        self.options(header)
            .find(|option| option.kind == kind && option.len == len)
            .map(|option| option.at)
    }

    fn timestamps_at(&self, header: &[u8]) -> Option<usize> {
        self.option_at(header, 8, 8)
    }

    /// Where the SACK blocks are, and how many.
    fn sack_at(&self, header: &[u8]) -> Option<(usize, usize)> {
        self.options(header)
            .find(|option| option.kind == 5 && matches!(option.len, 8 | 16 | 24 | 32))
            .map(|option| (option.at, option.len / 8))
    }

    /// The options that bind the connection, for SYN and SYN-ACK.
    pub fn syn_options(&self, header: &[u8]) -> SynOptions {
        let mut found = SynOptions::default();
        for TcpOption { kind, at, len } in self.options(header) {
            match (kind, len) {
                (2, 2) => found.mss = Some(be16(header, at)),
                (3, 1) => found.window_scale = Some(header[at]),
                (4, 0) => found.sack_permitted = true,
                (8, 8) => found.timestamps = true,
                _ => {}
            }
        }
        found
    }

    /// Whether the options of a SYN or SYN-ACK of either guest say the same, in whatever order. Of
    /// timestamps only that they are there; of all that [`Tcp::syn_options`] does not name every
    /// byte (keys of RFC 8684, cookies of RFC 7413): what follows depends on them.
    pub fn same_syn_options(&self, header: &[u8], other: &Self, other_header: &[u8]) -> bool {
        if self.syn_options(header) != other.syn_options(other_header) {
            return false;
        }
        let ours = || self.other_options(header);
        let theirs = || other.other_options(other_header);
        let times = |all: &mut dyn Iterator<Item = (u8, &[u8])>, option| {
            all.filter(|other| *other == option).count()
        };
        ours().count() == theirs().count()
            && ours().all(|option| times(&mut ours(), option) == times(&mut theirs(), option))
    }

    /// Kind and value of what [`Tcp::syn_options`] does not look at.
    fn other_options<'a>(&self, header: &'a [u8]) -> impl Iterator<Item = (u8, &'a [u8])> + 'a {
        let options = self.options(header).filter(|option| {
            let known = matches!((option.kind, option.len), (2, 2) | (3, 1) | (4, 0) | (8, 8));
            !known
        });
        options.map(|option| (option.kind, &header[option.at..option.at + option.len]))
    }

    /// Whether all of `flags` are set.
    pub const fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// Sequence number of the first payload byte.
    pub const fn payload_seq(&self) -> u32 {
        self.seq.wrapping_add(self.has(SYN) as u32)
    }

    /// How far `at` is behind the first payload byte; large when it is before.
    pub(crate) const fn payload_offset(&self, at: u32) -> u32 {
        at.wrapping_sub(self.payload_seq())
    }

    /// The first payload byte that both segments have, and the one after the last.
    pub(crate) fn overlap(&self, other: &Self) -> Option<(u32, u32)> {
        let (a, b) = (self.payload_seq(), other.payload_seq());
        let from = if self.payload_offset(b) < u32::from(self.payload_len) {
            b
        } else if other.payload_offset(a) < u32::from(other.payload_len) {
            a
        } else {
            return None;
        };
        let left = |tcp: &Self| u32::from(tcp.payload_len) - tcp.payload_offset(from);
        let n = left(self).min(left(other));
        (n > 0).then(|| (from, from.wrapping_add(n)))
    }

    /// Sequence number after the payload: where a FIN sits.
    pub const fn payload_end(&self) -> u32 {
        self.payload_seq().wrapping_add(self.payload_len as u32)
    }

    /// Sequence number after everything in the segment, FIN included.
    pub const fn end(&self) -> u32 {
        self.payload_end().wrapping_add(self.has(FIN) as u32)
    }

    /// Whether the segment takes sequence space (SYN, payload or FIN).
    pub const fn takes_space(&self) -> bool {
        self.seq != self.end()
    }

    /// The window field, as it stands there: not scaled.
    pub(crate) fn window(&self, header: &[u8]) -> u16 {
        be16(header, usize::from(self.at) + 14)
    }

    /// Neither SYN, FIN, RST nor payload: an ACK, a window update or an empty probe.
    pub const fn is_pure_ack(&self) -> bool {
        self.flags & (SYN | FIN | RST) == 0 && self.payload_len == 0
    }

    /// TSval and TSecr, where the option is there.
    pub fn timestamps(&self, header: &[u8]) -> Option<(u32, u32)> {
        let at = self.timestamps_at(header)?;
        Some((be32(header, at), be32(header, at + 4)))
    }

    /// SACK blocks, as (left, right) pairs.
    pub fn sack_blocks<'a>(&self, header: &'a [u8]) -> impl Iterator<Item = (u32, u32)> + 'a {
        let (at, blocks) = self.sack_at(header).unwrap_or_default();
        (0..blocks).map(move |n| (be32(header, at + 8 * n), be32(header, at + 8 * n + 4)))
    }

    fn replace(&self, header: &mut [u8], at: usize, new: u32) {
        let from = usize::from(self.at);
        replace_u32(header, at, new, from, from + 16);
    }

    /// Rewrites the sequence number, in the header and here.
    pub(crate) fn set_seq(&mut self, header: &mut [u8], seq: u32) {
        self.replace(header, usize::from(self.at) + 4, seq);
        self.seq = seq;
    }

    /// Rewrites the acknowledgement number, in the header and here.
    pub(crate) fn set_ack(&mut self, header: &mut [u8], ack: u32) {
        self.replace(header, usize::from(self.at) + 8, ack);
        self.ack = ack;
    }

    /// Rewrites the window field.
    pub(crate) fn set_window(&self, header: &mut [u8], window: u16) {
        let at = usize::from(self.at) + 12;
        let flags = be32(header, at) & 0xffff_0000;
        self.replace(header, at, flags | u32::from(window));
    }

    /// Makes no-operations of the SACK option.
    pub(crate) fn blank_sack(&self, header: &mut [u8]) {
        const NOPS: u32 = 0x0101_0101;
        if let Some((at, blocks)) = self.sack_at(header) {
            // Two bytes, kind and length, are before the blocks; the last step covers two bytes once more.
            let last = at + 8 * blocks - 4;
            for at in (at - 2..last).step_by(4).chain([last]) {
                self.replace(header, at, NOPS);
            }
        }
    }

    /// Moves all SACK blocks back by `offset`.
    pub(crate) fn move_sack_back(&self, header: &mut [u8], offset: u32) {
        let (at, blocks) = self.sack_at(header).unwrap_or_default();
        for n in 0..blocks * 2 {
            let at = at + 4 * n;
            self.replace(header, at, be32(header, at).wrapping_sub(offset));
        }
    }

    /// Rewrites TSval; nothing happens without the option.
    pub(crate) fn set_tsval(&self, header: &mut [u8], tsval: u32) {
        if let Some(at) = self.timestamps_at(header) {
            self.replace(header, at, tsval);
        }
    }

    /// Rewrites TSecr; nothing happens without the option.
    pub(crate) fn set_tsecr(&self, header: &mut [u8], tsecr: u32) {
        if let Some(at) = self.timestamps_at(header) {
            self.replace(header, at + 4, tsecr);
        }
    }
}
