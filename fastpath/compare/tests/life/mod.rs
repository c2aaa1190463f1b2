//! A primary path's life: two guests, a client, a secondary and a shell do at random what they may do, and no call of
//! the path may ask for memory.

pub mod connections;
pub mod messages;
mod moves;

use std::collections::{HashMap, VecDeque};

use colo_compare::Frames;
use colo_compare::testing::digest_key;
use colo_compare::{
    Action, Direction, Limits, Policy, PrimaryPath, PrimaryStats, Right, Token, wire,
};

use crate::fixed::{Dice, Pool, pure};
use connections::{CONNECTIONS, Connection, INHERITED, OFFSET, first_isn, policy};
use messages::{WAYS, Way};

pub const SLOTS: u32 = 64;

/// So small that everything gets full and late: `is_tight` soon, otherwise sometimes.
pub fn limits(is_tight: bool) -> Limits {
    let (few, many, soon_us) = if is_tight {
        (5, 8, 3_000)
    } else {
        (12, 12, 10_000)
    };
    Limits {
        max_flows: few,
        max_translations: INHERITED as usize,
        max_held_frames: many,
        max_svm_frames: few,
        max_history_bytes: 60,
        max_unacked_inputs: 6,
        compare_deadline_us: soon_us,
        ack_deadline_us: soon_us,
        lag_deadline_us: soon_us + 1_000,
        extra_deadline_us: soon_us,
        flow_idle_s: 2,
        time_wait_s: 1,
        hash_seed: 0x5eed,
        ..Limits::default()
    }
}

/// What is watched and cannot be read off the path's own counters.
#[derive(Debug, Default)]
pub struct Tally {
    pub matched: [u64; WAYS],
    pub cuts: u64,
    pub pending: u64,
    pub commits: u64,
    pub aborts: u64,
    pub commits_mute: u64,
    pub unmutes: u64,
    pub alone: u64,
    pub pairs: u64,
    pub pairs_again: u64,
    pub imports: u64,
    pub announcements: u64,
    pub reports: u64,
    pub without_room: u64,
    pub without_nic_room: u64,
    pub early_output: u64,
    pub retransmissions: u64,
}

/// Two guests, a client, a secondary and a shell that do at random what they may do.
pub struct Life {
    pool: Pool,
    path: PrimaryPath,
    dice: Dice,
    now_us: u64,
    has_policy: bool,
    connections: [Connection; CONNECTIONS as usize],
    messages: u16,
    to_pvm: VecDeque<Vec<u8>>,
    to_svm: VecDeque<Vec<u8>>,
    recent: VecDeque<Vec<u8>>,
    svm_seq: u64,
    input_seq: u64,
    is_paired: bool,
    is_mute: bool,
    in_flight: Option<u64>,
    record: Option<Vec<u8>>,
    export: Vec<u8>,
    /// What was sent as a digest, and what the path has asked for of it.
    digested: HashMap<u64, (u64, Vec<u8>)>,
    asked: Vec<u64>,
    tally: Tally,
}

impl Life {
    pub fn new(seed: u64, limits: Limits, has_policy: bool, record: Option<Vec<u8>>) -> Self {
        let policy = if has_policy {
            policy()
        } else {
            Policy::default()
        };
        let mut path = PrimaryPath::with_policy(limits, policy);
        path.set_digest_key(Some(digest_key()));
        let mut life = Self {
            pool: Pool::new(SLOTS),
            path,
            dice: Dice(seed),
            now_us: 1_000_000,
            has_policy,
            connections: [Connection::default(); CONNECTIONS as usize],
            messages: 0,
            to_pvm: VecDeque::new(),
            to_svm: VecDeque::new(),
            recent: VecDeque::new(),
            svm_seq: 0,
            input_seq: 0,
            is_paired: false,
            is_mute: false,
            in_flight: None,
            record,
            export: Vec::with_capacity(limits.xlate_record_max()),
            digested: HashMap::new(),
            asked: Vec::new(),
            tally: Tally::default(),
        };
        life.inherit();
        life
    }

    fn below(&mut self, n: u64) -> u64 {
        self.dice.below(n)
    }

    /// Runs a call of the path, which must not ask for memory, and does what the path wants.
    fn call<T>(
        &mut self,
        name: &str,
        task: impl FnOnce(&mut PrimaryPath, &mut Pool, u64) -> T,
    ) -> T {
        let (path, pool, now_us) = (&mut self.path, &mut self.pool, self.now_us);
        let result = pure(name, || task(path, pool, now_us));
        self.act();
        result
    }

    fn act(&mut self) {
        while let Some(action) = pure("poll_action", || self.path.poll_action()) {
            match action {
                Action::Release { token, right, .. } => {
                    if right == Right::Match
                        && let Some(way) = self.way_of(&token)
                    {
                        self.tally.matched[way] += 1;
                    }
                    self.pool.release(token);
                }
                Action::Mirror {
                    input_seq, token, ..
                } => {
                    self.input_seq = input_seq;
                    self.pool.release(token);
                }
                Action::SvmReleased { .. } => self.tally.reports += 1,
                Action::PendingReleased { .. } | Action::Checkpoint(_) => {}
                Action::Fetch { svm_seq } => self.asked.push(svm_seq),
            }
        }
    }

    fn way_of(&self, token: &Token) -> Option<usize> {
        let bytes = self.pool.bytes(token);
        let packet = wire::parse(bytes, bytes.len(), Direction::FromGuest);
        if let Some(fragment) = packet.fragment {
            let ways = [Way::CutAlike, Way::CutOtherwise];
            return Some(ways[fragment.id as usize % 2] as usize);
        }
        let at = packet.tcp?.payload_at;
        bytes.get(usize::from(at)).map(|way| usize::from(*way))
    }

    /// A new life with the connections of an old one.
    fn inherit(&mut self) {
        for c in 0..CONNECTIONS {
            let is_known = self.record.is_some() && c < INHERITED / 2;
            self.connections[c as usize] = Connection {
                isn: first_isn(c),
                sent: 0,
                offset: if is_known { OFFSET } else { 0 },
            };
        }
        if let Some(record) = self.record.clone() {
            let import = |path: &mut PrimaryPath, _: &mut Pool, now_us| {
                path.import_client_xlate(now_us, &record)
            };
            self.call("import_client_xlate", import).unwrap();
            self.tally.imports += 1;
        }
    }

    /// Mostly one of those that are always busy.
    fn connection(&mut self) -> u64 {
        const BUSY: [u64; 6] = [0, 2, 13, 14, 17, 20];
        let any = self.below(CONNECTIONS);
        match self.below(4) {
            0 => any,
            _ => BUSY[any as usize % BUSY.len()],
        }
    }

    pub fn step(&mut self) {
        self.now_us += self.below(60);
        match self.below(100) {
            0..=11 => self.produce(),
            12..=33 => self.pvm_sends(),
            34..=60 => self.svm_sends(),
            61..=66 => self.input(),
            67..=76 => self.ack_input(),
            77..=81 => self.lease(),
            82..=84 => self.time_passes(),
            85..=88 => self.caught_up(),
            89..=93 => self.checkpoint(),
            94 => self.mute_or_unmute(),
            95 => self.change_roles(),
            96 => self.pvm_repeats(),
            97 => self.announce(),
            _ => self.look(),
        }
    }

    /// Ends; every slot must have come back.
    pub fn close(mut self) -> (PrimaryStats, Tally) {
        let stats = *self.path.stats();
        let (path, pool) = (self.path, &mut self.pool);
        path.close(pool);
        assert_eq!(pool.used(), 0, "a slot leaked");
        (stats, self.tally)
    }
}
