//! Tasks for roles, from the control thread.
//!
//! Invariants: a task runs on the thread that owns the role; all workers are told before any is waited for.

use std::any::Any;
use std::sync::mpsc::Receiver;

use crate::worker::{Edge, Quiesced, Role, WorkerGone, WorkerHandle, quiesce_all_and};

/// Runs tasks on the threads of workers whose role is `Self`.
pub trait OnWorkers: Role + Sized {
    /// Runs `task` on the worker's thread; `None` if the worker is gone or in another role.
    fn on_worker<T: Send + 'static>(
        worker: &WorkerHandle,
        task: impl FnOnce(&mut Self, &mut Edge) -> T + Send + 'static,
    ) -> Option<T> {
        begin_on_role(worker, task)?.recv().ok().flatten()
    }

    /// Runs `task` on all workers' threads at the same time, and waits for all; `None` if one of them is gone or in
    /// another role: the others have done it then.
    fn on_workers<T: Send + 'static>(
        workers: &[WorkerHandle],
        task: impl Fn(&mut Self, &mut Edge) -> T + Clone + Send + 'static,
    ) -> Option<Vec<T>> {
        let no_items = std::iter::repeat(());
        Self::on_each(workers, no_items, move |role, edge, ()| task(role, edge))
    }

    /// As [`Self::on_workers`], with an item for each.
    fn on_each<I: Send + 'static, T: Send + 'static>(
        workers: &[WorkerHandle],
        items: impl IntoIterator<Item = I>,
        task: impl Fn(&mut Self, &mut Edge, I) -> T + Clone + Send + 'static,
    ) -> Option<Vec<T>> {
        let begin = |(worker, item)| {
            let task = task.clone();
            begin_on_role(worker, move |role, edge| task(role, edge, item))
        };
        let answers: Vec<_> = workers.iter().zip(items).map(begin).collect();
        let results: Vec<_> = answers
            .into_iter()
            .map(|answer| answer?.recv().ok().flatten())
            .collect();
        results.into_iter().collect()
    }

    /// Stops all workers at one cut across them and runs `task` there, all in one order to each. Gives the states of the
    /// queues, and what `task` gave where a worker is in this role.
    fn on_quiesced<T: Send + 'static>(
        workers: &[WorkerHandle],
        task: impl Fn(&mut Self, &mut Edge) -> T + Clone + Send + 'static,
    ) -> Result<Vec<Quiesced<Option<T>>>, WorkerGone> {
        quiesce_all_and(workers, move |edge, role| {
            let role: &mut dyn Any = role;
            role.downcast_mut::<Self>().map(|role| task(role, edge))
        })
    }
}

impl<R: Role> OnWorkers for R {}

/// Tells the worker, and gives where the answer arrives: `None` in it if the role is no `R`.
pub(super) fn begin_on_role<R: Role, T: Send + 'static>(
    worker: &WorkerHandle,
    task: impl FnOnce(&mut R, &mut Edge) -> T + Send + 'static,
) -> Option<Receiver<Option<T>>> {
    let begun = worker.begin(move |edge, role| {
        let role: &mut dyn Any = role;
        role.downcast_mut::<R>().map(|role| task(role, edge))
    });
    begun.ok()
}
