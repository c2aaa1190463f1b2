//! What the two roles of a pair, with the link between them, ask of the system while packets flow: no memory, no lock, and no
//! system call but those that send and receive datagrams, call the guest, let others run and look who that is, and look now
//! and then whether the TCP connection still is; where one NIC carries the guest's packets and the link's, those that wake it
//! up send both. The kernel's count and the worker's own are of the same moments, so they agree to the call.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]
#![allow(clippy::disallowed_types, reason = "between this test and a worker")]

mod counting;
mod mock_hosts;

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use colo_compare::HEADER_MAX;
use colo_fastpath::link::{LinkStats, Packets};
use colo_fastpath::lock;
use colo_fastpath::pair::{PrimaryRole, SecondaryRole};
use colo_fastpath::worker::{Command, Edge, Role, WorkerHandle};
use counting::{allocations, can_count, count, stop_counting, turn};
use mock_hosts::{Host, Hosts, Wiring};
use perf_event::Counter;

const PATIENCE: Duration = Duration::from_secs(20);
const WARM_UP: u64 = 1000;
const COUNTED: u64 = 5000;
/// While datagrams carry everything, the TCP connection is looked at this often at most.
const STREAM_LOOKS_US: u64 = 500;
/// With one call the kernel sends so many frames at least, if there are as many.
const KICK_FRAMES: u64 = 32;
/// On a machine that is so slow that datagrams count as lost, so many are sent all the same.
const IN_FLIGHT_MIN: u64 = 16;
/// To leave a processor takes so many calls.
const CALLS_PER_MOVE: u64 = 3;

/// What a worker says that it has asked of the system.
#[derive(Debug, Clone, Copy)]
struct Asked {
    /// Calls of the guest, turns in which others were let run, and looks how often they did.
    guest_calls: u64,
    yields: u64,
    looks_around: u64,
    link: LinkStats,
    nic: Wakes,
    /// To ask the NIC takes some itself.
    locks: u64,
    at: Instant,
}

/// How the guest's NIC was told of what it is to send.
#[derive(Debug, Clone, Copy, Default)]
struct Wakes {
    frames: u64,
    kicks: u64,
    in_vain: u64,
}

impl Wakes {
    fn of(edge: &Edge) -> Self {
        let counters = edge.nic_report().counters;
        let count = |name| counters.get(name).copied().unwrap_or_default();
        Self {
            frames: edge.stats().snapshot().nic_tx_frames,
            kicks: count("tx_kicks"),
            in_vain: count("tx_kicks_in_vain"),
        }
    }
}

impl Asked {
    fn of(edge: &Edge, role: &mut dyn Role) -> Self {
        let stats = edge.stats().snapshot();
        let role: &mut dyn Any = role;
        let link = match role.downcast_mut::<PrimaryRole>() {
            Some(role) => role.report().link,
            None => role.downcast_mut::<SecondaryRole>().unwrap().report().link,
        };
        Self {
            guest_calls: stats.guest_calls,
            yields: stats.yields,
            looks_around: stats.looks_around + CALLS_PER_MOVE * stats.moves,
            link,
            nic: Wakes::of(edge),
            locks: lock::taken(),
            at: Instant::now(),
        }
    }
}

/// Runs `task` on the worker's thread, which wakes nobody with the answer: that is a system call, or none.
fn run_quietly<T: Send + 'static>(
    worker: &WorkerHandle,
    task: impl FnOnce(&mut Edge, &mut dyn Role) -> T + Send + 'static,
) -> T {
    let answer = Arc::new((AtomicBool::new(false), Mutex::new(None)));
    let theirs = answer.clone();
    let run = Command::Run(Box::new(move |edge, role| {
        let result = task(edge, role);
        *theirs.1.lock().unwrap() = Some(result);
        theirs.0.store(true, Ordering::Release);
    }));
    worker.send(run).unwrap();
    while !answer.0.load(Ordering::Acquire) {
        thread::yield_now();
    }
    answer.1.lock().unwrap().take().unwrap()
}

/// From one moment of the worker on: the kernel's count, and the worker's own.
fn begin(worker: &WorkerHandle) -> (Counter, Asked) {
    let mut counter = count(worker);
    run_quietly(worker, |edge, role| {
        let asked = Asked::of(edge, role);
        counter.enable().unwrap();
        (counter, asked)
    })
}

/// Up to one moment. The call that ends the kernel's count is in it.
fn end(worker: &WorkerHandle, mut counter: Counter) -> (u64, Asked) {
    run_quietly(worker, move |edge, role| {
        counter.disable().unwrap();
        let (system_calls, locks) = (counter.read().unwrap() - 1, lock::taken());
        let asked = Asked::of(edge, role);
        (system_calls, Asked { locks, ..asked })
    })
}

/// Exchanges packets and gives what both workers asked for while that lasted: the kernel's count, the worker's before and after.
fn counted(hosts: &mut Hosts) -> [(u64, Asked, Asked); 2] {
    let begun = [&hosts.primary, &hosts.secondary].map(|host| begin(&host.worker));
    let allocated = allocations();
    hosts.exchange(COUNTED);
    assert_eq!(allocations() - allocated, 0);
    let workers = [&hosts.primary.worker, &hosts.secondary.worker];
    let mut workers = workers.into_iter();
    begun.map(|(counter, before)| {
        let worker = workers.next().unwrap();
        let (system_calls, after) = end(worker, counter);
        stop_counting(worker);
        (system_calls, before, after)
    })
}

fn a_pair_asks_for_wake_ups_only(wiring: Wiring, digests: bool) {
    if !can_count() {
        return;
    }
    let _turn = turn();
    let mut hosts = Hosts::new(wiring, digests);
    hosts.exchange(WARM_UP);
    let both = counted(&mut hosts);
    // Of both hosts: after each there is a question over TCP, which either end reads or answers.
    let timeouts = both.map(|(_, before, after)| after.link.timeouts - before.link.timeouts);
    let questions: u64 = timeouts.iter().sum();
    for (system_calls, before, after) in both {
        let guest_calls = after.guest_calls - before.guest_calls;
        let yields = after.yields - before.yields;
        let looks_around = after.looks_around - before.looks_around;
        let elapsed_us = (after.at - before.at).as_micros() as u64;
        let of_link = |of: fn(&LinkStats) -> u64| of(&after.link) - of(&before.link);
        let datagram_calls = of_link(|link| link.datagram_calls);
        let stream_calls = of_link(|link| link.stream_calls);
        let sent = of_link(|link| link.datagrams_sent);
        let asked = of_link(|link| link.wake_ups_asked);
        let in_vain = of_link(|link| link.wake_ups_in_vain);
        let frames = after.nic.frames - before.nic.frames;
        let kicks = after.nic.kicks - before.nic.kicks;
        let kicks_in_vain = after.nic.in_vain - before.nic.in_vain;
        let told = format!(
            "{system_calls} system calls: {datagram_calls} ({asked} asked for, {in_vain} in vain) for {sent} datagrams sent \
             and {} received, {kicks} ({kicks_in_vain} in vain) of the NIC for {frames} frames of the guest's, {stream_calls} on \
             TCP with {questions} questions in {elapsed_us} us, {guest_calls} of the guest, {yields} yields, {looks_around} around",
            of_link(|link| link.datagrams_received)
        );
        println!("{wiring:?}: {told}");
        let expected = datagram_calls + kicks + stream_calls + guest_calls + yields + looks_around;
        assert_eq!(system_calls, expected, "{told}");
        assert_eq!(after.locks, before.locks, "{told}");
        let looks = elapsed_us / STREAM_LOOKS_US + 1;
        assert!(stream_calls <= looks + 2 * questions, "{told}");
        assert!(guest_calls < 10, "{told}");
        assert!(sent > COUNTED / 10, "{told}");
        if wiring == Wiring::OneNic {
            // All that leaves, leaves by the guest's NIC. A secondary has nothing else to send.
            assert_eq!((datagram_calls, asked), (0, 0), "{told}");
            assert!(
                kicks > 0 && kicks - kicks_in_vain <= sent + frames,
                "{told}"
            );
        }
        if wiring == Wiring::Link(Packets::Xdp) {
            // Each is a wake-up that the ring asked for, which it does for a datagram that travels alone, too: where the
            // kernel copies, it sends in this call and at no other time. What batches take is in the test below.
            assert_eq!(datagram_calls, asked, "{told}");
            assert!(datagram_calls - in_vain <= sent, "{told}");
        }
    }
}

#[test]
fn a_pair_over_af_xdp_asks_for_wake_ups_only() {
    a_pair_asks_for_wake_ups_only(Wiring::Link(Packets::Xdp), false);
}

#[test]
fn a_pair_over_af_xdp_that_compares_digests_asks_for_wake_ups_only() {
    a_pair_asks_for_wake_ups_only(Wiring::Link(Packets::Xdp), true);
}

#[test]
fn a_pair_over_udp_asks_for_batches_of_datagrams_only() {
    a_pair_asks_for_wake_ups_only(Wiring::Link(Packets::Udp), false);
}

#[test]
fn a_pair_with_one_nic_for_guest_and_link_asks_for_wake_ups_only() {
    a_pair_asks_for_wake_ups_only(Wiring::OneNic, false);
}

#[test]
fn a_pair_with_one_nic_that_compares_digests_asks_for_wake_ups_only() {
    a_pair_asks_for_wake_ups_only(Wiring::OneNic, true);
}

/// One step of a host and what it sent and asked for: datagrams and wake-ups.
fn step(hosts: &Hosts, host: usize) -> [u64; 2] {
    let counts = || {
        let link = hosts.links()[host];
        let worker = &[&hosts.primary, &hosts.secondary][host].worker;
        let kicks = worker.execute(|edge, _| Wakes::of(edge).kicks).unwrap();
        [
            link.datagrams_sent,
            link.datagram_calls + kicks,
            link.wake_ups_asked + kicks,
        ]
    };
    let before = counts();
    [&hosts.primary, &hosts.secondary][host].step();
    let after = counts();
    let [sent, wake_ups, asked] = [0, 1, 2].map(|n| after[n] - before[n]);
    assert_eq!(wake_ups, asked);
    [sent, wake_ups]
}

#[test]
fn a_batch_shares_one_wake_up() {
    let _turn = turn();
    a_batch_shares_one(Hosts::new(Wiring::Link(Packets::Xdp), false));
}

#[test]
fn a_batch_through_the_guests_nic_shares_one_wake_up() {
    let _turn = turn();
    a_batch_shares_one(Hosts::new(Wiring::OneNic, false));
}

fn a_batch_shares_one(mut hosts: Hosts) {
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
        let begun = Instant::now();
        // What comes over a cable may not be there yet.
        let [sent, wake_ups] = loop {
            let stepped = step(&hosts, 0);
            if stepped != [0, 0] {
                break stepped;
            }
            assert!(begun.elapsed() < PATIENCE, "{:?}", hosts.links());
        };
        println!("{batch} requests: {sent} datagrams, {wake_ups} wake-ups");
        assert!(
            sent > 0 && sent <= batch.div_ceil(8),
            "they share datagrams"
        );
        assert_eq!(wake_ups, 1);
    }
}

/// What became of the guest's bytes in a worker: sent in place, copied because they are short, because they were compared by
/// digests, because a secondary works on copies, and all that were copied.
fn fates(worker: &WorkerHandle) -> [u64; 5] {
    let stats = worker.stats();
    let causes = [
        stats.copied_small_bytes,
        stats.copied_digested_bytes,
        stats.copied_role_bytes,
    ];
    let others = [
        stats.copied_scattered_bytes,
        stats.copied_pressure_bytes,
        stats.copied_compared_bytes,
        stats.copied_undecided_bytes,
        stats.copied_gathered_bytes,
        stats.copied_read_bytes,
        stats.copied_crossing_bytes,
    ];
    let copied = causes.iter().chain(&others).sum();
    let [small, digested, role] = causes;
    [stats.tx_in_place_bytes, small, digested, role, copied]
}

/// Of each two responses one is short; of the long one the first bytes are host memory, whatever becomes of the rest.
#[test]
fn each_byte_of_a_response_is_counted_once_and_by_its_cause() {
    const SHORT: u64 = 42 + 64;
    const LONG: u64 = 42 + 1200;
    let _turn = turn();
    for digests in [false, true] {
        let mut hosts = Hosts::new(Wiring::Link(Packets::Xdp), digests);
        let workers = [&hosts.primary, &hosts.secondary].map(|host| host.worker.clone());
        hosts.exchange(WARM_UP);
        let all_sent = |worker: &WorkerHandle, frames: u64| {
            let begun = Instant::now();
            while worker.stats().nic_tx_frames < frames {
                assert!(begun.elapsed() < PATIENCE, "{:?}", worker.stats());
                thread::yield_now();
            }
        };
        all_sent(&workers[0], WARM_UP);
        let before = workers.each_ref().map(fates);
        hosts.exchange(COUNTED);
        all_sent(&workers[0], WARM_UP + COUNTED);
        let after = workers.each_ref().map(fates);
        let [primary, secondary] = [0, 1].map(|host: usize| {
            let grown = |n: usize| after[host][n] - before[host][n];
            [0, 1, 2, 3, 4].map(grown)
        });
        let (short, long) = (COUNTED / 2 * SHORT, COUNTED / 2 * LONG);
        let rest = COUNTED / 2 * (LONG - HEADER_MAX as u64);
        let [in_place, small, digested, role, copied] = primary;
        assert_eq!((small, role), (short, 0), "digests: {digests}");
        assert_eq!(in_place + copied, short + rest, "digests: {digests}");
        // Which of both guests' frames comes first is chance, and so is where a few of them are compared.
        let usual = if digests { digested } else { in_place };
        assert!(usual > rest / 2, "digests: {digests}: {primary:?}");
        let all = short + long;
        assert_eq!(secondary, [0, 0, 0, all, all], "digests: {digests}");
    }
}
