//! Peers that do not fit, talk garbage or leave, and what operators do: refused or noted, never in the guest's way.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use colo_control::Msg;
use colo_lab::load::{Load, LoadConfig};
use colo_lab::pair::{Pair, Settings};
use colo_lab::process::Process;
use colo_lab::topology::{GUEST, Host};
use colo_tests::bench::Bench;
use colo_tests::compare::Compare;
use colo_tests::lossy::Lossy;
use colo_tests::wire::Wire;
use colo_tests::{both_ways, clients, loads};

const ENDED: Duration = Duration::from_secs(20);

/// A host a alone, after its secondary has gone.
fn alone(bench: &Bench) -> Pair {
    let mut pair = Pair::start(&bench.settings(), bench.dir()).unwrap();
    pair.secondary.kill().unwrap();
    pair.wait_alone(Host::A).unwrap();
    pair
}

fn preamble(channel: u8, session: u64) -> Vec<u8> {
    let mut bytes = b"COLOLINK".to_vec();
    bytes.extend_from_slice(&[1, 0, channel, 0]);
    bytes.extend_from_slice(&session.to_le_bytes());
    bytes
}

fn channel(channel: u8, session: u64) -> TcpStream {
    let mut stream = TcpStream::connect((Host::A.link_address(), 7600)).unwrap();
    stream.set_read_timeout(Some(ENDED)).unwrap();
    stream.write_all(&preamble(channel, session)).unwrap();
    stream
}

fn say(stream: &mut TcpStream, msg: &Msg) {
    let mut bytes = Vec::new();
    msg.encode(&mut bytes);
    stream.write_all(&bytes).unwrap();
}

/// Everything the peer says until it closes.
fn hear(stream: &mut TcpStream) -> Vec<Msg> {
    let mut bytes = Vec::new();
    // A reset after the last words is an end, too.
    let _ = stream.read_to_end(&mut bytes);
    let mut heard = Vec::new();
    let mut at = 0;
    while let Ok(Some((msg, len))) = Msg::decode(&bytes[at..]) {
        heard.extend(msg);
        at += len;
    }
    heard
}

fn refusals(heard: Vec<Msg>) -> Vec<String> {
    heard
        .into_iter()
        .filter_map(|msg| match msg {
            Msg::Refuse { reason } => Some(reason),
            _ => None,
        })
        .collect()
}

fn hello(min: u16, max: u16, session: u64) -> Msg {
    let geometry = vec![("vm.ram_mib".to_owned(), "1".to_owned())];
    Msg::Hello {
        min,
        max,
        session,
        geometry,
        ahead_mib: 0,
    }
}

/// Runs `body` as the other host and expects the guest to be as well as before.
fn undisturbed(pair: &mut Pair, body: impl FnOnce() + Send) {
    pair.topology.host(Host::B).run(body).unwrap();
    clients::ping(&pair.topology.client, GUEST[0]);
    assert_eq!(pair.wait_alone(Host::A).unwrap()["role"], "primary");
}

#[test]
fn a_peer_that_talks_garbage_is_sent_away_and_a_real_one_can_join() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = alone(&bench);
    undisturbed(&mut pair, || {
        let mut stream = TcpStream::connect((Host::A.link_address(), 7600)).unwrap();
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: colo\r\n\r\n")
            .unwrap();
        assert!(hear(&mut stream).is_empty());
    });
    undisturbed(&mut pair, || {
        let mut channels = [0, 1, 2].map(|n| channel(n, 71));
        channels[0].write_all(&[0xff; 4096]).unwrap();
        assert!(refusals(hear(&mut channels[0])).is_empty());
    });
    undisturbed(&mut pair, || {
        let mut channels = [0, 1, 2].map(|n| channel(n, 72));
        say(&mut channels[0], &hello(90, 99, 72));
        let reasons = refusals(hear(&mut channels[0]));
        assert!(
            reasons.iter().any(|r| r.contains("versions 90..99")),
            "{reasons:?}"
        );
    });
    undisturbed(&mut pair, || {
        let mut channels = [0, 1, 2].map(|n| channel(n, 73));
        say(&mut channels[0], &hello(1, 1, 73));
        let reasons = refusals(hear(&mut channels[0]));
        assert!(
            reasons.iter().any(|r| r.contains("vm.ram_mib is 128")),
            "{reasons:?}"
        );
    });
    pair.restart(Host::B, "secondary").unwrap();
    pair.wait_protected(Host::A).unwrap();
    clients::ping(&pair.topology.client, GUEST[0]);
}

#[test]
fn a_primary_that_talks_garbage_does_not_hold_a_secondary_up() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = Pair::start(&bench.settings(), bench.dir()).unwrap();
    pair.primary.terminate().unwrap();
    for host in [Host::A, Host::B] {
        assert!(
            pair.process(host).wait_exit(ENDED).unwrap().success(),
            "{host:?}"
        );
    }
    let impostor = pair
        .topology
        .host(Host::A)
        .run(|| TcpListener::bind((Host::A.link_address(), 7600)).unwrap());
    let impostor = impostor.unwrap();
    pair.restart(Host::B, "secondary").unwrap();
    for _ in 0..3 {
        let (mut stream, _) = impostor.accept().unwrap();
        stream.write_all(&[0xee; 4096]).unwrap();
    }
    drop(impostor);
    pair.restart(Host::A, "primary").unwrap();
    pair.wait_protected(Host::A).unwrap();
    clients::ping(&pair.topology.client, GUEST[0]);
}

#[test]
fn hosts_that_do_not_fit_are_refused_by_name() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = alone(&bench);
    let text = bench.settings().pair_file(Host::B, bench.dir());
    let file = bench.dir().join("other.toml");
    std::fs::write(&file, text.replace("ram_mib = 128", "ram_mib = 64")).unwrap();
    let mut command = pair.topology.host(Host::B).command(bench.colo());
    command.arg("secondary").arg(&file);
    let mut other = Process::spawn("other", command, bench.dir()).unwrap();
    assert_eq!(
        other.wait_exit(ENDED).unwrap().code(),
        Some(4),
        "{}",
        other.log()
    );
    assert!(other.log().contains("vm.ram_mib is 128"), "{}", other.log());
    assert_eq!(pair.wait_alone(Host::A).unwrap()["protected"], false);
}

#[test]
fn rule_20_an_operators_stop_is_heard_by_the_secondary() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = Pair::start(&bench.settings(), bench.dir()).unwrap();
    pair.primary.terminate().unwrap();
    for host in [Host::A, Host::B] {
        let status = pair.process(host).wait_exit(ENDED).unwrap();
        assert!(
            status.success(),
            "{host:?}: {}",
            pair.process(host).log_tail()
        );
    }
    let generation = std::fs::read_to_string(bench.dir().join("generation")).unwrap();
    assert!(generation.contains("standing = \"off\""), "{generation}");
}

#[test]
fn a_host_does_not_start_what_another_one_holds() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = Pair::start(&bench.settings(), bench.dir()).unwrap();
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    pair.restart(Host::A, "primary").unwrap();
    let status = pair.primary.wait_exit(ENDED).unwrap();
    assert_eq!(status.code(), Some(1), "{}", pair.primary.log());
    assert!(
        pair.primary.log().contains("start `colo secondary`"),
        "{}",
        pair.primary.log()
    );
    clients::ping(&pair.topology.client, GUEST[0]);
}

#[test]
fn rule_19_a_host_that_may_not_be_alone_is_silent_until_it_is_protected_again() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut settings = bench.settings();
    settings.alone = "block".to_owned();
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    let connect = || TcpStream::connect((GUEST[0], 7)).unwrap();
    let mut echo = pair.topology.client.run(connect).unwrap();
    let mut answer = [0; 5];
    echo.write_all(b"first").unwrap();
    echo.read_exact(&mut answer).unwrap();

    pair.secondary.kill().unwrap();
    let blocked = |status: &serde_json::Value| status["state"] == "blocked";
    pair.primary.wait_status("blocked", ENDED, blocked).unwrap();
    echo.write_all(b"later").unwrap();
    echo.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    assert!(
        echo.read_exact(&mut answer).is_err(),
        "it spoke alone: {answer:?}"
    );

    pair.restart(Host::B, "secondary").unwrap();
    pair.wait_protected(Host::A).unwrap();
    echo.set_read_timeout(Some(ENDED)).unwrap();
    echo.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"later");
    // The new pair is a whole one.
    pair.primary.kill().unwrap();
    pair.wait_alone(Host::B).unwrap();
    let again = thread::spawn(move || {
        echo.write_all(b"again").unwrap();
        echo.read_exact(&mut answer).unwrap();
        answer
    });
    assert_eq!(&again.join().unwrap(), b"again");
}

// The headers of digests are told by what they were before, so the channel's moves must keep their order, too.
both_ways!(
    a_pair_over_tcp_serves_and_survives_its_primary,
    a_pair_over_udp_serves_and_survives_its_primary,
    a_pair_over_af_xdp_serves_and_survives_its_primary,
    without_datagrams_a_pair_goes_on_over_tcp_and_later_back,
    over_udp_a_lost_packet_is_no_divergence,
    over_af_xdp_a_lost_packet_is_no_divergence,
);

/// Both hosts with this carrier, of the packet channel.
fn carried_by(bench: &Bench, compare: Compare, packets: &str) -> Settings {
    let mut settings = compare.settings(bench);
    settings.packets = packets.to_owned();
    settings
}

/// Waits until what a host says goes over `carrier`, and gives its counters.
fn wait_carrier(pair: &mut Pair, host: Host, carrier: &str) -> serde_json::Value {
    let carried = |status: &serde_json::Value| status["link"]["carrier"] == carrier;
    let process = pair.process(host);
    process.wait_status(carrier, ENDED, carried).unwrap()["link"].clone()
}

/// An echo connection to the guest that is expected to live through everything.
struct Echo {
    stream: TcpStream,
    said: u32,
}

impl Echo {
    fn connect(pair: &Pair) -> Self {
        let connect = || TcpStream::connect((GUEST[0], 7)).unwrap();
        let stream = pair.topology.client.run(connect).unwrap();
        stream.set_read_timeout(Some(ENDED)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self { stream, said: 0 }
    }

    /// Says so much, in pieces of different lengths, and hears it again.
    fn talk(&mut self, rounds: u32) {
        for _ in 0..rounds {
            self.said += 1;
            let len = [20, 300, 1400, 4000][self.said as usize % 4];
            let words = [
                self.said.to_le_bytes().as_slice(),
                &vec![self.said as u8; len],
            ]
            .concat();
            self.stream.write_all(&words).unwrap();
            let mut answer = vec![0; words.len()];
            self.stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer, words);
        }
    }
}

fn serves_and_survives(packets: &str, compare: Compare) {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = Pair::start(&carried_by(&bench, compare, packets), bench.dir()).unwrap();
    for host in [Host::A, Host::B] {
        wait_carrier(&mut pair, host, packets);
    }
    let mut echo = Echo::connect(&pair);
    echo.talk(200);
    let link = wait_carrier(&mut pair, Host::A, packets);
    if packets == "tcp" {
        assert_eq!(link["datagrams_sent"], 0, "{link}");
    } else {
        assert!(link["datagrams_sent"].as_u64() > Some(200), "{link}");
        assert_eq!(link["foreign"], 0, "{link}");
    }
    compare.assert_used(&pair.primary.status().unwrap());
    pair.primary.kill().unwrap();
    echo.talk(20);
    pair.wait_alone(Host::B).unwrap();
    clients::ping(&pair.topology.client, GUEST[0]);
}

fn a_pair_over_tcp_serves_and_survives_its_primary(compare: Compare) {
    serves_and_survives("tcp", compare);
}

fn a_pair_over_udp_serves_and_survives_its_primary(compare: Compare) {
    serves_and_survives("udp", compare);
}

fn a_pair_over_af_xdp_serves_and_survives_its_primary(compare: Compare) {
    serves_and_survives("xdp", compare);
}

/// Causes of divergence that are not a matter of time on a busy machine.
fn unlike(pair: &Pair) -> Vec<String> {
    let status = pair.primary.status().unwrap();
    let causes = status["divergences"].as_object().unwrap();
    let names = causes.keys().filter(|name| !name.contains("deadline"));
    names.cloned().collect()
}

/// Whether what a host says to the other may go as UDP.
fn let_udp_out(pair: &Pair, host: Host, may: bool) {
    let verb = if may { "del" } else { "add" };
    let mut command = pair.topology.host(host).command("ip");
    command.args(["rule", verb, "ipproto", "udp", "blackhole"]);
    assert!(command.status().unwrap().success());
}

fn without_datagrams_a_pair_goes_on_over_tcp_and_later_back(compare: Compare) {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let settings = carried_by(&bench, compare, "udp");
    let mut pair = Pair::start(&settings, bench.dir()).unwrap();
    for host in [Host::A, Host::B] {
        wait_carrier(&mut pair, host, "udp");
    }
    let mut echo = Echo::connect(&pair);
    echo.talk(50);
    for host in [Host::A, Host::B] {
        let_udp_out(&pair, host, false);
    }
    // What the guest says now is answered all the same.
    echo.talk(200);
    for host in [Host::A, Host::B] {
        let link = wait_carrier(&mut pair, host, "tcp");
        assert!(link["fallbacks"].as_u64() >= Some(1), "{link}");
    }
    echo.talk(50);
    for host in [Host::A, Host::B] {
        let_udp_out(&pair, host, true);
    }
    for host in [Host::A, Host::B] {
        wait_carrier(&mut pair, host, "udp");
    }
    echo.talk(50);
    assert_eq!(unlike(&pair), Vec::<String>::new());
    compare.assert_used(&pair.primary.status().unwrap());
}

fn loses_packets(packets: &str, compare: Compare) {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut settings = carried_by(&bench, compare, packets);
    // Loss costs time, which may be all that it costs.
    settings.compare_deadline_ms = 5000;
    settings.ack_deadline_ms = 5000;
    settings.heartbeat_count = 100;
    let (topology, lossy) = Lossy::link(&settings, 20);
    let mut pair = Pair::start_in(topology, &settings, bench.dir()).unwrap();
    for host in [Host::A, Host::B] {
        wait_carrier(&mut pair, host, packets);
    }
    let equal = LoadConfig {
        deterministic: true,
        ..LoadConfig::new(8, 1)
    };
    let load = Load::start(&pair.topology.client, equal).unwrap();
    assert!(load.wait_answers(3000, ENDED), "no answers");
    let report = load.finish().unwrap();
    loads::assert_right(&report);
    let status = pair.wait_protected(Host::A).unwrap();
    let causes = status["divergences"].as_object().unwrap();
    assert!(causes.is_empty(), "{causes:?}");
    compare.assert_used(&status);
    assert!(lossy.lost().iter().all(|lost| *lost > 20), "{lossy:?}");
    for host in [Host::A, Host::B] {
        let link = wait_carrier(&mut pair, host, packets);
        assert!(link["retransmitted"].as_u64() > Some(20), "{link}");
        assert_eq!(link["fallbacks"], 0, "{link}");
    }
}

fn over_udp_a_lost_packet_is_no_divergence(compare: Compare) {
    loses_packets("udp", compare);
}

fn over_af_xdp_a_lost_packet_is_no_divergence(compare: Compare) {
    loses_packets("xdp", compare);
}

/// Sends frames of the link's EtherType to host b, from nobody.
fn send_foreign_frames(payloads: &[&[u8]]) {
    let wire = Wire::open("link0").unwrap();
    for payload in payloads {
        let head = [2, 0xc0, 0x10, 0, 0, 0x0b, 2, 0, 0, 0, 0, 9, 0x88, 0xb5];
        wire.send(&[&head[..], payload].concat()).unwrap();
    }
}

#[test]
fn foreign_frames_on_the_link_are_counted_and_harmless() {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut pair = Pair::start(&carried_by(&bench, Compare::Bytes, "xdp"), bench.dir()).unwrap();
    for host in [Host::A, Host::B] {
        wait_carrier(&mut pair, host, "xdp");
    }
    let mut echo = Echo::connect(&pair);
    echo.talk(50);
    let payloads = [&[0xc0][..], &[0xc0; 60], &[0; 1400], &[0xff; 1500]];
    let send = || send_foreign_frames(&payloads);
    pair.topology.host(Host::A).run(send).unwrap();
    let counted = |status: &serde_json::Value| {
        let link = &status["link"];
        let count = |name: &str| link[name].as_u64().unwrap();
        count("foreign") + count("truncated") == 4
    };
    let secondary = pair.process(Host::B);
    secondary.wait_status("foreign", ENDED, counted).unwrap();
    echo.talk(50);
    assert_eq!(unlike(&pair), Vec::<String>::new());
    assert_eq!(
        pair.wait_protected(Host::A).unwrap()["link"]["carrier"],
        "xdp"
    );
}

/// With frames of up to 1514 bytes and a link that carries them whole.
fn compares_in_place(xdp: Option<&str>) {
    let Some(bench) = Bench::new(&clients::PROGRAMS) else {
        return;
    };
    let mut settings = carried_by(&bench, Compare::Bytes, "xdp");
    settings.xdp = xdp.map(str::to_owned);
    let topology = settings.topology().unwrap();
    for host in [Host::A, Host::B] {
        let longer = "link set link0 mtu 1700\n";
        topology.host(host).batch(longer).unwrap();
    }
    let mut pair = Pair::start_in(topology, &settings, bench.dir()).unwrap();
    for host in [Host::A, Host::B] {
        wait_carrier(&mut pair, host, "xdp");
    }
    let mut echo = Echo::connect(&pair);
    echo.talk(400);
    for host in [Host::A, Host::B] {
        let link = wait_carrier(&mut pair, host, "xdp");
        let count = |key: &str| link[key].as_u64().unwrap();
        let (in_place, copied) = (count("frames_in_place"), count("frames_copied"));
        assert!(in_place > 400 && in_place > 4 * copied, "{link}");
        assert_eq!(count("pool_refusals"), 0, "{link}");
    }
    pair.primary.kill().unwrap();
    echo.talk(20);
    pair.restart(Host::A, "secondary").unwrap();
    pair.wait_protected(Host::B).unwrap();
    wait_carrier(&mut pair, Host::B, "xdp");
    echo.talk(400);
    let link = wait_carrier(&mut pair, Host::B, "xdp");
    println!("after a takeover: {link}");
    assert!(link["frames_in_place"].as_u64() > Some(400), "{link}");
}

#[test]
fn over_af_xdp_frames_are_compared_where_they_were_received_beside_a_tap_device() {
    compares_in_place(None);
}

#[test]
fn over_af_xdp_frames_are_compared_where_they_were_received_beside_an_af_xdp_nic() {
    compares_in_place(Some("driver"));
}
