//! The packet channel takes no memory while it carries messages, over TCP and as datagrams.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use colo_fastpath::link::{PacketLink, PacketMsg, Packets, open_ports};

const ROUNDS: u64 = 3_000;
const PATIENCE: Duration = Duration::from_secs(60);

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Counts what each thread takes.
struct Counting;

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer comes from `alloc` above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn links(packets: Packets) -> [PacketLink; 2] {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    let patience_us = PATIENCE.as_micros() as u64;
    [(near, 1), (far, 2)].map(|(stream, key)| {
        let ports = open_ports(&stream, packets, None, |_| None).list;
        PacketLink::with_ports(stream, ports, key, patience_us).unwrap()
    })
}

/// Says a few messages at each end and takes what has come; how many that were.
fn round(links: &mut [PacketLink; 2], count: u64) -> u64 {
    let frame = [7; 1514];
    let mut heard = 0;
    for link in links {
        for seq in 0..count {
            let frame = &frame[..60 + seq as usize * 181];
            let epoch = 1;
            link.push(&PacketMsg::Input { epoch, seq, frame });
            link.push(&PacketMsg::InputAck { up_to: seq });
        }
        link.flush().unwrap();
        link.fill().unwrap();
        while link.next_msg().unwrap().is_some() {
            heard += 1;
        }
    }
    heard
}

fn until(mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "gave up waiting");
    }
}

#[test]
fn no_memory_is_taken_while_messages_flow() {
    for (packets, carrier) in [(Packets::Tcp, "tcp"), (Packets::Udp, "udp")] {
        let mut links = links(packets);
        until(|| {
            round(&mut links, 0);
            links.iter().all(|link| link.stats().carrier == carrier)
        });
        let before = ALLOCATIONS.with(Cell::get);
        let (mut said, mut heard) = (0, 0);
        for n in 0..ROUNDS {
            let count = if links.iter().all(PacketLink::has_room) {
                n % 8
            } else {
                0
            };
            said += 4 * count;
            heard += round(&mut links, count);
        }
        until(|| {
            heard += round(&mut links, 0);
            heard == said
        });
        assert_eq!(ALLOCATIONS.with(Cell::get) - before, 0, "over {carrier}");
        assert!(said > ROUNDS, "{said}");
    }
}
