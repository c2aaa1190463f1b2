//! Everything that is compared frame by frame, and the captures around it.

#![allow(clippy::unwrap_used, reason = "what fails in a rig fails its test")]

mod rig;

use colo_compare::testing::{GUEST_MAC, PEER_MAC, Side, echo, ip_frame, udp};
use colo_compare::{Policy, PolicyAction, PolicyProtocol, Rule};
use colo_replay::testing::{FORMATS, capture};
use colo_replay::{Align, InputError, Settings, replay};
use rig::*;

fn datagram(port: u16, payload: &[u8]) -> Vec<u8> {
    udp(Side::V4, false, 53, port, payload)
}

fn numbered(range: std::ops::Range<u32>, gap_us: u64) -> Frames {
    let frame = |n: u32| (u64::from(n) * gap_us, datagram(9, &n.to_be_bytes()));
    Frames(range.map(frame).collect())
}

#[test]
fn equal_datagrams_are_the_same_whatever_their_skew_and_small_order() {
    let pvm = numbered(0..50, 1000);
    assert_same(&compare(&pvm, &pvm.clone().later(5000)));
    let mut svm = pvm.clone();
    for n in (0..50).step_by(2) {
        (svm.0[n].0, svm.0[n + 1].0) = (svm.0[n + 1].0, svm.0[n].0);
    }
    let report = compare(&pvm, &svm.sorted());
    assert_same(&report);
    assert_eq!((report.pairs, report.flows), (50, 1));
    assert_eq!(report.flow_table[0].primary.bytes, 50 * 46);
}

#[test]
fn a_datagram_that_differs_is_one_difference() {
    let pvm = numbered(0..20, 5000);
    let mut svm = pvm.clone();
    svm.0[7].1 = datagram(9, b"else");
    let report = compare(&pvm, &svm.clone().later(300));
    assert_eq!(causes(&report), ["payload"], "{report:#?}");
    assert_eq!((report.checkpoints, report.held, report.dropped), (1, 1, 1));
    assert_eq!(report.divergences[0].offset, 42);
    assert_eq!(report.divergences[0].secondary.frame, Some(8));
    svm.0[7].1 = datagram(9, b"longer than before");
    let report = compare(&pvm, &svm.later(300));
    assert_eq!(causes(&report), ["length"], "{report:#?}");
}

#[test]
fn a_lost_datagram_is_one_difference_and_an_extra_one_too() {
    let all = numbered(0..20, 60_000);
    let mut some = all.clone();
    some.0.remove(7);
    let report = compare(&all, &some.clone().later(300));
    assert_eq!(causes(&report), ["deadline"], "{report:#?}");
    assert_eq!((report.checkpoints, report.held), (1, 1));
    let report = compare(&some, &all.later(300));
    assert_eq!(report.divergences.len(), 1, "{report:#?}");
    assert_eq!((report.checkpoints, report.dropped), (1, 1));
}

#[test]
fn a_checkpoint_of_one_flow_disturbs_no_other() {
    let pvm = numbered(0..200, 1000);
    let mut svm = pvm.clone().later(3000);
    let with = |frames: &mut Frames, at_us, payload: &[u8]| {
        frames.push(at_us, datagram(10, payload));
    };
    let mut pvm = pvm;
    for n in 0..10u64 {
        with(&mut pvm, 20_000 * n + 7, b"PVM");
        with(&mut svm, 20_000 * n + 9, b"SVM");
    }
    let report = compare(&pvm.sorted(), &svm.sorted());
    assert_eq!(causes(&report), ["payload"; 10], "{report:#?}");
    let row = |port: &str| {
        let mut rows = report.flow_table.iter();
        rows.find(|row| row.flow.ends_with(port)).unwrap()
    };
    assert_eq!(row(":9").divergences, 0);
    assert_eq!((row(":10").divergences, row(":10").held), (10, 10));
}

#[test]
fn every_kind_of_frame_is_compared() {
    let arp = {
        let mut frame = [[0xff; 6], GUEST_MAC].concat();
        frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        frame.extend_from_slice(&[0; 20]);
        frame
    };
    let mut raw = [PEER_MAC, GUEST_MAC].concat();
    raw.extend_from_slice(&[0x88, 0xcc, 1, 2, 3, 4]);
    let mut first = ip_frame(Side::V4, false, 17, 64, 7, &[1; 48]);
    (first[20], first[21]) = (0x20, 0);
    let mut last = ip_frame(Side::V4, false, 17, 64, 7, &[2; 20]);
    (last[20], last[21]) = (0, 6);
    let v6 = udp(Side::V6, false, 53, 9, b"an answer");
    let kinds = [
        datagram(9, b"an answer"),
        v6.clone(),
        echo(Side::V4, false, 3, b"ping"),
        echo(Side::V6, false, 3, b"ping"),
        arp,
        raw,
        first,
        last,
        tagged(&v6, 5),
        tagged(&tagged(&v6, 5), 6),
        ip_frame(Side::V4, false, 132, 64, 0, b"another protocol"),
    ];
    for kind in &kinds {
        let pvm = Frames(vec![(0, kind.clone()), (50, datagram(1, b"both"))]);
        assert_same(&compare(&pvm, &pvm.clone().later(100)));
        let mut other = pvm.clone().later(100);
        *other.0[0].1.last_mut().unwrap() ^= 1;
        let report = compare(&pvm, &other);
        assert!(!report.is_same(), "{kind:02x?}");
        assert_eq!(report.checkpoints, 1, "{kind:02x?}: {report:#?}");
    }
    let all = Frames(kinds.iter().map(|kind| (0, kind.clone())).collect());
    let report = compare(&all, &all);
    assert_same(&report);
    assert_eq!(report.pairs, kinds.len() as u64);
}

#[test]
fn formats_of_the_two_captures_need_not_agree() {
    let frames = numbered(0..10, 1000);
    for (n, format) in FORMATS.iter().enumerate() {
        let other = FORMATS[(n * 3 + 1) % FORMATS.len()];
        let settings = Settings::default();
        let report = replay(&frames.bytes(*format), &frames.bytes(other), &settings).unwrap();
        assert_same(&report);
    }
}

#[test]
fn clocks_that_differ_are_aligned_by_the_first_frames() {
    let pvm = numbered(0..10, 1000);
    let hour_us = 3_600_000_000;
    let report = compare(&pvm, &pvm.clone().later(hour_us));
    assert_same(&report);
    assert_eq!(report.clock_shift_ns, -3_600_000_000_000);
    assert_same(&compare(&pvm.clone().later(hour_us), &pvm));
    let with = |align| Settings {
        align,
        ..Settings::default()
    };
    // Half a second of skew is taken for the guest's, unless it is said to be the clock's.
    let late = pvm.clone().later(500_000);
    assert!(!compare(&pvm, &late).is_same());
    assert_same(&compare_with(&pvm, &late, &with(Align::First)));
    let far = pvm.clone().later(hour_us);
    assert!(!compare_with(&pvm, &far, &with(Align::Clock)).is_same());
}

#[test]
fn the_guest_is_who_sent_the_first_frame_or_who_it_is_said_to_be() {
    let answer = datagram(9, b"answer");
    let question = udp(Side::V4, true, 53, 9, b"question");
    let mut foreign = question.clone();
    foreign[0] = 6;
    let frames = Frames(vec![(0, question), (100, answer), (200, foreign)]);
    let settings = Settings {
        guest_mac: Some(GUEST_MAC),
        ..Settings::default()
    };
    let report = compare_with(&frames, &frames, &settings);
    assert_same(&report);
    let counts = (report.primary_input.packets, report.foreign.packets);
    assert_eq!((report.pairs, counts), (1, (1, 2)));
    assert_eq!(report.guest_mac, "02:00:00:00:00:01");
    let by_default = compare(&frames, &frames);
    assert_eq!(by_default.guest_mac, "02:00:00:00:00:02");
    let nobody = Settings {
        guest_mac: Some([2; 6]),
        ..Settings::default()
    };
    let bytes = frames.bytes(PCAP);
    let outcome = replay(&bytes, &bytes, &nobody);
    assert_eq!(outcome, Err(InputError::NoGuest([2; 6])));
    let nothing = Frames::default().bytes(PCAP);
    let outcome = replay(&nothing, &nothing, &Settings::default()).unwrap();
    assert!(outcome.is_same() && outcome.pairs == 0);
    assert!(!replay(&bytes, &nothing, &settings).unwrap().is_same());
}

#[test]
fn datagrams_from_other_ports_are_one_difference_for_each_port() {
    let each = [(5000, 0), (6000, 400)].map(|(port, skew_us)| {
        let frame = |n: u32| {
            let port = port + (n / 5) as u16;
            let payload = n.to_be_bytes();
            let at_us = 30_000 * u64::from(n) + skew_us;
            (at_us, udp(Side::V4, false, port, 53, &payload))
        };
        Frames((0..10).map(frame).collect())
    });
    let report = compare(&each[0], &each[1]);
    assert_eq!(causes(&report), ["outbound_tuple"; 2], "{report:#?}");
    assert_eq!((report.checkpoints, report.held), (2, 2));
}

#[test]
fn a_policy_that_holds_asks_for_checkpoints_but_nothing_differs() {
    let pvm = numbered(0..10, 30_000);
    let settings = Settings {
        policy: Policy::new(vec![Rule {
            action: PolicyAction::Hold,
            ..Rule::default()
        }]),
        ..Settings::default()
    };
    let report = compare_with(&pvm, &pvm.clone().later(100), &settings);
    assert!(report.is_same(), "{report:#?}");
    assert_eq!(
        (report.checkpoints, report.held, report.released),
        (10, 10, 0)
    );
}

#[test]
fn a_policy_says_what_is_not_compared() {
    let pvm = numbered(0..5, 1000);
    let mut svm = pvm.clone().later(10);
    svm.0.iter_mut().for_each(|(_, frame)| frame[45] ^= 1);
    assert!(!compare(&pvm, &svm).is_same());
    let with = |action| Settings {
        policy: Policy::new(vec![Rule {
            protocol: Some(PolicyProtocol::Udp),
            action,
            ..Rule::default()
        }]),
        ..Settings::default()
    };
    let ignoring = PolicyAction::IgnoreBytes { from: 3, end: 4 };
    assert_same(&compare_with(&pvm, &svm, &with(ignoring)));
    let released = compare_with(&pvm, &svm, &with(PolicyAction::Release));
    assert!(released.is_same());
    assert_eq!((released.released, released.checkpoints), (5, 0));
}

#[test]
fn a_divergence_as_json_has_its_cause_flow_and_offset() {
    let pvm = numbered(0..2, 1000);
    let mut svm = pvm.clone();
    svm.0[1].1 = datagram(9, b"else");
    let report = compare(&pvm, &svm);
    let json = serde_json::to_value(&report).unwrap();
    for key in [
        "pairs",
        "released",
        "held",
        "dropped",
        "checkpoints",
        "flows",
    ] {
        assert!(json[key].is_u64(), "{key} in {json:#}");
    }
    let found = &json["divergences"][0];
    assert_eq!(found["cause"], "payload");
    assert_eq!(found["flow"], "Udp 10.77.0.10:53 <-> 10.77.0.1:9");
    assert_eq!(found["offset"], 42);
    let bytes = found["secondary"]["bytes"].as_str().unwrap();
    assert!(bytes.ends_with("656c7365"), "{bytes}");
}

#[test]
fn a_capture_in_memory_is_what_was_written() {
    // The rig's own check: times and frames survive.
    let frames = numbered(0..3, 1000);
    let bytes = capture(PCAP, &[(EPOCH_NS, frames.0[0].1.clone())]);
    let records: Vec<_> = colo_replay::capture::read(&bytes).unwrap().collect();
    assert_eq!(records[0].unwrap().at_ns, EPOCH_NS);
}
