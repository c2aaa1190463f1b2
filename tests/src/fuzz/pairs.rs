//! Target `pairs`: frames of both guests by twos, and each for itself, as a program of bytes.
//!
//! Input: three bytes of choices (sizes of tables, policy or a life before as a secondary, digests), then
//! instructions: one byte that names what happens, then its arguments (see [`Lives::step`]). Two paths live
//! through the same; one takes frames of both guests by [`PrimaryPath::pairs`] where that decides, the other one takes
//! each for itself. Checked after every instruction: both have released, mirrored, reported, asked for and
//! counted the same, in the same order, and hold as many frames. At the end a commit releases all that is held.
//!
//! Not alike, and so the end of a program: the SVM's output has taken all room, where a pair still leaves if it was
//! unmatched, and datagrams by twos need none if it was history; two flows are late at one look, of which either
//! may be named.

use std::ops::Range;

use colo_compare::testing::{Segment, Side, SvmSource, VecFrames, udp};
use colo_compare::wire::tcp::{ACK, FIN, PSH, RST, SYN, URG};
use colo_compare::{Action, Divergence, HEADER_MAX, Limits, Passed, PrimaryPath, Right};

use super::bytes::Bytes;
use super::comparator::{limits, policy};
use super::guest;
use super::trace;

/// Programs are no longer than that: what is kept of both lives grows with them.
const MAX_STEPS: usize = 400;

/// The body of the target.
pub fn pairs(input: &[u8]) {
    taken_by_twos(input);
}

/// The same; gives how many pairs left by twos.
pub fn taken_by_twos(input: &[u8]) -> usize {
    let mut bytes = Bytes::new(input);
    let mut lives = Lives::new([bytes.u8(), bytes.u8(), bytes.u8()]);
    for _ in 0..MAX_STEPS {
        if bytes.is_empty() {
            break;
        }
        if !lives.step(&mut bytes) {
            return lives.taken;
        }
    }
    lives.finish()
}

/// What a path has done, in order.
#[derive(Debug, PartialEq)]
enum Done {
    Released(Vec<u8>, Right, u64),
    Mirrored(u64, u64, Vec<u8>),
    Reported(u64),
    Asked(u64),
    Pending(u64),
    Requested(Divergence),
}

/// A path, and what it has done.
struct Life {
    path: PrimaryPath,
    frames: VecFrames,
    now_us: u64,
    svm_epoch: u64,
    svm_seq: u64,
    input_seq: u64,
    svm_source: SvmSource,
    done: Vec<Done>,
}

impl Life {
    fn new([a, b, c]: [u8; 3]) -> Self {
        let mut frames = VecFrames::new(4096);
        let limits = Limits {
            canary_equal: c & 0xf0 == 0xf0,
            ..limits(a, b)
        };
        let path = match b >> 4 {
            15 => guest::former_secondary(limits, &mut frames),
            choice if c & 1 != 0 => PrimaryPath::with_policy(limits, policy(choice)),
            _ => PrimaryPath::new(limits),
        };
        let mut life = Self {
            path,
            frames,
            now_us: 0,
            svm_epoch: 0,
            svm_seq: 0,
            input_seq: 0,
            svm_source: SvmSource::default(),
            done: Vec::new(),
        };
        if c & 2 != 0 {
            life.svm_source = SvmSource::digesting(&mut life.path);
        }
        life.inherited();
        life.act();
        if let Ok(first) = life.path.pair(0) {
            life.commit(first);
            life.path.caught_up(0, first + 1);
            life.path.set_lease(0, &mut life.frames, 1 << 20);
        }
        life
    }

    fn pvm(&mut self, frame: &[u8]) {
        if self.path.room() {
            let token = self.frames.insert(frame).expect("bounded");
            self.path
                .handle_guest_tx(self.now_us, &mut self.frames, token);
        }
    }

    fn svm(&mut self, epoch: u64, frame: &[u8]) {
        self.svm_seq += 1;
        let name = (epoch, self.svm_seq);
        self.svm_source
            .send(&mut self.path, &mut self.frames, self.now_us, name, frame);
    }

    /// Both frames are at hand as bytes.
    fn singly(&mut self, pvm: &[u8], svm: &[u8]) {
        self.pvm(pvm);
        self.svm_seq += 1;
        let token = self.frames.insert(svm).expect("bounded");
        let (now_us, epoch, svm_seq) = (self.now_us, self.svm_epoch, self.svm_seq);
        self.path
            .handle_svm_output(now_us, &mut self.frames, epoch, svm_seq, token);
    }

    /// Gives whether both left by twos.
    fn by_twos(&mut self, pvm: &[u8], svm: &[u8], is_split: bool) -> bool {
        let svm_seq = self.svm_seq + 1;
        let Some(mut pairs) = self.path.pairs(self.now_us, self.svm_epoch) else {
            return false;
        };
        let passed = if is_split {
            let equal = |range: Range<usize>| pvm[range.clone()] == svm[range];
            let headers = |frame: &[u8], most: usize| frame.len().min(most);
            let pvm_header = &pvm[..headers(pvm, HEADER_MAX)];
            let svm_header = &svm[..headers(svm, HEADER_MAX / 2)];
            pairs.take_by((pvm_header, pvm.len()), (svm_header, svm.len()), equal)
        } else {
            pairs.take(pvm, svm)
        };
        match passed {
            Passed::Neither => return false,
            Passed::Both => {}
            Passed::BothAndKeep(history) => {
                let token = self.frames.insert(svm).expect("bounded");
                pairs.keep(&mut self.frames, history, svm_seq, token);
            }
        }
        drop(pairs);
        self.svm_seq = svm_seq;
        self.done
            .push(Done::Released(pvm.to_vec(), Right::Match, 0));
        self.done.push(Done::Reported(svm_seq));
        true
    }

    fn input(&mut self, frame: &[u8]) {
        if self.path.nic_room() {
            let token = self.frames.insert(frame).expect("bounded");
            let token = self.path.handle_nic(self.now_us, &mut self.frames, token);
            self.input_seq += 1;
            self.path
                .handle_delivered(self.now_us, &mut self.frames, token);
        }
    }

    /// Input that is inherited from the time as a secondary.
    fn inherited(&mut self) {
        while let Some(token) = self.path.poll_deliver(self.now_us, &mut self.frames) {
            self.path
                .handle_delivered(self.now_us, &mut self.frames, token);
        }
    }

    fn ack_input(&mut self, up_to: u64) {
        self.path
            .handle_input_ack(self.now_us, &mut self.frames, up_to);
    }

    /// Lets time pass from deadline to deadline.
    fn advance(&mut self, us: u64) {
        let until_us = self.now_us + us;
        for _ in 0..1000 {
            let due_us = self.path.next_deadline().filter(|at_us| *at_us < until_us);
            let Some(due_us) = due_us else { break };
            self.now_us = due_us.max(self.now_us + 1);
            self.path.handle_timeout(self.now_us, &mut self.frames);
        }
        self.now_us = until_us.max(self.now_us);
        self.path.handle_timeout(self.now_us, &mut self.frames);
    }

    fn commit(&mut self, epoch: u64) {
        let done = self.path.commit(self.now_us, &mut self.frames, epoch);
        if done.is_ok() {
            self.svm_epoch = epoch + 1;
        }
    }

    fn act(&mut self) {
        while let Some(action) = self.path.poll_action() {
            self.done.push(match action {
                Action::Release {
                    token,
                    right,
                    held_us,
                } => Done::Released(self.frames.take(token), right, held_us),
                Action::Mirror {
                    epoch,
                    input_seq,
                    token,
                } => Done::Mirrored(epoch, input_seq, self.frames.take(token)),
                Action::SvmReleased { svm_seq } => {
                    self.svm_source.released(svm_seq);
                    Done::Reported(svm_seq)
                }
                Action::Fetch { svm_seq } => {
                    self.svm_source.fetch(svm_seq);
                    Done::Asked(svm_seq)
                }
                Action::PendingReleased { epoch } => Done::Pending(epoch),
                Action::Checkpoint(divergence) => Done::Requested(divergence),
            });
        }
    }

    fn answer(&mut self) {
        while self
            .svm_source
            .answer(&mut self.path, &mut self.frames, self.now_us)
        {
            self.act();
        }
    }
}

/// The same life twice.
struct Lives {
    by_twos: Life,
    singly: Life,
    /// What the streams of the flows have come to.
    next: [u32; 2],
    cut: Option<u64>,
    taken: usize,
}

impl Lives {
    fn new(choices: [u8; 3]) -> Self {
        Self {
            by_twos: Life::new(choices),
            singly: Life::new(choices),
            next: [u32::MAX - 60, 0x7fff_fff0],
            cut: None,
            taken: 0,
        }
    }

    fn each(&mut self, act: impl Fn(&mut Life)) {
        act(&mut self.by_twos);
        act(&mut self.singly);
    }

    /// Carries out one instruction. False when the lives are not alike any more, as they may be.
    fn step(&mut self, bytes: &mut Bytes<'_>) -> bool {
        let choice = bytes.u8();
        trace(format_args!("{choice:#04x} (op {})", choice & 31));
        self.each(|life| life.now_us += 1);
        match choice & 31 {
            0..=14 => {
                let frames = self.stream_pair(bytes);
                return self.pair(&frames, choice & 32 != 0);
            }
            15..=17 => {
                let (pvm, svm) = guest::pair(bytes);
                let frames = [pvm.bytes().to_vec(), svm.bytes().to_vec()];
                return self.pair(&frames, choice & 32 != 0);
            }
            18 => {
                let [frame, _] = self.stream_pair(bytes);
                self.each(|life| life.pvm(&frame));
            }
            19 => {
                let [_, frame] = self.stream_pair(bytes);
                self.each(|life| life.svm(life.svm_epoch, &frame));
            }
            20 => {
                let frame = self.input_frame(bytes);
                self.each(|life| life.input(&frame));
            }
            21 => {
                let frame = guest::input(bytes);
                self.each(|life| life.input(frame.bytes()));
            }
            22 => self.each(|life| life.ack_input(life.input_seq)),
            23 => return self.time(1 << (bytes.u8() & 15)),
            24 => self.each(|life| {
                let until_us = life.now_us + (1 << (choice >> 3));
                life.path.set_lease(life.now_us, &mut life.frames, until_us);
            }),
            25 => self.each(|life| life.path.caught_up(life.now_us, life.svm_epoch)),
            26 => {
                self.cut = self
                    .cut
                    .or(self.both(|life| life.path.cut(life.now_us).ok()))
            }
            27 => {
                let epoch = self.cut.take().unwrap_or(0);
                self.each(|life| life.commit(epoch));
            }
            28 => {
                let epoch = self.cut.take().unwrap_or(0);
                let abort =
                    |life: &mut Life| life.path.abort(life.now_us, &mut life.frames, epoch).ok();
                self.both(abort);
            }
            29 => self.each(|life| match choice & 32 {
                0 => life.path.unmute(life.now_us, &mut life.frames),
                _ => life.path.mute(),
            }),
            30 => self.other(choice, bytes),
            _ => self.each(Life::answer),
        }
        // Sometimes what is decided is not given out yet.
        if choice & 0xc0 != 0xc0 {
            self.each(Life::act);
            self.compare();
        }
        true
    }

    /// What happens rarely.
    fn other(&mut self, choice: u8, bytes: &mut Bytes<'_>) {
        match choice >> 5 & 1 {
            0 => {
                let frame = guest::output(bytes);
                let epoch = u64::from(bytes.u8() & 7);
                self.each(|life| life.svm(epoch, frame.bytes()));
            }
            _ => {
                let pair_again = |life: &mut Life| {
                    let first = life.path.pair_again(life.now_us, &mut life.frames).ok();
                    if first.is_some() {
                        (life.input_seq, life.svm_epoch) = (0, 0);
                    }
                    first
                };
                self.cut = self.both(pair_again).or(self.cut);
            }
        }
    }

    fn both<T: PartialEq + std::fmt::Debug>(&mut self, act: impl Fn(&mut Life) -> T) -> T {
        let (ours, theirs) = (act(&mut self.by_twos), act(&mut self.singly));
        assert_eq!(ours, theirs);
        ours
    }

    fn pair(&mut self, [pvm, svm]: &[Vec<u8>; 2], is_split: bool) -> bool {
        self.each(Life::act);
        let before = *self.singly.path.stats();
        let has_room = self.singly.path.room();
        self.singly.singly(pvm, svm);
        self.singly.act();
        let after = *self.singly.path.stats();
        if after.svm_overflow > before.svm_overflow {
            return false;
        }
        if has_room && self.by_twos.by_twos(pvm, svm, is_split) {
            trace(format_args!("  by twos: {pvm:02x?}"));
            self.taken += 1;
            let is_datagram = pvm[23] == 17;
            if is_datagram && after.history_dropped > before.history_dropped {
                return false;
            }
        } else {
            self.by_twos.singly(pvm, svm);
        }
        self.by_twos.act();
        self.compare();
        true
    }

    /// Time passes. What happens at one look may come in any order.
    fn time(&mut self, us: u64) -> bool {
        self.each(|life| {
            life.act();
            let from = life.done.len();
            life.advance(us);
            life.act();
            life.done[from..].sort_by_key(|done| format!("{done:?}"));
        });
        let at_us = self.by_twos.now_us.max(self.singly.now_us);
        self.each(|life| life.now_us = at_us);
        let requested = |life: &Life| {
            let of_last = |done: &&Done| matches!(done, Done::Requested(_));
            let found = life.done.iter().rev().find(of_last);
            found.map(|done| format!("{done:?}"))
        };
        if requested(&self.by_twos) != requested(&self.singly) {
            assert_eq!(self.by_twos.done.len(), self.singly.done.len());
            return false;
        }
        self.compare();
        true
    }

    /// One of few flows goes on: both guests' frames, mostly the same.
    fn stream_pair(&mut self, bytes: &mut Bytes<'_>) -> [Vec<u8>; 2] {
        let (what, len, how) = (bytes.u8(), bytes.u8(), bytes.u8());
        let len = match len {
            0..240 => usize::from(len & 31),
            _ => usize::from(len) + 100 * usize::from(len & 7),
        };
        let frames = match what & 0x0e {
            0x0e => {
                let payload = vec![what >> 4; len];
                let frame = udp(Side::V4, false, 53, 9 + u16::from(what & 1), &payload);
                [frame.clone(), frame]
            }
            _ => self.segments(what, len, how),
        };
        spoilt(bytes, frames)
    }

    /// A connection goes on: most often with what comes next, and with what need not be equal.
    fn segments(&mut self, what: u8, len: usize, how: u8) -> [Vec<u8>; 2] {
        let flow = usize::from(what & 1);
        let next = self.next[flow];
        let seq = match what >> 4 {
            0 => next.wrapping_sub(u32::from(how & 31)),
            1 => next.wrapping_add(u32::from(how & 31)),
            2 => next.wrapping_add(u32::from(how) << 24),
            _ => next,
        };
        self.next[flow] = seq.wrapping_add(len as u32);
        let payload: Vec<u8> = (0..len).map(|n| seq.wrapping_add(n as u32) as u8).collect();
        let flags = match how >> 3 {
            0 => FIN | ACK,
            1 => RST | ACK,
            2 => SYN | ACK,
            3 => SYN,
            4 => URG | ACK,
            5..=12 => PSH | ACK,
            _ => ACK,
        };
        [how, what >> 2].map(|choice| {
            let noise = u16::from(choice & 3) * 0x4041;
            let segment = Segment::new(Side::V4).ports(80 + flow as u16, 9);
            let segment = segment.flags(flags).seq(seq).id(noise);
            let segment = match what >> 1 & 3 {
                0 => segment,
                1 => segment.option(&[1, 1]).timestamps(noise.into(), 2),
                _ => segment.timestamps(7, noise.into()),
            };
            let segment = segment.ack(8 + u32::from(noise & 1));
            segment.payload(&payload).bytes()
        })
    }

    /// The client of one of the flows acknowledges, or asks for more.
    fn input_frame(&self, bytes: &mut Bytes<'_>) -> Vec<u8> {
        let (what, back) = (bytes.u8(), bytes.u8());
        let flow = usize::from(what & 1);
        let ack = self.next[flow].wrapping_sub(u32::from(back));
        let segment = Segment::new(Side::V4).to_guest();
        let segment = segment.ports(80 + flow as u16, 9).seq(8).ack(ack);
        let segment = match what >> 1 & 7 {
            0 => segment.flags(SYN),
            1 => segment.flags(FIN | ACK),
            2 => segment.flags(RST),
            3 => segment.payload(b"more"),
            _ => segment,
        };
        segment.bytes()
    }

    fn compare(&self) {
        let (ours, theirs) = (&self.by_twos, &self.singly);
        assert_eq!(ours.done.len(), theirs.done.len());
        assert_eq!(ours.done.last(), theirs.done.last());
        let (a, b) = (&ours.path, &theirs.path);
        assert_eq!(a.stats(), b.stats());
        assert_eq!((a.mode(), a.epoch()), (b.mode(), b.epoch()));
        assert_eq!((a.held_frames(), a.flows()), (b.held_frames(), b.flows()));
        assert_eq!(a.nic_room(), b.nic_room());
        assert_eq!(ours.frames.used(), theirs.frames.used(), "frames in use");
    }

    /// A commit lets everything leave. Gives how many pairs left by twos.
    fn finish(mut self) -> usize {
        self.each(|life| {
            life.path.unmute(life.now_us, &mut life.frames);
            life.act();
            life.answer();
        });
        let epoch = self
            .cut
            .or(self.both(|life| life.path.cut(life.now_us).ok()));
        self.each(|life| {
            life.commit(epoch.unwrap_or(0));
            life.act();
        });
        self.compare();
        assert_eq!(self.by_twos.done, self.singly.done);
        let record = |life: &mut Life| {
            let mut record = Vec::new();
            life.path.export_client_xlate(&mut record);
            record
        };
        self.both(record);
        for mut life in [self.by_twos, self.singly] {
            life.path.close(&mut life.frames);
            assert_eq!(life.frames.used(), 0, "a slot leaked");
        }
        self.taken
    }
}

/// The frames, one or both of which are changed if the input says so.
fn spoilt(bytes: &mut Bytes<'_>, mut frames: [Vec<u8>; 2]) -> [Vec<u8>; 2] {
    let change = bytes.u8();
    if change < 0xb0 {
        return frames;
    }
    let (at, value) = (usize::from(bytes.u8()), bytes.u8());
    let is_in_both = change & 1 != 0;
    for frame in frames.iter_mut().skip(usize::from(!is_in_both)) {
        let at = if at >= 250 {
            frame.len() - 1
        } else {
            at % frame.len()
        };
        match change >> 1 & 7 {
            0 => frame.truncate(at),
            1 => frame.resize(frame.len() + at, value),
            2 => frame[at] = value,
            _ => frame[at] ^= 1 << (value & 7),
        }
    }
    frames
}
