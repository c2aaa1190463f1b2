//! The guest's network queues as the worker sees them.
//!
//! Invariants: a receive buffer is taken only when a frame goes into it; a transmit buffer is
//! completed as soon as it is copied, or when the frame that stayed in it comes back
//! ([`GuestPort::complete`]); once all have, no queue has a chain in flight (rule 12). A queue that
//! breaks its rules is shut and the guest asked for a reset.
//!
//! Does not know where frames come from or go to.

mod deliver;
mod take;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use colo_compare::Token;
use tracing::warn;

use crate::clock::now_us;
use crate::frame::{Buffer, FramePool};
use crate::log_budget::LogBudget;
use crate::net_offer::NetOffer;
use crate::ring::{Call, Chain, GuestRam, QueueState, RingError, Virtqueue};
use crate::stats::WorkerStats;
use crate::vhost_user::GuestRings;

use super::front::Front;
use super::merge::Merge;
use super::verify::checksum_holds;
use super::wires::{PortWiring, Wires};

use deliver::deliver;
use take::{Out, Taken, take};

pub use deliver::Delivery;
pub(super) use deliver::{header_of, scatter};
pub use take::Stays;

/// Bytes of `virtio_net_hdr` in front of every frame (`VIRTIO_F_VERSION_1`).
pub const NET_HEADER_BYTES: usize = 12;

/// Shortest frame: an Ethernet header.
const FRAME_MIN: usize = 14;

/// The states of both queues: guest_rx, then guest_tx.
pub type PortState = [QueueState; 2];

#[derive(Debug)]
struct Queues {
    guest_rx: Virtqueue,
    guest_tx: Virtqueue,
    /// A frame for the guest may take several buffers.
    mergeable: bool,
    /// The guest may ask for checksums.
    checksum: bool,
    /// The guest is told of checksums that hold.
    verified: bool,
}

/// Queues in service, and the memory they are in.
#[derive(Debug)]
struct Service {
    ram: Arc<GuestRam>,
    queues: Queues,
}

/// Both queues of a network device.
#[derive(Debug)]
pub struct GuestPort {
    /// `None`: nobody is connected.
    wires: Option<Wires>,
    service: Option<Service>,
    /// Counts activations: a buffer of an earlier life is nobody's.
    life: u32,
    chain: Chain,
    merge: Merge,
    /// Longest frame for the guest.
    frame_max: usize,
    /// What [`Self::has_room`] said last.
    lacked_room: bool,
    /// Of broken queues.
    log: LogBudget,
    stats: Arc<WorkerStats>,
}

impl GuestPort {
    /// A port without a driver; without a wiring, one that nobody is connected to.
    pub fn new(wiring: Option<PortWiring>, stats: Arc<WorkerStats>) -> Self {
        Self {
            wires: wiring.map(Wires::from),
            service: None,
            life: 0,
            chain: Chain::default(),
            merge: Merge::default(),
            frame_max: 0,
            lacked_room: false,
            log: LogBudget::default(),
            stats,
        }
    }

    /// Sets how long frames for the guest are at most.
    pub(super) fn set_frame_max(&mut self, frame_max: usize) {
        self.frame_max = frame_max;
        self.merge = Merge::for_bytes(NET_HEADER_BYTES + frame_max);
    }

    /// Connects a guest that brings its own memory, and serves its queues.
    pub fn attach(&mut self, rings: GuestRings) {
        let call = Arc::new(Call::of_queues(rings.calls, rings.errors));
        self.wires = Some(Wires::per_queue(rings.ram, call, rings.kicks));
        self.activate(rings.queues);
        self.poll_mode();
    }

    /// Lets go of such a guest and of its memory. Gives how far its queues had come.
    pub fn detach(&mut self) -> Option<PortState> {
        let state = self.deactivate();
        self.wires = None;
        state
    }

    /// Starts to serve the queues. Nothing is written to the guest's memory yet: [`Self::poll_mode`] does that.
    pub fn activate(&mut self, state: PortState) {
        let [guest_rx, guest_tx] = state;
        self.life = self.life.wrapping_add(1);
        let Some(wires) = &self.wires else {
            return;
        };
        let ram = wires.ram.clone();
        let queues = Virtqueue::new(ram.clone(), guest_rx).and_then(|guest_rx| {
            let guest_tx = Virtqueue::new(ram.clone(), guest_tx)?;
            Ok(Queues {
                mergeable: guest_rx.device_features() & NetOffer::MERGEABLE != 0,
                checksum: guest_tx.device_features() & NetOffer::CHECKSUM != 0,
                verified: guest_rx.device_features() & NetOffer::GUEST_CHECKSUM != 0,
                guest_rx,
                guest_tx,
            })
        });
        match queues {
            Ok(queues) => self.service = Some(Service { ram, queues }),
            Err(e) => self.fault(&e),
        }
    }

    /// Stops serving the queues and gives their states, if they were served.
    pub fn deactivate(&mut self) -> Option<PortState> {
        let state = self.state();
        self.service = None;
        state
    }

    /// Where the queues stand.
    pub fn state(&mut self) -> Option<PortState> {
        self.flush();
        let queues = self.service.as_ref().map(|service| &service.queues);
        queues.map(|q| [q.guest_rx.state(), q.guest_tx.state()])
    }

    /// Whether a driver is there.
    pub fn is_active(&self) -> bool {
        self.service.is_some()
    }

    /// Whether the guest has room for the longest frame, or all the room that it can ever have.
    pub fn has_room(&mut self) -> bool {
        let need = NET_HEADER_BYTES + self.frame_max;
        let Some(service) = &mut self.service else {
            return false;
        };
        let room = match service.queues.mergeable {
            true => self
                .merge
                .has_room(&mut service.queues.guest_rx, &mut self.chain, need),
            false => service.queues.guest_rx.has_available(),
        };
        let has_room = room.unwrap_or_else(|e| {
            self.fault(&e);
            false
        });
        self.lacked_room = !has_room;
        has_room
    }

    /// Whether the guest has something to send.
    pub fn has_output(&mut self) -> bool {
        self.on_queues(|q, _, _| q.guest_tx.has_available())
            .unwrap_or(false)
    }

    /// Transmit buffers that frames may keep: the others stay free for what the guest sends next.
    pub fn in_place_max(&self) -> usize {
        let queues = self.service.as_ref().map(|service| &service.queues);
        let size = queues.map_or(0, |queues| queues.guest_tx.size());
        usize::from(size / 2)
    }

    /// Puts a frame into the guest's receive queue.
    pub fn deliver(&mut self, frame: &[u8]) -> Delivery {
        let Some(service) = &mut self.service else {
            return Delivery::NoRoom;
        };
        let (queue, chain, ram) = (&mut service.queues.guest_rx, &mut self.chain, &service.ram);
        let verified = service.queues.verified && checksum_holds(frame);
        let done = match service.queues.mergeable {
            true => self.merge.deliver(queue, chain, ram, frame, verified),
            false => deliver(queue, chain, ram, frame, verified),
        };
        let delivery = done.unwrap_or_else(|e| {
            self.fault(&e);
            Delivery::NoRoom
        });
        match delivery {
            Delivery::Done => {
                self.stats.guest_rx_frames.add(1);
                self.stats.guest_rx_bytes.add(frame.len() as u64);
            }
            Delivery::TooSmall => self.stats.guest_rx_too_small.add(1),
            Delivery::NoRoom => {}
        }
        delivery
    }

    /// Takes the next frame of the guest's transmit queue: in place as far as `stays` says, as a copy if it is
    /// short or scattered. `None` when nothing (good) is waiting, or after as many bad ones as the queue has entries: a
    /// guest that never stops making them keeps no worker to itself (invariant 7). `frames` has a free slot.
    pub fn take(
        &mut self,
        frames: &mut FramePool,
        frame_max: usize,
        stays: Stays,
    ) -> Option<Token> {
        let life = self.life;
        let max = frame_max.min(frames.frame_bytes_max());
        let mut bad = 0;
        loop {
            let taken = self.on_queues(|q, chain, ram| {
                if bad >= q.guest_tx.size() {
                    return Ok(Taken::Nothing);
                }
                let out = Out {
                    frames: &mut *frames,
                    max,
                    life,
                    stays,
                };
                take(q, chain, ram, out)
            });
            match taken? {
                Taken::Nothing => return None,
                Taken::Bad => {
                    bad += 1;
                    self.stats.guest_tx_bad.add(1);
                }
                Taken::Frame(token, len, copied) => {
                    self.stats.guest_tx_frames.add(1);
                    self.stats.guest_tx_bytes.add(len as u64);
                    if let Some(cause) = copied {
                        self.stats.count_copied(cause, len as u64);
                    }
                    return Some(token);
                }
            }
        }
    }

    /// The frames of up to `frame_max` bytes at the front of the transmit queue; `None` when nothing waits.
    #[inline]
    pub(crate) fn front(&mut self, frame_max: usize) -> Option<Front<'_>> {
        let service = self.service.as_mut()?;
        let length = FRAME_MIN..=frame_max;
        let queue = &mut service.queues.guest_tx;
        Front::of(queue, self.life, &service.ram, &self.stats, length)
    }

    /// Gives transmit buffers back to the guest, out of order if need be.
    pub fn complete(&mut self, buffers: &[Buffer]) {
        let life = self.life;
        self.on_queues(|q, _, _| {
            let mut own = buffers.iter().filter(|buffer| buffer.life == life);
            own.try_for_each(|buffer| q.guest_tx.complete(buffer.head, 0))
        });
    }

    /// Shows the guest what was done since the last flush and calls it if it wants that.
    pub fn flush(&mut self) {
        let wants = |q: &mut Queues, _: &mut Chain, _: &GuestRam| {
            Ok([q.guest_rx.publish()?, q.guest_tx.publish()?])
        };
        let queues = self.on_queues(wants).unwrap_or_default();
        if queues.contains(&true) {
            self.stats.guest_calls.add(1);
            self.tell_guest(|call| call.used_buffers(queues));
        }
    }

    fn tell_guest(&self, tell: impl FnOnce(&Call) -> io::Result<()>) {
        let told = self
            .wires
            .as_ref()
            .map_or(Ok(()), |wires| tell(&wires.call));
        if let Err(e) = told {
            warn!("the guest's interrupt line failed: {e}");
        }
    }

    /// Shows the guest whether the NIC has a link.
    pub fn show_link(&mut self, is_up: bool) {
        let shown = |wires: &Wires| wires.call.link_is_up();
        if self
            .wires
            .as_ref()
            .is_some_and(|wires| shown(wires) != is_up)
        {
            self.stats.link_changes.add(1);
            self.tell_guest(|call| call.show_link(is_up));
        }
    }

    /// Asks for no notifications, because the worker polls.
    pub fn poll_mode(&mut self) {
        self.on_queues(|q, _, _| {
            q.guest_rx.disable_notifications()?;
            q.guest_tx.disable_notifications()
        });
    }

    /// Asks for notifications of output if that is wanted, and of receive buffers when there are
    /// none. Gives whether there is work already, or may be that nobody rings for.
    pub fn sleep_mode(&mut self, wants_output: bool) -> bool {
        let (lacked_room, has_room) = (self.lacked_room, self.has_room());
        if lacked_room && has_room {
            // It came after the role had looked, and nobody was asked to ring for it.
            return true;
        }
        let asked = self.on_queues(|q, _, _| {
            let refilled = !has_room && q.guest_rx.notify_of_more()?;
            let output = wants_output && q.guest_tx.enable_notifications()?;
            Ok(output || refilled)
        });
        let rings = |wires: &Wires| wires.every_queue_rings();
        asked.is_some_and(|work| work || !self.wires.as_ref().is_some_and(rings))
    }

    /// The descriptors that the guest's notifications make readable.
    pub fn kick_fds(&self) -> impl Iterator<Item = RawFd> {
        self.wires.iter().flat_map(Wires::kick_fds)
    }

    /// Forgets notifications that have arrived.
    pub fn drain_kicks(&mut self) {
        match self.wires.as_ref().map_or(Ok(0), Wires::drain_kicks) {
            Ok(n) => self.stats.guest_kicks.add(n),
            Err(e) => warn!("the guest's notification descriptor failed: {e}"),
        }
    }

    fn on_queues<T>(
        &mut self,
        act: impl FnOnce(&mut Queues, &mut Chain, &GuestRam) -> Result<T, RingError>,
    ) -> Option<T> {
        let service = self.service.as_mut()?;
        match act(&mut service.queues, &mut self.chain, &service.ram) {
            Ok(value) => Some(value),
            Err(e) => {
                self.fault(&e);
                None
            }
        }
    }

    #[cold]
    fn fault(&mut self, error: &RingError) {
        // A guest can break them in a loop.
        if let Some(left_out) = self.log.line(now_us()) {
            warn!("network queue: {error}; the device asks for a reset{left_out}");
        }
        self.service = None;
        self.stats.ring_errors.add(1);
        self.tell_guest(Call::ask_for_reset);
    }
}
