//! The virtio network device (virtio 1.3, section 5.1) as a device of the TCP/IP stack.
//!
//! Invariants: every received buffer goes back to the device as soon as its frame is consumed; a
//! transmit buffer is reused only after the device returned it; when none is free, nothing is
//! offered to the stack, so nothing is lost. With several queue pairs a flow is always sent by the same one, which need
//! not be the one that it is received by.
//!
//! Does not use offloads: all checksums are made and checked in software. The link is watched, not obeyed: what is
//! sent without one is lost as on a wire, and sent again by whoever cares.

use crate::virtio_mmio::{DeviceError, Register, Window};
use crate::virtqueue::{BUFFER_BYTES, Queue, Used};
use alloc::vec;
use alloc::vec::Vec;
use colo_guest_server::{FrameDevice, flow_number};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

const QUEUE_SIZE: u16 = 256;
/// `virtio_net_hdr` with `num_buffers`; all zero without offloads.
const HEADER_BYTES: usize = 12;
const ETHERNET_HEADER: usize = 14;
const MTU_DEFAULT: usize = 1500;

const FEATURE_MTU: u32 = 3;
const FEATURE_MAC: u32 = 5;
const FEATURE_STATUS: u32 = 16;
const FEATURE_CTRL_VQ: u32 = 17;
const FEATURE_MQ: u32 = 22;
const FEATURE_EVENT_IDX: u32 = 29;
const FEATURE_VERSION_1: u32 = 32;
const CONFIG_STATUS: usize = 6;
const CONFIG_PAIRS: usize = 8;
const CONFIG_MTU: usize = 10;
/// `VIRTIO_NET_S_LINK_UP`, in the low byte of the status.
const LINK_UP: u8 = 1;
/// Class and command of `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
const PAIRS_SET: [u8; 2] = [4, 0];
/// Entries of the control queue, one command at a time.
const CONTROL_SIZE: u16 = 4;
/// `InterruptStatus`: the configuration has changed.
const CONFIG_CHANGE: u32 = 2;

/// The transmit queues.
struct Senders {
    senders: Vec<Sender>,
    /// Frames on their way to the queue of their flow.
    scratch: Vec<u8>,
}

struct Sender {
    queue: Queue,
    /// Buffers that the device does not hold.
    free: Vec<u16>,
}

impl Sender {
    fn new(window: &Window, pair: usize) -> Result<Self, DeviceError> {
        let queue = Queue::new(window, 2 * pair as u32 + 1, QUEUE_SIZE, false)?;
        let free = (0..queue.size()).rev().collect();
        Ok(Self { queue, free })
    }

    fn room(&mut self) -> usize {
        if self.has_few() {
            while let Some(used) = self.queue.take_used() {
                self.free.push(used.id);
            }
        }
        self.free.len()
    }

    fn has_few(&self) -> bool {
        self.free.len() < usize::from(QUEUE_SIZE / 4)
    }

    /// Sends a frame of `len` bytes that `fill` writes.
    fn send<R>(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        assert!(
            len <= BUFFER_BYTES - HEADER_BYTES,
            "the MTU keeps frames within a buffer"
        );
        let Some(id) = self.free.pop() else {
            unreachable!("a transmission is given out only when a buffer is free");
        };
        // SAFETY: the buffer is free, so only this function touches it; header and frame fit it.
        let frame = unsafe {
            let buffer = self.queue.buffer(id);
            buffer.write_bytes(0, HEADER_BYTES);
            core::slice::from_raw_parts_mut(buffer.add(HEADER_BYTES), len)
        };
        let result = fill(frame);
        self.queue.submit(id, Some(HEADER_BYTES + len));
        result
    }
}

impl Senders {
    fn send<R>(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        if let [sender] = &mut self.senders[..] {
            return sender.send(len, fill);
        }
        // The flow is known when the frame is there.
        let frame = &mut self.scratch[..len];
        let result = fill(frame);
        let number = flow_number(frame) % self.senders.len();
        self.senders[number].send(len, |to| to.copy_from_slice(frame));
        result
    }

    /// Nobody knows yet by which queue the next frame leaves.
    fn room(&mut self) -> usize {
        self.senders.iter_mut().map(Sender::room).min().unwrap_or(0)
    }
}

/// The network device.
pub struct NetDevice {
    window: Window,
    /// Receive queues in use, at least one.
    guest_rx: Vec<Queue>,
    /// Which of them is next, if it has a frame.
    turn: usize,
    /// As many transmit queues.
    guest_tx: Senders,
    mac: [u8; 6],
    mtu: usize,
    /// What the device says of its link, if it says anything.
    link: Option<bool>,
}

impl NetDevice {
    /// Starts the device whose registers are at `base`, with as many queue pairs as it offers, but `pairs_max` at most.
    pub fn new(base: usize, pairs_max: usize) -> Result<Self, DeviceError> {
        // SAFETY: the address comes from the VMM's command line, and only this driver uses it.
        let window = unsafe { Window::new(base) }?;
        let wanted = [
            (FEATURE_VERSION_1, "VERSION_1"),
            (FEATURE_EVENT_IDX, "EVENT_IDX"),
            (FEATURE_MAC, "MAC"),
        ];
        let optional = [FEATURE_MTU, FEATURE_STATUS, FEATURE_CTRL_VQ, FEATURE_MQ];
        let chosen = window.negotiate(&wanted, &optional)?;
        let has = |feature: u32| chosen & (1 << feature) != 0;
        let mac = core::array::from_fn(|i| window.config8(i));
        let mtu = if has(FEATURE_MTU) {
            config16(&window, CONFIG_MTU)
        } else {
            MTU_DEFAULT
        };
        // smoltcp needs 1280 for IPv6, and a frame must fit one buffer.
        let mtu = mtu.clamp(1280, BUFFER_BYTES - HEADER_BYTES - ETHERNET_HEADER);
        let offered = if has(FEATURE_MQ) && has(FEATURE_CTRL_VQ) {
            config16(&window, CONFIG_PAIRS)
        } else {
            1
        };
        let count = offered.min(pairs_max).max(1);
        let receiver = |pair| Queue::new(&window, 2 * pair as u32, QUEUE_SIZE, true);
        let mut guest_rx = (0..count).map(receiver).collect::<Result<Vec<_>, _>>()?;
        let sender = |pair| Sender::new(&window, pair);
        let senders = (0..count).map(sender).collect::<Result<Vec<_>, _>>()?;
        let control = (offered > 1)
            .then(|| Queue::new(&window, 2 * offered as u32, CONTROL_SIZE, true))
            .transpose()?;
        window.start();
        let link = has(FEATURE_STATUS).then(|| link_is_up(&window));
        for queue in &mut guest_rx {
            for id in 0..queue.size() {
                queue.submit(id, None);
            }
            queue.tell(&window);
        }
        if let Some(mut control) = control
            && count > 1
        {
            let [low, high] = (count as u16).to_le_bytes();
            let [class, command] = PAIRS_SET;
            if control.command(&window, &[class, command, low, high]) != 0 {
                return Err(DeviceError::Pairs(count));
            }
        }
        Ok(Self {
            window,
            guest_rx,
            turn: 0,
            guest_tx: Senders {
                senders,
                scratch: vec![0; BUFFER_BYTES],
            },
            mac,
            mtu,
            link,
        })
    }

    /// The MAC address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Queue pairs in use.
    pub fn pairs(&self) -> usize {
        self.guest_rx.len()
    }

    /// Whether there is a link; a device that does not say always has one.
    pub fn link_is_up(&self) -> bool {
        self.link.unwrap_or(true)
    }

    /// Looks whether the link has come or gone. Costs an exit.
    pub fn link_change(&mut self) -> Option<bool> {
        let known = self.link?;
        if self.window.read(Register::InterruptStatus) & CONFIG_CHANGE == 0 {
            return None;
        }
        // Before the look: a change after it asks again.
        self.window.write(Register::InterruptAck, CONFIG_CHANGE);
        let is_up = link_is_up(&self.window);
        self.link = Some(is_up);
        (is_up != known).then_some(is_up)
    }

    /// Asks to be woken by the next frame; false when one is already there.
    pub fn arm_receive(&mut self) -> bool {
        // All are armed, also behind one that has something.
        let armed = |quiet, queue: &mut Queue| queue.arm() & quiet;
        self.guest_rx.iter_mut().fold(true, armed)
    }

    /// Asks to be woken when a transmit buffer comes back where few are left; false when one already has.
    pub fn arm_transmit(&mut self) -> bool {
        let senders = self.guest_tx.senders.iter_mut();
        let few = senders.filter(|sender| sender.has_few());
        few.fold(true, |quiet, sender| sender.queue.arm() & quiet)
    }

    /// The next received frame, and the receive queue that has it.
    fn next_used(&mut self) -> Option<(usize, Used)> {
        for _ in 0..self.guest_rx.len() {
            if let Some(used) = self.guest_rx[self.turn].peek_used() {
                return Some((self.turn, used));
            }
            self.turn = (self.turn + 1) % self.guest_rx.len();
        }
        None
    }

    /// Takes the frame that [`Self::next_used`] gave; then it is the next queue's turn.
    fn take(&mut self, queue: usize) {
        self.guest_rx[queue].take_used();
        self.turn = (queue + 1) % self.guest_rx.len();
    }
}

fn link_is_up(window: &Window) -> bool {
    window.config8(CONFIG_STATUS) & LINK_UP != 0
}

fn config16(window: &Window, at: usize) -> usize {
    let bytes = [at, at + 1].map(|at| window.config8(at));
    usize::from(u16::from_le_bytes(bytes))
}

fn frame_len(used: Used) -> usize {
    used.len.max(HEADER_BYTES) - HEADER_BYTES
}

impl FrameDevice for NetDevice {
    fn front(&mut self) -> Option<&[u8]> {
        let (queue, used) = self.next_used()?;
        // SAFETY: the device returned the buffer and does not touch it until it is submitted again,
        // which needs `&mut self`; the length is at most that of the buffer.
        Some(unsafe {
            let buffer = self.guest_rx[queue].buffer(used.id);
            core::slice::from_raw_parts(buffer.add(HEADER_BYTES), frame_len(used))
        })
    }

    fn discard(&mut self) {
        if let Some((queue, used)) = self.next_used() {
            self.take(queue);
            self.guest_rx[queue].submit(used.id, None);
        }
    }

    fn room(&mut self) -> usize {
        self.guest_tx.room()
    }

    fn flush(&mut self) {
        for sender in &mut self.guest_tx.senders {
            sender.queue.tell(&self.window);
        }
        for queue in &mut self.guest_rx {
            queue.tell(&self.window);
        }
    }
}

impl Device for NetDevice {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Transmission<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Transmission<'_>)> {
        if self.room() == 0 {
            return None;
        }
        let (queue, used) = self.next_used()?;
        self.take(queue);
        let received = Received {
            queue: &mut self.guest_rx[queue],
            id: used.id,
            len: frame_len(used),
        };
        Some((received, Transmission(&mut self.guest_tx)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Transmission<'_>> {
        if self.room() == 0 {
            return None;
        }
        Some(Transmission(&mut self.guest_tx))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = self.mtu + ETHERNET_HEADER;
        capabilities
    }
}

/// A received frame; its buffer goes back to the device when it is dropped.
pub struct Received<'a> {
    queue: &'a mut Queue,
    id: u16,
    len: usize,
}

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        // SAFETY: the device returned the buffer, and it is submitted again only when `self` is
        // dropped; the length is at most that of the buffer.
        f(unsafe {
            core::slice::from_raw_parts(self.queue.buffer(self.id).add(HEADER_BYTES), self.len)
        })
    }
}

impl Drop for Received<'_> {
    fn drop(&mut self) {
        self.queue.submit(self.id, None);
    }
}

/// The right to send one frame.
pub struct Transmission<'a>(&'a mut Senders);

impl TxToken for Transmission<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.0.send(len, f)
    }
}
