//! The virtio network device (virtio 1.3, section 5.1) as a device of the TCP/IP stack.
//!
//! Invariants: every received buffer goes back to the device as soon as its frame is consumed; without buffers for the
//! longest frame nothing is offered to the stack, so nothing is lost. With several queue pairs a flow is always sent by
//! the same one, which need not be the one that it is received by.
//!
//! Does not use offloads: all checksums are made and checked in software. The link is watched, not obeyed: what is
//! sent without one is lost as on a wire, and sent again by whoever cares.

use crate::receiver::Receiver;
use crate::sender::Senders;
use crate::virtio_mmio::{DeviceError, Register, Window};
use crate::virtqueue::Queue;
use alloc::vec;
use alloc::vec::Vec;
use colo_guest_server::FrameDevice;
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

/// Descriptors of a queue that frames pass through.
pub const QUEUE_SIZE: u16 = 256;
/// `virtio_net_hdr` with `num_buffers`; what is sent has zeroes, without offloads.
pub const HEADER_BYTES: usize = 12;
/// Bytes of a receive buffer.
pub const RECEIVED_BYTES: usize = 2048;
const ETHERNET_HEADER: usize = 14;
/// With two VLAN tags.
const LINK_HEADER_MAX: usize = 22;
const MTU_DEFAULT: usize = 1500;
/// smoltcp needs it for IPv6.
const MTU_MIN: usize = 1280;
/// What a frame in one receive buffer carries.
const MTU_OF_BUFFER: usize = RECEIVED_BYTES - HEADER_BYTES - LINK_HEADER_MAX;

const FEATURE_MTU: u32 = 3;
const FEATURE_MAC: u32 = 5;
const FEATURE_MERGEABLE: u32 = 15;
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
/// More than any command.
const COMMAND_BYTES: usize = 64;
/// `InterruptStatus`: the configuration has changed.
const CONFIG_CHANGE: u32 = 2;

/// The network device.
pub struct NetDevice {
    window: Window,
    /// Receive queues in use, at least one.
    guest_rx: Vec<Receiver>,
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
        let offered = window.reset();
        let mtu = if offered & (1 << FEATURE_MTU) != 0 {
            config16(&window, CONFIG_MTU)
        } else {
            MTU_DEFAULT
        };
        let mut optional = vec![FEATURE_MTU, FEATURE_STATUS, FEATURE_CTRL_VQ, FEATURE_MQ];
        // Where each frame fits one buffer, nobody has to count them.
        if mtu > MTU_OF_BUFFER {
            optional.push(FEATURE_MERGEABLE);
        }
        let chosen = window.negotiate(offered, &wanted, &optional)?;
        let has = |feature: u32| chosen & (1 << feature) != 0;
        let mac = core::array::from_fn(|i| window.config8(i));
        let mergeable = has(FEATURE_MERGEABLE);
        let mtu_max = if mergeable { mtu } else { MTU_OF_BUFFER };
        let mtu = mtu.min(mtu_max).max(MTU_MIN);
        let pairs = if has(FEATURE_MQ) && has(FEATURE_CTRL_VQ) {
            config16(&window, CONFIG_PAIRS)
        } else {
            1
        };
        let count = pairs.min(pairs_max).max(1);
        let receiver = |pair| Receiver::new(&window, pair, mergeable);
        let mut guest_rx = (0..count).map(receiver).collect::<Result<Vec<_>, _>>()?;
        let guest_tx = Senders::new(&window, count, mtu + ETHERNET_HEADER)?;
        let number = 2 * pairs as u32;
        let control = (pairs > 1)
            .then(|| Queue::new(&window, number, CONTROL_SIZE, COMMAND_BYTES, true))
            .transpose()?;
        window.start();
        let link = has(FEATURE_STATUS).then(|| link_is_up(&window));
        for receiver in &mut guest_rx {
            receiver.offer_all(&window);
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
            guest_tx,
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
        let armed = |quiet, receiver: &mut Receiver| receiver.arm() & quiet;
        self.guest_rx.iter_mut().fold(true, armed)
    }

    /// Asks to be woken when a transmit buffer comes back where few are left; false when one already has.
    pub fn arm_transmit(&mut self) -> bool {
        self.guest_tx.arm()
    }

    /// The receive queue that has the next frame.
    fn next_receiver(&mut self) -> Option<&mut Receiver> {
        for _ in 0..self.guest_rx.len() {
            if self.guest_rx[self.turn].has_frame() {
                return Some(&mut self.guest_rx[self.turn]);
            }
            self.pass_turn();
        }
        None
    }

    fn pass_turn(&mut self) {
        self.turn = (self.turn + 1) % self.guest_rx.len();
    }
}

fn link_is_up(window: &Window) -> bool {
    window.config8(CONFIG_STATUS) & LINK_UP != 0
}

fn config16(window: &Window, at: usize) -> usize {
    let bytes = [at, at + 1].map(|at| window.config8(at));
    usize::from(u16::from_le_bytes(bytes))
}

impl FrameDevice for NetDevice {
    fn front(&mut self) -> Option<&[u8]> {
        self.next_receiver()?.frame()
    }

    fn discard(&mut self) {
        if let Some(receiver) = self.next_receiver() {
            receiver.discard();
            self.pass_turn();
        }
    }

    fn room(&mut self) -> usize {
        self.guest_tx.room()
    }

    fn flush(&mut self) {
        self.guest_tx.tell(&self.window);
        for receiver in &mut self.guest_rx {
            receiver.tell(&self.window);
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
        self.next_receiver()?;
        let queue = self.turn;
        // Then it is the next queue's turn.
        self.pass_turn();
        let received = Received(&mut self.guest_rx[queue]);
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

/// A received frame; its buffers go back to the device when it is dropped.
pub struct Received<'a>(&'a mut Receiver);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0.frame().unwrap_or_default())
    }
}

impl Drop for Received<'_> {
    fn drop(&mut self) {
        self.0.discard();
    }
}

/// The right to send one frame.
pub struct Transmission<'a>(&'a mut Senders);

impl TxToken for Transmission<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.0.send(len, f)
    }
}
