//! The intervals and limits of the control protocol.

use core::fmt;

/// Durations in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Between heartbeats.
    pub heartbeat_us: u64,
    /// That many heartbeats without a sign of the peer propose a change of role.
    pub heartbeat_count: u32,
    /// Between periodic checkpoints; 0 switches them off.
    pub checkpoint_interval_us: u64,
    /// A hello, the acknowledgement of a shutdown, or a sign of a peer that has not synchronised yet: what takes longer
    /// means that the peer is lost.
    pub step_timeout_us: u64,
    /// How long each step of a checkpoint may take.
    pub steps: StepLimits,
    /// Between attempts to reach an arbiter that does not answer.
    pub arbiter_retry_us: u64,
}

impl Timing {
    /// Silence that proposes a change of role.
    pub const fn detection_us(&self) -> u64 {
        self.heartbeat_us * self.heartbeat_count as u64
    }

    /// How long a step may take.
    pub const fn limit_us(&self, step: Step) -> u64 {
        let (limit_us, detection_us) = (self.steps.of(step), self.detection_us());
        match step {
            Step::Begin if detection_us > limit_us => detection_us,
            _ => limit_us,
        }
    }

    /// Silence that ends a synchronisation. Nobody can take over before its end, so haste gains nothing; and hosts that
    /// open their packet channels meanwhile (AF_XDP: programs, maps, sockets) may be silent for some detection times when
    /// they are busy. Losing each other there, they would begin anew for ever.
    pub const fn sync_silence_us(&self) -> u64 {
        let (detection_us, step_us) = (self.detection_us(), self.step_timeout_us);
        if detection_us > step_us {
            detection_us
        } else {
            step_us
        }
    }

    /// How long after it sent a heartbeat that was answered the primary may release what needs no other word of
    /// the secondary. Shorter than the detection by a quarter, which covers the clocks' drift and the wake-up
    /// between the check and the send.
    pub const fn lease_us(&self) -> u64 {
        self.detection_us() / 4 * 3
    }
}

/// A part of a checkpoint or of a synchronisation that has a limit of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Step {
    /// Primary: from the order to stop the SVM to its answer. Secondary: until its shell has stopped the SVM.
    Stop,
    /// Primary: until the capture is made.
    Capture,
    /// Primary: until the checkpoint is on the link.
    Send,
    /// Primary: from there until the secondary has said that it begins to come in. What is small enough goes into the
    /// kernel's buffers whatever becomes of the way. A peer of a version that does not say so has no such step.
    Begin,
    /// Primary: from there until the secondary has decided.
    Commit,
    /// Primary: from the wish to abort until the secondary has agreed, or has said that it is too late.
    Abort,
    /// Primary: between two signs of progress of a synchronisation.
    Sync,
    /// Secondary: from the stop of the SVM until the stage is whole.
    Stage,
    /// Secondary: from the commit point until the SVM is what the PVM was.
    Apply,
}

impl Step {
    /// How many steps there are.
    pub const COUNT: usize = 9;

    /// All steps, in the order of their counters.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Stop,
        Self::Capture,
        Self::Send,
        Self::Begin,
        Self::Commit,
        Self::Abort,
        Self::Sync,
        Self::Stage,
        Self::Apply,
    ];

    /// The name used in logs and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Capture => "capture",
            Self::Send => "send",
            Self::Begin => "begin",
            Self::Commit => "commit",
            Self::Abort => "abort",
            Self::Sync => "sync",
            Self::Stage => "stage",
            Self::Apply => "apply",
        }
    }

    /// Its place in a table of counters.
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How long each [`Step`] may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields repeat the steps")]
pub struct StepLimits {
    pub stop_us: u64,
    pub capture_us: u64,
    pub send_us: u64,
    /// The peer says it with its echoes: where the detection time is longer, that counts.
    pub begin_us: u64,
    pub commit_us: u64,
    pub abort_us: u64,
    pub sync_us: u64,
    /// More than stop, capture, send, begin, commit and abort together: the primary gives up first.
    pub stage_us: u64,
    pub apply_us: u64,
}

impl StepLimits {
    /// Generous: a step that takes longer has failed, not only been slow. The first round of a synchronisation
    /// is one step, and as long as it takes to send all of a large guest's RAM over a slow link.
    pub const DEFAULT: Self = Self {
        stop_us: 5_000_000,
        capture_us: 5_000_000,
        send_us: 20_000_000,
        begin_us: 3_000_000,
        commit_us: 10_000_000,
        abort_us: 5_000_000,
        sync_us: 3_600_000_000,
        stage_us: 50_000_000,
        apply_us: 20_000_000,
    };

    /// The limit of one step.
    pub const fn of(&self, step: Step) -> u64 {
        match step {
            Step::Stop => self.stop_us,
            Step::Capture => self.capture_us,
            Step::Send => self.send_us,
            Step::Begin => self.begin_us,
            Step::Commit => self.commit_us,
            Step::Abort => self.abort_us,
            Step::Sync => self.sync_us,
            Step::Stage => self.stage_us,
            Step::Apply => self.apply_us,
        }
    }
}

impl Default for StepLimits {
    fn default() -> Self {
        Self::DEFAULT
    }
}
