//! How a run ended, and the sum of many.

use colo_control::{Notice, Step};

/// How a run ended.
#[derive(Debug, Default, Clone)]
pub struct Outcome {
    pub violations: Vec<String>,
    pub trace: Vec<String>,
    pub answers: u64,
    pub takeovers: u64,
    /// By the step that the checkpoint was in: on the primary when it was last at work, and on the secondary when it proposed
    /// to take over.
    pub takeovers_at: [u64; Step::COUNT],
    /// Requests for a checkpoint that another one covered.
    pub coalesced: u64,
    pub commits: u64,
    /// Pages of checkpoints that the guest wrote again, running on, before all of them were sent.
    pub written_meanwhile: u64,
    pub matches: u64,
    pub digests: u64,
    pub fetched: u64,
    pub joins: u64,
    /// Commits that began a buffered epoch.
    pub buffered: u64,
    pub storms: u64,
    /// Returns from a storm.
    pub returns: u64,
    pub slowed: u64,
    /// vCPUs that stood still for lack of hold space.
    pub stopped: u64,
    pub not_followed: u64,
    /// SVMs that were too slow (rule 16), and those that stayed so however slow the PVM was.
    pub lags: u64,
    pub lags_unhelped: u64,
    /// Pages sent ahead of checkpoints, those written again before they were of use, and those that a checkpoint named.
    pub ahead_sent: u64,
    pub ahead_wasted: u64,
    pub ahead_used: u64,
    /// Steps that took too long.
    pub timeouts: [u64; Step::COUNT],
    /// Page streams that were found broken, by the step that the primary's checkpoint was in.
    pub streams_broken_at: [u64; Step::COUNT],
    /// Synchronisations that this ended.
    pub syncs_torn: u64,
    /// Streams that went on in their place, and links that ended because these broke again and again.
    pub streams_reopened: u64,
    pub streams_given_up: u64,
    /// Links that ended because page streams stood still.
    pub streams_stalled: u64,
    /// Links that were given up though both hosts lived.
    pub given_up: u64,
    /// While streams were broken: requests that another checkpoint covered, captures that waited, those of them that were called
    /// off, takeovers.
    pub coalesced_without_streams: u64,
    pub captures_waited: u64,
    pub captures_called_off: u64,
    pub takeovers_without_streams: u64,
    pub events: u64,
    pub vm_lost: bool,
    /// Runs in which the VM was lost, in a sum.
    pub lost: u64,
    pub virtual_us: u64,
    /// Longest time without an answer while clients waited, after the last fault.
    pub silence_us: u64,
}

impl Outcome {
    /// Adds the counts of a run, or of a sum.
    pub fn add(&mut self, other: &Self) {
        let pairs = [
            (&mut self.answers, other.answers),
            (&mut self.takeovers, other.takeovers),
            (&mut self.coalesced, other.coalesced),
            (&mut self.commits, other.commits),
            (&mut self.written_meanwhile, other.written_meanwhile),
            (&mut self.matches, other.matches),
            (&mut self.digests, other.digests),
            (&mut self.fetched, other.fetched),
            (&mut self.joins, other.joins),
            (&mut self.buffered, other.buffered),
            (&mut self.storms, other.storms),
            (&mut self.returns, other.returns),
            (&mut self.slowed, other.slowed),
            (&mut self.stopped, other.stopped),
            (&mut self.not_followed, other.not_followed),
            (&mut self.lags, other.lags),
            (&mut self.lags_unhelped, other.lags_unhelped),
            (&mut self.ahead_sent, other.ahead_sent),
            (&mut self.ahead_wasted, other.ahead_wasted),
            (&mut self.ahead_used, other.ahead_used),
            (&mut self.syncs_torn, other.syncs_torn),
            (&mut self.streams_reopened, other.streams_reopened),
            (&mut self.streams_given_up, other.streams_given_up),
            (&mut self.streams_stalled, other.streams_stalled),
            (&mut self.given_up, other.given_up),
            (
                &mut self.coalesced_without_streams,
                other.coalesced_without_streams,
            ),
            (&mut self.captures_waited, other.captures_waited),
            (&mut self.captures_called_off, other.captures_called_off),
            (
                &mut self.takeovers_without_streams,
                other.takeovers_without_streams,
            ),
            (&mut self.events, other.events),
            (&mut self.lost, other.lost + u64::from(other.vm_lost)),
        ];
        let steps = self.timeouts.iter_mut().zip(other.timeouts);
        let takeovers = self.takeovers_at.iter_mut().zip(other.takeovers_at);
        let broken = self.streams_broken_at.iter_mut();
        let broken = broken.zip(other.streams_broken_at);
        for (sum, n) in pairs
            .into_iter()
            .chain(steps)
            .chain(takeovers)
            .chain(broken)
        {
            *sum += n;
        }
    }

    /// Counts what a core tells.
    pub fn notice(&mut self, notice: &Notice) {
        match notice {
            Notice::StepTimedOut { step, .. } => self.timeouts[step.index()] += 1,
            Notice::Storm { .. } => self.storms += 1,
            Notice::StormOver => self.returns += 1,
            Notice::Throttled { run_pct: 0 } => self.stopped += 1,
            Notice::Throttled { .. } => self.slowed += 1,
            Notice::GivenUp { .. } => self.given_up += 1,
            Notice::CannotFollow { .. } => self.not_followed += 1,
            Notice::Lags { .. } => self.lags += 1,
            Notice::LagUnhelped { .. } => self.lags_unhelped += 1,
            // The hosts here are the same.
            Notice::Refused { reason } => self.violations.push(format!("refused: {reason}")),
        }
    }
}
