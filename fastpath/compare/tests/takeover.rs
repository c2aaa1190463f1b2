//! Takeovers and re-protection: translations, retained input, unsent output (rules 1 to 5, 9, 12).
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod rig;

use proptest::prelude::*;

use colo_compare::testing::{Side, checksums_are_right, ip_frame};
use colo_compare::{Limits, Mode};
use rig::Rig;

#[test]
fn an_echoed_stream_is_released_by_match_through_the_pair_translation() {
    let mut rig = Rig::new(Limits::default());
    rig.join();
    for port in [40_000, 40_001] {
        rig.open(port);
        for n in 0..20u8 {
            rig.send(port, &[n; 100]);
        }
    }
    rig.assert_all_echoed();
    let stats = rig.primary.stats();
    assert_eq!(stats.released_data_by_match, 40);
    assert_eq!((rig.requests.len(), rig.primary.held_frames()), (0, 0));
    let secondary = rig.secondary.as_ref().expect("a secondary");
    assert_eq!(
        (secondary.stored_outputs(), secondary.stats().learnt),
        (0, 2)
    );
    assert_eq!(
        secondary.input_frames(),
        0,
        "everything is covered by the SVM's ACKs"
    );
    rig.close();
}

#[test]
fn rule_1_kill_reprotect_checkpoint_kill_with_connections_from_every_interval() {
    let mut rig = Rig::new(Limits::default());
    let mut ports = Vec::new();
    let mut next_port = 41_000;
    let mut open_and_talk = |rig: &mut Rig| {
        for _ in 0..2 {
            ports.push(next_port);
            rig.open(next_port);
            next_port += 1;
        }
        for port in &ports {
            rig.now_us += 700;
            rig.send(*port, &port.to_be_bytes().repeat(10));
        }
        rig.assert_all_echoed();
    };
    open_and_talk(&mut rig);
    rig.join();
    for _ in 0..3 {
        open_and_talk(&mut rig);
        rig.checkpoint();
        open_and_talk(&mut rig);
        rig.kill_primary();
        assert_eq!(rig.primary.mode(), Mode::Alone);
        open_and_talk(&mut rig);
        rig.join();
        open_and_talk(&mut rig);
        assert!(rig.requests.is_empty(), "{:?}", rig.requests);
        rig.kill_primary();
        open_and_talk(&mut rig);
        rig.join();
    }
    rig.close();
}

#[test]
fn rule_4_a_shard_that_has_seen_less_input_goes_on_in_the_epoch_of_the_others() {
    let mut rig = Rig::new(Limits::default());
    rig.join();
    rig.open(41_000);
    rig.checkpoint();
    rig.kill_primary();
    // Another shard had input of the epoch after.
    let epoch = rig.primary.epoch() + 1;
    rig.primary.raise_epoch(epoch).unwrap();
    rig.primary.raise_epoch(epoch - 1).unwrap();
    assert_eq!(rig.primary.epoch(), epoch, "it never falls");
    rig.join();
    assert!(
        rig.primary.raise_epoch(epoch + 9).is_err(),
        "a pair has its epoch"
    );
    assert_eq!(rig.primary.epoch(), epoch + 1);
    rig.send(41_000, b"compared");
    rig.assert_all_echoed();
    assert_eq!(rig.primary.stats().released_data_by_match, 1);
    rig.checkpoint();
    rig.close();
}

#[test]
fn rule_3_the_takeover_leaps_over_timestamps_that_the_secondary_never_saw() {
    let mut rig = Rig::new(Limits::default());
    rig.join();
    // The SVM answers the SYN 15 ms after the PVM, so its clock seems to lag by as much.
    rig.secondary.as_mut().unwrap().stop();
    rig.open(42_004);
    rig.now_us += 15_000;
    rig.secondary.as_mut().unwrap().resume_unchanged();
    rig.settle();
    rig.now_us += 50_000;
    rig.send(42_004, b"before");
    rig.assert_all_echoed();
    // The client gets an answer, and the old primary dies with the client's ACK.
    rig.now_us += 50_000;
    rig.network_up = false;
    rig.send(42_004, b" last words");
    let bytes = rig.nic.pop_front().expect("released");
    rig.client_sees(&bytes);
    rig.kill_primary();
    rig.network_up = true;
    for segment in rig.pvm.retransmit(rig.now_us) {
        rig.pvm_sends(&segment);
    }
    rig.settle();
    rig.send(42_004, b" after");
    rig.assert_all_echoed();
    rig.close();
}

#[test]
fn rule_2_an_unfinished_handshake_is_learnt_after_the_takeover() {
    for answer_reaches_client in [true, false] {
        let mut rig = Rig::new(Limits::default());
        rig.join();
        rig.network_up = false;
        rig.open(42_000);
        assert_eq!(rig.nic.len(), 1, "the SYN-ACK was released");
        if !answer_reaches_client {
            rig.nic.clear();
        }
        // Its ACK only reaches the new primary.
        let answers = std::mem::take(&mut rig.nic);
        rig.kill_primary();
        rig.nic.extend(answers);
        rig.network_up = true;
        rig.settle();
        rig.retransmit_all();
        rig.send(42_000, b"after");
        rig.assert_all_echoed();
        rig.join();
        rig.send(42_000, b"more");
        rig.assert_all_echoed();
        rig.close();
    }
}

#[test]
fn rule_1_a_handshake_learnt_in_a_pair_survives_a_kill_before_the_next_commit() {
    let mut rig = Rig::new(Limits::default());
    rig.join();
    rig.network_up = false;
    rig.open(42_002);
    let answers = std::mem::take(&mut rig.nic);
    rig.kill_primary();
    // Paired again while the client's first ACK is still on its way.
    rig.join();
    rig.nic.extend(answers);
    rig.network_up = true;
    rig.settle();
    rig.send(42_002, b"held");
    assert_eq!(rig.requests.len(), 1, "a commit must carry what was learnt");
    assert_eq!(rig.clients[&42_002].received, b"");
    rig.kill_primary();
    rig.retransmit_all();
    rig.retransmit_all();
    rig.send(42_002, b" and sent");
    rig.assert_all_echoed();
    rig.close();
}

#[test]
fn rule_5_input_that_only_the_secondary_has_survives() {
    let mut rig = Rig::new(Limits::default());
    rig.join();
    rig.open(43_000);
    rig.open(43_001);
    // The SVM stops (for a checkpoint that never commits): input of both epochs waits.
    let snapshot = rig.begin_checkpoint();
    rig.send(43_000, b"first");
    rig.send(43_001, b"second");
    assert_eq!(
        rig.clients[&43_000].received, b"",
        "nothing of the next epoch leaves (rule 7)"
    );
    assert_eq!(snapshot.epoch + 1, rig.primary.epoch());
    rig.secondary
        .as_mut()
        .expect("a secondary")
        .resume_unchanged();
    rig.kill_primary();
    // The clients do not retransmit: the secondary acknowledged, so it is responsible.
    rig.assert_all_echoed();
    rig.close();
}

#[test]
fn rule_5_what_the_svm_does_not_acknowledge_is_delivered_again() {
    let mut rig = Rig::new(Limits::default());
    rig.join();
    rig.open(43_002);
    // The SVM loses a segment, as a full socket buffer would.
    let before = rig.svm.clone();
    rig.network_up = false;
    rig.send(43_002, b"lost in the SVM");
    rig.nic.clear();
    rig.svm = before;
    let secondary = rig.secondary.as_ref().expect("a secondary");
    assert_eq!(secondary.input_frames(), 0);
    rig.close();

    let mut rig = Rig::new(Limits::default());
    rig.join();
    rig.open(43_002);
    rig.network_up = false;
    let client = rig.clients.get_mut(&43_002).expect("opened");
    client.sent.extend_from_slice(b"x");
    let bytes = client_segment(&rig, 43_002, b"x");
    rig.send_to_primary(&bytes);
    // Mirror it by hand and let it vanish between ring and guest.
    while let Some(action) = rig.primary.poll_action() {
        if let colo_compare::Action::Mirror {
            epoch,
            input_seq,
            token,
        } = action
        {
            let secondary = rig.secondary.as_mut().expect("a secondary");
            let now_us = rig.now_us;
            secondary
                .handle_mirror(now_us, &mut rig.frames, epoch, input_seq, token)
                .unwrap();
            let copy = secondary
                .poll_deliver(now_us, &mut rig.frames)
                .expect("delivered");
            rig.frames.take(copy);
        }
    }
    rig.settle();
    assert_eq!(rig.nic.len(), 0, "the SVM has not answered");
    let due_us = rig
        .secondary
        .as_ref()
        .and_then(|s| s.next_deadline())
        .expect("a deadline");
    rig.now_us = due_us;
    rig.settle();
    assert_eq!(rig.nic.len(), 1, "answered after the second delivery");
    rig.network_up = true;
    rig.settle();
    rig.assert_all_echoed();
    rig.close();
}

fn client_segment(rig: &Rig, port: u16, data: &[u8]) -> Vec<u8> {
    let bytes = rig.clients[&port]
        .retransmit(rig.now_us)
        .expect("unacknowledged data");
    assert!(bytes.ends_with(data));
    bytes
}

#[test]
fn rule_9_output_not_reported_released_is_sent_at_the_takeover() {
    let mut rig = Rig::new(Limits::default());
    rig.join();
    rig.open(44_000);
    rig.primary.mute();
    rig.send(44_000, b"judged but not sent");
    assert_eq!(rig.nic.len(), 0);
    assert_eq!(rig.secondary.as_ref().map(|s| s.stored_outputs()), Some(1));
    rig.network_up = false;
    rig.kill_primary();
    assert_eq!(
        rig.nic.len(),
        1,
        "the stored output is sent without any timer of the guest"
    );
    rig.network_up = true;
    rig.settle();
    rig.assert_all_echoed();
    rig.close();
}

#[test]
fn rule_12_pending_output_is_sent_at_the_takeover_unless_reported_released() {
    for reported in [true, false] {
        let mut rig = Rig::new(Limits::default());
        rig.join();
        rig.open(44_001);
        // The SVM answers nothing; the PVM's answer is pending at the cut.
        rig.secondary.as_mut().expect("a secondary").stop();
        rig.send(44_001, b"pending");
        assert_eq!(rig.clients[&44_001].received, b"");
        let snapshot = rig.begin_checkpoint();
        rig.network_up = false;
        if !reported {
            rig.primary.mute();
        }
        rig.finish_checkpoint(snapshot);
        let sent = std::mem::take(&mut rig.nic);
        assert_eq!(sent.len(), usize::from(reported));
        rig.kill_primary();
        assert_eq!(rig.nic.len(), usize::from(!reported));
        rig.nic.extend(sent);
        rig.network_up = true;
        rig.settle();
        rig.assert_all_echoed();
        rig.close();
    }
}

#[test]
fn announcements_follow_a_takeover() {
    let mut rig = Rig::new(Limits::default());
    rig.open(45_000);
    rig.join();
    rig.open(45_001);
    rig.kill_primary();
    let mut rounds = 0;
    let mut now_us = rig.now_us;
    loop {
        let mut out = [0; colo_compare::ANNOUNCEMENT_MAX];
        let mut count = 0;
        while let Some(len) = rig.primary.poll_announcement(now_us, &mut out) {
            assert!(len >= 60);
            count += 1;
        }
        assert_eq!(count, 5, "RARP, two forms of IPv4, IPv6 twice");
        rounds += 1;
        // A late frame of the old primary may have taught the switches its place again.
        let Some(at_us) = rig.primary.next_deadline() else {
            break;
        };
        now_us = at_us;
        rig.primary.handle_timeout(now_us, &mut rig.frames);
    }
    assert_eq!(rounds, 7);
    assert!(now_us - rig.now_us > 2_000_000);
    rig.close();
}

/// "Fragmentation needed" (RFC 792) or "packet too big" (RFC 4443) about a frame of the guest's.
fn too_big(side: Side, sent: &[u8]) -> Vec<u8> {
    let (kind, protocol) = match side {
        Side::V4 => (3, 1),
        Side::V6 => (2, 58),
    };
    let mut message = Vec::from([kind, 4, 0, 0, 0, 0, 5, 0]);
    message.extend_from_slice(&sent[14..]);
    ip_frame(side, true, protocol, 64, 0, &message)
}

#[test]
fn rule_1_a_routers_error_quotes_what_the_guest_knows_after_a_takeover() {
    for port in [42_006, 42_007] {
        let mut rig = Rig::new(Limits::default());
        rig.join();
        rig.open(port);
        rig.send(port, b"before");
        rig.kill_primary();
        rig.network_up = false;
        rig.send(port, b"too long for the path");
        let sent = rig.nic.pop_front().expect("released");
        // The same segment, as the guest sent it.
        let known = rig.pvm.retransmit(rig.now_us).remove(0);
        let (seq, known_seq) = [&sent, &known]
            .map(|bytes| rig::tcp_of(bytes).unwrap().seq)
            .into();
        assert_ne!(seq, known_seq, "translated on the way out");
        let error = too_big(rig::side(port), &sent);
        let token = rig.frames.insert(&error).unwrap();
        let token = rig.primary.handle_nic(rig.now_us, &mut rig.frames, token);
        let bytes = rig.frames.take(token);
        assert!(checksums_are_right(&bytes));
        let quoted = bytes.len() - (sent.len() - 14);
        let mut expected = sent.clone();
        let tcp_at = if rig::side(port) == Side::V6 { 54 } else { 34 };
        expected[tcp_at + 4..tcp_at + 8].copy_from_slice(&known_seq.to_be_bytes());
        let checksum = tcp_at + 16..tcp_at + 18;
        expected[checksum.clone()].copy_from_slice(&bytes[quoted - 14..][checksum]);
        assert_eq!(bytes[quoted..], expected[14..]);
        rig.network_up = true;
        rig.retransmit_all();
        rig.assert_all_echoed();
        rig.close();
    }
}

/// One random life of a pair: traffic, checkpoints, aborts, deaths of either host, lost frames.
fn live(choices: &[(u8, u16)]) {
    let mut rig = Rig::new(Limits::default());
    rig.join();
    let mut next_port = 50_000;
    for (choice, n) in choices {
        let ports = next_port - 50_000;
        let port = 50_000 + if ports > 0 { n % ports } else { 0 };
        match choice {
            0 | 1 => {
                rig.open(next_port);
                next_port += 1;
            }
            2..=6 if ports > 0 => rig.send(port, &n.to_be_bytes().repeat(1 + usize::from(n % 300))),
            7 => rig.checkpoint(),
            8 => {
                rig.kill_primary();
                rig.join();
            }
            9 => rig.advance(u64::from(*n)),
            10 => rig.network_up = !rig.network_up,
            11 => {
                rig.nic.clear();
                rig.retransmit_all();
            }
            12 if ports > 0 => {
                let snapshot = rig.begin_checkpoint();
                rig.send(port, b"in flight");
                match n % 4 {
                    0 => rig.abort_checkpoint(snapshot),
                    1 => rig.finish_checkpoint(snapshot),
                    2 => {
                        rig.secondary.as_mut().unwrap().resume_unchanged();
                        rig.kill_primary();
                        rig.join();
                    }
                    _ => {
                        rig.kill_secondary();
                        rig.join();
                    }
                }
            }
            13 => {
                rig.kill_primary();
                rig.open(next_port);
                next_port += 1;
                rig.join();
            }
            _ => {}
        }
        rig.refresh_lease();
        rig.settle();
        if !std::mem::take(&mut rig.requests).is_empty() {
            rig.checkpoint();
        }
    }
    rig.network_up = true;
    for _ in 0..6 {
        rig.retransmit_all();
        rig.advance(1_000_000);
        if !std::mem::take(&mut rig.requests).is_empty() {
            rig.checkpoint();
        }
    }
    rig.assert_all_echoed();
    assert_eq!(rig.primary.held_frames(), 0);
    rig.close();
}

proptest! {
    #[test]
    fn no_life_of_a_pair_loses_a_byte(
        choices in proptest::collection::vec((0u8..14, any::<u16>()), 1..60),
    ) {
        live(&choices);
    }
}
