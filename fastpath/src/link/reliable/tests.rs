//! Two ends over a bad network, in virtual time.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::receiver::WINDOW;
use super::sender::UNITS_MAX;
use super::*;

const KEYS: [u64; 2] = [0x1111_2222_3333_4444, 0x5555_6666_7777_8888];
const STEP_US: u64 = 50;
const SLOTS: usize = WINDOW + 8;
/// Longest virtual life; far more than any of them needs.
const END_US: u64 = 60_000_000;

/// What the network does, in percent, until it becomes a good one.
#[derive(Debug, Clone)]
struct Weather {
    loss: u32,
    repetition: u32,
    damage: u32,
    truncation: u32,
    delay_us: u64,
    jitter_us: u64,
    good_from_us: u64,
}

const GOOD: Weather = Weather {
    loss: 0,
    repetition: 0,
    damage: 0,
    truncation: 0,
    delay_us: 60,
    jitter_us: 0,
    good_from_us: 0,
};

/// xorshift64*
#[derive(Debug)]
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n.max(1)
    }

    fn percent(&mut self, n: u32) -> bool {
        self.below(100) < u64::from(n)
    }
}

#[derive(Debug)]
struct End {
    core: Reliable,
    slots: Vec<Vec<u8>>,
    free: Vec<u32>,
    /// Messages to say.
    script: VecDeque<Vec<u8>>,
    heard: Vec<u8>,
    /// Units taken in each step at most.
    appetite: usize,
}

impl End {
    fn new(index: usize, script: &[Vec<u8>], payload_max: usize, appetite: usize) -> Self {
        let mut core = Reliable::new(KEYS[index]);
        core.set_peer_key(KEYS[1 - index]);
        core.sender.begin(payload_max, WINDOW as u16);
        Self {
            core,
            slots: vec![Vec::new(); SLOTS],
            free: (0..SLOTS as u32).collect(),
            script: script.iter().cloned().collect(),
            heard: Vec::new(),
            appetite,
        }
    }

    fn receive(&mut self, now_us: u64, bytes: &[u8]) {
        let slot = self.free.pop().expect("a slot beside those of the window");
        self.slots[slot as usize] = bytes.to_vec();
        let bytes = &self.slots[slot as usize];
        let (_, unused) = self.core.handle(now_us, 0, Slot(slot), bytes);
        self.free.extend(unused.map(|s| s.0));
    }

    fn speak(&mut self, burst: usize) {
        for _ in 0..burst {
            let Some(msg) = self.script.front().filter(|_| self.core.sender.has_room()) else {
                return;
            };
            assert!(self.core.sender.push(&msg[..1], &msg[1..]), "it had room");
            self.script.pop_front();
        }
    }

    fn hear(&mut self) {
        for _ in 0..self.appetite {
            let Some(unit) = self.core.receiver.take() else {
                return;
            };
            let bytes = &self.slots[unit.slot.0 as usize];
            self.heard.extend_from_slice(&bytes[unit.start..unit.end]);
            self.free.push(unit.slot.0);
        }
    }

    fn is_done(&self) -> bool {
        self.script.is_empty() && !self.core.sender.is_busy()
    }
}

#[derive(Debug)]
struct World {
    now_us: u64,
    ends: [End; 2],
    /// In flight, by time of arrival and order.
    air: BTreeMap<(u64, u64), (usize, Vec<u8>)>,
    order: u64,
    weather: Weather,
    dice: Dice,
    burst: usize,
}

impl World {
    fn new(weather: Weather, scripts: [&[Vec<u8>]; 2], payload_max: usize, seed: u64) -> Self {
        let mut dice = Dice(seed | 1);
        let appetite = [1, 8, 64][dice.below(3) as usize];
        Self {
            now_us: 1_000,
            ends: [0, 1].map(|i| End::new(i, scripts[i], payload_max, appetite)),
            air: BTreeMap::new(),
            order: 0,
            weather,
            burst: 1 + dice.below(64) as usize,
            dice,
        }
    }

    fn put(&mut self, to: usize, mut bytes: Vec<u8>) {
        let bad = self.now_us < self.weather.good_from_us;
        let percent = |p: u32| if bad { p } else { 0 };
        let dice = &mut self.dice;
        if dice.percent(percent(self.weather.loss)) {
            return;
        }
        if dice.percent(percent(self.weather.repetition)) {
            let at = self.now_us + self.weather.delay_us + dice.below(self.weather.jitter_us);
            self.order += 1;
            self.air.insert((at, self.order), (to, bytes.clone()));
        }
        if dice.percent(percent(self.weather.damage)) {
            let bit = dice.below(bytes.len() as u64 * 8) as usize;
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        if dice.percent(percent(self.weather.truncation)) {
            bytes.truncate(dice.below(bytes.len() as u64) as usize);
        }
        let jitter_us = dice.below(if bad { self.weather.jitter_us } else { 0 });
        let at = self.now_us + self.weather.delay_us + jitter_us;
        self.order += 1;
        self.air.insert((at, self.order), (to, bytes));
    }

    fn step(&mut self) {
        while let Some(entry) = self.air.first_entry() {
            if entry.key().0 > self.now_us {
                break;
            }
            let (to, bytes) = entry.remove();
            self.ends[to].receive(self.now_us, &bytes);
        }
        for index in [0, 1] {
            let burst = self.dice.below(self.burst as u64 + 1) as usize;
            let end = &mut self.ends[index];
            end.speak(burst);
            end.hear();
            end.core.handle_timeout(self.now_us);
            let mut sent = Vec::new();
            while let Some(outgoing) = end.core.poll(self.now_us) {
                sent.push([&outgoing.head[..], outgoing.payload].concat());
            }
            sent.into_iter()
                .for_each(|bytes| self.put(1 - index, bytes));
        }
        self.now_us += STEP_US;
    }

    fn run(&mut self) {
        while !self.ends.iter().all(End::is_done)
            || self.ends.iter().any(|e| e.core.receiver.is_ready())
        {
            self.step();
            assert!(
                self.now_us < END_US,
                "no progress: {:?}",
                self.ends
                    .each_ref()
                    .map(|e| { (&e.core.sender.stats, e.core.dropped, e.script.len()) })
            );
        }
    }
}

fn script(lens: &[usize], salt: u8) -> Vec<Vec<u8>> {
    let msg = |(n, &len): (usize, &usize)| {
        let byte = |i: usize| (i as u8).wrapping_mul(7) ^ (n as u8) ^ salt;
        (0..len).map(byte).collect()
    };
    lens.iter().enumerate().map(msg).collect()
}

fn lens() -> impl Strategy<Value = Vec<usize>> {
    let len = prop_oneof![6 => 24usize..100, 6 => 100usize..1600, 1 => 1600usize..20_000];
    prop::collection::vec(len, 0..300)
}

fn weather() -> impl Strategy<Value = Weather> {
    (
        (0u32..60, 0u32..30, 0u32..20, 0u32..20),
        (1u64..3_000, 0u64..3_000, 0u64..200_000),
    )
        .prop_map(
            |((loss, repetition, damage, truncation), (delay_us, jitter_us, good_from_us))| {
                Weather {
                    loss,
                    repetition,
                    damage,
                    truncation,
                    delay_us,
                    jitter_us,
                    good_from_us,
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn whatever_the_network_does_all_messages_come_once_and_in_order(
        weather in weather(),
        lens in [lens(), lens()],
        payload_max in 128usize..2000,
        seed: u64,
    ) {
        let scripts = [script(&lens[0], 0x5a), script(&lens[1], 0xc3)];
        let mut world = World::new(weather, [&scripts[0], &scripts[1]], payload_max, seed);
        let units = world.ends.each_ref().map(|e| e.core.sender.unit_capacity());
        world.run();
        for (end, said) in [(0, 1), (1, 0)] {
            prop_assert!(world.ends[end].heard == scripts[said].concat(), "end {end}");
            prop_assert_eq!(world.ends[end].free.len(), SLOTS, "slots are lost");
            prop_assert_eq!(world.ends[end].core.sender.unit_capacity(), units[end]);
        }
    }

    #[test]
    fn what_is_taken_back_is_what_the_peer_may_lack(
        weather in weather(),
        lens in lens(),
        steps in 0usize..200,
        seed: u64,
    ) {
        let said = script(&lens, 1);
        let mut world = World::new(weather, [&said, &[]], 1452, seed);
        for _ in 0..steps {
            world.step();
        }
        let [from, to] = &mut world.ends;
        while to.core.receiver.is_ready() {
            to.hear();
        }
        let mut supplied = Vec::new();
        from.core.sender.take_back(|number, _, bytes| {
            if to.core.receiver.supply(number).expect("no hole") {
                supplied.extend_from_slice(bytes);
            }
            // What was held behind the hole comes next.
            while let Some(unit) = to.core.receiver.take() {
                supplied.extend_from_slice(&to.slots[unit.slot.0 as usize][unit.start..unit.end]);
            }
        });
        to.heard.extend_from_slice(&supplied);
        let rest = from.script.make_contiguous().concat();
        prop_assert!([&to.heard[..], &rest].concat() == said.concat());
        prop_assert_eq!(to.core.receiver.next(), from.core.sender.next_number());
    }
}

#[test]
fn a_good_network_sees_no_retransmission_and_few_acknowledgements() {
    let said = script(&[1514; 2000], 3);
    let mut world = World::new(GOOD, [&said, &[]], 1600, 7);
    world.run();
    let stats = world.ends[0].core.sender.stats;
    assert_eq!(
        (stats.sent, stats.retransmitted, stats.timeouts),
        (2000, 0, 0)
    );
    assert_eq!(world.ends[0].core.dropped, Dropped::default());
    // Data, and one acknowledgement for several of them.
    assert!(world.order < 2000 + 2000 / 4, "{}", world.order);
}

#[test]
fn small_messages_share_datagrams() {
    let said = script(&[32; 64], 3);
    let mut end = End::new(0, &said, 1452, 1);
    end.speak(64);
    let mut lens = Vec::new();
    while let Some(outgoing) = end.core.poll(0) {
        lens.push(outgoing.payload.len());
    }
    assert_eq!(lens, [1440, 608]);
}

#[test]
fn one_lost_datagram_is_sent_again_without_waiting_for_the_timer() {
    let said = script(&[1000; 10], 3);
    let mut from = End::new(0, &said, 1452, 1);
    let mut to = End::new(1, &[], 1452, 64);
    from.speak(10);
    let mut first = true;
    while let Some(outgoing) = from.core.poll(10) {
        if !std::mem::take(&mut first) {
            to.receive(50, &[&outgoing.head[..], outgoing.payload].concat());
        }
    }
    let ack = to.core.poll(60).expect("a gap is told at once");
    let ack = ack.head.to_vec();
    from.receive(100, &ack);
    let again = from.core.poll(100).expect("the lost one");
    to.receive(150, &[&again.head[..], again.payload].concat());
    to.hear();
    assert_eq!(to.heard, said.concat());
    assert_eq!(from.core.sender.stats.timeouts, 0);
}

#[test]
fn a_reader_that_stops_stops_the_writer_and_nothing_is_lost() {
    let said = script(&[1000; 3 * UNITS_MAX], 9);
    let mut world = World::new(GOOD, [&said, &[]], 1452, 5);
    world.ends[1].appetite = 0;
    while world.now_us < 3_000_000 {
        world.step();
        assert!(world.ends[1].free.len() >= SLOTS - WINDOW);
    }
    assert!(
        !world.ends[0].core.sender.has_room(),
        "the writer was stopped"
    );
    assert_eq!(world.ends[0].core.sender.rounds(), 0, "the peer is heard");
    world.ends[1].appetite = 64;
    world.run();
    assert!(world.ends[1].heard == said.concat());
}

#[test]
fn silence_is_noticed() {
    let said = script(&[100; 5], 9);
    let mut end = End::new(0, &said, 1452, 1);
    end.speak(5);
    let mut now_us = 0;
    while end.core.sender.rounds() < 3 {
        while end.core.poll(now_us).is_some() {}
        now_us = end.core.deadline_us().expect("a timer runs");
        end.core.handle_timeout(now_us);
    }
    assert!(now_us < 20_000, "{now_us} us");
}

#[test]
fn what_was_never_sent_cannot_be_acknowledged() {
    let mut end = End::new(0, &[], 1452, 1);
    assert!(!end.core.sender.acknowledge(0, 2, 0, &[], 100));
    assert!(
        end.core
            .sender
            .acknowledge(0, 1, u64::MAX, &[0xff; 64], u16::MAX)
    );
}
