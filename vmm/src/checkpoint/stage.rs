//! The secondary's checkpoint thread: digests of the stopped SVM out, checkpoints in; validates, commits, applies.
//!
//! Invariants: while the machine has never run, live pages go straight to RAM; afterwards nothing of a checkpoint
//! touches the machine before the whole of it was received and accepted (rule 13); an apply that has begun is
//! finished or fatal.
//!
//! Does not decide: the control thread orders the apply (`orders`). What a checkpoint must have is in `accept`, what follows
//! from the commit point on in `apply`.

mod accept;
mod apply;
mod cost;
mod error;
mod orders;
mod reopen;

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use colo_fastpath::mailbox::Post;

use super::ahead;
use super::ahead::area::Area;
use super::channel::{ChannelError, Event, Kind, PageChannel, Settings, Waker};
use super::codec::digest::KEY_BYTES;
use super::codec::{DigestListEncoder, PageKey};
use super::pages::{PAGE_BYTES, PageBitmap};
use super::staging::{LiveMemory, Staging};
use super::stop::StopNumber;
use crate::machine::Machine;
use crate::testpoint::{Point, reached};

use accept::Accepted;
use orders::{Word, await_word};

pub use cost::{ApplyCost, ApplyParts};
pub use error::StageError;
pub use orders::{StageCommand, StageOrders};

/// How long one wait lasts; a wake-up ends it.
const LOOK: Duration = Duration::from_secs(1);
/// The first list of digests, which is there before the primary is through with its pause; the following ones grow.
const DIGESTS_AT_FIRST: u64 = 256;

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
    /// The order for digests that was carried out last, while the primary may wait for them.
    listed: Option<StageCommand>,
    key: Option<PageKey>,
    /// It was made of these.
    key_bytes: Option<[u8; KEY_BYTES]>,
    staging: Staging,
    /// What has come ahead of the next checkpoint.
    area: Area,
    open: Option<Open>,
    /// Epoch of the last checkpoint that began to come in, for the control thread.
    begun: Arc<AtomicU64>,
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
    let begun = Arc::new(AtomicU64::new(0));
    let has_begun = begun.clone();
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
            listed: None,
            key: None,
            key_bytes: None,
            open: None,
            begun: has_begun,
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
        begun,
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
                    // The primary hears why before it sees these streams end.
                    while self.commands.recv().is_ok() {}
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
            } = &command
            {
                self.channel.set_generation(*generation);
                let sent = self.send_digests(*epoch, *stop, dirty);
                self.listed = Some(command);
                sent?;
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
                self.begun.store(chunk.epoch, Ordering::Relaxed);
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
            None => self
                .accept(epoch, open.since)
                .and_then(|accepted| self.log_writes().map(|()| accepted)),
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
            Word::Apply { halt } => {
                self.listed = None;
                halt
            }
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
}
