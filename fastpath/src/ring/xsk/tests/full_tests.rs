//! What the kernel says when it does not get through a tx ring, on real sockets.

use std::io;
use std::time::{Duration, Instant};

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

/// A socket whose completions are read or not.
struct Ring<'a> {
    socket: &'a mut XskSocket,
    said: Vec<Kick>,
    reaped: Vec<u64>,
}

impl TxRing for Ring<'_> {
    fn pending(&mut self) -> u32 {
        self.socket.tx_pending()
    }

    fn needs_wakeup(&self) -> bool {
        self.socket.tx_needs_wakeup()
    }

    fn kick(&mut self) -> io::Result<Kick> {
        let said = self.socket.kick_tx()?;
        self.said.push(said);
        Ok(said)
    }

    fn reap(&mut self) -> u32 {
        let before = self.reaped.len();
        while let Some(offset) = self.socket.complete() {
            self.reaped.push(offset);
        }
        self.socket.release_completions();
        (self.reaped.len() - before) as u32
    }
}

fn ring(socket: &mut XskSocket) -> Ring<'_> {
    Ring {
        socket,
        said: Vec::new(),
        reaped: Vec::new(),
    }
}

/// Frames in the tx ring, submitted and not told of; each at its own place.
fn queue(memory: &Memory, socket: &mut XskSocket, count: u8) {
    for n in 0..count {
        let offset = u64::from(n) * 64;
        memory.write(offset, &frame(60, n));
        let piece = Descriptor {
            offset,
            len: 60,
            more: false,
        };
        assert!(socket.send(piece).unwrap());
    }
    socket.submit_tx();
}

#[test]
fn a_kernel_without_room_for_completions_goes_on_when_there_is_some_and_no_frame_is_lost() {
    with_veth(1, 1500, || {
        const COUNT: u8 = 20;
        let memory = Memory::new(UmemSettings::default());
        let options = BindOptions {
            completion_entries: 8,
            ..small_rings()
        };
        let mut near = bind(&memory.umem, "a0", 0, &options);
        let mut far = bind(&memory.umem, "a1", 0, &small_rings());
        fill_chunks(&mut far, u64::from(COUNT) + 4);
        let _program = program_for("a1", AttachMode::Driver, &[&far]);
        queue(&memory, &mut near, COUNT);

        // It gets on as far as there is room, and then not at all.
        assert_eq!(near.kick_tx().unwrap(), Kick::Again);
        assert_eq!(near.tx_pending(), 12);
        assert_eq!(near.kick_tx().unwrap(), Kick::Again);
        assert_eq!(near.tx_pending(), 12);

        let mut ring = ring(&mut near);
        let begun = Instant::now();
        while ring.pending() > 0 || ring.reaped.len() < usize::from(COUNT) {
            let kicks = kick_all(&mut ring, 32);
            assert_eq!((kicks.dropped, kicks.calls), (0, kicks.asked));
            assert!(kicks.failure.is_none(), "{kicks:?}");
            ring.reap();
            assert!(begun.elapsed() < PATIENCE, "{kicks:?}");
        }
        assert!(ring.said.contains(&Kick::Again), "{:?}", ring.said);
        assert_eq!(ring.said.last(), Some(&Kick::Done));
        for n in 0..COUNT {
            assert_eq!(receive(&memory, &mut far).0, frame(60, n));
        }
    });
}

#[test]
fn what_the_kernel_throws_away_without_a_carrier_is_said_for_each_frame() {
    with_veth(1, 1500, || {
        let memory = Memory::new(UmemSettings::default());
        let mut near = bind(&memory.umem, "a0", 0, &small_rings());
        let mut far = bind(&memory.umem, "a1", 0, &small_rings());
        fill_chunks(&mut far, 8);
        let _program = program_for("a1", AttachMode::Driver, &[&far]);
        // The interface itself stays up.
        ip("link set a1 down");
        queue(&memory, &mut near, 3);
        let kicks = kick_all(&mut ring(&mut near), 32);
        assert_eq!((kicks.calls, kicks.dropped, kicks.in_vain), (3, 3, 0));
        assert_eq!(near.tx_pending(), 0);
        ip("link set a1 up");
        while !near.interface().has_link().unwrap() {
            std::thread::yield_now();
        }
        queue(&memory, &mut near, 1);
        let mut ring = ring(&mut near);
        assert_eq!(kick_all(&mut ring, 32).dropped, 0);
        assert_eq!(receive(&memory, &mut far).0, frame(60, 0));
    });
}
