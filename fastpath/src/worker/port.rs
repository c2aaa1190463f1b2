//! The guest's network queues as the worker sees them.
//!
//! Invariants: a receive buffer is taken only when a frame goes into it; a transmit buffer is
//! completed as soon as it is copied, or when the frame that stayed in it comes back
//! ([`GuestPort::complete`]); once all have, no queue has a chain in flight (rule 12). A queue that
//! breaks its rules is shut and the guest asked for a reset.
//!
//! Does not know where frames come from or go to.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use colo_compare::{HEADER_MAX, Token};
use tracing::warn;

use crate::frame::{Buffer, CopyCause, FramePool, IN_PLACE_MIN, PIECES_MAX};
use crate::net_offer::NetOffer;
use crate::ring::{Call, Chain, GuestBytes, GuestRam, QueueState, RingError, Segment, Virtqueue};
use crate::stats::WorkerStats;
use crate::vhost_user::GuestRings;

use super::front::Front;
use super::merge::Merge;
use super::offload::Request;
use super::verify::checksum_holds;
use super::wires::{PortWiring, Wires};

/// Bytes of `virtio_net_hdr` in front of every frame (`VIRTIO_F_VERSION_1`).
pub const NET_HEADER_BYTES: usize = 12;

/// `virtio_net_hdr.flags`: the checksum has been verified.
const DATA_VALID: u8 = 2;

/// Shortest frame: an Ethernet header.
const FRAME_MIN: usize = 14;

/// The states of both queues: guest_rx, then guest_tx.
pub type PortState = [QueueState; 2];

/// What of a frame of the guest stays in the guest's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stays {
    /// Nothing, for this reason.
    Nothing(CopyCause),
    /// All behind the header, of long frames.
    Payload,
    /// All of long frames that the guest has completed and that lie in one piece, of others what lies behind
    /// the header: for who looks at none.
    Whole,
}

/// What became of a frame for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// It is in the guest's memory.
    Done,
    /// The guest has no buffer (or no driver): keep the frame.
    NoRoom,
    /// The guest's buffer is smaller than the frame, which is lost.
    TooSmall,
}

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
            stats,
        }
    }

    /// Sets how long frames for the guest are at most.
    pub(super) fn set_frame_max(&mut self, frame_max: usize) {
        self.frame_max = frame_max;
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
        warn!("network queue: {error}; the device asks for a reset");
        self.service = None;
        self.stats.ring_errors.add(1);
        self.tell_guest(Call::ask_for_reset);
    }
}

fn deliver(
    queue: &mut Virtqueue,
    chain: &mut Chain,
    ram: &GuestRam,
    frame: &[u8],
    verified: bool,
) -> Result<Delivery, RingError> {
    if !queue.pop(chain)? {
        return Ok(Delivery::NoRoom);
    }
    if !chain.readable().is_empty() {
        return Err(RingError::Direction);
    }
    let need = NET_HEADER_BYTES + frame.len();
    if Chain::bytes_of(chain.writable()) < need as u64 {
        queue.undo_pop();
        return Ok(Delivery::TooSmall);
    }
    let header = header_of(1, verified);
    let mut at = 0;
    for segment in chain.writable() {
        at += scatter(ram, *segment, at, &header, frame)?;
    }
    queue.complete(chain.head(), need as u32)?;
    Ok(Delivery::Done)
}

/// `virtio_net_hdr` in front of a frame for the guest (virtio 1.3 section 5.1.6.4.1).
pub(super) fn header_of(buffers: u16, verified: bool) -> [u8; NET_HEADER_BYTES] {
    let mut header = [0; NET_HEADER_BYTES];
    if verified {
        header[0] = DATA_VALID;
    }
    header[10..].copy_from_slice(&buffers.to_le_bytes());
    header
}

/// Writes what belongs into one segment, `at` bytes into header and frame. Gives how much.
pub(super) fn scatter(
    ram: &GuestRam,
    segment: Segment,
    at: usize,
    header: &[u8],
    frame: &[u8],
) -> Result<usize, RingError> {
    let room = segment.len as usize;
    let head = header.get(at..).unwrap_or(&[]);
    let head = &head[..head.len().min(room)];
    ram.write(segment.gpa, head)?;
    let body = &frame[(at + head.len())
        .saturating_sub(header.len())
        .min(frame.len())..];
    let body = &body[..body.len().min(room - head.len())];
    ram.write(segment.gpa + head.len() as u64, body)?;
    Ok(head.len() + body.len())
}

/// Where a frame of the guest is to go.
struct Out<'a> {
    frames: &'a mut FramePool,
    max: usize,
    life: u32,
    stays: Stays,
}

enum Taken {
    Nothing,
    Bad,
    /// The frame, its length, why it was copied if it was.
    Frame(Token, usize, Option<CopyCause>),
}

fn take(
    queues: &mut Queues,
    chain: &mut Chain,
    ram: &GuestRam,
    out: Out<'_>,
) -> Result<Taken, RingError> {
    let queue = &mut queues.guest_tx;
    let checksum = queues.checksum;
    let is_waiting = match out.stays {
        Stays::Whole => queue.pop_and_fetch(chain, NET_HEADER_BYTES + IN_PLACE_MIN)?,
        Stays::Payload | Stays::Nothing(_) => queue.pop(chain)?,
    };
    if !is_waiting {
        return Ok(Taken::Nothing);
    }
    if !chain.writable().is_empty() {
        return Err(RingError::Direction);
    }
    if let [segment] = *chain.readable()
        && (segment.len as usize) < NET_HEADER_BYTES + IN_PLACE_MIN.min(out.max)
        && segment.len as usize >= NET_HEADER_BYTES + FRAME_MIN
    {
        let buffer = ram.view(segment.gpa, segment.len)?;
        let mut header = [0; NET_HEADER_BYTES];
        buffer.copy_to(0, &mut header);
        if Request::of(&header, checksum) == Request::Nothing {
            return take_short(queue, chain.head(), buffer, out);
        }
    }
    let total = Chain::bytes_of(chain.readable());
    let good = (NET_HEADER_BYTES + FRAME_MIN) as u64..=(NET_HEADER_BYTES + out.max) as u64;
    let mut request = Request::Refused;
    if good.contains(&total) {
        let mut header = [0; NET_HEADER_BYTES];
        copy_range(chain.readable(), ram, 0, &mut header)?;
        request = Request::of(&header, checksum);
    }
    if request == Request::Refused {
        queue.complete(chain.head(), 0)?;
        return Ok(Taken::Bad);
    }
    let len = total as usize - NET_HEADER_BYTES;
    let mut rest = [Segment { gpa: 0, len: 0 }; PIECES_MAX - 1];
    let cause = match out.stays {
        Stays::Nothing(cause) => Some(cause),
        _ => (len < IN_PLACE_MIN).then_some(CopyCause::Small),
    };
    if (cause, out.stays, request) == (None, Stays::Whole, Request::Nothing)
        && let Some([frame]) = behind(chain.readable(), NET_HEADER_BYTES, &mut rest)
    {
        return keep_whole(queue, chain.head(), *frame, out);
    }
    let front = NET_HEADER_BYTES + HEADER_MAX;
    let rest = match cause {
        Some(cause) => Err(cause),
        None => behind(chain.readable(), front, &mut rest).ok_or(CopyCause::Scattered),
    };
    let behind = rest.unwrap_or(&[]);
    let mut filled = Ok(false);
    let fill = |slot: &mut [u8], n: usize| {
        let held = &mut slot[..n];
        filled =
            copy_range(chain.readable(), ram, NET_HEADER_BYTES, held).and_then(
                |()| match request {
                    Request::Checksum(partial) => partial.complete(held, behind, ram),
                    Request::Nothing | Request::Refused => Ok(true),
                },
            );
        matches!(filled, Ok(true)).then_some(n)
    };
    let (token, cause) = place(out, chain.head(), rest, len, fill);
    filled?;
    // What is not in place is the guest's again, also when it was of no use.
    if cause.is_some() || token.is_none() {
        queue.complete(chain.head(), 0)?;
    }
    match token {
        Some(token) => Ok(Taken::Frame(token, len, cause)),
        None => Ok(Taken::Bad),
    }
}

/// The common case of short frames: header and frame in one buffer, which is long enough and not too
/// long, and nothing asked for.
#[inline]
fn take_short(
    queue: &mut Virtqueue,
    head: u16,
    buffer: GuestBytes<'_>,
    out: Out<'_>,
) -> Result<Taken, RingError> {
    let len = buffer.len() - NET_HEADER_BYTES;
    let token = out.frames.fill(|slot| {
        buffer.copy_to(NET_HEADER_BYTES, &mut slot[..len]);
        Some(len)
    });
    // After the copy: it may show the guest that the buffer is its own again.
    queue.complete(head, 0)?;
    let cause = match out.stays {
        Stays::Nothing(cause) => cause,
        Stays::Payload | Stays::Whole => CopyCause::Small,
    };
    Ok(token.map_or(Taken::Bad, |token| Taken::Frame(token, len, Some(cause))))
}

/// A frame that nobody looks at: none of it is read here.
fn keep_whole(
    queue: &mut Virtqueue,
    head: u16,
    frame: Segment,
    out: Out<'_>,
) -> Result<Taken, RingError> {
    let life = out.life;
    match out.frames.keep_whole(Buffer { life, head }, frame) {
        Some(token) => Ok(Taken::Frame(token, frame.len as usize, None)),
        None => {
            queue.complete(head, 0)?;
            Ok(Taken::Bad)
        }
    }
}

/// Makes a frame in place if it may stay there, else a copy.
fn place(
    out: Out<'_>,
    head: u16,
    rest: Result<&[Segment], CopyCause>,
    len: usize,
    fill: impl FnOnce(&mut [u8], usize) -> Option<usize>,
) -> (Option<Token>, Option<CopyCause>) {
    let life = out.life;
    match rest {
        Ok(rest) => {
            let in_slot = |slot: &mut [u8]| fill(slot, HEADER_MAX);
            let token = out
                .frames
                .keep_in_place(Buffer { life, head }, rest, in_slot);
            (token, None)
        }
        Err(cause) => {
            let token = out.frames.fill(|slot| fill(slot, len));
            (token, Some(cause))
        }
    }
}

/// Copies `out.len()` bytes that begin `skip` bytes into the segments; the caller has checked that
/// they are there.
fn copy_range(
    segments: &[Segment],
    ram: &GuestRam,
    mut skip: usize,
    out: &mut [u8],
) -> Result<(), RingError> {
    let mut done = 0;
    for segment in segments {
        let len = segment.len as usize;
        if skip >= len {
            skip -= len;
            continue;
        }
        let n = (len - skip).min(out.len() - done);
        ram.read(segment.gpa + skip as u64, &mut out[done..done + n])?;
        done += n;
        skip = 0;
        if done == out.len() {
            break;
        }
    }
    Ok(())
}

/// What of the segments lies behind their first `skip` bytes; `None` when it is in too many pieces.
fn behind<'a>(
    segments: &[Segment],
    mut skip: usize,
    out: &'a mut [Segment],
) -> Option<&'a [Segment]> {
    let mut count = 0;
    for segment in segments {
        let len = segment.len as usize;
        if skip >= len {
            skip -= len;
            continue;
        }
        *out.get_mut(count)? = Segment {
            gpa: segment.gpa + skip as u64,
            len: segment.len - skip as u32,
        };
        count += 1;
        skip = 0;
    }
    Some(&out[..count])
}
