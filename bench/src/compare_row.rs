//! One line of `compare`'s result, whatever its kind.

use serde::Serialize;

/// A figure of the comparator, beside its peer's where there is one.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct CompareRow {
    pub(crate) kind: &'static str,
    pub(crate) protocol: &'static str,
    /// Bytes of payload in each frame.
    pub(crate) payload: usize,
    pub(crate) flows: usize,
    /// Ours. For `path` the CPU time of the whole process, kernel included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ns_per_pair: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pairs_per_s: Option<f64>,
    /// Of the primary's frames.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) gbit_s: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peer: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peer_cpu_ns_per_pair: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peer_pairs_per_s: Option<f64>,
    /// Checkpoints that the peer asked for although all frames were equal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peer_requests: Option<u64>,
    /// Instructions in user space.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) instructions_per_pair: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) peer_instructions_per_pair: Option<f64>,
    /// The peer's figure divided by ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ratio: Option<f64>,
}
