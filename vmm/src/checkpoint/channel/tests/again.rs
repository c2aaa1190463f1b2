//! A channel that goes on over other streams.

use super::*;

#[test]
fn rule_18_a_generation_that_was_known_is_known_over_other_streams() {
    let (near, far) = sockets(1);
    let (near_again, far_again) = sockets(1);
    let settings_of = |generation| Settings {
        generation,
        ..settings()
    };
    let first = peer(far, settings_of(4), |mut channel| {
        send_small(&mut channel, 1)
    });
    let mut channel = PageChannel::new(near, settings()).unwrap();
    channel.set_generation(4);
    while next(&mut channel) != Seen::Closed {}
    first.join().unwrap();
    channel.set_generation(5);
    let before = channel.counters();
    channel.reopen(near_again).unwrap();
    assert_eq!(channel.counters().received_bytes, before.received_bytes);
    // Somebody who has not heard of the present generation.
    let old = peer(far_again, settings_of(4), |mut channel| {
        send_small(&mut channel, 2)
    });
    let (seen, end) = all(&mut channel);
    assert!(end.is_none(), "{end:?}");
    assert!(
        seen.iter()
            .any(|seen| seen.is_damaged(2, "generation 4, but 5 is known")),
        "{seen:?}"
    );
    old.join().unwrap();
    let after = channel.counters();
    assert!(after.received_bytes > before.received_bytes);
    assert_eq!(
        (before.old_generation_chunks, after.old_generation_chunks),
        (0, 1)
    );
}

#[test]
fn what_one_channel_may_lock_is_enough_to_go_on_over_other_streams() {
    let test = "again::what_one_channel_may_lock_is_enough_to_go_on_over_other_streams";
    let large = Settings {
        chunk_bytes: CHUNK_BYTES,
        ..settings()
    };
    // One and a half of what its buffers take.
    let bytes = large.send_buffers as u64 * CHUNK_BYTES as u64 * 3 / 2;
    if !super::limits::may_lock_only(bytes, test) {
        return;
    }
    let (near, far) = sockets(1);
    let mut channel = PageChannel::new(near, large).unwrap();
    assert_eq!(channel.counters().unregistered_buffers, 0, "it fits once");
    drop(far);
    let (refused_near, _far) = sockets(STREAMS_MAX + 1);
    for _ in 0..5 {
        let (near, far) = sockets(1);
        let sender = peer(far, settings(), |mut channel| send_small(&mut channel, 1));
        channel.reopen(near).unwrap();
        let counters = channel.counters();
        assert_eq!(
            (
                counters.unregistered_buffers,
                counters.unregistered_receives
            ),
            (0, 0),
            "{counters:?}"
        );
        while next(&mut channel) != Seen::Closed {}
        sender.join().unwrap();
    }
    // What can't be opened costs the streams, and nothing but them.
    channel.reopen(refused_near).unwrap_err();
    let (near, far) = sockets(1);
    let sender = peer(far, settings(), |mut channel| send_small(&mut channel, 2));
    channel.reopen(near).unwrap();
    assert_eq!(channel.counters().unregistered_buffers, 0);
    let (seen, end) = all(&mut channel);
    assert!(end.is_none(), "{end:?}");
    assert!(matches!(seen.last(), Some(Seen::Complete(2, _))));
    sender.join().unwrap();
}
