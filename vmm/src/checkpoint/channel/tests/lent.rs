//! Chunks whose pages lie outside the channel's buffers.

use std::ops::Range;
use std::sync::Arc;

use super::super::frame::Header;
use super::*;

pub(super) const SLOT: usize = 4096;

#[derive(Debug)]
pub(super) struct Slots(pub(super) Vec<u8>);

// SAFETY: the vector is never changed.
unsafe impl Keeper for Slots {
    fn bytes(&self, slots: Range<u32>) -> &[u8] {
        &self.0[slots.start as usize * SLOT..slots.end as usize * SLOT]
    }
}

pub(super) fn settings_of(zero_copy: bool) -> Settings {
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

/// Sends one checkpoint of chunks with lent pages.
pub(super) fn send_lent(
    channel: &mut PageChannel,
    epoch: u64,
    chunks: u32,
    keeper: &Arc<dyn Keeper>,
) {
    channel.begin(epoch, &[]).unwrap();
    for n in 0..chunks {
        let head = pattern(u64::from(n), 4 + n as usize);
        channel.next_buffer().unwrap()[..head.len()].copy_from_slice(&head);
        let lent = slots_of(n);
        channel
            .submit_lent(n, head.len(), keeper, (&lent, SLOT))
            .unwrap();
    }
    channel.finish().unwrap();
    channel.settle().unwrap();
}

/// Chunk `n` is what [`send_lent`] has sent.
pub(super) fn check_lent(chunk: &Chunk<'_>, slots: &Slots) {
    let n = chunk.items;
    assert_eq!(chunk.payload, pattern(u64::from(n), 4 + n as usize));
    let pages = slots_of(n)
        .into_iter()
        .flat_map(|slot| slots.bytes(slot..slot + 1).to_vec());
    assert!(*chunk.bulk == pages.collect::<Vec<_>>(), "chunk {n}");
}

pub(super) fn bytes_lent(chunks: u32) -> u64 {
    (0..chunks).map(|n| (slots_of(n).len() * SLOT) as u64).sum()
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
            send_lent(&mut channel, 5, CHUNKS, &keeper);
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
                    check_lent(&chunk, &slots);
                    assert!(matches!(chunk.bulk, Whole::Passing(_)), "nowhere to land");
                    seen += 1;
                }
                Event::Complete { epoch: 5, totals } => {
                    assert_eq!((seen, totals.chunks), (CHUNKS, u64::from(CHUNKS)));
                }
                Event::Complete { epoch: 6, .. } => break,
                _ => {}
            }
        }
        assert_eq!(receiver.counters().unlanded_bytes, bytes_lent(CHUNKS));
        sender.join().unwrap();
    }
}

#[test]
fn lent_pages_land_where_they_stay_until_whoever_has_them_lets_them_go() {
    const CHUNKS: u32 = 100;
    let slots = Arc::new(Slots(pattern(9, 64 * SLOT)));
    for streams in [1, 3] {
        let (near, far) = sockets(streams);
        let kept = slots.clone();
        let sender = peer(far, settings_of(false), move |mut channel| {
            let keeper: Arc<dyn Keeper> = kept;
            for epoch in 1..4 {
                send_lent(&mut channel, epoch, CHUNKS, &keeper);
            }
        });
        // Room for one checkpoint and what comes of the next on each stream.
        let limit = bytes_lent(CHUNKS) as usize / SLOT + streams * 16;
        let landings = Landings::new(limit);
        let mut receiver = PageChannel::new(near, settings_of(false)).unwrap();
        receiver.land_in(landings.clone());
        let mut landed = Vec::new();
        let mut epochs = 0;
        while epochs < 3 {
            match receiver.poll(LONG).unwrap() {
                Event::Chunk(chunk) if chunk.kind == Kind::Pages => {
                    check_lent(&chunk, &slots);
                    let n = chunk.items;
                    match chunk.bulk {
                        Whole::Landed(landing) => landed.push((n, landing)),
                        Whole::Passing(bytes) => assert!(bytes.is_empty(), "copied by somebody"),
                    }
                }
                Event::Complete { .. } => {
                    epochs += 1;
                    // All of it is where it came, though much has come since.
                    assert_eq!(landed.len(), (0..CHUNKS).filter(|n| n % 16 > 0).count());
                    for (n, landing) in landed.drain(..) {
                        assert_eq!(landing.as_ptr() as usize % SLOT, 0);
                        let pages = slots_of(n).into_iter();
                        let expected = pages.flat_map(|s| slots.bytes(s..s + 1).to_vec());
                        assert!(*landing == expected.collect::<Vec<_>>(), "chunk {n}");
                    }
                    landings.rest();
                }
                Event::Chunk(_) | Event::Idle => {}
                other => panic!("{other:?}"),
            }
        }
        let counters = receiver.counters();
        assert_eq!(counters.landed_bytes, 3 * bytes_lent(CHUNKS));
        assert_eq!(counters.unlanded_bytes, 0);
        fixed::check_all_fixed(&receiver);
        sender.join().unwrap();
        drop(receiver);
        assert_eq!(landings.take(limit * SLOT).is_ok(), limit <= 1024);
    }
}

#[test]
fn invariant_6_without_room_to_land_in_pages_pass_and_the_channel_goes_on() {
    const CHUNKS: u32 = 40;
    let slots = Arc::new(Slots(pattern(9, 64 * SLOT)));
    let (near, far) = sockets(1);
    let kept = slots.clone();
    let sender = peer(far, settings_of(false), move |mut channel| {
        let keeper: Arc<dyn Keeper> = kept;
        send_lent(&mut channel, 1, CHUNKS, &keeper);
    });
    let mut receiver = PageChannel::new(near, settings_of(false)).unwrap();
    receiver.land_in(Landings::new(20));
    let mut landed = Vec::new();
    loop {
        match receiver.poll(LONG).unwrap() {
            Event::Chunk(chunk) if chunk.kind == Kind::Pages => {
                check_lent(&chunk, &slots);
                if let Whole::Landed(landing) = chunk.bulk {
                    landed.push(landing);
                }
            }
            Event::Complete { .. } => break,
            _ => {}
        }
    }
    let bytes: usize = landed.iter().map(|landing| landing.len()).sum();
    assert!(bytes > 15 * SLOT && bytes <= 20 * SLOT, "{bytes}");
    let counters = receiver.counters();
    assert_eq!(counters.landed_bytes, bytes as u64);
    assert_eq!(counters.unlanded_bytes, bytes_lent(CHUNKS) - bytes as u64);
    sender.join().unwrap();
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
