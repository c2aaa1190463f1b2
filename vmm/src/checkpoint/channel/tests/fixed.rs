//! Receives into registered memory: short, on several streams, given up, refused.

use std::sync::Arc;

use super::lent::{SLOT, Slots, bytes_lent, check_lent, send_lent, settings_of};
use super::*;

/// Whatever was received came into registered memory, where this kernel and the limits allow it.
pub(super) fn check_all_fixed(channel: &PageChannel) {
    let counters = channel.counters();
    if !channel.operations.pinned().is_on() {
        assert_eq!(counters.fixed_bytes, 0);
    } else if counters.unregistered_receives == 0 {
        assert!(counters.fixed_bytes > 0);
        assert_eq!(counters.fixed_bytes, counters.received_bytes);
    }
}

/// Records of some chunks: none, few, as many as fit a stream's page, more.
const HEADS: [usize; 6] = [0, 5, SLOT - HEADER_BYTES, SLOT - HEADER_BYTES + 1, 9000, 1];
const LENT: [u32; 14] = [3, 4, 5, 6, 7, 1, 2, 20, 21, 9, 60, 61, 62, 63];

fn large() -> Settings {
    Settings {
        chunk_bytes: 32 * SLOT,
        ..settings()
    }
}

/// One checkpoint on the wire, with lent pages behind records of all lengths.
fn bytes_of_heads(slots: &Arc<Slots>) -> Vec<u8> {
    let (near, far) = sockets(1);
    let keeper: Arc<dyn Keeper> = slots.clone();
    let sender = peer(near, large(), move |mut channel| {
        channel.begin(5, b"start").unwrap();
        for (n, head) in (0..).zip(HEADS) {
            let bytes = pattern(n, head);
            channel.next_buffer().unwrap()[..head].copy_from_slice(&bytes);
            let lent = (&LENT[..], SLOT);
            channel.submit_lent(n as u32, head, &keeper, lent).unwrap();
        }
        channel.finish().unwrap();
    });
    let mut bytes = Vec::new();
    (&far[0]).read_to_end(&mut bytes).unwrap();
    sender.join().unwrap();
    bytes
}

#[test]
fn rule_13_pages_land_whole_however_short_the_receives_are() {
    let slots = Arc::new(Slots(pattern(9, 64 * SLOT)));
    let bytes = bytes_of_heads(&slots);
    let expected: Vec<u8> = LENT
        .iter()
        .flat_map(|&slot| slots.bytes(slot..slot + 1).to_vec())
        .collect();
    for pieces in [
        &[1, 63, 64, 65, 700, 4096, 5001, 30_000][..],
        &[4099],
        &[61_000, 7],
    ] {
        let (near, far) = sockets(1);
        let mut receiver = PageChannel::new(near, large()).unwrap();
        receiver.incoming.wake_at_once();
        receiver.land_in(Landings::new(LENT.len() * HEADS.len()));
        let (mut written, mut landed, mut is_complete) = (0, Vec::new(), false);
        for &piece in pieces.iter().cycle() {
            let next = bytes.len().min(written + piece);
            (&far[0]).write_all(&bytes[written..next]).unwrap();
            written = next;
            // Each piece is received before the next one is sent.
            while receiver.counters().received_bytes < written as u64 {
                match receiver.poll(Duration::ZERO).unwrap() {
                    Event::Chunk(chunk) if chunk.kind == Kind::Pages => {
                        let n = chunk.items as usize;
                        assert!(chunk.payload == pattern(n as u64, HEADS[n]), "chunk {n}");
                        let Whole::Landed(landing) = chunk.bulk else {
                            panic!("chunk {n} did not land");
                        };
                        landed.push(landing);
                    }
                    Event::Complete { epoch: 5, .. } => is_complete = true,
                    Event::Idle => thread::yield_now(),
                    _ => {}
                }
            }
            if written == bytes.len() {
                break;
            }
        }
        while !is_complete {
            let event = receiver.poll(LONG).unwrap();
            assert!(!matches!(event, Event::Idle), "incomplete");
            is_complete = matches!(event, Event::Complete { epoch: 5, .. });
        }
        assert_eq!(landed.len(), HEADS.len());
        assert!(landed.iter().all(|landing| **landing == expected[..]));
        check_all_fixed(&receiver);
    }
}

#[test]
fn an_aborted_transfer_leaves_its_memory_to_the_next_one() {
    const CHUNKS: u32 = 60;
    let slots = Arc::new(Slots(pattern(9, 64 * SLOT)));
    for streams in [1, 4] {
        let (near, far) = sockets(streams);
        let kept = slots.clone();
        let sender = peer(far, settings_of(false), move |mut channel| {
            let keeper: Arc<dyn Keeper> = kept;
            channel.begin(1, &[]).unwrap();
            for n in 0..9 {
                channel.next_buffer().unwrap().fill(n as u8);
                let lent: Vec<_> = (40..50 + n).collect();
                let lent = (&lent[..lent.len().min(15)], SLOT);
                channel.submit_lent(n, 100, &keeper, lent).unwrap();
            }
            channel.abort().unwrap();
            send_lent(&mut channel, 2, CHUNKS, &keeper);
        });
        let mut receiver = PageChannel::new(near, settings_of(false)).unwrap();
        let limit = bytes_lent(CHUNKS) as usize / SLOT + 9 * 15 + 16 * streams;
        let landings = Landings::new(limit);
        receiver.land_in(landings.clone());
        let (mut landed, mut is_aborted) = (Vec::new(), false);
        loop {
            match receiver.poll(LONG).unwrap() {
                Event::Chunk(chunk) if chunk.kind == Kind::Pages => {
                    if chunk.epoch == 2 {
                        check_lent(&chunk, &slots);
                    }
                    if let Whole::Landed(landing) = chunk.bulk {
                        landed.push(landing);
                    }
                }
                Event::Aborted { epoch: 1 } => {
                    is_aborted = true;
                    landed.clear();
                    landings.rest();
                }
                Event::Complete { epoch: 2, .. } => break,
                _ => {}
            }
        }
        assert!(is_aborted);
        check_all_fixed(&receiver);
        sender.join().unwrap();
        drop((receiver, landed));
        let pages = limit.min(1024);
        assert_eq!(landings.take(pages * SLOT).unwrap().len(), pages * SLOT);
    }
}

#[test]
fn a_transfer_that_is_cut_gives_its_memory_back() {
    let slots = Arc::new(Slots(pattern(9, 64 * SLOT)));
    let bytes = bytes_of_heads(&slots);
    let landings = Landings::new(LENT.len() * HEADS.len());
    for end in [bytes.len() / 3, bytes.len() / 2, bytes.len() - 10_000] {
        let (near, far) = sockets(1);
        let mut receiver = PageChannel::new(near, large()).unwrap();
        receiver.land_in(landings.clone());
        (&far[0]).write_all(&bytes[..end]).unwrap();
        drop(far);
        let (_, error) = all(&mut receiver);
        assert!(matches!(error, Some(ChannelError::Cut { .. })), "{error:?}");
        drop(receiver);
        let whole = landings.take(LENT.len() * HEADS.len() * SLOT);
        assert!(whole.is_ok(), "{whole:?}");
        landings.rest();
    }
}

#[test]
fn memory_that_cannot_be_registered_is_received_into_all_the_same() {
    const CHUNKS: u32 = 100;
    let test = "fixed::memory_that_cannot_be_registered_is_received_into_all_the_same";
    if !super::limits::may_lock_only(16 << 10, test) {
        return;
    }
    let slots = Arc::new(Slots(pattern(9, 64 * SLOT)));
    let (near, far) = sockets(2);
    let kept = slots.clone();
    let sender = peer(far, settings_of(true), move |mut channel| {
        let keeper: Arc<dyn Keeper> = kept;
        send_lent(&mut channel, 1, CHUNKS, &keeper);
        send_lent(&mut channel, 2, CHUNKS, &keeper);
    });
    let mut receiver = PageChannel::new(near, settings_of(true)).unwrap();
    receiver.land_in(Landings::new(usize::MAX));
    let mut landed = Vec::new();
    loop {
        match receiver.poll(LONG).unwrap() {
            Event::Chunk(chunk) if chunk.kind == Kind::Pages => {
                check_lent(&chunk, &slots);
                if let Whole::Landed(landing) = chunk.bulk {
                    landed.push(landing);
                }
            }
            Event::Complete { epoch: 2, .. } => break,
            _ => {}
        }
    }
    let counters = receiver.counters();
    assert_eq!(counters.landed_bytes, 2 * bytes_lent(CHUNKS));
    assert_eq!(counters.fixed_bytes, 0);
    // The streams' buffers, and the first block; there is no sense in asking for more.
    let expected = if receiver.operations.pinned().is_on() {
        2
    } else {
        0
    };
    assert_eq!(counters.unregistered_receives, expected, "{counters:?}");
    sender.join().unwrap();
}
