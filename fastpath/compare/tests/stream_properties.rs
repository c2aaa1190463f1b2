//! One TCP stream in two captures, cut, coalesced, repeated and reordered at random: equal ones
//! never diverge, and of unequal ones no differing byte ever leaves before a commit.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod dice;

use colo_compare::testing::{Segment, Side, SvmSource, VecFrames};
use colo_compare::wire::tcp::{ACK, FIN, RST, SYN, URG};
use colo_compare::{Action, Direction, PrimaryPath, Right, wire};
use dice::{Dice, limits, tagged};
use proptest::prelude::*;

#[derive(Debug, Clone, Default)]
struct Cut {
    from: usize,
    data: Vec<u8>,
    fin: bool,
    /// One more flag.
    flag: u8,
    /// Routers on the way that the other side's segments did not pass.
    hops: u8,
    /// It contradicts the stream.
    is_lie: bool,
}

/// In-order cuts of a stream with repetitions and overlaps in between.
fn cuts(dice: &mut Dice, stream: &[u8], fin: bool) -> Vec<Cut> {
    let mut cuts = Vec::new();
    let mut sent = 0;
    while sent < stream.len() {
        // Now and then from somewhere before, perhaps into what is new.
        let from = if dice.chance(25) {
            dice.below(sent + 1)
        } else {
            sent
        };
        let end = (from + 1 + dice.below(300)).min(stream.len());
        sent = sent.max(end);
        let fin = fin && end == stream.len() && dice.chance(50);
        cuts.push(Cut {
            from,
            data: stream[from..end].to_vec(),
            fin,
            ..Cut::default()
        });
    }
    if fin {
        let from = stream.len();
        cuts.push(Cut {
            from,
            data: Vec::new(),
            fin: true,
            ..Cut::default()
        });
    }
    cuts
}

/// Puts one more segment among the cuts of a stream, which repeats what was sent, most often with what is new behind it,
/// and lies about a byte or the end. Gives where it is.
fn insert_lie(dice: &mut Dice, cuts: &mut Vec<Cut>, stream: &[u8]) -> usize {
    let at = 1 + dice.below(cuts.len());
    let ends = cuts[..at].iter().map(|cut| cut.from + cut.data.len());
    let sent = ends.max().unwrap_or(0);
    let from = sent - 1 - dice.below(sent.min(300));
    let end = (sent + dice.below(200)).clamp(from + 1, stream.len());
    let mut lie = Cut {
        from,
        data: stream[from..end].to_vec(),
        is_lie: true,
        ..Cut::default()
    };
    // Anywhere, or among the bytes around what is new.
    let new = (sent - from).saturating_sub(dice.below(4));
    let place = [dice.below(end - from), new.min(end - from - 1)][dice.below(2)];
    match dice.below(4) {
        0 => lie.data[place] ^= 1 << dice.below(8),
        1 => lie.data.insert(place, dice.below(4) as u8),
        2 if lie.data.len() > 1 => drop(lie.data.remove(place)),
        2 => lie.data[place] ^= 1,
        _ => {
            lie.data.truncate(place + 1);
            lie.fin = from + lie.data.len() < stream.len();
        }
    }
    cuts.insert(at, lie);
    at
}

/// The SVM's output may come in any order within a window (it does not, over TCP, but the
/// comparator must not care).
fn shuffle(dice: &mut Dice, cuts: &mut [Cut]) {
    for at in 1..cuts.len() {
        let with = at - dice.below(at.min(4) + 1);
        cuts.swap(at, with);
    }
}

struct Run {
    frames: VecFrames,
    path: PrimaryPath,
    side: Side,
    tags: usize,
    isn: u32,
    now_us: u64,
    svm_seq: u64,
    epoch: u64,
    /// How far the released bytes reach without a hole.
    high: usize,
    released: Vec<(usize, Vec<u8>, bool, Right)>,
    /// What the client had acknowledged.
    acked: usize,
    /// How much had left, and the client had acknowledged, when each segment left.
    had: Vec<(usize, usize)>,
    /// How many segments, and how much, had left before the SVM lied.
    before_lie: Option<(usize, usize)>,
    checkpoints: usize,
    reports: Vec<u64>,
    svm_source: SvmSource,
}

impl Run {
    fn new(dice: &mut Dice) -> Self {
        let (side, tags, isn) = (dice.side(), dice.below(3), isn(dice));
        let mut frames = VecFrames::new(10_000);
        let mut path = PrimaryPath::new(limits());
        let first = path.pair(0).unwrap();
        path.set_lease(0, &mut frames, u64::MAX);
        path.commit(0, &mut frames, first).unwrap();
        path.caught_up(0, first + 1);
        assert_eq!(
            path.poll_action(),
            Some(Action::PendingReleased { epoch: first })
        );
        let mut run = Self {
            frames,
            path,
            side,
            tags,
            isn,
            now_us: 0,
            svm_seq: 0,
            epoch: first + 1,
            high: 0,
            released: Vec::new(),
            acked: 0,
            had: Vec::new(),
            before_lie: None,
            checkpoints: 0,
            reports: Vec::new(),
            svm_source: SvmSource::default(),
        };
        // These tests run twice: `digests.rs` is made of the same files.
        if env!("CARGO_CRATE_NAME") == "digests" {
            run.svm_source = SvmSource::digesting(&mut run.path);
        }
        run.handshake();
        run
    }

    fn handshake(&mut self) {
        let syn = Segment::new(self.side).to_guest().flags(SYN).seq(7).bytes();
        self.input(&syn);
        let answer = |isn: u32| {
            let options = Segment::new(self.side).option(&[2, 4, 5, 0xb4, 1, 3, 3, 7]);
            options.flags(SYN | ACK).seq(isn).ack(8).bytes()
        };
        let (pvm, svm) = (answer(self.isn), answer(self.isn ^ 0x5555_aaaa));
        self.pvm(&pvm);
        assert!(
            self.path.poll_action().is_none(),
            "a SYN-ACK needs its counterpart"
        );
        self.svm(&svm);
        let released = self.path.poll_action().expect("released");
        let Action::Release {
            token,
            right: Right::Match,
            ..
        } = released
        else {
            panic!("not a release: {released:?}")
        };
        self.frames.take(token);
        assert_eq!(
            self.path.poll_action(),
            Some(Action::SvmReleased { svm_seq: 1 })
        );
        self.reports.push(1);
    }

    fn input(&mut self, bytes: &[u8]) {
        let token = self.frames.insert(&tagged(bytes, self.tags)).unwrap();
        let token = self.path.handle_nic(self.now_us, &mut self.frames, token);
        self.path
            .handle_delivered(self.now_us, &mut self.frames, token);
        let mut action = self.path.poll_action();
        while let Some(Action::Fetch { svm_seq }) = action {
            self.svm_source.fetch(svm_seq);
            action = self.path.poll_action();
        }
        let Some(Action::Mirror {
            input_seq, token, ..
        }) = action
        else {
            panic!("not mirrored")
        };
        self.frames.take(token);
        self.path
            .handle_input_ack(self.now_us, &mut self.frames, input_seq);
    }

    fn pvm(&mut self, bytes: &[u8]) {
        let token = self.frames.insert(&tagged(bytes, self.tags)).unwrap();
        self.path
            .handle_guest_tx(self.now_us, &mut self.frames, token);
    }

    fn svm(&mut self, bytes: &[u8]) {
        self.svm_seq += 1;
        let (bytes, name) = (tagged(bytes, self.tags), (self.epoch, self.svm_seq));
        self.svm_source
            .send(&mut self.path, &mut self.frames, self.now_us, name, &bytes);
    }

    fn place(&self, at: usize) -> u32 {
        self.isn.wrapping_add(1 + at as u32)
    }

    fn segment(&self, cut: &Cut) -> Vec<u8> {
        let flags = if cut.fin { FIN | ACK } else { ACK } | cut.flag;
        let segment = Segment::new(self.side)
            .flags(flags)
            .seq(self.place(cut.from))
            .ack(8);
        let segment = segment.ttl(64 - cut.hops);
        segment.payload(&cut.data).bytes()
    }

    fn client_acks(&mut self, up_to: usize) {
        let place = self.place(up_to);
        let ack = Segment::new(self.side).to_guest().seq(8).ack(place).bytes();
        self.collect();
        self.acked = self.acked.max(up_to);
        self.input(&ack);
    }

    fn collect(&mut self) {
        self.collect_unanswered();
        while self
            .svm_source
            .answer(&mut self.path, &mut self.frames, self.now_us)
        {
            self.collect_unanswered();
        }
    }

    fn collect_unanswered(&mut self) {
        while let Some(action) = self.path.poll_action() {
            match action {
                Action::Release { token, right, .. } => {
                    let bytes = self.frames.take(token);
                    let tcp = wire::parse(&bytes, bytes.len(), Direction::FromGuest)
                        .tcp
                        .unwrap();
                    let from = tcp.seq.wrapping_sub(self.place(0)) as usize;
                    assert!(from <= self.high, "a hole was released");
                    let data = bytes[usize::from(tcp.payload_at)..].to_vec();
                    self.had.push((self.high, self.acked));
                    self.high = self.high.max(from + data.len());
                    self.released.push((from, data, tcp.has(FIN), right));
                }
                Action::SvmReleased { svm_seq } => {
                    self.svm_source.released(svm_seq);
                    self.reports.push(svm_seq);
                }
                Action::Fetch { svm_seq } => self.svm_source.fetch(svm_seq),
                Action::Checkpoint(_) => self.checkpoints += 1,
                Action::PendingReleased { .. } => {}
                Action::Mirror { .. } => panic!("nothing to mirror"),
            }
        }
    }

    fn collect_any(&mut self) {
        while let Some(action) = self.path.poll_action() {
            if let Action::Release { token, .. } = action {
                self.frames.take(token);
            }
        }
    }

    /// Plays both captures in a random interleaving. Client ACKs come in between.
    fn play(&mut self, dice: &mut Dice, pvm: &[Cut], svm: &[Cut], acks: bool) {
        let (mut next_pvm, mut next_svm) = (0, 0);
        while next_pvm < pvm.len() || next_svm < svm.len() {
            self.now_us += 1;
            let take_pvm = next_svm == svm.len() || (next_pvm < pvm.len() && dice.chance(50));
            if take_pvm {
                let bytes = self.segment(&pvm[next_pvm]);
                self.pvm(&bytes);
                next_pvm += 1;
            } else {
                let bytes = self.segment(&svm[next_svm]);
                if svm[next_svm].is_lie {
                    self.collect();
                    self.before_lie = Some((self.released.len(), self.high));
                }
                self.svm(&bytes);
                next_svm += 1;
            }
            if acks && dice.chance(20) {
                self.collect();
                let up_to = dice.below(self.high + 1);
                self.client_acks(up_to);
            }
        }
        self.collect();
    }

    fn finish(mut self) {
        self.collect();
        self.path.close(&mut self.frames);
        assert_eq!(self.frames.used(), 0, "a slot leaked");
    }
}

fn stream(dice: &mut Dice) -> Vec<u8> {
    // Few values, so that shifted streams agree by chance for a while.
    (0..1 + dice.below(2000))
        .map(|_| dice.below(4) as u8)
        .collect()
}

fn isn(dice: &mut Dice) -> u32 {
    // Around the wrap, and around the sign change of differences.
    let near = [0u32, u32::MAX - 500, 0x7fff_ff00, 12_345][dice.below(4)];
    near.wrapping_add(dice.below(400) as u32)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn equal_streams_never_diverge_and_nothing_stays_held(seed in 1u64..) {
        let mut dice = Dice(seed);
        let stream = stream(&mut dice);
        let mut run = Run::new(&mut dice);
        let pvm = cuts(&mut dice, &stream, true);
        let mut svm = cuts(&mut dice, &stream, true);
        shuffle(&mut dice, &mut svm);
        run.play(&mut dice, &pvm, &svm, true);
        prop_assert_eq!(run.checkpoints, 0);
        prop_assert_eq!(run.path.held_frames(), 0);
        prop_assert_eq!(run.released.len(), pvm.len());
        for ((from, data, fin, _), cut) in run.released.iter().zip(&pvm) {
            prop_assert_eq!((*from, data, *fin), (cut.from, &cut.data, cut.fin), "order or bytes");
        }
        // Rule 9: all of the SVM's output is reported, each once.
        let mut reports = run.reports.clone();
        reports.sort_unstable();
        prop_assert!(reports.iter().copied().eq(1..=run.svm_seq));
        run.finish();
    }

    #[test]
    fn what_differs_is_never_released_before_a_commit(seed in 1u64..) {
        let mut dice = Dice(seed);
        let own = stream(&mut dice);
        let mut other = own.clone();
        let at = dice.below(own.len());
        let mut other_fin = true;
        match dice.below(4) {
            0 => other[at] ^= 1 << dice.below(8),
            1 => other.insert(at, 9),
            2 => drop(other.remove(at)),
            _ => other_fin = false,
        }
        let common = own.iter().zip(&other).take_while(|(a, b)| a == b).count();
        let fin_common = other_fin && own.len() == other.len() && common == own.len();
        let mut run = Run::new(&mut dice);
        let pvm = cuts(&mut dice, &own, true);
        let mut svm = cuts(&mut dice, &other, other_fin);
        if other.len() > common || !other_fin {
            shuffle(&mut dice, &mut svm);
        }
        run.play(&mut dice, &pvm, &svm, true);
        for (from, data, fin, right) in &run.released {
            prop_assert!(*right != Right::Checkpoint);
            prop_assert!(from + data.len() <= common, "byte {common} was released");
            prop_assert!(!fin || fin_common, "FIN was released");
        }
        prop_assert!(run.path.held_frames() > 0);
        // Found at once or by the deadline; a commit then releases the rest in order.
        run.now_us += 1_000_000;
        run.path.handle_timeout(run.now_us, &mut run.frames);
        run.collect();
        prop_assert_eq!(run.checkpoints, 1);
        let epoch = run.path.cut(run.now_us).unwrap();
        let pending = run.path.pending().count();
        prop_assert_eq!(pending, run.path.held_frames());
        run.path.commit(run.now_us, &mut run.frames, epoch).unwrap();
        run.collect();
        prop_assert_eq!(run.released.len(), pvm.len());
        for ((from, data, ..), cut) in run.released.iter().zip(&pvm) {
            prop_assert_eq!((*from, data), (cut.from, &cut.data), "order or bytes");
        }
        run.finish();
    }

    #[test]
    fn rule_8_a_retransmission_that_differs_is_never_released(seed in 1u64..) {
        let mut dice = Dice(seed);
        let stream = stream(&mut dice);
        let mut run = Run::new(&mut dice);
        let pvm = cuts(&mut dice, &stream, false);
        let svm = cuts(&mut dice, &stream, false);
        run.play(&mut dice, &pvm, &svm, false);
        prop_assert_eq!(run.path.held_frames(), 0);
        let acked = dice.below(stream.len());
        run.client_acks(acked);
        let before = run.released.len();
        // A good one leaves without the SVM doing anything.
        let from = dice.below(stream.len());
        let end = (from + 1 + dice.below(300)).min(stream.len());
        let good = Cut { from, data: stream[from..end].to_vec(), ..Cut::default() };
        let bytes = run.segment(&good);
        run.pvm(&bytes);
        run.collect();
        prop_assert_eq!(run.released.len(), before + 1);
        prop_assert!(matches!(run.released[before].3, Right::Free));
        // A bad one does not, where the client can still take it.
        let mut bad = good;
        let at = dice.below(bad.data.len());
        bad.data[at] ^= 1;
        let bytes = run.segment(&bad);
        run.pvm(&bytes);
        run.collect();
        let harmless = from + at < acked;
        prop_assert_eq!(run.released.len(), before + 1 + usize::from(harmless));
        prop_assert_eq!(run.checkpoints, usize::from(!harmless));
        run.finish();
    }

    #[test]
    fn what_differs_in_a_segment_that_both_cut_alike_never_leaves(seed in 1u64..) {
        let mut dice = Dice(seed);
        let stream = stream(&mut dice);
        let mut run = Run::new(&mut dice);
        // Segments of any length, none of them twice.
        let (mut pvm, mut from) = (Vec::new(), 0);
        while from < stream.len() {
            let end = (from + 1 + dice.below(300)).min(stream.len());
            let data = stream[from..end].to_vec();
            pvm.push(Cut { from, data, ..Cut::default() });
            from = end;
        }
        let mut svm = pvm.clone();
        let odd = dice.below(pvm.len());
        let is_of_svm = dice.chance(50);
        // An end that the SVM says behind everything is missed by nobody.
        let is_last = is_of_svm && odd + 1 == pvm.len();
        let flag = [SYN, RST, URG, if is_last { URG } else { FIN }, 0, 0][dice.below(6)];
        let liar = if is_of_svm { &mut svm } else { &mut pvm };
        liar[odd].flag = flag;
        match dice.below(4) {
            _ if flag != 0 => {}
            0 => liar[odd].hops = 1,
            n => {
                let data = &mut liar[odd].data;
                // Often the first or the last byte.
                let at = [0, data.len() - 1, dice.below(data.len())][n - 1];
                data[at] ^= 1 << dice.below(8);
            }
        }
        // An end that the SVM says too early comes after the bytes before it.
        let is_behind = is_of_svm && flag == FIN;
        let bound = pvm[odd].from + if is_behind { pvm[odd].data.len() } else { 0 };
        run.play(&mut dice, &pvm, &svm, false);
        for (from, data, fin, right) in &run.released {
            prop_assert!(from + data.len() <= bound && !fin, "{flag:#x} at {bound}");
            prop_assert!(matches!(right, Right::Match | Right::Free));
        }
        prop_assert!(run.path.held_frames() > 0);
        run.now_us += 1_000_000;
        run.path.handle_timeout(run.now_us, &mut run.frames);
        run.collect_any();
        let epoch = run.path.cut(run.now_us).unwrap();
        run.path.commit(run.now_us, &mut run.frames, epoch).unwrap();
        prop_assert_eq!(run.path.held_frames(), 0);
        run.collect_any();
        run.finish();
    }

    #[test]
    fn what_one_repetition_lies_about_never_leaves(seed in 1u64..) {
        let mut dice = Dice(seed);
        let stream = stream(&mut dice);
        let mut run = Run::new(&mut dice);
        let mut pvm = cuts(&mut dice, &stream, false);
        let mut svm = cuts(&mut dice, &stream, false);
        let is_of_svm = dice.chance(50);
        let liar = if is_of_svm { &mut svm } else { &mut pvm };
        let at = insert_lie(&mut dice, liar, &stream);
        let lie = liar[at].clone();
        shuffle(&mut dice, &mut svm);
        run.play(&mut dice, &pvm, &svm, true);
        run.now_us += 1_000_000;
        run.path.handle_timeout(run.now_us, &mut run.frames);
        run.collect();
        for ((from, data, fin, right), (_, acked)) in run.released.iter().zip(&run.had) {
            prop_assert!(matches!(right, Right::Match | Right::Free));
            for (byte, place) in data.iter().zip(*from..) {
                // What the client has acknowledged it does not take again.
                prop_assert!(place < *acked || stream.get(place) == Some(byte), "{place} of {lie:?}");
            }
            prop_assert!(!fin || from + data.len() < *acked, "the end in {lie:?}");
        }
        // A byte about which the SVM has lied is not the PVM's any more, unless it has left before.
        if let Some((segments, high)) = run.before_lie {
            let differs = |place: &usize| lie.data.get(place - lie.from) != stream.get(*place);
            let lies = (lie.from.max(high)..lie.from + lie.data.len() + usize::from(lie.fin)).find(differs);
            let ends = run.released[segments..].iter().map(|(from, data, ..)| from + data.len());
            let reach = ends.max().unwrap_or(0);
            prop_assert!(lies.is_none_or(|place| reach <= place), "{lies:?} of {lie:?}");
        }
        let epoch = run.path.cut(run.now_us).unwrap();
        run.path.commit(run.now_us, &mut run.frames, epoch).unwrap();
        prop_assert_eq!(run.path.held_frames(), 0);
        run.collect_any();
        run.finish();
    }

    #[test]
    fn any_bytes_are_taken_without_a_panic(
        seed in 1u64..,
        junk in proptest::collection::vec(any::<u8>(), 0..120),
        ethertype in
            prop_oneof![Just(0x0800u16), Just(0x86dd), Just(0x0806), Just(0x8100), any::<u16>()],
    ) {
        let mut dice = Dice(seed);
        let mut run = Run::new(&mut dice);
        let mut bytes = junk;
        if bytes.len() >= 15 {
            bytes[12..14].copy_from_slice(&ethertype.to_be_bytes());
            let version = if ethertype == 0x0800 { 0x45 } else { 0x60 };
            bytes[14] = if dice.chance(80) { version } else { bytes[14] };
        }
        run.pvm(&bytes);
        run.svm(&bytes);
        run.collect_any();
        prop_assert_eq!(run.path.held_frames(), 0, "equal frames match");
        run.input(&bytes);
        run.finish();
    }
}
