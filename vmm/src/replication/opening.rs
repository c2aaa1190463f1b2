//! Packet channels are opened on a thread of their own: sockets are bound to memory that the kernel pins, queues are
//! waited for until it has let go of them, an XDP program is attached. All that can take longer than a peer is silent.
//!
//! Invariants: asking never waits; channels are opened for one session after the other, and those of a session that is
//! over are closed before the next one's are opened.
//!
//! Does not know what goes over the channels.

use std::io;
use std::net::TcpStream;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use colo_fastpath::link::{
    LinkEnd, LinkKeys, PacketLink, Packets, PeerHeard, PoolMemory, Ports, open_all_ports,
};
use colo_fastpath::mailbox::{Mailbox, Post};
use colo_fastpath::worker::WorkerHandle;

use super::host::random_number;
use crate::machine::Machine;

/// All that it takes to open the packet channels of a session.
#[derive(Clone)]
pub(super) struct LinkOpening {
    pub(super) machine: Arc<Machine>,
    pub(super) packets: Packets,
    /// How long the peer may be silent on one.
    pub(super) patience_us: u64,
    pub(super) heard: PeerHeard,
}

impl LinkOpening {
    /// The packet channels of all shards over their connections, with the datagram transports that this host has for
    /// them.
    pub(super) fn open(&self, streams: Vec<TcpStream>) -> io::Result<Vec<PacketLink>> {
        let workers = self.machine.workers();
        if streams.len() != workers.len() {
            let (theirs, ours) = (streams.len(), workers.len());
            return Err(io::Error::other(format!(
                "host.shards: {theirs} packet channels for {ours} shards; give both hosts the same number"
            )));
        }
        let pools = workers.iter().map(pool_of).collect::<Vec<_>>();
        let ends = streams.iter().zip(pools);
        let ends: Vec<_> = ends
            .map(|(stream, pool)| LinkEnd { stream, pool })
            .collect();
        let share = |shard: usize, name: String| {
            let worker: &WorkerHandle = workers.get(shard)?;
            worker.execute(move |edge, _| edge.share_nic(&name)).ok()?
        };
        let ports = open_all_ports(&ends, self.packets, share);
        let keys = LinkKeys::new(random_number().map_err(io::Error::other)?, workers.len());
        let links = streams.into_iter().zip(ports).enumerate();
        links
            .map(|(shard, (stream, ports))| self.open_one(stream, ports, keys, shard))
            .collect()
    }

    fn open_one(
        &self,
        stream: TcpStream,
        ports: Ports,
        keys: LinkKeys,
        shard: usize,
    ) -> io::Result<PacketLink> {
        let key = keys.of(shard);
        let link = PacketLink::with_ports(stream, ports.list, key, self.patience_us)?;
        let link = link.without(ports.refused).beside(self.heard.clone());
        Ok(match self.machine.workers().len() {
            1 => link,
            _ => link.among(keys, shard),
        })
    }
}

fn pool_of(worker: &WorkerHandle) -> Option<PoolMemory> {
    worker.execute(|edge, _| PoolMemory::of(&edge.frames)).ok()
}

/// A thread that opens what it is asked for.
pub(super) struct Opener<T> {
    jobs: Option<Sender<(u64, Vec<TcpStream>)>>,
    opened: Mailbox<(u64, io::Result<T>)>,
    /// The number of what is wanted; others are nobody's.
    wanted: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Opener<T> {
    /// Starts the thread. It ends with this value, when what it is at is open.
    pub(super) fn start(
        open: impl FnMut(Vec<TcpStream>) -> io::Result<T> + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, receiver) = channel();
        let (post, opened) = Mailbox::new()?;
        let wanted = Arc::new(AtomicU64::new(0));
        let theirs = wanted.clone();
        let thread = thread::Builder::new()
            .name("packet-channels".to_owned())
            .spawn(move || serve(open, &receiver, &post, &theirs))?;
        Ok(Self {
            jobs: Some(jobs),
            opened,
            wanted,
            thread: Some(thread),
        })
    }

    /// Has the channels of a session opened. What was asked for before is not wanted any more.
    pub(super) fn ask(&self, streams: Vec<TcpStream>) {
        let number = self.wanted.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some(jobs) = &self.jobs
            && jobs.send((number, streams)).is_err()
        {
            tracing::error!("the thread that opens packet channels has ended");
        }
    }

    /// The session is over: what was asked for is not wanted any more.
    pub(super) fn forget(&self) {
        self.wanted.fetch_add(1, Ordering::Relaxed);
    }

    /// Becomes readable when something is open.
    pub(super) fn poll_fd(&self) -> RawFd {
        self.opened.poll_fd()
    }

    /// What was asked for last, if it is open now.
    pub(super) fn try_next(&self) -> Option<io::Result<T>> {
        while let Some((number, opened)) = self.opened.try_next() {
            if number == self.wanted.load(Ordering::Relaxed) {
                return Some(opened);
            }
        }
        None
    }
}

impl<T> Drop for Opener<T> {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve<T>(
    mut open: impl FnMut(Vec<TcpStream>) -> io::Result<T>,
    jobs: &Receiver<(u64, Vec<TcpStream>)>,
    post: &Post<(u64, io::Result<T>)>,
    wanted: &AtomicU64,
) {
    for (number, streams) in jobs {
        let is_wanted = || wanted.load(Ordering::Relaxed) == number;
        if is_wanted() {
            let opened = open(streams);
            if is_wanted() {
                post.send((number, opened));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    fn next<T: Send + 'static>(opener: &Opener<T>) -> T {
        loop {
            if let Some(opened) = opener.try_next() {
                return opened.unwrap();
            }
            thread::yield_now();
        }
    }

    #[test]
    fn nobody_waits_for_what_takes_long_and_what_is_over_is_dropped_before_the_next() {
        let (begin, begun) = sync_channel(0);
        let (let_go, gate) = sync_channel(0);
        let alive = Arc::new(());
        let theirs = alive.clone();
        let mut count = 0;
        let opener = Opener::start(move |streams| {
            assert!(streams.is_empty());
            count += 1;
            begin.send(Arc::strong_count(&theirs)).unwrap();
            gate.recv().unwrap();
            Ok((count, theirs.clone()))
        })
        .unwrap();
        opener.ask(Vec::new());
        // It is in the middle of opening, and nobody waits for that.
        assert_eq!(begun.recv().unwrap(), 2);
        assert!(opener.try_next().is_none());
        opener.forget();
        opener.ask(Vec::new());
        let_go.send(()).unwrap();
        assert_eq!(begun.recv().unwrap(), 2, "the first one's was dropped");
        let_go.send(()).unwrap();
        assert_eq!(next(&opener).0, 2);
        // Asked for and over before its turn.
        opener.ask(Vec::new());
        begun.recv().unwrap();
        opener.ask(Vec::new());
        opener.forget();
        let_go.send(()).unwrap();
        drop(opener);
        assert_eq!(Arc::strong_count(&alive), 1);
    }

    #[test]
    fn what_is_over_by_the_time_it_is_looked_at_is_not_given_out() {
        let opener = Opener::start(|_| Ok(())).unwrap();
        opener.ask(Vec::new());
        let mut fd = libc::pollfd {
            fd: opener.poll_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd.
        assert_eq!(unsafe { libc::poll(&raw mut fd, 1, 30_000) }, 1);
        opener.forget();
        assert!(opener.try_next().is_none());
    }
}
