//! Deadlines of the reference comparator: what has waited too long, and for what (rules 6 and 9).

use colo_compare::PolicyAction;

use crate::decision::{Class, Flaw, Verdict};
use crate::reference::{Contents, Reference};

impl Reference {
    /// Time has passed.
    pub fn timeout(&mut self) {
        if self.cut.is_some() || self.frozen || self.muted {
            return;
        }
        for flow in 0..self.flows.len() {
            if self.flows[flow].has_diverged {
                continue;
            }
            if let Some(class) = self.overdue(flow) {
                self.diverge(flow, class);
            } else if self.has_surplus(flow) {
                self.surplus(flow);
            }
        }
    }

    /// Whether the next frame of a flow has waited too long, and for what.
    fn overdue(&mut self, flow: usize) -> Option<Class> {
        let head = self.head(flow)?;
        let verdict = self.judge(flow, head)?;
        let (at_us, limits) = (self.held[head].at_us, self.limits);
        let in_epoch_us = at_us.max(self.epoch_start_us);
        let (due_us, class) = match verdict {
            Verdict::Differs(class) => return Some(class),
            Verdict::Matched | Verdict::Free if self.waits_for_input_ack(head) => {
                (in_epoch_us + limits.ack_deadline_us, Class::AckDeadline)
            }
            Verdict::Matched | Verdict::Free => {
                (in_epoch_us + limits.lag_deadline_us, Class::AckDeadline)
            }
            Verdict::Wait if self.policy(flow) == PolicyAction::Hold => {
                (in_epoch_us + limits.compare_deadline_us, Class::Policy)
            }
            Verdict::Wait => self.late(flow, at_us, in_epoch_us),
        };
        (due_us <= self.now_us).then_some(class)
    }

    /// Until when the SVM may say the same.
    fn late(&self, flow: usize, at_us: u64, in_epoch_us: u64) -> (u64, Class) {
        let limits = &self.limits;
        let start_us = match (self.flaw, self.caught_up_us) {
            (Flaw::DeadlineFromCommit, _) => self.epoch_start_us,
            (_, Some(caught_up_us)) => caught_up_us,
            (_, None) => return (in_epoch_us + limits.lag_deadline_us, Class::Lag),
        };
        let from_us = at_us.max(start_us);
        let late = (from_us + limits.compare_deadline_us, Class::Deadline);
        match &self.flows[flow].contents {
            Contents::Datagrams(datagrams) => {
                let other_us = datagrams.since_us();
                let settled = other_us.map(|us| from_us.max(us) + limits.settle_us);
                match settled {
                    Some(us) if us <= late.0 => (us, Class::Contents),
                    _ => late,
                }
            }
            Contents::Stream(_) => late,
        }
    }

    /// Whether the SVM has said something that the PVM has not for too long.
    fn has_surplus(&self, flow: usize) -> bool {
        let Some(caught_up_us) = self.caught_up_us else {
            return false;
        };
        let (since_us, wait_us) = match &self.flows[flow].contents {
            Contents::Stream(s) => (s.control_since_us(), self.limits.compare_deadline_us),
            Contents::Datagrams(d) => (d.since_us(), self.limits.extra_deadline_us),
        };
        since_us.is_some_and(|us| us.max(caught_up_us) + wait_us <= self.now_us)
    }

    fn surplus(&mut self, flow: usize) {
        let notes = &mut self.outcome.notes;
        match &mut self.flows[flow].contents {
            Contents::Stream(_) => self.diverge(flow, Class::Flags),
            Contents::Datagrams(datagrams) => {
                if datagrams.is_harmless() {
                    notes.reports.push(datagrams.drop_first());
                } else {
                    self.diverge(flow, Class::Extra);
                }
            }
        }
    }
}
