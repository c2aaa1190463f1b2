//! Snapshots for a thread that has more to do than to wait for a disk.
//!
//! Invariants: one at a time is brought to the disk, others are refused meanwhile; one that was begun is finished before this
//! goes away.
//!
//! Does not let the guest run while pages are written to the page cache.

use std::path::Path;
use std::thread::JoinHandle;

use super::error::SnapshotError;
use super::take::{SnapshotReport, answer};
use crate::requests::{Order, Request};

/// Where snapshots are finished.
#[derive(Debug, Default)]
pub struct Background {
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// Carries a request out, by `begin` ([`super::begin`]) here and by what that gives on a thread of its own.
    pub fn serve<F>(
        &mut self,
        request: Request,
        begin: impl FnOnce(&Path) -> Result<F, SnapshotError>,
    ) where
        F: FnOnce() -> Result<SnapshotReport, SnapshotError> + Send + 'static,
    {
        if self
            .thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
        {
            return request.refuse("another snapshot is being written to disk; try again");
        }
        let Order::Snapshot(path) = request.order.clone();
        match begin(&path) {
            Ok(finish) => {
                let run = move || answer(request, &path, finish());
                let builder = std::thread::Builder::new().name("snapshot".to_owned());
                let spawned = builder.spawn(run);
                // The request has its answer when it is dropped.
                let spawned =
                    spawned.inspect_err(|e| tracing::warn!("no thread for a snapshot: {e}"));
                self.thread = spawned.ok();
            }
            Err(e) => answer(request, &path, Err(e)),
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;
    use crate::requests::{AskError, RequestSocket, ask_for_snapshot};

    /// A request, and the thread that waits for its answer.
    fn request(
        socket: &RequestSocket,
        status: &Path,
    ) -> (Request, JoinHandle<Result<SnapshotReport, AskError>>) {
        let status = status.to_owned();
        let client = std::thread::spawn(move || ask_for_snapshot(&status, Path::new("/x")));
        loop {
            match socket.next() {
                Some(request) => return (request, client),
                None => std::thread::yield_now(),
            }
        }
    }

    #[test]
    fn the_disk_is_not_waited_for_and_a_second_snapshot_refused_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let status = dir.path().join("vm.sock");
        let socket = RequestSocket::bind(&status).unwrap();
        let mut background = Background::default();
        let (on_disk, disk) = channel();
        let (first, answered) = request(&socket, &status);
        background.serve(first, |_| {
            Ok(move || {
                let total_us = disk.recv_timeout(Duration::from_secs(30)).unwrap_or(0);
                Ok(SnapshotReport {
                    total_us,
                    ..SnapshotReport::default()
                })
            })
        });
        let (second, refused) = request(&socket, &status);
        let unreachable: fn() -> Result<SnapshotReport, SnapshotError> = || unreachable!();
        background.serve(second, |_| Ok(unreachable));
        let refusal = refused.join().unwrap().unwrap_err().to_string();
        assert!(refusal.contains("another snapshot"), "{refusal}");
        on_disk.send(7).unwrap();
        drop(background);
        assert_eq!(answered.join().unwrap().unwrap().total_us, 7);
    }
}
