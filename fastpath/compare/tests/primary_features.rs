//! What the primary path promises beyond equal and different: resets, policies, full tables, header
//! fields, hostile numbers. Fragments have a file of their own.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

mod guests;
mod pair;

use colo_compare::testing::{Segment, Side, VecFrames, echo, udp};
use colo_compare::wire::tcp::{ACK, FIN, RST, SYN, URG};
use colo_compare::{Cause, Direction, Limits, PrimaryPath, Right, SecondaryPath, wire};
use guests::{VMS, Vm, assert_diverged, both_send, connect, one_of_each, reset, syn, syn_ack};
use pair::{Pair, SIDES, data};

#[test]
fn a_reset_on_one_side_is_a_divergence_at_once_when_the_other_side_goes_on() {
    for side in SIDES {
        for resetting in VMS {
            for reset_first in [false, true] {
                let mut pair = Pair::new();
                connect(&mut pair, side, 100);
                let both = data(side, 101, b"both");
                both_send(&mut pair, &both);
                assert_eq!(pair.rights(), [Right::Match]);
                let reset = (resetting, reset(side, 105, 8));
                let more = (resetting.other(), data(side, 105, b"more"));
                let order = if reset_first {
                    [reset, more]
                } else {
                    [more, reset]
                };
                order.iter().for_each(|(vm, f)| vm.sends(&mut pair, f));
                assert_diverged(pair, Cause::Flags, 1);
            }
        }
    }
}

#[test]
fn a_connection_that_one_side_refuses_is_a_divergence_at_once() {
    for side in SIDES {
        for refusing in VMS {
            for refusal_first in [false, true] {
                for is_reuse in [false, true] {
                    let mut pair = Pair::new();
                    if is_reuse {
                        connect(&mut pair, side, 100);
                    }
                    pair.input(&syn(side, 70));
                    let refusal = (refusing, reset(side, 0, 71));
                    let consent = (refusing.other(), syn_ack(side, 9000, 71));
                    let order = if refusal_first {
                        [refusal, consent]
                    } else {
                        [consent, refusal]
                    };
                    order.iter().for_each(|(vm, f)| vm.sends(&mut pair, f));
                    assert_diverged(pair, Cause::Flags, 1);
                }
            }
        }
    }
}

#[test]
fn a_reset_on_one_side_is_a_divergence_after_its_deadline_when_the_other_is_silent() {
    let deadline_us = Limits::default().compare_deadline_us;
    for side in SIDES {
        for (vm, cause) in [(Vm::Pvm, Cause::Deadline), (Vm::Svm, Cause::Flags)] {
            let mut pair = Pair::new();
            connect(&mut pair, side, 100);
            vm.sends(&mut pair, &reset(side, 101, 8));
            pair.advance(deadline_us - 1);
            assert_eq!(pair.causes, []);
            pair.advance(1);
            assert_diverged(pair, cause, usize::from(vm == Vm::Pvm));
        }
    }
}

#[test]
fn resets_of_both_sides_leave_however_they_meet() {
    for side in SIDES {
        for first in VMS {
            let mut pair = Pair::new();
            pair.input(&syn(side, 70));
            for vm in [first, first.other()] {
                vm.sends(&mut pair, &reset(side, 0, 71));
            }
            assert_eq!(pair.rights(), [Right::Match]);
            assert_eq!((pair.causes.len(), pair.reported.len()), (0, 1));
            pair.close();
        }
    }
}

/// A datagram of a flow of its own.
fn of_flow(n: u16) -> Vec<u8> {
    udp(Side::V4, false, 1000 + n, 2000 + n, b"x")
}

#[test]
fn idle_and_closed_flows_are_forgotten_when_their_time_is_over() {
    let limits = Limits {
        flow_idle_s: 100,
        time_wait_s: 10,
        ..Limits::default()
    };
    for (closed, forgotten_after_s) in [(false, 101), (true, 11)] {
        for early in [true, false] {
            let mut pair = Pair::with(limits);
            connect(&mut pair, Side::V6, 100);
            if closed {
                let fin = Segment::new(Side::V6).flags(FIN | ACK).ack(8);
                both_send(&mut pair, &fin.seq(101).bytes());
                let fin = Segment::new(Side::V6).to_guest().flags(FIN | ACK);
                pair.input(&fin.seq(8).ack(102).bytes());
            }
            pair.now_us += (forgotten_after_s - u64::from(early)) * 1_000_000;
            (0..2).for_each(|n| both_send(&mut pair, &of_flow(n)));
            let expired = pair.path.stats().flows_expired;
            assert_eq!(
                (expired, pair.path.flows()),
                (u64::from(!early), 3 - expired as usize)
            );
            pair.close();
        }
    }
}

#[test]
fn packets_of_known_flows_pay_nothing_for_expiry() {
    let mut pair = Pair::new();
    (0..100).for_each(|n| both_send(&mut pair, &of_flow(n)));
    let looks = |pair: &Pair| pair.path.stats().flow_expiry_looks;
    let before = looks(&pair);
    assert!(before > 0, "new flows do");
    for packet in 0..10_000 {
        pair.now_us += 1_000;
        both_send(&mut pair, &of_flow(packet % 100));
    }
    assert_eq!(pair.rights().len(), 10_100);
    assert_eq!(looks(&pair), before);
    pair.close();
}

#[test]
fn neither_time_nor_need_for_room_forgets_a_flow_with_held_frames_or_unmatched_output() {
    let limits = Limits {
        flow_idle_s: 1,
        time_wait_s: 1,
        max_flows: 4,
        ..Limits::default()
    };
    let frames = [
        data(Side::V4, 10, b"held"),
        udp(Side::V6, false, 7, 9000, b"held"),
    ];
    for first in VMS {
        for frame in &frames {
            let mut pair = Pair::with(limits);
            first.sends(&mut pair, frame);
            for n in 0..50 {
                pair.now_us += 2_000_000;
                both_send(&mut pair, &of_flow(n));
            }
            // Full of flows that were used a moment ago.
            (50..90).for_each(|n| both_send(&mut pair, &of_flow(n)));
            let stats = *pair.path.stats();
            assert!(stats.flows_expired > 40 && stats.flows_evicted > 30);
            assert_eq!(pair.rights().len(), 90);
            first.other().sends(&mut pair, frame);
            assert_eq!(pair.rights(), [Right::Match]);
            assert_eq!(pair.causes, []);
            pair.close();
        }
    }
    // Nor one that waits for a commit, even when nothing of it is held.
    let mut pair = Pair::with(limits);
    both_send(&mut pair, &frames[0]);
    pair.svm(&data(Side::V4, 10, b"else"));
    assert_eq!(pair.causes, [Cause::Payload]);
    (0..50).for_each(|n| both_send(&mut pair, &of_flow(n)));
    assert_eq!(pair.rights().len(), 51);
    both_send(&mut pair, &data(Side::V4, 14, b"more"));
    assert_eq!((pair.rights(), pair.path.held_frames()), (vec![], 1));
    pair.close();
}

#[test]
fn no_new_flow_overtakes_a_frame_that_found_no_place() {
    let mut pair = Pair::with(Limits {
        max_flows: 2,
        ..Limits::default()
    });
    (0..3).for_each(|n| pair.pvm(&of_flow(n)));
    assert_eq!(pair.causes, [Cause::TableFull]);
    // The known flows go on and become idle.
    (0..2).for_each(|n| pair.svm(&of_flow(n)));
    assert_eq!(pair.rights(), [Right::Match; 2]);
    both_send(&mut pair, &of_flow(0));
    assert_eq!(pair.rights(), [Right::Match]);
    // Neither another flow nor the rest of the same one leaves before it.
    for n in [3, 2] {
        both_send(&mut pair, &of_flow(n));
    }
    assert_eq!((pair.rights(), pair.path.held_frames()), (vec![], 3));
    let epoch = pair.cut();
    pair.commit(epoch);
    assert_eq!(pair.frames_out(), [2, 3, 2].map(of_flow));
    both_send(&mut pair, &of_flow(3));
    assert_eq!(pair.rights(), [Right::Match], "there is room again");
    pair.close();
}

#[test]
fn a_flow_that_found_no_place_waits_for_the_input_that_came_before() {
    for first in VMS {
        let mut pair = Pair::with(Limits {
            max_flows: 2,
            ..Limits::default()
        });
        (0..2).for_each(|n| pair.pvm(&of_flow(n)));
        let request = Segment::new(Side::V4).to_guest().payload(b"req");
        let up_to = pair.input_unacked(&request.bytes());
        let epoch = pair.cut();
        pair.commit(epoch);
        assert_eq!(pair.rights(), [Right::Checkpoint; 2]);
        for vm in [first, first.other()] {
            vm.sends(&mut pair, &data(Side::V4, 10, b"reply"));
        }
        assert_eq!(pair.rights(), []);
        pair.ack_input(up_to);
        assert_eq!(pair.rights(), [Right::Match]);
        pair.close();
    }
}

/// What a host hands on that took over while the guest's SYN-ACK was on its way.
fn record_of_an_open_handshake(side: Side, isn: u32) -> Vec<u8> {
    let mut frames = VecFrames::new(10);
    let mut record = Vec::new();
    PrimaryPath::new(Limits::default()).export_client_xlate(&mut record);
    let mut secondary = SecondaryPath::new(Limits::default());
    let commit = secondary.commit(0, &mut frames, 1, Vec::new(), &record);
    commit.unwrap();
    let token = frames.insert(&syn(side, 7)).unwrap();
    let epoch = secondary.epoch();
    let mirrored = secondary.handle_mirror(0, &mut frames, epoch, 1, token);
    mirrored.unwrap();
    let token = secondary.poll_deliver(0, &mut frames).unwrap();
    frames.take(token);
    let token = frames.insert(&syn_ack(side, isn, 8)).unwrap();
    secondary.handle_guest_tx(0, &mut frames, token);
    let primary = secondary.take_over(0, &mut frames);
    record.clear();
    primary.export_client_xlate(&mut record);
    primary.close(&mut frames);
    record
}

#[test]
fn what_a_translation_learnt_waits_for_a_commit_even_where_no_flow_found_a_place() {
    for side in SIDES {
        for busy in [0, 2] {
            let mut pair = Pair::with(Limits {
                max_flows: 2,
                ..Limits::default()
            });
            let record = record_of_an_open_handshake(side, 99);
            pair.path.import_client_xlate(pair.now_us, &record).unwrap();
            (0..busy).for_each(|n| pair.pvm(&of_flow(n)));
            let client = Segment::new(side).to_guest().seq(8).ack(1100);
            pair.input(&client.bytes());
            assert_eq!(pair.causes, [Cause::Translation]);
            (0..busy).for_each(|n| pair.svm(&of_flow(n)));
            assert_eq!(pair.rights().len(), usize::from(busy));
            both_send(&mut pair, &data(side, 100, b"answer"));
            assert_eq!(pair.rights(), [], "{busy} places were taken");
            let epoch = pair.cut();
            pair.commit(epoch);
            assert_eq!(pair.rights(), [Right::Checkpoint]);
            both_send(&mut pair, &data(side, 106, b"more"));
            assert_eq!(pair.rights(), [Right::Match]);
            pair.close();
        }
    }
}

#[test]
fn history_makes_room_for_new_output_and_its_retransmission_then_waits() {
    let segments = [10, 13, 16].map(|seq| data(Side::V4, seq, b"abc"));
    let mut waiting = 0;
    for again in &segments {
        let mut pair = Pair::with(Limits {
            max_svm_frames: 2,
            ..Limits::default()
        });
        segments
            .iter()
            .for_each(|bytes| both_send(&mut pair, bytes));
        assert_eq!(
            (pair.rights(), pair.causes.len()),
            (vec![Right::Match; 3], 0)
        );
        let stats = pair.path.stats();
        assert_eq!((stats.history_dropped, stats.svm_overflow), (1, 0));
        pair.pvm(again);
        if pair.rights() != [Right::Free] {
            waiting += 1;
            // Nothing overtakes it, and the secondary's silence is found.
            pair.pvm(&data(Side::V4, 19, b"abc"));
            assert_eq!((pair.rights().len(), pair.path.held_frames()), (0, 2));
            pair.advance(Limits::default().compare_deadline_us);
            assert_eq!(pair.causes, [Cause::Deadline]);
        }
        pair.close();
    }
    assert_eq!(waiting, 1);
}

/// Puts tags between addresses and EtherType.
fn tagged(mut frame: Vec<u8>, tags: &[(u16, u16)]) -> Vec<u8> {
    for (ethertype, tag) in tags.iter().rev() {
        let bytes = [ethertype.to_be_bytes(), tag.to_be_bytes()].concat();
        frame.splice(12..12, bytes);
    }
    frame
}

#[test]
fn flows_are_told_apart_by_their_vlan_tags() {
    const VLAN: u16 = 0x8100;
    const QINQ: u16 = 0x88a8;
    let tags: [&[(u16, u16)]; 5] = [
        &[],
        &[(VLAN, 5)],
        &[(VLAN, 6)],
        &[(QINQ, 5), (VLAN, 6)],
        &[(QINQ, 5), (VLAN, 7)],
    ];
    for frame in SIDES.iter().flat_map(|side| one_of_each(*side)) {
        for (a, b) in tags.iter().flat_map(|a| tags.map(|b| (*a, b))) {
            let mut pair = Pair::new();
            let of_peer = |tags| {
                let request = Segment::new(Side::V4).to_guest().payload(b"ask");
                tagged(request.bytes(), tags)
            };
            // Known from input, so that no flow looks opened by the guest from another port.
            pair.input(&of_peer(a));
            pair.input(&of_peer(b));
            pair.pvm(&tagged(frame.clone(), a));
            pair.svm(&tagged(frame.clone(), b));
            let is_same = a == b;
            assert_eq!(pair.rights().len(), usize::from(is_same), "{a:?} {b:?}");
            assert_eq!(pair.path.held_frames(), usize::from(!is_same));
            pair.svm(&tagged(frame.clone(), a));
            assert_eq!(pair.path.held_frames(), 0);
            let packet = tagged(frame.clone(), a);
            let key = wire::parse(&packet, packet.len(), Direction::FromGuest).key;
            let expected = [0, 1].map(|n| a.get(n).map_or(0, |(_, tag)| *tag));
            assert_eq!(key.vlan(), expected);
            pair.close();
        }
    }
}

#[test]
fn numbers_half_the_space_apart_do_no_harm() {
    const FAR: [u32; 8] = [
        0,
        1,
        0x7fff_ffef,
        0x7fff_fff8,
        0x7fff_ffff,
        0x8000_0000,
        0x8000_0001,
        0xffff_ffef,
    ];
    // Data, a lone FIN, both, urgent data, a SYN, a reset.
    let kinds: [(u8, &[u8]); 6] = [
        (ACK, b"abcdefghij"),
        (ACK | FIN, b""),
        (ACK | FIN, b"xyz"),
        (ACK | URG, b"abcdefghij"),
        (ACK | SYN, b""),
        (ACK | RST, b""),
    ];
    let senders = [
        [Vm::Svm, Vm::Svm, Vm::Pvm],
        [Vm::Pvm, Vm::Svm, Vm::Svm],
        [Vm::Pvm, Vm::Pvm, Vm::Svm],
        [Vm::Svm, Vm::Pvm, Vm::Pvm],
    ];
    for base in [0u32, 0xffff_fff0, 0x7fff_fff0] {
        for (a, b) in FAR.iter().flat_map(|a| FAR.map(|b| (*a, b))) {
            for ((flags, payload), order) in kinds.iter().zip(senders.iter().cycle()) {
                let mut pair = Pair::new();
                let segment = |seq: u32| {
                    let segment = Segment::new(Side::V4).flags(*flags).ack(500);
                    segment.seq(base.wrapping_add(seq)).payload(payload).bytes()
                };
                for (vm, seq) in order.iter().zip([a, b, a]) {
                    vm.sends(&mut pair, &segment(seq));
                    let ack = base.wrapping_add(seq ^ 0x8000_0000);
                    pair.input(&Segment::new(Side::V4).to_guest().ack(ack).bytes());
                    // What the client has was sent by both, or needs no counterpart at all.
                    for right in pair.rights() {
                        assert!(matches!(right, Right::Match | Right::Free));
                    }
                }
                let epoch = pair.cut();
                pair.commit(epoch);
                both_send(&mut pair, &segment(b ^ 0x8000_0000));
                pair.advance(10_000_000);
                pair.close();
            }
        }
    }
}

#[test]
fn svm_output_that_names_an_epoch_that_has_not_begun_is_stale() {
    for frame in one_of_each(Side::V4) {
        for later in [1, 2, 7, u64::MAX - 10] {
            let mut pair = Pair::new();
            pair.pvm(&frame);
            pair.svm_in(pair.epoch + later, &frame);
            assert_eq!(pair.rights(), []);
            let epoch = pair.cut();
            pair.commit(epoch);
            assert_eq!(pair.rights(), [Right::Checkpoint]);
            if later > 1 {
                assert_eq!(pair.path.stats().svm_stale, 1);
                let next = match frame == data(Side::V4, 10, b"stream") {
                    true => data(Side::V4, 16, b"stream"),
                    false => frame.clone(),
                };
                pair.pvm(&next);
                assert_eq!(pair.rights(), [], "nothing stale counts");
                pair.svm(&next);
                assert_eq!(pair.rights(), [Right::Match]);
            }
            pair.close();
        }
    }
}

/// Changes bytes of a frame.
type Change = fn(&mut [u8], Side);

/// Whether two frames of which one is changed stand for each other, whoever sends first; behind
/// another frame too, so that both the short way and the long way of judging are taken.
fn agree(original: &[u8], side: Side, change: Change) -> bool {
    let mut changed = original.to_vec();
    change(&mut changed, side);
    assert_ne!(original, changed);
    let mut verdicts = Vec::new();
    for first in VMS {
        for order in [[original, &changed], [&changed, original]] {
            let mut pair = Pair::new();
            first.sends(&mut pair, order[0]);
            first.other().sends(&mut pair, order[1]);
            pair.advance(Limits::default().compare_deadline_us);
            verdicts.push(pair.rights().len() == 1);
            assert_eq!(pair.causes.is_empty(), verdicts[0]);
            pair.close();
        }
    }
    assert!(verdicts.iter().all(|verdict| *verdict == verdicts[0]));
    verdicts[0]
}

fn l4(side: Side) -> usize {
    if side == Side::V4 { 34 } else { 54 }
}

/// Not ECN-capable becomes ECT(0), and the other way round.
fn ecn_capable(bytes: &mut [u8], side: Side) {
    bytes[15] ^= if side == Side::V4 { 2 } else { 0x20 };
}

#[test]
fn fields_that_may_rightly_differ_do_not_count() {
    for side in SIDES {
        let options = [1, 1, 8, 10, 0, 0, 0, 5, 0, 0, 0, 6];
        let segment = Segment::new(side).seq(10).ack(500).payload(b"payload");
        let segment = segment.option(&options).bytes();
        let window: Change = |bytes, side| bytes[l4(side) + 14] ^= 0x55;
        let checksum: Change = |bytes, side| bytes[l4(side) + 16] ^= 0x55;
        let urgent_without_flag: Change = |bytes, side| bytes[l4(side) + 19] = 9;
        let timestamps: Change = |bytes, side| bytes[l4(side) + 27] ^= 1;
        let option_order: Change = |bytes, side| bytes[l4(side) + 20..][..12].rotate_left(2);
        let identity: Change = |bytes, side| match side {
            // IPv4 identification and checksum; IPv6 flow label.
            Side::V4 => (bytes[18], bytes[24]) = (0x77, 0x88),
            Side::V6 => (bytes[15], bytes[17]) = (0x07, 0x88),
        };
        let changes = [
            window,
            checksum,
            urgent_without_flag,
            timestamps,
            option_order,
            identity,
        ];
        for (n, change) in changes.into_iter().enumerate() {
            assert!(agree(&segment, side, change), "{side:?} change {n}");
        }
        // A segment that is sent again is not ECN-capable.
        assert!(agree(&segment, side, ecn_capable), "{side:?}");
        let datagram = udp(side, false, 7, 9000, b"payload");
        let congestion: Change = |bytes, side| bytes[15] ^= if side == Side::V4 { 1 } else { 0x10 };
        let mut capable = datagram.clone();
        ecn_capable(&mut capable, side);
        assert!(agree(&capable, side, congestion), "{side:?}");
        let udp_checksum: Change = |bytes, side| bytes[l4(side) + 6] ^= 0x55;
        assert!(agree(&datagram, side, identity) && agree(&datagram, side, udp_checksum));
        let pong = echo(side, false, 7, b"payload");
        let icmp_checksum: Change = |bytes, side| bytes[l4(side) + 2] ^= 0x55;
        assert!(agree(&pong, side, identity) && agree(&pong, side, icmp_checksum));
    }
}

#[test]
fn everything_else_in_the_headers_counts() {
    let ttl: Change = |bytes, side| bytes[if side == Side::V4 { 22 } else { 21 }] -= 1;
    // DSCP without ECN.
    let dscp: Change = |bytes, side| match side {
        Side::V4 => bytes[15] ^= 0x08,
        Side::V6 => bytes[15] ^= 0x80,
    };
    let source_mac: Change = |bytes, _| bytes[11] ^= 1;
    let destination_mac: Change = |bytes, _| bytes[0] ^= 4;
    let dont_fragment: Change = |bytes, _| bytes[20] ^= 0x40;
    let urgent: Change = |bytes, side| bytes[l4(side) + 19] = 9;
    for side in SIDES {
        let plain = Segment::new(side).seq(10).ack(500);
        let segments = [
            plain.clone().payload(b"payload").bytes(),
            plain.clone().flags(FIN | ACK).payload(b"payload").bytes(),
            plain.clone().flags(FIN | ACK).bytes(),
            plain.clone().flags(SYN | ACK).bytes(),
            plain.clone().flags(RST | ACK).bytes(),
        ];
        let others = [udp(side, false, 7, 9000, b"x"), echo(side, false, 7, b"x")];
        for (n, frame) in segments.iter().chain(&others).enumerate() {
            for change in [ttl, dscp, source_mac, destination_mac] {
                assert!(!agree(frame, side, change), "{side:?} frame {n}");
            }
            assert!(
                side == Side::V6 || !agree(frame, side, dont_fragment),
                "frame {n}"
            );
        }
        for (n, frame) in others.iter().enumerate() {
            assert!(!agree(frame, side, ecn_capable), "{side:?} datagram {n}");
        }
        let flags = [URG | ACK, URG | FIN | ACK];
        for flags in flags {
            let frame = plain.clone().flags(flags).payload(b"payload").bytes();
            assert!(!agree(&frame, side, urgent));
        }
    }
}

#[test]
fn a_repeated_syn_that_carries_something_is_not_free() {
    for side in SIDES {
        let again = |segment: Segment| segment.seq(100).ack(8).bytes();
        let bare = again(Segment::new(side).flags(SYN | ACK));
        let mut pair = Pair::new();
        pair.pvm(&bare);
        pair.svm(&bare);
        pair.pvm(&bare);
        assert_eq!(pair.rights(), [Right::Match, Right::Free]);
        pair.pvm(&again(
            Segment::new(side).flags(SYN | ACK).payload(b"secret"),
        ));
        assert_eq!(pair.rights(), []);
        pair.advance(Limits::default().compare_deadline_us);
        assert_eq!(pair.causes, [Cause::Deadline]);
        pair.close();
        let mut pair = Pair::new();
        pair.pvm(&bare);
        pair.svm(&bare);
        pair.pvm(&again(Segment::new(side).flags(SYN | ACK | FIN)));
        assert_eq!(pair.rights(), [Right::Match]);
        // Bytes that a first SYN carried are compared again when they come again.
        pair.close();
        let with_data = again(Segment::new(side).flags(SYN | ACK).payload(b"ab"));
        let mut pair = Pair::new();
        pair.pvm(&with_data);
        pair.svm(&with_data);
        pair.pvm(&data(side, 101, b"ax"));
        assert_eq!(pair.rights(), [Right::Match]);
        pair.close();
    }
}
