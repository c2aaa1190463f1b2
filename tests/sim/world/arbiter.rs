//! The arbiter, and whether the VM lives.
//!
//! Invariant: a question is decided at one instant on the one record; its answer may come late or never.

use super::*;

impl World {
    /// A process asks the arbiter.
    pub fn ask(&mut self, host: usize, inc: u64, cas: Cas) {
        self.trace(|| format!("{} asks {cas:?}", NAMES[host]));
        let delay = 50 + self.chance.below(2_000);
        let calm = self.now > self.plan.calm_us;
        if !calm && self.chance.chance(self.plan.lost_answers) {
            let decided = delay + self.chance.below(20_000);
            if self.chance.chance(500) {
                let cas = cas.clone();
                self.later(
                    decided,
                    Event::Decide {
                        host,
                        inc,
                        cas,
                        answer: Answer::Late,
                    },
                );
                self.reply(host, inc, delay, Reply::Unavailable("timeout".into()));
            } else {
                self.later(
                    decided,
                    Event::Decide {
                        host,
                        inc,
                        cas,
                        answer: Answer::Lost,
                    },
                );
            }
            return;
        }
        self.later(
            delay,
            Event::Decide {
                host,
                inc,
                cas,
                answer: Answer::Comes,
            },
        );
    }

    pub(super) fn decide(&mut self, host: usize, inc: u64, cas: &Cas, answer: Answer) {
        let back = 50 + self.chance.below(2_000);
        if self.arbiter_down_until_us > self.now {
            if answer != Answer::Late {
                self.reply(host, inc, back, Reply::Unavailable("down".into()));
            }
            return;
        }
        let reply = match self.record.decide(cas) {
            Ok(record) => {
                self.replace(record.clone());
                Reply::Won(record)
            }
            Err(record) => Reply::Lost(record),
        };
        self.trace(|| format!("arbiter to {}: {reply:?} ({answer:?})", NAMES[host]));
        match answer {
            Answer::Comes => self.reply(host, inc, back, reply),
            Answer::Lost => self.reply(host, inc, back, Reply::Unavailable("lost".into())),
            Answer::Late => {}
        }
        self.check_viable();
    }

    pub(super) fn replace(&mut self, record: Record) {
        for (n, name) in NAMES.iter().enumerate() {
            if self.record.holder == *name && record.holder != *name {
                self.hosts[n].lost_holder_us = Some(self.now);
            }
        }
        self.record = record;
    }

    /// Plans the answer to a process that asked.
    pub fn reply(&mut self, host: usize, inc: u64, delay: u64, reply: Reply) {
        let event = HostEvent::Command(Command::Answer(reply));
        self.host_event(self.now + delay, host, inc, event);
    }

    /// Whether somebody is, or can become, the VM. Only faults may end that.
    pub(super) fn check_viable(&mut self) {
        let viable = self.hosts.iter().enumerate().any(|(n, host)| {
            host.process.as_ref().is_some_and(|p| {
                let holds = self.record.holder == NAMES[n] && p.may_hold();
                holds || self.record.standing == Standing::Paired { session: p.inc }
            })
        });
        if !viable && self.record.standing != Standing::Off && !self.outcome.vm_lost {
            self.outcome.vm_lost = true;
            self.trace(|| "the VM is lost".into());
        }
    }

    /// A core ended its process: allowed only when somebody else goes on.
    pub fn ended(&mut self, host: usize, outcome: &colo_control::Outcome) {
        self.trace(|| format!("{} ends: {outcome:?}", NAMES[host]));
        self.hosts[host].may_start_us = self.now + 20_000;
        self.check_viable();
        if self.outcome.vm_lost {
            let record = self.record.clone();
            self.fail(
                "liveness",
                format!("{} ended with {outcome:?} under {record:?}", NAMES[host]),
            );
        }
    }
}
