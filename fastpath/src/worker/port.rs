//! The guest's network queues as the worker sees them.
//!
//! Invariants: a receive buffer is taken only when a frame goes into it, a transmit buffer is
//! completed as soon as it is copied, so between two calls no queue has a chain in flight (rule 12);
//! a queue that breaks its rules is shut and the guest asked for a reset.
//!
//! Does not know where frames come from or go to.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use tracing::warn;
use vmm_sys_util::eventfd::EventFd;

use crate::ring::{Call, Chain, GuestRam, QueueState, RingError, Segment, Virtqueue};
use crate::stats::WorkerStats;

/// Bytes of `virtio_net_hdr` in front of every frame (`VIRTIO_F_VERSION_1`).
pub const NET_HEADER_BYTES: usize = 12;

/// Shortest frame: an Ethernet header.
const FRAME_MIN: usize = 14;

/// The states of both queues: guest_rx, then guest_tx.
pub type PortState = [QueueState; 2];

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

/// How the port reaches the guest and is reached by it.
#[derive(Debug)]
pub struct PortWiring {
    /// Guest memory.
    pub ram: Arc<GuestRam>,
    /// The device's interrupt.
    pub call: Arc<Call>,
    /// Written when the guest notifies a queue. Non-blocking.
    pub kick: EventFd,
}

#[derive(Debug)]
struct Queues {
    guest_rx: Virtqueue,
    guest_tx: Virtqueue,
}

/// Both queues of a network device.
#[derive(Debug)]
pub struct GuestPort {
    wiring: PortWiring,
    queues: Option<Queues>,
    chain: Chain,
    stats: Arc<WorkerStats>,
}

impl GuestPort {
    /// A port without a driver.
    pub fn new(wiring: PortWiring, stats: Arc<WorkerStats>) -> Self {
        Self {
            wiring,
            queues: None,
            chain: Chain::default(),
            stats,
        }
    }

    /// Starts to serve the queues.
    pub fn activate(&mut self, state: PortState) {
        let [guest_rx, guest_tx] = state;
        let ram = &self.wiring.ram;
        let queues = Virtqueue::new(ram.clone(), guest_rx).and_then(|guest_rx| {
            Ok(Queues {
                guest_rx,
                guest_tx: Virtqueue::new(ram.clone(), guest_tx)?,
            })
        });
        match queues {
            Ok(queues) => {
                self.queues = Some(queues);
                self.poll_mode();
            }
            Err(e) => self.fault(&e),
        }
    }

    /// Stops serving the queues and gives their states, if they were served.
    pub fn deactivate(&mut self) -> Option<PortState> {
        let state = self.state();
        self.queues = None;
        state
    }

    /// Where the queues stand.
    pub fn state(&mut self) -> Option<PortState> {
        self.flush();
        self.queues
            .as_ref()
            .map(|q| [q.guest_rx.state(), q.guest_tx.state()])
    }

    /// Whether a driver is there.
    pub fn is_active(&self) -> bool {
        self.queues.is_some()
    }

    /// Whether the guest has a receive buffer.
    pub fn has_room(&mut self) -> bool {
        self.on_queues(|q, _, _| q.guest_rx.has_available())
            .unwrap_or(false)
    }

    /// Whether the guest has something to send.
    pub fn has_output(&mut self) -> bool {
        self.on_queues(|q, _, _| q.guest_tx.has_available())
            .unwrap_or(false)
    }

    /// Puts a frame into the guest's receive queue.
    pub fn deliver(&mut self, frame: &[u8]) -> Delivery {
        let done = self.on_queues(|q, chain, ram| deliver(&mut q.guest_rx, chain, ram, frame));
        let delivery = done.unwrap_or(Delivery::NoRoom);
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

    /// Copies the next frame of the guest's transmit queue into `out` and completes its buffer.
    /// Gives the length; `None` when nothing (good) is waiting.
    pub fn take(&mut self, out: &mut [u8], frame_max: usize) -> Option<usize> {
        loop {
            let max = frame_max.min(out.len());
            match self.on_queues(|q, chain, ram| take(&mut q.guest_tx, chain, ram, out, max))? {
                Taken::Nothing => return None,
                Taken::Bad => self.stats.guest_tx_bad.add(1),
                Taken::Frame(len) => {
                    self.stats.guest_tx_frames.add(1);
                    self.stats.guest_tx_bytes.add(len as u64);
                    return Some(len);
                }
            }
        }
    }

    /// Shows the guest what was done since the last flush and calls it if it wants that.
    pub fn flush(&mut self) {
        let wants = |q: &mut Queues, _: &mut Chain, _: &GuestRam| {
            let (guest_rx, guest_tx) = (q.guest_rx.publish()?, q.guest_tx.publish()?);
            Ok(guest_rx || guest_tx)
        };
        if self.on_queues(wants) == Some(true) {
            self.stats.guest_calls.add(1);
            if let Err(e) = self.wiring.call.used_buffers() {
                warn!("the guest's interrupt line failed: {e}");
            }
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
    /// none. Gives whether there is work already.
    pub fn sleep_mode(&mut self, wants_output: bool) -> bool {
        self.on_queues(|q, _, _| {
            let refilled = !q.guest_rx.has_available()? && q.guest_rx.enable_notifications()?;
            let output = wants_output && q.guest_tx.enable_notifications()?;
            Ok(output || refilled)
        })
        .unwrap_or(false)
    }

    /// The descriptor that the guest's notifications make readable.
    pub fn kick_fd(&self) -> RawFd {
        self.wiring.kick.as_raw_fd()
    }

    /// Forgets notifications that have arrived.
    pub fn drain_kicks(&mut self) {
        match self.wiring.kick.read() {
            Ok(n) => self.stats.guest_kicks.add(n),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => warn!("the guest's notification descriptor failed: {e}"),
        }
    }

    fn on_queues<T>(
        &mut self,
        act: impl FnOnce(&mut Queues, &mut Chain, &GuestRam) -> Result<T, RingError>,
    ) -> Option<T> {
        let queues = self.queues.as_mut()?;
        match act(queues, &mut self.chain, &self.wiring.ram) {
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
        self.queues = None;
        self.stats.ring_errors.add(1);
        if let Err(e) = self.wiring.call.ask_for_reset() {
            warn!("the guest's interrupt line failed: {e}");
        }
    }
}

fn deliver(
    queue: &mut Virtqueue,
    chain: &mut Chain,
    ram: &GuestRam,
    frame: &[u8],
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
    // num_buffers is 1 (virtio 1.3 section 5.1.6.4.1); no offload is ever used.
    let mut header = [0; NET_HEADER_BYTES];
    header[10] = 1;
    let mut at = 0;
    for segment in chain.writable() {
        at += scatter(ram, *segment, at, &header, frame)?;
    }
    queue.complete(chain.head(), need as u32)?;
    Ok(Delivery::Done)
}

/// Writes what belongs into one segment, `at` bytes into header and frame. Gives how much.
fn scatter(
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

enum Taken {
    Nothing,
    Bad,
    Frame(usize),
}

fn take(
    queue: &mut Virtqueue,
    chain: &mut Chain,
    ram: &GuestRam,
    out: &mut [u8],
    frame_max: usize,
) -> Result<Taken, RingError> {
    if !queue.pop(chain)? {
        return Ok(Taken::Nothing);
    }
    if !chain.writable().is_empty() {
        return Err(RingError::Direction);
    }
    let total = Chain::bytes_of(chain.readable());
    let good = (NET_HEADER_BYTES + FRAME_MIN) as u64..=(NET_HEADER_BYTES + frame_max) as u64;
    let taken = if good.contains(&total) {
        gather(chain.readable(), ram, out)?
    } else {
        Taken::Bad
    };
    queue.complete(chain.head(), 0)?;
    Ok(taken)
}

/// Copies header and frame out of their segments; the caller has checked that they fit.
fn gather(segments: &[Segment], ram: &GuestRam, out: &mut [u8]) -> Result<Taken, RingError> {
    let mut header = [0; NET_HEADER_BYTES];
    let (mut head, mut body) = (0, 0);
    for segment in segments {
        let len = segment.len as usize;
        let in_head = len.min(NET_HEADER_BYTES - head);
        ram.read(segment.gpa, &mut header[head..head + in_head])?;
        head += in_head;
        let in_body = len - in_head;
        ram.read(segment.gpa + in_head as u64, &mut out[body..body + in_body])?;
        body += in_body;
    }
    // flags and gso_type: no offload was offered.
    if header[0] != 0 || header[1] != 0 {
        return Ok(Taken::Bad);
    }
    Ok(Taken::Frame(body))
}
