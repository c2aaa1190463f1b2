//! Chunks that leave together are on the wire what they would be alone.

use std::sync::Arc;

use super::lent::{SLOT, Slots, settings_of};
use super::*;

/// How the chunks of a checkpoint leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leave {
    Alone,
    Together,
}

fn put(channel: &mut PageChannel, bytes: &[u8]) -> usize {
    channel.next_buffer().unwrap()[..bytes.len()].copy_from_slice(bytes);
    bytes.len()
}

/// States of these lengths, and lent pages, whose records have so many bytes. Gives how many bytes were sent before the end.
fn checkpoint(channel: &mut PageChannel, leave: Leave, states: &[usize], records: usize) -> u64 {
    let keeper: Arc<dyn Keeper> = Arc::new(Slots(pattern(9, 8 * SLOT)));
    let before = channel.counters().sent_bytes;
    match leave {
        Leave::Alone => channel.begin(7, b"start").unwrap(),
        Leave::Together => channel.lay_begin(7, b"start").unwrap(),
    }
    for (&length, n) in states.iter().zip(1..) {
        let length = put(channel, &pattern(n, length));
        match leave {
            Leave::Alone => channel.submit(Kind::State, 1, length).unwrap(),
            Leave::Together => channel.lay(Kind::State, 1, length).unwrap(),
        }
    }
    let length = put(channel, &pattern(77, records));
    let slots = (&[1, 2, 5][..], SLOT);
    match leave {
        Leave::Alone => channel.submit_lent(3, length, &keeper, slots).unwrap(),
        Leave::Together => channel.lay_lent(3, length, &keeper, slots).unwrap(),
    }
    let sent = channel.counters().sent_bytes - before;
    channel.finish().unwrap();
    channel.settle().unwrap();
    assert_eq!(Arc::strong_count(&keeper), 1, "rule 15: let go of");
    sent
}

/// What is on the wire of the first of `streams` streams.
fn wire(streams: usize, act: impl FnOnce(&mut PageChannel) + Send + 'static) -> Vec<u8> {
    let (near, far) = sockets(streams);
    let sender = peer(near, settings_of(false), move |mut channel| {
        act(&mut channel)
    });
    let mut bytes = Vec::new();
    (&far[0]).read_to_end(&mut bytes).unwrap();
    sender.join().unwrap();
    bytes
}

#[test]
fn small_checkpoints_leave_in_one_send_and_are_the_same_on_the_wire() {
    let act = |leave| {
        move |channel: &mut PageChannel| {
            let sent = checkpoint(channel, leave, &[100, 3000, 0], 50);
            assert_eq!(sent == 0, leave == Leave::Together);
            assert_eq!(channel.counters().sent_chunks, 6);
        }
    };
    let alone = wire(1, act(Leave::Alone));
    assert!(alone.len() > 3 * SLOT);
    assert!(alone == wire(1, act(Leave::Together)));
}

#[test]
fn what_is_laid_leaves_when_it_fills_half_a_buffer() {
    // A buffer has room for 16 slots.
    for (states, at_once) in [
        (vec![5 * SLOT], false),
        (vec![9 * SLOT], true),
        (vec![5 * SLOT; 5], true),
    ] {
        let act = |leave| {
            let states = states.clone();
            move |channel: &mut PageChannel| {
                let sent = checkpoint(channel, leave, &states, 2 * SLOT);
                assert!(leave == Leave::Alone || (sent > 0) == at_once, "{states:?}");
            }
        };
        let alone = wire(1, act(Leave::Alone));
        assert!(alone == wire(1, act(Leave::Together)), "{states:?}");
    }
}

#[test]
fn rule_14_what_is_laid_goes_with_an_abort_or_before_other_chunks() {
    for streams in [1, 3] {
        let (near, far) = sockets(streams);
        let sender = peer(far, settings_of(true), |mut channel| {
            let keeper: Arc<dyn Keeper> = Arc::new(Slots(pattern(9, 8 * SLOT)));
            for epoch in [3, 4] {
                channel.lay_begin(epoch, b"start").unwrap();
                let length = put(&mut channel, &pattern(1, 100));
                channel.lay(Kind::State, 1, length).unwrap();
                let length = put(&mut channel, &pattern(2, 30));
                let slots = (&[4, 5][..], SLOT);
                channel.lay_lent(2, length, &keeper, slots).unwrap();
                if epoch == 3 {
                    channel.abort().unwrap();
                    channel.flush().unwrap();
                    channel.settle().unwrap();
                    assert_eq!(Arc::strong_count(&keeper), 1, "rule 15");
                }
            }
            // Something comes between the last pages and the end.
            submit(&mut channel, Kind::Named, 1, &pattern(3, 20));
            channel.finish().unwrap();
            channel.settle().unwrap();
        });
        let mut receiver = PageChannel::new(near, settings_of(true)).unwrap();
        let (seen, error) = all(&mut receiver);
        assert!(error.is_none(), "{error:?}");
        sender.join().unwrap();
        assert!(seen.contains(&Seen::Aborted(3)), "{seen:?}");
        let totals = Totals {
            chunks: 3,
            states: 1,
            pages: 3,
            digests: 0,
        };
        assert_eq!(seen.last(), Some(&Seen::Complete(4, totals)), "{streams}");
        let pages = Seen::Chunk(Kind::Pages, 4, 2, pattern(2, 30));
        assert!(seen.contains(&pages), "{seen:?}");
    }
}
