//! Both paths in one process, with a model guest (a TCP echo server whose sequence numbers and
//! timestamps are its own) and model clients that check every byte and number they see.
//!
//! Ports with odd numbers speak IPv6, even ones IPv4.
#![allow(dead_code)] // Each test binary uses a part.

mod client;
mod guest;

use std::collections::{BTreeMap, VecDeque};

use colo_compare::testing::{Side, VecFrames, digest_key};
use colo_compare::wire::tcp::{ACK, FIN, Tcp};
use colo_compare::{
    Action, Direction, Divergence, Frames, Limits, Pending, PrimaryPath, SecondaryAction,
    SecondaryPath, Token, wire,
};

use client::Client;
use guest::Guest;

pub fn side(port: u16) -> Side {
    if port % 2 == 1 { Side::V6 } else { Side::V4 }
}

pub fn tcp_of(bytes: &[u8]) -> Option<Tcp> {
    wire::parse(bytes, bytes.len(), Direction::FromGuest).tcp
}

fn port_of(bytes: &[u8], direction: Direction) -> u16 {
    wire::parse(bytes, bytes.len(), direction).key.peer_port()
}

pub fn payload(bytes: &[u8], tcp: &Tcp) -> Vec<u8> {
    bytes[usize::from(tcp.payload_at)..][..usize::from(tcp.payload_len)].to_vec()
}

/// A checkpoint on its way.
pub struct Snapshot {
    pub epoch: u64,
    guest: Guest,
    record: Vec<u8>,
    pending: Vec<Vec<u8>>,
}

/// The whole.
pub struct Rig {
    pub frames: VecFrames,
    pub now_us: u64,
    pub primary: PrimaryPath,
    pub secondary: Option<SecondaryPath>,
    pub pvm: Guest,
    pub svm: Option<Guest>,
    pub clients: BTreeMap<u16, Client>,
    /// Frames on their way from the primary host to the clients.
    pub nic: VecDeque<Vec<u8>>,
    /// Clients see nothing and say nothing while false.
    pub network_up: bool,
    pub requests: Vec<Divergence>,
    limits: Limits,
}

impl Rig {
    pub fn new(limits: Limits) -> Self {
        Self {
            frames: VecFrames::new(100_000),
            now_us: 1_000_000,
            primary: PrimaryPath::new(limits),
            secondary: None,
            pvm: Guest::new(u32::MAX - 2),
            svm: None,
            clients: BTreeMap::new(),
            nic: VecDeque::new(),
            network_up: true,
            requests: Vec::new(),
            limits,
        }
    }

    pub fn open(&mut self, port: u16) {
        let client = Client::new(port);
        let syn = client.syn(self.now_us);
        self.clients.insert(port, client);
        self.send_to_primary(&syn);
        self.settle();
    }

    pub fn send(&mut self, port: u16, data: &[u8]) {
        let client = self.clients.get_mut(&port).expect("opened");
        if let Some(segment) = client.send(self.now_us, data) {
            self.send_to_primary(&segment);
        }
        self.settle();
    }

    /// All connections go on by so many bytes without anybody looking, from the guests and from the clients.
    pub fn skip(&mut self, guest: u32, client: u32) {
        self.pvm.skip(guest, client);
        if let Some(svm) = &mut self.svm {
            svm.skip(guest, client);
        }
        for end in self.clients.values_mut() {
            end.skip(client, guest);
        }
    }

    /// A frame from the network to whoever speaks.
    pub fn send_to_primary(&mut self, bytes: &[u8]) {
        let token = self.frames.insert(bytes).expect("a slot");
        let token = self
            .primary
            .handle_nic(self.now_us, &mut self.frames, token);
        self.deliver_to_pvm(token);
    }

    fn deliver_to_pvm(&mut self, token: Token) {
        let bytes = self.frames.bytes(&token).to_vec();
        self.primary
            .handle_delivered(self.now_us, &mut self.frames, token);
        for output in self.pvm.input(self.now_us, &bytes) {
            self.pvm_sends(&output);
        }
    }

    pub fn pvm_sends(&mut self, bytes: &[u8]) {
        let token = self.frames.insert(bytes).expect("a slot");
        self.primary
            .handle_guest_tx(self.now_us, &mut self.frames, token);
    }

    pub fn svm_sends(&mut self, bytes: &[u8]) {
        let token = self.frames.insert(bytes).expect("a slot");
        let secondary = self.secondary.as_mut().expect("a secondary");
        secondary.handle_guest_tx(self.now_us, &mut self.frames, token);
    }

    /// Runs until nothing happens any more.
    pub fn settle(&mut self) {
        while self.step_primary() | self.step_secondary() | self.step_clients() {}
    }

    fn step_primary(&mut self) -> bool {
        let mut busy = false;
        while let Some(token) = self.primary.poll_deliver(self.now_us, &mut self.frames) {
            self.deliver_to_pvm(token);
            busy = true;
        }
        while let Some(action) = self.primary.poll_action() {
            self.act(action);
            busy = true;
        }
        busy
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Release { token, .. } => {
                let bytes = self.frames.take(token);
                self.nic.push_back(bytes);
            }
            Action::Mirror {
                epoch,
                input_seq,
                token,
            } => {
                let secondary = self.secondary.as_mut().expect("mirrored to nobody");
                secondary
                    .handle_mirror(self.now_us, &mut self.frames, epoch, input_seq, token)
                    .expect("in order");
            }
            Action::SvmReleased { svm_seq } => {
                let secondary = self.secondary.as_mut().expect("reported to nobody");
                assert!(
                    secondary.output(svm_seq).is_some(),
                    "reported twice: {svm_seq}"
                );
                secondary.handle_released(&mut self.frames, svm_seq);
            }
            Action::PendingReleased { epoch } => {
                let secondary = self.secondary.as_mut().expect("reported to nobody");
                secondary.handle_pending_released(&mut self.frames, epoch);
            }
            Action::Fetch { svm_seq } => {
                let secondary = self.secondary.as_mut().expect("asked of nobody");
                secondary.fetch(svm_seq);
            }
            Action::Checkpoint(divergence) => self.requests.push(divergence),
        }
    }

    fn step_secondary(&mut self) -> bool {
        let mut busy = false;
        let Some(secondary) = self.secondary.as_mut() else {
            return false;
        };
        let mut outputs = Vec::new();
        while let Some(token) = secondary.poll_deliver(self.now_us, &mut self.frames) {
            let bytes = self.frames.take(token);
            let svm = self.svm.as_mut().expect("delivered to nobody");
            outputs.extend(svm.input(self.now_us, &bytes));
            busy = true;
        }
        for output in outputs {
            self.svm_sends(&output);
        }
        let secondary = self.secondary.as_mut().expect("still there");
        while let Some(action) = secondary.poll_action() {
            busy = true;
            let (frames, now_us) = (&mut self.frames, self.now_us);
            match action {
                SecondaryAction::AckInput { up_to } => {
                    self.primary.handle_input_ack(now_us, frames, up_to);
                }
                SecondaryAction::SendOutput { epoch, svm_seq } => {
                    let stored = secondary.output(svm_seq).expect("stored");
                    let copy = frames.duplicate(stored).expect("a slot");
                    self.primary
                        .handle_svm_output(now_us, frames, epoch, svm_seq, copy);
                }
                SecondaryAction::SendDigest {
                    epoch,
                    svm_seq,
                    header_len,
                    payload_len,
                    digest,
                } => {
                    let stored = frames.bytes(secondary.output(svm_seq).expect("stored"));
                    let headers = stored[..usize::from(header_len)].to_vec();
                    let token = frames.insert(&headers).expect("a slot");
                    self.primary.handle_svm_digest(
                        now_us,
                        frames,
                        epoch,
                        svm_seq,
                        token,
                        payload_len,
                        digest,
                    );
                }
                SecondaryAction::CaughtUp { epoch } => self.primary.caught_up(now_us, epoch),
                SecondaryAction::RequestCheckpoint(cause) => {
                    self.requests.push(Divergence::plain(cause, None));
                }
            }
        }
        busy
    }

    /// Shows a frame to its client, whose answers are lost.
    pub fn client_sees(&mut self, bytes: &[u8]) {
        let port = port_of(bytes, Direction::FromGuest);
        let client = self.clients.get_mut(&port).expect("for a client");
        client.input(self.now_us, bytes);
    }

    fn step_clients(&mut self) -> bool {
        let mut busy = false;
        while self.network_up
            && let Some(bytes) = self.nic.pop_front()
        {
            busy = true;
            let port = port_of(&bytes, Direction::FromGuest);
            let client = self.clients.get_mut(&port).expect("for a client");
            for answer in client.input(self.now_us, &bytes) {
                self.send_to_primary(&answer);
            }
        }
        busy
    }

    pub fn refresh_lease(&mut self) {
        let until_us = self.now_us + 1_000_000;
        self.primary
            .set_lease(self.now_us, &mut self.frames, until_us);
    }

    pub fn advance(&mut self, us: u64) {
        self.now_us += us;
        self.refresh_lease();
        self.primary.handle_timeout(self.now_us, &mut self.frames);
        self.settle();
    }

    /// A secondary joins and gets its first checkpoint. Its guest's later sequence numbers are its
    /// own.
    pub fn join(&mut self) {
        let limits = Limits {
            digest_min_bytes: 1,
            ..self.limits
        };
        let mut secondary = SecondaryPath::new(limits);
        // These tests run twice: `digests.rs` is made of the same files.
        if env!("CARGO_CRATE_NAME") == "digests" {
            self.primary.set_digest_key(Some(digest_key()));
            secondary.set_digests(Some(digest_key()));
        }
        self.secondary = Some(secondary);
        let epoch = self.primary.pair(self.now_us).expect("alone before");
        self.refresh_lease();
        let snapshot = self.capture(epoch);
        self.finish_checkpoint(snapshot);
    }

    pub fn checkpoint(&mut self) {
        let snapshot = self.begin_checkpoint();
        self.finish_checkpoint(snapshot);
    }

    pub fn begin_checkpoint(&mut self) -> Snapshot {
        self.secondary.as_mut().expect("a secondary").stop();
        let epoch = self.primary.cut(self.now_us).expect("none in flight");
        self.capture(epoch)
    }

    /// What travels. The SVM's later sequence numbers will be its own.
    pub fn capture(&mut self, epoch: u64) -> Snapshot {
        let mut record = Vec::new();
        self.primary.export_client_xlate(&mut record);
        let copy = |p: Pending<'_>| self.frames.bytes(p.token).to_vec();
        let pending = self.primary.pending().map(copy).collect();
        let mut guest = self.pvm.clone();
        guest.next_isn = guest.next_isn.wrapping_mul(31).wrapping_add(0x7fff_fff1);
        Snapshot {
            epoch,
            guest,
            record,
            pending,
        }
    }

    pub fn finish_checkpoint(&mut self, snapshot: Snapshot) {
        let Snapshot {
            epoch,
            guest,
            record,
            pending,
        } = snapshot;
        let pending = pending
            .iter()
            .map(|b| self.frames.insert(b).expect("a slot"))
            .collect();
        self.svm = Some(guest);
        let secondary = self.secondary.as_mut().expect("a secondary");
        secondary.check_record(&record).expect("a good record");
        secondary
            .commit(self.now_us, &mut self.frames, epoch, pending, &record)
            .expect("a good record");
        self.primary
            .commit(self.now_us, &mut self.frames, epoch)
            .expect("in flight");
        self.settle();
    }

    pub fn abort_checkpoint(&mut self, snapshot: Snapshot) {
        self.primary
            .abort(self.now_us, &mut self.frames, snapshot.epoch)
            .expect("in flight");
        self.secondary
            .as_mut()
            .expect("a secondary")
            .resume_unchanged();
        self.settle();
    }

    /// The secondary host dies; the primary wins the generation.
    pub fn kill_secondary(&mut self) {
        self.secondary
            .take()
            .expect("a secondary")
            .close(&mut self.frames);
        self.svm = None;
        self.primary.go_alone(self.now_us, &mut self.frames);
        self.settle();
    }

    /// The primary host dies; the secondary becomes the VM.
    pub fn kill_primary(&mut self) {
        let secondary = self.secondary.take().expect("a secondary");
        let new = secondary.take_over(self.now_us, &mut self.frames);
        let old = std::mem::replace(&mut self.primary, new);
        old.close(&mut self.frames);
        self.pvm = self.svm.take().expect("an SVM");
        self.settle();
    }

    /// All ends send again what is not acknowledged, as time would make them do.
    pub fn retransmit_all(&mut self) {
        self.now_us += 300_000;
        for segment in self.pvm.retransmit(self.now_us) {
            self.pvm_sends(&segment);
        }
        let again: Vec<_> = self
            .clients
            .values()
            .filter_map(|c| c.retransmit(self.now_us))
            .collect();
        for segment in again {
            self.send_to_primary(&segment);
        }
        self.settle();
    }

    pub fn assert_all_echoed(&self) {
        for (port, client) in &self.clients {
            assert!(!client.reset, "port {port} was reset");
            assert_eq!(
                client.received, client.sent,
                "port {port}: not everything came back"
            );
        }
    }

    /// Ends both paths and checks that every slot came back.
    pub fn close(mut self) {
        self.primary.close(&mut self.frames);
        if let Some(secondary) = self.secondary.take() {
            secondary.close(&mut self.frames);
        }
        assert_eq!(self.frames.used(), 0, "a slot leaked");
    }
}

/// Names for flags in tests.
pub const FIN_ACK: u8 = FIN | ACK;
