//! Several workers for one guest: how they start, stop together and go on.
//!
//! Invariants: a stop is one cut across all of them (rule 4): when it is made, no frame is on its way
//! from one to another, except what nobody has taken from the network yet; what the guest has sent is
//! with its owner, what the guest was given is confirmed.
//!
//! Does not know what the roles make of the cut.

use std::io;
use std::sync::mpsc::{Receiver, Sender};

use crate::nic::Nic;
use crate::shard::{SHARDS_MAX, ShardGroup, crossing_frames, seats};

use super::command::{Command, WorkerGone, WorkerHandle};
use super::port::PortState;
use super::wires::PortWiring;
use super::{Edge, Parts, Prepared, Role, WorkerConfig};

/// Starts one worker per shard, all in the role [`Solo`](super::Solo) and without a driver yet: worker
/// n has NIC n and serves the queue pair of wiring n, all of one guest. Each pool gets as many slots
/// more than its configuration says as may be on their way between shards.
pub fn spawn_shards(
    configs: Vec<WorkerConfig>,
    nics: Vec<Box<dyn Nic>>,
    wirings: Vec<PortWiring>,
) -> io::Result<Vec<WorkerHandle>> {
    let shards = configs.len();
    if shards == 0 || shards > SHARDS_MAX || nics.len() != shards || wirings.len() != shards {
        let text = format!(
            "{shards} workers with {} NICs and {} queue pairs; there must be as many of each, from 1 \
             to {SHARDS_MAX}",
            nics.len(),
            wirings.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    // All pools are in place before the first NIC shows the kernel where they are: one registration covers all of them.
    let mut parts = Vec::with_capacity(shards);
    for ((mut config, nic), wiring) in configs.into_iter().zip(nics).zip(wirings) {
        config.frame_slots += crossing_frames(shards) as u32;
        let area = wiring.ram.area().clone();
        parts.push(Parts::new(config, nic, area, Some(wiring))?);
    }
    let started = parts.into_iter().map(Parts::start);
    let mut prepared = started.collect::<io::Result<Vec<_>>>()?;
    let group = ShardGroup::new(prepared.iter().map(|worker| worker.wake.clone()));
    if shards > 1 {
        let frame_bytes_max = prepared.iter().map(|w| w.edge.frames.frame_bytes_max());
        let seats = seats(&group, frame_bytes_max.max().unwrap_or(0));
        for (worker, seat) in prepared.iter_mut().zip(seats) {
            worker.edge.sit_down(seat);
        }
    }
    let launch = |worker: Prepared| worker.launch(Some(group.clone()));
    let mut workers = Vec::with_capacity(shards);
    for worker in prepared {
        match launch(worker) {
            Ok(worker) => workers.push(worker),
            Err(e) => {
                workers.iter().for_each(WorkerHandle::stop);
                return Err(e);
            }
        }
    }
    Ok(workers)
}

/// Stops all workers of one guest at one cut across them. Gives the states of their queues, each
/// `None` without a driver. The guest stands still.
///
/// A frame for the guest that had not been delivered stays with its owner and belongs to the next
/// epoch. Whoever replaces the guest's state by another forgets it with
/// [`Edge::forget_crossed`](super::Edge::forget_crossed).
pub fn quiesce_all(workers: &[WorkerHandle]) -> Result<Vec<Option<PortState>>, WorkerGone> {
    gather(workers)?;
    all(workers, Command::Quiesce)
}

/// What a worker gives at a stop: the states of its queues, and what was asked for besides.
pub type Quiesced<T> = (Option<PortState>, T);

/// The same; each worker runs `task` as soon as it stands still, and only then is it waited for: where many threads share a
/// processor, every wait costs a turn of all of them.
pub fn quiesce_all_and<T: Send + 'static>(
    workers: &[WorkerHandle],
    task: impl Fn(&mut Edge, &mut dyn Role) -> T + Clone + Send + 'static,
) -> Result<Vec<Quiesced<T>>, WorkerGone> {
    gather(workers)?;
    let begin = |worker: &WorkerHandle| {
        let state = worker.begin_ask(Command::Quiesce)?;
        Ok((state, worker.begin(task.clone())?))
    };
    let answers: Vec<_> = workers.iter().map(begin).collect::<Result<_, _>>()?;
    let finish = |(state, done): (Receiver<_>, Receiver<T>)| {
        // The later one first: then the other is there.
        let done = done.recv().map_err(|_| WorkerGone)?;
        Ok((state.recv().map_err(|_| WorkerGone)?, done))
    };
    answers.into_iter().map(finish).collect()
}

/// Brings what is between several workers to its owners; they halt.
fn gather(workers: &[WorkerHandle]) -> Result<(), WorkerGone> {
    if workers.len() > 1 {
        all(workers, Command::Halt)?;
        all(workers, Command::Absorb)?;
    }
    Ok(())
}

/// Lets all go on.
pub fn resume_all(workers: &[WorkerHandle]) -> Result<(), WorkerGone> {
    workers.iter().try_for_each(WorkerHandle::resume)
}

/// Sets how many of its queue pairs the guest uses, and waits until every worker heeds it: nothing is
/// delivered to the others any more (virtio 1.3 section 5.1.6.5.6.2). Not from a worker's own thread;
/// [`ShardGroup::set_active_pairs`] does not wait.
pub fn set_active_pairs(workers: &[WorkerHandle], pairs: usize) -> Result<(), WorkerGone> {
    let Some(first) = workers.first() else {
        return Ok(());
    };
    first.group().set_active_pairs(pairs);
    // Between two batches each looks anew.
    all(workers, |reply| {
        Command::Run(Box::new(move |edge, _| {
            edge.look();
            let _ = reply.send(());
        }))
    })?;
    Ok(())
}

/// Tells all, then waits for all.
fn all<R>(
    workers: &[WorkerHandle],
    command: impl Fn(Sender<R>) -> Command,
) -> Result<Vec<R>, WorkerGone> {
    let answers: Vec<_> = workers
        .iter()
        .map(|worker| worker.begin_ask(&command))
        .collect::<Result<_, _>>()?;
    let answers = answers.into_iter().map(|answer| answer.recv());
    answers.collect::<Result<_, _>>().map_err(|_| WorkerGone)
}
