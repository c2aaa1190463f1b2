//! Streams that go through all sequence numbers more than once, through both paths: with translations of the
//! handshake, of the pair and of a takeover, with checkpoints between.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod rig;

use colo_compare::{Action, Limits};
use rig::Rig;

/// Steps of nearly an eighth of the sequence space: no mark that is refreshed by what is said between them goes
/// stale, and one that is not lies behind, then ahead, then behind again.
const STEP: u32 = (1 << 29) - 1001;
const STEPS: u32 = 20;

/// Which ends send much: the guest, the client.
const WAYS: [(bool, bool); 3] = [(true, false), (false, true), (true, true)];

/// Says something on all connections, for which nothing must wait for a checkpoint.
fn talk(rig: &mut Rig) {
    let ports: Vec<u16> = rig.clients.keys().copied().collect();
    for port in ports {
        rig.send(port, b"some bytes");
        rig.send(port, b" and some more");
    }
    rig.assert_all_echoed();
    assert!(rig.requests.is_empty(), "{:?}", rig.requests);
}

fn go_on((guest, client): (bool, bool), rig: &mut Rig) {
    let bytes = |sends| if sends { STEP } else { 0 };
    rig.skip(bytes(guest), bytes(client));
    talk(rig);
}

#[test]
fn nothing_diverges_and_nothing_is_lost_when_numbers_have_wrapped() {
    for way in WAYS {
        for steps_between_commits in [3, STEPS] {
            let mut rig = Rig::new(Limits::default());
            // Older than the secondary: the same numbers on both sides. The others are translated.
            rig.open(40_000);
            rig.join();
            rig.open(40_001);
            for step in 1..=STEPS {
                go_on(way, &mut rig);
                if step % steps_between_commits == 0 {
                    rig.checkpoint();
                }
            }
            let before = rig.primary.stats().released_by_match;
            talk(&mut rig);
            assert_eq!(rig.primary.stats().released_by_match, before + 4);
            let secondary = rig.secondary.as_ref().unwrap();
            assert_eq!(secondary.input_frames() + secondary.stored_outputs(), 0);
            rig.close();
        }
    }
}

#[test]
fn rule_1_translations_hold_for_streams_that_have_wrapped() {
    for way in WAYS {
        let mut rig = Rig::new(Limits::default());
        rig.open(41_000);
        rig.join();
        rig.open(41_001);
        for _ in 0..STEPS {
            go_on(way, &mut rig);
        }
        rig.kill_primary();
        for _ in 0..STEPS {
            go_on(way, &mut rig);
        }
        rig.join();
        rig.open(41_002);
        for _ in 0..STEPS {
            go_on(way, &mut rig);
            rig.checkpoint();
        }
        rig.kill_primary();
        go_on(way, &mut rig);
        rig.close();
    }
}

/// A client's segment that vanishes between the SVM's ring and its socket.
fn send_and_lose(rig: &mut Rig, port: u16, data: &[u8]) {
    let client = rig.clients.get_mut(&port).unwrap();
    client.sent.extend_from_slice(data);
    let bytes = client.retransmit(rig.now_us).unwrap();
    rig.send_to_primary(&bytes);
    let (now_us, secondary) = (rig.now_us, rig.secondary.as_mut().unwrap());
    while let Some(action) = rig.primary.poll_action() {
        let Action::Mirror {
            epoch,
            input_seq,
            token,
        } = action
        else {
            panic!("{action:?}: the SVM has not answered");
        };
        secondary
            .handle_mirror(now_us, &mut rig.frames, epoch, input_seq, token)
            .unwrap();
        let copy = secondary.poll_deliver(now_us, &mut rig.frames).unwrap();
        rig.frames.take(copy);
    }
}

#[test]
fn rule_5_input_is_kept_and_delivered_again_when_the_clients_numbers_have_wrapped() {
    for way in WAYS {
        let mut rig = Rig::new(Limits::default());
        rig.join();
        rig.open(42_000);
        for _ in 0..STEPS {
            go_on(way, &mut rig);
            send_and_lose(&mut rig, 42_000, b"lost in the SVM");
            rig.settle();
            let secondary = rig.secondary.as_ref().unwrap();
            assert_eq!(secondary.input_frames(), 1, "it is kept");
            rig.now_us = secondary.next_deadline().unwrap();
            rig.refresh_lease();
            rig.settle();
            assert_eq!(rig.secondary.as_ref().unwrap().input_frames(), 0);
            rig.assert_all_echoed();
        }
        rig.close();
    }
}

#[test]
fn rule_8_retransmissions_are_compared_when_the_guests_numbers_have_wrapped() {
    let mut rig = Rig::new(Limits::default());
    rig.join();
    rig.open(43_000);
    for step in 0..STEPS {
        go_on((true, false), &mut rig);
        rig.network_up = false;
        rig.send(43_000, b"heard late");
        let first = std::mem::take(&mut rig.nic);
        let again = rig.pvm.retransmit(rig.now_us).remove(0);
        rig.pvm_sends(&again);
        rig.settle();
        assert_eq!(
            (first.len(), rig.nic.len()),
            (1, 1),
            "step {step}: it leaves without the SVM"
        );
        rig.nic.extend(first);
        rig.network_up = true;
        rig.settle();
        rig.assert_all_echoed();
    }
    rig.network_up = false;
    rig.send(43_000, b"heard late");
    rig.nic.clear();
    let mut other = rig.pvm.retransmit(rig.now_us).remove(0);
    *other.last_mut().unwrap() ^= 1;
    rig.pvm_sends(&other);
    rig.settle();
    assert_eq!((rig.nic.len(), rig.requests.len()), (0, 1));
    rig.close();
}

/// What leaves does so by comparison, not because it counts as covered.
#[test]
fn what_only_the_pvm_says_does_not_leave_when_numbers_have_wrapped() {
    for way in WAYS {
        let mut rig = Rig::new(Limits::default());
        rig.join();
        rig.open(44_000);
        for step in 0..STEPS {
            go_on(way, &mut rig);
            rig.secondary.as_mut().unwrap().stop();
            rig.network_up = false;
            rig.send(44_000, b"the SVM stands still");
            assert_eq!(rig.nic.len(), 0, "step {step}");
            rig.secondary.as_mut().unwrap().resume_unchanged();
            rig.network_up = true;
            rig.settle();
            rig.assert_all_echoed();
        }
        rig.close();
    }
}
