//! What is noted of divergences, and what is left at the end.
//!
//! Invariant: every PVM frame is counted once, as released or as held.

use std::collections::HashMap;

use colo_compare::{Cause, Divergence, FlowKey, PolicyAction};

use super::Replay;
use crate::capture::Record;
use crate::report::{Found, LISTED_MAX, Report};
use crate::svm::Output;
use crate::view;

impl<'a> Replay<'a> {
    /// Notes a divergence, with what the captures have at its place.
    pub(super) fn found(&mut self, divergence: &Divergence, at_us: u64, head: Option<&Record<'a>>) {
        let key = divergence.flow;
        let mut found = Found {
            cause: divergence.cause.name(),
            flow: key.map(|key| key.to_string()),
            offset: divergence.offset,
            at_us,
            ..Found::default()
        };
        let moved = key
            .and_then(|key| self.flows.get(&key))
            .map_or(0, |flow| flow.stream.offsets().seq);
        let of_flow = self.outputs.iter().filter(|o| Some(o.key) == key);
        let svm: Vec<_> = of_flow.map(|output| (output.record, moved)).collect();
        view::fill(&mut found, divergence, head, &svm);
        if let Some(flow) = key.and_then(|key| self.flows.get(&key)) {
            flow.row.divergences += 1;
            flow.row.cause.get_or_insert(divergence.cause.name());
        }
        if self.report.divergences.len() < LISTED_MAX {
            self.report.divergences.push(found);
        } else {
            self.report.divergences_omitted += 1;
        }
    }

    /// Both captures have ended: whatever is unmatched is late, or superfluous.
    pub(crate) fn finish(mut self) -> Report {
        self.take_checkpoint();
        self.has_ended = true;
        for (_, flow) in self.flows.iter_mut() {
            self.report.dropped += flow.stream.give_up_waiting() as u64;
        }
        // Longer than any deadline.
        let limits = &self.limits;
        let longest_us = limits.extra_deadline_us + limits.lag_deadline_us + limits.settle_us;
        self.pass_deadlines(self.now_us.saturating_add(longest_us.saturating_mul(2)));
        if self.judge_the_rest(&HashMap::new(), None) > 0 {
            self.count_checkpoint();
        }
        self.into_report()
    }

    /// At the end one checkpoint covers everything; here is what it covers besides the divergence
    /// that it was asked for. Gives how many more there are.
    pub(super) fn judge_the_rest(
        &mut self,
        heads: &HashMap<FlowKey, Record<'a>>,
        known: Option<FlowKey>,
    ) -> usize {
        let policy = &self.policy;
        let mut late = Vec::new();
        let mut surplus = Vec::new();
        for (key, flow) in self.flows.iter_mut() {
            let action = policy.action(&key, flow.opener());
            if Some(key) == known || matches!(action, PolicyAction::Hold | PolicyAction::Release) {
                continue;
            }
            if let Some(head) = heads.get(&key) {
                late.push((key, *head));
            } else if flow.row.divergences == 0 && flow.stream.svm_surplus() {
                surplus.push(key);
            }
        }
        let more = late.len() + surplus.len();
        for (key, head) in late {
            let divergence = Divergence::plain(Cause::Deadline, Some(key));
            self.found(&divergence, self.now_us, Some(&head));
        }
        for key in surplus {
            let of_flow = |output: &&Output<'_>| output.key == key;
            self.report.dropped += self.outputs.iter().filter(of_flow).count() as u64;
            let divergence = Divergence::plain(Cause::Extra, Some(key));
            self.found(&divergence, self.now_us, None);
        }
        more
    }

    fn into_report(mut self) -> Report {
        let stats = *self.path.stats();
        for (_, flow) in self.flows.iter_mut() {
            // A policy may hold a flow until a checkpoint that no other flow asked for.
            flow.row.held += std::mem::take(&mut flow.waiting);
        }
        let mut report = self.report;
        let (rows, others) = self.flows.into_rows();
        report.flows = rows.len() as u64;
        report.flow_table = rows;
        if let Some((forgotten, row)) = others {
            report.flows += forgotten;
            report.other_flows = Some(row);
        }
        for row in report.flow_table.iter().chain(&report.other_flows) {
            report.released += row.released;
            report.held += row.held;
        }
        report.pairs = stats.compared;
        report.dropped += stats.svm_surplus + self.outputs.dropped;
        self.path.close(&mut self.frames);
        report
    }
}
