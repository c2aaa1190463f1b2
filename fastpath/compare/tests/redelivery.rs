//! What a guest does not acknowledge is delivered again as its sender would send it again: with the sender's present
//! ACK, window and timestamps (rule 5).
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod follower;

use colo_compare::testing::{Segment, Side, checksums_are_right};
use colo_compare::wire::tcp::{ACK, SYN, Tcp};
use colo_compare::{Direction, Limits, wire};
use follower::Follower;

/// Initial numbers of the SVM, the PVM and the peer.
const SVM_ISN: u32 = 70_000;
const PVM_ISN: u32 = 5_000;
const PEER_ISN: u32 = 100;

fn from_peer(seq: u32, ack: u32) -> Segment {
    Segment::new(Side::V4).to_guest().seq(seq).ack(ack)
}

fn from_svm(ack: u32) -> Vec<u8> {
    let segment = Segment::new(Side::V4).seq(SVM_ISN + 1);
    segment.ack(ack).bytes()
}

fn tcp(bytes: &[u8]) -> Tcp {
    assert!(checksums_are_right(bytes));
    let packet = wire::parse(bytes, bytes.len(), Direction::ToGuest);
    packet.tcp.unwrap()
}

/// A connection that the peer has opened in this epoch, so that the guests' numbers differ.
fn opened() -> Follower {
    let mut follower = Follower::new();
    let syn = from_peer(PEER_ISN, 0).flags(SYN).bytes();
    follower.mirror(2, &syn);
    follower.deliver().unwrap();
    let answer = Segment::new(Side::V4).flags(SYN | ACK).seq(SVM_ISN);
    follower.svm(&answer.ack(PEER_ISN + 1).bytes());
    follower.mirror(2, &from_peer(PEER_ISN + 1, PVM_ISN + 1).bytes());
    follower.deliver().unwrap();
    follower
}

/// What the SVM gets again at the next deadline: sequence number, acknowledgement, payload bytes.
fn again(follower: &mut Follower) -> (u32, u32, u16) {
    follower.now_us = follower.path.next_deadline().unwrap();
    let tcp = tcp(&follower.deliver().unwrap());
    (tcp.seq, tcp.ack, tcp.payload_len)
}

/// Six bytes of which the SVM's window takes three; then the peer acknowledges 500 bytes more of the guest's.
fn half_taken(follower: &mut Follower) {
    let seq = PEER_ISN + 1;
    let whole = from_peer(seq, PVM_ISN + 1).payload(b"abcdef");
    follower.mirror(2, &whole.bytes());
    assert_eq!(tcp(&follower.deliver().unwrap()).ack, SVM_ISN + 1);
    follower.svm(&from_svm(seq + 3));
    follower.mirror(2, &from_peer(seq + 6, PVM_ISN + 501).bytes());
    follower.deliver().unwrap();
}

#[test]
fn rule_5_a_segment_that_was_half_taken_comes_again_with_the_peers_present_ack() {
    let mut follower = opened();
    half_taken(&mut follower);
    let (renewed, as_it_came) = (SVM_ISN + 501, SVM_ISN + 1);
    for ack in [renewed, as_it_came, renewed, as_it_came] {
        assert_eq!(again(&mut follower), (PEER_ISN + 1, ack, 6));
    }
    follower.svm(&from_svm(PEER_ISN + 7));
    assert_eq!(follower.path.next_deadline(), None);
    follower.close();
}

#[test]
fn rule_5_who_has_not_seen_the_stream_changes_nothing_about_what_comes_again() {
    for far in [1 << 19, 1 << 31, 0u32.wrapping_sub(1 << 19)] {
        let mut follower = opened();
        half_taken(&mut follower);
        let forged = from_peer((PEER_ISN + 7).wrapping_add(far), PVM_ISN + 900);
        follower.mirror(2, &forged.bytes());
        follower.deliver().unwrap();
        assert_eq!(again(&mut follower), (PEER_ISN + 1, SVM_ISN + 501, 6));
        follower.close();
    }
}

#[test]
fn rule_5_a_segment_that_was_overtaken_takes_nothing_back() {
    let mut follower = opened();
    half_taken(&mut follower);
    let late = from_peer(PEER_ISN + 4, PVM_ISN + 300).payload(b"def");
    follower.mirror(2, &late.bytes());
    follower.deliver().unwrap();
    assert_eq!(again(&mut follower), (PEER_ISN + 1, SVM_ISN + 501, 6));
    assert_eq!(
        tcp(&follower.deliver().unwrap()).ack,
        SVM_ISN + 501,
        "the late one, too"
    );
    follower.close();
}

#[test]
fn rule_5_what_the_peer_says_after_a_takeover_goes_with_what_comes_again() {
    let mut follower = opened();
    half_taken(&mut follower);
    let Follower {
        mut frames, path, ..
    } = follower;
    let mut primary = path.take_over(0, &mut frames);
    let token = primary.poll_deliver(0, &mut frames).unwrap();
    let first = tcp(frames.bytes(&token));
    assert_eq!((first.ack, first.payload_len), (SVM_ISN + 501, 6));
    primary.handle_delivered(0, &mut frames, token);
    // The client speaks in the numbers that it knows.
    let said = from_peer(PEER_ISN + 7, PVM_ISN + 701).bytes();
    let token = frames.insert(&said).unwrap();
    let token = primary.handle_nic(0, &mut frames, token);
    assert_eq!(tcp(frames.bytes(&token)).ack, SVM_ISN + 701);
    primary.handle_delivered(0, &mut frames, token);
    let wait_us = Limits::default().redeliver_us;
    let mut acks = Vec::new();
    for now_us in [2 * wait_us, 6 * wait_us] {
        let token = primary.poll_deliver(now_us, &mut frames).unwrap();
        acks.push(tcp(frames.bytes(&token)).ack);
        primary.handle_delivered(now_us, &mut frames, token);
    }
    assert_eq!(acks, [SVM_ISN + 1, SVM_ISN + 701]);
    primary.close(&mut frames);
    assert_eq!(frames.used(), 0);
}

#[test]
fn rule_5_the_wait_between_two_deliveries_is_not_longer_for_it() {
    let mut follower = opened();
    half_taken(&mut follower);
    let wait_us = Limits::default().redeliver_us;
    let mut waits = Vec::new();
    for _ in 0..3 {
        let before = follower.now_us;
        again(&mut follower);
        waits.push(follower.now_us - before);
    }
    assert_eq!(waits, [wait_us, 2 * wait_us, 4 * wait_us]);
    follower.close();
}
