//! Captures of guests whose every byte is known.

#![allow(dead_code, reason = "each test binary uses a part")]

use colo_compare::testing::{Segment, Side};
use colo_compare::wire::tcp::{ACK, FIN, PSH, RST, SYN};
use colo_replay::testing::{Format, capture};
use colo_replay::{Report, Settings, replay};

/// 2023, in nanoseconds.
pub const EPOCH_NS: u64 = 1_700_000_000_000_000_000;

pub const PCAP: Format = Format::Pcap {
    nanoseconds: false,
    big_endian: false,
};

/// Frames with their times in microseconds from the start.
#[derive(Debug, Clone, Default)]
pub struct Frames(pub Vec<(u64, Vec<u8>)>);

impl Frames {
    pub fn push(&mut self, at_us: u64, frame: Vec<u8>) -> &mut Self {
        self.0.push((at_us, frame));
        self
    }

    /// In the order of their times.
    pub fn sorted(mut self) -> Self {
        self.0.sort_by_key(|(at_us, _)| *at_us);
        self
    }

    pub fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self.sorted()
    }

    /// All of it later.
    pub fn later(mut self, us: u64) -> Self {
        self.0.iter_mut().for_each(|(at_us, _)| *at_us += us);
        self
    }

    pub fn bytes(&self, format: Format) -> Vec<u8> {
        let frames = self.0.iter();
        let frames: Vec<_> = frames
            .map(|(at_us, frame)| (EPOCH_NS + at_us * 1000, frame.clone()))
            .collect();
        capture(format, &frames)
    }
}

pub fn compare(primary: &Frames, secondary: &Frames) -> Report {
    compare_with(primary, secondary, &Settings::default())
}

pub fn compare_with(primary: &Frames, secondary: &Frames, settings: &Settings) -> Report {
    replay(&primary.bytes(PCAP), &secondary.bytes(PCAP), settings).unwrap()
}

/// One TCP connection as a guest with its own initial sequence number sends it.
#[derive(Debug, Clone)]
pub struct Connection {
    pub side: Side,
    pub isn: u32,
    pub port: u16,
    pub at_us: u64,
    /// What has been sent after the SYN-ACK.
    pub sent: u32,
    pub frames: Frames,
}

pub const PEER_ISN: u32 = 7000;

impl Connection {
    /// Begins with a SYN-ACK at `at_us`.
    pub fn accepted(side: Side, isn: u32, at_us: u64) -> Self {
        let mut this = Self::going_on(side, isn, at_us);
        let syn = this.segment(isn).flags(SYN | ACK).ack(PEER_ISN + 1);
        this.frames
            .push(at_us, syn.option(&[2, 4, 5, 0xb4]).bytes());
        this
    }

    /// Whose handshake is not in the capture.
    pub fn going_on(side: Side, isn: u32, at_us: u64) -> Self {
        Self {
            side,
            isn,
            port: 40_000,
            at_us,
            sent: 0,
            frames: Frames::default(),
        }
    }

    fn segment(&self, seq: u32) -> Segment {
        Segment::new(self.side)
            .ports(80, self.port)
            .seq(seq)
            .ack(PEER_ISN + 1)
    }

    pub fn at(&mut self, at_us: u64) -> &mut Self {
        self.at_us = at_us;
        self
    }

    /// Sends bytes now, in segments of at most `mss`.
    pub fn send(&mut self, bytes: &[u8], mss: usize) -> &mut Self {
        for part in bytes.chunks(mss) {
            let seq = self.isn.wrapping_add(1 + self.sent);
            let segment = self.segment(seq).flags(ACK | PSH).payload(part);
            self.frames.push(self.at_us, segment.bytes());
            self.sent += part.len() as u32;
        }
        self
    }

    /// Sends bytes `back` before the end again.
    pub fn again(&mut self, bytes: &[u8], back: u32) -> &mut Self {
        let seq = self.isn.wrapping_add(1 + self.sent - back);
        let segment = self.segment(seq).payload(bytes);
        self.frames.push(self.at_us, segment.bytes());
        self
    }

    pub fn flags(&mut self, flags: u8) -> &mut Self {
        let seq = self.isn.wrapping_add(1 + self.sent);
        let segment = self.segment(seq).flags(flags);
        self.frames.push(self.at_us, segment.bytes());
        self.sent += u32::from(flags & FIN != 0);
        self
    }

    pub fn ack(&mut self) -> &mut Self {
        self.flags(ACK)
    }

    pub fn fin(&mut self) -> &mut Self {
        self.flags(FIN | ACK)
    }

    pub fn reset(&mut self) -> &mut Self {
        self.flags(RST)
    }
}

/// Bytes that tell their place.
pub fn text(len: usize) -> Vec<u8> {
    (0..len)
        .map(|n| b'a' + (n * 7 + n / 26) as u8 % 26)
        .collect()
}

/// A frame with one 802.1Q tag.
pub fn tagged(frame: &[u8], vlan: u16) -> Vec<u8> {
    let mut bytes = frame[..12].to_vec();
    bytes.extend_from_slice(&[0x81, 0]);
    bytes.extend_from_slice(&vlan.to_be_bytes());
    bytes.extend_from_slice(&frame[12..]);
    bytes
}

pub fn causes(report: &Report) -> Vec<&str> {
    report.divergences.iter().map(|found| found.cause).collect()
}

/// Nothing differs, and everything was looked at.
#[track_caller]
pub fn assert_same(report: &Report) {
    assert!(report.is_same(), "{report:#?}");
    let sums = (report.held, report.dropped, report.checkpoints);
    assert_eq!(sums, (0, 0, 0), "{report:#?}");
    assert!(report.pairs > 0, "{report:#?}");
}
