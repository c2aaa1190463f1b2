//! The secondary's checkpoint thread: digests of the stopped SVM out, checkpoints in; validates, commits, applies.
//!
//! Invariants: while the machine has never run, live pages go straight to RAM; afterwards nothing of a checkpoint
//! touches the machine before the whole of it was received and accepted (rule 13); an apply that has begun is
//! finished or fatal.
//!
//! Does not decide: the control thread orders the apply (`orders`). What a checkpoint must have is in `accept`.

mod accept;
mod cost;
mod orders;
mod reopen;

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use colo_fastpath::mailbox::Post;
use colo_fastpath::pair::{OnWorkers, SecondaryRole};
use colo_fastpath::ring::MemoryError;
use colo_fastpath::worker::Edge;

use super::ahead;
use super::ahead::area::{Area, AreaError};
use super::audit::{AuditError, Image, StateRecords, Summary};
use super::channel::{ChannelError, Event, Kind, PageChannel, Settings, Waker};
use super::codec::digest::KEY_BYTES;
use super::codec::{DigestListEncoder, PageKey};
use super::pages::{PAGE_BYTES, PageBitmap};
use super::staging::{LiveMemory, Staging, StagingError};
use super::stop::StopNumber;
use crate::machine::record::RecordError;
use crate::machine::{ClockJump, Machine, MachineError};
use crate::testpoint::{Point, reached};

use accept::Accepted;
use cost::Laps;
use orders::{Word, await_word};

pub use cost::{ApplyCost, ApplyParts};
pub use orders::{StageCommand, StageOrders};

/// How long one wait lasts; a wake-up ends it.
const LOOK: Duration = Duration::from_secs(1);
/// The first list of digests, which is there before the primary is through with its pause; the following ones grow.
const DIGESTS_AT_FIRST: u64 = 256;
/// Differences that an audit names.
const DIFFERENCES_MAX: usize = 8;

/// How checkpoints are received.
#[derive(Debug, Clone, Copy)]
pub struct StageSettings {
    /// Of the channel.
    pub channel: Settings,
    /// Memory for pages that are staged at most.
    pub stage_mib: usize,
    /// Memory for pages that come ahead of a checkpoint.
    pub ahead_mib: usize,
}

/// What the thread reports.
#[derive(Debug)]
pub enum StageEvent {
    /// A whole checkpoint is accepted.
    Staged {
        /// Its epoch.
        epoch: u64,
    },
    /// A checkpoint is damaged or refused; the stream goes on.
    Failed {
        /// Its epoch.
        epoch: u64,
        /// In words.
        reason: String,
        /// It is whole, but not for this host: another one would be refused as well.
        unfit: bool,
    },
    /// The SVM runs from it, or stands still at it.
    Applied {
        /// Its epoch.
        epoch: u64,
        /// What it cost.
        cost: Box<ApplyCost>,
    },
    /// The machine is in no usable state (rule 13).
    ApplyFailed {
        /// In words.
        reason: String,
    },
    /// The streams of the page channel are of no use, and nothing comes of a checkpoint that was under way. The thread waits
    /// for [`StageCommand::Reopen`].
    StreamsBroken {
        /// In words.
        reason: String,
    },
    /// It goes on over others.
    Reopened {
        /// For [`StageOrders::rewire`].
        waker: Waker,
    },
    /// The page channel is unusable.
    LinkDown {
        /// In words.
        reason: String,
    },
}

/// Why a stage is refused or an apply failed.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// The checkpoint lacks something or has too much of it.
    #[error("checkpoint has {found} {what} records, {expected} needed")]
    Count {
        /// Which kind.
        what: &'static str,
        /// How many came.
        found: usize,
        /// How many this machine needs.
        expected: usize,
    },
    /// A record of a kind that this build does not know.
    #[error("checkpoint has a state record of unknown kind {0}; update the secondary")]
    UnknownKind(u16),
    /// A record that its owner refuses.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The worker is gone or in another role.
    #[error("the packet worker is not in the secondary's role")]
    Role,
    /// The packet core refuses the translations.
    #[error("translations: {0}")]
    Translations(String),
    /// A chunk makes no sense, or there is no memory for it.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// A checkpoint names pages that had not come ahead, or its list of them is none.
    #[error(transparent)]
    Area(#[from] AreaError),
    /// The primary has not told the key of page digests.
    #[error("a checkpoint without the key of its page digests")]
    NoKey,
    /// The audit found something.
    #[error("audit: the applied image is not the captured one: {0}")]
    Different(String),
    /// The audit could not be made.
    #[error("audit: {0}")]
    Audit(#[from] AuditError),
    /// Live pages for a machine that has run.
    #[error("live pages came after the first checkpoint")]
    LateSync,
    /// Guest memory can't be written.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
}

impl StageError {
    /// Whether the next checkpoint would be refused for the same reason (rule 22).
    fn is_unfit(&self) -> bool {
        match self {
            Self::Count { .. } | Self::UnknownKind(_) | Self::Translations(_) => true,
            // What was not committed is in the next one, too.
            Self::Staging(e) => {
                matches!(e, StagingError::TooLarge { .. } | StagingError::NoMemory(_))
            }
            Self::Machine(e) => match e {
                MachineError::Record(e) => !matches!(e, RecordError::Damaged(_)),
                MachineError::Kvm(e) => !e.is_passing(),
                MachineError::Shape { .. } => true,
                _ => false,
            },
            _ => false,
        }
    }
}

/// A checkpoint that comes in.
#[derive(Debug)]
struct Open {
    since: Instant,
    /// Nothing of it is staged.
    is_empty: bool,
    /// Why it will be refused.
    refusal: Option<StageError>,
}

/// The thread's state.
#[derive(Debug)]
struct StageThread {
    machine: Arc<Machine>,
    post: Post<StageEvent>,
    channel: PageChannel,
    commands: Receiver<StageCommand>,
    /// Came while a checkpoint waited for the word of the control thread.
    ordered: Option<StageCommand>,
    key: Option<PageKey>,
    /// It was made of these.
    key_bytes: Option<[u8; KEY_BYTES]>,
    staging: Staging,
    /// What has come ahead of the next checkpoint.
    area: Area,
    open: Option<Open>,
    /// What has come before the machine first runs.
    memory: LiveMemory,
    live: bool,
}

/// What ends the thread.
enum Over {
    /// Nobody gives orders any more, or the machine is in no usable state.
    Quietly,
    /// The page channel is of no use,
    Link(String),
    /// but other streams would do.
    Streams(String),
}

impl From<ChannelError> for Over {
    fn from(e: ChannelError) -> Self {
        match e {
            ChannelError::ShutDown => Self::Quietly,
            e if e.is_broken_stream() => Self::Streams(e.to_string()),
            e => Self::Link(e.to_string()),
        }
    }
}

/// Starts the thread for a machine that has never run, over connected sockets; events go to `post`.
pub fn spawn(
    machine: Arc<Machine>,
    streams: Vec<TcpStream>,
    settings: StageSettings,
    post: Post<StageEvent>,
) -> Result<(StageOrders, JoinHandle<()>), SpawnError> {
    let (orders, commands) = channel();
    let (ready, readiness) = channel();
    let run = move || {
        // A channel belongs to the thread that makes it.
        let made = PageChannel::new(streams, settings.channel);
        let mut channel = match made {
            Ok(channel) => channel,
            Err(e) => return drop(ready.send(Err(e))),
        };
        let _ = ready.send(Ok(channel.waker()));
        let pages = machine.ram().page_count();
        let staging = Staging::new(pages, settings.stage_mib);
        channel.land_in(staging.landings());
        let thread = StageThread {
            staging,
            area: Area::new(pages, settings.ahead_mib),
            memory: LiveMemory::new(pages),
            machine,
            post,
            channel,
            commands,
            ordered: None,
            key: None,
            key_bytes: None,
            open: None,
            live: false,
        };
        thread.run();
    };
    let builder = std::thread::Builder::new().name("checkpoint".to_owned());
    let thread = builder.spawn(run)?;
    let waker = readiness.recv().map_err(|_| SpawnError::Gone)??;
    let orders = StageOrders {
        commands: orders,
        waker,
    };
    Ok((orders, thread))
}

/// Why there is no thread.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The page channel.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// No threads.
    #[error("no thread for checkpoints: {0}")]
    Thread(#[from] std::io::Error),
    /// It ended at once.
    #[error("the checkpoint thread ended at its start")]
    Gone,
}

impl StageThread {
    fn run(mut self) {
        loop {
            let turn = match self.turn() {
                Err(Over::Streams(reason)) if self.live => self.go_on(reason),
                turn => turn,
            };
            match turn {
                Ok(()) => {}
                Err(Over::Quietly) => return,
                Err(Over::Link(reason) | Over::Streams(reason)) => {
                    self.post.send(StageEvent::LinkDown { reason });
                    return;
                }
            }
        }
    }

    fn turn(&mut self) -> Result<(), Over> {
        while let Some(command) = self.next_command()? {
            if let StageCommand::Digests {
                epoch,
                generation,
                stop,
                dirty,
            } = command
            {
                self.channel.set_generation(generation);
                self.send_digests(epoch, stop, &dirty)?;
            }
        }
        match self.channel.poll(LOOK)? {
            Event::Chunk(chunk) if chunk.kind == Kind::Sync => {
                let written = match self.live {
                    false => self
                        .memory
                        .write(self.machine.ram(), chunk.payload)
                        .map_err(StageError::from),
                    true => Err(StageError::LateSync),
                };
                // Nothing would ever repair it: the sender believes it has arrived.
                written.map_err(|e| Over::Link(e.to_string()))
            }
            Event::Chunk(chunk) if chunk.kind == Kind::Ahead => {
                match &self.key {
                    Some(key) if self.open.is_none() => {
                        if let Err(e) = self.area.take(chunk.payload, key) {
                            tracing::debug!("{e}");
                        }
                    }
                    // A checkpoint that comes in may have named what this would replace.
                    _ => self.area.refuse_chunk(),
                }
                Ok(())
            }
            Event::Chunk(chunk) if chunk.kind == Kind::Begin => {
                let key: Option<[u8; KEY_BYTES]> = chunk.payload.try_into().ok();
                if self.open.is_none() {
                    self.staging.clear();
                    self.area.begin();
                    if key != self.key_bytes {
                        self.key = key.map(PageKey::new);
                        self.key_bytes = key;
                    }
                    self.open = Some(Open {
                        since: Instant::now(),
                        is_empty: true,
                        refusal: None,
                    });
                }
                Ok(())
            }
            Event::Chunk(chunk) => {
                if let Some(open) = self.open.as_mut().filter(|open| open.refusal.is_none()) {
                    let added = match (chunk.kind, &self.key) {
                        (_, None) => Err(StageError::NoKey),
                        (Kind::State, _) => {
                            self.staging.add_state(chunk.payload).map_err(Into::into)
                        }
                        (Kind::Pages, Some(key)) => {
                            let ram = self.machine.ram();
                            let added =
                                self.staging
                                    .add_pages((chunk.payload, chunk.bulk), ram, key);
                            added.map_err(Into::into)
                        }
                        (Kind::Named, Some(key)) => {
                            self.area.name(chunk.payload, key).map_err(Into::into)
                        }
                        _ => Ok(()),
                    };
                    open.refusal = added.err();
                    if std::mem::take(&mut open.is_empty) {
                        reached(Point::MidStage);
                    }
                }
                Ok(())
            }
            Event::Complete { epoch, .. } => self.complete(epoch),
            Event::Aborted { .. } => {
                self.open = None;
                self.staging.clear();
                Ok(())
            }
            Event::Damaged { epoch, .. } if epoch == ahead::EPOCH => {
                self.area.refuse_chunk();
                Ok(())
            }
            Event::Damaged { epoch, reason } => {
                self.open = None;
                self.staging.clear();
                self.post.send(StageEvent::Failed {
                    epoch,
                    reason,
                    unfit: false,
                });
                Ok(())
            }
            Event::Closed => Err(Over::Streams("page channel: closed by the peer".to_owned())),
            Event::Sendable | Event::Woken | Event::Idle => Ok(()),
        }
    }

    fn next_command(&mut self) -> Result<Option<StageCommand>, Over> {
        if let Some(ordered) = self.ordered.take() {
            return Ok(Some(ordered));
        }
        match self.commands.try_recv() {
            Ok(command) => Ok(Some(command)),
            Err(TryRecvError::Empty) => Ok(None),
            // Whoever gave orders may not have known of the present channel.
            Err(TryRecvError::Disconnected) => Err(Over::Quietly),
        }
    }

    /// Sends what stands for the SVM's dirty pages. It stands still; should an abort let it go on meanwhile, the primary
    /// has given this stop up.
    fn send_digests(
        &mut self,
        epoch: u64,
        stop: StopNumber,
        dirty: &PageBitmap,
    ) -> Result<(), Over> {
        let Some(key) = &self.key else { return Ok(()) };
        let ram = self.machine.ram().clone();
        self.channel.lay_begin(epoch, &stop.to_bytes())?;
        let mut page = [0; PAGE_BYTES];
        let mut numbers = dirty.iter().peekable();
        let mut sent = 0;
        while numbers.peek().is_some() {
            let buffer = self.channel.next_buffer()?;
            let capacity = buffer.len();
            let Some(mut list) = DigestListEncoder::new(buffer, sent) else {
                break;
            };
            // Small lists at first: the primary can begin.
            let most = (DIGESTS_AT_FIRST << sent.min(8)).min(capacity as u64 / 32);
            while u64::from(list.count()) < most
                && let Some(number) = numbers.next()
            {
                let read = |out: &mut _| ram.copy_page_out(number as usize, out);
                let digest = key
                    .of_copy(&mut page, read)
                    .map_err(|e| Over::Link(e.to_string()))?;
                if !list.push(digest) {
                    let reason = "page channel: a list of digests is full before its end";
                    return Err(Over::Link(reason.to_owned()));
                }
            }
            let (count, length) = (list.count(), list.finish());
            sent += u64::from(count);
            self.channel.submit(Kind::Digests, count, length)?;
        }
        Ok(self.channel.finish()?)
    }

    /// All of a checkpoint is here.
    fn complete(&mut self, epoch: u64) -> Result<(), Over> {
        let Some(open) = self.open.take() else {
            return Ok(());
        };
        let accepted = match open.refusal {
            None => self.accept(epoch, open.since),
            Some(refusal) => Err(refusal),
        };
        let accepted = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                self.staging.clear();
                let (reason, unfit) = (e.to_string(), e.is_unfit());
                self.post.send(StageEvent::Failed {
                    epoch,
                    reason,
                    unfit,
                });
                return Ok(());
            }
        };
        let stage_us = open.since.elapsed().as_micros() as u64;
        reached(Point::Staged);
        self.post.send(StageEvent::Staged { epoch });
        let outcome = self.decided(accepted, stage_us);
        self.staging.clear();
        outcome
    }

    /// Waits for the word of the control thread, and acts on it.
    fn decided(&mut self, accepted: Accepted, stage_us: u64) -> Result<(), Over> {
        let epoch = accepted.epoch;
        let halt = match await_word(&self.commands) {
            Word::Apply { halt } => halt,
            Word::Discard { then } => {
                self.ordered = then;
                return Ok(());
            }
            Word::None => return Err(Over::Quietly),
        };
        match self.apply(accepted, halt) {
            Ok(cost) => {
                self.area.clear();
                let parts = ApplyParts {
                    stage_us,
                    ..cost.parts
                };
                let cost = Box::new(ApplyCost { parts, ..cost });
                self.post.send(StageEvent::Applied { epoch, cost });
                Ok(())
            }
            Err(e) => {
                let reason = e.to_string();
                self.post.send(StageEvent::ApplyFailed { reason });
                Err(Over::Quietly)
            }
        }
    }

    /// All of guest memory, in digests, before the worker may write to it.
    fn memory_image(&self) -> Result<Image, StageError> {
        let key = self.key.as_ref().ok_or(StageError::NoKey)?;
        Ok(Image::of_memory(0, key, self.machine.ram())?)
    }

    /// Whether the machine is what the primary captured (rule 16).
    fn audit(&self, captured: &Summary, memory: Image) -> Result<(), StageError> {
        let key = self.key.as_ref().ok_or(StageError::NoKey)?;
        let machine = &self.machine;
        let (mut vcpus, mut platform) = (Vec::new(), Vec::new());
        machine.save_vcpu_records(&mut vcpus)?;
        machine.save_platform(&mut platform)?;
        let devices = machine.save_devices()?;
        machine.resume_workers()?;
        let records = StateRecords {
            vcpus: &vcpus,
            platform: &platform,
            devices: &devices,
        };
        let image = memory.with_states(key, records)?;
        let differences = image.compare(key, captured, DIFFERENCES_MAX);
        if differences.is_empty() {
            return Ok(());
        }
        let named: Vec<_> = differences.iter().map(ToString::to_string).collect();
        Err(StageError::Different(named.join("; ")))
    }

    fn apply(&mut self, accepted: Accepted, halt: bool) -> Result<ApplyCost, StageError> {
        reached(Point::CommitSent);
        let mut laps = Laps::start();
        let machine = &self.machine;
        if !self.live {
            machine.set_dirty_logging(true)?;
            self.live = true;
        }
        // The worker looks at the rings even while its role stands still; half-written ones make no sense.
        machine.release_queues()?;
        self.staging.write_pages(machine.ram())?;
        self.area.write_named(machine.ram())?;
        reached(Point::PagesWritten);
        // What the apply wrote is what the primary has, so the SVM's dirty set starts empty here; whatever is written from
        // now on is not, and belongs to it.
        let mut forget = PageBitmap::new(machine.ram().page_count());
        machine.take_dirty(&mut forget)?;
        let write_us = laps.next_us();
        let memory = accepted.audit.as_ref().map(|_| self.memory_image());
        let memory = memory.transpose()?;
        let digest_us = laps.next_us();
        let jump = ClockJump::SinceCapture {
            begun: accepted.begun,
        };
        machine.restore_vcpus(&accepted.vcpus, jump)?;
        machine.restore_platform(&accepted.platform, jump)?;
        machine.restore_devices(&accepted.devices)?;
        let mut load_us = laps.next_us();
        let mut audit_us = 0;
        if let (Some(captured), Some(memory)) = (&accepted.audit, memory) {
            self.audit(captured, memory)?;
            audit_us = digest_us + laps.next_us();
        }
        let epoch = accepted.epoch;
        on_each(machine, accepted.shards, move |role, edge, shard| {
            role.commit(edge, epoch, &shard.pending, &shard.translations)
        })?;
        load_us += laps.next_us();
        reached(Point::Applied);
        let all = vec![(); machine.workers().len()];
        on_each(machine, all, move |role, _, ()| {
            match halt {
                true => role.halt(),
                false => role.start(),
            }
            Ok(())
        })?;
        if !halt {
            machine.resume_vcpus()?;
        }
        let resume_us = laps.next_us();
        let parts = ApplyParts {
            stage_us: 0,
            apply_us: laps.all_us(),
            write_us,
            load_us,
            audit_us,
            resume_us,
            pages: (self.staging.page_count() + self.area.named().len()) as u64,
        };
        Ok(ApplyCost {
            parts,
            area: self.area.counters(),
            channel: self.channel.counters(),
            staged: self.staging.counters(),
        })
    }
}

/// Runs `task` on the roles of all shards; the first refusal counts.
fn on_each<I: Send + 'static>(
    machine: &Machine,
    items: Vec<I>,
    task: impl Fn(&mut SecondaryRole, &mut Edge, I) -> Result<(), String> + Clone + Send + 'static,
) -> Result<(), StageError> {
    let results = SecondaryRole::on_each(machine.workers(), items, task).ok_or(StageError::Role)?;
    let all: Result<(), String> = results.into_iter().collect();
    all.map_err(StageError::Translations)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_22_what_this_host_cannot_have_is_told_from_what_was_damaged() {
        let unfit = |e: MachineError| StageError::from(e).is_unfit();
        assert!(unfit(MachineError::Shape {
            found: 2,
            expected: 1
        }));
        let (theirs, ours) = ("2 kHz".to_owned(), "1 kHz".to_owned());
        let differs = RecordError::Unfit {
            what: "vCPU",
            field: "TSC frequency".to_owned(),
            theirs,
            ours,
        };
        assert!(unfit(differs.into()));
        assert!(!unfit(RecordError::Damaged("vCPU").into()));
        let too_large = StageError::from(StagingError::TooLarge { limit_mib: 1 });
        assert!(too_large.is_unfit() && too_large.to_string().contains("stage_mib = 1"));
        let twice = StagingError::Twice { number: 7 };
        assert!(!StageError::from(twice).is_unfit());
        assert!(StageError::UnknownKind(99).is_unfit());
    }
}
