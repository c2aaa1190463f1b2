//! The virtio network device (virtio 1.3, section 5.1) as a device of the TCP/IP stack.
//!
//! Invariants: every received buffer goes back to the device as soon as its frame is consumed; a
//! transmit buffer is reused only after the device returned it; when none is free, nothing is
//! offered to the stack, so nothing is lost.
//!
//! Does not use offloads: all checksums are made and checked in software. The link is watched, not obeyed: what is
//! sent without one is lost as on a wire, and sent again by whoever cares.

use crate::virtio_mmio::{DeviceError, Register, Window};
use crate::virtqueue::{BUFFER_BYTES, Queue, Used};
use alloc::vec::Vec;
use colo_guest_server::FrameDevice;
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
const FEATURE_EVENT_IDX: u32 = 29;
const FEATURE_VERSION_1: u32 = 32;
const CONFIG_STATUS: usize = 6;
const CONFIG_MTU: usize = 10;
/// `VIRTIO_NET_S_LINK_UP`, in the low byte of the status.
const LINK_UP: u8 = 1;
/// `InterruptStatus`: the configuration has changed.
const CONFIG_CHANGE: u32 = 2;

/// The network device.
pub struct NetDevice {
    window: Window,
    guest_rx: Queue,
    guest_tx: Queue,
    /// Transmit buffers that the device does not hold.
    free: Vec<u16>,
    mac: [u8; 6],
    mtu: usize,
    /// What the device says of its link, if it says anything.
    link: Option<bool>,
}

impl NetDevice {
    /// Starts the device whose registers are at `base`.
    pub fn new(base: usize) -> Result<Self, DeviceError> {
        // SAFETY: the address comes from the VMM's command line, and only this driver uses it.
        let window = unsafe { Window::new(base) }?;
        let wanted = [
            (FEATURE_VERSION_1, "VERSION_1"),
            (FEATURE_EVENT_IDX, "EVENT_IDX"),
            (FEATURE_MAC, "MAC"),
        ];
        let chosen = window.negotiate(&wanted, &[FEATURE_MTU, FEATURE_STATUS])?;
        let mac = core::array::from_fn(|i| window.config8(i));
        let mtu = if chosen & (1 << FEATURE_MTU) == 0 {
            MTU_DEFAULT
        } else {
            usize::from(u16::from_le_bytes([
                window.config8(CONFIG_MTU),
                window.config8(CONFIG_MTU + 1),
            ]))
        };
        // smoltcp needs 1280 for IPv6, and a frame must fit one buffer.
        let mtu = mtu.clamp(1280, BUFFER_BYTES - HEADER_BYTES - ETHERNET_HEADER);
        let mut guest_rx = Queue::new(&window, 0, QUEUE_SIZE, true)?;
        let guest_tx = Queue::new(&window, 1, QUEUE_SIZE, false)?;
        window.start();
        for id in 0..guest_rx.size() {
            guest_rx.submit(id, None);
        }
        guest_rx.tell(&window);
        let says_link = chosen & (1 << FEATURE_STATUS) != 0;
        let link = says_link.then(|| link_is_up(&window));
        let free = (0..guest_tx.size()).rev().collect();
        Ok(Self {
            window,
            guest_rx,
            guest_tx,
            free,
            mac,
            mtu,
            link,
        })
    }

    /// The MAC address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
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
        self.guest_rx.arm()
    }

    /// Asks to be woken when a transmit buffer comes back; false when one already has.
    pub fn arm_transmit(&mut self) -> bool {
        self.guest_tx.arm()
    }

    fn reclaim(&mut self) {
        while let Some(used) = self.guest_tx.take_used() {
            self.free.push(used.id);
        }
    }

    fn frame(&self, used: Used) -> &[u8] {
        let len = used.len.max(HEADER_BYTES) - HEADER_BYTES;
        // SAFETY: the device returned the buffer and does not touch it until it is submitted again,
        // which needs `&mut self`; the length is at most that of the buffer.
        unsafe { core::slice::from_raw_parts(self.guest_rx.buffer(used.id).add(HEADER_BYTES), len) }
    }
}

fn link_is_up(window: &Window) -> bool {
    window.config8(CONFIG_STATUS) & LINK_UP != 0
}

impl FrameDevice for NetDevice {
    fn front(&mut self) -> Option<&[u8]> {
        let used = self.guest_rx.peek_used()?;
        Some(self.frame(used))
    }

    fn discard(&mut self) {
        if let Some(used) = self.guest_rx.take_used() {
            self.guest_rx.submit(used.id, None);
        }
    }

    fn room(&mut self) -> usize {
        if self.free.len() < usize::from(QUEUE_SIZE / 4) {
            self.reclaim();
        }
        self.free.len()
    }

    fn flush(&mut self) {
        self.guest_tx.tell(&self.window);
        self.guest_rx.tell(&self.window);
    }
}

impl Device for NetDevice {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Transmission<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Transmission<'_>)> {
        if self.room() == 0 {
            return None;
        }
        let used = self.guest_rx.take_used()?;
        let len = used.len.max(HEADER_BYTES) - HEADER_BYTES;
        let received = Received {
            queue: &mut self.guest_rx,
            id: used.id,
            len,
        };
        Some((
            received,
            Transmission {
                queue: &mut self.guest_tx,
                free: &mut self.free,
            },
        ))
    }

    fn transmit(&mut self, _: Instant) -> Option<Transmission<'_>> {
        if self.room() == 0 {
            return None;
        }
        Some(Transmission {
            queue: &mut self.guest_tx,
            free: &mut self.free,
        })
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
pub struct Transmission<'a> {
    queue: &'a mut Queue,
    free: &'a mut Vec<u16>,
}

impl TxToken for Transmission<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
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
        let result = f(frame);
        self.queue.submit(id, Some(HEADER_BYTES + len));
        result
    }
}
