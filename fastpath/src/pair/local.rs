//! Both guests on one worker, without a link: the output of one is compared with that of the other.
//!
//! Invariants: nothing leaves that the comparator has not released; a guest whose output runs ahead of the
//! other's by [`AHEAD_MAX`] frames waits, and both do while the NIC has no room. Frames that both guests have
//! sent leave by twos ([`super::twos`]); others are taken in order, of the guest that is behind first. There is no state to copy: a checkpoint counts as taken as soon as it
//! is asked for, so this measures and tests the packet path, it protects nothing.
//!
//! For one shard: what the SVM sends is compared by the worker that takes it.
//!
//! Does not feed the guests: frames from the NIC stay there. Does not wake for the SVM: the worker must poll
//! ([`PollMode::Busy`](crate::worker::PollMode::Busy)).

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::sync::Arc;

use colo_compare::{Action, Limits, PathError, PrimaryPath, Right, Token};

use crate::frame::CopyCause;
use crate::hint::use_huge_pages;
use crate::stats::WorkerStats;
use crate::vhost_user::{GuestRings, GuestSide};
use crate::worker::{
    BATCH, Edge, FRONT_FRAMES, GuestPort, PortState, Role, Stays, WorkerGone, WorkerHandle,
};

use super::OnWorkers;
use super::twos::{self, End};

/// Frames that one guest's output may be ahead of the other's.
const AHEAD_MAX: u64 = 512;
/// So long frames of one guest alone stay in its queue: most often the other's come meanwhile, and
/// nothing has to be put away.
const PATIENCE_US: u64 = 50;

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalReport {
    /// Frames of the PVM that left because the SVM had sent the same.
    pub matched: u64,
    /// Of these, those that left before either was taken.
    pub by_twos: u64,
    /// Frames of the PVM that left by another right.
    pub otherwise: u64,
    /// Checkpoints that were asked for.
    pub checkpoints: u64,
    /// Frames taken from the PVM.
    pub pvm_frames: u64,
    /// Frames taken from the SVM.
    pub svm_frames: u64,
}

/// The role of the worker: the PVM is the guest of its edge, the SVM has a port here.
#[derive(Debug)]
pub struct LocalPairRole {
    path: PrimaryPath,
    svm: GuestPort,
    batch: Vec<Token>,
    unsent: VecDeque<Token>,
    report: LocalReport,
    /// Frames of either since the last checkpoint.
    since: [u64; 2],
    /// Of the SVM's, those that have had a counterpart.
    settled: u64,
    /// Frames of each guest that are taken one by one before the next look at both.
    most: usize,
    /// Since when only one guest has something to send.
    alone_since_us: Option<u64>,
}

impl LocalPairRole {
    /// A pair whose guests are not there yet.
    pub fn new(limits: Limits) -> Self {
        let path = PrimaryPath::new(limits);
        use_huge_pages(&path);
        Self {
            path,
            svm: GuestPort::new(None, Arc::new(WorkerStats::default())),
            batch: Vec::with_capacity(BATCH),
            unsent: VecDeque::with_capacity(limits.max_held_frames),
            report: LocalReport::default(),
            since: [0; 2],
            settled: 0,
            most: 1,
            alone_since_us: None,
        }
    }

    /// Puts a worker into this role and begins to compare.
    pub fn start(self, worker: &WorkerHandle) -> Result<(), WorkerGone> {
        worker.set_role(Box::new(self))?;
        let begun = Self::on_worker(worker, |role, edge| role.pair(edge));
        match begun {
            Some(Ok(())) => Ok(()),
            Some(Err(e)) => {
                tracing::error!("{e}");
                Err(WorkerGone)
            }
            None => Err(WorkerGone),
        }
    }

    fn pair(&mut self, edge: &mut Edge) -> Result<(), PathError> {
        let frames = &mut edge.frames;
        let first = self.path.pair(0)?;
        self.path.set_lease(0, frames, u64::MAX);
        self.path.commit(0, frames, first)?;
        self.path.caught_up(0, first + 1);
        Ok(())
    }

    /// What a worker in this role has done; `None` if it is in another.
    pub fn report(worker: &WorkerHandle) -> Option<LocalReport> {
        Self::on_worker(worker, |role, _| role.report)
    }

    fn take(&mut self, edge: &mut Edge, now_us: u64) -> usize {
        let (mut passed, mut end) = (0, End::NoneLeft);
        while passed < BATCH && self.unsent.is_empty() {
            let (n, why) = self.pass_twos(edge, now_us);
            (passed, end) = (passed + n, why);
            if n < FRONT_FRAMES {
                break;
            }
        }
        if passed > 0 {
            (self.most, self.alone_since_us) = (1, None);
            if end != End::Neither {
                return passed;
            }
        }
        passed + self.take_singly(edge, now_us)
    }

    /// Lets frames leave as long as both guests have sent the same. Gives how many.
    #[inline(never)]
    fn pass_twos(&mut self, edge: &mut Edge, now_us: u64) -> (usize, End) {
        let epoch = self.path.epoch();
        let Some(mut pairs) = self.path.pairs(now_us, epoch) else {
            return (0, End::Neither);
        };
        let frame_max = edge.frames.frame_bytes_max();
        let Some(svm) = self.svm.front(frame_max) else {
            return (0, End::NoneLeft);
        };
        let Some((pvm, frames)) = edge.guest_front() else {
            return (0, End::NoneLeft);
        };
        let (seq, out) = (self.report.svm_frames, &mut self.batch);
        let (passed, end) = twos::pass(frames, &mut pairs, &mut [pvm, svm], seq, out);
        drop(pairs);
        let count = passed as u64;
        self.since = self.since.map(|frames| frames + count);
        self.settled += count;
        self.report.matched += count;
        self.report.by_twos += count;
        self.report.pvm_frames += count;
        self.report.svm_frames += count;
        let mut batch = std::mem::take(&mut self.batch);
        for token in batch.drain(..) {
            self.send(edge, token);
        }
        self.batch = batch;
        (passed, end)
    }

    /// Takes frames for themselves: what the other guest's wait for, then a few of both.
    fn take_singly(&mut self, edge: &mut Edge, now_us: u64) -> usize {
        let held = self.path.held_frames();
        let unmatched = self.since[1].saturating_sub(self.settled) as usize;
        let behind = match held.cmp(&unmatched) {
            Ordering::Greater => self.take_svm(edge, now_us, held - unmatched),
            Ordering::Less => self.take_pvm(edge, now_us, unmatched - held),
            Ordering::Equal => 0,
        };
        if behind > 0 || self.waits_for_other(edge, now_us) {
            return behind;
        }
        let most = self.most;
        self.most = BATCH.min(2 * most);
        self.take_pvm(edge, now_us, most) + self.take_svm(edge, now_us, most)
    }

    /// Whether one guest alone has something to send, and not for long.
    fn waits_for_other(&mut self, edge: &mut Edge, now_us: u64) -> bool {
        if edge.guest_has_output() == self.svm.has_output() {
            self.alone_since_us = None;
            return false;
        }
        let since_us = *self.alone_since_us.get_or_insert(now_us);
        now_us.saturating_sub(since_us) < PATIENCE_US
    }

    fn take_pvm(&mut self, edge: &mut Edge, now_us: u64, most: usize) -> usize {
        let ahead = self.since[0].saturating_sub(self.since[1]);
        let room = self.path.room_frames().min(BATCH).min(most);
        let max = room.min((AHEAD_MAX - ahead.min(AHEAD_MAX)) as usize);
        while self.batch.len() < max {
            let Some(token) = edge.guest_take_in_place() else {
                break;
            };
            self.batch.push(token);
        }
        let count = self.batch.len();
        self.path.expect(&edge.frames, self.batch.iter());
        for token in self.batch.drain(..) {
            self.path.handle_guest_tx(now_us, &mut edge.frames, token);
        }
        self.since[0] += count as u64;
        self.report.pvm_frames += count as u64;
        count
    }

    fn take_svm(&mut self, edge: &mut Edge, now_us: u64, most: usize) -> usize {
        let ahead = self.since[1].saturating_sub(self.since[0]);
        let max = BATCH
            .min(most)
            .min((AHEAD_MAX - ahead.min(AHEAD_MAX)) as usize);
        let frame_max = edge.frames.frame_bytes_max();
        while self.batch.len() < max && edge.frames.free_slots() > 0 {
            let stays = Stays::Nothing(CopyCause::Role);
            let Some(token) = self.svm.take(&mut edge.frames, frame_max, stays) else {
                break;
            };
            self.batch.push(token);
        }
        let count = self.batch.len();
        self.path.expect(&edge.frames, self.batch.iter());
        let epoch = self.path.epoch();
        for token in self.batch.drain(..) {
            self.report.svm_frames += 1;
            let seq = self.report.svm_frames;
            self.path
                .handle_svm_output(now_us, &mut edge.frames, epoch, seq, token);
        }
        self.since[1] += count as u64;
        count
    }

    fn act(&mut self, edge: &mut Edge, now_us: u64) {
        let mut wants_checkpoint = false;
        while let Some(action) = self.path.poll_action() {
            match action {
                Action::Release { token, right, .. } => {
                    match right {
                        Right::Match => self.report.matched += 1,
                        _ => self.report.otherwise += 1,
                    }
                    self.send(edge, token);
                }
                Action::Mirror { token, .. } => edge.release(token),
                Action::SvmReleased { svm_seq } => {
                    let forgotten = self.report.svm_frames - self.since[1];
                    self.settled += u64::from(svm_seq > forgotten);
                }
                // All bytes are at hand: nothing is fetched.
                Action::PendingReleased { .. } | Action::Fetch { .. } => {}
                Action::Checkpoint(divergence) => {
                    tracing::debug!("{divergence:?}");
                    wants_checkpoint = true;
                }
            }
        }
        if wants_checkpoint {
            self.checkpoint(edge, now_us);
        }
    }

    /// Sends a frame behind those that the NIC had no room for.
    #[inline]
    fn send(&mut self, edge: &mut Edge, token: Token) {
        if !self.unsent.is_empty() {
            self.unsent.push_back(token);
        } else if let Err(token) = edge.nic_send(token) {
            self.unsent.push_back(token);
        }
    }

    fn send_kept(&mut self, edge: &mut Edge) {
        while let Some(token) = self.unsent.pop_front() {
            if let Err(token) = edge.nic_send(token) {
                self.unsent.push_front(token);
                break;
            }
        }
    }

    /// As if one had been taken in no time.
    #[cold]
    fn checkpoint(&mut self, edge: &mut Edge, now_us: u64) {
        self.report.checkpoints += 1;
        (self.since, self.settled) = ([0; 2], 0);
        edge.settle_all();
        let committed = self.path.cut(now_us).and_then(|epoch| {
            self.path.commit(now_us, &mut edge.frames, epoch)?;
            self.path.caught_up(now_us, epoch + 1);
            Ok(())
        });
        if let Err(e) = committed {
            tracing::error!("{e}");
        }
        self.act(edge, now_us);
    }
}

impl Role for LocalPairRole {
    fn name(&self) -> &'static str {
        "local pair"
    }

    fn step(&mut self, edge: &mut Edge, now_us: u64) -> bool {
        self.send_kept(edge);
        let moved = match self.unsent.is_empty() {
            true => self.take(edge, now_us),
            false => 0,
        };
        if self.path.next_deadline().is_some_and(|at| at <= now_us) {
            self.path.handle_timeout(now_us, &mut edge.frames);
        }
        self.act(edge, now_us);
        self.svm.flush();
        moved > 0
    }

    fn deadline_us(&self) -> Option<u64> {
        self.path.next_deadline()
    }

    fn wants_nic_frames(&self, _edge: &mut Edge) -> bool {
        false
    }

    fn wants_guest_frames(&self) -> bool {
        self.path.room() && self.unsent.is_empty()
    }

    fn leave(&mut self, edge: &mut Edge) {
        self.path.give_back(&mut edge.frames);
        for token in self.unsent.drain(..) {
            edge.release(token);
        }
    }
}

/// The place of the SVM in a worker that has this role.
#[derive(Clone, Debug)]
pub struct SvmSide(pub WorkerHandle);

impl GuestSide for SvmSide {
    fn attach(&mut self, rings: GuestRings) -> Result<(), WorkerGone> {
        let attach = |role: &mut LocalPairRole, _: &mut Edge| role.svm.attach(rings);
        LocalPairRole::on_worker(&self.0, attach).ok_or(WorkerGone)
    }

    fn detach(&mut self) -> Result<Option<PortState>, WorkerGone> {
        let detach = |role: &mut LocalPairRole, _: &mut Edge| role.svm.detach();
        LocalPairRole::on_worker(&self.0, detach).ok_or(WorkerGone)
    }
}

#[cfg(test)]
#[path = "local_tests.rs"]
mod tests;
