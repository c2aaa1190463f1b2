//! What the packet loop asks of the system while packets flow: no memory, no lock, and no system call but those that
//! wake the NIC or call the guest.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

mod counting;
mod mock_pair;
mod mock_shards;
mod mock_solo;

use std::net::UdpSocket;

use colo_bpf::Mac;
use colo_fastpath::frame::TxMode;
use colo_fastpath::lock;
use colo_fastpath::nic::{Filter, Nic, Sink, XdpNic, XdpNicConfig};

use colo_fastpath::stages::Stage;
use colo_fastpath::stats::WorkerSnapshot;
use colo_fastpath::worker::WorkerHandle;
use counting::{allocations, can_count, count, stop_counting, turn};
use mock_shards::MockShards;
use mock_solo::MockSolo;

use mock_pair::{GUEST_MAC, MockPair, datagram};

const WARM_UP: u64 = 3000;
const COUNTED: u64 = 20_000;
/// Datagrams for a guest on their way at a time.
const FLYING: u64 = 32;

/// What the worker did while packets flowed.
#[derive(Debug)]
struct Costs {
    allocations: u64,
    locks: u64,
    system_calls: u64,
    nic_kicks: u64,
    guest_calls: u64,
    /// Turns without work, in which others were let run.
    yields: u64,
    sent: u64,
}

/// Locks that these workers have taken so far.
fn locks<'a>(workers: impl IntoIterator<Item = &'a WorkerHandle>) -> u64 {
    let taken = |worker: &WorkerHandle| worker.execute(|_, _| lock::taken()).unwrap();
    workers.into_iter().map(taken).sum()
}

fn nic_kicks(pair: &MockPair) -> u64 {
    let report = pair.worker.execute(|edge, _| edge.nic_report()).unwrap();
    report.counters.get("tx_kicks").copied().unwrap_or(0)
}

/// Sends so many frames and waits until all are released and all buffers came back.
fn flow(pair: &mut MockPair, from: u64, frames: u64) {
    for n in from..from + frames {
        let payload = if n % 2 == 0 { 64 } else { 1200 };
        pair.send(&datagram(n, payload));
    }
    pair.svm.wait_idle();
    pair.pvm.wait_idle();
}

fn costs_with(nic: Box<dyn Nic>) -> Costs {
    let _turn = turn();
    let mut pair = MockPair::new(nic, TxMode::Twin);
    flow(&mut pair, 0, WARM_UP);
    let mut counter = count(&pair.worker);
    let kicks = nic_kicks(&pair);
    let before = pair.worker.stats();
    // These are what this process asks of the worker, not what packets cost.
    let taken = locks([&pair.worker]);
    let begun = allocations();
    counter.enable().unwrap();
    flow(&mut pair, WARM_UP, COUNTED);
    counter.disable().unwrap();
    let allocations = allocations() - begun;
    let locks = locks([&pair.worker]) - taken;
    let after = pair.worker.stats();
    let costs = Costs {
        allocations,
        locks,
        system_calls: counter.read().unwrap(),
        nic_kicks: nic_kicks(&pair) - kicks,
        guest_calls: after.guest_calls - before.guest_calls,
        yields: after.yields - before.yields,
        sent: after.nic_tx_frames - before.nic_tx_frames,
    };
    let report = pair.report();
    assert_eq!(report.checkpoints, 0, "{report:?}");
    stop_counting(&pair.worker);
    println!("{costs:?}");
    costs
}

fn ip(line: &str) {
    let status = std::process::Command::new("ip")
        .args(line.split(' '))
        .status();
    assert!(status.unwrap().success(), "ip {line}");
}

/// Runs in a thread whose network namespace, with a veth pair in it, dies with it.
fn on_veth(test: impl FnOnce() + Send + 'static) {
    let run = || {
        // SAFETY: unshare changes only the calling thread, which nothing else shares.
        let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(unshared, 0, "needs root");
        for line in [
            "link add near type veth peer name far",
            // The host says nothing by itself.
            "link set near addrgenmode none",
            "link set far addrgenmode none",
            "link set near up",
            "link set far up",
        ] {
            ip(line);
        }
        test();
    };
    std::thread::spawn(run).join().unwrap();
}

/// Two shards of a guest that uses one pair of queues: half of what it sends and of what it gets
/// crosses from one to the other.
#[test]
fn crossing_between_shards_asks_nothing_of_the_system() {
    if !can_count() {
        return;
    }
    let _turn = turn();
    let mut bench = MockShards::new();
    bench.exchange(WARM_UP);
    let mut counters: Vec<_> = bench.workers.iter().map(count).collect();
    let sum = |bench: &MockShards, of: fn(&WorkerSnapshot) -> u64| -> u64 {
        bench.workers.iter().map(|w| of(&w.stats())).sum()
    };
    let calls = sum(&bench, |s| s.guest_calls);
    let yields = sum(&bench, |s| s.yields);
    let crossed = sum(&bench, |s| s.crossed_in_frames);
    let taken = locks(&bench.workers);
    let begun = allocations();
    for counter in &mut counters {
        counter.enable().unwrap();
    }
    bench.exchange(COUNTED);
    for counter in &mut counters {
        counter.disable().unwrap();
    }
    let allocations = allocations() - begun;
    let locks = locks(&bench.workers) - taken;
    let calls = sum(&bench, |s| s.guest_calls) - calls;
    let yields = sum(&bench, |s| s.yields) - yields;
    let crossed = sum(&bench, |s| s.crossed_in_frames) - crossed;
    let system_calls: u64 = counters.iter_mut().map(|c| c.read().unwrap()).sum();
    println!("{crossed} crossed, {system_calls} system calls, {calls} calls of the guest");
    bench.workers.iter().for_each(stop_counting);
    assert_eq!((allocations, locks), (0, 0));
    assert!(system_calls <= calls + yields, "{calls} {yields}");
    assert!(calls < 10, "{calls}");
    // Both ways, about half of them.
    assert!(crossed > COUNTED * 3 / 4, "{crossed}");
}

#[test]
fn comparing_asks_nothing_of_the_system() {
    if !can_count() {
        return;
    }
    let costs = costs_with(Box::new(Sink::new(1500)));
    assert_eq!(costs.sent, COUNTED);
    assert_eq!((costs.allocations, costs.locks), (0, 0), "{costs:?}");
    let expected = costs.guest_calls + costs.yields;
    assert!(costs.system_calls <= expected, "{costs:?}");
    assert!(costs.guest_calls < 10, "{costs:?}");
}

#[test]
fn sending_over_af_xdp_asks_for_wake_ups_only() {
    if !can_count() {
        return;
    }
    on_veth(|| {
        let mac: Mac = GUEST_MAC;
        let config = XdpNicConfig::new("near", mac, 1500, Filter::Guest(mac));
        let costs = costs_with(Box::new(XdpNic::open(config).unwrap()));
        assert_eq!((costs.allocations, costs.locks), (0, 0), "{costs:?}");
        assert!(costs.sent > COUNTED / 2, "{costs:?}");
        let wake_ups = costs.nic_kicks + costs.guest_calls + costs.yields;
        assert!(costs.system_calls <= wake_ups, "{costs:?}");
        // A batch shares one.
        assert!(costs.nic_kicks < costs.sent, "{costs:?}");
    });
}

/// The guest's NIC receives, and the stages are timed.
#[test]
fn receiving_over_af_xdp_asks_nothing_of_the_system() {
    if !can_count() {
        return;
    }
    on_veth(|| {
        let _turn = turn();
        let mac: Mac = GUEST_MAC;
        let config = XdpNicConfig::new("near", mac, 1500, Filter::Guest(mac));
        let mut guest = MockSolo::new(Box::new(XdpNic::open(config).unwrap()));
        let station = Station::on_far();
        guest_receives(&mut guest, &station, WARM_UP);
        let worker = guest.worker.clone();
        let mut counter = count(&worker);
        let before = worker.stats();
        let taken = locks([&worker]);
        let begun = allocations();
        counter.enable().unwrap();
        guest_receives(&mut guest, &station, COUNTED);
        counter.disable().unwrap();
        let allocations = allocations() - begun;
        let locks = locks([&worker]) - taken;
        let (after, system_calls) = (worker.stats(), counter.read().unwrap());
        stop_counting(&worker);
        let delivered = after.guest_rx_frames - before.guest_rx_frames;
        let calls = after.guest_calls - before.guest_calls;
        let yields = after.yields - before.yields;
        println!(
            "{delivered} delivered, {system_calls} system calls, {calls} calls, {yields} yields"
        );
        assert_eq!((delivered, allocations, locks), (COUNTED, 0, 0));
        assert!(system_calls <= calls + yields, "{calls} {yields}");
        assert!(calls < 10, "{calls}");
        let timed = worker.execute(|edge, _| {
            let stages = edge.stages().unwrap();
            stages.histogram(Stage::NicToGuest).len()
        });
        assert!(timed.unwrap() >= COUNTED);
    });
}

/// So many frames come, a few at a time.
fn guest_receives(guest: &mut MockSolo, station: &Station, frames: u64) {
    let mut sent = guest.received;
    let until = sent + frames;
    while guest.received < until {
        if sent < until && sent - guest.received < FLYING {
            station.say(sent);
            sent += 1;
        }
        guest.look();
    }
}

/// Says datagrams to the guest from the far end.
struct Station(UdpSocket);

impl Station {
    fn on_far() -> Self {
        let to: Vec<_> = GUEST_MAC.iter().map(|byte| format!("{byte:02x}")).collect();
        ip("addr add 10.0.0.2/24 dev far");
        ip(&format!(
            "neigh add 10.0.0.1 lladdr {} dev far",
            to.join(":")
        ));
        Self(UdpSocket::bind("10.0.0.2:0").unwrap())
    }

    fn say(&self, n: u64) {
        let payload = [n as u8; 1200];
        let len = if n.is_multiple_of(2) { 64 } else { 1200 };
        self.0.send_to(&payload[..len], "10.0.0.1:7").unwrap();
    }
}
