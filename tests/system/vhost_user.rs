//! `colo vhost` with DPDK's virtio driver as its guest, and with one of QEMU's.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use colo_lab::comparator::QEMU;
use colo_lab::netns::Netns;
use colo_lab::process::Process;
use colo_lab::testpmd::{End, HugePages, PROGRAM, Testpmd, TestpmdOptions};
use colo_tests::bench::Bench;
use colo_tests::wire::Wire;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);
const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0xc0, 0x77, 1];
const WIRE_MAC: [u8; 6] = [0x52, 0x54, 0, 0xc0, 0x77, 2];
const TAP: &str = "tap0";
/// A veth port and its other end.
const PORT: &str = "port0";
const FAR: &str = "far0";
/// Chains that a queue of testpmd holds.
const QUEUE: u64 = 256;
/// An EtherType that nothing else here speaks (IEEE 802: local experiments).
const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];

/// `colo vhost` in a namespace. The turn ends last.
struct Port {
    colo: Process,
    netns: Netns,
    socket: PathBuf,
    bench: Bench,
}

impl Port {
    fn start(poll: &str, programs: &[&str]) -> Option<Self> {
        Self::start_on(&format!("tap = \"{TAP}\""), poll, programs)
    }

    /// On a veth port, past the kernel's network stack.
    fn start_on_xdp(poll: &str, programs: &[&str]) -> Option<Self> {
        Self::start_on(&format!("interface = \"{PORT}\""), poll, programs)
    }

    fn start_on(nic: &str, poll: &str, programs: &[&str]) -> Option<Self> {
        let bench = Bench::new(programs)?;
        let netns = Netns::create(&format!("colo-vhost-{}", std::process::id())).unwrap();
        // Nothing but what the test sends goes through the device.
        netns
            .set_sysctl("ipv6/conf/default/disable_ipv6", "1")
            .unwrap();
        netns
            .batch(&format!(
                "link add {PORT} type veth peer name {FAR}\nlink set {PORT} up\nlink set {FAR} up"
            ))
            .unwrap();
        let (config, status) = (
            bench.dir().join("port.toml"),
            bench.dir().join("status.sock"),
        );
        let text = format!(
            "[net]\nvhost_user = \"guest.sock\"\n{nic}\nmac = \"52:54:00:c0:77:01\"\n\
             [host]\npoll = \"{poll}\"\nstatus = \"status.sock\"\n"
        );
        std::fs::write(&config, text).unwrap();
        let mut command: Command = netns.command(bench.colo());
        command.arg("vhost").arg(&config);
        let mut colo = Process::spawn("colo", command, bench.dir())
            .unwrap()
            .with_status(&status);
        colo.wait_status("listening", PATIENCE, |_| true).unwrap();
        let socket = bench.dir().join("guest.sock");
        Some(Self {
            bench,
            netns,
            colo,
            socket,
        })
    }

    fn testpmd(&self, mode: &'static str, huge_pages: bool) -> Testpmd {
        self.testpmd_of(mode, 300, huge_pages)
    }

    fn testpmd_of(&self, mode: &'static str, frame_bytes: usize, huge_pages: bool) -> Testpmd {
        let options = TestpmdOptions {
            name: format!("colo-vhost-{}-{mode}", std::process::id()),
            end: End::Driver,
            sockets: vec![self.socket.clone()],
            mode,
            frame_bytes,
            cpus: [0, 0],
            huge_pages,
            device_arguments: "mac=52:54:00:c0:77:01".to_owned(),
        };
        let mut testpmd = Testpmd::start(&options, self.bench.dir()).unwrap();
        testpmd.wait_forwarding(PATIENCE).unwrap();
        testpmd
    }

    fn wait(&mut self, awaited: &str, condition: impl FnMut(&Value) -> bool) -> Value {
        self.colo.wait_status(awaited, PATIENCE, condition).unwrap()
    }

    fn wire(&self) -> Wire {
        self.netns.run(|| Wire::open(TAP).unwrap()).unwrap()
    }
}

fn number(document: &Value, path: &str) -> u64 {
    document.pointer(path).and_then(Value::as_u64).unwrap()
}

/// Sends frame after frame until the guest's side is awake and one has come back; then all of
/// `count` go to the guest and come back as they were.
fn echo(wire: &Wire, count: u32) {
    let deadline = Instant::now() + PATIENCE;
    wire.send(&probe(u32::MAX)).unwrap();
    while wire.receive(Duration::from_millis(100)).unwrap().is_none() {
        assert!(Instant::now() < deadline, "nothing comes back");
        wire.send(&probe(u32::MAX)).unwrap();
    }
    for number in 0..count {
        let frame = probe(number);
        wire.send(&frame).unwrap();
        loop {
            let back = wire
                .receive(PATIENCE)
                .unwrap()
                .expect("a frame that comes back");
            if back == frame {
                break;
            }
            assert_eq!(back, probe(u32::MAX), "frame {number}");
        }
    }
}

/// Frame `number` of many lengths and contents.
fn probe(number: u32) -> Vec<u8> {
    let mut frame = [&GUEST_MAC[..], &WIRE_MAC[..], &ETHER_TYPE[..]].concat();
    frame.extend_from_slice(&number.to_be_bytes());
    let len = 60 + (number as usize * 37) % 1455;
    let fill = (frame.len()..len).map(|at| (at as u32 ^ number).to_le_bytes()[0]);
    frame.extend(fill.collect::<Vec<u8>>());
    frame
}

#[test]
fn what_testpmd_sends_is_on_the_wire_and_counted() {
    let Some(mut port) = Port::start("adaptive", &[PROGRAM]) else {
        return;
    };
    let wire = port.wire();
    let testpmd = port.testpmd("txonly", false);
    for _ in 0..100 {
        let frame = wire
            .receive(PATIENCE)
            .unwrap()
            .expect("a frame of testpmd's");
        assert_eq!(frame.len(), 300);
        assert_eq!(&frame[6..14], [&GUEST_MAC[..], &[8, 0]].concat());
        // txonly: UDP between the addresses for benchmarks (RFC 2544), port 9 to port 9.
        assert_eq!(frame[23], 17);
        assert_eq!(&frame[26..38], [198, 18, 0, 1, 198, 18, 0, 2, 0, 9, 0, 9]);
        assert!(frame[42..].iter().all(|&byte| byte == 0));
    }
    let totals = testpmd.stop(PATIENCE).unwrap();
    let [total] = totals[..] else {
        panic!("{totals:?}");
    };
    let status = port.wait("rid of its guest", |s| s["guest"] == "absent");
    let taken = number(&status, "/worker/guest_tx_frames");
    // What was still in the ring when testpmd took the ring away is testpmd's.
    let sent = total.tx_packets;
    assert!(taken <= sent && sent - taken <= QUEUE, "{taken} of {sent}");
    assert!(taken > 100);
    assert_eq!(number(&status, "/worker/guest_tx_bytes"), 300 * taken);
    for counter in ["ring_errors", "guest_tx_bad"] {
        assert_eq!(number(&status, &format!("/worker/{counter}")), 0);
    }
    assert_eq!(number(&status, "/vhost_user/refused"), 0);
}

#[test]
fn over_af_xdp_what_lies_in_memory_of_testpmds_own_is_copied_and_counted() {
    const FRAME_BYTES: usize = 1400;
    let Some(mut port) = Port::start_on_xdp("adaptive", &[PROGRAM]) else {
        return;
    };
    let wire = port.netns.run(|| Wire::open(FAR).unwrap()).unwrap();
    let testpmd = port.testpmd_of("txonly", FRAME_BYTES, false);
    for _ in 0..100 {
        let frame = wire
            .receive(PATIENCE)
            .unwrap()
            .expect("a frame of testpmd's");
        assert_eq!(frame.len(), FRAME_BYTES);
    }
    testpmd.stop(PATIENCE).unwrap();
    let status = port.wait("rid of its guest", |s| s["guest"] == "absent");
    let outside = number(&status, "/nic/tx_gathered_outside_frames");
    let copied = number(&status, "/worker/copied_gathered_bytes");
    assert!(outside > 0, "{status:#}");
    // Nobody looks at it, so its header was to stay in the guest, too.
    assert_eq!(copied, outside * FRAME_BYTES as u64, "{status:#}");
    assert_eq!(number(&status, "/worker/tx_in_place_bytes"), 0);
    assert_eq!(number(&status, "/worker/ring_errors"), 0);
}

#[test]
fn frames_go_through_testpmd_and_come_back_as_they_were() {
    for (poll, huge) in [("adaptive", false), ("busy", true)] {
        let _pages = match huge
            .then(|| HugePages::reserve(Testpmd::MEMORY_MIB))
            .transpose()
        {
            Ok(pages) => pages,
            Err(why) => {
                println!("SKIPPED: {why}");
                return;
            }
        };
        let Some(mut port) = Port::start(poll, &[PROGRAM]) else {
            return;
        };
        let _testpmd = port.testpmd("io", huge);
        echo(&port.wire(), 3000);
        let status = port.wait("done", |_| true);
        assert_eq!(number(&status, "/worker/guest_rx_too_small"), 0);
        assert_eq!(number(&status, "/worker/ring_errors"), 0);
    }
}

#[test]
fn a_guest_of_qemu_boots_over_it() {
    let Some(mut port) = Port::start("adaptive", &[QEMU]) else {
        return;
    };
    let wire = port.wire();
    let socket = port.socket.display();
    let mut command = Command::new(QEMU);
    command.args([
        "-nodefaults",
        "-display",
        "none",
        "-accel",
        "tcg",
        "-m",
        "128",
    ]);
    command.args(["-object", "memory-backend-memfd,id=ram,size=128M,share=on"]);
    command.args(["-machine", "q35,memory-backend=ram", "-boot", "n"]);
    command.args(["-chardev", &format!("socket,id=port,path={socket}")]);
    command.args(["-netdev", "vhost-user,id=net,chardev=port"]);
    command.args(["-device", "virtio-net-pci,netdev=net,mac=52:54:00:c0:77:01"]);
    let _qemu = Process::spawn("qemu", command, port.bench.dir()).unwrap();
    // The firmware of the network card asks for an address (DHCP, RFC 2131).
    loop {
        let frame = wire
            .receive(PATIENCE)
            .unwrap()
            .expect("a frame of the firmware's");
        let is_dhcp = frame.len() > 282 && frame[34..38] == [0, 68, 0, 67];
        if is_dhcp && frame[6..12] == GUEST_MAC {
            break;
        }
    }
    let status = port.wait("serving", |_| true);
    assert_eq!(number(&status, "/vhost_user/refused"), 0);
    assert_eq!(number(&status, "/worker/ring_errors"), 0);
}

#[test]
fn a_testpmd_that_is_killed_is_followed_by_another() {
    let Some(mut port) = Port::start("interrupt", &[PROGRAM]) else {
        return;
    };
    let wire = port.wire();
    for round in 1..=3 {
        let mut testpmd = port.testpmd("io", false);
        echo(&wire, 50);
        testpmd.process.kill().unwrap();
        let status = port.wait("alone", |s| s["guest"] == "absent");
        assert_eq!(number(&status, "/vhost_user/connections"), round);
        assert_eq!(number(&status, "/vhost_user/stops"), round);
    }
    port.colo.terminate().unwrap();
    assert!(port.colo.wait_exit(PATIENCE).unwrap().success());
    assert!(!port.socket.exists());
}
