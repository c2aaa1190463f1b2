//! The secondary path takes all its memory in `new`: an allocator that counts watches every call,
//! through full tables, redelivery, commits and aborts.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod fixed;

use colo_compare::testing::{Segment, Side, digest_key, ip_frame, udp};
use colo_compare::wire::tcp::{ACK, RST, SYN};
use colo_compare::{Cause, Frames, Limits, PrimaryPath, SecondaryAction, SecondaryPath};
use fixed::{Dice, Pool, allocations, pure};

const SLOTS: u32 = 192;

/// So small that everything gets full.
fn limits() -> Limits {
    Limits {
        max_flows: 10,
        max_translations: 4,
        max_held_frames: 8,
        max_unacked_inputs: 12,
        max_input_frames: 40,
        max_stored_output: 20,
        digest_min_bytes: 1,
        hash_seed: 0x5eed,
        ..Limits::default()
    }
}

/// Clients.
const PORTS: u64 = 40;

/// One client's connection, as far as its numbers go.
#[derive(Clone, Copy, Default)]
struct Connection {
    sent: u32,
    answered: u32,
}

/// A primary, a guest and a shell that do at random what they may do.
struct Life {
    pool: Pool,
    path: SecondaryPath,
    dice: Dice,
    now_us: u64,
    connections: [Connection; PORTS as usize],
    input_seq: u64,
    acked_seq: u64,
    stopped: bool,
    unreported: Vec<u64>,
    record: Vec<u8>,
    requests: Vec<Cause>,
    commits: u64,
    aborts: u64,
}

impl Life {
    fn new(seed: u64, record: Vec<u8>) -> Self {
        let mut path = SecondaryPath::new(limits());
        path.set_digests(Some(digest_key()));
        let mut life = Self {
            pool: Pool::new(SLOTS),
            path,
            dice: Dice(seed),
            now_us: 0,
            connections: [Connection::default(); PORTS as usize],
            input_seq: 0,
            acked_seq: 0,
            stopped: false,
            unreported: Vec::new(),
            record,
            requests: Vec::new(),
            commits: 0,
            aborts: 0,
        };
        life.commit();
        life
    }

    fn below(&mut self, n: u64) -> u64 {
        self.dice.below(n)
    }

    fn segment(&self, port: u64) -> Segment {
        let side = if port.is_multiple_of(2) {
            Side::V4
        } else {
            Side::V6
        };
        Segment::new(side).ports(80, 40_000 + port as u16)
    }

    fn client_frame(&mut self, port: u64) -> Vec<u8> {
        let connection = &mut self.connections[port as usize];
        let (sent, answered) = (connection.sent, connection.answered);
        // The PVM's numbers.
        let (isn, pvm_isn) = (port as u32 * 1000, port as u32 + 7_000_000);
        let segment = self.segment(port).to_guest();
        let data = segment.clone().ack(pvm_isn + 1 + answered).timestamps(5, 6);
        match self.below(24) {
            0..=5 => segment.flags(SYN).seq(isn).bytes(),
            6..=18 => {
                self.connections[port as usize].sent += 10;
                data.seq(isn + 1 + sent).payload(&[7; 10]).bytes()
            }
            19 => data
                .seq(isn + 1 + sent)
                .sack(&[(pvm_isn, pvm_isn + 9)])
                .bytes(),
            20 => segment.flags(RST).seq(isn + 1 + sent).bytes(),
            21 => udp(Side::V6, true, 9, 40_000 + port as u16, b"question"),
            // Too long for the path: quotes what the PVM sent.
            22 => {
                let mut message = Vec::from([3, 4, 0, 0, 0, 0, 5, 0]);
                let quoted = self.segment(port & !1).seq(pvm_isn + 1).bytes();
                message.extend_from_slice(&quoted[14..42]);
                ip_frame(Side::V4, true, 1, 64, 0, &message)
            }
            _ => vec![0xff; 20],
        }
    }

    fn svm_frame(&mut self, port: u64) -> Vec<u8> {
        let Connection { sent, answered } = self.connections[port as usize];
        let (isn, svm_isn) = (port as u32 * 1000, port as u32 + 9_000_000);
        let segment = self.segment(port).timestamps(8, 5);
        match self.below(24) {
            0..=7 => segment.flags(SYN | ACK).seq(svm_isn).ack(isn + 1).bytes(),
            8..=13 => {
                self.connections[port as usize].answered += 10;
                let segment = segment.seq(svm_isn + 1 + answered).payload(&[8; 10]);
                segment.ack(isn + 1 + sent).bytes()
            }
            14..=18 => {
                let covered = self.below(u64::from(sent) + 1) as u32;
                segment
                    .seq(svm_isn + 1 + answered)
                    .ack(isn + 1 + covered)
                    .bytes()
            }
            19 => segment.flags(RST).seq(svm_isn + 1 + answered).bytes(),
            20 => segment.flags(SYN).seq(svm_isn + answered).bytes(),
            21 | 22 => udp(Side::V4, false, 9, 40_000 + port as u16, b"answer"),
            _ => vec![0xfe; 30],
        }
    }

    fn mirror(&mut self) {
        let limit = limits().max_unacked_inputs;
        let port = self.below(PORTS);
        let bytes = self.client_frame(port);
        if self.input_seq - self.acked_seq >= limit {
            return;
        }
        let Some(token) = self.pool.insert(&bytes) else {
            return;
        };
        self.input_seq += 1;
        let epoch = self.path.epoch() + u64::from(self.stopped);
        let (path, pool) = (&mut self.path, &mut self.pool);
        pure("handle_mirror", || {
            path.handle_mirror(self.now_us, pool, epoch, self.input_seq, token)
        })
        .unwrap();
    }

    fn svm_sends(&mut self) {
        let port = self.below(PORTS);
        let bytes = self.svm_frame(port);
        if self.stopped || !self.path.room() {
            return;
        }
        let Some(token) = self.pool.insert(&bytes) else {
            return;
        };
        let (path, pool) = (&mut self.path, &mut self.pool);
        pure("handle_guest_tx", || {
            path.handle_guest_tx(self.now_us, pool, token)
        });
    }

    fn deliver(&mut self) {
        let is_full = self.below(8) == 0;
        let (path, pool) = (&mut self.path, &mut self.pool);
        let Some(token) = pure("poll_deliver", || path.poll_deliver(self.now_us, pool)) else {
            return;
        };
        if is_full {
            pure("undelivered", || path.undelivered(token));
        } else {
            pool.release(token);
        }
    }

    fn act(&mut self) {
        while let Some(action) = pure("poll_action", || self.path.poll_action()) {
            match action {
                SecondaryAction::AckInput { up_to } => self.acked_seq = up_to,
                SecondaryAction::SendOutput { svm_seq, .. } => {
                    assert!(self.path.output(svm_seq).is_some());
                    self.unreported.push(svm_seq);
                }
                SecondaryAction::SendDigest { svm_seq, .. } => {
                    assert!(self.path.output(svm_seq).is_some());
                    self.unreported.push(svm_seq);
                }
                SecondaryAction::CaughtUp { .. } => {}
                SecondaryAction::RequestCheckpoint(cause) => self.requests.push(cause),
            }
        }
    }

    fn fetch(&mut self) {
        // Mostly of what is there.
        let newest = self.unreported.last().copied().unwrap_or(1);
        let svm_seq = newest.saturating_sub(self.below(6));
        pure("fetch", || self.path.fetch(svm_seq));
    }

    fn report(&mut self) {
        if self.unreported.is_empty() {
            return;
        }
        let at = self.below(self.unreported.len() as u64) as usize;
        let svm_seq = self.unreported.swap_remove(at);
        let (path, pool) = (&mut self.path, &mut self.pool);
        pure("handle_released", || path.handle_released(pool, svm_seq));
    }

    fn commit(&mut self) {
        let epoch = self.path.epoch().max(1);
        let held = self.below(limits().max_held_frames as u64 + 1);
        let frame = udp(Side::V4, false, 9, 9, b"pending");
        let pending = (0..held).map_while(|_| self.pool.insert(&frame)).collect();
        let (path, pool, record) = (&mut self.path, &mut self.pool, &self.record);
        pure("check_record", || path.check_record(record)).unwrap();
        pure("commit", || {
            path.commit(self.now_us, pool, epoch, pending, record)
        })
        .unwrap();
        if self.below(2) == 0 {
            let (path, pool) = (&mut self.path, &mut self.pool);
            pure("handle_pending_released", || {
                path.handle_pending_released(pool, epoch)
            });
        }
        self.stopped = false;
        self.unreported.clear();
        self.commits += 1;
    }

    fn end_stop(&mut self) {
        if self.below(3) == 0 {
            pure("resume_unchanged", || self.path.resume_unchanged());
            self.stopped = false;
            self.aborts += 1;
        } else {
            self.commit();
        }
    }

    fn step(&mut self) {
        self.now_us += self.below(3000);
        match self.below(100) {
            0..=29 => self.mirror(),
            30..=54 => self.svm_sends(),
            55..=79 => self.deliver(),
            80..=88 => self.act(),
            89..=93 => self.report(),
            94 => self.fetch(),
            95 => self.now_us += self.below(400_000),
            96 if !self.stopped => {
                pure("stop", || self.path.stop());
                self.stopped = true;
            }
            97 if self.stopped => self.end_stop(),
            _ => drop(pure("next_deadline", || self.path.next_deadline())),
        }
    }
}

#[test]
fn memory_that_is_asked_for_is_noticed() {
    let (vec, count) = allocations(|| Vec::<u8>::with_capacity(1));
    assert_eq!((vec.capacity(), count), (1, 1));
    let (_, count) = allocations(|| SecondaryPath::new(limits()));
    assert!(count > 0);
}

#[test]
fn a_secondary_path_takes_no_memory_after_new() {
    // What one life leaves behind is what the next one's checkpoints carry.
    let mut record = Vec::new();
    PrimaryPath::new(limits()).export_client_xlate(&mut record);
    let mut requests = Vec::new();
    for seed in 0..6 {
        let mut life = Life::new(seed, std::mem::take(&mut record));
        (0..40_000).for_each(|_| life.step());
        let stats = *life.path.stats();
        assert!(life.commits > 50 && life.aborts > 20);
        assert!(stats.mirrored > 3000 && stats.redelivered > 50 && stats.sent > 1000);
        assert!(stats.digests > 100 && stats.fetched > 20 && stats.fetched_in_vain > 20);
        assert!(stats.learnt > 20 && stats.dropped_by_commit > 500);
        requests.append(&mut life.requests);
        let Life {
            path,
            mut pool,
            now_us,
            ..
        } = life;
        let mut primary = path.take_over(now_us, &mut pool);
        record.reserve(primary.xlate_record_len());
        pure("export_client_xlate", || {
            primary.export_client_xlate(&mut record)
        });
        assert_eq!(record.len(), primary.xlate_record_len());
        assert!(record.len() <= limits().xlate_record_max());
        while let Some(token) = primary.poll_deliver(now_us, &mut pool) {
            pool.release(token);
        }
        primary.close(&mut pool);
        assert_eq!(pool.used(), 0, "a slot leaked");
    }
    let full = [
        Cause::TableFull,
        Cause::InputOverflow,
        Cause::OutputOverflow,
    ];
    for cause in full {
        assert!(requests.contains(&cause), "{cause:?} never came");
    }
}
