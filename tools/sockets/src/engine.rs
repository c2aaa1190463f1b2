//! The loop: read both inputs, compare, write what may leave.
//!
//! Invariants: a frame leaves only by the comparator's word; an input whose frames find no room is not
//! read, and neither is any while OUT is blocked, so nothing is ever dropped; time stands still for the
//! comparator while OUT is blocked, because a peer that does not read makes nobody late.
//!
//! Does not know what a checkpoint is: the notify socket says that one was taken.

use std::os::fd::AsFd;
use std::time::Instant;

use colo_compare::{Action, Divergence, Frames, Limits, Passed, Policy, PrimaryPath};

use crate::address::Socket;
use crate::error::SocketsError;
use crate::input::{BATCH, Input};
use crate::notify::Notify;
use crate::outlet::Outlet;
use crate::ready::{Interest, wait};
use crate::slab::{Side, Slab};
use crate::{DIVERGENCES_KEPT, Summary};

/// An input that has no frame, and so many bytes fewer than the other, is read again.
const BEHIND_BYTES: usize = 4096;
/// So often in one turn, so that what may leave does not wait for it.
const REREADS_MAX: u32 = 2;
/// So many turns without a pause make up for the most that a socket's buffer holds: a frame that
/// was there before them has been read.
const TURNS_TO_CATCH_UP: u32 = 8;
/// Deadlines are looked at no more often than this.
const TIME_STEP_US: u64 = 1000;
/// How long, after everything has ended, the word about a checkpoint that was asked for is awaited,
/// and how long a lost notify socket is put up with: who ends everything closes one socket first.
const LINGER_US: u64 = 1_000_000;

/// Monotonic microseconds, without the times when it was stopped.
#[derive(Debug)]
struct Clock {
    start: Instant,
    stopped_us: u64,
}

impl Clock {
    fn raw_us(&self) -> u64 {
        self.start.elapsed().as_micros() as u64
    }

    fn now_us(&self) -> u64 {
        self.raw_us() - self.stopped_us
    }
}

/// The sockets of a run, connected.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) primary: Socket,
    pub(crate) secondary: Socket,
    pub(crate) out: Socket,
    pub(crate) notify: Option<Socket>,
}

/// The whole.
#[derive(Debug)]
pub(crate) struct Engine {
    path: PrimaryPath,
    slab: Slab,
    primary: Input,
    secondary: Input,
    outlet: Outlet,
    notify: Option<Notify>,
    checkpoint_at_once: bool,
    clock: Clock,
    limits: Limits,
    /// Frames of the secondary that the comparator was given: in all, when it last forgot them,
    /// and how many of those since then it has settled.
    svm_seq: u64,
    svm_forgotten: u64,
    svm_settled: u64,
    turns: u32,
    looked_at_us: u64,
    /// A checkpoint was asked for and not taken yet.
    awaiting: bool,
    /// A checkpoint was taken: its commit follows when what the guests sent before it is read.
    taken: Option<u32>,
    stuck_since_us: Option<u64>,
    requests: u64,
    divergences: Vec<Divergence>,
    checkpoints: u64,
    /// Frames of the secondary that a checkpoint made void before they stood for anything.
    voided: u64,
}

impl Engine {
    pub(crate) fn new(
        sockets: Sockets,
        vnet_hdr: bool,
        checkpoint_at_once: bool,
        limits: Limits,
        policy: Policy,
    ) -> Self {
        let mut slab = Slab::new();
        let mut input = |socket, side| Input::new(socket, side, vnet_hdr, &mut slab);
        let primary = input(sockets.primary, Side::Primary);
        let secondary = input(sockets.secondary, Side::Secondary);
        Self {
            path: PrimaryPath::with_policy(limits, policy),
            slab,
            primary,
            secondary,
            outlet: Outlet::new(sockets.out),
            notify: sockets.notify.map(|socket| Notify::new(socket, vnet_hdr)),
            checkpoint_at_once,
            clock: Clock {
                start: Instant::now(),
                stopped_us: 0,
            },
            limits,
            svm_seq: 0,
            svm_forgotten: 0,
            svm_settled: 0,
            turns: 0,
            looked_at_us: 0,
            awaiting: false,
            taken: None,
            stuck_since_us: None,
            requests: 0,
            divergences: Vec::with_capacity(DIVERGENCES_KEPT),
            checkpoints: 0,
            voided: 0,
        }
    }

    pub(crate) fn run(mut self) -> Result<Summary, SocketsError> {
        // Both guests are equal now; there is no heartbeat that could ever be missed.
        let epoch = self.path.pair(0)?;
        self.path.commit(0, &mut self.slab, epoch)?;
        self.path.caught_up(0, self.path.epoch());
        self.path.set_lease(0, &mut self.slab, u64::MAX);
        loop {
            self.turn()?;
            if self.is_finished() {
                return self.finish();
            }
            self.wait()?;
        }
    }

    fn is_finished(&self) -> bool {
        self.primary.intake.is_finished() && self.secondary.intake.is_finished()
    }

    fn turn(&mut self) -> Result<(), SocketsError> {
        let now_us = self.clock.now_us();
        if !self.outlet.is_blocked() {
            self.read()?;
            self.compare(now_us)?;
            self.pass_time(now_us);
            self.act(now_us)?;
        }
        self.commit_when_caught_up(now_us)?;
        self.outlet.flush(&mut self.slab)
    }

    /// Gives the comparator what was read, a frame of each side in turn: what belongs together
    /// meets while it is in the cache, the primary's first, because then nothing is stored twice.
    #[inline(never)]
    fn compare(&mut self, now_us: u64) -> Result<(), SocketsError> {
        let (mut most, mut rereads) = (1, 0);
        loop {
            let passed = self.pass_pairs(now_us);
            if rereads < REREADS_MAX && self.read_what_is_behind()? {
                rereads += 1;
                continue;
            }
            most = if passed { 1 } else { BATCH.min(2 * most) };
            self.take(most)?;
            let (primary, secondary) = (&mut self.primary.batch, &mut self.secondary.batch);
            if primary.is_empty() && secondary.is_empty() {
                return Ok(());
            }
            // Most often both are of the same flows.
            let ahead = if primary.is_empty() {
                &secondary
            } else {
                &primary
            };
            self.path.expect(&self.slab, ahead.iter());
            let epoch = self.path.epoch();
            let (mut primary, mut secondary) = (primary.drain(..), secondary.drain(..));
            loop {
                let (held, output) = (primary.next(), secondary.next());
                if held.is_none() && output.is_none() {
                    break;
                }
                if let Some(token) = held {
                    self.path.handle_guest_tx(now_us, &mut self.slab, token);
                }
                if let Some(token) = output {
                    self.svm_seq += 1;
                    let frames = &mut self.slab;
                    self.path
                        .handle_svm_output(now_us, frames, epoch, self.svm_seq, token);
                }
            }
            drop((primary, secondary));
            self.act(now_us)?;
        }
    }

    /// Lets frames leave by twos, as long as the guests have sent the same in the same order: where
    /// they lie, without a slot for any but those that are kept. Gives whether there were any.
    #[inline(never)]
    fn pass_pairs(&mut self, now_us: u64) -> bool {
        let (slab, outlet) = (&mut self.slab, &mut self.outlet);
        let (primary, secondary) = (&mut self.primary.intake, &mut self.secondary.intake);
        let Some(mut pairs) = self.path.pairs(now_us, self.path.epoch()) else {
            return false;
        };
        let mut svm_seq = self.svm_seq;
        let mut next = [primary.next(), secondary.next()];
        while let (Some(one), Some(other)) =
            (primary.peek(next[0], slab), secondary.peek(next[1], slab))
        {
            let ends = [one.end, other.end];
            match pairs.take(one.frame, other.frame) {
                Passed::Neither => break,
                Passed::Both => {}
                Passed::BothAndKeep(history) => {
                    let (range, lead) = (other.range(), other.lead);
                    if let Some(token) = slab.insert(Side::Secondary, range, lead) {
                        pairs.keep(slab, history, svm_seq + 1, token);
                    }
                }
            }
            svm_seq += 1;
            next = ends;
        }
        let passed = svm_seq - self.svm_seq;
        (self.svm_seq, self.svm_settled) = (svm_seq, self.svm_settled + passed);
        // What leaves lies side by side.
        let left = primary.pass(next[0]);
        secondary.pass(next[1]);
        if passed > 0 {
            outlet.push_range(left, slab);
        }
        passed > 0
    }

    /// Takes frames of both inputs, up to `most` each; of one alone, when more of the other's wait for
    /// counterparts. So frames that belong together come to lie side by side again.
    fn take(&mut self, most: usize) -> Result<(), SocketsError> {
        let (held, unmatched) = (self.path.held_frames(), self.svm_unmatched() as usize);
        if held > unmatched {
            self.take_secondary(BATCH.min(held - unmatched))?;
        } else if unmatched > held {
            self.take_primary(BATCH.min(unmatched - held))?;
        }
        if self.primary.batch.is_empty() && self.secondary.batch.is_empty() {
            self.take_primary(most)?;
            self.take_secondary(most)?;
        }
        Ok(())
    }

    /// Under load one input is often read before the other has got as far. What the other has got
    /// meanwhile is worth another look, before much is held that could leave at once. Gives whether
    /// there was more.
    fn read_what_is_behind(&mut self) -> Result<bool, SocketsError> {
        let ahead = |one: &Input, other: &Input| {
            let more = one
                .intake
                .unparsed()
                .saturating_sub(other.intake.unparsed());
            let next = other.intake.next();
            more > BEHIND_BYTES && other.intake.peek(next, &self.slab).is_none()
        };
        let input = match () {
            () if ahead(&self.primary, &self.secondary) => &mut self.secondary,
            () if ahead(&self.secondary, &self.primary) => &mut self.primary,
            () => return Ok(false),
        };
        input.ready = true;
        input.read(&mut self.slab)
    }

    /// Reads once what each input has. Where more of one input's frames wait for counterparts, the
    /// other is read alone, as long as it has something: so neither stays ahead.
    fn read(&mut self) -> Result<(), SocketsError> {
        let (held, unmatched) = (self.path.held_frames() as u64, self.svm_unmatched());
        let (first, second) = match held > unmatched {
            true => (&mut self.secondary, &mut self.primary),
            false => (&mut self.primary, &mut self.secondary),
        };
        let has_more = first.read(&mut self.slab)?;
        if held == unmatched || !has_more {
            second.read(&mut self.slab)?;
        }
        Ok(())
    }

    /// The comparator takes a full hold queue for a reason to checkpoint; here it only means that
    /// the other guest has to be heard first.
    fn take_primary(&mut self, most: usize) -> Result<(), SocketsError> {
        let room = self.limits.max_held_frames - 1;
        let room = room.saturating_sub(self.path.held_frames());
        self.primary.take(most, room, &mut self.slab)
    }

    /// Room that history takes is given up for new output, that of unmatched output is not.
    fn take_secondary(&mut self, most: usize) -> Result<(), SocketsError> {
        let room = self.limits.max_svm_frames as u64;
        let room = room.saturating_sub(self.svm_unmatched());
        self.secondary.take(most, room as usize, &mut self.slab)
    }

    fn svm_unmatched(&self) -> u64 {
        self.svm_seq - self.svm_forgotten - self.svm_settled
    }

    fn act(&mut self, now_us: u64) -> Result<(), SocketsError> {
        while let Some(action) = self.path.poll_action() {
            match action {
                Action::Release { token, .. } => self.outlet.push(token, &mut self.slab),
                Action::Checkpoint(divergence) => self.request(now_us, &divergence)?,
                // Nobody is told what was released, and there is no input that could be mirrored.
                Action::Mirror { token, .. } => self.slab.release(token),
                Action::SvmReleased { svm_seq } if svm_seq > self.svm_forgotten => {
                    self.svm_settled += 1
                }
                // It had done its duty before the checkpoint, only the word comes after it.
                Action::SvmReleased { .. } => self.voided -= 1,
                Action::PendingReleased { .. } | Action::Fetch { .. } => {}
            }
        }
        Ok(())
    }

    fn request(&mut self, now_us: u64, divergence: &Divergence) -> Result<(), SocketsError> {
        self.requests += 1;
        if self.divergences.len() < DIVERGENCES_KEPT {
            self.divergences.push(*divergence);
        }
        log(divergence);
        self.awaiting = true;
        match &mut self.notify {
            Some(notify) => notify.request_checkpoint(),
            None if self.checkpoint_at_once => self.commit(now_us)?,
            None => {}
        }
        Ok(())
    }

    /// Whether everything that had come when this turn began has been read, as far as there is room.
    fn has_caught_up(&self) -> bool {
        let heard = |input: &Input| !input.ready || !input.wants_reading(&self.slab);
        heard(&self.primary) && heard(&self.secondary)
    }

    fn pass_time(&mut self, now_us: u64) {
        self.turns += 1;
        let is_time = now_us >= self.looked_at_us + TIME_STEP_US;
        if is_time && (self.has_caught_up() || self.turns >= TURNS_TO_CATCH_UP) {
            self.turns = 0;
            self.looked_at_us = now_us;
            self.path.handle_timeout(now_us, &mut self.slab);
        }
    }

    /// What the guests sent before a checkpoint belongs to the epoch that it ends.
    fn commit_when_caught_up(&mut self, now_us: u64) -> Result<(), SocketsError> {
        let Some(turns) = self.taken else {
            return Ok(());
        };
        if !self.outlet.is_blocked() && !self.has_caught_up() && turns < TURNS_TO_CATCH_UP {
            self.taken = Some(turns + 1);
            return Ok(());
        }
        self.taken = None;
        self.commit(now_us)?;
        self.act(now_us)
    }

    /// Both guests are equal: what is held leaves, and a new epoch begins.
    fn commit(&mut self, now_us: u64) -> Result<(), SocketsError> {
        self.awaiting = false;
        self.stuck_since_us = None;
        self.checkpoints += 1;
        let epoch = self.path.cut(now_us)?;
        self.path.commit(now_us, &mut self.slab, epoch)?;
        self.path.caught_up(now_us, self.path.epoch());
        // A commit forgets all output of the secondary.
        self.voided += self.svm_unmatched();
        (self.svm_forgotten, self.svm_settled) = (self.svm_seq, 0);
        Ok(())
    }

    fn wait(&mut self) -> Result<(), SocketsError> {
        self.check_notify()?;
        let timeout_us = self.sleep_us();
        if timeout_us == Some(0) && !self.turns.is_multiple_of(TURNS_TO_CATCH_UP) {
            // To try costs no more than to ask first.
            (self.primary.ready, self.secondary.ready) = (true, true);
            return Ok(());
        }
        let blocked = self.outlet.is_blocked();
        let reads = |input: &Input| !blocked && input.wants_reading(&self.slab);
        let interests = [
            interest(self.primary.intake.socket(), reads(&self.primary), false),
            interest(
                self.secondary.intake.socket(),
                reads(&self.secondary),
                false,
            ),
            interest(self.outlet.socket(), false, blocked),
            self.notify.as_ref().and_then(notify_interest),
        ];
        let begun_us = self.clock.raw_us();
        let [primary, secondary, _, notify] =
            wait(&interests, timeout_us).map_err(SocketsError::Wait)?;
        if blocked {
            self.clock.stopped_us += self.clock.raw_us() - begun_us;
        }
        self.primary.ready |= primary;
        self.secondary.ready |= secondary;
        if notify {
            self.hear_notify()?;
        }
        Ok(())
    }

    /// How long there is nothing to do unless a socket becomes ready; `None` is for ever.
    fn sleep_us(&self) -> Option<u64> {
        let stuck = self.stuck_since_us.map(|_| TIME_STEP_US);
        if self.outlet.is_blocked() {
            return stuck;
        }
        if self.taken.is_some() || !self.has_caught_up() || self.has_work() {
            return Some(0);
        }
        let now_us = self.clock.now_us();
        let deadline_us = self.path.next_deadline();
        // Not before the next look, or it would spin until then.
        let at_us = deadline_us.map(|at_us| at_us.max(self.looked_at_us + TIME_STEP_US));
        let sleep_us = at_us.map(|at_us| at_us.saturating_sub(now_us).max(1));
        stuck.into_iter().chain(sleep_us).min()
    }

    /// Whether frames that found no room would find some now.
    fn has_work(&self) -> bool {
        let slots = |side| self.slab.free_slots(side) > 0;
        let held = self.path.held_frames() + 1 < self.limits.max_held_frames;
        let output = self.svm_unmatched() < self.limits.max_svm_frames as u64;
        (self.primary.backlog && held && slots(Side::Primary))
            || (self.secondary.backlog && output && slots(Side::Secondary))
    }

    fn hear_notify(&mut self) -> Result<(), SocketsError> {
        let Some(notify) = &mut self.notify else {
            return Ok(());
        };
        notify.flush();
        if notify.receive()? && self.taken.is_none() {
            self.taken = Some(0);
            (self.primary.ready, self.secondary.ready) = (true, true);
        }
        Ok(())
    }

    /// A checkpoint that is due and that nobody can take any more ends the run, unless it is
    /// ending already.
    fn check_notify(&mut self) -> Result<(), SocketsError> {
        let Some(notify) = self.notify.as_ref().filter(|notify| notify.is_gone()) else {
            return Ok(());
        };
        if !self.awaiting || self.taken.is_some() {
            return Ok(());
        }
        let now_us = self.clock.raw_us();
        let since_us = *self.stuck_since_us.get_or_insert(now_us);
        if now_us - since_us < LINGER_US {
            return Ok(());
        }
        Err(SocketsError::NotifyGone {
            socket: notify.socket().name.clone(),
        })
    }

    /// Both inputs have ended: what is still unmatched counts as if its deadline had passed.
    fn finish(mut self) -> Result<Summary, SocketsError> {
        let mut now_us = self.clock.now_us();
        let mut previous = None;
        while let Some(at_us) = self.path.next_deadline()
            && previous != Some(at_us)
        {
            previous = Some(at_us);
            now_us = now_us.max(at_us);
            self.path.handle_timeout(now_us, &mut self.slab);
            self.act(now_us)?;
        }
        self.await_last_checkpoint(now_us)?;
        self.write_the_rest()?;
        let stats = *self.path.stats();
        let summary = Summary {
            stats,
            held: self.path.held_frames() as u64,
            dropped: self.voided + self.svm_unmatched() + stats.svm_surplus,
            flows: self.path.flows() as u64 + stats.flows_evicted + stats.flows_expired,
            requests: self.requests,
            divergences: self.divergences,
            checkpoints: self.checkpoints,
        };
        self.path.close(&mut self.slab);
        Ok(summary)
    }

    fn await_last_checkpoint(&mut self, now_us: u64) -> Result<(), SocketsError> {
        let until_us = self.clock.raw_us() + LINGER_US;
        while self.awaiting
            && let Some(notify) = self.notify.as_mut().filter(|notify| !notify.is_gone())
            && let Some(left_us) = until_us.checked_sub(self.clock.raw_us())
        {
            if self.taken.take().is_none() {
                wait(&[notify_interest(notify)], Some(left_us)).map_err(SocketsError::Wait)?;
                notify.flush();
                if !notify.receive()? {
                    continue;
                }
            }
            self.commit(now_us)?;
            self.act(now_us)?;
        }
        Ok(())
    }

    fn write_the_rest(&mut self) -> Result<(), SocketsError> {
        loop {
            self.outlet.flush(&mut self.slab)?;
            if self.outlet.is_empty() {
                return Ok(());
            }
            let out = interest(self.outlet.socket(), false, true);
            wait(&[out], None).map_err(SocketsError::Wait)?;
        }
    }
}

fn interest(socket: &Socket, read: bool, write: bool) -> Option<Interest<'_>> {
    let fd = socket.file.as_fd();
    (read || write).then_some(Interest { fd, read, write })
}

fn notify_interest(notify: &Notify) -> Option<Interest<'_>> {
    let open = !notify.is_gone();
    interest(notify.socket(), open, open && notify.has_unsent())
}

fn log(divergence: &Divergence) {
    let Divergence {
        cause,
        flow,
        offset,
        primary,
        secondary,
    } = divergence;
    let flow = flow.map(|flow| flow.to_string()).unwrap_or_default();
    tracing::warn!(
        cause = cause.name(),
        flow,
        offset,
        %primary,
        %secondary,
        "diverged: a checkpoint is due"
    );
}
