//! The secondary's checkpoint thread: receives, validates, commits, applies.
//!
//! Invariants: while the machine has never run, live pages go straight to RAM; afterwards nothing of a checkpoint
//! touches the machine before the whole of it was received and accepted (rule 13); an apply that has begun is
//! finished or fatal.
//!
//! Does not decide: the control thread orders the apply.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::mpsc::Receiver as Commands;
use std::time::Instant;

use colo_fastpath::mailbox::Post;
use colo_fastpath::pair::SecondaryRole;
use colo_fastpath::ring::{GuestRam, MemoryError};
use colo_fastpath::worker::Edge;

use super::pages::{PAGE_BYTES, PageSet};
use super::pending;
use super::transfer::{Checkpoint, Incoming, Receiver, StateKind};
use crate::machine::record::RecordError;
use crate::machine::{ClockJump, Machine, MachineError, VcpuState};
use crate::testpoint::{Point, reached};

/// What the control thread orders after [`StageEvent::Staged`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageCommand {
    /// Apply it and let the SVM run, or stand still there (`halt`).
    Apply {
        /// Remus mode.
        halt: bool,
    },
    /// Forget it.
    Discard,
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
    },
    /// The SVM runs from it, or stands still at it.
    Applied {
        /// Its epoch.
        epoch: u64,
        /// What it cost.
        cost: ApplyCost,
    },
    /// The machine is in no usable state (rule 13).
    ApplyFailed {
        /// In words.
        reason: String,
    },
    /// The page channel is unusable.
    LinkDown {
        /// In words.
        reason: String,
    },
}

/// What an apply cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct ApplyCost {
    /// From the order until the SVM ran.
    pub apply_us: u64,
    /// Pages written.
    pub pages: u64,
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
    /// Guest memory can't be written.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
}

/// A checkpoint that was accepted: everything that can be refused has been parsed.
#[derive(Debug)]
struct Accepted {
    epoch: u64,
    vcpus: Vec<VcpuState>,
    platform: Vec<u8>,
    devices: Vec<u8>,
    /// What each shard gets.
    shards: Vec<ShardState>,
    pages: PageSet,
}

/// The packet side of a checkpoint, of one shard.
#[derive(Debug, Clone)]
struct ShardState {
    translations: Vec<u8>,
    pending: Vec<Vec<u8>>,
}

/// The thread's state.
#[derive(Debug)]
pub struct StageThread {
    machine: Arc<Machine>,
    post: Post<StageEvent>,
    receiver: Receiver<TcpStream>,
    live: bool,
}

impl StageThread {
    /// For a machine that has never run; events go to `post`.
    pub fn new(machine: Arc<Machine>, stream: TcpStream, post: Post<StageEvent>) -> Self {
        let page_count = machine.ram().page_count() as u64;
        Self {
            machine,
            post,
            receiver: Receiver::new(stream, page_count),
            live: false,
        }
    }

    /// Receives until the channel or the other end of `commands` is gone.
    pub fn run(mut self, commands: &Commands<StageCommand>) {
        loop {
            match self.receiver.receive() {
                Ok(Incoming::Sync(pages)) => {
                    if let Err(e) = self.live_pages(&pages) {
                        self.post.send(StageEvent::LinkDown {
                            reason: e.to_string(),
                        });
                        return;
                    }
                }
                Ok(Incoming::Stage(stage)) => {
                    if !self.stage(*stage, commands) {
                        return;
                    }
                }
                Ok(Incoming::Damaged { epoch, reason }) => {
                    self.post.send(StageEvent::Failed { epoch, reason });
                }
                Err(e) => {
                    self.post.send(StageEvent::LinkDown {
                        reason: e.to_string(),
                    });
                    return;
                }
            }
        }
    }

    fn live_pages(&mut self, pages: &PageSet) -> Result<(), StageError> {
        if self.live {
            return Err(StageError::Count {
                what: "live page",
                found: 1,
                expected: 0,
            });
        }
        Ok(write_pages(self.machine.ram(), pages)?)
    }

    /// False when the thread has to end.
    fn stage(&mut self, stage: Checkpoint, commands: &Commands<StageCommand>) -> bool {
        let epoch = stage.epoch;
        let accepted = match self.accept(stage) {
            Ok(accepted) => accepted,
            Err(e) => {
                self.post.send(StageEvent::Failed {
                    epoch,
                    reason: e.to_string(),
                });
                return true;
            }
        };
        reached(Point::Staged);
        self.post.send(StageEvent::Staged { epoch });
        match commands.recv() {
            Ok(StageCommand::Discard) => true,
            Err(_) => false,
            Ok(StageCommand::Apply { halt }) => match self.apply(accepted, halt) {
                Ok(cost) => {
                    self.post.send(StageEvent::Applied { epoch, cost });
                    true
                }
                Err(e) => {
                    self.post.send(StageEvent::ApplyFailed {
                        reason: e.to_string(),
                    });
                    false
                }
            },
        }
    }

    /// Parses and checks everything that can be refused (rule 13).
    fn accept(&self, stage: Checkpoint) -> Result<Accepted, StageError> {
        let known = [
            StateKind::Vcpu,
            StateKind::Devices,
            StateKind::Translations,
            StateKind::Pending,
            StateKind::Platform,
        ];
        if let Some(odd) = stage
            .states
            .iter()
            .find(|s| !known.iter().any(|&k| k as u16 == s.kind))
        {
            return Err(StageError::UnknownKind(odd.kind));
        }
        let exactly = |what, kind, expected: usize| {
            let records = stage.of_kind(kind);
            match records.len() {
                found if found == expected => Ok(records),
                found => Err(StageError::Count {
                    what,
                    found,
                    expected,
                }),
            }
        };
        let vcpus = exactly("vCPU", StateKind::Vcpu, self.machine.vcpu_count())?;
        let vcpus = vcpus
            .into_iter()
            .map(VcpuState::from_bytes)
            .collect::<Result<Vec<_>, _>>();
        let vcpus = vcpus.map_err(MachineError::from)?;
        self.machine.check_vcpus(&vcpus)?;
        let platform = exactly("platform", StateKind::Platform, 1)?[0].to_vec();
        self.machine.check_platform(&platform)?;
        let devices = exactly("device", StateKind::Devices, 1)?[0].to_vec();
        self.machine.check_devices(&devices)?;
        let shards = self.machine.workers().len();
        let translations = exactly("translation", StateKind::Translations, shards)?;
        let pending = exactly("pending output", StateKind::Pending, shards)?;
        let shards = translations
            .into_iter()
            .zip(pending)
            .map(|(translations, pending)| {
                Ok(ShardState {
                    translations: translations.to_vec(),
                    pending: pending::from_bytes(pending)?,
                })
            })
            .collect::<Result<Vec<_>, RecordError>>()
            .map_err(MachineError::from)?;
        let records = shards.iter().map(|shard| shard.translations.clone());
        let records: Vec<_> = records.collect();
        on_each(&self.machine, records, |role, _, record| {
            role.check(&record)
        })?;
        Ok(Accepted {
            epoch: stage.epoch,
            vcpus,
            platform,
            devices,
            shards,
            pages: stage.pages,
        })
    }

    fn apply(&mut self, accepted: Accepted, halt: bool) -> Result<ApplyCost, StageError> {
        reached(Point::CommitSent);
        let start = Instant::now();
        let machine = &self.machine;
        if !self.live {
            machine.set_dirty_logging(true)?;
            self.live = true;
        }
        // The worker looks at the rings even while its role stands still; half-written ones make no sense.
        machine.release_queues()?;
        let pages = accepted.pages.numbers.len() as u64;
        write_pages(machine.ram(), &accepted.pages)?;
        machine.restore_vcpus(&accepted.vcpus, ClockJump::SinceStopped)?;
        machine.restore_platform(&accepted.platform, ClockJump::SinceStopped)?;
        machine.restore_devices(&accepted.devices)?;
        let epoch = accepted.epoch;
        on_each(machine, accepted.shards, move |role, edge, shard| {
            role.commit(edge, epoch, &shard.pending, &shard.translations)
        })?;
        // What the apply wrote is what the primary has: the SVM's dirty set starts empty.
        let mut forget = vec![0; machine.ram().bitmap_words()];
        machine.take_dirty(&mut forget)?;
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
        Ok(ApplyCost {
            apply_us: start.elapsed().as_micros() as u64,
            pages,
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

fn write_pages(ram: &GuestRam, pages: &PageSet) -> Result<(), MemoryError> {
    const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
    for (number, data) in pages.iter() {
        ram.write(number * PAGE_BYTES as u64, data.unwrap_or(&ZEROS))?;
    }
    Ok(())
}
