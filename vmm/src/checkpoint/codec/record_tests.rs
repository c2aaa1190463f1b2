//! Tests of page records.

use proptest::prelude::*;

use super::super::compress::Lz4;
use super::super::testing::{changed_page, noise};
use super::*;

const PAGES: u64 = 1 << 24;

fn key() -> PageKey {
    PageKey::new([7; 16])
}

/// A page, its base and how it shall travel.
#[derive(Debug, Clone)]
struct Sent {
    number: u64,
    base: Page,
    page: Page,
    kind: Kind,
}

fn any_sent() -> impl Strategy<Value = Vec<Sent>> {
    let one = (
        prop_oneof![1u64..4, 1u64..300, 1u64..1_000_000],
        changed_page(),
        0u8..5,
    );
    proptest::collection::vec(one, 0..8).prop_map(|all| {
        let mut number = 0;
        let sent = |(step, (base, page), kind)| {
            number += step;
            Sent {
                number: number - 1,
                base: if kind == Kind::Same as u8 { page } else { base },
                page: if kind == 0 { [0; PAGE_BYTES] } else { page },
                kind: Kind::of(kind).unwrap(),
            }
        };
        all.into_iter().map(sent).collect()
    })
}

/// Pushes a page as it shall travel, raw where that is no shorter.
fn push(encoder: &mut Encoder<'_>, sent: &Sent) -> Result<(), EncodeError> {
    let mut out = [0; PAGE_BYTES - 1];
    let mut lz4 = Lz4::new();
    let raw = Payload::Raw(&sent.page);
    let payload = match sent.kind {
        Kind::Zero => Payload::Zero,
        Kind::Delta => match delta::encode(&sent.base, &sent.page, &mut out) {
            None | Some(0) => raw,
            Some(len) => Payload::Delta(&out[..len]),
        },
        Kind::Lz4 => lz4
            .compress(&sent.page, PAGE_BYTES - 1)
            .map_or(raw, Payload::Lz4),
        Kind::Raw => raw,
        Kind::Same => Payload::Same(&sent.page),
    };
    encoder.push(sent.number, &payload, key().of(&sent.page))
}

fn chunk_of(all: &[Sent], has_digests: bool) -> Vec<u8> {
    let mut out = vec![0xaa; CHUNK_HEAD_BYTES + all.len() * RECORD_MAX_BYTES];
    let mut encoder = Encoder::new(&mut out, has_digests).unwrap();
    all.iter()
        .for_each(|sent| push(&mut encoder, sent).unwrap());
    let len = encoder.finish();
    out.truncate(len);
    out
}

/// The same with whole pages apart: records and pages.
fn chunk_apart(all: &[Sent]) -> (Vec<u8>, Vec<u8>) {
    let mut out = vec![0xaa; CHUNK_HEAD_BYTES + all.len() * RECORD_MAX_BYTES];
    let mut encoder = Encoder::apart(&mut out).unwrap();
    all.iter()
        .for_each(|sent| push(&mut encoder, sent).unwrap());
    let len = encoder.finish();
    out.truncate(len);
    let with = chunk_of(all, true);
    let records = Decoder::new(&with, PAGES).unwrap().map(Result::unwrap);
    let whole = records.filter(|record| record.kind.is_whole());
    (out, whole.flat_map(|record| record.data.to_vec()).collect())
}

fn sent(number: u64, kind: Kind) -> Sent {
    let base = noise(number);
    let mut page = base;
    page[7] ^= 1;
    let (base, page) = match kind {
        Kind::Zero => (base, [0; PAGE_BYTES]),
        Kind::Lz4 => (base, [3; PAGE_BYTES]),
        Kind::Same => (page, page),
        Kind::Delta | Kind::Raw => (base, page),
    };
    Sent {
        number,
        base,
        page,
        kind,
    }
}

fn one_of_each() -> Vec<Sent> {
    let kinds = [Kind::Zero, Kind::Delta, Kind::Lz4, Kind::Raw, Kind::Same];
    let numbered = kinds.into_iter().enumerate();
    numbered
        .map(|(n, kind)| sent(n as u64 * 200, kind))
        .collect()
}

proptest! {
    #[test]
    fn pages_come_back(all in any_sent(), has_digests: bool) {
        let chunk = chunk_of(&all, has_digests);
        let decoder = Decoder::new(&chunk, PAGES).unwrap();
        prop_assert_eq!(decoder.check(), Ok(all.len() as u32));
        let records: Vec<_> = decoder.map(Result::unwrap).collect();
        for (record, sent) in records.iter().zip(&all) {
            prop_assert_eq!(record.number, sent.number);
            prop_assert_eq!(record.digest.is_some(), has_digests && sent.kind != Kind::Zero);
            let mut out = noise(1);
            record.apply(&sent.base, &mut out, Some(&key())).unwrap();
            prop_assert_eq!(out, sent.page);
        }
    }

    #[test]
    fn pages_apart_come_back_and_damage_to_them_is_noticed(
        all in any_sent(),
        at: prop::sample::Index,
        bit in 0u8..8,
    ) {
        let (chunk, mut bulk) = chunk_apart(&all);
        let decoder = Decoder::with_bulk(&chunk, &bulk, PAGES).unwrap();
        prop_assert_eq!(decoder.check(), Ok(all.len() as u32));
        for (record, sent) in decoder.zip(&all) {
            let record = record.unwrap();
            let mut out = noise(1);
            record.apply(&sent.base, &mut out, Some(&key())).unwrap();
            prop_assert_eq!((record.number, out), (sent.number, sent.page));
        }
        if bulk.is_empty() {
            return Ok(());
        }
        let at = at.index(bulk.len());
        bulk[at] ^= 1 << bit;
        let damaged = Decoder::with_bulk(&chunk, &bulk, PAGES).unwrap().zip(&all);
        let refused = damaged.filter(|(record, sent)| {
            let mut out = noise(1);
            record.unwrap().apply(&sent.base, &mut out, Some(&key())).is_err()
        });
        prop_assert_eq!(refused.count(), 1);
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..9000),
        bulk: prop::sample::Index,
        count in 0u32..20,
        is_near: bool,
    ) {
        if let (true, Some(head)) = (is_near, bytes.first_chunk_mut::<CHUNK_HEAD_BYTES>()) {
            let [a, b, c, d] = count.to_le_bytes();
            *head = [1 + head[2] % 2, head[1] & 1, 0, 0, a, b, c, d];
            bytes.iter_mut().skip(8).step_by(97).for_each(|byte| *byte %= 5);
        }
        let mut before = None;
        let bulk = bytes.split_off(bytes.len() - bulk.index(bytes.len() + 1));
        for record in Decoder::with_bulk(&bytes, &bulk, 1000).into_iter().flatten().flatten() {
            prop_assert!(record.number < 1000 && before < Some(record.number));
            before = Some(record.number);
            let mut out = [0; PAGE_BYTES];
            let _ = record.apply(&noise(3), &mut out, Some(&key()));
        }
    }

    /// Without checksums around it a damaged chunk may still pass, but never as another page where there are digests.
    #[test]
    fn damage_never_makes_a_page_with_a_digest(at: prop::sample::Index, bit in 0u8..8) {
        let all: Vec<_> = one_of_each().into_iter().filter(|s| s.kind != Kind::Zero).collect();
        let mut chunk = chunk_of(&all, true);
        let at = at.index(chunk.len() - 1) + 1;
        chunk[at] ^= 1 << bit;
        for record in Decoder::new(&chunk, PAGES).into_iter().flatten().flatten() {
            let base = all.iter().find(|s| s.number == record.number).map_or([0; _], |s| s.base);
            let mut out = [0; PAGE_BYTES];
            let applied = record.apply(&base, &mut out, Some(&key()));
            if applied.is_ok() && record.kind != Kind::Zero && record.digest.is_some() {
                prop_assert!(all.iter().any(|s| s.page == out));
            }
        }
    }
}

#[test]
fn invariant_3_a_cut_at_any_byte_is_an_error() {
    for has_digests in [false, true] {
        let chunk = chunk_of(&one_of_each(), has_digests);
        for len in 0..chunk.len() {
            let cut = Decoder::new(&chunk[..len], PAGES).and_then(|decoder| decoder.check());
            assert!(matches!(cut, Err(ChunkError::Cut { .. })), "{len}: {cut:?}");
        }
        let mut longer = chunk.clone();
        longer.push(0);
        let decoder = Decoder::new(&longer, PAGES).unwrap();
        assert_eq!(decoder.check(), Err(ChunkError::Trailing { bytes: 1 }));
    }
}

#[test]
fn invariant_3_pages_apart_are_all_there_or_refused() {
    let (chunk, bulk) = chunk_apart(&one_of_each());
    assert_eq!(bulk.len(), 2 * PAGE_BYTES);
    let check = |chunk: &[u8], bulk: &[u8]| {
        Decoder::with_bulk(chunk, bulk, PAGES).and_then(|decoder| decoder.check())
    };
    assert_eq!(check(&chunk, &bulk), Ok(5));
    for len in 0..chunk.len() {
        let cut = check(&chunk[..len], &bulk);
        assert!(matches!(cut, Err(ChunkError::Cut { .. })), "{len}: {cut:?}");
    }
    for len in 0..bulk.len() {
        let cut = check(&chunk, &bulk[..len]);
        assert!(matches!(cut, Err(ChunkError::Cut { .. })), "{len}: {cut:?}");
    }
    let longer = [&bulk[..], &[0]].concat();
    let trailing = Err(ChunkError::Trailing { bytes: 1 });
    assert_eq!(check(&chunk, &longer), trailing);
    assert_eq!(check(&chunk_of(&one_of_each(), true), &[0]), trailing);
    // Without digests nothing would say that they are intact.
    let mut unchecked = chunk.clone();
    unchecked[1] = 0;
    let refused = check(&unchecked, &bulk);
    assert!(matches!(refused, Err(ChunkError::Version { .. })));
}

#[test]
fn pages_apart_count_as_if_they_were_in_the_chunk() {
    let mut out = vec![0; CHUNK_HEAD_BYTES + 2 * RECORD_MAX_BYTES];
    let mut encoder = Encoder::apart(&mut out).unwrap();
    for number in 0..2 {
        push(&mut encoder, &sent(number, Kind::Raw)).unwrap();
    }
    assert!(encoder.room() < RECORD_MAX_BYTES && encoder.len() < 100);
    let full = push(&mut encoder, &sent(2, Kind::Raw));
    assert_eq!(full, Err(EncodeError::Full { number: 2 }));
    push(&mut encoder, &sent(3, Kind::Zero)).unwrap();
    assert_eq!(encoder.count(), 3);
}

#[test]
fn a_full_chunk_stays_whole_and_the_page_goes_into_the_next() {
    let mut out = vec![0; CHUNK_HEAD_BYTES + 2 * RECORD_MAX_BYTES];
    let mut encoder = Encoder::new(&mut out, true).unwrap();
    let mut number = 0;
    let full = loop {
        match push(&mut encoder, &sent(number, Kind::Raw)) {
            Ok(()) => number += 1,
            Err(e) => break e,
        }
    };
    assert_eq!(full, EncodeError::Full { number });
    assert_eq!((encoder.count(), encoder.is_empty()), (2, false));
    assert!(encoder.room() < RECORD_MAX_BYTES);
    // A smaller one still fits.
    push(&mut encoder, &sent(number, Kind::Zero)).unwrap();
    let len = encoder.len();
    assert_eq!(encoder.finish(), len);
    let numbers = Decoder::new(&out[..len], PAGES).unwrap();
    let numbers: Vec<_> = numbers.map(|record| record.unwrap().number).collect();
    assert_eq!(numbers, [0, 1, 2]);
}

#[test]
fn a_zero_page_costs_two_bytes() {
    let all: Vec<_> = (0..100).map(|n| sent(n, Kind::Zero)).collect();
    assert_eq!(chunk_of(&all, true).len(), CHUNK_HEAD_BYTES + 200);
}

#[test]
fn pages_twice_out_of_order_or_too_long_are_not_written() {
    let mut out = vec![0; 4 * RECORD_MAX_BYTES];
    let mut encoder = Encoder::new(&mut out, false).unwrap();
    push(&mut encoder, &sent(5, Kind::Zero)).unwrap();
    for number in [5, 4, 0] {
        let refused = push(&mut encoder, &sent(number, Kind::Zero));
        assert_eq!(refused, Err(EncodeError::Order { number }));
    }
    let digest = PageDigest::default();
    let (number, bytes) = (9, PAGE_BYTES);
    let refused = encoder.push(number, &Payload::Delta(&[0; PAGE_BYTES]), digest);
    assert_eq!(refused, Err(EncodeError::Long { number, bytes }));
    let number = u64::MAX;
    let refused = encoder.push(number, &Payload::Zero, digest);
    assert_eq!(refused, Err(EncodeError::Order { number }));
    let bytes = CHUNK_HEAD_BYTES - 1;
    for made in [
        Encoder::new(&mut [0; CHUNK_HEAD_BYTES - 1], false),
        Encoder::apart(&mut [0; CHUNK_HEAD_BYTES - 1]),
    ] {
        assert_eq!(made.err(), Some(EncodeError::NoHead { bytes }));
    }
}

#[test]
fn rule_13_pages_outside_the_guest_are_refused() {
    let chunk = chunk_of(&[sent(8, Kind::Zero), sent(9, Kind::Zero)], false);
    assert_eq!(Decoder::new(&chunk, 10).unwrap().check(), Ok(2));
    let refused = Decoder::new(&chunk, 9).unwrap().check();
    let outside = ChunkError::Number {
        record: 1,
        pages: 9,
    };
    assert_eq!(refused, Err(outside));
    // Numbers that do not fit, or that never end.
    for number in [
        &[0xff; 9][..],
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
    ] {
        let mut chunk = vec![VERSION, 0, 0, 0, 1, 0, 0, 0, Kind::Zero as u8];
        chunk.extend(number);
        chunk.extend([0xff; 20]);
        let refused = Decoder::new(&chunk, u64::MAX).unwrap().check();
        let pages = u64::MAX;
        assert_eq!(refused, Err(ChunkError::Number { record: 0, pages }));
    }
}

#[test]
fn other_versions_kinds_and_lengths_are_refused_by_name() {
    let version = |head: [u8; 4]| {
        let chunk = [head, [0; 4]].concat();
        Decoder::new(&chunk, PAGES).map(|_| ()).unwrap_err()
    };
    let refused = |version, flags| ChunkError::Version { version, flags };
    assert_eq!(version([2, 0, 0, 0]), refused(2, 0));
    assert_eq!(version([1, 2, 0, 0]), refused(1, 2));
    assert_eq!(version([1, 1, 0, 1]), refused(1, 0x1_0001));
    let record = |bytes: &[u8]| {
        let mut chunk = vec![VERSION, 0, 0, 0, 1, 0, 0, 0];
        chunk.extend(bytes);
        chunk.resize(2 * PAGE_BYTES, 0);
        Decoder::new(&chunk, PAGES).unwrap().check().unwrap_err()
    };
    assert_eq!(record(&[5, 0]), ChunkError::Kind { record: 0, kind: 5 });
    let length = |bytes| ChunkError::Length { number: 3, bytes };
    assert_eq!(record(&[Kind::Lz4 as u8, 3, 0, 0]), length(0));
    assert_eq!(record(&[Kind::Delta as u8, 3, 0, 16]), length(4096));
}

#[test]
fn a_wrong_base_is_noticed_by_the_digest_alone() {
    let chunk = chunk_of(&[sent(4, Kind::Delta)], true);
    let record = Decoder::new(&chunk, PAGES)
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let mut out = [0; PAGE_BYTES];
    let wrong = noise(99);
    assert!(record.needs_base());
    record.apply(&wrong, &mut out, None).unwrap();
    let refused = record.apply(&wrong, &mut out, Some(&key()));
    assert!(matches!(refused, Err(ApplyError::Digest { number: 4 })));
}

#[test]
fn the_verifying_mode_finds_pages_that_only_have_the_same_digest() {
    let chunk = chunk_of(&[sent(4, Kind::Same)], true);
    let record = Decoder::new(&chunk, PAGES)
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let mut other = sent(4, Kind::Same).base;
    let mut out = [0; PAGE_BYTES];
    record.apply(&other, &mut out, Some(&key())).unwrap();
    other[4095] ^= 1;
    let refused = record.apply(&other, &mut out, Some(&key()));
    assert!(matches!(refused, Err(ApplyError::Same { number: 4 })));
}
