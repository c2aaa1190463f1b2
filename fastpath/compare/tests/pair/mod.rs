//! A primary path whose input and SVM output are given by hand.
#![allow(dead_code, missing_docs, reason = "each test file uses a part of it")]

use colo_compare::testing::{Segment, Side, SvmSource, VecFrames};
use colo_compare::{Action, Cause, Limits, Policy, PrimaryPath, Right};

pub const SIDES: [Side; 2] = [Side::V4, Side::V6];

/// A paired path; keeps what leaves, what is mirrored, reported and requested.
pub struct Pair {
    pub frames: VecFrames,
    pub path: PrimaryPath,
    pub now_us: u64,
    pub epoch: u64,
    pub svm_seq: u64,
    pub mirrored: Vec<(u64, u64)>,
    pub released: Vec<(Vec<u8>, Right)>,
    pub reported: Vec<u64>,
    pub causes: Vec<Cause>,
    pub pending_released: Vec<u64>,
    svm_source: SvmSource,
}

/// These tests run twice: `digests.rs` is made of the same files.
pub fn has_digests() -> bool {
    env!("CARGO_CRATE_NAME") == "digests"
}

impl Pair {
    pub fn new() -> Self {
        Self::with(Limits::default())
    }

    pub fn with(limits: Limits) -> Self {
        Self::with_policy(limits, Policy::default())
    }

    pub fn with_policy(limits: Limits, policy: Policy) -> Self {
        let mut pair = Self {
            frames: VecFrames::new(10_000),
            path: PrimaryPath::with_policy(limits, policy),
            now_us: 1000,
            epoch: 0,
            svm_seq: 0,
            mirrored: Vec::new(),
            released: Vec::new(),
            reported: Vec::new(),
            causes: Vec::new(),
            pending_released: Vec::new(),
            svm_source: SvmSource::default(),
        };
        if has_digests() {
            pair.svm_source = SvmSource::digesting(&mut pair.path);
        }
        let first = pair.path.pair(pair.now_us).unwrap();
        pair.lease(u64::MAX);
        pair.commit(first);
        pair.path.caught_up(pair.now_us, first + 1);
        pair.epoch = first + 1;
        pair.pending_released.clear();
        pair
    }

    pub fn lease(&mut self, until_us: u64) {
        self.path.set_lease(self.now_us, &mut self.frames, until_us);
        self.act();
    }

    pub fn commit(&mut self, epoch: u64) {
        self.path
            .commit(self.now_us, &mut self.frames, epoch)
            .unwrap();
        self.epoch = epoch + 1;
        self.act();
    }

    pub fn cut(&mut self) -> u64 {
        self.path.cut(self.now_us).unwrap()
    }

    pub fn input_unacked(&mut self, bytes: &[u8]) -> u64 {
        let token = self.frames.insert(bytes).unwrap();
        let token = self.path.handle_nic(self.now_us, &mut self.frames, token);
        self.path
            .handle_delivered(self.now_us, &mut self.frames, token);
        self.act();
        self.mirrored.last().map_or(0, |(_, input_seq)| *input_seq)
    }

    pub fn ack_input(&mut self, up_to: u64) {
        self.path
            .handle_input_ack(self.now_us, &mut self.frames, up_to);
        self.act();
    }

    pub fn input(&mut self, bytes: &[u8]) {
        let up_to = self.input_unacked(bytes);
        self.ack_input(up_to);
    }

    pub fn pvm(&mut self, bytes: &[u8]) {
        let token = self.frames.insert(bytes).unwrap();
        self.path
            .handle_guest_tx(self.now_us, &mut self.frames, token);
        self.act();
    }

    pub fn svm_in(&mut self, epoch: u64, bytes: &[u8]) {
        self.svm_seq += 1;
        let name = (epoch, self.svm_seq);
        self.svm_source
            .send(&mut self.path, &mut self.frames, self.now_us, name, bytes);
        self.act();
    }

    pub fn svm(&mut self, bytes: &[u8]) {
        self.svm_in(self.epoch, bytes);
    }

    pub fn act(&mut self) {
        self.act_unanswered();
        while self
            .svm_source
            .answer(&mut self.path, &mut self.frames, self.now_us)
        {
            self.act_unanswered();
        }
    }

    fn act_unanswered(&mut self) {
        while let Some(action) = self.path.poll_action() {
            match action {
                Action::Release { token, right, .. } => {
                    let bytes = self.frames.take(token);
                    self.released.push((bytes, right));
                }
                Action::Mirror {
                    epoch,
                    input_seq,
                    token,
                } => {
                    self.frames.take(token);
                    self.mirrored.push((epoch, input_seq));
                }
                Action::SvmReleased { svm_seq } => {
                    self.svm_source.released(svm_seq);
                    self.reported.push(svm_seq);
                }
                Action::Fetch { svm_seq } => self.svm_source.fetch(svm_seq),
                Action::PendingReleased { epoch } => self.pending_released.push(epoch),
                Action::Checkpoint(divergence) => self.causes.push(divergence.cause),
            }
        }
    }

    pub fn advance(&mut self, us: u64) {
        self.now_us += us;
        self.path.handle_timeout(self.now_us, &mut self.frames);
        self.act();
    }

    /// The rights by which frames have left since the last call.
    pub fn rights(&mut self) -> Vec<Right> {
        self.released.drain(..).map(|(_, right)| right).collect()
    }

    pub fn frames_out(&mut self) -> Vec<Vec<u8>> {
        self.released.drain(..).map(|(bytes, _)| bytes).collect()
    }

    pub fn close(self) {
        let mut frames = self.frames;
        self.path.close(&mut frames);
        assert_eq!(frames.used(), 0, "a slot leaked");
    }
}

pub fn data(side: Side, seq: u32, payload: &[u8]) -> Vec<u8> {
    Segment::new(side)
        .seq(seq)
        .ack(500)
        .payload(payload)
        .bytes()
}
