//! What the two roles of a pair, with the link between them, ask of the system while packets flow: no memory, and no system call
//! but those that send and receive datagrams, call the guest, and look now and then whether the TCP connection still is.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

mod counting;
mod mock_hosts;

use std::time::{Duration, Instant};

use colo_fastpath::link::{LinkStats, Packets};
use counting::{allocations, can_count, count, stop_counting, turn};
use mock_hosts::{Host, Hosts};
use perf_event::Counter;

const PATIENCE: Duration = Duration::from_secs(20);
const WARM_UP: u64 = 1000;
const COUNTED: u64 = 10_000;
/// While datagrams carry everything, the TCP connection is looked at this often at most.
const STREAM_LOOKS_US: u64 = 500;
/// With one call the kernel sends so many frames at least, if there are as many.
const KICK_FRAMES: u64 = 32;
/// On a machine that is so slow that datagrams count as lost, so many are sent all the same.
const IN_FLIGHT_MIN: u64 = 16;
/// To leave a processor takes so many calls.
const CALLS_PER_MOVE: u64 = 3;

/// What a worker has asked of the system.
#[derive(Debug, Clone, Copy)]
struct Asked {
    /// What it says itself: calls of the guest, turns in which others were let run, and looks how often they did.
    guest_calls: u64,
    yields: u64,
    looks_around: u64,
    link: LinkStats,
}

fn asked(hosts: &Hosts) -> [Asked; 2] {
    let [near, far] = hosts.links();
    [(&hosts.primary, near), (&hosts.secondary, far)].map(|(host, link)| {
        let stats = host.worker.stats();
        Asked {
            guest_calls: stats.guest_calls,
            yields: stats.yields,
            looks_around: stats.looks_around + CALLS_PER_MOVE * stats.moves,
            link,
        }
    })
}

fn counters_of(hosts: &Hosts) -> [Counter; 2] {
    [&hosts.primary, &hosts.secondary].map(|host| count(&host.worker))
}

fn a_pair_asks_for_wake_ups_only(packets: Packets, digests: bool) {
    if !can_count() {
        return;
    }
    let _turn = turn();
    let mut hosts = Hosts::new(packets, digests);
    hosts.exchange(WARM_UP);
    let mut counters = counters_of(&hosts);
    let before = asked(&hosts);
    // Before and after are what this process asks of the workers, not what packets cost.
    let (begun, allocated) = (Instant::now(), allocations());
    counters
        .iter_mut()
        .for_each(|counter| counter.enable().unwrap());
    hosts.exchange(COUNTED);
    counters
        .iter_mut()
        .for_each(|counter| counter.disable().unwrap());
    let allocations = allocations() - allocated;
    let after = asked(&hosts);
    let elapsed_us = begun.elapsed().as_micros() as u64;
    for host in [&hosts.primary, &hosts.secondary] {
        stop_counting(&host.worker);
    }
    assert_eq!(allocations, 0);
    // Of both hosts: after each there is a question over TCP, which either end reads or answers.
    let timeouts = |asked: &[Asked; 2]| asked.iter().map(|host| host.link.timeouts).sum::<u64>();
    let questions = timeouts(&after) - timeouts(&before);
    for ((counter, before), after) in counters.iter_mut().zip(before).zip(after) {
        let system_calls = counter.read().unwrap();
        let guest_calls = after.guest_calls - before.guest_calls;
        let yields = after.yields - before.yields;
        let looks_around = after.looks_around - before.looks_around;
        let of_link = |of: fn(&LinkStats) -> u64| of(&after.link) - of(&before.link);
        let datagram_calls = of_link(|link| link.datagram_calls);
        let stream_calls = of_link(|link| link.stream_calls);
        let sent = of_link(|link| link.datagrams_sent);
        let told = format!(
            "{system_calls} system calls: {datagram_calls} for {sent} datagrams sent and {} received, {stream_calls} on TCP \
             with {questions} questions in {elapsed_us} us, {guest_calls} of the guest, {yields} yields, {looks_around} around",
            of_link(|link| link.datagrams_received)
        );
        println!("{packets:?}: {told}");
        let expected = datagram_calls + stream_calls + guest_calls + yields + looks_around;
        assert!(system_calls <= expected, "{told}");
        let looks = elapsed_us / STREAM_LOOKS_US + 1;
        assert!(stream_calls <= looks + 2 * questions, "{told}");
        assert!(guest_calls < 10, "{told}");
        assert!(sent > 1000, "{told}");
        if packets == Packets::Xdp {
            // A datagram that travels alone takes one call at most at either end; what batches take is in the test below.
            let received = of_link(|link| link.datagrams_received);
            assert!(datagram_calls <= sent + received, "{told}");
        }
    }
}

#[test]
fn a_pair_over_af_xdp_asks_for_wake_ups_only() {
    a_pair_asks_for_wake_ups_only(Packets::Xdp, false);
}

#[test]
fn a_pair_over_af_xdp_that_compares_digests_asks_for_wake_ups_only() {
    a_pair_asks_for_wake_ups_only(Packets::Xdp, true);
}

#[test]
fn a_pair_over_udp_asks_for_batches_of_datagrams_only() {
    a_pair_asks_for_wake_ups_only(Packets::Udp, false);
}

/// One step of a host and what it sent and asked for: datagrams and wake-ups.
fn step(hosts: &Hosts, host: usize) -> [u64; 2] {
    let counts = || {
        let link = hosts.links()[host];
        [link.datagrams_sent, link.datagram_calls]
    };
    let before = counts();
    [&hosts.primary, &hosts.secondary][host].step();
    let after = counts();
    [0, 1].map(|n| after[n] - before[n])
}

#[test]
fn a_batch_shares_one_wake_up() {
    let _turn = turn();
    let mut hosts = Hosts::new(Packets::Xdp, false);
    hosts.halt();
    for batch in [1, 8, KICK_FRAMES, 2 * KICK_FRAMES] {
        hosts.settle();
        let respond = |host: &mut Host| {
            host.look();
            (0..batch).for_each(|_| host.respond(1200));
        };
        respond(&mut hosts.primary);
        respond(&mut hosts.secondary);
        let received = hosts.links()[0].datagrams_received;
        let [sent, wake_ups] = step(&hosts, 1);
        println!("{batch} responses: {sent} datagrams, {wake_ups} wake-ups");
        assert!(sent >= batch.min(IN_FLIGHT_MIN), "{sent} of {batch}");
        assert!((1..=sent.div_ceil(KICK_FRAMES)).contains(&wake_ups));
        // None of them waits for what is sent next.
        let begun = Instant::now();
        while hosts.links()[0].datagrams_received < received + sent {
            hosts.primary.step();
            assert!(begun.elapsed() < PATIENCE, "{:?}", hosts.links());
        }
        hosts.settle();
        hosts.request(batch);
        let [sent, wake_ups] = step(&hosts, 0);
        println!("{batch} requests: {sent} datagrams, {wake_ups} wake-ups");
        assert!(
            sent > 0 && sent <= batch.div_ceil(8),
            "they share datagrams"
        );
        assert_eq!(wake_ups, 1);
    }
}
