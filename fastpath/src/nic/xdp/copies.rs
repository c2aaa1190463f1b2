//! Copies of broadcast and multicast that the host gets: a packet socket with a ring in shared
//! memory (packet_mmap.rst), so that looking for frames costs no system call.
//!
//! Invariants: a frame in the ring is ours from when its status says so until we give it back; what
//! the host itself sends is not copied; frames longer than a place in the ring are counted and
//! dropped.
//!
//! Does not decide whether the guest may hear them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use colo_bpf::{attach_to_socket, for_guest};
use colo_compare::Token;
use libc::{c_int, c_void, socklen_t};

use crate::frame::{FramePool, LINK_HEADER_MAX};

/// Places in the ring.
const PLACES: usize = 256;
/// Room for the header that the kernel puts in front of a frame, and its alignment.
const HEADER_ROOM: usize = 128;

/// The ring.
#[derive(Debug)]
pub(super) struct Copies {
    fd: OwnedFd,
    ring: NonNull<u8>,
    place_bytes: usize,
    next: usize,
    too_long: u64,
}

// SAFETY: the ring is this socket's alone, and a mapping belongs to the process, not to a thread.
unsafe impl Send for Copies {}

impl Copies {
    /// Starts to copy what comes by an interface with this MTU.
    pub(super) fn open(interface_index: u32, mtu: u16) -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: plain system call that gives a new descriptor or -1. Without a protocol nothing
        // comes before the socket is bound.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just made by the kernel and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // The groups alone: no address is the guest's.
        attach_to_socket(fd.as_fd(), &for_guest(&[])).map_err(io::Error::other)?;
        let place_bytes = (usize::from(mtu) + LINK_HEADER_MAX + HEADER_ROOM).next_power_of_two();
        let block_bytes = place_bytes.max(4096);
        let request = libc::tpacket_req {
            tp_block_size: block_bytes as u32,
            tp_block_nr: (PLACES * place_bytes / block_bytes) as u32,
            tp_frame_size: place_bytes as u32,
            tp_frame_nr: PLACES as u32,
        };
        let version = libc::tpacket_versions::TPACKET_V2 as c_int;
        set_option(&fd, libc::PACKET_VERSION, &version)?;
        set_option::<c_int>(&fd, libc::PACKET_IGNORE_OUTGOING, &1)?;
        set_option(&fd, libc::PACKET_RX_RING, &request)?;
        let ring = map(&fd, PLACES * place_bytes)?;
        let copies = Self {
            fd,
            ring,
            place_bytes,
            next: 0,
            too_long: 0,
        };
        copies.bind(interface_index)?;
        Ok(copies)
    }

    fn bind(&self, interface_index: u32) -> io::Result<()> {
        // SAFETY: sockaddr_ll is plain data for which all zeroes is valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as libc::sa_family_t;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = interface_index as c_int;
        // SAFETY: the kernel reads one sockaddr_ll that lives on this stack.
        let answer = unsafe {
            libc::bind(
                self.fd.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as socklen_t,
            )
        };
        if answer < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Readable when a frame is waiting.
    pub(super) fn poll_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Frames that were too long for the ring.
    pub(super) fn too_long(&self) -> u64 {
        self.too_long
    }

    /// Takes the frames that are waiting, `max` at most; without `frames` it throws them away.
    pub(super) fn receive(
        &mut self,
        mut frames: Option<&mut FramePool>,
        out: &mut VecDeque<Token>,
        max: usize,
    ) {
        for _ in 0..max {
            let Some(header) = self.ready() else {
                return;
            };
            if let Some(frames) = &mut frames {
                if frames.free_slots() == 0 {
                    return;
                }
                out.extend(self.copy(frames, &header));
            }
            self.give_back();
        }
    }

    /// Throws away what came so far.
    pub(super) fn discard(&mut self) {
        self.receive(None, &mut VecDeque::new(), PLACES);
    }

    /// The header of the next frame, if it is ours.
    fn ready(&self) -> Option<libc::tpacket2_hdr> {
        let status = self.status().load(Ordering::Relaxed);
        if status & libc::TP_STATUS_USER == 0 {
            return None;
        }
        // Pairs with the kernel's barrier before it writes the status: the frame is there.
        fence(Ordering::Acquire);
        // SAFETY: the place is in the mapping and aligned, any bit pattern is valid, and the kernel
        // does not write it before it is given back.
        Some(unsafe { self.place().cast::<libc::tpacket2_hdr>().read() })
    }

    /// A frame with the bytes, and the tag that the kernel has taken out.
    fn copy(&mut self, frames: &mut FramePool, header: &libc::tpacket2_hdr) -> Option<Token> {
        let (start, len) = (usize::from(header.tp_mac), header.tp_snaplen as usize);
        let is_whole = header.tp_len == header.tp_snaplen;
        if !is_whole || len < 14 || start + len > self.place_bytes {
            self.too_long += 1;
            return None;
        }
        // SAFETY: inside the place, as just checked, which is ours until it is given back.
        let bytes = unsafe {
            let first = self.place().add(start);
            std::slice::from_raw_parts(first.as_ptr().cast_const(), len)
        };
        let tag = (header.tp_status & libc::TP_STATUS_VLAN_VALID != 0).then(|| {
            let known = header.tp_status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
            let kind = if known { header.tp_vlan_tpid } else { 0x8100 };
            (kind, header.tp_vlan_tci)
        });
        let Some((kind, control)) = tag else {
            return frames.from_bytes(bytes);
        };
        frames.fill(|slot| {
            let slot = slot.get_mut(..len + 4)?;
            slot[..12].copy_from_slice(&bytes[..12]);
            slot[12..14].copy_from_slice(&kind.to_be_bytes());
            slot[14..16].copy_from_slice(&control.to_be_bytes());
            slot[16..].copy_from_slice(&bytes[12..]);
            Some(len + 4)
        })
    }

    fn give_back(&mut self) {
        // Pairs with the kernel's read of the status: our reads of the frame come before.
        self.status()
            .store(libc::TP_STATUS_KERNEL, Ordering::Release);
        self.next = (self.next + 1) % PLACES;
    }

    fn place(&self) -> NonNull<u8> {
        // SAFETY: `next` is below PLACES, and as many places were mapped.
        unsafe { self.ring.add(self.next * self.place_bytes) }
    }

    /// The first word of a place.
    fn status(&self) -> &AtomicU32 {
        // SAFETY: in the mapping, aligned as a place is, alive with `self`; the kernel accesses it
        // whole.
        unsafe { self.place().cast::<AtomicU32>().as_ref() }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        let bytes = PLACES * self.place_bytes;
        // SAFETY: this is the mapping that `open` made, and nothing refers to it any more.
        unsafe { libc::munmap(self.ring.as_ptr().cast::<c_void>(), bytes) };
    }
}

fn set_option<T>(fd: &OwnedFd, name: c_int, value: &T) -> io::Result<()> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of a value that is borrowed for the call.
    let answer = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_PACKET,
            name,
            std::ptr::from_ref(value).cast::<c_void>(),
            size_of::<T>() as socklen_t,
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn map(fd: &OwnedFd, bytes: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: the kernel chooses the place, so nothing that exists is replaced.
    let ring = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            0,
        )
    };
    if ring == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(ring.cast::<u8>()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
