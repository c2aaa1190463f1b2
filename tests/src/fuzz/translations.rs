//! Target `translations`: offsets, records and translated connections.
//!
//! Input: one byte that chooses the part, then what the part takes:
//! - 0, `offsets`: two 32-bit offsets, then a frame. Both ways: exactly the fields that are to
//!   move do, a right checksum stays right and a wrong one stays as wrong, and the opposite
//!   offsets give the same packet back.
//! - 1, `record`: a translation record. Both paths agree whether it is good, and what a good one
//!   says survives being written and read.
//! - 2, `edge`: the length of a record, the record, then segments of the guest. What leaves has
//!   right checksums, and its acknowledgement comes back to the number that the guest used.
//! - 3, `pair`: two initial sequence numbers and timestamps, then segments that the SVM sends. What
//!   goes to the comparator carries the numbers of the PVM.
//! - 4, `errors`: ICMP errors for a guest whose connections are translated, with quotations of any
//!   kind. Their checksums stay right, and a quoted segment gets the guest's own number.

use colo_compare::testing::{Segment, Side, VecFrames, checksums_are_right, ip_frame};
use colo_compare::wire::Packet;
use colo_compare::wire::tcp::{ACK, SYN};
use colo_compare::{
    Action, Direction, HEADER_MAX, Limits, Offsets, PrimaryPath, SecondaryAction, SecondaryPath,
};

use super::bytes::Bytes;
use super::checksums::{network_residue, tcp_residue};
use super::guest::{self, parse};

/// The body of the target.
pub fn translations(input: &[u8]) {
    let mut bytes = Bytes::new(input);
    match bytes.below(5) {
        0 => offsets(bytes),
        1 => drop(record(bytes.rest())),
        2 => edge(bytes),
        3 => pair(bytes),
        _ => errors(bytes),
    }
}

/// Small tables: a body runs thousands of times a second.
fn limits() -> Limits {
    Limits {
        max_flows: 16,
        max_translations: 16,
        max_held_frames: 16,
        max_svm_frames: 16,
        max_input_frames: 64,
        max_stored_output: 16,
        ..Limits::default()
    }
}

fn offsets(mut bytes: Bytes<'_>) {
    let offsets = Offsets {
        seq: bytes.u32(),
        ts: bytes.u32(),
    };
    let back = Offsets {
        seq: offsets.seq.wrapping_neg(),
        ts: offsets.ts.wrapping_neg(),
    };
    let frame = bytes.rest();
    for direction in [Direction::FromGuest, Direction::ToGuest] {
        let mut moved = frame.to_vec();
        let Some(before) = translate(&mut moved, offsets, direction) else {
            return;
        };
        check_moved(frame, &moved, &before, offsets, direction);
        translate(&mut moved, back, direction);
        let checksum = usize::from(before.l4) + 16..usize::from(before.l4) + 18;
        // 0 and 0xffff are two names of one sum.
        moved[checksum.clone()].copy_from_slice(&frame[checksum]);
        assert_eq!(moved, frame, "there and back again");
    }
}

fn translate(frame: &mut [u8], offsets: Offsets, direction: Direction) -> Option<Packet> {
    let packet = parse(frame, direction);
    let mut tcp = packet.tcp?;
    let header_len = frame.len().min(HEADER_MAX);
    match direction {
        Direction::FromGuest => offsets.outbound(&mut frame[..header_len], &mut tcp),
        Direction::ToGuest => offsets.inbound(&mut frame[..header_len], &mut tcp),
    }
    let after = parse(frame, direction);
    assert_eq!(after.tcp, Some(tcp), "the view is kept up to date");
    assert_eq!(after.key, packet.key);
    Some(packet)
}

fn check_moved(old: &[u8], new: &[u8], before: &Packet, offsets: Offsets, direction: Direction) {
    let after = parse(new, direction);
    assert_eq!(tcp_residue(old, before), tcp_residue(new, &after));
    assert_eq!(network_residue(old, before), network_residue(new, &after));
    let (Some(a), Some(b)) = (before.tcp, after.tcp) else {
        panic!("it is not TCP any more");
    };
    let zero = Offsets::default();
    let (out, back) = match direction {
        Direction::FromGuest => (offsets, zero),
        Direction::ToGuest if a.has(ACK) => (zero, offsets),
        Direction::ToGuest => (zero, zero),
    };
    assert_eq!(b.seq, a.seq.wrapping_add(out.seq));
    assert_eq!(b.ack, a.ack.wrapping_sub(back.seq));
    let moved_ts = a
        .timestamps(old)
        .map(|(val, ecr)| (val.wrapping_add(out.ts), ecr.wrapping_sub(back.ts)));
    assert_eq!(b.timestamps(new), moved_ts);
    let moved_sack = a
        .sack_blocks(old)
        .map(|(l, r)| (l.wrapping_sub(back.seq), r.wrapping_sub(back.seq)));
    assert!(b.sack_blocks(new).eq(moved_sack));
    assert_eq!(old.len(), new.len());
}

/// Gives a path that has taken the record, where it is good.
fn record(record: &[u8]) -> Option<PrimaryPath> {
    let limits = limits();
    let mut path = PrimaryPath::new(limits);
    let taken = path.import_client_xlate(0, record);
    let checked = SecondaryPath::new(limits).check_record(record);
    assert_eq!(taken, checked, "both paths judge it alike");
    taken.ok()?;
    let mut first = Vec::new();
    path.export_client_xlate(&mut first);
    let mut again = PrimaryPath::new(limits);
    let taken = again.import_client_xlate(0, &first);
    assert_eq!(taken, Ok(()), "what was written is read");
    let mut second = Vec::new();
    again.export_client_xlate(&mut second);
    assert_eq!(first, second);
    Some(path)
}

fn edge(mut bytes: Bytes<'_>) {
    let record_len = usize::from(bytes.u16());
    let Some(mut path) = record(bytes.take(record_len)) else {
        return;
    };
    let mut frames = VecFrames::new(8);
    let mut now_us = 0;
    while !bytes.is_empty() {
        now_us += u64::from(bytes.u8()) << 18;
        let segment = guest_segment(&mut bytes);
        let before = path.stats().stripped;
        let Some(left) = alone_output(&mut path, &mut frames, now_us, &segment) else {
            panic!("a host that is alone lets everything leave")
        };
        assert!(checksums_are_right(&left));
        let (old, new) = (
            parse(&segment, Direction::FromGuest),
            parse(&left, Direction::FromGuest),
        );
        assert_eq!(old.key, new.key);
        let (Some(old), Some(new)) = (old.tcp, new.tcp) else {
            panic!("it is not TCP any more")
        };
        let is_syn = old.has(SYN);
        if path.stats().stripped > before {
            assert!(new.payload_len == 0 && !is_syn);
            continue;
        }
        assert_eq!((old.payload_len, old.flags), (new.payload_len, new.flags));
        // While a handshake is not learnt, an acknowledgement of anything teaches a translation.
        if !is_syn {
            assert_eq!(
                acknowledge(&mut path, &mut frames, now_us, &left),
                old.end()
            );
        }
    }
    path.close(&mut frames);
    assert_eq!(frames.used(), 0, "a slot leaked");
}

fn guest_segment(bytes: &mut Bytes<'_>) -> Vec<u8> {
    let choice = bytes.u8();
    let side = if choice & 1 == 0 { Side::V4 } else { Side::V6 };
    let mut segment = Segment::new(side)
        .ports(80, 40_000 + u16::from(choice >> 1 & 1))
        .seq(bytes.u32())
        .ack(bytes.u32());
    if choice & 4 != 0 {
        segment = segment.flags(SYN | ACK);
    }
    if choice & 8 != 0 {
        segment = segment.timestamps(bytes.u32(), bytes.u32());
    }
    if choice & 4 == 0 {
        segment = segment.payload(bytes.take(usize::from(choice >> 4)));
    }
    segment.bytes()
}

fn alone_output(
    path: &mut PrimaryPath,
    frames: &mut VecFrames,
    now_us: u64,
    frame: &[u8],
) -> Option<Vec<u8>> {
    let token = frames.insert(frame)?;
    path.handle_guest_tx(now_us, frames, token);
    match path.poll_action()? {
        Action::Release { token, .. } => Some(frames.take(token)),
        other => panic!("alone, but {other:?}"),
    }
}

/// The client acknowledges all of `seen`; gives what the guest is told.
fn acknowledge(path: &mut PrimaryPath, frames: &mut VecFrames, now_us: u64, seen: &[u8]) -> u32 {
    let packet = parse(seen, Direction::FromGuest);
    let tcp = packet.tcp.expect("a segment of the guest");
    let side = if seen[12] == 8 { Side::V4 } else { Side::V6 };
    let at = usize::from(tcp.at);
    let peer_port = u16::from_be_bytes([seen[at + 2], seen[at + 3]]);
    let ack = Segment::new(side)
        .to_guest()
        .ports(80, peer_port)
        .seq(tcp.ack)
        .ack(tcp.end())
        .bytes();
    let token = frames.insert(&ack).expect("a slot");
    let token = path.handle_nic(now_us, frames, token);
    let told = frames.bytes(&token).to_vec();
    path.handle_delivered(now_us, frames, token);
    assert!(checksums_are_right(&told));
    parse(&told, Direction::ToGuest)
        .tcp
        .map_or(0, |tcp| tcp.ack)
}

fn pair(mut bytes: Bytes<'_>) {
    let side = if bytes.u8() & 1 == 0 {
        Side::V4
    } else {
        Side::V6
    };
    let (pvm_isn, svm_isn) = (bytes.u32(), bytes.u32());
    let (pvm_ts, svm_ts) = (bytes.u32(), bytes.u32());
    let mut frames = VecFrames::new(64);
    let mut path = joined(&mut frames);
    let segment = || Segment::new(side).ports(80, 40_000);
    let mut input_seq = 0;
    let mut deliver = |path: &mut SecondaryPath, frames: &mut VecFrames, frame: &[u8]| {
        input_seq += 1;
        let token = frames.insert(frame).expect("a slot");
        let taken = path.handle_mirror(0, frames, 1, input_seq, token);
        assert_eq!(taken, Ok(()));
        let token = path.poll_deliver(0, frames).expect("it runs");
        let told = frames.take(token);
        assert!(checksums_are_right(&told));
        parse(&told, Direction::ToGuest).tcp.expect("TCP")
    };
    let syn = segment().to_guest().flags(SYN).seq(7).timestamps(1, 0);
    deliver(&mut path, &mut frames, &syn.bytes());
    let answer = segment().flags(SYN | ACK).seq(svm_isn).ack(8);
    svm_output(
        &mut path,
        &mut frames,
        &answer.timestamps(svm_ts, 1).bytes(),
    );
    // The client saw the PVM's SYN-ACK and acknowledges that.
    let ack = segment().to_guest().seq(8).ack(pvm_isn.wrapping_add(1));
    let told = deliver(&mut path, &mut frames, &ack.timestamps(2, pvm_ts).bytes());
    assert_eq!(told.ack, svm_isn.wrapping_add(1));
    // An equal number may be the same SYN-ACK, sent earlier: then time is not translated.
    let ts = if pvm_isn == svm_isn { svm_ts } else { pvm_ts };
    let mut sent = 0u32;
    while !bytes.is_empty() {
        let data_len = 1 + bytes.below(32);
        let data = bytes.take(data_len);
        if data.is_empty() {
            break;
        }
        let at = svm_isn.wrapping_add(1).wrapping_add(sent);
        let output = segment().seq(at).ack(8).timestamps(svm_ts, 2).payload(data);
        let out = svm_output(&mut path, &mut frames, &output.bytes());
        let tcp = parse(&out, Direction::FromGuest).tcp.expect("TCP");
        assert_eq!(tcp.seq, pvm_isn.wrapping_add(1).wrapping_add(sent));
        assert_eq!(tcp.timestamps(&out), Some((ts, 2)));
        sent = sent.wrapping_add(data.len() as u32);
        let ack = pvm_isn.wrapping_add(1).wrapping_add(sent);
        let sack = [(ack.wrapping_add(9), ack.wrapping_add(12))];
        let frame = segment().to_guest().seq(8).ack(ack).sack(&sack).bytes();
        let told = deliver(&mut path, &mut frames, &frame);
        assert_eq!(told.ack, svm_isn.wrapping_add(1).wrapping_add(sent));
    }
    path.close(&mut frames);
    assert_eq!(frames.used(), 0, "a slot leaked");
}

fn errors(mut bytes: Bytes<'_>) {
    let mut frames = VecFrames::new(64);
    let mut path = guest::former_secondary(limits(), &mut frames);
    while let Some(action) = path.poll_action() {
        if let Action::Release { token, .. } = action {
            frames.take(token);
        }
    }
    while !bytes.is_empty() {
        let choice = bytes.u8();
        let (side, protocol) = if choice & 1 == 0 {
            (Side::V4, 1)
        } else {
            (Side::V6, 58)
        };
        let kind = [1, 2, 3, 4, 11, 12, 0, 128][usize::from(choice >> 1 & 7)];
        let len = usize::from(bytes.u8());
        let is_quotation = choice & 16 == 0;
        let quoted = if is_quotation {
            let segment = Segment::new(side).ports(80, 40_000 + u16::from(choice >> 5 & 1));
            let segment = segment.seq(bytes.u32()).payload(&[choice; 40]).bytes();
            segment[14..][..len.min(segment.len() - 14)].to_vec()
        } else {
            bytes.take(len).to_vec()
        };
        let body = [&[kind, 0, 0, 0, 0, 0, 0, 0], &quoted[..]].concat();
        let error = ip_frame(side, true, protocol, 64, 0, &body);
        let token = frames.insert(&error).expect("a slot");
        let token = path.handle_nic(0, &mut frames, token);
        let told = frames.bytes(&token).to_vec();
        path.handle_delivered(0, &mut frames, token);
        assert!(checksums_are_right(&told), "the error's checksum");
        check_quotation(&error, &told, side);
    }
    path.close(&mut frames);
    assert_eq!(frames.used(), 0, "a slot leaked");
}

/// Only the sequence number and the checksums may change.
fn check_quotation(error: &[u8], told: &[u8], side: Side) {
    assert_eq!(error.len(), told.len());
    let (icmp, ip) = if side == Side::V4 { (34, 20) } else { (54, 40) };
    let quoted = icmp + 8;
    // Of a quoted header with options or extensions the place is not known here.
    let has_options = error.get(quoted).is_some_and(|byte| *byte & 15 != 5) || side == Side::V6;
    let tcp = quoted + ip;
    let may_change = |at: usize| {
        let in_tcp = (tcp + 4..tcp + 8).contains(&at) || (tcp + 16..tcp + 18).contains(&at);
        let may_be_tcp = at > tcp && has_options;
        (icmp + 2..icmp + 4).contains(&at) || in_tcp || may_be_tcp
    };
    let changed = (0..error.len()).filter(|at| error[*at] != told[*at]);
    for at in changed {
        assert!(may_change(at), "byte {at} changed");
    }
}

/// A secondary whose SVM runs in epoch 1.
fn joined(frames: &mut VecFrames) -> SecondaryPath {
    let mut path = SecondaryPath::new(limits());
    let mut record = Vec::new();
    PrimaryPath::new(limits()).export_client_xlate(&mut record);
    let done = path.commit(0, frames, 0, Vec::new(), &record);
    assert_eq!(done, Ok(()));
    path
}

/// What the SVM's frame becomes on its way to the comparator.
fn svm_output(path: &mut SecondaryPath, frames: &mut VecFrames, frame: &[u8]) -> Vec<u8> {
    let token = frames.insert(frame).expect("a slot");
    path.handle_guest_tx(0, frames, token);
    let mut sent = None;
    while let Some(action) = path.poll_action() {
        if let SecondaryAction::SendOutput { svm_seq, .. } = action {
            sent = Some(svm_seq);
        }
    }
    let svm_seq = sent.expect("not a pure ACK");
    let token = path.output(svm_seq).expect("stored");
    let out = frames.bytes(token).to_vec();
    path.handle_released(frames, svm_seq);
    assert!(checksums_are_right(&out));
    out
}
