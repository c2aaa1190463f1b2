//! Target `secondary`: a life of [`SecondaryPath`] as a program of bytes, up to a takeover.
//!
//! Input: one byte of choices (sizes of tables), then instructions: one byte that names what
//! happens, then its arguments (see [`World::step`]). Frames are segments of few connections, or
//! any bytes.
//! Checked: no panic; acknowledgements of input and numbers of output only go up, and name what
//! is there; what goes to the SVM and to the comparator keeps right checksums right; bounds hold;
//! after a takeover or an end no slot is lost. Each program runs twice: output is sent as it is, and as
//! digests.

use colo_compare::testing::{Segment, Side, VecFrames, checksums_are_right, digest_key, digested};
use colo_compare::wire::tcp::{ACK, FIN, RST, SYN};
use colo_compare::{Action, Direction, Limits, PrimaryPath, SecondaryAction, SecondaryPath, Token};

use super::bytes::Bytes;
use super::guest;
use super::trace;

/// The body of the target.
pub fn secondary(input: &[u8]) {
    run(input, false);
    run(input, true);
}

fn run(input: &[u8], has_digests: bool) {
    let mut bytes = Bytes::new(input);
    let mut world = World::new(limits(bytes.u8()));
    if has_digests {
        world.path.set_digests(Some(digest_key()));
    }
    while !bytes.is_empty() {
        world.step(&mut bytes);
    }
    world.finish();
}

fn limits(choice: u8) -> Limits {
    let size = |bits: u8| 2usize << (bits & 3);
    Limits {
        max_flows: size(choice),
        max_translations: size(choice >> 2),
        max_input_frames: size(choice >> 4),
        max_stored_output: size(choice >> 6),
        max_held_frames: 64,
        max_svm_frames: 64,
        redeliver_us: 100,
        digest_min_bytes: 1,
        ..Limits::default()
    }
}

/// The path with everything around it that matters.
struct World {
    path: SecondaryPath,
    frames: VecFrames,
    limits: Limits,
    now_us: u64,
    received: u64,
    acked: u64,
    last_svm_seq: u64,
    /// Bytes that are to be sent after a digest.
    fetched: Option<u64>,
    /// Whether a takeover ends the life.
    takes_over: bool,
}

impl World {
    fn new(limits: Limits) -> Self {
        Self {
            path: SecondaryPath::new(limits),
            frames: VecFrames::new(4096),
            limits,
            now_us: 0,
            received: 0,
            acked: 0,
            last_svm_seq: 0,
            fetched: None,
            takes_over: false,
        }
    }

    /// Carries out one instruction.
    fn step(&mut self, bytes: &mut Bytes<'_>) {
        let choice = bytes.u8();
        trace(format_args!(
            "{choice:#04x} (op {}) at {}",
            choice & 15,
            self.now_us
        ));
        match choice & 15 {
            0..=2 => {
                let frame = segment(bytes, true);
                self.mirror(&frame, choice >> 4);
            }
            3 => {
                let frame = raw(bytes);
                self.mirror(&frame, choice >> 4);
            }
            4..=6 => {
                let frame = segment(bytes, false);
                self.svm(&frame);
            }
            7 => {
                let frame = raw(bytes);
                self.svm(&frame);
            }
            8 | 9 => self.deliver(choice & 16 != 0),
            10 => self
                .path
                .handle_released(&mut self.frames, u64::from(bytes.u8())),
            11 => {
                let epoch = u64::from(choice >> 4);
                self.path.handle_pending_released(&mut self.frames, epoch);
            }
            12 if choice & 16 == 0 => self.path.stop(),
            12 => self.fetch(u64::from(bytes.u8())),
            13 => self.path.resume_unchanged(),
            14 => self.commit(choice >> 4, bytes),
            _ => {
                self.now_us += 1 << (choice >> 4);
                self.takes_over = choice & 16 != 0;
            }
        }
        self.act();
    }

    fn mirror(&mut self, frame: &[u8], choice: u8) {
        trace(format_args!("  input: {frame:02x?}"));
        // The epoch of the SVM, or one around it; now and then a frame is missing.
        let epoch = (self.path.epoch() + u64::from(choice & 3)).saturating_sub(1);
        let input_seq = self.received + 1 + u64::from(choice & 12 == 12);
        let Some(token) = self.frames.insert(frame) else {
            return;
        };
        let taken = self
            .path
            .handle_mirror(self.now_us, &mut self.frames, epoch, input_seq, token);
        assert_eq!(taken.is_ok(), input_seq == self.received + 1);
        if taken.is_ok() {
            self.received += 1;
        }
    }

    fn svm(&mut self, frame: &[u8]) {
        trace(format_args!("  SVM: {frame:02x?}"));
        if !self.path.room() {
            return;
        }
        let is_right = is_right(frame);
        let Some(token) = self.frames.insert(frame) else {
            return;
        };
        self.path
            .handle_guest_tx(self.now_us, &mut self.frames, token);
        while let Some(action) = self.path.poll_action() {
            if let Some(svm_seq) = self.follow(action) {
                let output = self.path.output(svm_seq).expect("it is stored");
                let bytes = self.frames.bytes(output);
                assert_eq!(bytes.len(), frame.len());
                assert_eq!(is_right, self::is_right(bytes), "its checksum");
            }
        }
    }

    /// The bytes of an output are needed: they are sent once, if a digest was.
    fn fetch(&mut self, svm_seq: u64) {
        let is_stored = self.path.output(svm_seq).is_some();
        let before = self.path.stats().fetched;
        self.path.fetch(svm_seq);
        let is_sent = self.path.stats().fetched > before;
        assert!(is_stored || !is_sent);
        self.fetched = is_sent.then_some(svm_seq);
        self.act();
        assert_eq!(self.fetched, None, "asked for, and not sent");
    }

    fn deliver(&mut self, is_full: bool) {
        let next = self.path.poll_deliver(self.now_us, &mut self.frames);
        let Some(token) = next else { return };
        if is_full {
            self.path.undelivered(token);
        } else {
            self.frames.take(token);
        }
    }

    fn commit(&mut self, choice: u8, bytes: &mut Bytes<'_>) {
        let record = if choice & 1 == 0 {
            good_record(self.limits)
        } else {
            let len = usize::from(bytes.u8());
            bytes.take(len).to_vec()
        };
        let pending: Vec<Token> = (0..choice >> 2)
            .filter_map(|_| {
                let frame = segment(bytes, false);
                self.frames.insert(&frame)
            })
            .collect();
        let epoch = self.path.epoch() + u64::from(choice >> 1 & 1);
        let is_good = self.path.check_record(&record).is_ok();
        let done = self
            .path
            .commit(self.now_us, &mut self.frames, epoch, pending, &record);
        assert_eq!(done.is_ok(), is_good, "{done:?}");
    }

    fn act(&mut self) {
        while let Some(action) = self.path.poll_action() {
            self.follow(action);
        }
        let (inputs, outputs) = (self.path.input_frames(), self.path.stored_outputs());
        assert!(outputs <= self.limits.max_stored_output);
        // Pending output of a commit comes on top: at most four frames.
        assert!(self.frames.used() <= inputs + outputs + 4);
    }

    /// Gives the number of an output that is to be sent.
    fn follow(&mut self, action: SecondaryAction) -> Option<u64> {
        trace(format_args!("  -> {action:?}"));
        match action {
            SecondaryAction::AckInput { up_to } => {
                assert!(up_to > self.acked && up_to <= self.received);
                self.acked = up_to;
                None
            }
            SecondaryAction::SendOutput { epoch, svm_seq } => {
                assert_eq!(epoch, self.path.epoch());
                if self.fetched.take() == Some(svm_seq) {
                    return None;
                }
                assert!(svm_seq > self.last_svm_seq, "numbers go up");
                self.last_svm_seq = svm_seq;
                Some(svm_seq)
            }
            SecondaryAction::SendDigest {
                epoch,
                svm_seq,
                header_len,
                payload_len,
                digest,
            } => {
                assert_eq!(epoch, self.path.epoch());
                assert!(svm_seq > self.last_svm_seq, "numbers go up");
                self.last_svm_seq = svm_seq;
                let output = self.path.output(svm_seq).expect("it is stored");
                let bytes = self.frames.bytes(output);
                let (headers, n, expected) = digested(bytes, &digest_key()).expect("of one");
                assert_eq!(headers.len(), usize::from(header_len));
                assert_eq!((n, expected), (payload_len, digest));
                Some(svm_seq)
            }
            SecondaryAction::CaughtUp { epoch } => {
                assert_eq!(epoch, self.path.epoch());
                None
            }
            SecondaryAction::RequestCheckpoint(_) => None,
        }
    }

    /// The end of the life: the SVM becomes the VM, or the host ends.
    fn finish(mut self) {
        if !self.takes_over {
            self.path.close(&mut self.frames);
            assert_eq!(self.frames.used(), 0, "a slot leaked");
            return;
        }
        let mut path = self.path.take_over(self.now_us, &mut self.frames);
        for _ in 0..64 {
            while let Some(action) = path.poll_action() {
                match action {
                    Action::Release { token, .. } => drop(self.frames.take(token)),
                    other => panic!("alone, but {other:?}"),
                }
            }
            let Some(token) = path.poll_deliver(self.now_us, &mut self.frames) else {
                break;
            };
            path.handle_delivered(self.now_us, &mut self.frames, token);
            self.now_us += 10;
        }
        let mut out = [0; colo_compare::ANNOUNCEMENT_MAX];
        while path.poll_announcement(self.now_us, &mut out).is_some() {}
        path.close(&mut self.frames);
        assert_eq!(self.frames.used(), 0, "a slot leaked at the takeover");
    }
}

/// Whether this is a segment whose checksums are right; of odd frames nothing is known.
fn is_right(frame: &[u8]) -> bool {
    let packet = guest::parse(frame, Direction::FromGuest);
    let is_plain = matches!((packet.l3, packet.l4), (14, 34 | 54)) && packet.tcp.is_some();
    is_plain && checksums_are_right(frame)
}

fn good_record(limits: Limits) -> Vec<u8> {
    let mut record = Vec::new();
    PrimaryPath::new(limits).export_client_xlate(&mut record);
    record
}

fn raw(bytes: &mut Bytes<'_>) -> Vec<u8> {
    let len = usize::from(bytes.u8());
    bytes.take(len).to_vec()
}

/// A segment of one of four connections, with numbers near those of the others.
fn segment(bytes: &mut Bytes<'_>, to_guest: bool) -> Vec<u8> {
    let (choice, place) = (bytes.u8(), u32::from(bytes.u8()));
    let side = if choice & 1 == 0 { Side::V4 } else { Side::V6 };
    let flags =
        [ACK, SYN, SYN | ACK, RST | ACK, FIN | ACK, ACK, ACK, 0][usize::from(choice >> 2 & 7)];
    let isn = if choice & 32 == 0 {
        u32::MAX - 20
    } else {
        0x7fff_fff0
    };
    let (own, other) = if to_guest { (7, isn) } else { (isn, 7) };
    let mut segment = Segment::new(side)
        .ports(80, 40_000 + u16::from(choice >> 1 & 1))
        .flags(flags)
        .seq(own.wrapping_add(place & 15));
    if flags & ACK != 0 {
        segment = segment.ack(other.wrapping_add(place >> 4));
    }
    if choice & 64 != 0 {
        segment = segment.timestamps(place, isn.wrapping_add(place));
    }
    if choice & 128 != 0 {
        segment = segment.payload(&[choice; 9]);
    }
    let segment = if to_guest {
        segment.to_guest()
    } else {
        segment
    };
    segment.bytes()
}
