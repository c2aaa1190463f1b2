//! Why two outputs count as different, or why a checkpoint is wanted for another reason.
//!
//! Invariant: the names are stable; they appear in logs, counters and reports.

use core::fmt;

use crate::flow::FlowKey;
use crate::frames::{Frames, Token};

/// Why a checkpoint is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Cause {
    /// Bytes differ.
    Payload,
    /// One side's message or stream ends where the other's goes on.
    Length,
    /// SYN, FIN, RST, URG differ, or one side reset alone.
    Flags,
    /// Network header fields that count (TTL, DSCP, options) differ.
    Header,
    /// MSS, window scale, SACK-permitted or timestamps differ on SYN or SYN-ACK.
    SynOptions,
    /// The SVM did not produce it in time.
    Deadline,
    /// The secondary did not acknowledge the input that the segment acknowledges in time (rule 6).
    AckDeadline,
    /// The SVM did not consume its backlog in time after a resume (rule 9).
    Lag,
    /// The SVM sent something that the PVM did not send in time.
    Extra,
    /// A flow that the guest opened has another port on the SVM (rule 2).
    OutboundTuple,
    /// The frame cannot be parsed and the SVM produced no equal one in time.
    Unparseable,
    /// The flow table is full.
    TableFull,
    /// There is no room for more held output.
    HoldFull,
    /// There is no room for more input on the secondary.
    InputOverflow,
    /// There is no room for more SVM output.
    OutputOverflow,
    /// A handshake was completed by a translation that the secondary does not know yet (rule 1).
    Translation,
    /// The previous checkpoint was aborted (rule 14).
    Aborted,
    /// A policy lets the flow's output leave by checkpoints only.
    Policy,
}

impl Cause {
    /// How many causes there are.
    pub const COUNT: usize = 18;

    /// All causes, in the order of their counters.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Payload,
        Self::Length,
        Self::Flags,
        Self::Header,
        Self::SynOptions,
        Self::Deadline,
        Self::AckDeadline,
        Self::Lag,
        Self::Extra,
        Self::OutboundTuple,
        Self::Unparseable,
        Self::TableFull,
        Self::HoldFull,
        Self::InputOverflow,
        Self::OutputOverflow,
        Self::Translation,
        Self::Aborted,
        Self::Policy,
    ];

    /// The name used in logs and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Payload => "payload",
            Self::Length => "length",
            Self::Flags => "flags",
            Self::Header => "header",
            Self::SynOptions => "syn_options",
            Self::Deadline => "deadline",
            Self::AckDeadline => "ack_deadline",
            Self::Lag => "lag",
            Self::Extra => "extra",
            Self::OutboundTuple => "outbound_tuple",
            Self::Unparseable => "unparseable",
            Self::TableFull => "table_full",
            Self::HoldFull => "hold_full",
            Self::InputOverflow => "input_overflow",
            Self::OutputOverflow => "output_overflow",
            Self::Translation => "translation",
            Self::Aborted => "aborted",
            Self::Policy => "policy",
        }
    }

    /// The place of its counter.
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// How many differing bytes a [`Divergence`] shows.
pub const SHOWN_BYTES: usize = 16;

/// The first bytes of one side at the difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shown {
    bytes: [u8; SHOWN_BYTES],
    len: u8,
}

impl Shown {
    pub(crate) fn read(len: usize, read: impl FnOnce(&mut [u8])) -> Self {
        let len = len.min(SHOWN_BYTES);
        let mut shown = Self {
            bytes: [0; SHOWN_BYTES],
            len: len as u8,
        };
        read(&mut shown.bytes[..len]);
        shown
    }

    /// The bytes; empty where a side has none.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// In hexadecimal; `-` where a side has none.
impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.len == 0 {
            return f.write_str("-");
        }
        self.bytes()
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A reason for a checkpoint, with what is known about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Divergence {
    /// Why.
    pub cause: Cause,
    /// The flow, where there is one.
    pub flow: Option<FlowKey>,
    /// Where: for payload and length of TCP, bytes from the start of the PVM's segment payload; of
    /// fragments, from the start of their packet's payload; otherwise from the Ethernet header.
    pub offset: u32,
    /// The PVM's bytes there.
    pub primary: Shown,
    /// The SVM's bytes there.
    pub secondary: Shown,
}

/// Cause, flow, offset and the bytes of both sides, as far as they are known: one line for a log.
impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.cause.name())?;
        if let Some(flow) = &self.flow {
            write!(f, " in {flow}")?;
        }
        if self.offset == 0 && self.primary.len == 0 && self.secondary.len == 0 {
            return Ok(());
        }
        let Self {
            offset,
            primary,
            secondary,
            ..
        } = self;
        write!(
            f,
            " at byte {offset}: primary {primary}, secondary {secondary}"
        )
    }
}

impl Divergence {
    /// One that has no bytes to show.
    pub fn plain(cause: Cause, flow: Option<FlowKey>) -> Self {
        let none = Shown::default();
        Self {
            cause,
            flow,
            offset: 0,
            primary: none,
            secondary: none,
        }
    }

    /// The same at `offset`, with the bytes of both sides from these places in their frames on.
    pub(crate) fn showing<F: Frames + ?Sized>(
        self,
        frames: &F,
        offset: usize,
        primary: Option<Place<'_>>,
        secondary: Option<Place<'_>>,
    ) -> Self {
        let show = |place: Option<Place<'_>>| match place {
            // Nothing is at hand behind the headers that come with a digest.
            Some((token, end, at)) if at < usize::from(end) => {
                let left = usize::from(end) - at;
                Shown::read(left, |out| frames.copy_out(token, at, out))
            }
            _ => Shown::default(),
        };
        Self {
            offset: offset as u32,
            primary: show(primary),
            secondary: show(secondary),
            ..self
        }
    }
}

/// A frame, where its packet ends, and a place in it.
pub(crate) type Place<'a> = (&'a Token, u16, usize);

#[cfg(test)]
mod tests {
    use alloc::format;
    use alloc::string::ToString;

    use super::*;
    use crate::flow::Direction;
    use crate::testing::{Side, VecFrames, udp};
    use crate::wire;

    #[test]
    fn a_divergence_reads_as_one_line_with_bytes_in_hexadecimal() {
        let bytes = udp(Side::V4, false, 53, 9, &[0xab, 0x01]);
        let key = wire::parse(&bytes, bytes.len(), Direction::FromGuest).key;
        let mut frames = VecFrames::new(1);
        let token = frames.insert(&bytes).unwrap();
        let plain = Divergence::plain(Cause::Payload, Some(key));
        assert_eq!(plain.to_string(), format!("payload in {key}"));
        let end = bytes.len() as u16;
        let shown = plain.showing(
            &frames,
            42,
            Some((&token, end, 42)),
            Some((&token, end, 42 + 9)),
        );
        let line = format!("payload in {key} at byte 42: primary ab01, secondary -");
        assert_eq!(shown.to_string(), line);
        frames.take(token);
        assert_eq!(
            Divergence::plain(Cause::HoldFull, None).to_string(),
            "hold_full"
        );
    }

    #[test]
    fn every_cause_has_its_own_counter() {
        for (at, cause) in Cause::ALL.iter().enumerate() {
            assert_eq!(cause.index(), at, "{}", cause.name());
        }
    }
}
