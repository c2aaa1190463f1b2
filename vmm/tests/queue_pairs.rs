//! The demo guest on KVM with two queue pairs: it chooses its transmit queues itself, so frames cross from one worker
//! to the other.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

use colo_fastpath::nic::{Nic, SocketNic};
use colo_vmm::config::Config;
use colo_vmm::machine::{ClockJump, Events, Machine};

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0xc0, 0x10, 1];
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const GUEST: [u8; 4] = [10, 77, 0, 10];
/// Peers, by the last byte of their addresses.
const PEERS: std::ops::Range<u8> = 100..132;
const ECHO_PORT: u16 = 7;
const PATIENCE: Duration = Duration::from_secs(60);

struct Lab {
    machine: Machine,
    _events: Events,
    wires: Vec<UnixDatagram>,
}

fn lab(cmdline: &str) -> Lab {
    let text = format!(
        r#"
        [vm]
        name = "pairs"
        kernel = "builtin:demo"
        ram_mib = 64
        cmdline = "ip=10.77.0.10/24 {cmdline}"
        [net]
        tap = "none"
        mac = "52:54:00:c0:10:01"
        [host]
        shards = 2
        frame_slots = 512
        "#
    );
    let config = Config::parse(Path::new("pairs.toml"), &text).unwrap();
    let (mut nics, mut wires) = (Vec::<Box<dyn Nic>>::new(), Vec::new());
    for _ in 0..config.host.shards {
        let (nic, wire) = SocketNic::pair(1500).unwrap();
        wire.set_nonblocking(true).unwrap();
        nics.push(Box::new(nic));
        wires.push(wire);
    }
    let (machine, events) = Machine::create_stopped(&config, nics, Box::new(io::sink())).unwrap();
    machine.load(colo_guest_image::ELF).unwrap();
    machine.resume_vcpus().unwrap();
    Lab {
        machine,
        _events: events,
        wires,
    }
}

fn ethernet(kind: u16, packet: &[u8]) -> Vec<u8> {
    [&GUEST_MAC, &PEER_MAC, &kind.to_be_bytes()[..], packet].concat()
}

/// A datagram to the guest's echo port; its UDP checksum is left out.
fn request(peer: u8) -> Vec<u8> {
    let payload = [peer; 100];
    let mut ip = vec![
        0x45, 0, 0, 128, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 77, 0, peer,
    ];
    ip.extend(GUEST);
    let words = ip
        .chunks(2)
        .map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    ip[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    ip.extend([0x9c, peer]);
    ip.extend(ECHO_PORT.to_be_bytes());
    ip.extend([0, 108, 0, 0]);
    ip.extend(payload);
    ethernet(0x0800, &ip)
}

/// The answer to a question for a peer's hardware address.
fn arp_reply(question: &[u8]) -> Option<Vec<u8>> {
    let is_question = question.get(12..14)? == [8, 6] && question.get(20..22)? == [0, 1];
    let (asker, asked) = (question.get(22..32)?, question.get(38..42)?);
    let head = [0, 1, 8, 0, 6, 4, 0, 2];
    is_question.then(|| ethernet(0x0806, &[&head, &PEER_MAC[..], asked, asker].concat()))
}

/// The peer whose datagram this echoes.
fn echoed(frame: &[u8]) -> Option<u8> {
    let is_echo = frame.get(12..14)? == [8, 0] && frame.get(34..36)? == ECHO_PORT.to_be_bytes();
    let peer = *frame.get(33)?;
    let whole = frame.get(42..142)? == [peer; 100];
    (is_echo && whole).then_some(peer)
}

impl Lab {
    /// Waits until the machine says so.
    fn wait(&self, ready: impl Fn(&Machine) -> bool) {
        let patience = Instant::now() + PATIENCE;
        while !ready(&self.machine) {
            assert!(Instant::now() < patience, "{:?}", self.machine.control());
            std::thread::yield_now();
        }
    }

    /// Asks as each peer until it is answered.
    fn all_are_answered(&self) {
        let patience = Instant::now() + PATIENCE;
        let mut open: Vec<u8> = PEERS.collect();
        let mut ask_again = Instant::now();
        while !open.is_empty() {
            assert!(Instant::now() < patience, "no answer for {open:?}");
            if Instant::now() >= ask_again {
                for &peer in &open {
                    // The network does not know which worker owns a flow.
                    let wire = usize::from(peer) % self.wires.len();
                    let _ = self.wires[wire].send(&request(peer));
                }
                ask_again = Instant::now() + Duration::from_millis(500);
            }
            let mut frame = [0; 2048];
            for wire in &self.wires {
                while let Ok(len) = wire.recv(&mut frame) {
                    if let Some(reply) = arp_reply(&frame[..len]) {
                        wire.send(&reply).unwrap();
                    }
                    if let Some(peer) = echoed(&frame[..len]) {
                        open.retain(|&other| other != peer);
                    }
                }
            }
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_guest_with_two_pairs_uses_both() {
    let lab = lab("");
    lab.wait(|machine| machine.control().commands == 1);
    lab.all_are_answered();
    // Each pair has its doorbell; a worker counts when it has slept.
    lab.wait(|machine| {
        machine
            .workers()
            .iter()
            .all(|worker| worker.stats().guest_kicks > 0)
    });
    let control = lab.machine.control();
    assert_eq!((control.commands, control.refused), (1, 0));
    for worker in lab.machine.workers() {
        let stats = worker.stats();
        println!("{stats:?}");
        assert!(stats.guest_tx_frames > 0 && stats.guest_rx_frames > 0);
        assert!(stats.nic_tx_frames > 0, "flows have both owners");
    }
}

#[test]
fn a_guest_that_uses_one_pair_of_two_is_served() {
    let lab = lab("pairs=1");
    lab.all_are_answered();
    assert_eq!(lab.machine.control().commands, 0);
    let stats = lab.machine.workers()[1].stats();
    assert_eq!(
        (stats.guest_tx_frames, stats.guest_rx_frames),
        (0, 0),
        "{stats:?}"
    );
    assert!(stats.nic_tx_frames > 0, "it owns flows all the same");
}

#[test]
fn a_copy_of_a_guest_with_two_pairs_goes_on() {
    let (first, second) = (lab(""), lab(""));
    first.wait(|machine| machine.control().commands == 1);
    first.all_are_answered();
    for lab in [&first, &second] {
        lab.machine.pause_vcpus().unwrap();
        lab.machine.quiesce_workers().unwrap();
    }
    let devices = first.machine.save_devices().unwrap();
    let states = first.machine.save_vcpus().unwrap();
    let mut page = [0; 4096];
    for number in 0..first.machine.ram().page_count() {
        first
            .machine
            .ram()
            .copy_page_out(number, &mut page)
            .unwrap();
        second.machine.ram().write_page(number, &page).unwrap();
    }
    second
        .machine
        .restore_vcpus(
            &states,
            ClockJump::SinceCapture {
                begun: std::time::Instant::now(),
            },
        )
        .unwrap();
    second.machine.check_devices(&devices).unwrap();
    second.machine.restore_devices(&devices).unwrap();
    second.machine.resume_workers().unwrap();
    second.machine.resume_vcpus().unwrap();
    let before = second.machine.workers()[1].stats();
    second.all_are_answered();
    let after = second.machine.workers()[1].stats();
    assert!(after.guest_tx_frames > before.guest_tx_frames);
    assert!(after.guest_rx_frames > before.guest_rx_frames);
}
