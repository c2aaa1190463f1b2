//! The ends of `transfer` on a bare io_uring: all streams on one ring of one thread, nothing but bytes.
//!
//! Invariants: each send or receive under way has a buffer of its own, a *slot*, of which a stream has one, or `DEPTH` for
//! the sends of [`Way::UringDeep`]; the ring is dropped, and with it what the kernel knows of the buffers, before they are.
//!
//! Does not keep the order of what several sends have under way: all bytes are alike.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use colo_vmm::checkpoint::channel::set_low_water;
use io_uring::types::{BufRingEntry, Fixed};
use io_uring::{IoUring, cqueue, opcode, squeue};

use crate::place::BenchError;
use crate::transfer::{CHUNK_BYTES, Way};

const PAGE_BYTES: usize = 4096;
/// Sends of a stream that are under way at once, where there are several.
const DEPTH: usize = 4;
/// Provided buffers of a multishot receive, and their size.
const PROVIDED: u16 = 32;
const PROVIDED_BYTES: usize = CHUNK_BYTES / 2;

/// Page-aligned memory.
#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; PAGE_BYTES]);

fn memory(bytes: usize) -> Vec<Page> {
    vec![Page([7; PAGE_BYTES]); bytes.div_ceil(PAGE_BYTES)]
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> BenchError {
    BenchError::io(format!("io_uring: {what}"))
}

/// A ring for these sockets with a buffer for each slot, registered where the way asks for it.
struct Bare {
    ring: IoUring,
    buffers: Vec<Vec<Page>>,
    way: Way,
    depth: usize,
}

impl Bare {
    fn new(sockets: &[TcpStream], way: Way, fixed: bool, depth: usize) -> Result<Self, BenchError> {
        let mut builder = IoUring::builder();
        builder
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(1024);
        let ring = builder.build(64).map_err(failed("set up"))?;
        let files: Vec<_> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
        ring.submitter()
            .register_files(&files)
            .map_err(failed("register sockets"))?;
        let slots = 0..sockets.len() * depth;
        let mut buffers: Vec<_> = slots.map(|_| memory(CHUNK_BYTES)).collect();
        let vectors = buffers.iter_mut().map(|buffer| libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: CHUNK_BYTES,
        });
        if fixed {
            let vectors: Vec<_> = vectors.collect();
            // SAFETY: the buffers are as long, and dropped after the ring (the order of the fields).
            let done = unsafe { ring.submitter().register_buffers(&vectors) };
            done.map_err(failed("register buffers"))?;
        }
        Ok(Self {
            ring,
            buffers,
            way,
            depth,
        })
    }

    fn slots(&self) -> usize {
        self.buffers.len()
    }

    /// Whose slot it is.
    fn stream(&self, slot: usize) -> usize {
        slot / self.depth
    }

    fn push(&mut self, entry: &squeue::Entry) -> Result<(), BenchError> {
        // SAFETY: entries name the buffers of this ring, which outlive it and which nobody looks into.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.map_err(|_| BenchError::Failed("io_uring: the submission queue is full".to_owned()))
    }

    fn send(&mut self, slot: usize, from: usize) -> Result<(), BenchError> {
        self.send_part(slot, from, CHUNK_BYTES)
    }

    fn send_part(&mut self, slot: usize, from: usize, to: usize) -> Result<(), BenchError> {
        let at = self.buffers[slot].as_ptr().cast::<u8>().wrapping_add(from);
        let file = Fixed(self.stream(slot) as u32);
        let (index, length) = (slot as u16, (to - from) as u32);
        let entry = match self.way {
            Way::UringFixed | Way::UringDeep => {
                opcode::WriteFixed::new(file, at, length, index).build()
            }
            Way::UringZeroCopy => {
                let send = opcode::SendZc::new(file, at, length);
                send.buf_index(Some(index)).build()
            }
            _ => opcode::Send::new(file, at, length).build(),
        };
        self.push(&entry.user_data(slot as u64))
    }

    fn receive(&mut self, slot: usize) -> Result<(), BenchError> {
        let at = self.buffers[slot].as_mut_ptr().cast::<u8>();
        let file = Fixed(self.stream(slot) as u32);
        let length = CHUNK_BYTES as u32;
        let entry = match self.way {
            Way::UringMultishot | Way::UringDeep => opcode::RecvMulti::new(file, 0).build(),
            Way::UringFixed => opcode::ReadFixed::new(file, at, length, slot as u16).build(),
            _ => opcode::Recv::new(file, at, length).build(),
        };
        self.push(&entry.user_data(slot as u64))
    }

    fn wait(&mut self) -> Result<Vec<cqueue::Entry>, BenchError> {
        self.ring.submit_and_wait(1).map_err(failed("wait"))?;
        Ok(self.ring.completion().collect())
    }
}

fn result(entry: &cqueue::Entry) -> Result<usize, BenchError> {
    usize::try_from(entry.result())
        .map_err(|_| failed("a send or receive")(io::Error::from_raw_os_error(-entry.result())))
}

/// So many chunks on each stream, then the end.
pub(crate) fn send(sockets: Vec<TcpStream>, chunks: u64, way: Way) -> Result<(), BenchError> {
    let fixed = matches!(way, Way::UringFixed | Way::UringZeroCopy | Way::UringDeep);
    let depth = if way == Way::UringDeep { DEPTH } else { 1 };
    let mut bare = Bare::new(&sockets, way, fixed, depth)?;
    let slots = bare.slots();
    // Chunks of each stream that no slot has begun, slots of it that have one, and what each slot has sent of its own.
    let mut left = vec![chunks; sockets.len()];
    let mut busy = vec![0; sockets.len()];
    let mut sent = vec![0; slots];
    let mut notifications = 0_i64;
    for slot in 0..slots {
        let stream = bare.stream(slot);
        if left[stream] > 0 {
            (left[stream], busy[stream]) = (left[stream] - 1, busy[stream] + 1);
            bare.send(slot, 0)?;
        }
    }
    while notifications > 0 || busy.iter().any(|&slots| slots > 0) {
        for entry in bare.wait()? {
            if cqueue::notif(entry.flags()) {
                notifications -= 1;
                continue;
            }
            notifications += i64::from(cqueue::more(entry.flags()));
            let slot = entry.user_data() as usize;
            let stream = bare.stream(slot);
            sent[slot] += result(&entry)?;
            if sent[slot] < CHUNK_BYTES {
                bare.send(slot, sent[slot])?;
                continue;
            }
            sent[slot] = 0;
            if left[stream] > 0 {
                left[stream] -= 1;
                bare.send(slot, 0)?;
                continue;
            }
            busy[stream] -= 1;
            if busy[stream] == 0 {
                let shut = sockets[stream].shutdown(Shutdown::Write);
                shut.map_err(failed("shut down"))?;
            }
        }
    }
    Ok(())
}

/// So many bytes after a rest, and again; gives what the kernel took of each burst a second, from its first byte to its last.
pub(crate) fn bursts(
    socket: TcpStream,
    bytes: usize,
    count: u32,
    rest: Duration,
) -> Result<Vec<f64>, BenchError> {
    let mut bare = Bare::new(&[socket], Way::UringLowWater, false, 1)?;
    let mut burst = || {
        thread::sleep(rest);
        let begun = Instant::now();
        let mut left = bytes;
        while left > 0 {
            bare.send_part(0, 0, left.min(CHUNK_BYTES))?;
            for entry in bare.wait()? {
                left -= result(&entry)?;
            }
        }
        Ok(bytes as f64 / begun.elapsed().as_secs_f64())
    };
    (0..count).map(|_| burst()).collect()
}

/// Bytes until all streams have ended; all in the calling thread.
pub(crate) fn receive(sockets: &[TcpStream], way: Way) -> Result<(u64, u64), BenchError> {
    // Dropped after the ring.
    let mut provided = Provided::new();
    let mut bare = Bare::new(sockets, way, way == Way::UringFixed, 1)?;
    if matches!(way, Way::UringLowWater | Way::UringDeep) {
        sockets.iter().try_for_each(wake_for_chunks)?;
    }
    if matches!(way, Way::UringMultishot | Way::UringDeep) {
        provided.register(&bare.ring)?;
    }
    for slot in 0..bare.slots() {
        bare.receive(slot)?;
    }
    let (mut open, mut bytes) = (bare.slots(), 0);
    while open > 0 {
        for entry in bare.wait()? {
            let slot = entry.user_data() as usize;
            let more = cqueue::more(entry.flags());
            if entry.result() == -libc::ENOBUFS {
                bare.receive(slot)?;
                continue;
            }
            let got = result(&entry)?;
            bytes += got as u64;
            if let Some(id) = cqueue::buffer_select(entry.flags()) {
                provided.give(id);
            }
            match got {
                0 => open -= 1,
                _ if !more => bare.receive(slot)?,
                _ => {}
            }
        }
    }
    Ok((bytes, 0))
}

/// Has the receiver woken when a chunk is there, as that of checkpoints is: most of what it costs to send to a thread that
/// sleeps on another core is to wake it.
fn wake_for_chunks(socket: &TcpStream) -> Result<(), BenchError> {
    set_low_water(socket, CHUNK_BYTES).map_err(failed("set the low water mark"))
}

/// A ring of provided buffers (io_uring_register_buf_ring(3)).
struct Provided {
    /// The entries, on a page of their own.
    ring: Vec<Page>,
    buffers: Vec<Page>,
    tail: u16,
}

impl Provided {
    fn new() -> Self {
        let mut ring = memory(PAGE_BYTES);
        ring[0].0.fill(0);
        let buffers = memory(usize::from(PROVIDED) * PROVIDED_BYTES);
        Self {
            ring,
            buffers,
            tail: 0,
        }
    }

    fn register(&mut self, ring: &IoUring) -> Result<(), BenchError> {
        let base = self.ring.as_mut_ptr() as u64;
        // SAFETY: the page holds that many entries, and is dropped after the ring.
        let done = unsafe {
            ring.submitter()
                .register_buf_ring_with_flags(base, PROVIDED, 0, 0)
        };
        done.map_err(failed("register provided buffers"))?;
        (0..PROVIDED).for_each(|id| self.give(id));
        Ok(())
    }

    /// Lets the kernel have a buffer (again).
    fn give(&mut self, id: u16) {
        let from = usize::from(id) * (PROVIDED_BYTES / PAGE_BYTES);
        let at = self.buffers[from..].as_mut_ptr() as u64;
        let base = self.ring.as_mut_ptr().cast::<BufRingEntry>();
        let place = usize::from(self.tail % PROVIDED);
        // SAFETY: the page holds PROVIDED entries; the kernel reads only those before the tail.
        let entry = unsafe { &mut *base.add(place) };
        entry.set_addr(at);
        entry.set_len(PROVIDED_BYTES as u32);
        entry.set_bid(id);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: `base` is the first entry, initialised to zeros.
        let tail = unsafe { BufRingEntry::tail(base) }.cast_mut();
        // SAFETY: the tail lies in our page, aligned, and the kernel only reads it.
        let tail = unsafe { AtomicU16::from_ptr(tail) };
        // Release: the entry is written before the kernel sees it, which reads the tail with acquire.
        tail.store(self.tail, Ordering::Release);
    }
}
