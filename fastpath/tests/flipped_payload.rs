//! Invariant 7: a guest that goes on writing to a buffer which it has handed over never gets bytes out that were not
//! compared: what leaves is what the SVM said, or what every receiver discards.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

mod mock_pair;

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use colo_fastpath::frame::TxMode;
use colo_fastpath::nic::SocketNic;
use colo_fastpath::ring::GuestRam;

use mock_pair::{MockPair, datagram, verifies};

const FRAMES: u64 = 300;
const PAYLOAD: usize = 1200;
/// Where in the frame the guest writes: behind what the host copies first.
const FLIPPED_AT: u64 = 700;

/// Writes into the frame at `gpa` over and over, until told to stop.
fn flip(ram: &GuestRam, gpa: &AtomicU64, stop: &AtomicBool) {
    let mut value = 0_u8;
    while !stop.load(Ordering::Relaxed) {
        let at = gpa.load(Ordering::Relaxed);
        if at != 0 {
            value = value.wrapping_add(1);
            ram.write(at + FLIPPED_AT, &[value, value ^ 0xff]).unwrap();
        }
    }
}

/// What came out: frames as the SVM sent them, and frames that a receiver discards.
fn outcome(wire: &UnixDatagram, released: u64) -> (u64, u64) {
    let (mut same, mut discarded) = (0, 0);
    let mut buf = [0; 2048];
    for _ in 0..released {
        let len = wire.recv(&mut buf).unwrap();
        let frame = &buf[..len];
        let mut number = [0; 8];
        number.copy_from_slice(&frame[42..50]);
        if frame == datagram(u64::from_be_bytes(number), PAYLOAD) {
            same += 1;
        } else {
            assert!(
                !verifies(frame),
                "a frame that nobody compared, and that verifies"
            );
            discarded += 1;
        }
    }
    (same, discarded)
}

fn flipped_in(tx: TxMode) -> (u64, u64) {
    let (nic, wire) = SocketNic::pair(1500).unwrap();
    wire.set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let mut pair = MockPair::new(Box::new(nic), tx);
    let (gpa, stop) = (
        Arc::new(AtomicU64::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let flipper = std::thread::spawn({
        let (ram, gpa, stop) = (pair.pvm.ram.clone(), gpa.clone(), stop.clone());
        move || flip(&ram, &gpa, &stop)
    });
    let reader = std::thread::spawn(move || outcome(&wire, FRAMES));
    for n in 0..FRAMES {
        let frame = datagram(n, PAYLOAD);
        // The SVM is honest, and first: the PVM's frame is judged as soon as it is there.
        pair.svm.send(&frame);
        let at = pair.pvm.next_frame_gpa();
        pair.pvm.send(&frame);
        gpa.store(at, Ordering::Relaxed);
        // Checkpoints release what was found to differ, so nothing stays behind.
        pair.wait_released(n + 1);
    }
    stop.store(true, Ordering::Relaxed);
    flipper.join().unwrap();
    let report = pair.report();
    println!("{tx:?}: {report:?}");
    assert!(report.matched > 0, "{report:?}");
    let released_otherwise = report.otherwise;
    let (same, discarded) = reader.join().unwrap();
    assert_eq!(same + discarded, FRAMES);
    (discarded, released_otherwise)
}

#[test]
fn what_leaves_with_its_counterparts_bytes_is_what_was_compared() {
    let (strange, by_checkpoint) = flipped_in(TxMode::Twin);
    assert!(strange <= by_checkpoint, "{strange} {by_checkpoint}");
}

#[test]
fn what_is_copied_first_is_what_was_compared() {
    let (strange, by_checkpoint) = flipped_in(TxMode::Exact);
    assert!(strange <= by_checkpoint, "{strange} {by_checkpoint}");
}

#[test]
fn what_leaves_in_place_is_discarded_when_it_is_not_what_was_compared() {
    flipped_in(TxMode::InPlace);
}
