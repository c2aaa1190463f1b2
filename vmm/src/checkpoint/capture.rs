//! The primary's checkpoint thread: live synchronisation (`live`), capture, transfer.
//!
//! Order of a capture (rules 11 and 12): the SVM has stopped and sent its dirty set; what is dirty by now is copied (`early`);
//! vCPUs pause, the workers cut the epoch at a packet boundary; state is saved and the union of both dirty sets kept
//! (`stabilise`), which is to copy again what was written meanwhile; workers and vCPUs go on; only then it travels, as far as
//! the SVM lacks it (`outbound`).
//!
//! Invariants: a page leaves the dirty set only into a capture, and comes back if that capture is aborted (rule 14);
//! the guest runs again whatever fails here; without a secondary nothing is tracked, protected or reserved (invariant 8).
//!
//! Does not decide when: commands come from the control thread.

mod ahead;
mod cut;
mod early;
#[cfg(test)]
pub(crate) mod lab;
mod live;
mod records;
mod reopen;

use std::collections::VecDeque;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use colo_control::{VERSION_BULK, VERSION_MIN};
use colo_fastpath::mailbox::Post;

use super::ahead::{AheadCounters, AheadSettings};
use super::audit::{AuditError, Image, PacketRecords, StateRecords};
use super::codec::PageKey;
use super::outbound::{Outbound, OutboundSettings, SendError, Sent, SvmStop};
use super::pages::PageBitmap;
use super::stabilise::{StabiliseError, StabilisePolicy, Stabiliser, Stable};
use super::states::{State, StateKind, of_kind};
use super::stop;
use crate::config::Config;
use crate::machine::{Machine, MachineError, Urgency};
use crate::requests::Request;
use crate::snapshot;
use crate::testpoint::{Point, is_awaited, reached};
use cut::cut_all;
use records::Records;

/// How checkpoints are taken.
#[derive(Debug, Clone, Copy)]
pub struct CaptureSettings {
    /// How captured pages are kept.
    pub stabilise: StabilisePolicy,
    /// Memory for captured pages.
    pub arena_pages: u32,
    /// One in so many checkpoints is audited (rule 16); 0: none.
    pub audit_every: u32,
    /// How pages travel before a checkpoint needs them.
    pub ahead: AheadSettings,
    /// How they are sent.
    pub outbound: OutboundSettings,
}

/// What the control thread orders.
#[derive(Debug)]
pub enum CaptureCommand {
    /// Send all pages to a joining secondary, live: the first round.
    Sync {
        /// The page channel.
        streams: Vec<TcpStream>,
        /// For the records.
        generation: u64,
        /// Of page digests, for this secondary alone.
        key: [u8; 16],
        /// Names this secondary in [`CaptureEvent::LinkDown`].
        session: u64,
        /// Memory for pages that come ahead of a checkpoint, ours and the secondary's; 0: none come.
        ahead_mib: usize,
        /// The link's protocol version, as negotiated (rule 22).
        version: u16,
    },
    /// Send what became dirty in the round before.
    SyncRound,
    /// Take a checkpoint.
    Capture {
        /// The epoch it ends.
        epoch: u64,
        /// The first of this secondary: its packet path begins here.
        first: bool,
        /// What the SVM told when it stopped ([`stop`]).
        svm_stopped: Vec<u8>,
        /// The epoch that follows is buffered, not compared.
        buffer: bool,
        /// For the records.
        generation: u64,
    },
    /// The checkpoint in flight is committed.
    Committed {
        /// For what is sent until the next one.
        generation: u64,
    },
    /// It is not: its pages belong to the next one.
    Aborted,
    /// The page channel goes on over these.
    Reopen {
        /// In the place of streams that broke.
        streams: Vec<TcpStream>,
        /// Names them in [`CaptureEvent::StreamsBroken`].
        opened: u64,
    },
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
    /// A live round is on the link.
    SyncRound {
        /// Pages sent in it.
        sent_pages: u64,
        /// Pages that became dirty meanwhile.
        dirty_pages: u64,
        /// How long it took.
        took_us: u64,
    },
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
    /// The dirty log was read between checkpoints; what was counted since the last time.
    Ahead(AheadCounters),
    /// All is on the link.
    Sent {
        /// Its epoch.
        epoch: u64,
        /// What that took, and what of it the guest paid for.
        sent: Box<Sent>,
        /// How long the guest's writes had to wait for captured pages until the last of these was read (rule 17).
        stall_us: u64,
    },
    /// Nothing whole was sent.
    Failed {
        /// Its epoch.
        epoch: u64,
        /// In words.
        reason: String,
    },
    /// The streams of the page channel are of no use; the session goes on if others are opened.
    StreamsBroken {
        /// As in [`CaptureEvent::LinkDown`].
        session: u64,
        /// Which: [`CaptureCommand::Reopen`] numbers them, from 1; those that the session began with are 0.
        opened: u64,
        /// In words.
        reason: String,
    },
    /// The page channel is unusable.
    LinkDown {
        /// Which secondary's: the word of an old one says nothing of the next.
        session: u64,
        /// In words.
        reason: String,
    },
}

/// What a capture cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct CaptureCost {
    /// Before the pause: copying pages while the guest runs.
    pub early_us: u64,
    /// From the order to pause until the vCPUs ran again.
    pub pause_us: u64,
    /// Part of it: pausing vCPUs and cutting the epoch.
    pub quiesce_us: u64,
    /// Part of it: registers and devices.
    pub state_us: u64,
    /// Part of it: collecting the dirty set.
    pub collect_us: u64,
    /// Part of it: copying or protecting the pages.
    pub stabilise_us: u64,
    /// Part of it: digesting all of memory for an audit.
    pub audit_us: u64,
    /// Part of it: from there until the vCPUs ran.
    pub resume_us: u64,
    /// Pages in the union of both dirty sets.
    pub dirty_pages: u64,
    /// Of these, sent ahead and not written since: neither copied nor protected.
    pub ahead_pages: u64,
    /// Pages that were copied before the pause.
    pub early_pages: u64,
    /// Pages that the log named in the pause: where some were copied before, those written meanwhile.
    pub late_pages: u64,
    /// Of these, pages that were copied before: each met one more fault of the dirty log.
    pub again_pages: u64,
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
    /// A checkpoint covers one epoch.
    #[error("the packet workers are in different epochs")]
    Epochs,
    /// The captured pages could not be kept.
    #[error(transparent)]
    Stabilise(#[from] StabiliseError),
    /// The image could not be digested.
    #[error("audit: {0}")]
    Audit(#[from] AuditError),
    /// The secondary's dirty set is of another machine.
    #[error("the secondary's dirty bitmap does not fit this guest's memory")]
    DirtySet,
    /// The page streams broke, or it is off before it has begun.
    #[error("there are no page streams to send it over, or it was called off first")]
    NoStreams,
    /// There is nobody to send to.
    #[error("there is no secondary")]
    NoSecondary,
}

/// A checkpoint that is to be sent.
#[derive(Debug)]
struct Capture {
    stop: SvmStop,
    states: Vec<State>,
    stable: Stable,
}

/// What there is for one secondary.
#[derive(Debug)]
struct Session {
    outbound: Outbound,
    stabiliser: Stabiliser,
    records: Records,
    /// Which streams it has.
    opened: u64,
    /// These are of no use.
    is_broken: bool,
}

/// What a capture is to be like.
#[derive(Debug, Clone, Copy)]
struct Order<'a> {
    first: bool,
    svm_stopped: &'a [u8],
    buffer: bool,
}

/// The thread's state.
#[derive(Debug)]
pub struct CaptureThread {
    machine: Arc<Machine>,
    settings: CaptureSettings,
    post: Post<CaptureEvent>,
    session: Option<Session>,
    session_number: u64,
    /// Of the link to that secondary.
    version: u16,
    /// Pages still owed to the secondary besides what the dirty logs say.
    carry: PageBitmap,
    /// Pages of the checkpoint in flight.
    in_flight: PageBitmap,
    /// Those of them that the log named when it was read last: what went ahead of them is of no use, nor what was copied of
    /// them before.
    written: PageBitmap,
    /// The capture in hand has cut the epoch.
    is_cut: bool,
    /// Orders that came while a checkpoint or a live round was sent.
    deferred: VecDeque<CaptureCommand>,
    /// Waits for the disk, which may take longer than a checkpoint may.
    snapshots: snapshot::Background,
    captures: u64,
}

impl CaptureThread {
    /// For a machine; events go to `post`.
    pub fn new(machine: Arc<Machine>, settings: CaptureSettings, post: Post<CaptureEvent>) -> Self {
        let pages = machine.ram().page_count();
        Self {
            machine,
            settings,
            post,
            session: None,
            session_number: 0,
            version: VERSION_MIN,
            carry: PageBitmap::new(pages),
            in_flight: PageBitmap::new(pages),
            written: PageBitmap::new(pages),
            is_cut: false,
            deferred: VecDeque::new(),
            snapshots: snapshot::Background::default(),
            captures: 0,
        }
    }

    /// Obeys until the other end of `commands` is gone.
    pub fn run(mut self, commands: &Receiver<CaptureCommand>) {
        loop {
            let Some(command) = self.next_command(commands) else {
                return;
            };
            match command {
                CaptureCommand::Sync {
                    streams,
                    generation,
                    key,
                    session,
                    ahead_mib,
                    version,
                } => {
                    self.session_number = session;
                    self.settings.outbound.lends = version >= VERSION_BULK;
                    self.version = version;
                    self.begin_sync(streams, generation, key, commands);
                    self.prepare_ahead(ahead_mib);
                }
                CaptureCommand::SyncRound => self.sync_round(commands),
                CaptureCommand::Capture {
                    epoch,
                    first,
                    svm_stopped,
                    buffer,
                    generation,
                } => {
                    let order = Order {
                        first,
                        svm_stopped: &svm_stopped,
                        buffer,
                    };
                    if !self.has_streams(commands) {
                        self.failed(epoch, &CaptureError::NoStreams);
                        continue;
                    }
                    if let Some(session) = &mut self.session {
                        session.outbound.set_generation(generation);
                    }
                    self.checkpoint(epoch, order, commands);
                }
                CaptureCommand::Committed { generation } => {
                    self.in_flight.clear();
                    if let Some(session) = &mut self.session {
                        session.outbound.set_generation(generation);
                        session.outbound.committed();
                    }
                }
                CaptureCommand::Aborted => self.aborted(),
                CaptureCommand::Reopen { streams, opened } => self.reopen(streams, opened),
                CaptureCommand::Detach => self.detach(),
                CaptureCommand::Snapshot { request, config } => {
                    let machine = &self.machine;
                    self.snapshots
                        .serve(request, |path| snapshot::begin(machine, &config, path));
                }
            }
        }
    }

    fn aborted(&mut self) {
        self.carry.merge(&self.in_flight);
        self.in_flight.clear();
        if let Some(session) = &mut self.session {
            session.outbound.aborted();
        }
    }

    fn detach(&mut self) {
        self.session = None;
        self.carry.clear();
        self.in_flight.clear();
        if let Err(e) = self.machine.set_dirty_logging(false) {
            tracing::warn!("dirty logging stays on, the guest runs slower than it could: {e}");
        }
    }

    fn checkpoint(&mut self, epoch: u64, order: Order<'_>, commands: &Receiver<CaptureCommand>) {
        reached(Point::SvmStopped);
        let captured = self.capture(order);
        let Capture {
            stop,
            states,
            mut stable,
        } = match captured {
            Ok((cost, capture)) => {
                self.post.send(CaptureEvent::Captured { epoch, cost });
                capture
            }
            Err(e) => {
                if self.is_cut {
                    self.post.send(CaptureEvent::Cut { epoch });
                }
                return self.failed(epoch, &e);
            }
        };
        reached(Point::Captured);
        let Some(session) = &mut self.session else {
            return self.failed(epoch, &CaptureError::NoSecondary);
        };
        let deferred = &mut self.deferred;
        let is_off = || {
            deferred.extend(commands.try_iter());
            let ends =
                |c: &CaptureCommand| matches!(c, CaptureCommand::Aborted | CaptureCommand::Detach);
            deferred.iter().any(ends)
        };
        let midway = is_awaited(Point::MidTransfer).then_some(|| reached(Point::MidTransfer));
        let sent = session
            .outbound
            .send(epoch, &states, &mut stable, &stop, midway, is_off);
        session.records.give_back(states);
        match sent {
            Ok(sent) => {
                reached(Point::StageSent);
                let stall_us = stable.end().stall_us;
                let sent = Box::new(Sent {
                    stabilise: session.stabiliser.snapshot(),
                    ..sent
                });
                self.post.send(CaptureEvent::Sent {
                    epoch,
                    sent,
                    stall_us,
                });
            }
            Err(SendError::CalledOff) => {}
            Err(e) if e.spares_channel() => self.failed(epoch, &e),
            Err(e) if e.is_broken_stream() => {
                drop(stable);
                self.streams_broken(e.to_string());
                self.failed(epoch, &e);
            }
            Err(e) => {
                drop(stable);
                self.session = None;
                self.link_down(e.to_string());
            }
        }
    }

    fn link_down(&self, reason: String) {
        let session = self.session_number;
        self.post.send(CaptureEvent::LinkDown { session, reason });
    }

    fn failed(&self, epoch: u64, error: &dyn std::error::Error) {
        let reason = error.to_string();
        self.post.send(CaptureEvent::Failed { epoch, reason });
    }

    /// Stops the guest, takes its state and pages, lets it go on.
    fn capture(&mut self, order: Order<'_>) -> Result<(CaptureCost, Capture), CaptureError> {
        self.is_cut = false;
        let words = self.machine.ram().bitmap_words();
        let stopped = stop::from_bytes(order.svm_stopped, words, self.version);
        let (dirty, number) = stopped.ok_or(CaptureError::DirtySet)?;
        let stop = SvmStop { number, dirty };
        // What is known before is put together while the guest runs: it takes longer the more memory there is.
        self.in_flight.merge(&stop.dirty);
        self.in_flight.merge(&self.carry);
        self.carry.clear();
        let mut cost = CaptureCost::default();
        self.copy_early(&mut cost)?;
        let machine = self.machine.clone();
        let urgency = machine.hurry();
        let start = Instant::now();
        machine.pause_vcpus_for_capture()?;
        let outcome = self.capture_stopped(order, urgency, start, &mut cost);
        reached(Point::Paused);
        let resumed = machine.resume_workers();
        machine.resume_vcpus()?;
        cost.pause_us = start.elapsed().as_micros() as u64;
        let parts =
            cost.quiesce_us + cost.state_us + cost.collect_us + cost.stabilise_us + cost.audit_us;
        cost.resume_us = cost.pause_us.saturating_sub(parts);
        let (states, stable) = outcome?;
        resumed?;
        let capture = Capture {
            stop,
            states,
            stable,
        };
        Ok((cost, capture))
    }

    fn capture_stopped(
        &mut self,
        order: Order<'_>,
        urgency: Urgency<'_>,
        start: Instant,
        cost: &mut CaptureCost,
    ) -> Result<(Vec<State>, Stable), CaptureError> {
        let machine = self.machine.clone();
        let mut until = 0;
        let mut lap_us = || {
            let now_us = start.elapsed().as_micros() as u64;
            now_us - std::mem::replace(&mut until, now_us)
        };
        let (ports, cuts) = cut_all(machine.workers(), order.first, order.buffer)?;
        self.is_cut = true;
        // From here on nobody is waited for, and a copy can take longer than others may be kept from a processor.
        drop(urgency);
        cost.quiesce_us = lap_us();

        cost.pending_frames = cuts.iter().map(|cut| cut.pending.len() as u64).sum();
        let session = self.session.as_mut().ok_or(CaptureError::NoSecondary)?;
        let mut states = session.records.read(&machine, ports, cuts)?;
        cost.state_us = lap_us();

        cost.ahead_pages = self.collect()?;
        cost.late_pages = self.written.count() as u64;
        cost.dirty_pages = self.in_flight.count() as u64;
        cost.collect_us = lap_us();

        let stable = self.keep(cost)?;
        cost.stabilise_us = lap_us();

        self.captures += 1;
        let every = self.settings.audit_every;
        if every > 0 && self.captures.is_multiple_of(u64::from(every)) {
            let session = self.session.as_ref().ok_or(CaptureError::NoSecondary)?;
            states.push(audit_of(&machine, session.outbound.key(), &states)?);
            cost.audit_us = lap_us();
        }
        Ok((states, stable))
    }
}

/// What a captured machine is, in digests.
fn audit_of(machine: &Machine, key: &PageKey, states: &[State]) -> Result<State, AuditError> {
    let vcpus: Vec<_> = of_kind(states, StateKind::Vcpu)
        .map(<[u8]>::to_vec)
        .collect();
    let only = |kind| of_kind(states, kind).next().unwrap_or_default();
    let records = StateRecords {
        vcpus: &vcpus,
        platform: only(StateKind::Platform),
        devices: only(StateKind::Devices),
    };
    let translations = of_kind(states, StateKind::Translations);
    let shards: Vec<_> = translations
        .zip(of_kind(states, StateKind::Pending))
        .map(|(translations, pending)| PacketRecords {
            translations,
            pending,
        })
        .collect();
    let image = Image::of(0, key, machine.ram(), records)?.with_packets(key, &shards)?;
    let bytes = image.summary(key).to_bytes();
    Ok(State::new(StateKind::Audit, 0, bytes))
}

#[cfg(test)]
#[path = "capture/capture_tests.rs"]
mod tests;
