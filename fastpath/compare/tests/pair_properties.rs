//! Both paths together: the SVM has its own initial sequence numbers and timestamps, cuts its
//! output in its own way, and is translated; equal streams never diverge, unequal ones never leave.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod dice;

use colo_compare::testing::{Segment, Side, VecFrames, checksums_are_right, digest_key};
use colo_compare::wire::tcp::{ACK, FIN, SYN, Tcp};
use colo_compare::{
    Action, Cause, Direction, Limits, PrimaryPath, Right, SecondaryAction, SecondaryPath, Token,
    wire,
};
use dice::{Dice, limits};
use proptest::prelude::*;

/// A guest's own numbers in one connection.
#[derive(Debug, Clone, Copy)]
struct Numbers {
    isn: u32,
    ts: u32,
}

struct Both {
    frames: VecFrames,
    primary: PrimaryPath,
    secondary: SecondaryPath,
    now_us: u64,
    side: Side,
    peer_port: u16,
    released: Vec<(Vec<u8>, Right)>,
    causes: Vec<Cause>,
    /// What the SVM was given last.
    told: Option<Vec<u8>>,
}

fn tcp_of(bytes: &[u8], direction: Direction) -> Tcp {
    wire::parse(bytes, bytes.len(), direction).tcp.unwrap()
}

impl Both {
    fn new(side: Side, limits: Limits) -> Self {
        let mut frames = VecFrames::new(10_000);
        let limits = Limits {
            digest_min_bytes: 1,
            ..limits
        };
        let mut primary = PrimaryPath::new(limits);
        let mut secondary = SecondaryPath::new(limits);
        // These tests run twice: `digests.rs` is made of the same files.
        if env!("CARGO_CRATE_NAME") == "digests" {
            primary.set_digest_key(Some(digest_key()));
            secondary.set_digests(Some(digest_key()));
        }
        let epoch = primary.pair(0).unwrap();
        primary.set_lease(0, &mut frames, u64::MAX);
        let mut record = Vec::new();
        primary.export_client_xlate(&mut record);
        secondary
            .commit(0, &mut frames, epoch, Vec::new(), &record)
            .unwrap();
        primary.commit(0, &mut frames, epoch).unwrap();
        let mut both = Self {
            frames,
            primary,
            secondary,
            now_us: 0,
            side,
            peer_port: 40_000,
            released: Vec::new(),
            causes: Vec::new(),
            told: None,
        };
        both.settle();
        both
    }

    /// Commits a checkpoint: the SVM is the PVM from now on.
    fn checkpoint(&mut self) {
        self.secondary.stop();
        let epoch = self.primary.cut(self.now_us).unwrap();
        let mut record = Vec::new();
        self.primary.export_client_xlate(&mut record);
        let (now_us, frames) = (self.now_us, &mut self.frames);
        self.secondary
            .commit(now_us, frames, epoch, Vec::new(), &record)
            .unwrap();
        self.primary.commit(now_us, frames, epoch).unwrap();
        self.settle();
    }

    fn settle(&mut self) {
        loop {
            let mut busy = false;
            while let Some(action) = self.primary.poll_action() {
                busy = true;
                self.act(action);
            }
            while let Some(action) = self.secondary.poll_action() {
                busy = true;
                self.follow(action);
            }
            while let Some(token) = self.secondary.poll_deliver(self.now_us, &mut self.frames) {
                busy = true;
                let bytes = self.frames.take(token);
                assert!(checksums_are_right(&bytes));
                self.told = Some(bytes);
            }
            if !busy {
                return;
            }
        }
    }

    fn act(&mut self, action: Action) {
        let frames = &mut self.frames;
        match action {
            Action::Release { token, right, .. } => {
                let bytes = frames.take(token);
                assert!(checksums_are_right(&bytes));
                self.released.push((bytes, right));
            }
            Action::Mirror {
                epoch,
                input_seq,
                token,
            } => {
                let taken =
                    self.secondary
                        .handle_mirror(self.now_us, frames, epoch, input_seq, token);
                taken.unwrap();
            }
            Action::SvmReleased { svm_seq } => {
                assert!(self.secondary.output(svm_seq).is_some(), "reported twice");
                self.secondary.handle_released(frames, svm_seq);
            }
            Action::PendingReleased { epoch } => {
                self.secondary.handle_pending_released(frames, epoch);
            }
            Action::Fetch { svm_seq } => self.secondary.fetch(svm_seq),
            Action::Checkpoint(divergence) => self.causes.push(divergence.cause),
        }
    }

    fn follow(&mut self, action: SecondaryAction) {
        let (now_us, frames) = (self.now_us, &mut self.frames);
        match action {
            SecondaryAction::AckInput { up_to } => {
                self.primary.handle_input_ack(now_us, frames, up_to);
            }
            SecondaryAction::SendOutput { epoch, svm_seq } => {
                let bytes = frames
                    .bytes(self.secondary.output(svm_seq).unwrap())
                    .to_vec();
                assert!(checksums_are_right(&bytes));
                let copy = frames.insert(&bytes).unwrap();
                self.primary
                    .handle_svm_output(now_us, frames, epoch, svm_seq, copy);
            }
            SecondaryAction::SendDigest {
                epoch,
                svm_seq,
                header_len,
                payload_len,
                digest,
            } => {
                let stored = frames.bytes(self.secondary.output(svm_seq).unwrap());
                assert!(checksums_are_right(stored));
                let headers = stored[..usize::from(header_len)].to_vec();
                let token = frames.insert(&headers).unwrap();
                self.primary.handle_svm_digest(
                    now_us,
                    frames,
                    epoch,
                    svm_seq,
                    token,
                    payload_len,
                    digest,
                );
            }
            SecondaryAction::CaughtUp { epoch } => self.primary.caught_up(now_us, epoch),
            SecondaryAction::RequestCheckpoint(cause) => self.causes.push(cause),
        }
    }

    fn token(&mut self, bytes: &[u8]) -> Token {
        self.frames.insert(bytes).unwrap()
    }

    fn pvm(&mut self, bytes: &[u8]) {
        let token = self.token(bytes);
        self.primary
            .handle_guest_tx(self.now_us, &mut self.frames, token);
        self.settle();
    }

    fn svm(&mut self, bytes: &[u8]) {
        let token = self.token(bytes);
        self.secondary
            .handle_guest_tx(self.now_us, &mut self.frames, token);
        self.settle();
    }

    fn client(&mut self, bytes: &[u8]) {
        let token = self.token(bytes);
        let token = self
            .primary
            .handle_nic(self.now_us, &mut self.frames, token);
        self.primary
            .handle_delivered(self.now_us, &mut self.frames, token);
        self.settle();
    }

    fn segment(&self, numbers: Numbers, at: u32) -> Segment {
        let place = numbers.isn.wrapping_add(1).wrapping_add(at);
        let tsval = numbers.ts.wrapping_add((self.now_us / 1000) as u32);
        Segment::new(self.side)
            .ports(80, self.peer_port)
            .timestamps(tsval, 1)
            .seq(place)
            .ack(8)
    }

    fn to_guest(&self) -> Segment {
        Segment::new(self.side).to_guest().ports(80, self.peer_port)
    }

    /// A client opens a connection. It sees the PVM's numbers only.
    fn open(&mut self, pvm: Numbers, svm: Numbers) {
        let syn = self.to_guest().flags(SYN).seq(7).timestamps(1, 0).bytes();
        self.client(&syn);
        let answer = |both: &Self, numbers: Numbers| {
            let segment = both.segment(numbers, 0).flags(SYN | ACK);
            segment.seq(numbers.isn).option(&[2, 4, 5, 180]).bytes()
        };
        let (of_pvm, of_svm) = (answer(self, pvm), answer(self, svm));
        self.svm(&of_svm);
        self.pvm(&of_pvm);
        let ack = self.to_guest().seq(8).ack(pvm.isn.wrapping_add(1));
        self.client(&ack.timestamps(2, pvm.ts).bytes());
        let told = self.told.take().unwrap();
        let ack = tcp_of(&told, Direction::ToGuest).ack;
        assert_eq!(ack, svm.isn.wrapping_add(1), "the SVM hears its own number");
    }

    fn close(mut self) {
        self.primary.close(&mut self.frames);
        self.secondary.close(&mut self.frames);
        assert_eq!(self.frames.used(), 0, "a slot leaked");
    }
}

/// Around the wrap, around the change of sign, and elsewhere. No two connections have the same.
fn numbers(dice: &mut Dice, connection: u32) -> Numbers {
    let isn = [u32::MAX - 40, 0x7fff_ffd0, 9, 123_456][dice.below(4)];
    Numbers {
        isn: isn.wrapping_add(dice.below(40) as u32 + 5000 * connection),
        ts: [u32::MAX - 3, 1_000, 0x7fff_fffe][dice.below(3)],
    }
}

/// `(from, end)` of segments that together are the stream, with repetitions.
fn cuts(dice: &mut Dice, n: usize) -> Vec<(usize, usize)> {
    let (mut cuts, mut sent) = (Vec::new(), 0);
    while sent < n {
        let from = if dice.chance(25) {
            dice.below(sent + 1)
        } else {
            sent
        };
        let end = (from + 1 + dice.below(60)).min(n);
        sent = sent.max(end);
        cuts.push((from, end));
    }
    cuts
}

/// Sends the cuts of both, in a random order between them.
fn play(dice: &mut Dice, both: &mut Both, sides: [(&[u8], Numbers); 2]) {
    let plans = sides.map(|(stream, _)| cuts(dice, stream.len()));
    let mut next = [0, 0];
    while next[0] < plans[0].len() || next[1] < plans[1].len() {
        both.now_us += dice.below(800) as u64;
        let who = usize::from(dice.chance(50));
        let who = if next[who] < plans[who].len() {
            who
        } else {
            1 - who
        };
        let (stream, numbers) = sides[who];
        let (from, end) = plans[who][next[who]];
        next[who] += 1;
        let is_last = end == stream.len();
        let segment = both
            .segment(numbers, from as u32)
            .payload(&stream[from..end]);
        let segment = if is_last {
            segment.flags(FIN | ACK)
        } else {
            segment
        };
        if who == 0 {
            both.pvm(&segment.bytes());
        } else {
            both.svm(&segment.bytes());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn equal_streams_with_other_numbers_never_diverge(seed in 1u64..) {
        let mut dice = Dice(seed);
        let mut both = Both::new(dice.side(), limits());
        // The same ports are used again and again, and other ports in between.
        for n in 0..3 {
            both.peer_port = 40_000 + dice.below(2) as u16;
            if dice.chance(30) {
                both.checkpoint();
            }
            let stream: Vec<u8> = (0..20 + dice.below(400)).map(|_| dice.below(4) as u8).collect();
            let (pvm, svm) = (numbers(&mut dice, n), numbers(&mut dice, n + 3));
            both.open(pvm, svm);
            both.released.clear();
            play(&mut dice, &mut both, [(&stream, pvm), (&stream, svm)]);
            prop_assert!(both.causes.is_empty(), "{:?}", both.causes);
            prop_assert_eq!(both.primary.held_frames(), 0);
            let mut seen = Vec::new();
            for (bytes, right) in both.released.drain(..) {
                prop_assert!(right != Right::Checkpoint);
                let tcp = tcp_of(&bytes, Direction::FromGuest);
                let from = tcp.seq.wrapping_sub(pvm.isn.wrapping_add(1)) as usize;
                prop_assert!(from <= seen.len(), "a hole");
                let data = &bytes[usize::from(tcp.payload_at)..][..usize::from(tcp.payload_len)];
                prop_assert_eq!(data, &stream[from..from + data.len()]);
                let known = (seen.len() - from).min(data.len());
                seen.extend_from_slice(&data[known..]);
            }
            prop_assert_eq!(&seen, &stream);
            prop_assert_eq!(both.secondary.stored_outputs(), 0, "all that left is reported");
            // What the client acknowledges, SACK included, the SVM hears in its own numbers.
            let end = stream.len() as u32 + 2;
            let sack = [(pvm.isn.wrapping_add(end), pvm.isn.wrapping_add(end + 9))];
            let ack = both.to_guest().seq(8).ack(pvm.isn.wrapping_add(end)).sack(&sack);
            both.client(&ack.bytes());
            let told = both.told.take().unwrap();
            let tcp = tcp_of(&told, Direction::ToGuest);
            prop_assert_eq!(tcp.ack, svm.isn.wrapping_add(end));
            let blocks: Vec<_> = tcp.sack_blocks(&told).collect();
            prop_assert_eq!(blocks, vec![(svm.isn.wrapping_add(end), svm.isn.wrapping_add(end + 9))]);
        }
        both.close();
    }

    #[test]
    fn a_byte_that_differs_never_leaves_whatever_the_numbers(seed in 1u64..) {
        let mut dice = Dice(seed);
        let mut both = Both::new(dice.side(), limits());
        let own: Vec<u8> = (0..20 + dice.below(400)).map(|_| dice.below(4) as u8).collect();
        let mut other = own.clone();
        let at = dice.below(own.len());
        match dice.below(3) {
            0 => other[at] ^= 1 << dice.below(8),
            1 => other.insert(at, 9),
            _ => drop(other.remove(at)),
        }
        let common = own.iter().zip(&other).take_while(|(a, b)| a == b).count();
        let (pvm, svm) = (numbers(&mut dice, 0), numbers(&mut dice, 1));
        both.open(pvm, svm);
        both.released.clear();
        play(&mut dice, &mut both, [(&own, pvm), (&other, svm)]);
        for (bytes, _) in both.released.drain(..) {
            let tcp = tcp_of(&bytes, Direction::FromGuest);
            let end = tcp.payload_end().wrapping_sub(pvm.isn.wrapping_add(1)) as usize;
            prop_assert!(end <= common && !tcp.has(FIN), "byte {common} left");
        }
        prop_assert!(both.primary.held_frames() > 0);
        both.now_us += 1_000_000;
        both.primary.set_lease(both.now_us, &mut both.frames, u64::MAX);
        both.primary.handle_timeout(both.now_us, &mut both.frames);
        both.settle();
        prop_assert_eq!(both.causes.len(), 1);
        both.checkpoint();
        prop_assert_eq!(both.primary.held_frames(), 0);
        both.close();
    }
}
