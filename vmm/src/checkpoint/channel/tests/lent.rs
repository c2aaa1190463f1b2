//! Chunks whose pages lie outside the channel's buffers.

use std::ops::Range;
use std::sync::Arc;

use super::super::frame::Header;
use super::*;

const SLOT: usize = 4096;

#[derive(Debug)]
struct Slots(Vec<u8>);

// SAFETY: the vector is never changed.
unsafe impl Keeper for Slots {
    fn bytes(&self, slots: Range<u32>) -> &[u8] {
        &self.0[slots.start as usize * SLOT..slots.end as usize * SLOT]
    }
}

fn settings_of(zero_copy: bool) -> Settings {
    Settings {
        chunk_bytes: 16 * SLOT,
        zero_copy,
        ..settings()
    }
}

/// What chunk `n` has besides its bytes: slots in a row and others.
fn slots_of(n: u32) -> Vec<u32> {
    let count = n % 16;
    (0..count).map(|i| (n + i + i / 4 * 3) % 64).collect()
}

#[test]
fn lent_pages_arrive_behind_the_bytes_of_their_chunk_over_any_number_of_streams() {
    const CHUNKS: u32 = 200;
    let slots = Arc::new(Slots(pattern(9, 64 * SLOT)));
    for (streams, zero_copy) in [(1, false), (1, true), (2, true), (4, false)] {
        let (near, far) = sockets(streams);
        let kept = slots.clone();
        let sender = peer(far, settings_of(zero_copy), move |mut channel| {
            let keeper: Arc<dyn Keeper> = kept.clone();
            channel.begin(5, &[]).unwrap();
            for n in 0..CHUNKS {
                let head = pattern(u64::from(n), 4 + n as usize);
                channel.next_buffer().unwrap()[..head.len()].copy_from_slice(&head);
                let lent = slots_of(n);
                channel
                    .submit_lent(n, head.len(), &keeper, (&lent, SLOT))
                    .unwrap();
            }
            channel.finish().unwrap();
            channel.settle().unwrap();
            // Nobody but this thread and the test has the memory any more (rule 15).
            drop(keeper);
            assert_eq!(Arc::strong_count(&kept), 2);
            let too_much: Vec<_> = (0..17).collect();
            let keeper: Arc<dyn Keeper> = kept;
            channel.begin(6, &[]).unwrap();
            channel.next_buffer().unwrap();
            let refused = channel.submit_lent(1, 0, &keeper, (&too_much, SLOT));
            assert!(matches!(refused, Err(ChannelError::Usage(_))));
            channel.finish().unwrap();
        });
        let mut receiver = PageChannel::new(near, settings_of(zero_copy)).unwrap();
        let mut seen = 0;
        loop {
            match receiver.poll(LONG).unwrap() {
                Event::Chunk(chunk) if chunk.kind == Kind::Pages => {
                    let n = chunk.items;
                    assert_eq!(chunk.payload, pattern(u64::from(n), 4 + n as usize));
                    let pages: Vec<_> = slots_of(n)
                        .into_iter()
                        .flat_map(|slot| slots.bytes(slot..slot + 1).to_vec())
                        .collect();
                    assert!(chunk.bulk == pages, "chunk {n}");
                    seen += 1;
                }
                Event::Complete { epoch: 5, totals } => {
                    assert_eq!((seen, totals.chunks), (CHUNKS, u64::from(CHUNKS)));
                }
                Event::Complete { epoch: 6, .. } => break,
                _ => {}
            }
        }
        sender.join().unwrap();
    }
}

/// A checkpoint of one chunk with 8 bytes of which the last 4 are bulk.
fn bytes(change: impl FnOnce(&mut Header, &mut Vec<u8>)) -> Vec<u8> {
    let mut payload = b"headbulk".to_vec();
    let of = |kind: Kind, sequence, payload: &[u8]| Header {
        kind: kind as u16,
        length: payload.len() as u32,
        attempt: 1,
        epoch: 3,
        sequence,
        payload_crc: crc32fast::hash(payload),
        ..Header::default()
    };
    let mut pages = Header {
        items: 1,
        bulk: 4,
        payload_crc: crc32fast::hash(b"head"),
        ..of(Kind::Pages, 1, &payload)
    };
    change(&mut pages, &mut payload);
    let mut totals = Totals::default();
    totals.add_chunk(Kind::from_wire(pages.kind).unwrap(), pages.items);
    let totals = totals.to_bytes();
    [
        &of(Kind::Begin, 0, &[]).to_bytes()[..],
        &pages.to_bytes(),
        &payload,
        &of(Kind::End, 2, &totals).to_bytes(),
        &totals,
    ]
    .concat()
}

#[test]
fn rule_13_the_checksum_covers_what_has_no_digest() {
    let whole = |bytes: Vec<u8>| {
        let (seen, error, _) = made_of(&bytes, settings());
        assert!(error.is_none(), "{error:?}");
        match seen.last() {
            Some(Seen::Complete(3, _)) => true,
            Some(damaged) if damaged.is_damaged(3, "checksum") => false,
            _ => panic!("{seen:?}"),
        }
    };
    assert!(whole(bytes(|_, _| {})));
    // The digests of pages find this.
    assert!(whole(bytes(|_, payload| payload[5] ^= 1)));
    assert!(!whole(bytes(|_, payload| payload[3] ^= 1)));
    assert!(!whole(bytes(|header, _| header.kind = Kind::State as u16)));
    assert!(!whole(bytes(|header, _| header.bulk = 9)));
}
