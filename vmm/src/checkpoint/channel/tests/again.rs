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
    let mut channel = channel.over(near_again).unwrap();
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
