//! The primary path takes all its memory in `new`, also with as many frames and flows as its limits allow.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod fixed;

use colo_compare::testing::{Segment, Side, udp};
use colo_compare::{Action, Frames, Limits, PrimaryPath};
use fixed::{Pool, pure};

/// What needs no memory with few frames may need some with many.
#[test]
fn a_path_that_is_full_to_its_default_limits_takes_no_memory() {
    let limits = Limits::default();
    let slots = limits.max_held_frames + limits.max_svm_frames + 1;
    let (mut pool, mut path) = (Pool::new(slots as u32), PrimaryPath::new(limits));
    let first = path.pair(0).unwrap();
    path.commit(0, &mut pool, first).unwrap();
    for ends_well in [false, true, true] {
        let mut port = 0;
        while path.room() {
            port += 1;
            let token = pool.insert(&udp(Side::V4, false, 7, port, b"pvm")).unwrap();
            pure("handle_guest_tx", || {
                path.handle_guest_tx(1, &mut pool, token)
            });
        }
        for n in 0..=limits.max_svm_frames as u64 {
            let token = pool.insert(&data(n)).unwrap();
            let epoch = path.epoch();
            pure("handle_svm_output", || {
                path.handle_svm_output(1, &mut pool, epoch, n, token);
            });
        }
        let covered = pure("cut", || path.cut(2)).unwrap();
        let pending = pure("pending", || path.pending().count());
        assert_eq!(pending, limits.max_held_frames);
        if ends_well {
            pure("commit", || path.commit(3, &mut pool, covered)).unwrap();
        } else {
            pure("abort", || path.abort(3, &mut pool, covered)).unwrap();
        }
        let mut released = 0;
        while let Some(action) = pure("poll_action", || path.poll_action()) {
            if let Action::Release { token, .. } = action {
                pool.release(token);
                released += 1;
            }
        }
        let expected = if ends_well { limits.max_held_frames } else { 0 };
        assert_eq!(released, expected);
    }
    assert!(path.stats().svm_overflow > 0);
    path.close(&mut pool);
    assert_eq!(pool.used(), 0);
}

/// New data of one of many connections, in no order.
fn data(n: u64) -> Vec<u8> {
    let seq = n as u32 % 64 * 7 % 64;
    let segment = Segment::new(Side::V6).ports(7, (n / 64) as u16).seq(seq);
    segment.payload(b"svm").bytes()
}

#[test]
fn expecting_frames_of_many_flows_takes_no_memory() {
    let limits = Limits {
        max_flows: 5000,
        ..Limits::default()
    };
    let (mut pool, mut path) = (Pool::new(128), PrimaryPath::new(limits));
    let epoch = path.pair(0).unwrap();
    path.commit(0, &mut pool, epoch).unwrap();
    for port in 0..4500 {
        let token = pool.insert(&udp(Side::V6, true, 7, port, b"question"));
        pure("handle_delivered", || {
            path.handle_delivered(1, &mut pool, token.unwrap());
        });
        while let Some(action) = path.poll_action() {
            if let Action::Mirror {
                input_seq, token, ..
            } = action
            {
                pool.release(token);
                path.handle_input_ack(1, &mut pool, input_seq);
            }
        }
    }
    assert_eq!(path.flows(), 4500);
    let answers = (0..100).map(|port| udp(Side::V6, false, 7, port * 40, b"answer"));
    let tokens: Vec<_> = answers.map(|bytes| pool.insert(&bytes).unwrap()).collect();
    pure("expect", || path.expect(&pool, tokens.iter()));
    assert!(pool.prefetched.get() > 100, "nothing was expected");
    tokens.into_iter().for_each(|token| pool.release(token));
    path.close(&mut pool);
    assert_eq!(pool.used(), 0);
}
