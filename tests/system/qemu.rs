//! The same traffic through QEMU's colo-compare object and through ours: they agree wherever QEMU's
//! compares, and each difference that is meant has a test of its own, named after it.
//!
//! Both run as processes behind the same sockets. A pair of equal segments of a connection of its own
//! marks the end of a scenario: when it has left, everything before it has been compared.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::io::Write;

use colo_compare::testing::{Segment, Side, echo, ip_frame, udp};
use colo_compare::wire::checksum::ones_sum;
use colo_compare::wire::tcp::{ACK, FIN, RST, SYN};
use colo_lab::comparator::{Comparator, ComparatorOptions, Kind, QEMU, message};
use colo_tests::bench::{colo, installed};
use tempfile::TempDir;

/// The connection of the marks.
const MARK_PORTS: (u16, u16) = (65_001, 65_002);

/// One comparator and what was asked of it so far.
struct Judge {
    name: &'static str,
    comparator: Comparator,
    marks: u32,
    _dir: TempDir,
}

impl Judge {
    fn start(kind: Kind<'_>, options: &ComparatorOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let name = match kind {
            Kind::Qemu => "QEMU's",
            Kind::Colo(_) => "ours",
        };
        Self {
            name,
            comparator: Comparator::start(kind, options, dir.path()).unwrap(),
            marks: 0,
            _dir: dir,
        }
    }

    fn primary(&mut self, frame: &[u8]) {
        self.comparator.primary_sends(frame).unwrap();
    }

    fn secondary(&mut self, frame: &[u8]) {
        self.comparator.secondary_sends(frame).unwrap();
    }

    fn both(&mut self, frame: &[u8]) {
        self.primary(frame);
        self.secondary(frame);
    }

    /// Frames of both, in an order that is drawn by lot.
    fn interleaved(&mut self, primary: &[Vec<u8>], secondary: &[Vec<u8>], order: &[bool]) {
        let (mut primary, mut secondary) = (primary.iter(), secondary.iter());
        for is_primary in order.iter().cycle() {
            let next = if *is_primary {
                primary.next()
            } else {
                secondary.next()
            };
            match next {
                Some(frame) if *is_primary => self.primary(frame),
                Some(frame) => self.secondary(frame),
                None if primary.len() + secondary.len() == 0 => return,
                None => {}
            }
        }
    }

    /// Takes what was asked more than once: QEMU's asks at every frame.
    fn forget_requests(&mut self) {
        self.released();
        while self.comparator.notified_bytes().unwrap() > 0 {
            self.assert_asks_for_checkpoint();
        }
    }

    fn each(&mut self, primary: &[Vec<u8>], secondary: &[Vec<u8>]) {
        primary.iter().for_each(|frame| self.primary(frame));
        secondary.iter().for_each(|frame| self.secondary(frame));
    }

    /// Everything that has left since the last mark, after everything sent before has been seen.
    fn released(&mut self) -> Vec<Vec<u8>> {
        let mark = Segment::new(Side::V4)
            .ports(MARK_PORTS.0, MARK_PORTS.1)
            .seq(self.marks * 4)
            .payload(&self.marks.to_be_bytes())
            .bytes();
        self.marks += 1;
        self.both(&mark);
        let mut released = Vec::new();
        loop {
            let frame = self.comparator.released();
            let frame = frame.unwrap_or_else(|e| panic!("{}: {e}", self.name));
            if frame == mark {
                return released;
            }
            released.push(frame);
        }
    }

    fn assert_released(&mut self, expected: &[Vec<u8>]) {
        let released = self.released();
        assert!(
            released == expected,
            "{} released {released:02x?}",
            self.name
        );
    }

    fn assert_no_checkpoint(&mut self) {
        let waiting = self.comparator.notified_bytes().unwrap();
        assert_eq!(waiting, 0, "{} asked for a checkpoint", self.name);
    }

    fn assert_asks_for_checkpoint(&mut self) {
        let message = self.comparator.notified();
        let message = message.unwrap_or_else(|e| panic!("{}: {e}", self.name));
        assert_eq!(message, "DO_CHECKPOINT", "{}", self.name);
    }

    /// A checkpoint is taken. Gives what it lets leave.
    fn checkpoint(&mut self, frames: usize) -> Vec<Vec<u8>> {
        self.comparator.checkpoint_taken().unwrap();
        // Awaited before the next mark: notify and inputs are read in any order.
        (0..frames)
            .map(|_| self.comparator.released().unwrap())
            .collect()
    }
}

/// QEMU's comparator and ours; `None` on a machine without QEMU.
fn judges(options: &ComparatorOptions) -> Option<[Judge; 2]> {
    if !installed(QEMU) {
        println!("SKIPPED: {QEMU} is not installed");
        return None;
    }
    let qemu = Judge::start(Kind::Qemu, options);
    Some([qemu, Judge::start(Kind::Colo(colo()), options)])
}

fn patient() -> Option<[Judge; 2]> {
    judges(&ComparatorOptions::default())
}

/// With a time limit that is reached.
fn hurried() -> Option<[Judge; 2]> {
    judges(&ComparatorOptions {
        timeout_ms: 500,
        ..ComparatorOptions::default()
    })
}

fn segment(seq: u32, payload: &[u8]) -> Vec<u8> {
    Segment::new(Side::V4).seq(seq).payload(payload).bytes()
}

fn datagram(payload: &[u8]) -> Vec<u8> {
    udp(Side::V4, false, 53, 4000, payload)
}

/// A message of an IP protocol that neither knows.
fn unknown_protocol(message: &[u8]) -> Vec<u8> {
    ip_frame(Side::V4, false, 47, 64, 0, message)
}

/// Inserts a tag after the addresses.
fn tagged(frame: &[u8], ethertype: u16) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let tag = [ethertype.to_be_bytes(), 5u16.to_be_bytes()].concat();
    frame.splice(12..12, tag);
    frame
}

/// A reply from the guest, to an address that ends so.
fn arp(target: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&[2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    frame.extend_from_slice(&[2, 0, 0, 0, 0, 1]);
    frame.extend_from_slice(&[10, 77, 0, 10]);
    frame.extend_from_slice(&[2, 0, 0, 0, 0, target]);
    frame.extend_from_slice(&[10, 77, 0, 1]);
    frame
}

/// Both let the primary's frames leave because of the secondary's, and ask for nothing.
fn agree_that_same(primary: &[Vec<u8>], secondary: &[Vec<u8>]) {
    let Some(judges) = patient() else { return };
    for mut judge in judges {
        judge.each(primary, secondary);
        judge.assert_released(primary);
        judge.assert_no_checkpoint();
    }
}

/// Both hold the primary's frames, ask for a checkpoint, and let them leave when it is taken.
fn agree_that_different(primary: &[Vec<u8>], secondary: &[Vec<u8>]) {
    let Some(judges) = patient() else { return };
    for mut judge in judges {
        judge.each(primary, secondary);
        judge.assert_asks_for_checkpoint();
        judge.assert_released(&[]);
        let released = judge.checkpoint(primary.len());
        assert!(released == primary, "{}: {released:02x?}", judge.name);
        judge.assert_released(&[]);
    }
}

/// QEMU's lets the primary's frame leave at once; ours holds it and asks for a checkpoint.
fn only_ours_compares(primary: &[u8], secondary: &[u8]) {
    let Some([mut qemu, mut ours]) = patient() else {
        return;
    };
    qemu.primary(primary);
    qemu.secondary(secondary);
    qemu.assert_released(&[primary.to_vec()]);
    qemu.assert_no_checkpoint();
    ours.primary(primary);
    ours.secondary(secondary);
    ours.assert_asks_for_checkpoint();
    ours.assert_released(&[]);
    assert_eq!(ours.checkpoint(1), [primary]);
}

#[test]
fn the_same_tcp_payload_is_the_same() {
    agree_that_same(&[segment(0, b"abc")], &[segment(0, b"abc")]);
}

#[test]
fn an_identification_and_a_checksum_do_not_count() {
    let other = |id| Segment::new(Side::V4).id(id).payload(b"abc").bytes();
    agree_that_same(&[other(1)], &[other(2)]);
}

#[test]
fn a_timestamp_does_not_count() {
    let at = |time| Segment::new(Side::V4).timestamps(time, 7).payload(b"abc");
    agree_that_same(&[at(1).bytes()], &[at(2).bytes()]);
}

#[test]
fn a_byte_of_tcp_payload_counts() {
    agree_that_different(&[segment(0, b"abc")], &[segment(0, b"abX")]);
}

#[test]
fn a_byte_of_tcp_payload_counts_wherever_it_was_cut() {
    agree_that_different(
        &[segment(0, b"abcdef")],
        &[segment(0, b"abcd"), segment(4, b"eX")],
    );
}

#[test]
fn a_stream_that_the_secondary_cuts_finer_is_the_same() {
    agree_that_same(
        &[segment(0, b"abcdef")],
        &[segment(0, b"abc"), segment(3, b"def")],
    );
}

#[test]
fn a_stream_that_the_primary_cuts_finer_is_the_same() {
    agree_that_same(
        &[segment(0, b"abc"), segment(3, b"def")],
        &[segment(0, b"abcdef")],
    );
}

#[test]
fn random_cuts_of_random_streams_are_judged_alike() {
    let Some(mut judges) = patient() else { return };
    let mut random = Random(0x5eed);
    for case in 0..300u16 {
        let stream: Vec<u8> = (0..random.below(4000) + 1)
            .map(|n| (n ^ n >> 8) as u8)
            .collect();
        let mut other = stream.clone();
        let flipped = (case % 3 == 0).then(|| random.below(stream.len()));
        if let Some(at) = flipped {
            other[at] ^= 1 << random.below(8);
        }
        let isn = random.next() as u32;
        let primary = random.cuts(case, isn, &stream);
        let secondary = random.cuts(case, isn, &other);
        let order: Vec<bool> = (0..64).map(|_| random.below(2) == 0).collect();
        for judge in &mut judges {
            judge.interleaved(&primary, &secondary, &order);
            // What ends before the flipped byte.
            let same = primary.iter().scan(0, |end, frame| {
                *end += frame.len() - TCP_PAYLOAD_AT;
                Some(flipped.is_none_or(|at| *end <= at))
            });
            let same = same.take_while(|same| *same).count();
            judge.assert_released(&primary[..same]);
            if flipped.is_some() {
                judge.assert_asks_for_checkpoint();
                let rest = judge.checkpoint(primary.len() - same);
                assert!(rest == primary[same..], "case {case}: {}", judge.name);
                judge.forget_requests();
            }
            judge.assert_no_checkpoint();
        }
    }
}

/// Bytes before the payload of [`segment`].
const TCP_PAYLOAD_AT: usize = 54;

/// Numbers from a seed (Steele and others, SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// A stream as segments of a connection of its own.
    fn cuts(&mut self, connection: u16, isn: u32, stream: &[u8]) -> Vec<Vec<u8>> {
        let mut at = 0;
        let mut segments = Vec::new();
        while at < stream.len() {
            let end = stream.len().min(at + self.below(1460) + 1);
            let segment = Segment::new(Side::V4).ports(80, 1000 + connection);
            let segment = segment.seq(isn.wrapping_add(at as u32)).ack(7);
            segments.push(segment.payload(&stream[at..end]).bytes());
            at = end;
        }
        segments
    }
}

#[test]
fn a_retransmission_by_the_primary_alone_is_the_same() {
    let (first, next) = (segment(0, b"abc"), segment(3, b"def"));
    let Some(judges) = patient() else { return };
    for mut judge in judges {
        judge.both(&first);
        judge.assert_released(std::slice::from_ref(&first));
        judge.primary(&first);
        judge.both(&next);
        judge.assert_released(&[first.clone(), next.clone()]);
        judge.assert_no_checkpoint();
    }
}

#[test]
fn connections_do_not_disturb_each_other() {
    let of = |port, payload: &[u8]| {
        let ports = Segment::new(Side::V4).ports(80, port);
        ports.payload(payload).bytes()
    };
    let Some(judges) = patient() else { return };
    for mut judge in judges {
        judge.primary(&of(1, b"abc"));
        judge.secondary(&of(1, b"abX"));
        judge.assert_asks_for_checkpoint();
        judge.both(&of(2, b"abc"));
        judge.assert_released(&[of(2, b"abc")]);
    }
}

#[test]
fn the_same_datagram_is_the_same() {
    agree_that_same(&[datagram(b"abc")], &[datagram(b"abc")]);
}

#[test]
fn a_byte_of_a_datagram_counts() {
    agree_that_different(&[datagram(b"abc")], &[datagram(b"abX")]);
}

#[test]
fn the_length_of_a_datagram_counts() {
    agree_that_different(&[datagram(b"abc")], &[datagram(b"abcd")]);
}

#[test]
fn the_same_echo_is_the_same() {
    let reply = || echo(Side::V4, false, 7, b"abc");
    agree_that_same(&[reply()], &[reply()]);
}

#[test]
fn a_byte_of_an_echo_counts() {
    let reply = |data| echo(Side::V4, false, 7, data);
    agree_that_different(&[reply(b"abc")], &[reply(b"abX")]);
}

#[test]
fn the_same_message_of_an_unknown_protocol_is_the_same() {
    agree_that_same(&[unknown_protocol(b"abc")], &[unknown_protocol(b"abc")]);
}

#[test]
fn a_byte_of_an_unknown_protocol_counts() {
    agree_that_different(&[unknown_protocol(b"abc")], &[unknown_protocol(b"abX")]);
}

#[test]
fn what_the_secondary_lacks_counts_after_the_time_limit() {
    for frame in [segment(0, b"abc"), datagram(b"abc")] {
        let Some(judges) = hurried() else { return };
        for mut judge in judges {
            judge.primary(&frame);
            judge.assert_asks_for_checkpoint();
            judge.assert_released(&[]);
            assert_eq!(judge.checkpoint(1), std::slice::from_ref(&frame));
        }
    }
}

#[test]
fn a_datagram_that_the_primary_lacks_counts_after_the_time_limit() {
    let Some(judges) = hurried() else { return };
    for mut judge in judges {
        judge.secondary(&datagram(b"abc"));
        judge.assert_asks_for_checkpoint();
        judge.assert_released(&[]);
    }
}

#[test]
fn after_a_checkpoint_the_comparison_begins_anew() {
    let Some(judges) = patient() else { return };
    for mut judge in judges {
        judge.primary(&segment(0, b"abc"));
        judge.secondary(&segment(0, b"abX"));
        judge.assert_asks_for_checkpoint();
        assert_eq!(judge.checkpoint(1), [segment(0, b"abc")]);
        judge.both(&segment(3, b"def"));
        judge.assert_released(&[segment(3, b"def")]);
        judge.assert_no_checkpoint();
    }
}

#[test]
fn virtio_net_headers_are_passed_on() {
    let options = ComparatorOptions {
        vnet_hdr: true,
        ..ComparatorOptions::default()
    };
    let Some(judges) = judges(&options) else {
        return;
    };
    for mut judge in judges {
        judge.both(&segment(0, b"abc"));
        judge.both(&datagram(b"abc"));
        judge.assert_released(&[segment(0, b"abc"), datagram(b"abc")]);
        judge.primary(&segment(3, b"def"));
        judge.secondary(&segment(3, b"deX"));
        judge.assert_asks_for_checkpoint();
        assert_eq!(judge.checkpoint(1), [segment(3, b"def")]);
    }
}

// What follows differs on purpose.

#[test]
fn qemu_lets_ipv6_through_uncompared() {
    let packet = |payload| Segment::new(Side::V6).payload(payload).bytes();
    only_ours_compares(&packet(b"abc"), &packet(b"abX"));
}

#[test]
fn qemu_lets_arp_through_uncompared() {
    only_ours_compares(&arp(2), &arp(3));
}

#[test]
fn qemu_lets_802_1q_through_uncompared() {
    let packet = |payload| tagged(&segment(0, payload), 0x8100);
    only_ours_compares(&packet(b"abc"), &packet(b"abX"));
}

#[test]
fn both_compare_within_802_1ad() {
    let packet = |payload| tagged(&segment(0, payload), 0x88a8);
    agree_that_same(&[packet(b"abc")], &[packet(b"abc")]);
    agree_that_different(&[packet(b"abc")], &[packet(b"abX")]);
}

#[test]
fn qemu_lets_other_ethertypes_through_uncompared() {
    let frame = |last| {
        let mut frame = segment(0, b"abc");
        frame[12..14].copy_from_slice(&0x88b5u16.to_be_bytes());
        *frame.last_mut().unwrap() = last;
        frame
    };
    only_ours_compares(&frame(1), &frame(2));
}

#[test]
fn qemu_never_compares_the_options_of_a_syn() {
    let syn = |mss: u8| {
        let syn = Segment::new(Side::V4).seq(99).flags(SYN | ACK);
        syn.option(&[2, 4, 5, mss]).bytes()
    };
    only_ours_compares(&syn(0xb4), &syn(0xb0));
}

#[test]
fn qemu_never_compares_a_fin() {
    let Some([mut qemu, mut ours]) = patient() else {
        return;
    };
    let fin = Segment::new(Side::V4).flags(FIN | ACK).seq(4).bytes();
    let data = segment(0, b"data");
    qemu.primary(&data);
    qemu.primary(&fin);
    qemu.secondary(&data);
    qemu.secondary(&segment(4, b"more"));
    qemu.assert_released(&[data.clone(), fin.clone()]);
    ours.primary(&data);
    ours.primary(&fin);
    ours.secondary(&data);
    ours.secondary(&segment(4, b"more"));
    ours.assert_asks_for_checkpoint();
    ours.assert_released(&[data]);
    assert_eq!(ours.checkpoint(1), [fin]);
}

#[test]
fn qemu_never_compares_a_reset() {
    let Some([mut qemu, mut ours]) = patient() else {
        return;
    };
    let reset = Segment::new(Side::V4).flags(RST | ACK).bytes();
    let data = segment(0, b"data");
    qemu.primary(&reset);
    qemu.secondary(&data);
    qemu.assert_released(std::slice::from_ref(&reset));
    ours.primary(&reset);
    ours.secondary(&data);
    ours.assert_asks_for_checkpoint();
    ours.assert_released(&[]);
    assert_eq!(ours.checkpoint(1), [reset]);
}

#[test]
fn qemu_lets_a_pure_acknowledgement_wait_for_the_secondary() {
    let Some([mut qemu, mut ours]) = patient() else {
        return;
    };
    let pure = Segment::new(Side::V4).ack(7).bytes();
    qemu.primary(&pure);
    qemu.assert_released(&[]);
    qemu.secondary(&segment(0, b"any"));
    qemu.assert_released(std::slice::from_ref(&pure));
    ours.primary(&pure);
    ours.assert_released(&[pure]);
}

#[test]
fn qemu_takes_a_secondary_out_of_order_for_different() {
    let Some([mut qemu, mut ours]) = patient() else {
        return;
    };
    let (first, second) = (segment(0, b"abc"), segment(3, b"def"));
    for judge in [&mut qemu, &mut ours] {
        judge.each(&[first.clone(), second.clone()], &[]);
        judge.assert_released(&[]);
        judge.secondary(&second);
        judge.assert_released(&[]);
    }
    qemu.assert_asks_for_checkpoint();
    ours.secondary(&first);
    ours.assert_released(&[first, second]);
    ours.assert_no_checkpoint();
}

#[test]
fn qemu_takes_datagrams_last_in_first_out_so_skew_alone_diverges() {
    let Some([mut qemu, mut ours]) = patient() else {
        return;
    };
    let (first, second) = (datagram(b"first"), datagram(b"second"));
    for judge in [&mut qemu, &mut ours] {
        judge.each(&[first.clone(), second.clone()], &[]);
        judge.assert_released(&[]);
        judge.secondary(&first);
    }
    qemu.assert_asks_for_checkpoint();
    ours.assert_released(&[first]);
    ours.secondary(&second);
    ours.assert_released(&[second]);
    ours.assert_no_checkpoint();
}

#[test]
fn qemu_releases_held_datagrams_in_the_wrong_order() {
    let Some([mut qemu, mut ours]) = patient() else {
        return;
    };
    let (first, second) = (datagram(b"first"), datagram(b"second"));
    for judge in [&mut qemu, &mut ours] {
        judge.each(&[first.clone(), second.clone()], &[]);
        judge.assert_released(&[]);
    }
    assert_eq!(qemu.checkpoint(2), [second.clone(), first.clone()]);
    assert_eq!(ours.checkpoint(2), [first, second]);
}

#[test]
fn qemu_drops_what_its_full_queue_does_not_take() {
    let options = ComparatorOptions {
        max_queue_size: 3,
        ..ComparatorOptions::default()
    };
    let Some([mut qemu, mut ours]) = judges(&options) else {
        return;
    };
    let frames: Vec<_> = (0..6).map(|n| segment(n * 3, b"abc")).collect();
    for judge in [&mut qemu, &mut ours] {
        judge.each(&frames, &[]);
        judge.assert_released(&[]);
        judge.each(&[], &frames);
    }
    // It takes one more than its limit.
    qemu.assert_released(&frames[..4]);
    ours.assert_released(&frames);
}

#[test]
fn ours_lets_what_finds_no_room_wait_in_its_socket() {
    let Some([_, mut ours]) = patient() else {
        return;
    };
    // More than it holds: its primary is not read until the secondary has been heard.
    let frames: Vec<_> = (0..10_000).map(|n| segment(n * 3, b"abc")).collect();
    let mut primary = ours.comparator.primary.try_clone().unwrap();
    let copies = frames.clone();
    let writer = std::thread::spawn(move || {
        for frame in copies {
            primary.write_all(&message(&frame, false)).unwrap();
        }
    });
    for frame in &frames {
        ours.secondary(frame);
        assert_eq!(&ours.comparator.released().unwrap(), frame);
    }
    writer.join().unwrap();
    ours.assert_no_checkpoint();
}

#[test]
fn qemu_asks_again_for_every_frame_of_a_diverged_connection() {
    let Some([mut qemu, mut ours]) = patient() else {
        return;
    };
    for judge in [&mut qemu, &mut ours] {
        judge.primary(&segment(0, b"abc"));
        judge.secondary(&segment(0, b"abX"));
        judge.assert_asks_for_checkpoint();
        judge.primary(&segment(3, b"def"));
        judge.assert_released(&[]);
    }
    qemu.assert_asks_for_checkpoint();
    ours.assert_no_checkpoint();
}

#[test]
fn qemu_counts_padding_as_payload() {
    let Some([mut qemu, mut ours]) = patient() else {
        return;
    };
    let frame = segment(0, b"abc");
    let mut padded = frame.clone();
    padded.resize(60, 0);
    for judge in [&mut qemu, &mut ours] {
        judge.primary(&padded);
        judge.secondary(&frame);
    }
    qemu.assert_released(&[]);
    ours.assert_released(&[padded]);
}

#[test]
fn qemu_does_not_see_how_far_a_packet_may_travel() {
    let hops = |ttl| Segment::new(Side::V4).ttl(ttl).payload(b"abc").bytes();
    only_ours_compares(&hops(64), &hops(63));
}

#[test]
fn qemu_takes_all_echoes_for_one_flow() {
    let Some([mut qemu, mut ours]) = patient() else {
        return;
    };
    let reply = |id| echo(Side::V4, false, id, b"abc");
    for judge in [&mut qemu, &mut ours] {
        judge.primary(&reply(1));
        judge.secondary(&reply(2));
    }
    qemu.assert_asks_for_checkpoint();
    ours.assert_released(&[]);
    ours.assert_no_checkpoint();
    ours.primary(&reply(2));
    ours.assert_released(&[reply(2)]);
    ours.secondary(&reply(1));
    ours.assert_released(&[reply(1)]);
}

#[test]
fn qemu_takes_differently_cut_fragments_for_different() {
    let Some([mut qemu, mut ours]) = patient() else {
        return;
    };
    let whole = datagram(&[7; 64]);
    let primary = fragments(&whole, &[24, 72]);
    let secondary = fragments(&whole, &[48, 72]);
    for judge in [&mut qemu, &mut ours] {
        judge.each(&primary, &secondary);
    }
    qemu.assert_asks_for_checkpoint();
    ours.assert_released(&primary);
    ours.assert_no_checkpoint();
}

/// Cuts an IPv4 packet's payload at these offsets.
fn fragments(packet: &[u8], ends: &[usize]) -> Vec<Vec<u8>> {
    const HEADERS: usize = 34;
    let mut from = 0;
    let mut fragments = Vec::new();
    for &end in ends {
        let mut fragment = packet[..HEADERS].to_vec();
        fragment.extend_from_slice(&packet[HEADERS + from..HEADERS + end]);
        let more = if HEADERS + end < packet.len() {
            0x2000
        } else {
            0
        };
        let place = (from / 8) as u16 | more;
        fragment[16..18].copy_from_slice(&((20 + end - from) as u16).to_be_bytes());
        fragment[20..22].copy_from_slice(&place.to_be_bytes());
        fragment[24..26].fill(0);
        let sum = !ones_sum(&fragment[14..HEADERS]);
        fragment[24..26].copy_from_slice(&sum.to_be_bytes());
        fragments.push(fragment);
        from = end;
    }
    fragments
}

/// QEMU holds a segment that acknowledges more than the secondary has, but only where it also cuts
/// finer than the secondary; and its arithmetic does not wrap. Ours sees no input here, and leaves that rule to
/// the pair.
#[test]
fn qemu_looks_at_acknowledgements_in_one_case_and_not_across_the_wrap() {
    let Some([mut qemu, mut ours]) = patient() else {
        return;
    };
    let of = |port, seq, ack, payload: &[u8]| {
        let ports = Segment::new(Side::V4).ports(80, port);
        ports.seq(seq).ack(ack).payload(payload).bytes()
    };
    // (the primary's acknowledgement, the secondary's, whether the secondary's segment is longer)
    let cases = [
        (1, 200, 100, false, true),
        (2, 200, 100, true, false),
        (3, 16, u32::MAX - 16, true, true),
    ];
    for (port, primary, secondary, finer, leaves_qemu) in cases {
        let secondary = of(port, 0, secondary, if finer { b"abcdef" } else { b"abc" });
        let primary = of(port, 0, primary, b"abc");
        for judge in [&mut qemu, &mut ours] {
            judge.primary(&primary);
            judge.secondary(&secondary);
        }
        if leaves_qemu {
            qemu.assert_released(std::slice::from_ref(&primary));
        } else {
            qemu.assert_asks_for_checkpoint();
            qemu.assert_released(&[]);
        }
        ours.assert_released(&[primary]);
    }
}

#[test]
fn qemu_counts_what_only_the_secondary_has_sent_so_far() {
    let Some([mut qemu, mut ours]) = hurried() else {
        return;
    };
    // The stream of a faster secondary; what the primary sends next decides.
    for judge in [&mut qemu, &mut ours] {
        judge.secondary(&segment(0, b"abc"));
    }
    qemu.assert_asks_for_checkpoint();
    ours.primary(&segment(0, b"abc"));
    ours.assert_released(&[segment(0, b"abc")]);
    ours.assert_no_checkpoint();
}

#[test]
fn qemu_releases_a_retransmission_unseen() {
    let Some([mut qemu, mut ours]) = hurried() else {
        return;
    };
    for judge in [&mut qemu, &mut ours] {
        judge.both(&segment(0, b"abc"));
        judge.assert_released(&[segment(0, b"abc")]);
        judge.primary(&segment(0, b"abX"));
        judge.secondary(&segment(3, b"def"));
    }
    qemu.assert_released(&[segment(0, b"abX")]);
    ours.assert_asks_for_checkpoint();
    ours.assert_released(&[]);
}
