//! Datagrams of one flow in the reference comparator: two lists.

use colo_compare::PolicyAction;

use crate::decision::{Class, Flaw, Notes, Said, Verdict};
use crate::message::{Carried, FlowPlan, Message};

/// What the SVM has said and the PVM has not.
#[derive(Debug)]
pub struct Datagrams {
    plan: FlowPlan,
    window: usize,
    flaw: Flaw,
    said: Vec<Said>,
}

impl Datagrams {
    pub fn new(plan: FlowPlan, window: usize, flaw: Flaw) -> Self {
        let window = if flaw == Flaw::NoReorder { 1 } else { window };
        Self {
            plan,
            window,
            flaw,
            said: Vec::new(),
        }
    }

    pub fn said(&mut self, said: Said) {
        self.said.push(said);
    }

    /// First in, first out, within the window in any order.
    fn counterpart(&self, message: &Message, policy: PolicyAction) -> Option<usize> {
        let window = self.said.len().min(self.window);
        let mut all = 0..window;
        let is_equal = |at: &usize| self.is_same(message, &self.said[*at].message, policy);
        match self.flaw {
            Flaw::LastInFirstOut => (0..self.said.len()).rev().take(window).find(is_equal),
            _ => all.find(is_equal),
        }
    }

    pub fn judge(&self, message: &Message, waiting: usize, policy: PolicyAction) -> Verdict {
        if self.counterpart(message, policy).is_some() {
            Verdict::Matched
        } else if self.said.len() >= self.window && waiting >= self.window {
            Verdict::Differs(Class::Contents)
        } else {
            Verdict::Wait
        }
    }

    fn is_same(&self, a: &Message, b: &Message, policy: PolicyAction) -> bool {
        let ignores = |place: usize| match policy {
            PolicyAction::IgnoreBytes { from, end } => {
                place >= from as usize && (place < end as usize || end == u32::MAX)
            }
            _ => false,
        };
        let mut pairs = a.payload.iter().zip(&b.payload).enumerate();
        let same_bytes = pairs.all(|(place, (a, b))| a == b || ignores(place));
        let has_header = !matches!(self.plan.carried, Carried::Arp | Carried::Lldp);
        let same_header = !has_header || a.ttl == b.ttl || self.flaw == Flaw::NoHeaders;
        let same_noise = self.flaw != Flaw::NoiseCounts || a.noise == b.noise;
        let same_length = a.payload.len() == b.payload.len();
        same_bytes && same_header && same_noise && same_length
    }

    pub fn left(&mut self, message: &Message, notes: &mut Notes) {
        let at = self.counterpart(message, self.plan.policy);
        if let Some(at) = at {
            notes.reports.push(self.said.remove(at).svm_seq);
        }
    }

    /// Since when the oldest has had no counterpart.
    pub fn since_us(&self) -> Option<u64> {
        self.said.first().map(|said| said.at_us)
    }

    /// Address resolution runs on the guests' own timers.
    pub fn is_harmless(&self) -> bool {
        self.plan.carried == Carried::Arp
    }

    /// Gives up the oldest.
    pub fn drop_first(&mut self) -> u64 {
        self.said.remove(0).svm_seq
    }

    pub fn rebase(&mut self) {
        if self.flaw != Flaw::EpochsMixed {
            self.said.clear();
        }
    }
}
