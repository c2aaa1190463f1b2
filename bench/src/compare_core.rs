//! `core`: what the comparator costs per pair of frames in memory, beside a memcmp of as many bytes. `digest`: the
//! same with the SVM's output as headers and digests.
//!
//! Invariants: a figure is given only when every pair of its run was released by match; the comparison
//! and the memcmp take turns. The median batch counts, because on a shared machine some are interrupted.
//!
//! Does not count the making of frames and of the SVM's digests, nor the clients' ACKs that let history go.

use std::time::Instant;

use colo_compare::testing::{Segment, Side, digest_key, udp};
use colo_compare::{Action, Frames, Limits, PathError, PrimaryPath, Right, Token};
use colo_fastpath::frame::FramePool;
use colo_fastpath::hint::use_huge_pages;

use crate::compare_load::{Protocol, Shape};
use crate::compare_row::CompareRow;
use crate::figures::Range;
use crate::place::BenchError;

/// Frames that a worker takes from a ring at a time.
const BATCH: usize = 64;
/// Bytes of a frame slot.
const SLOT_BYTES: usize = 2048;
/// Pairs of one run.
const PAIRS: usize = 1_000_000;

/// The row of a shape with digests.
pub(crate) fn run_digest(shape: Shape, rounds: usize) -> Result<CompareRow, BenchError> {
    let measure = |_| measure_core(shape, PAIRS, true);
    let all = (0..rounds).map(measure).collect::<Result<Vec<_>, _>>()?;
    Ok(row("digest", shape, Range::of(all).median))
}

fn row(kind: &'static str, shape: Shape, ns: f64) -> CompareRow {
    let bits = Traffic::new(shape).frame_len() as f64 * 8.0;
    CompareRow {
        kind,
        protocol: shape.protocol.name(),
        payload: shape.payload,
        flows: shape.flows,
        ns_per_pair: Some(ns),
        pairs_per_s: Some(1e9 / ns),
        gbit_s: Some(bits / ns),
        ..CompareRow::default()
    }
}

/// Both rows of a shape: ours and the memcmp.
pub(crate) fn run(shape: Shape, rounds: usize) -> Result<[CompareRow; 2], BenchError> {
    let (mut core, mut memcmp) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        core.push(measure_core(shape, PAIRS, false)?);
        memcmp.push(measure_memcmp(shape.payload, PAIRS));
    }
    let row = |kind, values| row(kind, shape, Range::of(values).median);
    Ok([row("core", core), row("memcmp", memcmp)])
}

/// Makes the frames of many flows from one template.
struct Traffic {
    template: Vec<u8>,
    protocol: Protocol,
    payload: usize,
    next_seq: Vec<u32>,
}

impl Traffic {
    fn new(shape: Shape) -> Self {
        let Shape {
            protocol,
            payload,
            flows,
        } = shape;
        let bytes: Vec<u8> = (0..payload).map(|n| (n * 7 + 13) as u8).collect();
        let template = match protocol {
            Protocol::Tcp => Segment::new(Side::V4)
                .seq(1)
                .ack(500)
                .timestamps(1, 2)
                .option(&[1, 1])
                .payload(&bytes)
                .bytes(),
            Protocol::Udp => udp(Side::V4, false, 53, 40_000, &bytes),
        };
        Self {
            template,
            protocol,
            payload,
            next_seq: vec![1; flows],
        }
    }

    fn frame_len(&self) -> usize {
        self.template.len()
    }

    fn header_len(&self) -> usize {
        self.template.len() - self.payload
    }

    /// Writes the next frame of `flow`: the peer's address and port name the flow.
    fn write(&self, flow: u32, frame: &mut [u8]) {
        frame.copy_from_slice(&self.template);
        // 10.x.x.x and one of 32 ports, far apart in every bit.
        let [_, a, b, c] = (flow >> 5).to_be_bytes();
        frame[30..34].copy_from_slice(&[10, a, b, c]);
        frame[36..38].copy_from_slice(&(32_768 + (flow as u16 & 31) * 64).to_be_bytes());
        if self.protocol == Protocol::Tcp {
            frame[38..42].copy_from_slice(&self.next_seq[flow as usize].to_be_bytes());
        }
    }

    fn advance(&mut self, flow: u32) {
        let seq = &mut self.next_seq[flow as usize];
        *seq = seq.wrapping_add(self.payload as u32);
    }

    /// The client's ACK of all that was sent in `flow`.
    fn write_ack(&self, flow: u32, frame: &mut [u8]) {
        let ack = Segment::new(Side::V4)
            .to_guest()
            .seq(500)
            .ack(self.next_seq[flow as usize])
            .bytes();
        frame[..ack.len()].copy_from_slice(&ack);
        let [_, a, b, c] = (flow >> 5).to_be_bytes();
        frame[26..30].copy_from_slice(&[10, a, b, c]);
        frame[34..36].copy_from_slice(&(32_768 + (flow as u16 & 31) * 64).to_be_bytes());
    }
}

/// A paired path and its frames.
struct Bench {
    path: PrimaryPath,
    frames: FramePool,
    traffic: Traffic,
    /// Of the payload, which all frames have in common.
    digest: Option<u128>,
    epoch: u64,
    svm_seq: u64,
    now_us: u64,
    matched: u64,
    reported: u64,
}

impl Bench {
    fn new(shape: Shape, has_digests: bool) -> Result<Self, BenchError> {
        let limits = Limits {
            max_flows: shape.flows.next_power_of_two().max(64),
            max_unacked_inputs: u64::MAX,
            hash_seed: 0x5eed,
            ..Limits::default()
        };
        let mut path = PrimaryPath::new(limits);
        use_huge_pages(&path);
        let mut frames = FramePool::new(8192, SLOT_BYTES);
        let failed = |e: PathError| BenchError::Failed(e.to_string());
        let first = path.pair(0).map_err(failed)?;
        path.set_lease(0, &mut frames, u64::MAX);
        path.commit(0, &mut frames, first).map_err(failed)?;
        path.caught_up(0, first + 1);
        let traffic = Traffic::new(shape);
        let key = has_digests.then(digest_key);
        path.set_digest_key(key.clone());
        let mut bench = Self {
            path,
            frames,
            digest: key.map(|key| key.of(&traffic.template[traffic.header_len()..])),
            traffic,
            epoch: first + 1,
            svm_seq: 0,
            now_us: 0,
            matched: 0,
            reported: 0,
        };
        bench.act();
        Ok(bench)
    }

    /// The next frame of a flow, or `len` bytes of it.
    fn frame(&mut self, flow: u32, len: usize) -> Option<Token> {
        let traffic = &self.traffic;
        self.frames.fill(|slot| {
            traffic.write(flow, &mut slot[..traffic.frame_len()]);
            Some(len)
        })
    }

    fn act(&mut self) {
        while let Some(action) = self.path.poll_action() {
            match action {
                Action::Release { token, right, .. } => {
                    self.matched += u64::from(right == Right::Match);
                    self.frames.release(token);
                }
                Action::Mirror { token, .. } => self.frames.release(token),
                Action::SvmReleased { .. } => self.reported += 1,
                Action::PendingReleased { .. } | Action::Checkpoint(_) | Action::Fetch { .. } => {}
            }
        }
    }

    /// Puts one batch through and gives the nanoseconds that the comparator took.
    fn batch(&mut self, flows: &[u32]) -> Result<u64, BenchError> {
        let exhausted = || BenchError::Failed("the frame pool is too small".into());
        let mut pvm = Vec::with_capacity(BATCH);
        let mut svm = Vec::with_capacity(BATCH);
        let frame_len = self.traffic.frame_len();
        let svm_len = match self.digest {
            Some(_) => self.traffic.header_len(),
            None => frame_len,
        };
        for &flow in flows {
            pvm.push(self.frame(flow, frame_len).ok_or_else(exhausted)?);
            svm.push(self.frame(flow, svm_len).ok_or_else(exhausted)?);
            self.traffic.advance(flow);
        }
        self.now_us += 10;
        let started = Instant::now();
        self.put_through(pvm, svm);
        let ns = started.elapsed().as_nanos() as u64;
        if self.traffic.protocol == Protocol::Tcp {
            self.acknowledge(flows)?;
        }
        Ok(ns)
    }

    /// What is measured: a name of its own, so that callgrind can be told to look at nothing else.
    #[inline(never)]
    fn put_through(&mut self, pvm: Vec<Token>, svm: Vec<Token>) {
        let now_us = self.now_us;
        self.path.expect(&self.frames, pvm.iter());
        for token in pvm {
            self.path.handle_guest_tx(now_us, &mut self.frames, token);
        }
        self.path.expect(&self.frames, svm.iter());
        for token in svm {
            self.svm_seq += 1;
            let (epoch, seq, frames) = (self.epoch, self.svm_seq, &mut self.frames);
            match self.digest {
                None => self
                    .path
                    .handle_svm_output(now_us, frames, epoch, seq, token),
                Some(digest) => {
                    let n = self.traffic.payload as u16;
                    self.path
                        .handle_svm_digest(now_us, frames, epoch, seq, token, n, digest);
                }
            }
        }
        self.act();
    }

    /// The clients' ACKs, which let history go. Not part of a pair's cost.
    fn acknowledge(&mut self, flows: &[u32]) -> Result<(), BenchError> {
        for &flow in flows {
            let traffic = &self.traffic;
            let token = self.frames.fill(|slot| {
                traffic.write_ack(flow, slot);
                Some(54)
            });
            let token =
                token.ok_or_else(|| BenchError::Failed("the frame pool is too small".into()))?;
            self.path
                .handle_delivered(self.now_us, &mut self.frames, token);
            self.act();
        }
        let up_to = self.path.stats().mirrored;
        self.path
            .handle_input_ack(self.now_us, &mut self.frames, up_to);
        self.act();
        Ok(())
    }
}

/// Flow numbers in an order that no cache can foresee, each as often as the others.
fn order(flows: u32) -> impl FnMut() -> u32 {
    let mask = flows.next_power_of_two() - 1;
    let mut state = 1u32;
    move || loop {
        // A full-period generator modulo the power of two.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let flow = (state ^ state >> 15) & mask;
        if flow < flows {
            return flow;
        }
    }
}

fn measure_core(shape: Shape, pairs: usize, has_digests: bool) -> Result<f64, BenchError> {
    let mut bench = Bench::new(shape, has_digests)?;
    let flows = u32::try_from(shape.flows).unwrap_or(u32::MAX);
    let mut next = order(flows);
    let mut batch = |n: usize| -> Vec<u32> { (0..n).map(|_| next()).collect() };
    // Every flow is known before the measurement.
    for first in (0..flows).step_by(BATCH) {
        let known: Vec<u32> = (first..flows.min(first + BATCH as u32)).collect();
        bench.batch(&known)?;
    }
    let before = bench.matched;
    let mut done = 0;
    // The median batch: on a shared machine some are interrupted.
    let mut per_batch = Vec::with_capacity(pairs / BATCH + 1);
    while done < pairs {
        let flows = batch(BATCH);
        per_batch.push(bench.batch(&flows)? as f64);
        done += BATCH;
    }
    let matched = (bench.matched - before) as usize;
    if matched != done {
        let text = format!(
            "{matched} of {done} pairs left by match: {:?}",
            bench.path.stats()
        );
        return Err(BenchError::Failed(text));
    }
    bench.path.close(&mut bench.frames);
    Ok(Range::of(per_batch).median / BATCH as f64)
}

/// A plain comparison of as many bytes, in slots that change as those of frames do.
fn measure_memcmp(payload: usize, pairs: usize) -> f64 {
    let slots = 2 * BATCH;
    let slab: Vec<u8> = (0..slots * SLOT_BYTES)
        .map(|n| (n % SLOT_BYTES) as u8)
        .collect();
    let started = Instant::now();
    let mut equal = 0usize;
    for n in 0..pairs {
        let at = |slot: usize| slot % slots * SLOT_BYTES + 66;
        let (a, b) = (at(n), at(n + BATCH));
        let sides = (&slab[a..a + payload], &slab[b..b + payload]);
        let (a, b) = std::hint::black_box(sides);
        equal += usize::from(a == b);
    }
    let ns = started.elapsed().as_nanos() as f64;
    assert_eq!(std::hint::black_box(equal), pairs, "the slots are equal");
    ns / pairs as f64
}
