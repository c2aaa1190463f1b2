//! Target `comparator`: a life of [`PrimaryPath`] as a program of bytes.
//!
//! Input: two bytes of choices (sizes of tables, a policy or a life before as a secondary), then
//! instructions: one byte that names what
//! happens, then its arguments (see [`World::step`]). Both guests' frames are built from few
//! flows, places and contents, so that equal, unequal, late and repeated output all happen often.
//! Checked after every step: see [`Checker`]. At the end two commits release all that is held.
//! Each program runs twice: the SVM's output comes as it is, and as digests whose bytes come a step
//! after they were asked for.

use colo_compare::testing::{SvmSource, VecFrames};
use colo_compare::{
    Action, Direction, Limits, PathError, Policy, PolicyAction, PolicyProtocol, PrimaryPath, Rule,
    Token,
};

use super::bytes::Bytes;
use super::checker::{Checker, Now};
use super::guest::{self, Frame};
use super::trace;

/// The body of the target.
pub fn comparator(input: &[u8]) {
    run(input, false);
    run(input, true);
}

fn run(input: &[u8], has_digests: bool) {
    let mut bytes = Bytes::new(input);
    let (a, b) = (bytes.u8(), bytes.u8());
    let mut world = match b >> 4 {
        15 => World::after_takeover(limits(a, b)),
        choice => World::new(limits(a, b), policy(choice)),
    };
    if has_digests {
        world.svm_source = SvmSource::digesting(&mut world.path);
    }
    while !bytes.is_empty() {
        let asked = world.svm_source.asked();
        world.step(&mut bytes);
        world.answer(asked);
    }
    world.finish();
}

pub(super) fn limits(a: u8, b: u8) -> Limits {
    let size = |bits: u8| 4usize << (bits & 3);
    Limits {
        max_flows: size(a),
        max_translations: 8,
        max_held_frames: size(a >> 2),
        max_svm_frames: size(a >> 4),
        max_history_bytes: 16 * size(a >> 6),
        max_unacked_inputs: size(b) as u64,
        max_input_frames: 64,
        max_stored_output: 64,
        compare_deadline_us: 100,
        ack_deadline_us: 300,
        lag_deadline_us: 1000,
        extra_deadline_us: 400,
        settle_us: 30,
        reorder_window: 1 + usize::from(b >> 2 & 3),
        ..Limits::default()
    }
}

/// One rule for one of the flows, or none.
pub(super) fn policy(choice: u8) -> Policy {
    let actions = [
        PolicyAction::Hold,
        PolicyAction::Release,
        PolicyAction::IgnoreBytes { from: 3, end: 9 },
        PolicyAction::IgnoreBytes {
            from: 20,
            end: u32::MAX,
        },
    ];
    let ports = |first| Some((first, first));
    let rule = match choice {
        0..=3 => (PolicyProtocol::Tcp, ports(40_001)),
        4..=7 => (PolicyProtocol::Udp, ports(5001)),
        8 | 9 => (PolicyProtocol::Icmp, None),
        _ => return Policy::default(),
    };
    Policy::new(vec![Rule {
        protocol: Some(rule.0),
        peer_ports: rule.1,
        action: actions[usize::from(choice & 3)],
        ..Rule::default()
    }])
}

/// The path with everything around it that matters.
struct World {
    path: PrimaryPath,
    frames: VecFrames,
    limits: Limits,
    now: Now,
    checker: Checker,
    svm_seq: u64,
    svm_source: SvmSource,
    input_seq: u64,
    /// The epoch that the SVM runs in.
    svm_epoch: u64,
}

impl World {
    fn new(limits: Limits, policy: Policy) -> Self {
        let path = PrimaryPath::with_policy(limits, policy.clone());
        Self::with_path(limits, path, VecFrames::new(4096), Checker::new(policy))
    }

    /// A host that has taken over, with one connection whose translation is learnt and one whose
    /// handshake is not acknowledged yet.
    fn after_takeover(limits: Limits) -> Self {
        let mut frames = VecFrames::new(4096);
        let mut path = guest::former_secondary(limits, &mut frames);
        while let Some(action) = path.poll_action() {
            if let Action::Release { token, .. } = action {
                frames.take(token);
            }
        }
        Self::with_path(limits, path, frames, Checker::translated())
    }

    fn with_path(limits: Limits, path: PrimaryPath, frames: VecFrames, checker: Checker) -> Self {
        let now = Now {
            epoch: path.epoch(),
            is_alone: true,
            ..Now::default()
        };
        Self {
            path,
            frames,
            limits,
            now,
            checker,
            svm_seq: 0,
            svm_source: SvmSource::default(),
            input_seq: 0,
            svm_epoch: 0,
        }
    }

    /// Carries out one instruction.
    fn step(&mut self, bytes: &mut Bytes<'_>) {
        let choice = bytes.u8();
        self.now.us += u64::from(choice >> 6) * 7;
        trace(format_args!(
            "{choice:#04x} (op {}): {:?}",
            choice & 31,
            self.now
        ));
        match choice & 31 {
            0..=3 => {
                let frame = guest::output(bytes);
                self.pvm(&frame);
            }
            4..=6 => {
                let frame = guest::output(bytes);
                self.svm(&frame, self.svm_epoch);
            }
            7..=12 => {
                let (frame, differing) = guest::pair(bytes);
                if choice & 32 == 0 {
                    self.pvm(&frame);
                    self.svm(&differing, self.svm_epoch);
                } else {
                    self.svm(&differing, self.svm_epoch);
                    self.pvm(&frame);
                }
            }
            13..=16 => {
                let frame = guest::input(bytes);
                self.input(&frame);
            }
            17 => self.input_ack(self.input_seq),
            18 => self.input_ack(u64::from(bytes.u8())),
            19 => self.timeout(u64::from(bytes.u8())),
            20 => self.timeout(1 << (bytes.u8() & 15)),
            21 => self.lease(u64::from(bytes.u16())),
            22 => self
                .path
                .caught_up(self.now.us, u64::from(choice >> 5 & 1) + self.svm_epoch),
            23 => self.cut(),
            24 | 25 => self.commit(u64::from(choice & 32 != 0)),
            26 => self.abort(u64::from(choice & 32 != 0)),
            27 => self.mute(choice & 32 != 0),
            28 => {
                let frame = guest::output(bytes);
                self.svm(&frame, u64::from(bytes.u8() & 7));
            }
            29 => self.pair(),
            30 if choice & 32 != 0 => self.pair_again(),
            30 => self.input_ack(self.input_seq),
            _ => self.go_alone(bytes),
        }
        self.act();
    }

    fn pvm(&mut self, frame: &Frame) {
        trace(format_args!("  PVM {frame}"));
        if !self.path.room() {
            return;
        }
        self.checker
            .produced(frame.parse(Direction::FromGuest), frame, &self.now);
        let token = self.frames.insert(frame.bytes()).expect("bounded");
        self.path
            .handle_guest_tx(self.now.us, &mut self.frames, token);
        self.act();
    }

    fn svm(&mut self, frame: &Frame, epoch: u64) {
        trace(format_args!(
            "  SVM in {epoch}, {}: {frame}",
            self.svm_seq + 1
        ));
        if !self.now.is_alone {
            self.svm_seq += 1;
            let packet = frame.parse(Direction::FromGuest);
            self.checker.svm_sent(packet, frame, epoch, self.svm_seq);
        }
        let (now_us, name) = (self.now.us, (epoch, self.svm_seq));
        self.svm_source.send(
            &mut self.path,
            &mut self.frames,
            now_us,
            name,
            frame.bytes(),
        );
        self.act();
    }

    /// The bytes come of the oldest digests that were asked for.
    fn answer(&mut self, asked: usize) {
        for _ in 0..asked {
            self.svm_source
                .answer(&mut self.path, &mut self.frames, self.now.us);
            self.act();
        }
    }

    fn input(&mut self, frame: &Frame) {
        trace(format_args!("  input {}: {frame}", self.input_seq + 1));
        if !self.path.nic_room() {
            return;
        }
        let token = self.frames.insert(frame.bytes()).expect("bounded");
        let token = self.path.handle_nic(self.now.us, &mut self.frames, token);
        let is_same = self.frames.bytes(&token) == frame.bytes();
        assert!(
            is_same || self.checker.is_translated(),
            "no entry means identity"
        );
        self.deliver(token);
    }

    /// Input that is inherited from the time as a secondary.
    fn inherited(&mut self) {
        while self.path.nic_room()
            && let Some(token) = self.path.poll_deliver(self.now.us, &mut self.frames)
        {
            self.deliver(token);
        }
    }

    fn deliver(&mut self, token: Token) {
        if !self.now.is_alone {
            self.input_seq += 1;
            let packet = guest::parse(self.frames.bytes(&token), Direction::ToGuest);
            self.checker.input(packet, self.input_seq);
        }
        self.path
            .handle_delivered(self.now.us, &mut self.frames, token);
        self.act();
    }

    fn input_ack(&mut self, up_to: u64) {
        if up_to <= self.input_seq {
            self.now.input_ack = self.now.input_ack.max(up_to);
        }
        self.path
            .handle_input_ack(self.now.us, &mut self.frames, up_to);
    }

    fn timeout(&mut self, us: u64) {
        self.now.us += us;
        let mut turns = 0;
        loop {
            self.path.handle_timeout(self.now.us, &mut self.frames);
            self.act();
            self.inherited();
            if !self.path.nic_room() {
                return;
            }
            let due = self.path.next_deadline();
            if due.is_none_or(|due_us| due_us > self.now.us) {
                return;
            }
            turns += 1;
            assert!(
                turns < 1000,
                "a deadline that never passes: {due:?} at {}",
                self.now.us
            );
        }
    }

    fn lease(&mut self, us: u64) {
        self.now.lease_until_us = self.now.us + us;
        self.path
            .set_lease(self.now.us, &mut self.frames, self.now.lease_until_us);
    }

    fn cut(&mut self) {
        if self.now.is_alone {
            // Nobody would take the checkpoint.
            return;
        }
        match (self.path.cut(self.now.us), self.now.cut) {
            (Ok(epoch), None) => {
                assert_eq!(epoch, self.now.epoch);
                self.now.cut = Some(epoch);
                self.now.epoch += 1;
                self.checker
                    .check_pending(epoch, self.path.pending().map(|pending| pending.id));
            }
            (Err(PathError::CheckpointInFlight { epoch }), Some(cut)) => assert_eq!(epoch, cut),
            (result, cut) => panic!("cut gave {result:?} while {cut:?} is in flight"),
        }
    }

    fn commit(&mut self, wrong: u64) {
        let epoch = self.now.cut.unwrap_or(0) + wrong;

        let is_right = wrong == 0 && self.now.cut.is_some();
        if is_right {
            self.now.cut = None;
            self.now.committed = epoch;
            self.now.is_frozen = false;
            self.now.comparing = self.now.epoch;
            self.svm_epoch = epoch + 1;
            self.checker.commit_begins(self.now.comparing);
        }
        let result = self.path.commit(self.now.us, &mut self.frames, epoch);
        assert_eq!(result.is_ok(), is_right, "{result:?}");
        self.act();
    }

    fn abort(&mut self, wrong: u64) {
        let epoch = self.now.cut.unwrap_or(0) + wrong;
        let is_right = wrong == 0 && self.now.cut.is_some();
        if is_right {
            self.now.cut = None;
            self.now.is_frozen = true;
        }
        let result = self.path.abort(self.now.us, &mut self.frames, epoch);
        assert_eq!(result.is_ok(), is_right, "{result:?}");
    }

    fn mute(&mut self, mute: bool) {
        self.now.is_mute = mute;
        if mute {
            self.path.mute();
        } else {
            self.path.unmute(self.now.us, &mut self.frames);
        }
    }

    fn joined(&mut self, epoch: u64) {
        assert_eq!(epoch, self.now.epoch);
        self.now.cut = Some(epoch);
        self.now.epoch += 1;
        self.now.is_alone = false;
        self.now.lease_until_us = 0;
        (self.now.input_ack, self.input_seq) = (0, 0);
        self.checker.joined();
    }

    fn pair(&mut self) {
        let result = self.path.pair(self.now.us);
        assert_eq!(result.is_ok(), self.now.is_alone, "{result:?}");
        if let Ok(epoch) = result {
            self.joined(epoch);
            self.now.is_frozen = false;
            self.now.comparing = 0;
        }
    }

    fn pair_again(&mut self) {
        let was_paired = !self.now.is_alone;
        let result = self.path.pair_again(self.now.us, &mut self.frames);
        assert_eq!(result.is_ok(), self.now.cut.is_none(), "{result:?}");
        if let Ok(epoch) = result {
            self.joined(epoch);
            self.now.is_frozen = was_paired;
            self.now.comparing = 0;
        }
    }

    /// Rare, because little is left to see afterwards.
    fn go_alone(&mut self, bytes: &mut Bytes<'_>) {
        if bytes.u8() & 3 != 0 {
            return;
        }
        self.now.is_alone = true;
        self.now.is_mute = false;
        self.now.is_frozen = false;
        self.now.cut = None;
        self.checker.alone();
        self.path.go_alone(self.now.us, &mut self.frames);
    }

    /// Carries out what the path wants, and looks at it.
    fn act(&mut self) {
        while let Some(action) = self.path.poll_action() {
            trace(format_args!("  -> {action:?}"));
            match action {
                Action::Release { token, right, .. } => {
                    let bytes = self.frames.take(token);
                    let packet = guest::parse(&bytes, Direction::FromGuest);
                    self.checker.released(&bytes, &packet, right, &self.now);
                }
                Action::Mirror {
                    epoch,
                    input_seq,
                    token,
                } => {
                    assert!(!self.now.is_alone, "mirrored to nobody");
                    assert_eq!((epoch, input_seq), (self.now.epoch, self.input_seq));
                    self.frames.take(token);
                }
                Action::SvmReleased { svm_seq } => {
                    self.svm_source.released(svm_seq);
                    self.checker.reported(svm_seq, &self.now);
                }
                Action::Fetch { svm_seq } => self.svm_source.fetch(svm_seq),
                Action::PendingReleased { epoch } => {
                    self.checker.pending_released(epoch, &self.now)
                }
                Action::Checkpoint(divergence) => self.checker.requested(&divergence, &self.now),
            }
        }
        self.check_bounds();
    }

    fn check_bounds(&self) {
        assert_eq!(
            self.path.held_frames(),
            self.checker.held(),
            "held_frames()"
        );
        assert_eq!(self.path.epoch(), self.now.epoch);
        assert!(self.path.held_frames() <= self.limits.max_held_frames);
        // What is inherited from the time as a secondary comes on top.
        let inherited = if self.checker.is_translated() { 8 } else { 0 };
        let most = self.limits.max_held_frames + self.limits.max_svm_frames + inherited;
        assert!(
            self.frames.used() <= most,
            "{} frames in use",
            self.frames.used()
        );
    }

    /// With a healthy secondary everything leaves within two checkpoints, and no slot is lost.
    fn finish(mut self) {
        self.mute(false);
        self.lease(1 << 20);
        self.act();
        if !self.now.is_alone {
            for _ in 0..2 {
                if self.now.cut.is_none() {
                    self.cut();
                }
                self.commit(0);
            }
        }
        assert_eq!(self.path.held_frames(), 0, "held after two commits");
        assert_eq!(self.checker.held(), 0, "a frame was lost");
        self.path.close(&mut self.frames);
        assert_eq!(self.frames.used(), 0, "a slot leaked");
    }
}
