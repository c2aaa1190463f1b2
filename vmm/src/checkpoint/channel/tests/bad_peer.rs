//! Peers that are cut off, stand still, damage bytes or send others.

use std::net::Shutdown;
use std::os::fd::AsRawFd;

use super::super::frame::Header;
use super::*;

/// For peers that stand still.
const SHORT: Duration = Duration::from_millis(150);

fn chunk(header: Header, payload: &[u8]) -> Vec<u8> {
    let header = Header {
        length: payload.len() as u32,
        payload_crc: crc32fast::hash(payload),
        ..header
    };
    [&header.to_bytes()[..], payload].concat()
}

fn header(kind: Kind, attempt: u32, sequence: u32) -> Header {
    let kind = kind as u16;
    Header {
        kind,
        attempt,
        sequence,
        epoch: 10 + u64::from(attempt),
        items: 1,
        ..Header::default()
    }
}

fn short() -> Settings {
    Settings {
        timeout: SHORT,
        ..settings()
    }
}

/// A channel over so many streams that does not wait for long, and its peer's ends.
fn impatient(streams: usize) -> (PageChannel, Vec<TcpStream>) {
    let (near, far) = sockets(streams);
    (PageChannel::new(near, short()).unwrap(), far)
}

/// Sends a chunk of the first checkpoint over the first stream.
fn send(far: &[TcpStream], kind: Kind, sequence: u32, payload: &[u8]) {
    let chunk = chunk(header(kind, 1, sequence), payload);
    (&far[0]).write_all(&chunk).unwrap();
}

/// Sends pages until that ends with an error.
fn sends_until_refused(channel: &mut PageChannel) -> ChannelError {
    loop {
        let sent = channel
            .next_buffer()
            .map(|_| ())
            .and_then(|()| channel.submit(Kind::Pages, 1, CHUNK));
        if let Err(error) = sent {
            return error;
        }
    }
}

#[test]
fn invariant_3_a_cut_at_any_byte_completes_nothing() {
    let bytes = bytes_of(&[12], settings());
    let whole = seen_small(12);
    assert_eq!(made_of(&bytes, settings()).0, whole);
    for n in 0..bytes.len() {
        let (seen, error, _) = made_of(&bytes[..n], settings());
        assert!(
            seen.len() < whole.len() && seen == whole[..seen.len()],
            "cut at {n}: {seen:?}"
        );
        match error {
            None => assert_eq!(n, 0),
            Some(ChannelError::Cut {
                stream: 0,
                step: Step::ReceiveChunk | Step::ReceiveCheckpoint,
            }) => {}
            Some(e) => panic!("cut at {n}: {e}"),
        }
    }
}

#[test]
fn damage_spoils_one_checkpoint_or_ends_the_channel_but_never_passes() {
    let bytes = bytes_of(&[12, 13], settings());
    let first = bytes.len() / 2;
    let whole = [seen_small(12), seen_small(13)].concat();
    let (mut spoilt, mut ended) = (0, 0);
    for at in 0..first {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        let (seen, error, counters) = made_of(&damaged, settings());
        assert!(
            !seen.iter().any(|s| matches!(s, Seen::Complete(12, _))),
            "damage at {at} passed"
        );
        match error {
            // The next checkpoint on the same stream is whole again.
            None => {
                spoilt += 1;
                assert!(seen.ends_with(&whole[5..]), "damage at {at}: {seen:?}");
                assert!(
                    seen.iter().any(|s| s.is_damaged(12, "checksum")),
                    "{at}: {seen:?}"
                );
                assert_eq!(counters.damaged_checkpoints, 1);
            }
            Some(ChannelError::Header { stream: 0, .. }) => {
                ended += 1;
                assert!(seen == whole[..seen.len()], "damage at {at}: {seen:?}");
            }
            Some(e) => panic!("damage at {at}: {e}"),
        }
    }
    // Five headers of 64 bytes, and everything else.
    assert_eq!((ended, spoilt), (320, first - 320));
}

#[test]
fn a_peer_that_stands_still_is_named_with_its_step() {
    let bytes = bytes_of(&[12], short());
    let steps = [
        (30, Step::ReceiveChunk),
        (64 + 5, Step::ReceiveCheckpoint),
        (bytes.len() - 1, Step::ReceiveChunk),
    ];
    for (length, expected) in steps {
        let (mut channel, far) = impatient(1);
        (&far[0]).write_all(&bytes[..length]).unwrap();
        match all(&mut channel).1 {
            Some(ChannelError::TimedOut {
                stream: 0,
                step,
                after_ms,
            }) => {
                assert_eq!(step, expected, "after {length} bytes");
                assert!(after_ms >= SHORT.as_millis() as u64);
            }
            other => panic!("after {length} bytes: {other:?}"),
        }
    }
}

#[test]
fn a_peer_that_stands_still_is_noticed_by_who_only_looks_in_for_a_moment_at_a_time() {
    let (mut channel, far) = impatient(1);
    send(&far, Kind::Begin, 0, &[]);
    let begun = Instant::now();
    let error = loop {
        assert!(begun.elapsed() < Duration::from_secs(20), "never noticed");
        match channel.poll(Duration::ZERO) {
            Ok(Event::Idle) => std::thread::yield_now(),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    let step = Step::ReceiveCheckpoint;
    assert!(
        matches!(error, ChannelError::TimedOut { stream: 0, step: s, .. } if s == step),
        "{error}"
    );
}

#[test]
fn a_stream_that_lags_behind_the_others_is_named() {
    let (mut channel, far) = impatient(2);
    send(&far, Kind::Begin, 0, &[]);
    send(&far, Kind::End, 1, &Totals::default().to_bytes());
    let (_, error) = all(&mut channel);
    let lagging = |e| {
        matches!(
            e,
            ChannelError::TimedOut {
                stream: 1,
                step: Step::ReceiveCheckpoint,
                ..
            }
        )
    };
    assert!(error.is_some_and(lagging));

    let (mut channel, far) = impatient(2);
    far[1].shutdown(Shutdown::Write).unwrap();
    let (_, error) = all(&mut channel);
    // The pair may go on over others.
    assert!(error.as_ref().is_some_and(ChannelError::is_broken_stream));
    let open = |e| {
        matches!(
            e,
            ChannelError::TimedOut {
                stream: 0,
                step: Step::Close,
                ..
            }
        )
    };
    assert!(error.is_some_and(open));
}

#[test]
fn a_peer_that_reads_nothing_is_given_up() {
    let (mut channel, far) = impatient(2);
    channel.begin(1, &[]).unwrap();
    let error = sends_until_refused(&mut channel);
    assert!(
        matches!(
            error,
            ChannelError::TimedOut {
                step: Step::SendChunk,
                ..
            }
        ),
        "{error}"
    );
    assert!(channel.counters().buffer_waits > 0);
    drop(far);
}

#[test]
fn an_idle_channel_waits_for_ever_and_time_given_is_kept() {
    let short = Settings {
        timeout: Duration::from_millis(20),
        ..settings()
    };
    let (near, far) = sockets(2);
    let mut channel = PageChannel::new(near, short).unwrap();
    let begun = Instant::now();
    assert_eq!(see(channel.poll(SHORT).unwrap()), Seen::Idle);
    assert!(begun.elapsed() >= SHORT);
    drop(far);
    assert_eq!(next(&mut channel), Seen::Closed);
    assert_eq!(next(&mut channel), Seen::Closed);
}

#[test]
fn an_owner_that_was_away_does_not_blame_the_peer() {
    let (mut channel, far) = impatient(1);
    send(&far, Kind::Begin, 0, &[]);
    assert!(matches!(next(&mut channel), Seen::Chunk(Kind::Begin, ..)));
    assert_eq!(see(channel.poll(Duration::ZERO).unwrap()), Seen::Idle);
    send(&far, Kind::End, 1, &Totals::default().to_bytes());
    // Not a wait for an event: the time itself must pass.
    thread::sleep(2 * SHORT);
    assert_eq!(next(&mut channel), Seen::Complete(11, Totals::default()));
}

#[test]
fn a_reset_ends_the_channel_on_both_sides() {
    let (near, far) = sockets(1);
    let receiver = peer(near, settings(), |mut channel| {
        let first = next(&mut channel);
        assert!(matches!(first, Seen::Chunk(Kind::Begin, ..)), "{first:?}");
        all(&mut channel).1
    });
    send(&far, Kind::Begin, 0, &[]);
    reset(far);
    let error = receiver.join().unwrap();
    assert!(
        matches!(
            error,
            Some(ChannelError::Socket { .. } | ChannelError::Cut { .. })
        ),
        "{error:?}"
    );

    let (near, far) = sockets(1);
    let mut sender = PageChannel::new(near, settings()).unwrap();
    sender.begin(1, &[]).unwrap();
    reset(far);
    let error = sends_until_refused(&mut sender);
    assert!(
        matches!(error, ChannelError::Socket { stream: 0, .. }),
        "{error}"
    );
}

/// Closes with RST.
fn reset(sockets: Vec<TcpStream>) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    for socket in &sockets {
        // SAFETY: the kernel reads one `linger` that lives on this stack.
        let set = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_LINGER,
                (&raw const linger).cast(),
                size_of::<libc::linger>() as u32,
            )
        };
        assert_eq!(set, 0);
    }
}

/// What one stream makes of these chunks.
fn made_of_chunks(
    chunks: &[Vec<u8>],
    settings: Settings,
) -> (Vec<Seen>, Option<ChannelError>, Counters) {
    made_of(&chunks.concat(), settings)
}

#[test]
fn checkpoints_that_make_no_sense_are_damaged_and_the_next_one_is_whole() {
    let begin = || chunk(header(Kind::Begin, 1, 0), &[]);
    let pages = |sequence| chunk(header(Kind::Pages, 1, sequence), &[5; 10]);
    let totals = Totals {
        chunks: 1,
        pages: 1,
        ..Totals::default()
    };
    let end = |totals: Totals| chunk(header(Kind::End, 1, 2), &totals.to_bytes());
    let epoch_99 = Header {
        epoch: 99,
        ..header(Kind::Pages, 1, 1)
    };
    let kind_99 = Header {
        kind: 99,
        ..header(Kind::Pages, 1, 1)
    };
    let generation_1 = Header {
        generation: 1,
        ..header(Kind::Pages, 1, 1)
    };
    let next_epoch = vec![
        chunk(header(Kind::Begin, 2, 0), &[]),
        chunk(header(Kind::End, 2, 1), &Totals::default().to_bytes()),
    ];
    let cases = [
        (vec![begin(), pages(2)], "missing"),
        (vec![begin(), begin()], "missing"),
        (vec![pages(0)], "begins with"),
        (
            vec![begin(), pages(1), end(Totals { pages: 2, ..totals })],
            "otherwise",
        ),
        (vec![begin(), chunk(epoch_99, &[])], "epoch 99"),
        (vec![begin(), chunk(kind_99, &[])], "unknown kind 99"),
        (
            vec![begin(), chunk(generation_1, &[])],
            "generation 1 inside",
        ),
        (vec![begin(), pages(1)], "before its end"),
    ];
    for (chunks, why) in &cases[..] {
        let chunks = [chunks.clone(), next_epoch.clone()].concat();
        let (seen, error, counters) = made_of_chunks(&chunks, settings());
        assert!(error.is_none(), "{why}: {error:?}");
        assert!(
            seen.iter().any(|s| s.is_damaged(11, why)),
            "{why}: {seen:?}"
        );
        assert_eq!(
            seen.last(),
            Some(&Seen::Complete(12, Totals::default())),
            "{why}"
        );
        assert_eq!(counters.damaged_checkpoints, 1);
    }
}

#[test]
fn rule_18_an_older_generation_is_refused() {
    let known = Settings {
        generation: 5,
        ..settings()
    };
    let with = |generation, header: Header| Header {
        generation,
        ..header
    };
    let end = Totals::default().to_bytes();
    let chunks = [
        chunk(with(4, header(Kind::Begin, 1, 0)), &[]),
        chunk(with(4, header(Kind::End, 1, 1)), &end),
        // A newer one is believed, and from then on 5 is old.
        chunk(with(6, header(Kind::Begin, 2, 0)), &[]),
        chunk(with(6, header(Kind::End, 2, 1)), &end),
        chunk(with(5, header(Kind::Begin, 3, 0)), &[]),
        chunk(with(5, header(Kind::Ahead, 0, 0)), &[]),
        chunk(with(6, header(Kind::Sync, 0, 0)), &[1]),
        chunk(with(5, header(Kind::Sync, 0, 0)), &[1]),
    ];
    let (seen, error, counters) = made_of_chunks(&chunks, known);
    assert!(
        seen[0].is_damaged(11, "generation 4, but 5 is known"),
        "{seen:?}"
    );
    assert_eq!(seen[2], Seen::Complete(12, Totals::default()));
    assert!(seen[3].is_damaged(13, "generation 5, but 6 is known"));
    assert!(seen[4].is_damaged(10, "generation 5, but 6 is known"));
    assert_eq!(seen[5], Seen::Chunk(Kind::Sync, 10, 1, vec![1]));
    assert!(
        matches!(error, Some(ChannelError::Sync { stream: 0, .. })),
        "{error:?}"
    );
    assert_eq!(
        (counters.old_generation_chunks, counters.stale_chunks),
        (4, 1)
    );
}

#[test]
fn damaged_live_pages_end_the_channel_and_damaged_pages_ahead_do_not() {
    let mut ahead = chunk(header(Kind::Ahead, 0, 0), &[1; 9]);
    let mut sync = chunk(header(Kind::Sync, 0, 0), &[1; 9]);
    ahead[70] ^= 1;
    sync[70] ^= 1;
    let (seen, error, _) = made_of_chunks(&[ahead, sync], settings());
    assert!(
        matches!(&seen[..], [damaged] if damaged.is_damaged(10, "checksum")),
        "{seen:?}"
    );
    assert!(error.is_some_and(|e| e.to_string().contains("live pages have a wrong checksum")));
}

#[test]
fn foreign_and_oversized_bytes_end_the_channel_by_name() {
    let refused = |bytes: &[u8], why: &str| {
        let (seen, error, _) = made_of(bytes, settings());
        let text = error.map(|e| e.to_string()).unwrap_or_default();
        assert!(seen.is_empty() && text.contains(why), "{why}: {text}");
    };
    refused(
        &[b"GET / HTTP/1.1\r\n".as_slice(), &[b'x'; 200]].concat(),
        "no chunk",
    );
    let long = Header {
        length: CHUNK as u32 + 1,
        ..header(Kind::Begin, 1, 0)
    };
    refused(&long.to_bytes(), "set the same chunk size");
    let crosswise = Header {
        stream: 1,
        ..header(Kind::Begin, 1, 0)
    };
    refused(&crosswise.to_bytes(), "crosswise");
    refused(b"COLP", "closed by the peer");
}

#[test]
fn random_bytes_and_random_chunks_never_panic_nor_complete() {
    for seed in 0..200u64 {
        let noise = pattern(seed + 1, 300 + seed as usize * 40);
        assert!(made_of(&noise, settings()).1.is_some());
        let mut bytes = Vec::new();
        for n in noise.chunks_exact(8).take(200) {
            let header = Header {
                kind: u16::from(n[0] % 10),
                attempt: u32::from(n[1] % 4),
                sequence: u32::from(n[2] % 4),
                epoch: u64::from(n[3] % 2),
                generation: u64::from(n[4] % 20 == 0),
                items: u32::from(n[5]),
                ..Header::default()
            };
            bytes.extend(chunk(header, &noise[..usize::from(n[6])]));
            let at = bytes.len() - 1;
            bytes[at] ^= u8::from(n[7] < 8);
        }
        let (seen, ..) = made_of(&bytes, settings());
        assert!(
            !seen.iter().any(|s| matches!(s, Seen::Complete(..))),
            "{seen:?}"
        );
    }
}
