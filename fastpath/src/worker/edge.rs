//! What a role works with: frames, the NIC on one side, the guest on the other.
//!
//! Invariants: a frame between the two is always a token of the pool; when the pool is empty,
//! frames stay where they are (NIC queue, guest ring).
//!
//! Does not decide what goes where; the role does.

mod crossing;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

use colo_compare::{Frames, Token};

use crate::clock::{now_ns, now_us};
use crate::frame::{Buffer, CopyCause, FramePool, LINK_HEADER_MAX};
use crate::link::PacketLink;
use crate::nic::{Filter, LinkShare, Nic, Sent};
use crate::ring::QUEUE_SIZE_MAX;
use crate::shard::Seat;
use crate::stages::{Stage, Stages};
use crate::stats::WorkerStats;
use crate::vhost_user::GuestRings;

use super::front::Front;
use super::port::{Delivery, GuestPort, PortState, Stays};
use super::role::BATCH;

use crossing::Crossing;

/// How long a NIC may take for what it was given, before the guest gets its memory back all the same.
const NIC_PATIENCE_US: u64 = 20_000;

/// What became of a frame that was handed over for the guest.
#[derive(Debug)]
#[must_use = "the token is the caller's again"]
pub enum Handed {
    /// Known at once. The token is the caller's.
    Now(Delivery, Token),
    /// Another worker serves the guest's queue: [`Edge::poll_delivered`] gives the token back when the
    /// frame is in the guest's memory.
    Later,
}

/// A NIC in a report.
#[derive(Clone, Debug, serde::Serialize)]
pub struct NicReport {
    /// How it works.
    pub carrier: String,
    /// What it and the kernel below it have counted.
    #[serde(flatten)]
    pub counters: BTreeMap<&'static str, u64>,
}

impl NicReport {
    /// Adds what another shard's end of the NIC has counted.
    pub fn add(&mut self, other: &Self) {
        for (name, count) in &other.counters {
            *self.counters.entry(name).or_default() += count;
        }
    }
}

/// Everything the worker owns besides its role.
pub struct Edge {
    /// The frames of this worker.
    pub frames: FramePool,
    nic: Box<dyn Nic>,
    nic_blocked: bool,
    /// Frames from the NIC that no role has taken yet.
    received: VecDeque<Token>,
    pub(super) port: GuestPort,
    returned: Vec<Buffer>,
    /// With several shards.
    crossing: Option<Box<Crossing>>,
    stages: Option<Box<Stages>>,
    /// Another worker shows the guest the NIC's link.
    hides_link: bool,
    stats: Arc<WorkerStats>,
}

impl Edge {
    pub(super) fn new(
        frames: FramePool,
        nic: Box<dyn Nic>,
        port: GuestPort,
        stages: Option<Box<Stages>>,
        stats: Arc<WorkerStats>,
    ) -> Self {
        let mut port = port;
        port.set_frame_max(usize::from(nic.mtu()) + LINK_HEADER_MAX);
        Self {
            frames,
            nic,
            nic_blocked: false,
            received: VecDeque::with_capacity(BATCH),
            port,
            returned: Vec::with_capacity(usize::from(QUEUE_SIZE_MAX)),
            crossing: None,
            stages,
            hides_link: false,
            stats,
        }
    }

    /// Makes it one of several.
    pub(super) fn sit_down(&mut self, seat: Seat) {
        self.crossing = Some(Box::new(Crossing::new(seat)));
    }

    /// The next frame of this shard from the NIC, if there is one and a slot for it. Those of other
    /// shards go to their owners.
    pub fn nic_receive(&mut self) -> Option<Token> {
        match self.crossing {
            None => self.receive_any(),
            Some(_) => self.receive_of_shard(),
        }
    }

    fn receive_any(&mut self) -> Option<Token> {
        let frame_max = self.frame_max();
        loop {
            if self.received.is_empty() {
                self.fetch();
            }
            let token = self.received.pop_front()?;
            if let Some(next) = self.received.front() {
                self.frames.fetch(next);
            }
            if self.frames.len(&token) <= frame_max {
                self.stats.nic_rx_frames.add(1);
                return Some(token);
            }
            self.stats.nic_rx_oversize.add(1);
            self.frames.release(token);
        }
    }

    fn fetch(&mut self) {
        if self.frames.free_slots() == 0 {
            self.stats.frames_exhausted.add(1);
            return;
        }
        let got = self
            .nic
            .receive(&mut self.frames, &mut self.received, BATCH);
        if got.is_err() {
            self.stats.nic_rx_errors.add(1);
        }
        if self.stages.is_some() {
            let now_ns = now_ns();
            for token in &self.received {
                self.frames.stamp(token, now_ns);
            }
        }
    }

    /// Sends a frame. An error gives the token back: the NIC has no room, try again later.
    pub fn nic_send(&mut self, token: Token) -> Result<(), Token> {
        let in_place_bytes = self.frames.in_place_bytes(&token) as u64;
        let gathered_bytes = self.stats.copied_gathered_bytes.get();
        let since_ns = self.frames.stamped_ns(&token);
        self.frames.set_with_nic(&token, true);
        match self.nic.send(&mut self.frames, token) {
            Sent::Done => {
                self.stats.nic_tx_frames.add(1);
                // A NIC that takes frames in one piece has copied it after all.
                let gathered_bytes = self.stats.copied_gathered_bytes.get() - gathered_bytes;
                let in_place_bytes = in_place_bytes.saturating_sub(gathered_bytes);
                self.stats.tx_in_place_bytes.add(in_place_bytes);
                self.record(Stage::CompareToNic, since_ns);
            }
            Sent::Full(token) => {
                self.stats.nic_tx_blocked.add(1);
                self.nic_blocked = true;
                self.frames.set_with_nic(&token, false);
                return Err(token);
            }
            Sent::Refused(_) => self.stats.nic_tx_errors.add(1),
        }
        Ok(())
    }

    fn frame_max(&self) -> usize {
        usize::from(self.nic.mtu()) + LINK_HEADER_MAX
    }

    /// Lets the link's packet channel use the NIC, too; `None`: it is not `interface`, or it cannot be shared.
    pub fn share_nic(&mut self, interface: &str) -> Option<io::Result<LinkShare>> {
        self.nic.share_link(&mut self.frames, interface)
    }

    /// What has come by the NIC for the packet channel goes there. Before each [`PacketLink::fill`].
    pub fn take_in(&mut self, link: &mut PacketLink) {
        link.take_in(&mut *self.nic, &mut self.frames);
        self.cross_link(link);
    }

    /// What the packet channel says by the NIC leaves. After each [`PacketLink::flush`].
    pub fn hand_over(&mut self, link: &mut PacketLink) {
        if !link.has_written() {
            return;
        }
        self.nic_blocked |= link.hand_over(&mut *self.nic, &mut self.frames);
        if self.nic.flush(&mut self.frames).is_err() {
            self.stats.nic_tx_errors.add(1);
        }
        link.flush_stream();
    }

    /// Whether the guest has a receive buffer for a frame of this shard, or whoever delivers it has
    /// room for it.
    pub fn guest_has_room(&mut self) -> bool {
        match self.crossing {
            None => self.port.has_room(),
            Some(_) => self.guest_has_room_for_shard(),
        }
    }

    /// Whether the guest has something to send.
    pub fn guest_has_output(&mut self) -> bool {
        self.port.has_output()
    }

    /// Whether a driver is there.
    pub fn guest_is_active(&self) -> bool {
        self.port.is_active()
    }

    /// Puts a frame into the guest's receive queue, or has it put there by the worker that serves the
    /// queue.
    pub fn guest_deliver(&mut self, token: Token) -> Handed {
        match self.crossing {
            None => self.deliver_here(token),
            Some(_) => self.deliver_for_shard(token),
        }
    }

    fn deliver_here(&mut self, token: Token) -> Handed {
        let delivery = self.port.deliver(self.frames.bytes(&token));
        if delivery == Delivery::Done {
            self.record(Stage::NicToGuest, self.frames.stamped_ns(&token));
        }
        Handed::Now(delivery, token)
    }

    /// The comparator is about to get these.
    pub fn at_comparator(&mut self, batch: &[Token]) {
        if self.stages.is_some() {
            for token in batch {
                self.record(Stage::GuestToCompare, self.frames.stamped_ns(token));
            }
        }
    }

    /// The frame may leave.
    pub fn may_leave(&mut self, token: &Token) {
        if self.stages.is_some() {
            self.record(Stage::Hold, self.frames.stamped_ns(token));
            self.frames.stamp(token, now_ns());
        }
    }

    /// The times of the stages, if they are taken.
    pub fn stages(&self) -> Option<&Stages> {
        self.stages.as_deref()
    }

    #[inline]
    fn record(&mut self, stage: Stage, since_ns: u64) {
        if let Some(stages) = &mut self.stages
            && since_ns != 0
        {
            stages.record(stage, now_ns().saturating_sub(since_ns));
        }
    }

    /// The next frame of this shard from the guest, if there is one and a slot for it, as a copy: its
    /// buffer is the guest's again. Those of other shards go to their owners.
    pub fn guest_take(&mut self) -> Option<Token> {
        self.take(Stays::Nothing(CopyCause::Role))
    }

    /// The next frame of this shard from the guest; a long one stays where it is until it is released, or
    /// settled.
    pub fn guest_take_in_place(&mut self) -> Option<Token> {
        self.take_unless_pressed(Stays::Payload)
    }

    /// The next frame of this shard from the guest, for a role that neither looks at it nor changes it: a long
    /// one that lies in one piece stays where it is with its header ([`FramePool::keep_whole`]).
    pub fn guest_take_unseen(&mut self) -> Option<Token> {
        self.take_unless_pressed(Stays::Whole)
    }

    fn take_unless_pressed(&mut self, stays: Stays) -> Option<Token> {
        match self.frames.descriptors_in_place() < self.port.in_place_max() {
            true => self.take(stays),
            false => self.take(Stays::Nothing(CopyCause::Pressure)),
        }
    }

    fn take(&mut self, stays: Stays) -> Option<Token> {
        match self.crossing {
            None => self.take_any(stays),
            Some(_) => self.take_of_shard(stays),
        }
    }

    fn take_any(&mut self, stays: Stays) -> Option<Token> {
        if !self.port.has_output() {
            return None;
        }
        let frame_max = self.frame_max();
        if self.frames.free_slots() == 0 {
            self.stats.frames_exhausted.add(1);
            return None;
        }
        let token = self.port.take(&mut self.frames, frame_max, stays)?;
        if self.stages.is_some() {
            self.frames.stamp(&token, now_ns());
        }
        Some(token)
    }

    /// The frames at the front of the guest's transmit queue, and the slots for them. `None` when nothing
    /// waits, with several shards, and while the times of stages are taken: then frames are taken one by one.
    #[inline]
    pub(crate) fn guest_front(&mut self) -> Option<(Front<'_>, &mut FramePool)> {
        if self.crossing.is_some() || self.stages.is_some() {
            return None;
        }
        let frame_max = self.frame_max().min(self.frames.frame_bytes_max());
        let front = self.port.front(frame_max)?;
        Some((front, &mut self.frames))
    }

    /// Copies every frame that still lies in the guest and that the NIC has not got: what is undecided must not hold
    /// the guest's buffers (rule 12).
    pub fn settle_all(&mut self) {
        self.frames.settle_all(CopyCause::Undecided);
    }

    /// Gives a slot back.
    pub fn release(&mut self, token: Token) {
        self.frames.release(token);
    }

    /// Replaces the NIC's filter.
    pub fn set_filter(&mut self, filter: Filter) -> io::Result<()> {
        self.nic.set_filter(filter)
    }

    /// How the NIC works, and what it has counted.
    pub fn nic_report(&self) -> NicReport {
        NicReport {
            carrier: self.nic.describe(),
            counters: self.nic.counters().into_iter().collect(),
        }
    }

    /// The worker's counters.
    pub fn stats(&self) -> &WorkerStats {
        &self.stats
    }

    /// Ends a batch: the NIC is told, the guest gets its buffers back and is called.
    pub(crate) fn flush(&mut self) {
        if self.nic.flush(&mut self.frames).is_err() {
            self.stats.nic_tx_errors.add(1);
        }
        self.return_buffers();
        self.port.flush();
        self.ring_others();
    }

    /// No buffer of the guest is in use, and both queues say so (rule 12).
    pub(super) fn quiesce(&mut self) -> Option<PortState> {
        self.leave_guest_buffers();
        self.port.state()
    }

    /// Forgets the guest's queues. Frames that lay in its buffers are kept as copies.
    pub(super) fn deactivate(&mut self) {
        self.leave_guest_buffers();
        self.port.deactivate();
    }

    /// Takes what is undecided out of the guest's buffers, and waits for the NIC to be done with what it was given, but
    /// not for one that does not go on: then the guest can change what has not left.
    fn leave_guest_buffers(&mut self) {
        self.settle_all();
        self.flush();
        let until_us = now_us() + NIC_PATIENCE_US;
        while self.frames.is_read_in_place() && now_us() < until_us {
            std::thread::yield_now();
            self.flush();
        }
        let unsent = self.frames.settle_unsent(CopyCause::Undecided);
        if unsent > 0 {
            self.stats.nic_tx_exposed.add(unsent);
            self.flush();
        }
    }

    /// Connects a guest that brings its own memory.
    pub fn attach_guest(&mut self, rings: GuestRings) {
        self.detach_guest();
        self.frames.set_guest(rings.ram.clone());
        self.port.attach(rings);
    }

    /// Lets go of such a guest. Frames that lay in its buffers are kept as copies. Gives how far
    /// its queues had come, if they were in service.
    pub fn detach_guest(&mut self) -> Option<PortState> {
        self.leave_guest_buffers();
        self.frames.forget_guest();
        self.port.detach()
    }

    /// Shows the guest whether the NIC has a link.
    pub(super) fn show_link(&mut self) {
        if !self.hides_link {
            self.port.show_link(self.nic.has_link());
        }
    }

    /// Leaves it to another worker to show the guest the link of the NIC, of which both have an end.
    pub fn hide_link(&mut self) {
        self.hides_link = true;
    }

    fn return_buffers(&mut self) {
        self.frames.take_returned(&mut self.returned);
        self.port.complete(&self.returned);
        self.returned.clear();
    }

    pub(super) fn poll_fds(&mut self, wants_frames: bool, fds: &mut Vec<libc::pollfd>) {
        let wants_room = std::mem::take(&mut self.nic_blocked);
        self.nic.poll_fds(wants_frames, wants_room, fds);
    }
}
