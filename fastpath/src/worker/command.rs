//! How other threads talk to a worker.
//!
//! Invariants: commands are handled in order, at packet boundaries, also while the worker is
//! quiesced; every request that has an answer gets it or an error, never silence.
//!
//! Carries no frames.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use crate::lock::Lock;
use crate::nic::Filter;
use crate::shard::ShardGroup;
use crate::stats::{WorkerSnapshot, WorkerStats};
use crate::vhost_user::GuestRings;

use super::edge::Edge;
use super::port::PortState;
use super::role::Role;

/// The worker thread has ended.
#[derive(Debug, thiserror::Error)]
#[error("the packet worker has ended")]
pub struct WorkerGone;

/// Work done on the worker thread between two batches.
pub type Task = Box<dyn FnOnce(&mut Edge, &mut dyn Role) + Send>;

/// What a worker can be told.
pub enum Command {
    /// The guest's driver is ready.
    Activate(PortState),
    /// The guest reset the device: forget the queues, then answer.
    Deactivate(Sender<()>),
    /// Stop at this packet boundary.
    Halt(Sender<()>),
    /// Halted: take what other workers have for this one, and deliver for them or give back.
    Absorb(Sender<()>),
    /// Stop at this packet boundary and tell where the queues stand.
    Quiesce(Sender<Option<PortState>>),
    /// Go on.
    Resume,
    /// Take over queues as a record has them (`None`: no driver).
    Restore(Option<PortState>, Sender<()>),
    /// Exchange the role.
    SetRole(Box<dyn Role>),
    /// Run something on the worker thread.
    Run(Task),
    /// End the thread.
    Stop,
}

/// Sends commands; cheap to clone. The thread itself is joined by [`WorkerHandle::stop`].
#[derive(Clone, Debug)]
pub struct WorkerHandle {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    stats: Arc<WorkerStats>,
    group: ShardGroup,
    thread: Arc<Lock<Option<JoinHandle<()>>>>,
}

impl WorkerHandle {
    pub(super) fn new(
        commands: Sender<Command>,
        wake: Arc<EventFd>,
        stats: Arc<WorkerStats>,
        group: ShardGroup,
        thread: JoinHandle<()>,
    ) -> Self {
        Self {
            commands,
            wake,
            stats,
            group,
            thread: Arc::new(Lock::new(Some(thread))),
        }
    }

    /// Sends a command without waiting.
    pub fn send(&self, command: Command) -> Result<(), WorkerGone> {
        self.commands.send(command).map_err(|_| WorkerGone)?;
        self.wake.write(1).map_err(|_| WorkerGone)
    }

    /// The guest's driver is ready.
    pub fn activate(&self, queues: PortState) -> Result<(), WorkerGone> {
        self.send(Command::Activate(queues))
    }

    /// Waits until the worker has let go of the queues.
    pub fn deactivate(&self) -> Result<(), WorkerGone> {
        self.ask(Command::Deactivate)
    }

    /// Stops the worker at a packet boundary. Gives the states of the queues, or `None` without a
    /// driver. For one of several shards see [`quiesce_all`](super::quiesce_all).
    pub fn quiesce(&self) -> Result<Option<PortState>, WorkerGone> {
        self.ask(Command::Quiesce)
    }

    /// Lets a quiesced worker go on.
    pub fn resume(&self) -> Result<(), WorkerGone> {
        self.send(Command::Resume)
    }

    /// Replaces the queues, whether quiesced or not, and waits until that is done.
    pub fn restore(&self, queues: Option<PortState>) -> Result<(), WorkerGone> {
        self.ask(|reply| Command::Restore(queues, reply))
    }

    /// Exchanges the role at the next packet boundary.
    pub fn set_role(&self, role: Box<dyn Role>) -> Result<(), WorkerGone> {
        self.send(Command::SetRole(role))
    }

    /// Replaces the NIC's filter and waits for the outcome.
    pub fn set_filter(&self, filter: Filter) -> Result<std::io::Result<()>, WorkerGone> {
        self.execute(move |edge, _| edge.set_filter(filter))
    }

    /// Runs `task` on the worker thread at a packet boundary and gives its result. The role can be
    /// narrowed: `(role as &mut dyn Any).downcast_mut::<MyRole>()`.
    pub fn execute<R: Send + 'static>(
        &self,
        task: impl FnOnce(&mut Edge, &mut dyn Role) -> R + Send + 'static,
    ) -> Result<R, WorkerGone> {
        self.begin(task)?.recv().map_err(|_| WorkerGone)
    }

    /// As [`Self::execute`], but does not wait: the result comes from the channel, which closes without one when the
    /// worker ends.
    pub fn begin<R: Send + 'static>(
        &self,
        task: impl FnOnce(&mut Edge, &mut dyn Role) -> R + Send + 'static,
    ) -> Result<Receiver<R>, WorkerGone> {
        let (reply, answer) = channel();
        self.send(Command::Run(Box::new(move |edge, role| {
            // A caller that no longer waits is no concern of the worker's.
            let _ = reply.send(task(edge, role));
        })))?;
        Ok(answer)
    }

    /// The workers that serve this one's guest.
    pub fn group(&self) -> &ShardGroup {
        &self.group
    }

    /// The counters of this moment.
    pub fn stats(&self) -> WorkerSnapshot {
        self.stats.snapshot()
    }

    /// Ends the thread and waits for it. Later calls do nothing.
    pub fn stop(&self) {
        let _ = self.send(Command::Stop);
        let thread = self.thread.lock().take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the packet worker panicked");
        }
    }

    /// Connects a guest that brings its own memory and waits until it is served.
    pub fn attach_guest(&self, rings: GuestRings) -> Result<(), WorkerGone> {
        self.execute(move |edge, _| edge.attach_guest(rings))
    }

    /// Waits until the worker has let go of such a guest. Gives how far its queues had come, if
    /// they were in service.
    pub fn detach_guest(&self) -> Result<Option<PortState>, WorkerGone> {
        self.execute(|edge, _| edge.detach_guest())
    }

    fn ask<R>(&self, command: impl FnOnce(Sender<R>) -> Command) -> Result<R, WorkerGone> {
        let answer = self.begin_ask(command)?;
        answer.recv().map_err(|_| WorkerGone)
    }

    /// Asks without waiting for the answer.
    pub(super) fn begin_ask<R>(
        &self,
        command: impl FnOnce(Sender<R>) -> Command,
    ) -> Result<Receiver<R>, WorkerGone> {
        let (reply, answer) = channel();
        self.send(command(reply))?;
        Ok(answer)
    }
}

/// The worker's end.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) commands: Receiver<Command>,
    pub(super) wake: Arc<EventFd>,
}
