//! The simulated world: virtual time, two hosts, the link, the arbiter, the clients' network, faults, checkers.
//!
//! Invariants: one seed decides everything, events of one instant happen in the order they were planned, so a run
//! replays exactly. Checkers look only at what leaves a host and at what clients were told, except *all or nothing*
//! and *bounded*, which look at the hosts' memory.

mod arbiter;
mod clients;
mod faults;
mod links;
mod outcome;
mod streams;

pub use clients::show;
pub use outcome::Outcome;
pub use streams::StreamFault;

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use colo_control::{Cas, PrimaryEvent, Record, Reply, Standing, Step};

use crate::client::{DatagramClient, Oracle, TcpClient};
use crate::host::{Command, Process, Role, Shell};
use crate::link::{Channel, Link, LinkMsg};
use crate::plan::{Fault, Mutation, Plan, Target, When};
use crate::prng::Prng;

/// After the last fault everything must be done within this time.
const LIVENESS_US: u64 = 30_000_000;
/// More events than any healthy run has.
const MOST_EVENTS: u64 = 2_000_000;
/// Trace lines kept.
const TRACE_LINES: usize = 100_000;
pub const NAMES: [&str; 2] = ["a", "b"];

/// What happens at a host.
#[derive(Debug)]
pub enum HostEvent {
    Frame(Vec<u8>),
    Command(Command),
    PrimaryCore(PrimaryEvent),
    Link(usize, Channel, LinkMsg),
    GuestWake,
    SendChunk,
    /// Something is due between two checkpoints, if none came in between.
    AheadStep(u64),
    RoundSent {
        sent_pages: u64,
        took_us: u64,
    },
    /// The control thread hears that the checkpoint thread has found these page streams broken.
    StreamsBroken {
        link: usize,
        opened: u64,
    },
    /// A capture has waited long for page streams.
    StreamsAwaited,
    /// No word has come of those that were dialled, if none has.
    NotDialled {
        link: usize,
        opened: u64,
    },
    Timer,
}

#[derive(Debug)]
enum Event {
    /// `inc` 0: whoever runs there.
    Host {
        host: usize,
        inc: u64,
        event: HostEvent,
    },
    Client(usize),
    Datagrams(usize),
    ToClients(Vec<u8>),
    ToGuest(Vec<u8>),
    Link {
        link: usize,
        to: usize,
        channel: Channel,
        msg: LinkMsg,
    },
    Decide {
        host: usize,
        inc: u64,
        cas: Cas,
        answer: Answer,
    },
    Strike(usize),
    PowerOff {
        host: usize,
        inc: u64,
    },
    Heal(usize, usize),
    StreamsTested(usize, usize),
    StreamsMove(usize, usize),
    Resume(usize),
    Join,
}

/// What becomes of a question to the arbiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Comes,
    /// Decided, but the asker is told that there is no answer.
    Lost,
    /// The asker has been told already.
    Late,
}

struct Entry {
    at: u64,
    order: u64,
    event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// A place where a process can run.
pub struct Host {
    pub process: Option<Process>,
    pub chance: Prng,
    /// Its monotonic clock is so far ahead of the simulation's.
    pub clock_us: u64,
    paused_until_us: u64,
    /// What came in the meantime, in order.
    deferred: Vec<(u64, HostEvent)>,
    /// It stood still for so long and has not noticed.
    pub gap_us: u64,
    may_start_us: u64,
    lost_holder_us: Option<u64>,
    /// Of the checkpoint of its primary, as of the last event there; also of one that has died.
    pub step: Option<Step>,
}

/// See the module.
pub struct World {
    pub now: u64,
    /// Any instant; only differences from it count.
    pub began: std::time::Instant,
    pub plan: Plan,
    pub chance: Prng,
    pub hosts: [Host; 2],
    pub links: Vec<Link>,
    pub oracle: Oracle,
    pub outcome: Outcome,
    queue: BinaryHeap<Entry>,
    order: u64,
    pub record: Record,
    arbiter_down_until_us: u64,
    tcp: Vec<TcpClient>,
    datagrams: Vec<DatagramClient>,
    /// When each client runs next.
    tcp_at: Vec<u64>,
    datagrams_at: Vec<u64>,
    /// Where the switch has seen the guest.
    guest_port: Option<usize>,
    incarnations: u64,
    passed: Vec<u64>,
    progress_us: u64,
    verbose: bool,
}

impl World {
    pub fn new(seed: u64, mutation: Mutation, verbose: bool) -> Self {
        let mut chance = Prng::new(seed);
        let plan = Plan::draw(&mut chance, mutation);
        Self::with_plan(chance, plan, verbose)
    }

    pub fn with_plan(mut chance: Prng, plan: Plan, verbose: bool) -> Self {
        let tcp: Vec<_> = (1..)
            .zip(&plan.clients)
            .map(|(id, plan)| TcpClient::new(id, plan.clone(), chance.fork()))
            .collect();
        let datagrams: Vec<_> = (0..plan.datagram_clients)
            .map(|id| DatagramClient::new(id + 50, plan.datagrams, plan.divergent, chance.fork()))
            .collect();
        let hosts = std::array::from_fn(|_| Host {
            process: None,
            chance: chance.fork(),
            clock_us: chance.range(1_000_000, 9_000_000),
            paused_until_us: 0,
            deferred: Vec::new(),
            gap_us: 0,
            may_start_us: 0,
            lost_holder_us: None,
            step: None,
        });
        let passed = vec![0; plan.strikes.len()];
        let record = Record {
            generation: 1,
            holder: NAMES[0].into(),
            standing: Standing::Alone,
        };
        let mut world = Self {
            now: 0,
            began: std::time::Instant::now(),
            chance,
            hosts,
            links: Vec::new(),
            oracle: Oracle::default(),
            outcome: Outcome::default(),
            queue: BinaryHeap::new(),
            order: 0,
            record: record.clone(),
            arbiter_down_until_us: 0,
            tcp_at: vec![u64::MAX; tcp.len()],
            datagrams_at: vec![u64::MAX; datagrams.len()],
            tcp,
            datagrams,
            guest_port: None,
            incarnations: 1,
            passed,
            progress_us: 0,
            verbose,
            plan,
        };
        world.hosts[0].process = Some(Process::primary(&world.plan, 1, 0, record));
        let join = world.chance.below(200_000);
        world.later(join, Event::Join);
        for at in 0..world.plan.strikes.len() {
            if let When::At(us) = world.plan.strikes[at].when {
                world.later(us, Event::Strike(at));
            }
        }
        (0..world.tcp.len()).for_each(|n| world.plan_client(n));
        (0..world.datagrams.len()).for_each(|n| world.plan_datagrams(n));
        world
    }

    /// Runs to the end.
    pub fn run(mut self) -> Outcome {
        let limit = self.plan.calm_us + LIVENESS_US;
        let mut end = None;
        while let Some(entry) = self.queue.pop() {
            if entry.at > limit || end.is_some_and(|end| entry.at > end) {
                break;
            }
            self.now = entry.at;
            self.outcome.events += 1;
            let answers = self.oracle.answers;
            self.happen(entry.event);
            self.watch_progress(answers);
            if self.outcome.events > MOST_EVENTS {
                self.fail("liveness", "no rest".into());
            }
            let failed = self.oracle.violations.len() + self.outcome.violations.len();
            if failed > 0 || self.outcome.vm_lost {
                break;
            }
            if end.is_none() && self.is_done() && self.now > self.plan.calm_us {
                end = Some(self.now + 100_000);
            }
        }
        self.finish()
    }

    fn watch_progress(&mut self, before: u64) {
        if self.oracle.answers != before || self.now < self.plan.calm_us || self.is_done() {
            self.progress_us = self.now;
        }
        let silence_us = self.now - self.progress_us;
        self.outcome.silence_us = self.outcome.silence_us.max(silence_us);
    }

    fn is_done(&self) -> bool {
        let is_off = self.record.standing == Standing::Off;
        if is_off && self.hosts.iter().all(|h| h.process.is_none()) {
            return true;
        }
        self.tcp.iter().all(|c| c.finished) && self.datagrams.iter().all(DatagramClient::finished)
    }

    fn finish(mut self) -> Outcome {
        let broken = !self.oracle.violations.is_empty() || !self.outcome.violations.is_empty();
        if !broken && !self.outcome.vm_lost && !self.is_done() {
            let text = self.describe_unfinished();
            self.fail("liveness", text);
        }
        for (host, name) in NAMES.iter().enumerate() {
            let left = self.hosts[host].process.take().map_or(0, Process::close);
            if left != 0 && !broken {
                self.fail("bounded", format!("{name} leaks {left} frames"));
            }
        }
        let mut outcome = self.outcome;
        outcome.answers = self.oracle.answers;
        outcome.virtual_us = self.now;
        let at = format!(" (at {} us)", self.now);
        let told = self.oracle.violations.into_iter().map(|v| v + &at);
        outcome.violations.extend(told);
        outcome
    }

    fn describe_unfinished(&self) -> String {
        let tcp: Vec<_> = self.tcp.iter().filter(|c| !c.finished).collect();
        let datagrams: Vec<_> = self.datagrams.iter().filter(|c| !c.finished()).collect();
        let hosts: Vec<_> = self
            .hosts
            .iter()
            .map(|h| h.process.as_ref().map(Process::state))
            .collect();
        format!(
            "clients wait: {tcp:?} {datagrams:?}, hosts {hosts:?}, record {:?}",
            self.record
        )
    }

    /// Reports a violation.
    pub fn fail(&mut self, checker: &str, text: String) {
        self.trace(|| format!("VIOLATION {checker}: {text}"));
        self.outcome
            .violations
            .push(format!("{checker}: {text} (at {} us)", self.now));
    }

    /// Notes a line when the run is verbose.
    pub fn trace(&mut self, line: impl FnOnce() -> String) {
        if self.verbose {
            let line = format!("{:>9} {}", self.now, line());
            if self.outcome.trace.len() >= TRACE_LINES * 2 {
                self.outcome.trace.drain(..TRACE_LINES);
            }
            self.outcome.trace.push(line);
        }
    }

    // ---- events ----

    fn later(&mut self, us: u64, event: Event) {
        let at = self.now + us;
        self.at(at, event);
    }

    fn at(&mut self, at: u64, event: Event) {
        self.order += 1;
        self.queue.push(Entry {
            at,
            order: self.order,
            event,
        });
    }

    /// Plans an event of a process.
    pub fn host_event(&mut self, at: u64, host: usize, inc: u64, event: HostEvent) {
        self.at(at.max(self.now), Event::Host { host, inc, event });
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Host { host, inc, event } => self.at_host(host, inc, event),
            Event::Client(n) => self.run_client(n),
            Event::Datagrams(n) => self.run_datagrams(n),
            Event::ToClients(frame) => self.reach_clients(&frame),
            Event::ToGuest(frame) => self.reach_guest(frame),
            Event::Link {
                link,
                to,
                channel,
                msg,
            } => self.arrive(link, to, channel, msg),
            Event::Decide {
                host,
                inc,
                cas,
                answer,
            } => self.decide(host, inc, &cas, answer),
            Event::Strike(n) => self.strike(n),
            Event::PowerOff { host, inc } => self.power_off(host, inc),
            Event::Heal(link, host) => self.heal(link, host),
            Event::StreamsTested(link, host) => self.test_streams(link, host),
            Event::StreamsMove(link, host) => self.move_streams(link, host),
            Event::Resume(host) => self.resume(host),
            Event::Join => self.join(),
        }
    }

    fn at_host(&mut self, host: usize, inc: u64, event: HostEvent) {
        let place = &mut self.hosts[host];
        if place
            .process
            .as_ref()
            .is_none_or(|p| inc != 0 && p.inc != inc)
        {
            return;
        }
        if place.paused_until_us > self.now {
            place.deferred.push((inc, event));
            return;
        }
        let Some(mut process) = place.process.take() else {
            return;
        };
        Shell {
            world: self,
            host,
            p: &mut process,
        }
        .handle(event);
        if let Role::Primary(side) = &process.role {
            self.hosts[host].step = side.core.step();
        }
        if process.is_alive() {
            self.hosts[host].process = Some(process);
        }
        self.check_viable();
    }

    fn resume(&mut self, host: usize) {
        for (inc, event) in std::mem::take(&mut self.hosts[host].deferred) {
            self.at_host(host, inc, event);
        }
    }
}
