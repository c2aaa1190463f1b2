//! Puts a NIC to use: program, sockets, probe, filter, in this order.
//!
//! Invariants: nothing of the guest gets through before the filter says so; after an error nothing
//! is bound or attached.
//!
//! Does not watch what becomes of it.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use colo_bpf::{Attach, Groups, GuestFrames, XdpProgram};
use tracing::{info, warn};

use super::common::Attachment;
use super::copies::Copies;
use super::membership::Membership;
use super::queue::{Queue, Use};
use super::watch::{Seen, Watch};
use super::{Memory, XdpNic, XdpNicError, XdpNicMode, enough_queues};
use crate::frame::{FramePool, LINK_HEADER_MAX};
use crate::nic::{Filter, Nic};
use crate::ring::xsk::{BindOptions, Interface, Umem, UmemSettings, XskError, XskSocket};

/// How long the kernel may take to let go of a queue whose socket was closed.
const BUSY_MAX: Duration = Duration::from_secs(2);
/// Entries of each ring.
const RING_ENTRIES: u32 = 2048;

impl XdpNic {
    /// Puts the NIC to use. On an error nothing is bound or attached.
    pub(super) fn bring_up(&mut self, frames: &mut FramePool) -> Result<(), XdpNicError> {
        let up = self.prepare(frames).and_then(|()| match self.shard {
            0 => self.try_modes(frames),
            _ => self.follow(frames, BUSY_MAX),
        });
        if up.is_err() {
            self.close_queues(frames);
            self.common.control().program.detach();
        }
        up
    }

    /// Shows the kernel the memory.
    fn prepare(&mut self, frames: &mut FramePool) -> Result<(), XdpNicError> {
        self.uses = (0..frames.free_slots()).map(|_| Use::default()).collect();
        let whole = register(frames, 0, frames.area().mapped_bytes())?;
        self.memory = Some(Memory {
            whole,
            slots: None,
            slots_at: frames.slots_place().0 as u64,
        });
        Ok(())
    }

    fn try_modes(&mut self, frames: &mut FramePool) -> Result<(), XdpNicError> {
        let seen = Seen::of(&self.config.interface)?;
        self.has_link = seen.has_link;
        self.common.set_link(seen.has_link);
        self.set_host_addresses(&seen.addresses)?;
        let mut reasons = Vec::new();
        let mut refused = None;
        for mode in self.config.mode.candidates() {
            match self.open_queues(frames, mode, BUSY_MAX) {
                Ok(()) => {
                    refused = None;
                    break;
                }
                Err(e) if e.is_about_mode() => {
                    reasons.push(e.to_string());
                    refused = Some(e);
                }
                Err(e) => return Err(e),
            }
        }
        if let Some(e) = refused {
            return Err(e);
        }
        let watch = Watch::start(&self.config.interface, seen);
        self.watch = Some(watch.map_err(|source| XdpNicError::Watch {
            interface: self.config.interface.clone(),
            source,
        })?);
        let (name, how) = (&self.config.interface, self.describe());
        if self.interface.strips_tags().unwrap_or(false) {
            info!(
                "{name}: if the guest uses VLANs, leave it their tags: ethtool -K {name} rxvlan off"
            );
        }
        match reasons.last() {
            None => info!("{name}: {how}"),
            Some(reason) => info!("{name}: {how}; nothing better, because {reason}"),
        }
        Ok(())
    }

    /// Attaches the program and binds every queue. On an error nothing is bound.
    pub(super) fn open_queues(
        &mut self,
        frames: &mut FramePool,
        mode: XdpNicMode,
        patience: Duration,
    ) -> Result<(), XdpNicError> {
        self.abilities = self.config.abilities.in_mode(mode);
        let opened = self.try_queues(frames, mode, patience);
        if opened.is_err() {
            self.close_queues(frames);
        } else {
            self.mode = mode;
            // The kernel has let go of the last sockets on these queues.
            self.unpark(frames);
        }
        opened
    }

    fn try_queues(
        &mut self,
        frames: &mut FramePool,
        mode: XdpNicMode,
        patience: Duration,
    ) -> Result<(), XdpNicError> {
        let name = &self.config.interface;
        self.interface = Interface::find(name)?;
        let (index, queues) = (self.interface.index(), self.interface.rx_queues()?);
        enough_queues(name, queues, self.common.shards())?;
        self.common.release();
        let promiscuous = matches!(self.common.filter(), Filter::Open);
        let mut control = self.common.control();
        control.program.detach();
        // Rule 24: nothing of the guest gets through before the filter says so.
        control.program.set_guest_frames(GuestFrames::Drop)?;
        control.program.attach(name, Attach::Only(mode.attach()))?;
        let joined = Membership::join(index, &control.macs, promiscuous);
        control.membership = Some(joined.map_err(|source| self.address_error(source))?);
        drop(control);
        if self.config.groups == Groups::Copied {
            let copies = Copies::open(index, self.config.mtu);
            self.copies = Some(copies.map_err(|source| self.address_error(source))?);
        }
        self.open_share(frames, queues, mode, patience)?;
        let attachment = self.common.attached(Attachment {
            number: 0,
            index,
            mode,
            abilities: self.abilities,
            queues,
        });
        self.settle_on(frames, attachment)
    }

    /// Binds this end's queues under what the first end has attached, if it has.
    pub(super) fn follow(
        &mut self,
        frames: &mut FramePool,
        patience: Duration,
    ) -> Result<(), XdpNicError> {
        let Some(attachment) = self.common.attachment() else {
            return Ok(());
        };
        self.interface = Interface::find(&self.config.interface)?;
        if self.interface.index() != attachment.index {
            // The first end will see it, too.
            return Ok(());
        }
        (self.mode, self.abilities) = (attachment.mode, attachment.abilities);
        self.has_link = self.common.has_link();
        self.open_share(frames, attachment.queues, attachment.mode, patience)?;
        self.unpark(frames);
        self.settle_on(frames, attachment)
    }

    fn settle_on(
        &mut self,
        frames: &mut FramePool,
        attachment: Attachment,
    ) -> Result<(), XdpNicError> {
        self.attachment = Some(attachment);
        let ready = self.common.ready(self.shard, &attachment);
        // What came while the probe ran is not the guest's.
        self.throw_away(frames);
        ready
    }

    /// Binds what this end does not have yet of its share of `queues`.
    pub(super) fn open_share(
        &mut self,
        frames: &mut FramePool,
        queues: u32,
        mode: XdpNicMode,
        patience: Duration,
    ) -> Result<(), XdpNicError> {
        let shards = self.common.shards();
        let share = (self.shard..queues).step_by(shards as usize);
        let count = share.len() as u32;
        for queue in share.skip(self.queues.len()) {
            self.open_queue(frames, queue, count, mode, patience)?;
        }
        if let Err(e) = self.open_link_sockets() {
            warn!("{}: without the link's packets: {e}", self.config.interface);
            self.end_share(frames);
        }
        Ok(())
    }

    /// Binds one of `queues` of this end.
    pub(super) fn open_queue(
        &mut self,
        frames: &mut FramePool,
        queue: u32,
        queues: u32,
        mode: XdpNicMode,
        patience: Duration,
    ) -> Result<(), XdpNicError> {
        let Some((umem, base)) = self.memory_for(frames, queue)? else {
            return Ok(());
        };
        // Half of the slots are for what comes, what the link may have among it, the others for what goes.
        let coming = self.uses.len() / 2 - self.uses.len() / super::link::SHARE;
        let target = coming / queues.max(1) as usize;
        if target == 0 {
            return Err(XdpNicError::FewSlots {
                interface: self.config.interface.clone(),
                slots: self.uses.len(),
                queues,
            });
        }
        let target = RING_ENTRIES.min(target as u32);
        let mut options = BindOptions {
            copy_mode: mode.copy(),
            multi_buffer: self.abilities.multi_buffer,
            // The link's frames need chunks, too, which the guest's rx ring, full, must not hold.
            fill_entries: 2 * RING_ENTRIES,
            completion_entries: RING_ENTRIES,
            rx_entries: 1 << target.ilog2(),
            tx_entries: RING_ENTRIES,
            ..BindOptions::default()
        };
        let frame_bytes = u32::from(self.config.mtu) + LINK_HEADER_MAX as u32;
        let fits_one = frame_bytes <= umem.received_bytes_max();
        let long_frames = || XdpNicError::LongFrames {
            interface: self.config.interface.clone(),
            wanted: self.config.mtu,
            max: umem.received_bytes_max() - LINK_HEADER_MAX as u32,
        };
        if !options.multi_buffer && !fits_one {
            return Err(long_frames());
        }
        let mut bound = bind(&umem, &self.interface, queue, &options, patience);
        if let Err(XskError::NoMultiBuffer { .. } | XskError::NoZeroCopy { .. }) = &bound
            && options.multi_buffer
            && queue == 0
            && fits_one
        {
            options.multi_buffer = false;
            bound = bind(&umem, &self.interface, queue, &options, patience);
            self.abilities.multi_buffer = bound.is_err();
        }
        if let Err(XskError::NoMultiBuffer { .. }) = bound {
            return Err(long_frames());
        }
        let socket = bound?;
        let set = |program: &mut XdpProgram| program.set_guest_socket(queue, socket.as_fd());
        set(&mut self.common.control().program)?;
        // All frames leave by the first.
        let sends = match self.queues.is_empty() {
            true => self.uses.len(),
            false => 0,
        };
        let mut opened = Queue::new(socket, base, target, sends);
        let filled = opened.refill(frames, &mut self.uses, 0);
        self.queues.push(opened);
        filled.map_err(|source| self.address_error(source))
    }

    /// The memory that a queue uses, and where that starts in the area.
    fn memory_for(
        &mut self,
        frames: &FramePool,
        queue: u32,
    ) -> Result<Option<(Umem, u64)>, XdpNicError> {
        let Some(memory) = &mut self.memory else {
            return Ok(None);
        };
        if queue == self.shard {
            return Ok(Some((memory.whole.clone(), 0)));
        }
        let slots = match &memory.slots {
            Some(slots) => slots.clone(),
            None => {
                let (at, bytes) = frames.slots_place();
                let slots = register(frames, at, bytes)?;
                memory.slots.insert(slots).clone()
            }
        };
        Ok(Some((slots, memory.slots_at)))
    }
}

/// Registers `bytes` of the pool's area from offset `at` on, cut so that no slot is written beyond
/// its end.
fn register(frames: &FramePool, at: usize, bytes: usize) -> Result<Umem, XdpNicError> {
    let slot_bytes = frames.slot_bytes();
    let chunk_bytes = match slot_bytes {
        4096.. => 4096,
        2048.. => 2048,
        _ => return Err(XdpNicError::SmallSlots(slot_bytes)),
    };
    let settings = UmemSettings {
        chunk_bytes,
        ..UmemSettings::default()
    };
    let area = frames.area();
    let bytes = bytes.min(area.mapped_bytes().saturating_sub(at)) as u64;
    let base = NonNull::new(area.base().wrapping_add(at));
    let base = base.ok_or(XdpNicError::SmallSlots(0))?;
    // SAFETY: the area keeps everything mapped as long as it lives, and it is the owner. Only slots
    // that the pool has lent go into a fill ring, and to those nobody has a reference.
    Ok(unsafe { Umem::register(base, bytes, settings, Box::new(area.clone())) }?)
}

/// Binds as soon as the kernel has let go of the queue's last socket.
fn bind(
    umem: &Umem,
    interface: &Interface,
    queue: u32,
    options: &BindOptions,
    patience: Duration,
) -> Result<XskSocket, XskError> {
    let begun = Instant::now();
    loop {
        match XskSocket::bind(umem, interface, queue, options) {
            Err(XskError::Busy { .. }) if begun.elapsed() < patience => {
                // Nothing tells when: the kernel does it in a work queue.
                std::thread::sleep(Duration::from_millis(1));
            }
            done => return done,
        }
    }
}
