use colo_compare::wire::checksum::OnesSum;
use colo_compare::{DigestKey, HEADER_MAX};

use super::*;
use crate::ring::{Pages, Segment};

const LEN: usize = 1000;
const AT: usize = 54;

fn pool(slots: u32) -> (FramePool, Arc<GuestRam>) {
    let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
    let mut pool = FramePool::in_area(
        ram.area().clone(),
        slots,
        slot_bytes_for(1500),
        Arc::default(),
    )
    .unwrap();
    pool.set_guest(ram.clone());
    (pool, ram)
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 256) as u8).collect()
}

/// The frame lies in two places of the guest behind its first bytes.
fn in_place(pool: &mut FramePool, ram: &GuestRam, frame: &[u8], head: u16) -> Token {
    let (front, rest) = frame.split_at(HEADER_MAX);
    let (one, two) = rest.split_at(100);
    ram.write(0x4000, one).unwrap();
    ram.write(0x8000, two).unwrap();
    let segment = |gpa, bytes: &[u8]| Segment {
        gpa,
        len: bytes.len() as u32,
    };
    let rest = [segment(0x4000, one), segment(0x8000, two)];
    pool.keep_in_place(
        Buffer {
            life: 1,
            head,
            descriptors: 1,
        },
        &rest,
        |slot| {
            slot[..HEADER_MAX].copy_from_slice(front);
            Some(HEADER_MAX)
        },
    )
    .unwrap()
}

fn returned(pool: &mut FramePool) -> Vec<u16> {
    let mut out = Vec::new();
    pool.take_returned(&mut out);
    out.iter().map(|buffer| buffer.head).collect()
}

fn sent(pool: &mut FramePool, token: &Token) -> Vec<u8> {
    bytes_of(&pool.pieces(token))
}

/// What a NIC sends that has been given these. Their token is held.
fn bytes_of(pieces: &Pieces) -> Vec<u8> {
    let bytes = |piece: &Piece| {
        // SAFETY: the token is held, so the pieces are mapped, and nothing writes them here.
        unsafe { std::slice::from_raw_parts(piece.address, piece.len) }.to_vec()
    };
    pieces.as_slice().iter().flat_map(bytes).collect()
}

#[test]
fn slots_are_bounded_and_come_back() {
    let mut pool = FramePool::new(2, 64);
    let a = pool.from_bytes(b"abc").unwrap();
    let b = pool.duplicate(&a).unwrap();
    assert!(pool.from_bytes(b"x").is_none());
    assert_eq!(pool.bytes(&b), b"abc");
    assert_eq!(pool.first_difference(&a, 1, &b, 0, 2), Some(0));
    assert_eq!(pool.first_difference(&a, 1, &b, 1, 2), None);
    pool.release(a);
    assert_eq!(pool.free_slots(), 1);
    assert!(pool.from_bytes(&[0; 65]).is_none());
    assert_eq!(pool.free_slots(), 1, "a refused frame keeps no slot");
    pool.release(b);
}

#[test]
fn headers_stop_at_their_limit() {
    let mut pool = FramePool::new(1, 2048);
    let token = pool.from_bytes(&[7; 1000]).unwrap();
    assert_eq!(pool.header(&token).len(), HEADER_MAX);
    pool.header_mut(&token)[0] = 9;
    let mut out = [0; 2];
    pool.copy_out(&token, 0, &mut out);
    assert_eq!(out, [9, 7]);
    pool.release(token);
}

#[test]
fn slots_fit_their_mtu() {
    assert_eq!(slot_bytes_for(1500), 2048);
    assert_eq!(slot_bytes_for(9000), 16384);
    assert_eq!(slot_bytes_for(65535), 131_072);
}

#[test]
fn a_frame_stays_in_the_guest_until_it_is_released() {
    let (mut pool, ram) = pool(4);
    let frame = pattern(LEN);
    let token = in_place(&mut pool, &ram, &frame, 3);
    assert_eq!(
        (pool.len(&token), pool.header(&token).len()),
        (LEN, HEADER_MAX)
    );
    pool.header_mut(&token)[0] = 0xee;
    assert_eq!(pool.pieces(&token).as_slice().len(), 3);
    assert_eq!(sent(&mut pool, &token)[1..], frame[1..]);
    assert_eq!(sent(&mut pool, &token)[0], 0xee);
    assert!(pool.in_place_bytes(&token) > 0 && returned(&mut pool).is_empty());
    pool.release(token);
    assert_eq!(returned(&mut pool), [3]);
    assert_eq!((pool.in_place(), pool.free_slots()), (0, 4));
}

#[test]
fn a_settled_frame_is_a_copy() {
    let (mut pool, ram) = pool(4);
    let frame = pattern(LEN);
    let token = in_place(&mut pool, &ram, &frame, 3);
    pool.settle_all(CopyCause::Undecided);
    assert_eq!(returned(&mut pool), [3]);
    ram.write(0x4000, &[0; 100]).unwrap();
    assert_eq!(sent(&mut pool, &token), frame);
    assert!(pool.in_place_bytes(&token) == 0);
    let copied = pool.stats.copied_undecided_bytes.get();
    assert_eq!(copied, (LEN - HEADER_MAX) as u64);
    pool.release(token);
    assert!(returned(&mut pool).is_empty(), "a buffer goes back once");
}

#[test]
fn what_was_compared_is_what_leaves() {
    let (mut pool, ram) = pool(4);
    let frame = pattern(LEN);
    let pvm = in_place(&mut pool, &ram, &frame, 5);
    let mut other = frame.clone();
    other[20] ^= 0xff; // a header byte that does not count
    let svm = pool.from_bytes(&other).unwrap();
    assert!(pool.match_payload(&pvm, AT, &svm, AT, LEN - AT));
    assert_eq!(returned(&mut pool), [5], "the guest has its buffer again");
    ram.write(0x4000, &[0; 100]).unwrap();
    ram.write(0x8000, &[0; 100]).unwrap();
    pool.release(svm);
    assert_eq!(pool.free_slots(), 2, "the twin is still needed");
    assert!(pool.in_place_bytes(&pvm) > 0);
    assert_eq!(pool.pieces(&pvm).as_slice().len(), 1);
    assert_eq!(sent(&mut pool, &pvm), frame);
    assert_eq!(pool.in_one_piece(&pvm), frame);
    assert_eq!(pool.bytes(&pvm), frame, "settled from the twin");
    pool.release(pvm);
    assert_eq!(pool.free_slots(), 4);
}

/// Invariant 7: what was digested is what leaves, whatever the guest writes afterwards.
#[test]
fn what_was_digested_is_what_leaves() {
    for tx in [TxMode::Twin, TxMode::InPlace, TxMode::Exact] {
        let (mut pool, ram) = pool(4);
        pool.set_tx(tx);
        let (frame, key) = (pattern(LEN), DigestKey::new([7; 16]).unwrap());
        let token = in_place(&mut pool, &ram, &frame, 5);
        let digest = pool.digest(&token, AT, LEN - AT, &key);
        assert_eq!(returned(&mut pool), [5], "the guest has its buffer again");
        ram.write(0x4000, &[0; 100]).unwrap();
        ram.write(0x8000, &[0; LEN - HEADER_MAX - 100]).unwrap();
        assert_eq!(sent(&mut pool, &token), frame, "{tx:?}");
        assert_eq!(digest, key.of(&frame[AT..]));
        assert_eq!(pool.in_place_bytes(&token), 0);
        let copied = pool.stats.copied_digested_bytes.get();
        assert_eq!(copied, (LEN - HEADER_MAX) as u64);
        pool.release(token);
        assert!(returned(&mut pool).is_empty(), "a buffer goes back once");
        assert_eq!((pool.free_slots(), pool.in_place()), (4, 0));
    }
}

#[test]
fn a_difference_in_the_guest_is_found() {
    for differs in [AT, 255, 256, 355, 356, LEN - 1] {
        let (mut pool, ram) = pool(4);
        let frame = pattern(LEN);
        let pvm = in_place(&mut pool, &ram, &frame, 5);
        let mut other = frame.clone();
        other[differs] ^= 1;
        let svm = pool.from_bytes(&other).unwrap();
        assert!(!pool.match_payload(&pvm, AT, &svm, AT, LEN - AT));
        let found = pool.first_difference(&pvm, AT, &svm, AT, LEN - AT);
        assert_eq!(found, Some(differs - AT));
        assert_eq!(sent(&mut pool, &pvm), frame);
        pool.release(pvm);
        pool.release(svm);
        assert_eq!(pool.free_slots(), 4);
    }
}

#[test]
fn layouts_that_differ_are_bound_by_a_copy() {
    let (mut pool, ram) = pool(4);
    let frame = pattern(LEN);
    let pvm = in_place(&mut pool, &ram, &frame, 5);
    // A header that is twelve bytes longer, as with TCP options.
    let longer = [&[0; 12], &frame[..]].concat();
    let svm = pool.from_bytes(&longer).unwrap();
    assert!(pool.match_payload(&pvm, AT, &svm, AT + 12, LEN - AT));
    assert_eq!(returned(&mut pool), [5]);
    ram.write(0x8000, &[0; 100]).unwrap();
    assert_eq!(sent(&mut pool, &pvm), frame);
    pool.release(pvm);
    pool.release(svm);
}

#[test]
fn a_counterpart_on_its_way_gets_no_second_header() {
    let (mut pool, ram) = pool(4);
    let frame = pattern(LEN);
    let svm = pool.from_bytes(&frame).unwrap();
    let first = in_place(&mut pool, &ram, &frame, 1);
    assert!(pool.match_payload(&first, AT, &svm, AT, LEN - AT));
    let mut repeated = frame.clone();
    repeated[30] = 0x77;
    let second = in_place(&mut pool, &ram, &repeated, 2);
    assert!(pool.match_payload(&second, AT, &svm, AT, LEN - AT));
    let on_its_way = pool.pieces(&first);
    assert_eq!(sent(&mut pool, &second), repeated);
    assert_eq!(bytes_of(&on_its_way), frame, "as the NIC reads it");
    for token in [first, second, svm] {
        pool.release(token);
    }
    assert_eq!((pool.free_slots(), pool.in_place()), (4, 0));
}

#[test]
fn lent_slots_come_back_as_frames_or_unused() {
    let (mut pool, _ram) = pool(2);
    let (slot, offset) = pool.lend().unwrap();
    assert_eq!(pool.slot_at(offset + 300), Some((slot, 300)));
    assert_eq!(pool.slot_at(offset + 2 * 2048), None);
    // What the kernel would write.
    // SAFETY: the slot is lent, so nobody else touches it, and it is mapped.
    unsafe { pool.area().base().add(offset + 300).write_bytes(9, 80) };
    let token = pool.adopt(slot, 300, 80).unwrap();
    assert_eq!(pool.bytes(&token), [9; 80]);
    pool.strip_front(&token, 20);
    assert_eq!(pool.bytes(&token), [9; 60]);
    pool.release(token);
    let (slot, _) = pool.lend().unwrap();
    assert!(pool.adopt(slot, 2000, 100).is_none(), "beyond its slot");
    assert_eq!(pool.free_slots(), 2);
}

#[test]
fn a_chain_in_too_many_pieces_is_not_kept() {
    let (mut pool, _ram) = pool(1);
    let piece = Segment { gpa: 0, len: 10 };
    let buffer = Buffer::default();
    assert!(
        pool.keep_in_place(buffer, &[piece; PIECES_MAX], |_| Some(256))
            .is_none()
    );
    assert_eq!(pool.free_slots(), 1);
}

/// A UDP datagram of `LEN` bytes with a wrong checksum.
fn datagram() -> Vec<u8> {
    let mut frame = pattern(LEN);
    frame[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17]);
    frame[16..18].copy_from_slice(&((LEN - 14) as u16).to_be_bytes());
    frame[38..40].copy_from_slice(&((LEN - 34) as u16).to_be_bytes());
    frame
}

/// Whether the transport checksum of a UDP frame holds.
fn verifies(frame: &[u8]) -> bool {
    let l4 = &frame[34..];
    let mut sum = OnesSum::default();
    sum.add(&frame[26..34]);
    sum.add(&[0, 17]);
    sum.add(&(l4.len() as u32).to_be_bytes());
    sum.add(l4);
    sum.word() == 0xffff
}

#[test]
fn rule_10_payload_in_place_leaves_under_the_checksum_of_what_was_compared() {
    for settled in [false, true] {
        let (mut pool, ram) = pool(4);
        pool.set_tx(TxMode::InPlace);
        let frame = datagram();
        assert!(!verifies(&frame));
        let pvm = in_place(&mut pool, &ram, &frame, 5);
        let svm = pool.from_bytes(&frame).unwrap();
        assert!(pool.match_payload(&pvm, 42, &svm, 42, LEN - 42));
        assert!(returned(&mut pool).is_empty(), "the buffer is still in use");
        assert!(verifies(&sent(&mut pool, &pvm)));
        // The guest changes its mind after the comparison.
        ram.write(0x8000 + 17, &[0x55]).unwrap();
        if settled {
            pool.settle_all(CopyCause::Undecided);
        }
        let out = sent(&mut pool, &pvm);
        assert_ne!(out[256 + 100 + 17], frame[256 + 100 + 17]);
        assert!(!verifies(&out), "receivers discard it");
        assert!(!verifies(pool.in_one_piece(&pvm)));
        pool.release(pvm);
        pool.release(svm);
        assert_eq!((pool.free_slots(), pool.in_place()), (4, 0));
    }
}

#[test]
fn every_mode_finds_differences_and_sends_what_was_compared() {
    for tx in [TxMode::Twin, TxMode::InPlace, TxMode::Exact] {
        for differs in [None, Some(60), Some(300), Some(LEN - 1)] {
            let (mut pool, ram) = pool(4);
            pool.set_tx(tx);
            let frame = datagram();
            let pvm = in_place(&mut pool, &ram, &frame, 5);
            let mut other = frame.clone();
            if let Some(at) = differs {
                other[at] ^= 1;
            }
            let svm = pool.from_bytes(&other).unwrap();
            let matched = pool.match_payload(&pvm, 42, &svm, 42, LEN - 42);
            assert_eq!(matched, differs.is_none(), "{tx:?} {differs:?}");
            let copied = pool.stats.copied_compared_bytes.get() > 0;
            assert!(!matched || copied == (tx == TxMode::Exact));
            let out = sent(&mut pool, &pvm);
            assert_eq!((&out[..40], &out[42..]), (&frame[..40], &frame[42..]));
            pool.release(pvm);
            pool.release(svm);
            assert_eq!((pool.free_slots(), pool.in_place()), (4, 0));
        }
    }
}
