//! What a replay found, as data: for programs as JSON, for people in [`crate::table`].
//!
//! Invariant: the names of the fields are stable; they are the keys of `colo compare --json`.

use serde::Serialize;

/// Divergences that are listed; more are only counted.
pub const LISTED_MAX: usize = 10_000;

/// Frames of one side.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Frames.
    pub packets: u64,
    /// Their bytes, Ethernet headers included.
    pub bytes: u64,
}

/// One flow's row.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct FlowRow {
    /// Protocol and ends.
    pub flow: String,
    /// What the PVM sent.
    pub primary: Traffic,
    /// What the SVM sent.
    pub secondary: Traffic,
    /// PVM frames that would have left at once: the SVM sent the same, or none was needed.
    pub released: u64,
    /// PVM frames that would have waited for a checkpoint.
    pub held: u64,
    /// Divergences found in this flow.
    pub divergences: u64,
    /// Cause of the first one.
    pub cause: Option<&'static str>,
}

impl FlowRow {
    pub(crate) fn named(flow: String) -> Self {
        Self {
            flow,
            ..Self::default()
        }
    }

    /// Whether a guest has sent something.
    pub(crate) fn has_output(&self) -> bool {
        self.primary.packets + self.secondary.packets > 0
    }

    /// Adds another row's numbers.
    pub(crate) fn add(&mut self, other: &Self) {
        for (sum, part) in [
            (&mut self.primary, other.primary),
            (&mut self.secondary, other.secondary),
        ] {
            sum.packets += part.packets;
            sum.bytes += part.bytes;
        }
        self.released += other.released;
        self.held += other.held;
        self.divergences += other.divergences;
        self.cause = self.cause.or(other.cause);
    }
}

/// One side of a divergence.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Shown {
    /// Which frame of the capture it is, from 1; `None` where the side sent nothing there.
    pub frame: Option<u64>,
    /// Its bytes from [`Found::view_at`] on; in JSON as hexadecimal digits.
    #[serde(serialize_with = "hexadecimal")]
    pub bytes: Vec<u8>,
}

/// One divergence.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Found {
    /// Why: a name of `colo_compare::Cause`.
    pub cause: &'static str,
    /// Where, if it is in one flow.
    pub flow: Option<String>,
    /// TCP: bytes from the start of the PVM's segment payload; otherwise from the Ethernet header.
    pub offset: u32,
    /// When, from the first frame of both captures.
    pub at_us: u64,
    /// Where the shown bytes begin, counted like `offset`.
    pub view_at: u32,
    /// The PVM's side.
    pub primary: Shown,
    /// The SVM's side.
    pub secondary: Shown,
}

/// See the module.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Report {
    /// PVM frames that were compared with SVM output.
    pub pairs: u64,
    /// PVM frames that would have left at once: the SVM sent the same, or none was needed (pure
    /// acknowledgements, retransmissions, flows that the policy lets go).
    pub released: u64,
    /// PVM frames that would have waited for a checkpoint, those still waiting at the end included.
    pub held: u64,
    /// SVM frames for which nothing of the PVM ever left: other contents, no counterpart. Nothing
    /// of the PVM's output is ever dropped.
    pub dropped: u64,
    /// What differs, in order of time; at most [`LISTED_MAX`].
    pub divergences: Vec<Found>,
    /// Divergences beyond those listed.
    pub divergences_omitted: u64,
    /// How many checkpoints COLO would have taken.
    pub checkpoints: u64,
    /// How many flows there are in which a guest sent something.
    pub flows: u64,
    /// Each of them, in order of appearance.
    pub flow_table: Vec<FlowRow>,
    /// The sum of flows that are not in the table because there are too many.
    pub other_flows: Option<FlowRow>,
    /// When the checkpoints would have been taken, from the first frame; at most [`LISTED_MAX`].
    pub checkpoints_at_us: Vec<u64>,
    /// Whose output is compared.
    pub guest_mac: String,
    /// What was added to the times of the secondary's capture, in nanoseconds.
    pub clock_shift_ns: i64,
    /// Frames for the guest in the primary's capture: given to the comparator as its input.
    pub primary_input: Traffic,
    /// Frames for the guest in the secondary's capture: not needed.
    pub secondary_input: Traffic,
    /// Frames of both captures that are neither from nor for the guest: left out.
    pub foreign: Traffic,
    /// Pure acknowledgements of the SVM: never compared.
    pub secondary_acks: u64,
    /// Frames whose times are out of order by more than the window that sorts them.
    pub disordered: u64,
}

impl Report {
    /// How many frames the PVM sent.
    pub fn primary_output(&self) -> u64 {
        self.released + self.held
    }

    /// Whether every output was the same.
    pub fn is_same(&self) -> bool {
        self.divergences.is_empty() && self.divergences_omitted == 0
    }
}

fn hexadecimal<S: serde::Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    serializer.serialize_str(&text)
}
