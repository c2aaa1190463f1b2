//! The primary's role: input to the PVM and the mirror, PVM output through the comparator.
//!
//! What the control thread orders is in `orders`.

mod orders;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use colo_bpf::Mac;
use colo_compare::{
    ANNOUNCEMENT_MAX, Action, Limits, Policy, PrimaryPath, PrimaryStats, Right, Token,
};
use hdrhistogram::Histogram;

use super::answers::{Answers, Lateness};
use super::hold::HoldWatch;
use super::reports::Reports;
use super::{Lease, PairEvent, RESERVED_SLOTS};
use crate::clock::now_us;
use crate::hint::use_huge_pages;
use crate::link::{
    DIGEST_MIN, DIGESTS_MAX, Digest, DigestReader, Incoming, LinkStats, PacketLink,
    PacketLinkError, PacketMsg,
};
use crate::mailbox::Post;
use crate::worker::{BATCH, Delivery, Edge, Handed, Role};

/// Longest time recorded.
const HOLD_MAX_US: u64 = 600_000_000;
/// Slots that one message of digests may take.
const DIGESTS_PER_MSG: usize = DIGESTS_MAX / DIGEST_MIN;

/// How a primary's role is set up.
#[derive(Debug)]
pub struct PrimaryRoleConfig {
    /// Sizes and deadlines.
    pub limits: Limits,
    /// Rules for single flows.
    pub policy: Policy,
    /// Standing still for longer than this mutes the role while it has a secondary (rule 18).
    pub gap_limit_us: u64,
    /// Slots of the worker's frame pool.
    pub frame_slots: u32,
    /// How often a thread of this VM has stood still; its shards count together.
    pub gaps: Arc<AtomicU64>,
    /// Until when what needs no word of the secondary may leave.
    pub lease: Lease,
    /// How late the SVM's answers are.
    pub answers: Answers,
    /// With a key the secondary sends digests in the place of long payloads; not all zeros.
    pub digest_key: Option<[u8; 16]>,
}

/// What the packet side contributes to a checkpoint (rule 12).
#[derive(Debug)]
pub struct CutState {
    /// The epoch that ended.
    pub epoch: u64,
    /// Undecided output in order of production.
    pub pending: Vec<Vec<u8>>,
    /// The client-facing translations.
    pub translations: Vec<u8>,
}

/// Counters and times of a primary's role.
#[derive(Debug, Clone)]
pub struct PrimaryReport {
    /// The packet core's counters.
    pub stats: PrimaryStats,
    /// Output produced to released, in microseconds.
    pub hold_us: Histogram<u64>,
    /// The packet channel's, all secondaries together.
    pub link: LinkStats,
}

impl PrimaryReport {
    /// Of all shards together; `None` without any.
    pub fn sum(reports: Vec<Self>) -> Option<Self> {
        reports.into_iter().reduce(|mut sum, report| {
            sum.stats.add(&report.stats);
            sum.link.join(&report.link);
            // Their bounds are equal.
            let _ = sum.hold_us.add(&report.hold_us);
            sum
        })
    }
}

/// The primary's role.
#[derive(Debug)]
pub struct PrimaryRole {
    path: PrimaryPath,
    link: Option<PacketLink>,
    post: Post<PairEvent>,
    unsent: VecDeque<Token>,
    /// Frames of one look at a ring, and at the link with their epochs and numbers.
    batch: Vec<Token>,
    output_batch: Vec<(u64, u64, Token)>,
    hold_us: Histogram<u64>,
    /// Of what was released since the last commit began to release.
    longest_hold_us: u64,
    hold: HoldWatch,
    lateness: Lateness,
    reports: Reports,
    digest_key: Option<[u8; 16]>,
    digests: DigestReader,
    gap_limit_us: u64,
    awake_us: u64,
    gaps: Arc<AtomicU64>,
    lease: Lease,
    /// As the path was told last.
    lease_until_us: u64,
    mirrors: bool,
    muted: bool,
    /// A checkpoint was asked for and is not committed: what is undecided lies in copies.
    diverging: bool,
    /// Input that an earlier life of this VM owes to the guest waits for room, whose coming wakes the worker.
    awaits_room: bool,
    past_link: LinkStats,
}

impl PrimaryRole {
    /// A role without a secondary, in a new VM.
    pub fn new(config: &PrimaryRoleConfig, mac: Mac, post: Post<PairEvent>) -> Self {
        let mut path = PrimaryPath::new(config.limits);
        path.set_guest_mac(mac);
        Self::with_path(path, config, post)
    }

    /// Goes on with a path that was inherited.
    pub(super) fn with_path(
        mut path: PrimaryPath,
        config: &PrimaryRoleConfig,
        post: Post<PairEvent>,
    ) -> Self {
        if let Err(e) = path.set_policy(config.policy.clone()) {
            // Neither a new path nor one of a takeover has a secondary.
            tracing::error!("{e}");
        }
        use_huge_pages(&path);
        let hold_us = Histogram::new_with_bounds(1, HOLD_MAX_US, 3);
        Self {
            path,
            link: None,
            post,
            unsent: VecDeque::with_capacity(config.frame_slots as usize),
            batch: Vec::with_capacity(BATCH),
            output_batch: Vec::with_capacity(BATCH),
            hold_us: hold_us.expect("constant bounds"),
            longest_hold_us: 0,
            hold: HoldWatch::new(config.limits.max_held_frames),
            lateness: Lateness::new(config.answers.clone()),
            reports: Reports::new(config.frame_slots as usize),
            digest_key: config.digest_key,
            digests: DigestReader::default(),
            gap_limit_us: config.gap_limit_us,
            awake_us: now_us(),
            gaps: config.gaps.clone(),
            lease: config.lease.clone(),
            lease_until_us: 0,
            mirrors: false,
            muted: false,
            diverging: false,
            awaits_room: false,
            past_link: LinkStats::default(),
        }
    }

    fn heed_and_act(&mut self, edge: &mut Edge) {
        self.heed_lease(edge, now_us());
        self.act(edge);
    }

    fn heed_lease(&mut self, edge: &mut Edge, now_us: u64) {
        let until_us = self.lease.until_us();
        if until_us != self.lease_until_us {
            self.lease_until_us = until_us;
            self.path.set_lease(now_us, &mut edge.frames, until_us);
        }
    }

    fn poll_link(&mut self, edge: &mut Edge, now_us: u64) -> usize {
        let Some(mut link) = self.link.take() else {
            return 0;
        };
        match self.drain_link(&mut link, edge, now_us) {
            Ok(n) => {
                self.link = Some(link);
                n
            }
            Err(e) => {
                self.link = Some(link);
                self.detach(edge);
                self.post.send(PairEvent::LinkDown {
                    reason: e.to_string(),
                });
                1
            }
        }
    }

    fn drain_link(
        &mut self,
        link: &mut PacketLink,
        edge: &mut Edge,
        now_us: u64,
    ) -> Result<usize, PacketLinkError> {
        edge.take_in(link);
        link.fill()?;
        let read = self.read_link(link, edge, now_us);
        self.compare_batch(edge, now_us);
        read
    }

    fn read_link(
        &mut self,
        link: &mut PacketLink,
        edge: &mut Edge,
        now_us: u64,
    ) -> Result<usize, PacketLinkError> {
        let mut n = 0;
        while n < 4 * BATCH && edge.frames.free_slots() > DIGESTS_PER_MSG {
            let Some(incoming) = link.next(&mut edge.frames)? else {
                break;
            };
            n += 1;
            let msg = match incoming {
                Incoming::Msg(msg) => msg,
                Incoming::Output { epoch, seq, token } => {
                    self.output_batch.push((epoch, seq, token));
                    if self.output_batch.len() == BATCH {
                        self.compare_batch(edge, now_us);
                    }
                    continue;
                }
                Incoming::Input { token, .. } => {
                    edge.release(token);
                    continue;
                }
            };
            // Messages keep their order.
            self.compare_batch(edge, now_us);
            match msg {
                PacketMsg::InputAck { up_to } => {
                    self.path.handle_input_ack(now_us, &mut edge.frames, up_to);
                }
                PacketMsg::CaughtUp { epoch } => {
                    self.path.caught_up(now_us, epoch);
                    self.lateness.caught_up(now_us);
                }
                PacketMsg::CheckpointWanted => self.post.send(PairEvent::PeerWantsCheckpoint),
                PacketMsg::Digests { epoch, entries } => {
                    let (path, frames) = (&mut self.path, &mut edge.frames);
                    let take = |d: &Digest<'_>| {
                        if let Some(token) = frames.from_bytes(d.header) {
                            let (len, digest) = (d.payload_len, d.digest);
                            path.handle_svm_digest(
                                now_us, frames, epoch, d.seq, token, len, digest,
                            );
                        }
                    };
                    self.digests.read(entries, take)?;
                }
                PacketMsg::Output { .. }
                | PacketMsg::Input { .. }
                | PacketMsg::Released { .. }
                | PacketMsg::PendingReleased { .. }
                | PacketMsg::DigestKey { .. }
                | PacketMsg::Fetch { .. } => {}
            }
        }
        Ok(n)
    }

    fn compare_batch(&mut self, edge: &mut Edge, now_us: u64) {
        let tokens = self.output_batch.iter().map(|(_, _, token)| token);
        self.path.expect(&edge.frames, tokens);
        for (epoch, seq, token) in self.output_batch.drain(..) {
            self.path
                .handle_svm_output(now_us, &mut edge.frames, epoch, seq, token);
        }
    }

    fn take_output(&mut self, edge: &mut Edge, now_us: u64) -> usize {
        let mut n = 0;
        // What is taken must find room, however much of it has to wait.
        let room = self.path.room_frames().min(BATCH);
        while n < room && edge.frames.free_slots() > RESERVED_SLOTS {
            let token = match self.diverging {
                true => edge.guest_take(),
                false => edge.guest_take_in_place(),
            };
            let Some(token) = token else {
                break;
            };
            self.batch.push(token);
            n += 1;
        }
        edge.at_comparator(&self.batch);
        self.path.expect(&edge.frames, self.batch.iter());
        for token in self.batch.drain(..) {
            self.path.handle_guest_tx(now_us, &mut edge.frames, token);
        }
        n
    }

    fn takes_input(&self, edge: &mut Edge) -> bool {
        self.path.nic_room()
            && self.link.as_ref().is_none_or(PacketLink::has_room)
            && edge.frames.free_slots() > RESERVED_SLOTS
            && edge.guest_has_room()
    }

    fn take_input(&mut self, edge: &mut Edge, now_us: u64) -> usize {
        let mut n = 0;
        self.awaits_room = false;
        while n < BATCH {
            if !self.takes_input(edge) {
                self.awaits_room = true;
                break;
            }
            // What an earlier life of this VM owes to the guest comes first (rule 5).
            if let Some(token) = self.path.poll_deliver(now_us, &mut edge.frames) {
                match edge.guest_deliver(token) {
                    Handed::Now(Delivery::NoRoom, token) => {
                        self.path.undelivered(token);
                        self.awaits_room = true;
                        break;
                    }
                    Handed::Now(delivery, token) => self.delivered(edge, now_us, delivery, token),
                    Handed::Later => {}
                }
                n += 1;
                continue;
            }
            let Some(token) = edge.nic_receive() else {
                break;
            };
            let token = self.path.handle_nic(now_us, &mut edge.frames, token);
            if let Handed::Now(delivery, token) = edge.guest_deliver(token) {
                self.delivered(edge, now_us, delivery, token);
            }
            n += 1;
        }
        n
    }

    fn act(&mut self, edge: &mut Edge) -> usize {
        self.act_at(edge, now_us())
    }

    /// Does what the core decided.
    fn act_at(&mut self, edge: &mut Edge, now_us: u64) -> usize {
        let mut n = 0;
        // Whether something goes over the link that a report can go with.
        let mut speaks = false;
        while let Some(action) = self.path.poll_action() {
            n += 1;
            match action {
                Action::Release {
                    token,
                    held_us,
                    right,
                } => {
                    if right == Right::Match {
                        self.lateness.matched(now_us, held_us);
                    }
                    self.hold_us.saturating_record(held_us.max(1));
                    self.longest_hold_us = self.longest_hold_us.max(held_us);
                    edge.may_leave(&token);
                    self.queue_for_nic(token);
                }
                Action::Mirror {
                    epoch,
                    input_seq,
                    token,
                } => {
                    // Without `mirrors` the secondary is not there yet: the synchronisation brings it.
                    if let Some(link) = self.link.as_mut().filter(|_| self.mirrors) {
                        speaks = true;
                        let frame = edge.frames.bytes(&token);
                        link.push(&PacketMsg::Input {
                            epoch,
                            seq: input_seq,
                            frame,
                        });
                    }
                    edge.release(token);
                }
                Action::SvmReleased { svm_seq } => {
                    self.reports.note(svm_seq);
                }
                Action::PendingReleased { epoch } => self.reports.note_pending(epoch),
                Action::Fetch { svm_seq } => {
                    if let Some(link) = &mut self.link {
                        speaks = true;
                        link.push(&PacketMsg::Fetch { seq: svm_seq });
                    }
                }
                Action::Checkpoint(divergence) => {
                    self.diverging = true;
                    edge.settle_all();
                    self.post.send(PairEvent::CheckpointWanted(divergence));
                }
            }
        }
        n += self.announcements(edge);
        self.send_released(edge);
        self.lateness.tell();
        self.reports.send(now_us, speaks, self.link.as_mut());
        self.flush_link(edge);
        n
    }

    fn announcements(&mut self, edge: &mut Edge) -> usize {
        let mut n = 0;
        let mut frame = [0; ANNOUNCEMENT_MAX];
        while edge.frames.free_slots() > 0
            && let Some(len) = self.path.poll_announcement(now_us(), &mut frame)
        {
            if let Some(token) = edge.frames.from_bytes(&frame[..len]) {
                self.queue_for_nic(token);
            }
            n += 1;
        }
        n
    }

    /// Sends what was released. The clock is looked at before each frame: a process that was stopped in the
    /// middle of a batch must not finish it.
    fn send_released(&mut self, edge: &mut Edge) {
        while let Some(token) = self.unsent.pop_front() {
            self.watch_clock(now_us());
            let kept = match self.muted {
                true => Err(token),
                false => edge.nic_send(token),
            };
            if let Err(token) = kept {
                self.unsent.push_front(token);
                break;
            }
            self.reports.frame_left();
        }
    }

    fn queue_for_nic(&mut self, token: Token) {
        self.reports.frame_released();
        self.unsent.push_back(token);
    }

    fn watch_clock(&mut self, now_us: u64) {
        let gap_us = now_us.saturating_sub(self.awake_us);
        if self.link.is_some() && gap_us > self.gap_limit_us {
            self.awake_us = now_us;
            self.mute();
            let gaps = self.gaps.fetch_add(1, Ordering::SeqCst) + 1;
            self.post.send(PairEvent::ClockGap { gap_us, gaps });
        }
    }

    fn flush_link(&mut self, edge: &mut Edge) {
        let Some(link) = &mut self.link else { return };
        let flushed = link.flush();
        edge.hand_over(link);
        if let Err(e) = flushed {
            self.detach(edge);
            self.post.send(PairEvent::LinkDown {
                reason: e.to_string(),
            });
        }
    }
}

impl Role for PrimaryRole {
    fn name(&self) -> &'static str {
        "primary"
    }

    fn step(&mut self, edge: &mut Edge, now_us: u64) -> bool {
        self.heed_lease(edge, now_us);
        let mut n = self.poll_link(edge, now_us);
        n += self.take_output(edge, now_us);
        n += self.take_input(edge, now_us);
        if self.path.next_timeout().is_some_and(|at| at <= now_us) {
            self.path.handle_timeout(now_us, &mut edge.frames);
        }
        n += self.act_at(edge, now_us);
        if let Some(is_full) = self.hold.look(now_us, self.path.room_frames()) {
            self.post.send(PairEvent::HoldFull(is_full));
        }
        n > 0
    }

    fn delivered(&mut self, edge: &mut Edge, now_us: u64, delivery: Delivery, token: Token) {
        match delivery {
            Delivery::Done => self.path.handle_delivered(now_us, &mut edge.frames, token),
            // Lost as on a wire, and not mirrored (rule 4).
            Delivery::NoRoom | Delivery::TooSmall => edge.release(token),
        }
    }

    fn absorb(&mut self, edge: &mut Edge, now_us: u64) {
        while self.path.last_room_frames() > 0
            && let Some(token) = edge.guest_take_crossed()
        {
            self.path.handle_guest_tx(now_us, &mut edge.frames, token);
        }
    }

    fn awake(&mut self, now_us: u64) {
        self.watch_clock(now_us);
        self.awake_us = now_us;
    }

    fn watch_us(&self) -> Option<u64> {
        // With a secondary, waking in time is itself what proves that this thread has not stood still.
        let next_us = self.awake_us + self.gap_limit_us / 4;
        self.link.is_some().then_some(next_us)
    }

    fn deadline_us(&self) -> Option<u64> {
        let link_us = self.link.as_ref().and_then(PacketLink::deadline_us);
        let hold_us = self.hold.deadline_us();
        let path_us = match self.awaits_room {
            true => self.path.next_timeout(),
            false => self.path.next_deadline(),
        };
        [path_us, link_us, hold_us, self.reports.due_us()]
            .into_iter()
            .flatten()
            .min()
    }

    fn wants_guest_frames(&self) -> bool {
        self.path.room()
    }

    fn wants_nic_frames(&self, edge: &mut Edge) -> bool {
        self.takes_input(edge)
    }

    fn passes_on(&self) -> bool {
        self.link.is_some()
    }

    fn poll_fds(&self, fds: &mut Vec<libc::pollfd>) {
        if let Some(link) = &self.link {
            link.poll_fds(fds);
        }
    }

    fn leave(&mut self, edge: &mut Edge) {
        self.detach(edge);
        self.path.give_back(&mut edge.frames);
        for token in self.unsent.drain(..) {
            edge.release(token);
        }
    }
}
