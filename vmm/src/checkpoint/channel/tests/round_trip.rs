//! Whole checkpoints, both ways.

use super::*;

fn length(n: u64) -> usize {
    match n % 5 {
        0 => CHUNK,
        1 => 0,
        2 => CHUNK - 100,
        3 => 1,
        _ => (n as usize * 977) % CHUNK,
    }
}

/// Sends chunk `n` of `count` with `n` pages or digests, mixed with states.
fn send(channel: &mut PageChannel, epoch: u64, count: u64, kind: Kind) {
    channel.begin(epoch, &epoch.to_le_bytes()).unwrap();
    for n in 0..count {
        let kind = if n % 7 == 0 { Kind::State } else { kind };
        submit(channel, kind, n as u32, &pattern(n, length(n)));
    }
    channel.finish().unwrap();
}

/// Receives what `send` has sent, in any order.
fn receive(channel: &mut PageChannel, epoch: u64, count: u64, kind: Kind) {
    let begin = Seen::Chunk(Kind::Begin, epoch, 0, epoch.to_le_bytes().to_vec());
    assert_eq!(next(channel), begin);
    let mut chunks = Vec::new();
    let totals = loop {
        match next(channel) {
            Seen::Chunk(kind, e, items, payload) => {
                assert_eq!(e, epoch);
                chunks.push((items, kind, payload));
            }
            Seen::Complete(e, totals) => {
                assert_eq!(e, epoch);
                break totals;
            }
            other => panic!("{other:?}"),
        }
    };
    chunks.sort_by_key(|(items, ..)| *items);
    assert_eq!(chunks.len() as u64, count);
    for (n, (items, found, payload)) in (0..).zip(&chunks) {
        assert_eq!(u64::from(*items), n);
        assert_eq!(*found, if n % 7 == 0 { Kind::State } else { kind });
        assert!(*payload == pattern(n, length(n)), "chunk {n}");
    }
    let states: u64 = (0..count).filter(|n| n % 7 == 0).sum();
    let others = (0..count).sum::<u64>() - states;
    assert_eq!((totals.chunks, totals.states), (count, states));
    assert_eq!(totals.pages + totals.digests, others);
}

#[test]
fn checkpoints_and_digests_go_over_any_number_of_streams() {
    for streams in [1, 2, 4] {
        let (near, far) = sockets(streams);
        let secondary = peer(far, settings(), |mut channel| {
            for epoch in 1..6 {
                send(&mut channel, epoch, 40, Kind::Digests);
                receive(&mut channel, epoch, 300, Kind::Pages);
            }
            assert_eq!(next(&mut channel), Seen::Closed);
            channel.counters()
        });
        let mut primary = PageChannel::new(near, settings()).unwrap();
        for epoch in 1..6 {
            receive(&mut primary, epoch, 40, Kind::Digests);
            send(&mut primary, epoch, 300, Kind::Pages);
        }
        let sent = primary.counters();
        drop(primary);
        let received = secondary.join().unwrap();
        assert_eq!(received.received_chunks, 5 * (300 + 2 * streams as u64));
        assert_eq!(received.received_bytes, sent.sent_bytes);
        assert_eq!(sent.received_bytes, received.sent_bytes);
        assert_eq!(
            (received.stale_chunks, received.damaged_checkpoints),
            (0, 0)
        );
    }
}

#[test]
fn live_pages_and_pages_ahead_go_outside_of_checkpoints() {
    let (near, far) = sockets(1);
    let sender = peer(far, settings(), |mut channel| {
        channel.next_buffer().unwrap()[0] = 7;
        channel.submit_loose(Kind::Sync, 0, 1, 1).unwrap();
        channel.begin(3, &[]).unwrap();
        channel.next_buffer().unwrap()[0] = 8;
        channel.submit_loose(Kind::Ahead, 4, 2, 1).unwrap();
        channel.finish().unwrap();
    });
    let mut receiver = PageChannel::new(near, settings()).unwrap();
    let expected = [
        Seen::Chunk(Kind::Sync, 0, 1, vec![7]),
        Seen::Chunk(Kind::Begin, 3, 0, vec![]),
        Seen::Chunk(Kind::Ahead, 4, 2, vec![8]),
        Seen::Complete(3, Totals::default()),
        Seen::Closed,
    ];
    for seen in expected {
        assert_eq!(next(&mut receiver), seen);
    }
    sender.join().unwrap();
}

/// What the peer writes on each of two streams that `act` uses.
fn bytes_of_two(act: impl FnOnce(&mut PageChannel) + Send + 'static) -> [Vec<u8>; 2] {
    let (near, far) = sockets(2);
    let sender = peer(near, settings(), |mut channel| act(&mut channel));
    let bytes = [0, 1].map(|n| {
        let mut bytes = Vec::new();
        (&far[n]).read_to_end(&mut bytes).unwrap();
        bytes
    });
    sender.join().unwrap();
    bytes
}

#[test]
fn what_goes_loose_arrives_in_order_and_before_a_checkpoint_that_begins_later() {
    let loose = |channel: &mut PageChannel, kind, byte| {
        channel.next_buffer().unwrap()[0] = byte;
        channel.submit_loose(kind, 0, 1, 1).unwrap();
    };
    let bytes = bytes_of_two(move |channel| {
        (1..4).for_each(|byte| loose(channel, Kind::Sync, byte));
        channel.begin(1, &[]).unwrap();
        submit(channel, Kind::Pages, 1, b"one");
        submit(channel, Kind::Pages, 1, b"two");
        channel.abort().unwrap();
        loose(channel, Kind::Ahead, 4);
        channel.begin(2, &[]).unwrap();
        channel.finish().unwrap();
    });
    let (near, far) = sockets(2);
    let mut receiver = PageChannel::new(near, settings()).unwrap();
    // The second stream is faster by all there is.
    (&far[1]).write_all(&bytes[1]).unwrap();
    // Its Begin comes in, and waits.
    while receiver.counters().received_bytes < HEADER_BYTES as u64 {
        assert_eq!(see(receiver.poll(Duration::ZERO).unwrap()), Seen::Idle);
    }
    (&far[0]).write_all(&bytes[0]).unwrap();
    drop(far);
    let (seen, error) = all(&mut receiver);
    assert!(error.is_none(), "{error:?}");
    let sync = |byte| Seen::Chunk(Kind::Sync, 0, 1, vec![byte]);
    assert_eq!(seen[..3], [1, 2, 3].map(sync));
    assert_eq!(seen[3], Seen::Chunk(Kind::Begin, 1, 0, vec![]));
    let rest: Vec<_> = seen[4..]
        .iter()
        .filter(|seen| !matches!(seen, Seen::Chunk(Kind::Pages, 1, ..)))
        .cloned()
        .collect();
    let expected = [
        Seen::Aborted(1),
        Seen::Chunk(Kind::Ahead, 0, 1, vec![4]),
        Seen::Chunk(Kind::Begin, 2, 0, vec![]),
        Seen::Complete(2, Totals::default()),
    ];
    assert_eq!(rest, expected);
    assert_eq!(receiver.counters().damaged_checkpoints, 0);
}

#[test]
fn rule_14_after_an_abort_the_next_checkpoint_is_whole() {
    for streams in [1, 3] {
        let (near, far) = sockets(streams);
        let sender = peer(far, settings(), |mut channel| {
            channel.abort().unwrap();
            channel.begin(8, b"a").unwrap();
            for n in 0..50 {
                submit(&mut channel, Kind::Pages, 1, &pattern(n, 9000));
            }
            channel.abort().unwrap();
            // The same epoch again: it is another attempt.
            send(&mut channel, 8, 100, Kind::Pages);
            send(&mut channel, 9, 100, Kind::Pages);
        });
        let mut receiver = PageChannel::new(near, settings()).unwrap();
        loop {
            match next(&mut receiver) {
                Seen::Chunk(Kind::Begin | Kind::Pages, 8, ..) => {}
                Seen::Aborted(8) => break,
                other => panic!("{other:?}"),
            }
        }
        receive(&mut receiver, 8, 100, Kind::Pages);
        receive(&mut receiver, 9, 100, Kind::Pages);
        assert_eq!(next(&mut receiver), Seen::Closed);
        assert_eq!(receiver.counters().damaged_checkpoints, 0);
        let stale = receiver.counters().stale_chunks;
        assert_eq!(stale == 0, streams == 1, "{stale}");
        sender.join().unwrap();
    }
}

#[test]
fn two_that_send_and_receive_at_once_do_not_wait_for_each_other() {
    fn both(mut channel: PageChannel) -> Counters {
        const COUNT: u64 = 3000;
        let (mut left, mut done) = (COUNT, false);
        channel.begin(1, &[]).unwrap();
        loop {
            while left > 0 {
                let Some(buffer) = channel.try_next_buffer().unwrap() else {
                    break;
                };
                buffer.fill(left as u8);
                channel.submit(Kind::Pages, 4, CHUNK).unwrap();
                left -= 1;
                if left == 0 {
                    channel.end().unwrap();
                }
            }
            if done && left == 0 {
                break;
            }
            match next(&mut channel) {
                Seen::Chunk(..) | Seen::Sendable => {}
                Seen::Complete(1, totals) => {
                    assert_eq!(totals.pages, 4 * COUNT);
                    done = true;
                }
                other => panic!("{other:?}"),
            }
        }
        channel.flush().unwrap();
        channel.counters()
    }
    let (near, far) = sockets(2);
    let few = Settings {
        send_buffers: 8,
        ..settings()
    };
    let other = peer(far, few, both);
    both(PageChannel::new(near, few).unwrap());
    other.join().unwrap();
}

#[test]
fn calls_in_a_senseless_order_are_told_so_and_do_no_harm() {
    let (near, far) = sockets(1);
    let mut channel = PageChannel::new(near, settings()).unwrap();
    let usage =
        |result: Result<(), ChannelError>| assert!(matches!(result, Err(ChannelError::Usage(_))));
    usage(channel.submit(Kind::Pages, 1, 1));
    usage(channel.finish());
    usage(channel.submit_loose(Kind::Pages, 1, 1, 1));
    usage(channel.submit_loose(Kind::Sync, 1, 1, 1));
    usage(channel.begin(1, &vec![0; CHUNK + 1]));
    channel.begin(1, &[]).unwrap();
    usage(channel.begin(2, &[]));
    usage(channel.submit(Kind::Pages, 1, 1));
    assert_eq!(channel.next_buffer().unwrap().len(), CHUNK);
    usage(channel.submit(Kind::End, 1, 1));
    usage(channel.submit(Kind::Pages, 1, CHUNK + 1));
    channel.submit(Kind::Pages, 1, CHUNK).unwrap();
    channel.finish().unwrap();
    let mut receiver = PageChannel::new(far, settings()).unwrap();
    drop(channel);
    let (seen, error) = all(&mut receiver);
    assert!(
        error.is_none() && matches!(seen[..], [_, _, Seen::Complete(1, _)]),
        "{seen:?}"
    );
}

#[test]
fn another_thread_wakes_the_owner_or_ends_the_channel() {
    let (near, far) = sockets(1);
    let mut channel = PageChannel::new(near, settings()).unwrap();
    let waker = channel.waker();
    waker.wake();
    assert_eq!(next(&mut channel), Seen::Woken);
    assert_eq!(see(channel.poll(Duration::ZERO).unwrap()), Seen::Idle);
    let other = waker.clone();
    let thread = thread::spawn(move || other.wake());
    assert_eq!(next(&mut channel), Seen::Woken);
    thread.join().unwrap();

    // The peer takes nothing: the sender waits until it is ended.
    let thread = thread::spawn(move || waker.shut_down());
    channel.begin(1, &[]).unwrap();
    let error = loop {
        if let Err(error) = channel.next_buffer() {
            break error;
        }
        if let Err(error) = channel.submit(Kind::Pages, 1, CHUNK) {
            break error;
        }
    };
    assert!(matches!(error, ChannelError::ShutDown), "{error}");
    assert!(matches!(channel.poll(LONG), Err(ChannelError::ShutDown)));
    thread.join().unwrap();
    drop(far);
}
