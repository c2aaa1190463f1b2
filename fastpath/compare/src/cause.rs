//! Why two outputs count as different, or why a checkpoint is wanted for another reason.
//!
//! Invariant: the names are stable; they appear in logs, counters and reports.

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
    use super::*;

    #[test]
    fn every_cause_has_its_own_counter() {
        for (at, cause) in Cause::ALL.iter().enumerate() {
            assert_eq!(cause.index(), at, "{}", cause.name());
        }
    }
}
