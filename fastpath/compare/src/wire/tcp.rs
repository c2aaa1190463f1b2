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

/// A checked TCP segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tcp {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number; meaningful with [`ACK`].
    pub ack: u32,
    /// The flags octet.
    pub flags: u8,
    /// Urgent pointer.
    pub urgent: u16,
    /// Offset of the TCP header in the frame.
    pub at: u16,
    /// Offset of the payload in the frame.
    pub payload_at: u16,
    /// Bytes of payload.
    pub payload_len: u16,
    /// Binding options.
    pub options: SynOptions,
    timestamps_at: u16,
    sack_at: u16,
    sack_blocks: u8,
}

impl Tcp {
    /// Checks the segment whose header starts at `at` and whose packet ends at `end`.
    pub(super) fn parse(header: &[u8], at: usize, end: usize) -> Option<Self> {
        if at + 20 > header.len() || at + 20 > end {
            return None;
        }
        let payload_at = at + usize::from(header[at + 12] >> 4) * 4;
        if payload_at < at + 20 || payload_at > end || payload_at > header.len() {
            return None;
        }
        let mut tcp = Self {
            seq: be32(header, at + 4),
            ack: be32(header, at + 8),
            flags: header[at + 13],
            urgent: be16(header, at + 18),
            at: at as u16,
            payload_at: payload_at as u16,
            payload_len: (end - payload_at) as u16,
            options: SynOptions::default(),
            timestamps_at: 0,
            sack_at: 0,
            sack_blocks: 0,
        };
        tcp.read_options(header, at + 20, payload_at)?;
        Some(tcp)
    }

    fn read_options(&mut self, header: &[u8], mut at: usize, end: usize) -> Option<()> {
        while at < end {
            match header[at] {
                0 => break,
                1 => at += 1,
                kind => {
                    let len = usize::from(*header[..end].get(at + 1)?);
                    if len < 2 || at + len > end {
                        return None;
                    }
                    self.read_option(header, kind, at, len);
                    at += len;
                }
            }
        }
        Some(())
    }

    fn read_option(&mut self, header: &[u8], kind: u8, at: usize, len: usize) {
        match (kind, len) {
            (2, 4) => self.options.mss = Some(be16(header, at + 2)),
            (3, 3) => self.options.window_scale = Some(header[at + 2]),
            (4, 2) => self.options.sack_permitted = true,
            (5, 10 | 18 | 26 | 34) => {
                self.sack_at = (at + 2) as u16;
                self.sack_blocks = ((len - 2) / 8) as u8;
            }
            (8, 10) => {
                self.options.timestamps = true;
                self.timestamps_at = (at + 2) as u16;
            }
            _ => {}
        }
    }

    /// Whether all of `flags` are set.
    pub const fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// Sequence number of the first payload byte.
    pub const fn payload_seq(&self) -> u32 {
        self.seq.wrapping_add(self.has(SYN) as u32)
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

    /// Neither SYN, FIN, RST nor payload: an ACK, a window update or an empty probe.
    pub const fn is_pure_ack(&self) -> bool {
        self.flags & (SYN | FIN | RST) == 0 && self.payload_len == 0
    }

    /// TSval and TSecr, where the option is there.
    pub fn timestamps(&self, header: &[u8]) -> Option<(u32, u32)> {
        let at = usize::from(self.timestamps_at);
        (at != 0).then(|| (be32(header, at), be32(header, at + 4)))
    }

    /// SACK blocks, as (left, right) pairs.
    pub fn sack_blocks<'a>(&self, header: &'a [u8]) -> impl Iterator<Item = (u32, u32)> + 'a {
        let at = usize::from(self.sack_at);
        (0..usize::from(self.sack_blocks))
            .map(move |n| (be32(header, at + 8 * n), be32(header, at + 8 * n + 4)))
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

    /// Moves all SACK blocks back by `offset`.
    pub(crate) fn move_sack_back(&self, header: &mut [u8], offset: u32) {
        for n in 0..usize::from(self.sack_blocks) * 2 {
            let at = usize::from(self.sack_at) + 4 * n;
            self.replace(header, at, be32(header, at).wrapping_sub(offset));
        }
    }

    /// Rewrites TSval; nothing happens without the option.
    pub(crate) fn set_tsval(&self, header: &mut [u8], tsval: u32) {
        if self.timestamps_at != 0 {
            self.replace(header, usize::from(self.timestamps_at), tsval);
        }
    }

    /// Rewrites TSecr; nothing happens without the option.
    pub(crate) fn set_tsecr(&self, header: &mut [u8], tsecr: u32) {
        if self.timestamps_at != 0 {
            self.replace(header, usize::from(self.timestamps_at) + 4, tsecr);
        }
    }
}
