//! AF_XDP without anything around it: a sender that gives a port a burst of frames, and the least that
//! forwards them from one port to another.
//!
//! Invariants: a burst is in the far port's ring, or lost, when its sender has all frames back; frames
//! are forwarded in the memory they were received into.
//!
//! Touches no byte of what it forwards.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use colo_bpf::{Attach, AttachMode, Groups, GuestFrames, XdpProgram};
use colo_fastpath::ring::Area;
use colo_fastpath::ring::xsk::{
    BindOptions, Descriptor, Interface, Kick, Rx, Umem, UmemSettings, XskError, XskSocket,
};

use crate::datapath_forward::{Drained, GUEST, Stopwatch};

/// Frames of a batch, as in the worker's loop.
const BATCH: u32 = 64;
/// Chunks of a port that receives.
const CHUNKS: usize = 2048;
const CHUNK_BYTES: usize = 4096;
/// How long the kernel may keep a queue after its last socket was closed.
const BUSY_MAX: Duration = Duration::from_secs(2);
/// Longest wait for frames that are under way.
const PATIENCE: Duration = Duration::from_secs(10);
/// Local experimental EtherType 1 (IEEE 802): nobody at the far end wants it.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Why a port cannot be used, or forwards nothing.
pub(crate) type BareError = Box<dyn std::error::Error + Send + Sync>;

fn memory(bytes: usize) -> Result<(Arc<Area>, Umem), BareError> {
    let area = Arc::new(Area::reserve(bytes)?);
    area.map_anonymous(bytes)?;
    let base = NonNull::new(area.base()).ok_or("no memory")?;
    let mapped = area.mapped_bytes() as u64;
    let owner = Box::new(area.clone());
    // SAFETY: the area stays mapped as long as its owner lives, and nobody makes references to it.
    let umem = unsafe { Umem::register(base, mapped, UmemSettings::default(), owner) }?;
    Ok((area, umem))
}

fn bind(umem: &Umem, interface: &str) -> Result<XskSocket, BareError> {
    let (interface, begun) = (Interface::find(interface)?, Instant::now());
    loop {
        match XskSocket::bind(umem, &interface, 0, &BindOptions::default()) {
            Err(XskError::Busy { .. }) if begun.elapsed() < BUSY_MAX => {
                // Nothing tells when: the kernel does it in a work queue.
                thread::sleep(Duration::from_millis(1));
            }
            done => return Ok(done?),
        }
    }
}

/// Sends bursts of equal frames to the guest's address.
#[derive(Debug)]
pub(crate) struct Source {
    socket: XskSocket,
    frame_bytes: u32,
}

impl Source {
    /// On an interface of this thread's namespace.
    pub(crate) fn new(interface: &str, frame_bytes: usize) -> Result<Self, BareError> {
        let (area, umem) = memory(CHUNK_BYTES)?;
        let mut frame = GUEST.to_vec();
        frame.extend([0x52, 0x54, 0, 0xc0, 0x20, 1]);
        frame.extend(ETHERTYPE);
        frame.resize(frame_bytes.min(CHUNK_BYTES), 0x5a);
        // SAFETY: the area has a chunk, the frame is no longer, and nothing is sent yet.
        unsafe {
            area.base()
                .copy_from_nonoverlapping(frame.as_ptr(), frame.len())
        };
        Ok(Self {
            socket: bind(&umem, interface)?,
            frame_bytes: frame.len() as u32,
        })
    }

    /// Sends so many and waits until the kernel is done with all of them.
    pub(crate) fn burst(&mut self, frames: u64) -> Result<(), BareError> {
        let (mut sent, mut back) = (0, 0);
        let begun = Instant::now();
        while back < frames {
            let room = self.socket.tx_free(BATCH).min(BATCH);
            for _ in 0..u64::from(room).min(frames - sent) {
                let frame = Descriptor {
                    offset: 0,
                    len: self.frame_bytes,
                    more: false,
                };
                sent += u64::from(self.socket.send(frame)?);
            }
            push_out(&mut self.socket)?;
            while self.socket.complete().is_some() {
                back += 1;
            }
            self.socket.release_completions();
            if begun.elapsed() > PATIENCE {
                return Err(format!("{back} of {frames} frames were sent").into());
            }
        }
        Ok(())
    }
}

/// Both ports, on one registration.
#[derive(Debug)]
pub(crate) struct BareForward {
    near: XskSocket,
    far: XskSocket,
    _program: XdpProgram,
}

impl BareForward {
    /// On two interfaces of this thread's namespace.
    pub(crate) fn new(near: &str, far: &str) -> Result<Self, BareError> {
        let (_, umem) = memory(CHUNKS * CHUNK_BYTES)?;
        let mut near_socket = bind(&umem, near)?;
        let far_socket = bind(&umem, far)?;
        for chunk in 0..CHUNKS {
            near_socket.fill((chunk * CHUNK_BYTES) as u64)?;
        }
        near_socket.submit_fill();
        let mut program = XdpProgram::load()?;
        program.add_guest_mac(GUEST)?;
        program.set_groups(Groups::Host)?;
        program.set_guest_frames(GuestFrames::Accept)?;
        program.set_guest_socket(0, near_socket.as_fd())?;
        program.attach(near, Attach::Only(AttachMode::Driver))?;
        Ok(Self {
            near: near_socket,
            far: far_socket,
            _program: program,
        })
    }

    /// Forwards so many and gives what that took.
    pub(crate) fn drain(&mut self, frames: u64) -> Result<Drained, BareError> {
        let (watch, begun) = (Stopwatch::start(), Instant::now());
        let mut back = 0;
        while back < frames {
            self.take_batch()?;
            push_out(&mut self.far)?;
            back += self.give_back()?;
            if begun.elapsed() > PATIENCE {
                return Err(format!("{back} of {frames} frames were forwarded").into());
            }
        }
        Ok(watch.stop(frames))
    }

    fn take_batch(&mut self) -> Result<(), BareError> {
        for _ in 0..self.far.tx_free(BATCH).min(BATCH) {
            let Some(Rx::Piece(piece)) = self.near.receive() else {
                break;
            };
            self.far.send(Descriptor {
                offset: piece.offset,
                len: piece.len,
                more: piece.more,
            })?;
        }
        self.near.release_rx();
        Ok(())
    }

    /// Sent frames become room to receive into.
    fn give_back(&mut self) -> Result<u64, BareError> {
        let mut count = 0;
        while let Some(offset) = self.far.complete() {
            let chunk = offset - offset % CHUNK_BYTES as u64;
            self.near.fill(chunk)?;
            count += 1;
        }
        self.far.release_completions();
        self.near.submit_fill();
        if self.near.fill_needs_wakeup() {
            self.near.wake_rx()?;
        }
        Ok(count)
    }
}

fn push_out(socket: &mut XskSocket) -> Result<(), BareError> {
    socket.submit_tx();
    if socket.tx_pending() > 0 && socket.tx_needs_wakeup() && socket.kick_tx()? == Kick::Down {
        return Err("the port is down".into());
    }
    Ok(())
}
