//! The intervals and limits of the control protocol.

/// Durations in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Between heartbeats.
    pub heartbeat_us: u64,
    /// That many heartbeats without a sign of the peer propose a change of role.
    pub heartbeat_count: u32,
    /// Between periodic checkpoints; 0 switches them off.
    pub checkpoint_interval_us: u64,
    /// A step of a checkpoint or of pairing that takes longer means the peer is lost.
    pub step_timeout_us: u64,
    /// Between attempts to reach an arbiter that does not answer.
    pub arbiter_retry_us: u64,
}

impl Timing {
    /// Silence that proposes a change of role.
    pub const fn detection_us(&self) -> u64 {
        self.heartbeat_us * self.heartbeat_count as u64
    }

    /// How long after it sent a heartbeat that was answered the primary may release what needs no other word of
    /// the secondary. Shorter than the detection by a quarter, which covers the clocks' drift and the wake-up
    /// between the check and the send.
    pub const fn lease_us(&self) -> u64 {
        self.detection_us() / 4 * 3
    }
}
