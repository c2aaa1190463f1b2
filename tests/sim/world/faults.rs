//! What goes wrong.
//!
//! Invariant: unless the plan is merciless, no fault kills the only copy of the VM.

use super::*;

impl World {
    pub(super) fn target(&self, target: Target) -> Option<usize> {
        let runs = |n: usize| self.hosts[n].process.is_some();
        let primary = NAMES.iter().position(|n| **n == *self.record.holder)?;
        match target {
            Target::Primary => runs(primary).then_some(primary),
            Target::Secondary => runs(1 - primary).then_some(1 - primary),
        }
    }

    /// Whether the VM survives the loss of this host.
    pub(super) fn is_spare(&self, host: usize) -> bool {
        let other = self.hosts[1 - host].process.as_ref();
        match self.record.standing {
            _ if self.record.holder != NAMES[host] => true,
            Standing::Paired { session } => other.is_some_and(|p| p.inc == session),
            _ => false,
        }
    }

    pub(super) fn power_off(&mut self, host: usize, inc: u64) {
        let Some(mut process) = self.hosts[host].process.take() else {
            return;
        };
        if process.inc == inc {
            self.hit(host, &mut process, &Fault::PowerOff);
        }
        if process.is_alive() {
            self.hosts[host].process = Some(process);
        }
        self.check_viable();
    }

    pub(super) fn strike(&mut self, n: usize) {
        let strike = self.plan.strikes[n].clone();
        let Some(host) = self.target(strike.target) else {
            return;
        };
        let Some(mut process) = self.hosts[host].process.take() else {
            return;
        };
        self.hit(host, &mut process, &strike.fault);
        if process.is_alive() {
            self.hosts[host].process = Some(process);
        }
        self.check_viable();
    }

    /// A process passes a named point: the faults that wait for it strike.
    pub fn pass(&mut self, host: usize, p: &mut Process, point: &str) {
        if self.now > self.plan.calm_us {
            return;
        }
        for n in 0..self.plan.strikes.len() {
            let When::Passing(name, nth) = self.plan.strikes[n].when else {
                continue;
            };
            if name == point {
                self.passed[n] += 1;
                if self.passed[n] == nth {
                    self.trace(|| format!("{} passes {point}", NAMES[host]));
                    let fault = self.plan.strikes[n].fault.clone();
                    self.hit(host, p, &fault);
                }
            }
        }
    }

    pub(super) fn hit(&mut self, host: usize, p: &mut Process, fault: &Fault) {
        let deadly = matches!(fault, Fault::Kill | Fault::PowerOff | Fault::FallSilent(_));
        if deadly && !self.plan.merciless && !self.is_spare(host) {
            return;
        }
        self.trace(|| format!("FAULT at {}: {fault:?}", NAMES[host]));
        match *fault {
            Fault::Kill => {
                p.die();
                self.hosts[host].may_start_us = self.now + 30_000;
                if let Some(link) = p.link.take() {
                    self.close(link, host, true);
                }
            }
            Fault::PowerOff => {
                p.die();
                self.hosts[host].may_start_us = self.now + 300_000;
                if let Some(link) = p.link.take() {
                    self.links[link].open[host] = (false, false);
                    // What was still in its buffers is lost, or not.
                    self.links[link].cut[1 - host] |= self.chance.chance(500);
                }
            }
            Fault::FallSilent(us) => {
                self.cut(p, &[1 - host], u64::MAX);
                let inc = p.inc;
                self.later(us, Event::PowerOff { host, inc });
            }
            Fault::Pause(us) => {
                let until_us = self.hosts[host].paused_until_us.max(self.now + us);
                self.hosts[host].paused_until_us = until_us;
                self.at(until_us, Event::Resume(host));
                self.hosts[host].gap_us += us;
            }
            Fault::Deafen(us) => self.cut(p, &[host], us),
            Fault::Cut(us) => self.cut(p, &[0, 1], us),
            Fault::Reset => {
                if let Some(link) = p.link {
                    let event = HostEvent::Link(link, Channel::Control, LinkMsg::Down);
                    let inc = p.inc;
                    self.host_event(self.now, host, inc, event);
                }
            }
            Fault::Streams(fault) => self.hit_streams(host, p, fault),
            Fault::ArbiterOutage(us) => self.arbiter_down_until_us = self.now + us,
            Fault::ShutDown => {
                let event = HostEvent::PrimaryCore(PrimaryEvent::ShutDown);
                let inc = p.inc;
                self.host_event(self.now, host, inc, event);
            }
        }
    }

    pub(super) fn cut(&mut self, p: &Process, hosts: &[usize], us: u64) {
        let Some(link) = p.link else { return };
        for &host in hosts {
            self.links[link].cut[host] = true;
            if us != u64::MAX {
                self.later(us, Event::Heal(link, host));
            }
        }
    }
}
