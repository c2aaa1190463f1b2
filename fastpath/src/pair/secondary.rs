//! The secondary's role: mirrored input to the SVM, SVM output to the link.

use std::net::Shutdown;

use colo_bpf::Mac;
use colo_compare::{DigestKey, Frames, Limits, SecondaryAction, SecondaryPath, SecondaryStats};

use super::delayed::Delayed;
use super::{PairEvent, PrimaryRole, PrimaryRoleConfig, RESERVED_SLOTS};
use crate::clock::now_us;
use crate::link::{
    Digest, DigestWriter, Incoming, LinkStats, PacketLink, PacketLinkError, PacketMsg,
};
use crate::mailbox::Post;
use crate::nic::Filter;
use crate::worker::{BATCH, Delivery, Edge, Handed, Role};

/// How a secondary's role is set up.
#[derive(Debug)]
pub struct SecondaryRoleConfig {
    /// Sizes and deadlines.
    pub limits: Limits,
    /// The guest's address, for the announcements of a takeover.
    pub mac: Mac,
}

/// Counters of a secondary's role.
#[derive(Debug, Clone)]
pub struct SecondaryReport {
    /// The packet core's counters.
    pub stats: SecondaryStats,
    /// The packet channel's.
    pub link: LinkStats,
}

impl SecondaryReport {
    /// Of all shards together; `None` without any.
    pub fn sum(reports: Vec<Self>) -> Option<Self> {
        reports.into_iter().reduce(|mut sum, report| {
            sum.stats.add(&report.stats);
            sum.link.join(&report.link);
            sum
        })
    }
}

/// The secondary's role.
#[derive(Debug)]
pub struct SecondaryRole {
    /// Gone once it was turned into the primary's.
    path: Option<SecondaryPath>,
    link: Option<PacketLink>,
    digests: Digests,
    post: Post<PairEvent>,
    mac: Mac,
    /// The SVM stands still: its queues are not touched, the link is read on.
    stopped: bool,
    /// To be said as soon as other workers have delivered what they were handed.
    caught_up: Option<u64>,
    ack: InputAck,
    /// What is due for the SVM waits for room in its ring, whose refill wakes the worker.
    awaits_room: bool,
}

impl SecondaryRole {
    /// A role that follows the primary behind `link`.
    pub fn new(config: &SecondaryRoleConfig, link: PacketLink, post: Post<PairEvent>) -> Self {
        Self {
            path: Some(SecondaryPath::new(config.limits)),
            link: Some(link),
            digests: Digests::default(),
            post,
            mac: config.mac,
            stopped: true,
            caught_up: None,
            ack: InputAck::default(),
            awaits_room: false,
        }
    }

    /// The SVM has stopped for a checkpoint: its last output goes to the link.
    pub fn stop(&mut self, edge: &mut Edge) {
        self.take_rest(edge);
        // The last write to its memory: what comes later is in no dirty set and in no digest.
        edge.flush();
        self.caught_up = None;
        if let Some(path) = &mut self.path {
            path.stop();
        }
        self.stopped = true;
        self.act(edge, now_us());
    }

    /// Takes what a stopped SVM has in its queues. Gives how many frames that were: some may be another shard's.
    pub fn take_rest(&mut self, edge: &mut Edge) -> usize {
        let now_us = now_us();
        let (mut n, mut all) = (1, 0);
        while n > 0 {
            edge.look();
            n = self.take_output(edge, now_us);
            all += n;
        }
        all
    }

    /// The checkpoint failed: the SVM goes on where it stopped.
    pub fn resume_unchanged(&mut self) {
        if let Some(path) = &mut self.path {
            path.resume_unchanged();
        }
        self.stopped = false;
    }

    /// The SVM runs from the commit.
    pub fn start(&mut self) {
        self.stopped = false;
    }

    /// The SVM stands still at the commit (Remus mode); [`Self::resume_unchanged`] lets it go.
    pub fn halt(&mut self) {
        if let Some(path) = &mut self.path {
            path.stop();
        }
        self.stopped = true;
    }

    /// Asks the primary for a checkpoint.
    pub fn want_checkpoint(&mut self) {
        push(&mut self.link, &PacketMsg::CheckpointWanted);
    }

    /// Whether [`Self::commit`] will take this (rule 13).
    pub fn check(
        &self,
        edge: &Edge,
        pending: &[Vec<u8>],
        translations: &[u8],
    ) -> Result<(), String> {
        let path = self.path.as_ref().ok_or("this host has taken over")?;
        let (frames, max) = (pending.len(), path.max_pending());
        if frames > max {
            return Err(format!(
                "{frames} frames of pending output, this host keeps {max} at most; \
                 make host.frame_slots and replication.hold_frames the same on both"
            ));
        }
        let (bytes, max) = (
            pending.iter().map(Vec::len).max().unwrap_or(0),
            edge.frames.frame_bytes_max(),
        );
        if bytes > max {
            return Err(format!(
                "a frame of {bytes} bytes is longer than this host's slots hold, {max}; \
                 make net.mtu the same on both"
            ));
        }
        path.check_record(translations).map_err(|e| e.to_string())
    }

    /// The checkpoint of `epoch` is applied to the machine; the packet side follows.
    pub fn commit(
        &mut self,
        edge: &mut Edge,
        epoch: u64,
        pending: &[Vec<u8>],
        translations: &[u8],
    ) -> Result<(), String> {
        let path = self.path.as_mut().ok_or("this host has taken over")?;
        path.leave_epoch(&mut edge.frames, epoch);
        let mut tokens = Vec::with_capacity(pending.len());
        for frame in pending {
            tokens.push(
                edge.frames
                    .from_bytes(frame)
                    .ok_or("no slot for pending output")?,
            );
        }
        path.commit(now_us(), &mut edge.frames, epoch, tokens, translations)
            .map_err(|e| e.to_string())?;
        // What crossed before this epoch's end was an SVM's that is no more.
        edge.forget_crossed();
        self.act(edge, now_us());
        Ok(())
    }

    /// Lets go of the packet channel, what was received is kept.
    pub fn detach(&mut self, edge: &mut Edge) {
        if let Some(link) = self.link.take() {
            let _ = link.shutdown(Shutdown::Both);
            link.leave(&mut edge.frames);
        }
    }

    /// Hears what the dead primary still said to any shard. With several shards, on all of them before [`Self::take_over`]:
    /// what has come to one may belong to another.
    pub fn hear_rest(&mut self, edge: &mut Edge) {
        if let Some(link) = &mut self.link {
            link.read_all();
        }
        let now_us = now_us();
        loop {
            edge.look();
            if self.poll_link(edge, now_us) == 0 {
                return;
            }
        }
    }

    /// The SVM is the VM now: opens the NIC, announces the guest, sends what was not reported released and gives
    /// the role that goes on.
    pub fn take_over(
        &mut self,
        edge: &mut Edge,
        config: &PrimaryRoleConfig,
        post: Post<PairEvent>,
    ) -> Option<Box<PrimaryRole>> {
        let now_us = now_us();
        // What the dead primary still said counts: input to deliver, output that it had released.
        self.hear_rest(edge);
        self.detach(edge);
        let path = self.path.take()?;
        if let Err(e) = edge.set_filter(Filter::Guest(self.mac)) {
            tracing::error!("the NIC's filter cannot be opened, the guest hears nothing: {e}");
        }
        let path = path.take_over(now_us, &mut edge.frames);
        Some(Box::new(PrimaryRole::with_path(path, config, post)))
    }

    /// Counters.
    pub fn report(&self) -> SecondaryReport {
        SecondaryReport {
            stats: self.path.as_ref().map(|p| *p.stats()).unwrap_or_default(),
            link: self
                .link
                .as_ref()
                .map(PacketLink::stats)
                .unwrap_or_default(),
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
            Err(reason) => {
                self.link = Some(link);
                self.detach(edge);
                self.post.send(PairEvent::LinkDown { reason });
                1
            }
        }
    }

    fn drain_link(
        &mut self,
        link: &mut PacketLink,
        edge: &mut Edge,
        now_us: u64,
    ) -> Result<usize, String> {
        let Some(path) = &mut self.path else {
            return Ok(0);
        };
        let mut n = 0;
        let text = |e: PacketLinkError| e.to_string();
        edge.take_in(link);
        link.fill().map_err(text)?;
        // What comes may give slots back: reports, acknowledgements.
        while n < 4 * BATCH && edge.frames.free_slots() > 0 {
            let Some(incoming) = link.next(&mut edge.frames).map_err(text)? else {
                break;
            };
            n += 1;
            let msg = match incoming {
                Incoming::Msg(msg) => msg,
                Incoming::Input { epoch, seq, token } => {
                    path.handle_mirror(now_us, &mut edge.frames, epoch, seq, token)
                        .map_err(|e| e.to_string())?;
                    continue;
                }
                Incoming::Output { token, .. } => {
                    edge.release(token);
                    continue;
                }
            };
            match msg {
                PacketMsg::Released { seqs } => {
                    for seq in seqs.chunks_exact(8) {
                        let mut bytes = [0; 8];
                        bytes.copy_from_slice(seq);
                        path.handle_released(&mut edge.frames, u64::from_le_bytes(bytes));
                    }
                }
                PacketMsg::PendingReleased { epoch } => {
                    path.handle_pending_released(&mut edge.frames, epoch);
                }
                PacketMsg::DigestKey { key } => path.set_digests(DigestKey::new(key)),
                PacketMsg::Fetch { seq } => path.fetch(seq),
                _ => {}
            }
        }
        Ok(n)
    }

    fn deliver_input(&mut self, edge: &mut Edge, now_us: u64) -> usize {
        let Some(path) = &mut self.path else { return 0 };
        let mut n = 0;
        self.awaits_room = false;
        while n < BATCH {
            if !edge.guest_has_room() {
                self.awaits_room = true;
                break;
            }
            let Some(token) = path.poll_deliver(now_us, &mut edge.frames) else {
                break;
            };
            match edge.guest_deliver(token) {
                Handed::Now(Delivery::NoRoom, token) => {
                    path.undelivered(token);
                    self.awaits_room = true;
                    break;
                }
                Handed::Now(_, token) => edge.release(token),
                Handed::Later => {}
            }
            n += 1;
        }
        n
    }

    fn take_output(&mut self, edge: &mut Edge, now_us: u64) -> usize {
        let Some(path) = &mut self.path else { return 0 };
        let link_room = self.link.as_ref().is_none_or(PacketLink::has_room);
        let mut n = 0;
        while n < BATCH && link_room && path.room() && edge.frames.free_slots() > RESERVED_SLOTS {
            let Some(token) = edge.guest_take() else {
                break;
            };
            path.handle_guest_tx(now_us, &mut edge.frames, token);
            n += 1;
        }
        n
    }

    fn act(&mut self, edge: &mut Edge, now_us: u64) -> usize {
        let Some(path) = &mut self.path else { return 0 };
        let mut n = 0;
        if !edge.has_undelivered()
            && let Some(epoch) = self.caught_up.take()
        {
            self.ack.push(&mut self.link);
            push(&mut self.link, &PacketMsg::CaughtUp { epoch });
            n += 1;
        }
        // Whether something goes over the link that an acknowledgement can go with.
        let mut speaks = self.stopped;
        while let Some(action) = path.poll_action() {
            n += 1;
            match action {
                SecondaryAction::AckInput { up_to } => self.ack.note(now_us, up_to),
                SecondaryAction::SendDigest {
                    epoch,
                    svm_seq,
                    header_len,
                    payload_len,
                    digest,
                } => {
                    speaks = true;
                    self.ack.push(&mut self.link);
                    if let Some(token) = path.output(svm_seq) {
                        let header = &edge.frames.header(token)[..usize::from(header_len)];
                        let digest = Digest {
                            seq: svm_seq,
                            header,
                            payload_len,
                            digest,
                        };
                        self.digests.add(&mut self.link, epoch, &digest);
                    }
                }
                SecondaryAction::SendOutput { epoch, svm_seq } => {
                    speaks = true;
                    self.ack.push(&mut self.link);
                    self.digests.send(&mut self.link);
                    if let Some(token) = path.output(svm_seq) {
                        let frame = edge.frames.bytes(token);
                        push(
                            &mut self.link,
                            &PacketMsg::Output {
                                epoch,
                                seq: svm_seq,
                                frame,
                            },
                        );
                    }
                }
                // The other worker has not confirmed all of what came before (rule 9).
                SecondaryAction::CaughtUp { epoch } if edge.has_undelivered() => {
                    self.caught_up = Some(epoch);
                }
                SecondaryAction::CaughtUp { epoch } => {
                    self.digests.send(&mut self.link);
                    self.ack.push(&mut self.link);
                    push(&mut self.link, &PacketMsg::CaughtUp { epoch });
                }
                SecondaryAction::RequestCheckpoint(cause) => {
                    tracing::info!("a checkpoint is needed: {}", cause.name());
                    push(&mut self.link, &PacketMsg::CheckpointWanted);
                }
            }
        }
        self.digests.send(&mut self.link);
        if speaks || self.ack.delayed.is_due(now_us) {
            self.ack.push(&mut self.link);
        }
        if let Some(link) = &mut self.link {
            let flushed = link.flush();
            edge.hand_over(link);
            if let Err(e) = flushed {
                self.detach(edge);
                self.post.send(PairEvent::LinkDown {
                    reason: e.to_string(),
                });
            }
        }
        n
    }
}

/// The acknowledgement of mirrored input (rule 5): it goes with the SVM's next output, which the primary needs as
/// much, or by itself when that does not come.
#[derive(Debug, Default)]
struct InputAck {
    up_to: u64,
    pushed: u64,
    delayed: Delayed,
}

impl InputAck {
    fn note(&mut self, now_us: u64, up_to: u64) {
        self.up_to = up_to;
        self.delayed.note(now_us, up_to - self.pushed);
    }

    fn push(&mut self, link: &mut Option<PacketLink>) {
        self.delayed.clear();
        if self.up_to > self.pushed {
            self.pushed = self.up_to;
            push(link, &PacketMsg::InputAck { up_to: self.up_to });
        }
    }
}

/// Digests on their way to the link.
#[derive(Debug, Default)]
struct Digests {
    writer: DigestWriter,
}

impl Digests {
    fn add(&mut self, link: &mut Option<PacketLink>, epoch: u64, digest: &Digest<'_>) {
        if !self.writer.has_room(epoch) {
            self.send(link);
        }
        self.writer.push(epoch, digest);
    }

    /// What was collected goes before what is said next.
    fn send(&mut self, link: &mut Option<PacketLink>) {
        if let Some((epoch, entries)) = self.writer.collected() {
            push(link, &PacketMsg::Digests { epoch, entries });
            self.writer.clear();
        }
    }
}

fn push(link: &mut Option<PacketLink>, msg: &PacketMsg<'_>) {
    if let Some(link) = link {
        link.push(msg);
    }
}

impl Role for SecondaryRole {
    fn name(&self) -> &'static str {
        "secondary"
    }

    fn step(&mut self, edge: &mut Edge, now_us: u64) -> bool {
        let mut n = self.poll_link(edge, now_us);
        if !self.stopped {
            n += self.deliver_input(edge, now_us);
            n += self.take_output(edge, now_us);
        }
        n += self.act(edge, now_us);
        n > 0
    }

    fn absorb(&mut self, edge: &mut Edge, now_us: u64) {
        let Some(path) = &mut self.path else { return };
        while path.last_room_frames() > 0
            && let Some(token) = edge.guest_take_crossed()
        {
            path.handle_guest_tx(now_us, &mut edge.frames, token);
        }
    }

    fn deadline_us(&self) -> Option<u64> {
        let path = self.path.as_ref().filter(|_| !self.awaits_room);
        let path_us = path.and_then(SecondaryPath::next_deadline);
        let link_us = self.link.as_ref().and_then(PacketLink::deadline_us);
        [path_us, link_us, self.ack.delayed.due_us()]
            .into_iter()
            .flatten()
            .min()
    }

    fn wants_nic_frames(&self, _edge: &mut Edge) -> bool {
        false
    }

    fn wants_guest_frames(&self) -> bool {
        let link_room = self.link.as_ref().is_none_or(PacketLink::has_room);
        !self.stopped && link_room && self.path.as_ref().is_some_and(SecondaryPath::room)
    }

    fn serves_guest(&self) -> bool {
        !self.stopped
    }

    fn passes_on(&self) -> bool {
        true
    }

    fn shows_link(&self) -> bool {
        false
    }

    fn poll_fds(&self, fds: &mut Vec<libc::pollfd>) {
        if let Some(link) = &self.link {
            link.poll_fds(fds);
        }
    }

    fn leave(&mut self, edge: &mut Edge) {
        self.detach(edge);
        // None after a takeover: then the next role has it.
        if let Some(path) = &mut self.path {
            path.give_back(&mut edge.frames);
        }
    }
}
