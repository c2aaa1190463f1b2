//! What the paths ask their shell to do, and how they refuse a message that breaks the protocol.

use crate::cause::Divergence;
use crate::frames::Token;

/// By what right a frame leaves (invariant 1 of the design: output commit).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Right {
    /// The SVM sent the same.
    Match,
    /// A committed checkpoint covers it.
    Checkpoint,
    /// It needs no counterpart: a pure ACK, or bytes that the client has or had already.
    Free,
    /// A policy says that its flow is not protected.
    Policy,
    /// This host is alone.
    Alone,
}

/// What a [`crate::PrimaryPath`] wants done, in this order.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "actions own frames"]
pub enum Action {
    /// Send the frame to the NIC; it is in client space and its checksums are up to date.
    Release {
        /// The frame; the shell gives the slot back when it is sent.
        token: Token,
        /// Why it may leave.
        right: Right,
        /// From production to now.
        held_us: u64,
    },
    /// Send an input frame to the secondary, then give the slot back.
    Mirror {
        /// The epoch in which the PVM got it (rule 4).
        epoch: u64,
        /// Its place in the order of delivery, from 1.
        input_seq: u64,
        /// The frame, in the PVM's guest space.
        token: Token,
    },
    /// Tell the secondary that this output of the SVM has been released (rule 9).
    SvmReleased {
        /// The number under which the secondary sent it.
        svm_seq: u64,
    },
    /// Ask the secondary for the bytes of this output of the SVM, whose digest does not say enough:
    /// `SecondaryPath::fetch` there, and what it sends then for
    /// [`crate::PrimaryPath::handle_svm_output`] here.
    Fetch {
        /// The number under which the secondary sent the digest.
        svm_seq: u64,
    },
    /// Tell the secondary that the pending output of the checkpoint of this epoch has been
    /// released (rule 12).
    PendingReleased {
        /// The epoch that the checkpoint covers.
        epoch: u64,
    },
    /// Take a checkpoint as soon as possible.
    Checkpoint(Divergence),
}

/// What a `SecondaryPath` wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecondaryAction {
    /// Tell the primary that input up to this number is kept here (rule 5).
    AckInput {
        /// The highest number.
        up_to: u64,
    },
    /// Send the stored output to the primary: see `SecondaryPath`.
    SendOutput {
        /// The epoch in which the SVM produced it.
        epoch: u64,
        /// Its number.
        svm_seq: u64,
    },
    /// Send the headers of the stored output to the primary, with a digest for the payload behind
    /// them: see `SecondaryPath`.
    SendDigest {
        /// The epoch in which the SVM produced it.
        epoch: u64,
        /// Its number.
        svm_seq: u64,
        /// Bytes of the frame that are sent.
        header_len: u16,
        /// Bytes that the digest stands for.
        payload_len: u16,
        /// Of the payload and its length.
        digest: u128,
    },
    /// Tell the primary that the SVM has consumed its backlog (rule 9).
    CaughtUp {
        /// The epoch.
        epoch: u64,
    },
    /// Ask the primary for a checkpoint.
    RequestCheckpoint(crate::Cause),
}

/// A message that the protocol does not allow at this point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// Commit or abort without a cut.
    #[error("checkpoint of epoch {epoch}: none is in flight; end this session")]
    NoCheckpoint {
        /// The epoch that was named.
        epoch: u64,
    },
    /// Commit or abort of another epoch than the one that was cut.
    #[error("checkpoint of epoch {found}: the one in flight is of epoch {expected}")]
    WrongEpoch {
        /// The epoch in flight.
        expected: u64,
        /// The epoch that was named.
        found: u64,
    },
    /// Mirrored input that is missing or came twice.
    #[error("mirrored input {found} came, {expected} was expected; end this session")]
    InputGap {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        found: u64,
    },
    /// A checkpoint is in flight already (rule 7).
    #[error("the checkpoint of epoch {epoch} is still in flight")]
    CheckpointInFlight {
        /// Its epoch.
        epoch: u64,
    },
    /// A secondary joins while another one follows.
    #[error("a secondary follows already, in epoch {epoch}; go alone before another one joins")]
    AlreadyPaired {
        /// The epoch that runs.
        epoch: u64,
    },
    /// The checkpoint's translation record is not usable.
    #[error(transparent)]
    Record(#[from] crate::RecordError),
}
