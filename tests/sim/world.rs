//! The simulated world: virtual time, two hosts, the link, the arbiter, the clients' network, faults, checkers.
//!
//! Invariants: one seed decides everything, events of one instant happen in the order they were planned, so a run
//! replays exactly. Checkers look only at what leaves a host and at what clients were told, except *all or nothing*
//! and *bounded*, which look at the hosts' memory.

mod arbiter;
mod faults;
mod outcome;

pub use outcome::Outcome;

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use colo_compare::testing::GUEST_MAC;
use colo_compare::{Direction, Protocol, wire};
use colo_control::{Cas, PrimaryEvent, Record, Reply, Standing, Step};

use crate::client::{DatagramClient, Oracle, TcpClient, addressee};
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

    // ---- the clients' network ----

    fn plan_client(&mut self, n: usize) {
        let at = self.tcp[n].deadline().unwrap_or(u64::MAX).max(self.now);
        if at < self.tcp_at[n] {
            self.tcp_at[n] = at;
            self.at(at, Event::Client(n));
        }
    }

    fn run_client(&mut self, n: usize) {
        if self.tcp_at[n] <= self.now {
            self.tcp_at[n] = u64::MAX;
        }
        let mut out = Vec::new();
        self.tcp[n].wake(self.now, &mut self.oracle, &mut out);
        self.client_frames(out);
        self.plan_client(n);
    }

    fn plan_datagrams(&mut self, n: usize) {
        let at = self.datagrams[n]
            .deadline()
            .unwrap_or(u64::MAX)
            .max(self.now);
        if at < self.datagrams_at[n] {
            self.datagrams_at[n] = at;
            self.at(at, Event::Datagrams(n));
        }
    }

    fn run_datagrams(&mut self, n: usize) {
        if self.datagrams_at[n] <= self.now {
            self.datagrams_at[n] = u64::MAX;
        }
        let mut out = Vec::new();
        self.datagrams[n].wake(self.now, &self.oracle, &mut out);
        self.client_frames(out);
        self.plan_datagrams(n);
    }

    fn client_frames(&mut self, frames: Vec<Vec<u8>>) {
        for frame in frames {
            for delay in self.transit() {
                self.later(delay, Event::ToGuest(frame.clone()));
            }
        }
    }

    /// When the copies of a frame arrive, after now.
    fn transit(&mut self) -> Vec<u64> {
        let (net, chance) = (&self.plan.net, &mut self.chance);
        let calm = self.now > self.plan.calm_us;
        let mut delay = net.delay_us + chance.below(net.jitter_us + 1);
        if calm {
            return vec![delay];
        }
        if chance.chance(net.loss) {
            return Vec::new();
        }
        if chance.chance(net.reorder) {
            delay += chance.below(20_000);
        }
        if chance.chance(net.duplicate) {
            return vec![delay, delay + chance.below(30_000)];
        }
        vec![delay]
    }

    fn reach_guest(&mut self, frame: Vec<u8>) {
        self.trace(|| format!("in {}", show(&frame)));
        let ports = match self.guest_port {
            Some(host) => host..=host,
            None => 0..=1,
        };
        for host in ports {
            let event = HostEvent::Frame(frame.clone());
            self.host_event(self.now, host, 0, event);
        }
    }

    /// A frame leaves a host's NIC: the *one voice* checker stands here.
    pub fn nic_frame(&mut self, host: usize, frame: &[u8]) {
        let speaks = self.record.holder == NAMES[host];
        // What the comparator or the lease let go just before the word of the arbiter.
        let residue_us = self.plan.timing.detection_us() * 5 / 4 + 5_000;
        let lost = self.hosts[host].lost_holder_us;
        if !speaks && lost.is_none_or(|at| self.now > at + residue_us) {
            let holder = &self.record.holder;
            let text = format!(
                "{} sends, {holder} holds since {lost:?}: {}",
                NAMES[host],
                show(frame)
            );
            self.fail("one voice", text);
        }
        if frame[6..12] == GUEST_MAC {
            self.guest_port = Some(host);
        }
        for delay in self.transit() {
            self.later(delay, Event::ToClients(frame.to_vec()));
        }
    }

    fn reach_clients(&mut self, frame: &[u8]) {
        let Some((protocol, port)) = addressee(frame, &mut self.oracle) else {
            return;
        };
        match protocol {
            Protocol::Tcp => {
                if let Some(n) = self.tcp.iter().position(|c| c.owns(port)) {
                    self.tcp[n].receive(self.now, frame, &mut self.oracle);
                    self.run_client(n);
                }
            }
            Protocol::Udp => {
                if let Some(n) = self.datagrams.iter().position(|c| c.owns(port)) {
                    self.datagrams[n].receive(frame, &mut self.oracle);
                    self.run_datagrams(n);
                }
            }
            _ => self.datagrams.iter_mut().for_each(|c| c.pong(port)),
        }
    }

    // ---- the link ----

    /// Sends over a link from `host`.
    pub fn link_send(&mut self, link: usize, host: usize, channel: Channel, msg: LinkMsg) {
        let to = 1 - host;
        let at = self.links[link].arrival(self.now, to, channel, &mut self.chance);
        self.at(
            at,
            Event::Link {
                link,
                to,
                channel,
                msg,
            },
        );
    }

    fn arrive(&mut self, n: usize, to: usize, channel: Channel, msg: LinkMsg) {
        let link = &mut self.links[n];
        if link.cut[to] || !link.stalled[to].is_empty() {
            link.stalled[to].push((channel, msg));
            return;
        }
        let open = match channel {
            Channel::Packets => link.open[to].1,
            Channel::Control | Channel::Pages => link.open[to].0,
        };
        if open {
            let inc = link.ends[to];
            self.host_event(self.now, to, inc, HostEvent::Link(n, channel, msg));
        }
    }

    fn heal(&mut self, n: usize, to: usize) {
        self.links[n].cut[to] = false;
        for (channel, msg) in std::mem::take(&mut self.links[n].stalled[to]) {
            self.arrive(n, to, channel, msg);
        }
    }

    /// One end closes its sockets.
    pub fn close(&mut self, link: usize, host: usize, with_packets: bool) {
        let open = &mut self.links[link].open[host];
        let told = !open.0;
        *open = (false, open.1 && !with_packets);
        if !told {
            self.link_send(link, host, Channel::Control, LinkMsg::Down);
            self.link_send(link, host, Channel::Packets, LinkMsg::Down);
        }
    }

    /// A fresh secondary starts beside a primary that has none.
    fn join(&mut self) {
        if self.plan.respawn {
            self.later(50_000, Event::Join);
        }
        let waits = |host: &Host| host.process.as_ref().is_some_and(Process::wants_secondary);
        let Some(primary) = (0..2).find(|&n| waits(&self.hosts[n])) else {
            return;
        };
        let host = 1 - primary;
        if self.hosts[host].process.is_some() || self.hosts[host].may_start_us > self.now {
            return;
        }
        self.incarnations += 1;
        let inc = self.incarnations;
        self.hosts[host].process = Some(Process::secondary(&self.plan, inc, host));
        self.hosts[host].paused_until_us = 0;
        self.hosts[host].gap_us = 0;
        let mut ends = [inc; 2];
        ends[primary] = self.hosts[primary].process.as_ref().map_or(0, |p| p.inc);
        self.links.push(Link::new(ends, self.plan.link.clone()));
        let link = self.links.len() - 1;
        self.outcome.joins += 1;
        self.trace(|| format!("{} starts as secondary {inc}", NAMES[host]));
        self.link_send(link, 0, Channel::Control, LinkMsg::Up);
        self.link_send(link, 1, Channel::Control, LinkMsg::Up);
    }
}

/// A frame in a line.
pub fn show(frame: &[u8]) -> String {
    let direction = if frame[6..12] == GUEST_MAC {
        Direction::FromGuest
    } else {
        Direction::ToGuest
    };
    let packet = wire::parse(frame, frame.len(), direction);
    let tcp = packet.tcp.map(|t| {
        format!(
            " seq {:x} ack {:x} flags {:02x} len {}",
            t.seq, t.ack, t.flags, t.payload_len
        )
    });
    let ts = packet.tcp.and_then(|t| t.timestamps(frame));
    let ts = ts.map(|(val, ecr)| format!(" ts {val:x} {ecr:x}"));
    let ends = format!(
        "{direction:?} {:?} {} {}:{}",
        packet.key.protocol(),
        packet.key.guest_port(),
        packet.key.peer(),
        packet.key.peer_port()
    );
    format!(
        "{ends}{}{}",
        tcp.unwrap_or_default(),
        ts.unwrap_or_default()
    )
}
