//! A link between the hosts that loses packets of their packet channel, in both directions.
//!
//! Invariants: TCP and what the hosts ask each other about their addresses get through, so that what a test sees of loss is
//! the packet channel's work; which packets are lost depends on their number only.
//!
//! Functions panic with what went wrong, as tests do.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use colo_lab::netns::NetError;
use colo_lab::pair::Settings;
use colo_lab::topology::{Host, Topology};

use crate::wire::Wire;

const HOSTS: [Host; 2] = [Host::A, Host::B];
/// The switch's end of each host's `link0`.
const ENDS: [&str; 2] = ["link-a", "link-b"];
/// How soon the end of a test is noticed.
const PATIENCE: Duration = Duration::from_millis(100);
/// The link's EtherType.
const LINK_TYPE: [u8; 2] = [0x88, 0xb5];

/// The link, until it is dropped.
#[derive(Debug)]
pub struct Lossy {
    is_over: Arc<AtomicBool>,
    lost: [Arc<AtomicU64>; 2],
    carriers: Vec<JoinHandle<Result<(), NetError>>>,
}

impl Lossy {
    /// The network of `settings`, whose link loses one packet in `every`.
    pub fn link(settings: &Settings, every: u64) -> (Topology, Self) {
        let topology = settings.topology().expect("a network");
        let a = topology.host(Host::A);
        a.batch("link del link0\n").expect("take the link");
        for (host, end) in HOSTS.into_iter().zip(ENDS) {
            lay(&topology, host, end);
        }
        let mut lossy = Self {
            is_over: Arc::default(),
            lost: [Arc::default(), Arc::default()],
            carriers: Vec::new(),
        };
        for (n, (from, to)) in [(ENDS[0], ENDS[1]), (ENDS[1], ENDS[0])]
            .into_iter()
            .enumerate()
        {
            let (is_over, lost) = (lossy.is_over.clone(), lossy.lost[n].clone());
            let body = move || carry(from, to, every, &is_over, &lost);
            let carrier = topology.switch.spawn(from, body);
            lossy.carriers.push(carrier.expect("start a thread"));
        }
        (topology, lossy)
    }

    /// Packets lost so far of what each host sent.
    pub fn lost(&self) -> [u64; 2] {
        [0, 1].map(|n| self.lost[n].load(Ordering::Relaxed))
    }
}

impl Drop for Lossy {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for carrier in self.carriers.drain(..) {
            let carried = carrier.join();
            assert!(std::thread::panicking() || matches!(carried, Ok(Ok(()))));
        }
    }
}

/// Puts `link0` into a host, at whose other end is the test. Frames come to it as they would be on a cable.
fn lay(topology: &Topology, host: Host, end: &str) {
    let far = topology.host(host);
    let lines = format!(
        "link add {end} mtu 2000 type veth peer name link0 mtu 2000 netns {}\nlink set {end} up\n",
        far.name()
    );
    topology.switch.batch(&lines).expect("lay a cable");
    let address = host.link_address();
    let lines = format!("address add {address}/30 dev link0\nlink set link0 up\n");
    far.batch(&lines).expect("address the link");
    let mut command = far.command("ethtool");
    let status = command.args(["-K", "link0", "tx", "off"]).status();
    assert!(
        status.expect("ethtool runs").success(),
        "checksums of link0"
    );
}

/// A frame of the packet channel: of the link's type, or UDP over IPv4.
fn is_packet(frame: &[u8]) -> bool {
    let kind = frame.get(12..14);
    kind == Some(&LINK_TYPE) || kind == Some(&[0x08, 0x00]) && frame.get(23) == Some(&17)
}

/// The next of a row of numbers that look random (SplitMix64).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn carry(from: &str, to: &str, every: u64, is_over: &AtomicBool, lost: &AtomicU64) {
    let [from, to] = [from, to].map(|end| Wire::open(end).expect("open an end of the link"));
    let mut state = 1;
    while !is_over.load(Ordering::Relaxed) {
        // Both fail only when an end is down.
        let Ok(Some(frame)) = from.receive(PATIENCE) else {
            continue;
        };
        if is_packet(&frame) && next(&mut state).is_multiple_of(every) {
            lost.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        to.send(&frame).ok();
    }
}
