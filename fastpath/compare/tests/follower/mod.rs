//! A secondary path whose host, guest and primary are the test.
#![allow(dead_code)] // Each test binary uses a part.

use colo_compare::testing::VecFrames;
use colo_compare::{Limits, PrimaryPath, SecondaryAction, SecondaryPath, Token};

/// A secondary path and what is around it.
pub struct Follower {
    pub frames: VecFrames,
    pub path: SecondaryPath,
    pub now_us: u64,
    input_seq: u64,
}

pub fn empty_record() -> Vec<u8> {
    let mut record = Vec::new();
    PrimaryPath::new(Limits::default()).export_client_xlate(&mut record);
    record
}

impl Follower {
    pub fn new() -> Self {
        Self::with(Limits::default())
    }

    /// After its first commit, in epoch 2.
    pub fn with(limits: Limits) -> Self {
        let (frames, path) = (VecFrames::new(1000), SecondaryPath::new(limits));
        let mut follower = Self {
            frames,
            path,
            now_us: 0,
            input_seq: 0,
        };
        follower.commit(1, Vec::new());
        assert_eq!(follower.actions(), [SecondaryAction::CaughtUp { epoch: 2 }]);
        follower
    }

    pub fn commit(&mut self, epoch: u64, pending: Vec<Token>) {
        let record = empty_record();
        self.path
            .commit(self.now_us, &mut self.frames, epoch, pending, &record)
            .unwrap();
    }

    pub fn mirror(&mut self, epoch: u64, bytes: &[u8]) {
        self.input_seq += 1;
        let token = self.frames.insert(bytes).unwrap();
        let (now_us, seq) = (self.now_us, self.input_seq);
        self.path
            .handle_mirror(now_us, &mut self.frames, epoch, seq, token)
            .unwrap();
    }

    pub fn deliver(&mut self) -> Option<Vec<u8>> {
        let token = self.path.poll_deliver(self.now_us, &mut self.frames)?;
        Some(self.frames.take(token))
    }

    pub fn svm(&mut self, bytes: &[u8]) {
        let token = self.frames.insert(bytes).unwrap();
        self.path
            .handle_guest_tx(self.now_us, &mut self.frames, token);
    }

    pub fn actions(&mut self) -> Vec<SecondaryAction> {
        std::iter::from_fn(|| self.path.poll_action()).collect()
    }

    pub fn close(self) {
        let mut frames = self.frames;
        self.path.close(&mut frames);
        assert_eq!(frames.used(), 0, "a slot leaked");
    }
}
