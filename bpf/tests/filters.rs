//! Every program, judged by the kernel: frames go through a filtered datagram socket pair.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;

use colo_bpf::{attach_to_socket, drop_all, for_guest};

const GUEST: [u8; 6] = [0x52, 0x54, 0x00, 0xc0, 0x10, 0x01];
const OTHER: [u8; 6] = [0x52, 0x54, 0x00, 0xc0, 0x10, 0x02];

/// Sends the frame, then a frame that always passes, and tells whether the first arrived.
fn passes(program: &[libc::sock_filter], frame: &[u8], marker: Option<&[u8]>) -> bool {
    let (near, far) = UnixDatagram::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    attach_to_socket(far.as_fd(), program).unwrap();
    near.send(frame).unwrap();
    if let Some(marker) = marker {
        near.send(marker).unwrap();
    }
    let mut buf = [0; 2048];
    match far.recv(&mut buf) {
        Ok(n) => buf[..n] == *frame,
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => false,
        Err(e) => panic!("{e}"),
    }
}

fn frame_to(destination: [u8; 6], len: usize) -> Vec<u8> {
    let mut frame = vec![0xa5; len];
    frame[..6].copy_from_slice(&destination);
    frame
}

#[test]
fn a_guest_gets_its_own_frames_and_those_for_everyone() {
    let program = for_guest(&[GUEST, OTHER]);
    let marker = frame_to([0xff; 6], 33);
    let table: [([u8; 6], bool); 13] = [
        (GUEST, true),
        (OTHER, true),
        ([0xff; 6], true),
        ([0x33, 0x33, 0, 0, 0, 1], true),
        ([0x33, 0x33, 0xff, 1, 2, 3], true),
        ([0x01, 0x00, 0x5e, 0, 0, 0xfb], true),
        ([0x52, 0x54, 0x00, 0xc0, 0x10, 0x03], false),
        ([0x52, 0x54, 0x00, 0xc0, 0x11, 0x01], false),
        ([0x52, 0x54, 0x01, 0xc0, 0x10, 0x01], false),
        ([0x01, 0x80, 0xc2, 0, 0, 0], false),
        ([0xff, 0xff, 0xff, 0xff, 0xff, 0xfe], false),
        ([0x33, 0x34, 0, 0, 0, 1], false),
        ([0x01, 0x00, 0x5f, 0, 0, 1], false),
    ];
    for (destination, expected) in table {
        for len in [14, 60, 1514] {
            let frame = frame_to(destination, len);
            assert_eq!(
                passes(&program, &frame, Some(&marker)),
                expected,
                "{destination:02x?}"
            );
        }
    }
}

#[test]
fn a_frame_shorter_than_an_address_is_rejected() {
    let program = for_guest(&[GUEST]);
    assert!(!passes(&program, &GUEST[..3], None));
    assert!(!passes(&program, &GUEST[..5], None));
}

#[test]
fn nothing_passes_before_promotion() {
    for destination in [GUEST, [0xff; 6], [0x33, 0x33, 0, 0, 0, 1]] {
        assert!(!passes(&drop_all(), &frame_to(destination, 60), None));
    }
}
