//! The primary's checkpoint thread: live synchronisation, capture, transfer.
//!
//! Order of a capture (rules 11 and 12): the SVM has stopped and sent its dirty set; vCPUs pause, the worker cuts the
//! epoch at a packet boundary; state is saved and the union of both dirty sets copied; worker and vCPUs go on; only
//! then the copy travels.
//!
//! Invariants: a page leaves the dirty set only into a capture, and comes back if that capture is aborted (rule 14);
//! the guest runs again whatever fails here.
//!
//! Does not decide when: commands come from the control thread.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use colo_fastpath::mailbox::Post;
use colo_fastpath::pair::{CutState, PrimaryRole};
use colo_fastpath::ring::GuestRam;

use super::pages::{PAGE_BYTES, PageBitmap, PageSet};
use super::pending;
use super::transfer::{Checkpoint, Sender, State, StateKind, TransferError};
use crate::config::Config;
use crate::machine::{Machine, MachineError};
use crate::requests::Request;
use crate::snapshot;
use crate::testpoint::{Point, reached};

/// Live rounds end when so few pages are left, or after so many rounds.
const ROUND_SMALL_PAGES: usize = 256;
const ROUNDS_MAX: u32 = 10;
/// Pages copied and sent at a time while the guest runs.
const SYNC_BATCH: usize = 256;

/// What the control thread orders.
#[derive(Debug)]
pub enum CaptureCommand {
    /// Send all pages to a joining secondary, live.
    Sync {
        /// The page channel.
        stream: TcpStream,
        /// For the records.
        generation: u64,
    },
    /// Take a checkpoint.
    Capture {
        /// The epoch it ends.
        epoch: u64,
        /// The first of this secondary: its packet path begins here.
        first: bool,
        /// What the SVM dirtied.
        svm_dirty: Vec<u8>,
        /// The epoch that follows is buffered, not compared.
        buffer: bool,
        /// For the records.
        generation: u64,
    },
    /// The checkpoint in flight is committed.
    Committed,
    /// It is not: its pages belong to the next one.
    Aborted,
    /// The secondary is gone: no tracking any more.
    Detach,
    /// An operator wants a snapshot. Between checkpoints, so that nobody's pause falls into another's.
    Snapshot {
        /// Who waits for it.
        request: Request,
        /// What the machine was made from.
        config: Box<Config>,
    },
}

/// What the thread reports.
#[derive(Debug)]
pub enum CaptureEvent {
    /// Few pages are left.
    SyncReady,
    /// The guest runs on.
    Captured {
        /// The epoch ended.
        epoch: u64,
        /// What it cost.
        cost: CaptureCost,
    },
    /// The epoch was cut, but a failure follows; the guest runs on.
    Cut {
        /// The epoch ended.
        epoch: u64,
    },
    /// All is on the link.
    Sent {
        /// Its epoch.
        epoch: u64,
        /// Bytes of the page channel so far.
        sent_bytes: u64,
    },
    /// Nothing whole was sent.
    Failed {
        /// Its epoch.
        epoch: u64,
        /// In words.
        reason: String,
    },
    /// The page channel is unusable.
    LinkDown {
        /// In words.
        reason: String,
    },
}

/// What a capture cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct CaptureCost {
    /// From the order to pause until the vCPUs ran again.
    pub pause_us: u64,
    /// Part of it: pausing vCPUs and cutting the epoch.
    pub quiesce_us: u64,
    /// Part of it: registers and devices.
    pub state_us: u64,
    /// Part of it: collecting and copying the dirty set.
    pub copy_us: u64,
    /// Pages in the union of both dirty sets.
    pub dirty_pages: u64,
    /// Frames of pending output.
    pub pending_frames: u64,
}

/// Why a capture failed.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The machine would not stop or tell its state.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The worker is not in the primary's role.
    #[error("the packet worker is not in the primary's role")]
    Role,
    /// Guest memory could not be read.
    #[error("guest memory: {0}")]
    Memory(#[from] colo_fastpath::ring::MemoryError),
}

/// What a capture is to be like.
#[derive(Debug, Clone, Copy)]
struct Order<'a> {
    first: bool,
    svm_dirty: &'a [u8],
    buffer: bool,
}

/// The thread's state.
#[derive(Debug)]
pub struct CaptureThread {
    machine: Arc<Machine>,
    post: Post<CaptureEvent>,
    sender: Option<Sender<TcpStream>>,
    /// Pages still owed to the secondary besides what the dirty logs say.
    carry: PageBitmap,
    /// Pages of the checkpoint in flight.
    in_flight: PageBitmap,
    /// The capture in hand has cut the epoch.
    is_cut: bool,
    /// The buffers of the previous checkpoint, kept for the next.
    spare: PageSet,
}

impl CaptureThread {
    /// For a machine; events go to `post`.
    pub fn new(machine: Arc<Machine>, post: Post<CaptureEvent>) -> Self {
        let pages = machine.ram().page_count();
        Self {
            machine,
            post,
            sender: None,
            carry: PageBitmap::new(pages),
            in_flight: PageBitmap::new(pages),
            is_cut: false,
            spare: PageSet::default(),
        }
    }

    /// Obeys until the other end of `commands` is gone.
    pub fn run(mut self, commands: &Receiver<CaptureCommand>) {
        while let Ok(command) = commands.recv() {
            match command {
                CaptureCommand::Sync { stream, generation } => self.sync(stream, generation),
                CaptureCommand::Capture {
                    epoch,
                    first,
                    svm_dirty,
                    buffer,
                    generation,
                } => {
                    let order = Order {
                        first,
                        svm_dirty: &svm_dirty,
                        buffer,
                    };
                    self.checkpoint(epoch, order, generation);
                }
                CaptureCommand::Committed => self.in_flight.clear(),
                CaptureCommand::Aborted => {
                    self.carry.merge(&self.in_flight.words);
                    self.in_flight.clear();
                }
                CaptureCommand::Detach => self.detach(),
                CaptureCommand::Snapshot { request, config } => {
                    snapshot::serve(request, &self.machine, &config);
                }
            }
        }
    }

    fn detach(&mut self) {
        self.sender = None;
        self.carry.clear();
        self.in_flight.clear();
        if let Err(e) = self.machine.set_dirty_logging(false) {
            tracing::warn!("dirty logging stays on, the guest runs slower than it could: {e}");
        }
    }

    fn sync(&mut self, stream: TcpStream, generation: u64) {
        self.carry.clear();
        self.in_flight.clear();
        match self.send_live(stream, generation) {
            Ok(()) => self.post.send(CaptureEvent::SyncReady),
            Err(reason) => {
                self.sender = None;
                self.post.send(CaptureEvent::LinkDown { reason });
            }
        }
    }

    fn send_live(&mut self, stream: TcpStream, generation: u64) -> Result<(), String> {
        stream.set_nonblocking(false).map_err(|e| e.to_string())?;
        let mut sender = Sender::new(stream);
        self.machine
            .set_dirty_logging(true)
            .map_err(|e| e.to_string())?;
        let ram = self.machine.ram().clone();
        let mut round = PageBitmap::new(ram.page_count());
        round.words.fill(u64::MAX);
        let last_bits = ram.page_count() % 64;
        if let (Some(last), 1..) = (round.words.last_mut(), last_bits) {
            *last = (1 << last_bits) - 1;
        }
        for _ in 0..ROUNDS_MAX {
            send_round(&mut sender, generation, &ram, &round).map_err(|e| e.to_string())?;
            round.clear();
            self.machine
                .take_dirty(&mut round.words)
                .map_err(|e| e.to_string())?;
            if round.count() <= ROUND_SMALL_PAGES {
                break;
            }
        }
        self.carry.merge(&round.words);
        self.sender = Some(sender);
        Ok(())
    }

    fn checkpoint(&mut self, epoch: u64, order: Order<'_>, generation: u64) {
        reached(Point::SvmStopped);
        let mut checkpoint = Checkpoint {
            generation,
            epoch,
            ..Checkpoint::default()
        };
        checkpoint.pages = std::mem::take(&mut self.spare);
        checkpoint.pages.clear();
        match self.capture(&mut checkpoint, order) {
            Ok(cost) => self.post.send(CaptureEvent::Captured { epoch, cost }),
            Err(e) => {
                if self.is_cut {
                    self.post.send(CaptureEvent::Cut { epoch });
                }
                self.post.send(CaptureEvent::Failed {
                    epoch,
                    reason: e.to_string(),
                });
                return;
            }
        }
        reached(Point::Captured);
        let Some(sender) = &mut self.sender else {
            let reason = "there is no secondary".to_owned();
            self.post.send(CaptureEvent::Failed { epoch, reason });
            return;
        };
        match sender.stage(&checkpoint, || reached(Point::MidTransfer)) {
            Ok(()) => {
                let sent_bytes = sender.sent_bytes;
                reached(Point::StageSent);
                self.post.send(CaptureEvent::Sent { epoch, sent_bytes });
            }
            Err(e) => {
                self.sender = None;
                self.post.send(CaptureEvent::LinkDown {
                    reason: e.to_string(),
                });
            }
        }
        self.spare = checkpoint.pages;
    }

    /// Stops the guest, fills `checkpoint`, lets the guest go on.
    fn capture(
        &mut self,
        checkpoint: &mut Checkpoint,
        order: Order<'_>,
    ) -> Result<CaptureCost, CaptureError> {
        let start = Instant::now();
        let machine = self.machine.clone();
        self.is_cut = false;
        machine.pause_vcpus_for_capture()?;
        let mut cost = CaptureCost::default();
        let outcome = self.capture_stopped(checkpoint, order, start, &mut cost);
        let resumed = machine.resume_workers().map_err(CaptureError::Machine);
        machine.resume_vcpus()?;
        cost.pause_us = start.elapsed().as_micros() as u64;
        outcome.and(resumed)?;
        Ok(cost)
    }

    fn capture_stopped(
        &mut self,
        checkpoint: &mut Checkpoint,
        order: Order<'_>,
        start: Instant,
        cost: &mut CaptureCost,
    ) -> Result<(), CaptureError> {
        let machine = self.machine.clone();
        machine.quiesce_workers()?;
        let cuts = cut_all(&machine, order.first).ok_or(CaptureError::Role)?;
        self.is_cut = true;
        let buffer = order.buffer;
        PrimaryRole::on_workers(machine.workers(), move |role, _| role.buffer(buffer))
            .ok_or(CaptureError::Role)?;
        cost.quiesce_us = start.elapsed().as_micros() as u64;

        cost.pending_frames = cuts.iter().map(|cut| cut.pending.len() as u64).sum();
        checkpoint.states = self.states(cuts)?;
        let after_state_us = start.elapsed().as_micros() as u64;
        cost.state_us = after_state_us - cost.quiesce_us;

        machine.take_dirty(&mut self.in_flight.words)?;
        self.in_flight.merge(&self.carry.words);
        self.in_flight
            .merge(&PageBitmap::from_bytes(order.svm_dirty).words);
        self.carry.clear();
        copy_pages(machine.ram(), self.in_flight.iter(), &mut checkpoint.pages)?;
        cost.dirty_pages = checkpoint.pages.numbers.len() as u64;
        cost.copy_us = start.elapsed().as_micros() as u64 - after_state_us;
        Ok(())
    }

    fn states(&self, cuts: Vec<CutState>) -> Result<Vec<State>, CaptureError> {
        let state = |kind: StateKind, index: usize, bytes| State {
            kind: kind as u16,
            index: index as u16,
            bytes,
        };
        let mut states = Vec::new();
        let mut vcpus = Vec::new();
        self.machine.save_vcpu_records(&mut vcpus)?;
        for (i, record) in vcpus.into_iter().enumerate() {
            states.push(state(StateKind::Vcpu, i, record));
        }
        let mut platform = Vec::new();
        self.machine.save_platform(&mut platform)?;
        states.push(state(StateKind::Platform, 0, platform));
        states.push(state(StateKind::Devices, 0, self.machine.save_devices()?));
        for (shard, cut) in cuts.into_iter().enumerate() {
            let pending = pending::to_bytes(&cut.pending);
            states.push(state(StateKind::Pending, shard, pending));
            states.push(state(StateKind::Translations, shard, cut.translations));
        }
        Ok(states)
    }
}

/// Ends the epoch in all shards, or in none (rule 4).
fn cut_all(machine: &Machine, first: bool) -> Option<Vec<CutState>> {
    let workers = machine.workers();
    let cuts = PrimaryRole::on_workers(workers, move |role, edge| role.cut(edge, first))?;
    if cuts.iter().all(Option::is_some) {
        return Some(cuts.into_iter().flatten().collect());
    }
    let epochs = cuts.iter().map(|cut| cut.as_ref().map(|cut| cut.epoch));
    let epochs: Vec<_> = epochs.collect();
    let _ = PrimaryRole::on_each(workers, epochs, |role, _, epoch| {
        if let Some(epoch) = epoch {
            role.uncut(epoch);
        }
    });
    None
}

fn send_round(
    sender: &mut Sender<TcpStream>,
    generation: u64,
    ram: &GuestRam,
    round: &PageBitmap,
) -> Result<(), SyncError> {
    let mut pages = PageSet::default();
    let numbers: Vec<u64> = round.iter().collect();
    for batch in numbers.chunks(SYNC_BATCH) {
        pages.clear();
        copy_pages(ram, batch.iter().copied(), &mut pages)?;
        sender.sync(generation, &pages)?;
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
enum SyncError {
    #[error(transparent)]
    Transfer(#[from] TransferError),
    #[error("guest memory: {0}")]
    Memory(#[from] colo_fastpath::ring::MemoryError),
}

fn copy_pages(
    ram: &GuestRam,
    numbers: impl Iterator<Item = u64>,
    pages: &mut PageSet,
) -> Result<(), colo_fastpath::ring::MemoryError> {
    let mut outcome = Ok(());
    for number in numbers.take_while(|&n| n < ram.page_count() as u64) {
        pages.push_with(number, |out| {
            if let Err(e) = ram.read(number * PAGE_BYTES as u64, out) {
                outcome = Err(e);
            }
        });
    }
    outcome
}
