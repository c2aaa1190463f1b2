//! One TCP flow in the reference comparator: for every place of the PVM's stream, what the SVM
//! said there.
//!
//! Invariant: places are 64-bit numbers, counted from the first byte after the SYN.

use std::collections::BTreeMap;

use colo_compare::PolicyAction;

use crate::decision::{Class, Flaw, Notes, Said, Verdict};
use crate::message::{FlowPlan, Kind, Message};

/// A byte, or the end of the stream, with the headers around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Unit {
    /// `None` is the FIN.
    byte: Option<u8>,
    ttl: u8,
}

/// See the module.
#[derive(Debug)]
pub struct Stream {
    plan: FlowPlan,
    flaw: Flaw,
    /// The connection of the PVM's latest frame, of the SVM's, and the one that is judged.
    pvm_connection: u32,
    connection: u32,
    /// In the judged connection: the SYN has left; below these places nothing is compared, because
    /// a commit covers it or the client has it; the end of what has left.
    syn_left: bool,
    base: Option<i64>,
    una: Option<i64>,
    left: Option<i64>,
    /// End of what the PVM has produced.
    high: Option<i64>,
    /// The start of a connection has been seen.
    pvm_start: bool,
    units: BTreeMap<(u32, i64), Vec<Unit>>,
    /// Segments of the SVM that are not reported.
    unreported: Vec<Said>,
    /// SYNs and resets of the SVM that have no counterpart.
    control: Vec<Said>,
    /// The rules leave open what happens until the next commit.
    pub is_open: bool,
}

impl Stream {
    pub fn new(plan: FlowPlan, flaw: Flaw) -> Self {
        Self {
            plan,
            flaw,
            pvm_connection: 0,
            connection: 0,
            syn_left: false,
            base: None,
            una: None,
            left: None,
            high: None,
            pvm_start: false,
            units: BTreeMap::new(),
            unreported: Vec::new(),
            control: Vec::new(),
            is_open: false,
        }
    }

    fn place(&self, message: &Message, at: i64) -> i64 {
        match self.flaw {
            // Places as a comparison of plain 32-bit numbers sees them.
            Flaw::WrapUnsafe => {
                let isn = self.plan.isn(message.connection);
                i64::from(isn.wrapping_add(at as u32))
            }
            _ => at,
        }
    }

    /// The PVM has sent this, in the epoch that is compared or covered.
    pub fn produced(&mut self, message: &Message) {
        if message.connection != self.pvm_connection {
            self.pvm_connection = message.connection;
            self.high = None;
        }
        self.pvm_start |= message.kind == Kind::Open;
        if message.kind != Kind::Reset {
            let end = self.place(message, message.end());
            self.high = Some(self.high.map_or(end, |high| high.max(end)));
        }
    }

    /// Below it nothing is compared.
    fn floor(&self) -> i64 {
        let base = self.base.filter(|_| self.flaw != Flaw::NoBase);
        let una = self.una.filter(|_| self.flaw != Flaw::NoUna);
        base.max(una).unwrap_or(i64::MIN)
    }

    /// The client has everything below `ack`; it cannot have what was never sent.
    pub fn acknowledged(&mut self, connection: u32, ack: i64) {
        let is_sent = self.left.is_some_and(|left| ack <= left);
        if connection == self.connection && is_sent {
            self.una = self.una.max(Some(ack));
        }
    }

    pub fn judge(&mut self, message: &Message, policy: PolicyAction, notes: &mut Notes) -> Verdict {
        if message.kind != Kind::Data && self.is_answered_otherwise(message) {
            return Verdict::Differs(Class::Flags);
        }
        if message.connection > self.connection {
            self.enter(message.connection, notes);
        }
        match message.kind {
            Kind::Reset => self.judge_reset(message),
            Kind::Open => self.judge_open(message),
            Kind::Data if message.takes_space() => self.judge_data(message, policy),
            Kind::Data => Verdict::Free,
        }
    }

    /// The PVM's next connection between the same ports begins to be judged.
    fn enter(&mut self, connection: u32, notes: &mut Notes) {
        self.connection = connection;
        self.syn_left = false;
        (self.base, self.una, self.left) = (None, None, None);
        self.units.retain(|(of, _), _| *of >= connection);
        for list in [&mut self.unreported, &mut self.control] {
            let old = list
                .iter()
                .filter(|said| said.message.connection < connection);
            // Nobody waits for it: whether it is reported is open.
            notes.open_reports.extend(old.map(|said| said.svm_seq));
            list.retain(|said| said.message.connection >= connection);
        }
    }

    fn counterpart(&self, kind: Kind) -> Option<usize> {
        let is_it =
            |said: &Said| said.message.connection == self.connection && said.message.kind == kind;
        self.control.iter().position(is_it)
    }

    /// One guest accepts a connection and the other refuses it.
    fn is_answered_otherwise(&self, message: &Message) -> bool {
        let is_opposite =
            |other: &Message| other.kind != message.kind && other.attempt == message.attempt;
        let mut all = self.control.iter();
        self.plan.twin.is_none() && all.any(|said| is_opposite(&said.message))
    }

    fn has_same_header(&self, a: &Message, b: &Message) -> bool {
        a.ttl == b.ttl || self.flaw == Flaw::NoHeaders
    }

    fn judge_reset(&self, message: &Message) -> Verdict {
        match self.counterpart(Kind::Reset) {
            _ if self.flaw == Flaw::NoReset => Verdict::Free,
            Some(at) if self.has_same_header(message, &self.control[at].message) => {
                Verdict::Matched
            }
            Some(_) => Verdict::Differs(Class::Contents),
            // The SVM goes on where the PVM resets.
            None if self.has_unreported() => Verdict::Differs(Class::Flags),
            None => Verdict::Wait,
        }
    }

    fn has_unreported(&self) -> bool {
        let connection = self.connection;
        let mut all = self.unreported.iter();
        all.any(|said| said.message.connection == connection)
    }

    fn judge_open(&self, message: &Message) -> Verdict {
        if self.syn_left {
            return Verdict::Free;
        }
        let Some(at) = self.counterpart(Kind::Open) else {
            let is_refused = self.counterpart(Kind::Reset).is_some();
            return if is_refused {
                Verdict::Differs(Class::Flags)
            } else {
                Verdict::Wait
            };
        };
        let other = &self.control[at].message;
        let differing = message.options ^ other.options;
        if differing & 2 != 0 {
            Verdict::Differs(Class::Flags)
        } else if differing & 1 != 0 && self.flaw != Flaw::NoSynOptions {
            Verdict::Differs(Class::SynOptions)
        } else if self.has_same_header(message, other) {
            Verdict::Matched
        } else {
            Verdict::Differs(Class::Contents)
        }
    }

    fn judge_data(&mut self, message: &Message, policy: PolicyAction) -> Verdict {
        let (floor, end) = (self.floor(), self.place(message, message.end()));
        let has_left = self.left.is_some_and(|left| end <= left);
        if end <= floor || (has_left && self.flaw == Flaw::FreeRetransmissions) {
            return Verdict::Free;
        }
        for (n, byte) in message.payload.iter().enumerate() {
            let at = message.at + n as i64;
            if self.place(message, at) >= floor {
                match self.judge_byte(message, at, *byte, policy) {
                    Verdict::Matched => {}
                    verdict => return verdict,
                }
            }
        }
        if message.is_fin && self.flaw != Flaw::NoFin {
            match self.judge_fin(message) {
                Verdict::Matched => {}
                verdict => return verdict,
            }
        }
        if has_left {
            Verdict::Free
        } else {
            Verdict::Matched
        }
    }

    fn units(&self, message: &Message, at: i64) -> &[Unit] {
        let place = (message.connection, self.place(message, at));
        self.units.get(&place).map_or(&[], |units| units)
    }

    fn judge_byte(
        &mut self,
        message: &Message,
        at: i64,
        byte: u8,
        policy: PolicyAction,
    ) -> Verdict {
        // The SVM's stream has ended before this byte.
        if self
            .svm_end(message.connection)
            .is_some_and(|end| end <= self.place(message, at))
        {
            return Verdict::Differs(Class::Contents);
        }
        let units = self.units(message, at);
        let bytes: Vec<Unit> = units.iter().copied().filter(|u| u.byte.is_some()).collect();
        let Some(first) = bytes.first() else {
            return self.missing();
        };
        // Two copies under different headers: which of them counts is open.
        self.is_open |= bytes.iter().any(|unit| unit.ttl != first.ttl);
        if first.ttl != message.ttl && self.flaw != Flaw::NoHeaders {
            return Verdict::Differs(Class::Contents);
        }
        let is_ignored = match policy {
            // Where a connection that is older than the pair began is not known.
            PolicyAction::IgnoreBytes { from, end } if message.connection > 0 => {
                at >= i64::from(from) && (at < i64::from(end) || end == u32::MAX)
            }
            _ => false,
        };
        if first.byte == Some(byte) || is_ignored {
            Verdict::Matched
        } else {
            Verdict::Differs(Class::Contents)
        }
    }

    /// Where the SVM's stream ends, as far as it has said so.
    fn svm_end(&self, connection: u32) -> Option<i64> {
        let is_end = |units: &[Unit]| units.iter().any(|unit| unit.byte.is_none());
        let mut all = self.units.iter();
        let end = all.find(|((of, _), units)| *of == connection && is_end(units));
        end.map(|((_, at), _)| *at)
    }

    fn judge_fin(&mut self, message: &Message) -> Verdict {
        let at = message.at + message.payload.len() as i64;
        let units = self.units(message, at);
        let mut ends = units.iter().filter(|unit| unit.byte.is_none());
        let Some(first) = ends.next() else {
            return match units.first() {
                Some(_) => Verdict::Differs(Class::Contents),
                None => self.missing(),
            };
        };
        let is_open = ends.any(|unit| unit.ttl != first.ttl);
        let is_same = first.ttl == message.ttl || self.flaw == Flaw::NoHeaders;
        self.is_open |= is_open;
        if is_same {
            Verdict::Matched
        } else {
            Verdict::Differs(Class::Contents)
        }
    }

    /// An SVM that has reset the connection will not say the rest.
    fn missing(&self) -> Verdict {
        match self.counterpart(Kind::Reset) {
            Some(_) => Verdict::Differs(Class::Flags),
            None => Verdict::Wait,
        }
    }

    /// The judged frame has left.
    pub fn left(&mut self, message: &Message, notes: &mut Notes) {
        match message.kind {
            Kind::Reset => {
                if let Some(at) = self.counterpart(Kind::Reset) {
                    notes.reports.push(self.control.remove(at).svm_seq);
                }
                return;
            }
            Kind::Open => {
                self.syn_left = true;
                let zero = self.place(message, 0);
                self.base = self.base.max(Some(zero));
                // All SYNs of a connection are the same.
                while let Some(at) = self.counterpart(Kind::Open) {
                    notes.reports.push(self.control.remove(at).svm_seq);
                }
            }
            Kind::Data if !message.takes_space() => return,
            Kind::Data => {}
        }
        let end = self.place(message, message.end());
        self.left = self.left.max(Some(end));
        self.report(notes);
    }

    /// Reports the SVM's segments all of whose bytes have left.
    fn report(&mut self, notes: &mut Notes) {
        let Some(mut left) = self.left else { return };
        if self.flaw == Flaw::EarlyReport {
            left += 1;
        }
        for said in std::mem::take(&mut self.unreported) {
            let message = &said.message;
            let is_current = message.connection == self.connection;
            if is_current && self.place(message, message.end()) <= left {
                notes.reports.push(said.svm_seq);
            } else {
                self.unreported.push(said);
            }
        }
    }

    /// The SVM has said something. Gives the class of difference when it contradicts itself.
    pub fn said(&mut self, said: Said, notes: &mut Notes) -> Option<Class> {
        let message = said.message.clone();
        let is_current = message.connection == self.connection;
        let is_repeated_open = message.kind == Kind::Open && is_current && self.syn_left;
        let is_empty = !message.takes_space() && message.kind != Kind::Reset;
        // A refusal begins no connection: it belongs to the one that the PVM is opening.
        let may_refuse = message.kind == Kind::Reset && !self.syn_left;
        if message.connection < self.connection && !may_refuse {
            notes.open_reports.insert(said.svm_seq);
            return None;
        }
        if is_repeated_open || is_empty {
            notes.reports.push(said.svm_seq);
            return None;
        }
        if message.kind != Kind::Data {
            self.control.push(said);
            return None;
        }
        if is_current && self.place(&message, message.end()) <= self.floor() {
            // Nobody can be in doubt about it any more.
            notes.reports.push(said.svm_seq);
            self.is_open |= self.contradicts(&message);
            return None;
        }
        let contradicts = self.contradicts(&message);
        let contradicts_above = self.contradicts_above(&message);
        self.is_open |= contradicts && !contradicts_above;
        // Whether bytes count that were found equal before the SVM said that it has ended there.
        self.is_open |= message.is_fin && self.has_said_from(&message, message.end() - 1);
        self.store(&message);
        self.unreported.push(said);
        self.report(notes);
        contradicts_above.then_some(Class::Contents)
    }

    fn has_said_from(&self, message: &Message, at: i64) -> bool {
        let from = (message.connection, self.place(message, at));
        let to = (message.connection, i64::MAX);
        let mut all = self.units.range(from..=to);
        all.any(|(_, units)| units.iter().any(|unit| unit.byte.is_some()))
    }

    fn store(&mut self, message: &Message) {
        let ttl = message.ttl;
        let mut put = |at: i64, byte| {
            let place = (message.connection, self.place(message, at));
            self.units
                .entry(place)
                .or_default()
                .push(Unit { byte, ttl });
        };
        for (n, byte) in message.payload.iter().enumerate() {
            put(message.at + n as i64, Some(*byte));
        }
        if message.is_fin {
            put(message.at + message.payload.len() as i64, None);
        }
    }

    fn contradictions(&self, message: &Message) -> Vec<i64> {
        let bytes = message.payload.iter().enumerate();
        let differing = bytes.filter_map(|(n, byte)| {
            let at = message.at + n as i64;
            let said = self.units(message, at).iter().filter_map(|unit| unit.byte);
            said.into_iter().any(|said| said != *byte).then_some(at)
        });
        differing.collect()
    }

    fn contradicts(&self, message: &Message) -> bool {
        !self.contradictions(message).is_empty()
    }

    /// What lies below the floor may be forgotten already.
    fn contradicts_above(&self, message: &Message) -> bool {
        let is_current = message.connection == self.connection;
        let floor = if is_current { self.floor() } else { i64::MIN };
        let mut all = self.contradictions(message).into_iter();
        all.any(|at| self.place(message, at) >= floor)
    }

    /// Since when the SVM's oldest SYN or reset has had no counterpart.
    pub fn control_since_us(&self) -> Option<u64> {
        self.control.iter().map(|said| said.at_us).min()
    }

    /// A commit covers all that the PVM has produced; what the SVM said is forgotten.
    pub fn rebase(&mut self) {
        if self.flaw == Flaw::EpochsMixed {
            return;
        }
        self.units.clear();
        self.unreported.clear();
        self.control.clear();
        if self.connection != self.pvm_connection {
            self.una = None;
        }
        self.connection = self.pvm_connection;
        self.syn_left = self.pvm_start;
        (self.base, self.left) = (self.high, self.high);
        self.is_open = false;
    }
}
