//! What the control thread has a primary's role do.
//!
//! Each is called between two steps of the worker; those around a checkpoint while the worker is quiesced.

use std::net::Shutdown;
use std::sync::atomic::Ordering;

use colo_compare::DigestKey;

use super::{CutState, PrimaryReport, PrimaryRole};
use crate::clock::now_us;
use crate::link::{DigestReader, PacketLink, PacketMsg};
use crate::pair::on_workers::begin_on_role;
use crate::pair::{Lease, OnWorkers};
use crate::worker::{Edge, WorkerHandle};

impl PrimaryRole {
    /// Takes the packet channel to a joining secondary. Frames go over it from the first cut on.
    pub fn attach(&mut self, edge: &mut Edge, mut link: PacketLink) {
        self.detach(edge);
        self.digests = DigestReader::default();
        self.path
            .set_digest_key(self.digest_key.and_then(DigestKey::new));
        if let Some(key) = self.digest_key {
            link.push(&PacketMsg::DigestKey { key });
        }
        self.link = Some(link);
        self.awake_us = now_us();
    }

    /// Lets go of the packet channel. What is held stays held.
    pub fn detach(&mut self, edge: &mut Edge) {
        // What was decided about one secondary's output or input means nothing to the next.
        self.mirrors = false;
        self.lateness.detached();
        self.reports.forget();
        if let Some(link) = self.link.take() {
            self.past_link.add(&link.stats());
            let _ = link.shutdown(Shutdown::Both);
            link.leave(&mut edge.frames);
        }
    }

    /// Ends the epoch (the worker is quiesced). `first`: comparison begins with the next one. `None` without a
    /// secondary.
    pub fn cut(&mut self, edge: &mut Edge, first: bool) -> Option<CutState> {
        self.link.as_ref()?;
        let now_us = now_us();
        let cut = match first {
            true => self.path.pair_again(now_us, &mut edge.frames),
            false => self.path.cut(now_us),
        };
        self.mirrors |= first;
        let epoch = cut.inspect_err(|e| tracing::error!("{e}")).ok()?;
        let frames = &edge.frames;
        let pending = self
            .path
            .pending()
            .map(|p| frames.bytes(p.token).to_vec())
            .collect();
        let mut translations = Vec::new();
        self.path.export_client_xlate(&mut translations);
        Some(CutState {
            epoch,
            pending,
            translations,
        })
    }

    /// What the cut began is buffered (Remus mode), or compared. After the cut, before the worker goes on. Gives what it
    /// was before.
    pub fn buffer(&mut self, buffering: bool) -> bool {
        let before = self.path.is_buffering();
        self.path.buffer(buffering);
        before
    }

    /// Takes a cut back that another shard could not make. The worker is still quiesced.
    pub fn uncut(&mut self, epoch: u64) {
        if let Err(e) = self.path.uncut(epoch) {
            tracing::error!("{e}");
        }
    }

    /// The checkpoint of `epoch` is committed. Gives the longest time that something which leaves by it was held, in
    /// microseconds (rule 17); 0 if nothing does.
    pub fn commit(&mut self, edge: &mut Edge, epoch: u64) -> u64 {
        self.diverging = false;
        self.lateness.committed(now_us());
        if let Err(e) = self.path.commit(now_us(), &mut edge.frames, epoch) {
            tracing::error!("{e}");
        }
        self.longest_hold_us = 0;
        self.act(edge);
        self.longest_hold_us
    }

    /// The checkpoint of `epoch` failed (rule 14).
    pub fn abort(&mut self, edge: &mut Edge, epoch: u64) {
        if let Err(e) = self.path.abort(now_us(), &mut edge.frames, epoch) {
            // Nothing was cut yet: the order to capture finds no link.
            tracing::debug!("{e}");
        }
        self.act(edge);
    }

    /// The generation is ours alone: everything leaves.
    pub fn go_alone(&mut self, edge: &mut Edge) {
        self.detach(edge);
        // Nobody can take over from a host that stands alone, however long it stood still.
        (self.muted, self.diverging) = (false, false);
        self.path.go_alone(now_us(), &mut edge.frames);
        self.act(edge);
    }

    /// Nothing leaves any more.
    pub fn mute(&mut self) {
        self.muted = true;
        self.path.mute();
    }

    /// What may leave does so again. `gaps` is the last count that the control thread has heard of: the word
    /// of the arbiter on an earlier gap says nothing about a later one, in whichever shard.
    pub fn unmute(&mut self, edge: &mut Edge, gaps: u64) {
        if gaps == self.gaps.load(Ordering::SeqCst) {
            self.muted = false;
            self.path.unmute(now_us(), &mut edge.frames);
            self.act(edge);
        }
    }

    /// Sends what the path already has to send: the output and announcements of a takeover.
    pub fn speak(&mut self, edge: &mut Edge) {
        self.act(edge);
    }

    /// Puts all shards of a VM that was taken over into one epoch, the latest that any of them is in (rule 4): a checkpoint
    /// covers one epoch. Gives it; `None` if one of the workers is gone.
    pub fn begin_in_one_epoch(workers: &[WorkerHandle]) -> Option<u64> {
        let epochs = Self::on_workers(workers, |role, _| role.epoch())?;
        let epoch = epochs.into_iter().max()?;
        Self::on_workers(workers, move |role, _| role.raise_epoch(epoch))?;
        Some(epoch)
    }

    /// See [`PrimaryPath::raise_epoch`](colo_compare::PrimaryPath::raise_epoch).
    pub fn raise_epoch(&mut self, epoch: u64) {
        if let Err(e) = self.path.raise_epoch(epoch) {
            tracing::error!("{e}");
        }
    }

    /// What needs no word of the secondary may leave until then. Workers are not waited for, and woken only if they may
    /// hold something for want of this. `None` if one of these is gone.
    pub fn extend_lease(workers: &[WorkerHandle], lease: &Lease, until_us: u64) -> Option<()> {
        if !lease.set(now_us(), until_us) {
            return Some(());
        }
        let tell = |worker| begin_on_role(worker, Self::heed_and_act).map(drop);
        workers.iter().try_for_each(tell)
    }

    /// Nothing leaves without the secondary's word any more. Waits until all workers know. `None` if one of them is gone.
    pub fn end_lease(workers: &[WorkerHandle], lease: &Lease) -> Option<()> {
        lease.set(now_us(), 0);
        Self::on_workers(workers, Self::heed_and_act).map(drop)
    }

    #[cfg(test)]
    pub(in crate::pair) fn lease_until_us(&self) -> u64 {
        self.lease_until_us
    }

    /// The epoch that input and output belong to now.
    pub fn epoch(&self) -> u64 {
        self.path.epoch()
    }

    /// Counters and times.
    pub fn report(&self) -> PrimaryReport {
        let mut link = self
            .link
            .as_ref()
            .map(PacketLink::stats)
            .unwrap_or_default();
        link.add(&self.past_link);
        PrimaryReport {
            stats: *self.path.stats(),
            hold_us: self.hold_us.clone(),
            link,
        }
    }
}
