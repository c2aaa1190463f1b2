//! Configuration files, good and bad.

use super::*;

const GOOD: &str = r#"
[vm]
name = "demo"
kernel = "guest.elf"
ram_mib = 128
cmdline = "ip=10.77.0.10/24"
[net]
tap = "tap0"
mac = "52:54:00:c0:10:01"
[host]
poll = "interrupt"
status = "run.sock"
[replication]
link_listen = "10.78.0.1:7600"
link_peer = "10.78.0.2:7600"
arbiter = "file:generation"
"#;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(Path::new("/etc/colo/demo.toml"), text)
}

#[test]
fn a_good_file_gives_defaults_and_absolute_paths() {
    let config = parse(GOOD).unwrap();
    assert_eq!(
        config.vm.kernel(),
        Kernel::File("/etc/colo/guest.elf".into())
    );
    assert_eq!(config.host.status, Some("/etc/colo/run.sock".into()));
    assert_eq!(config.host.poll, PollMode::Interrupt);
    assert_eq!(config.net.mac, [0x52, 0x54, 0, 0xc0, 0x10, 1]);
    assert_eq!((config.net.mtu, config.vm.vcpus), (1500, 1));
    let replication = config.replication.unwrap();
    assert_eq!(replication.arbiter, "file:/etc/colo/generation");
    assert_eq!(replication.compare_deadline_ms, 20);
    assert_eq!(replication.alone, Alone::Continue);
    let builtin = parse(&GOOD.replace("guest.elf", "builtin:demo")).unwrap();
    assert_eq!(builtin.vm.kernel(), Kernel::Builtin("demo".into()));
}

#[test]
fn frames_may_be_from_68_to_9216_bytes_long() {
    let with = |mtu: u32| parse(&GOOD.replace("[net]", &format!("[net]\nmtu = {mtu}")));
    for mtu in [68, 9000, 9216] {
        assert_eq!(with(mtu).unwrap().net.mtu, mtu as u16);
    }
    for mtu in [67, 9217] {
        let error = with(mtu).unwrap_err().to_string();
        let expected = format!("net.mtu = {mtu}: choose between 68 and 9216");
        assert!(error.contains(&expected), "{error}");
    }
}

#[test]
fn each_shard_may_have_a_cpu() {
    let host = |lines: &str| {
        let text = GOOD.replace("poll = \"interrupt\"", lines);
        parse(&text).unwrap().host
    };
    assert_eq!((host("").shards, host("").cpu_of(0)), (1, None));
    assert_eq!(host("cpu = 0").cpu_of(0), Some(0));
    let two = host("shards = 2\ncpu = [0, 0]");
    assert_eq!(
        (two.shards, two.cpu_of(1), two.cpu_of(2)),
        (2, Some(0), None)
    );
}

#[test]
fn errors_name_file_field_value_and_remedy() {
    for (from, to, expected) in [
        (
            "ram_mib = 128",
            "ram_mib = 1",
            "vm.ram_mib = 1: choose between 4 and 131072",
        ),
        ("ram_mib = 128", "ram_mib = 128\nvcpus = 9", "vm.vcpus = 9"),
        ("\"demo\"", "\"\"", "vm.name"),
        ("ip=10", "ip=\\n10", "vm.cmdline"),
        ("\"tap0\"", "\"a-very-long-interface-name\"", "net.tap"),
        ("tap = \"tap0\"", "", "net.tap = none: name a TAP device"),
        (
            "tap = \"tap0\"",
            "tap = \"tap0\"\ninterface = \"eth1\"",
            "net.interface = eth1: there is net.tap as well",
        ),
        ("tap = \"tap0\"", "interface = \"\"", "net.interface"),
        (
            "tap = \"tap0\"",
            "tap = \"tap0\"\nxdp = \"zero-copy\"",
            "net.xdp = \"zero-copy\": a TAP device has no such modes",
        ),
        (
            "tap = \"tap0\"",
            "interface = \"e\"\nxdp = \"magic\"",
            "magic",
        ),
        (
            "poll = \"interrupt\"",
            "frame_slots = 512",
            "host.frame_slots = 512: a pair needs at least 8192",
        ),
        ("52:54", "53:54", "net.mac"),
        ("52:54", "5254", "is not like \"52:54:00:c0:10:01\""),
        ("poll = \"interrupt\"", "poll = \"never\"", "never"),
        ("poll = \"interrupt\"", "cpu = 4096", "host.cpu = 4096"),
        (
            "poll = \"interrupt\"",
            "shards = 2\ncpu = [0, 4096]",
            "host.cpu = 4096",
        ),
        (
            "poll = \"interrupt\"",
            "shards = 2\ncpu = 0",
            "host.cpu = [0]: name one CPU for each of host.shards",
        ),
        (
            "poll = \"interrupt\"",
            "cpu = \"one\"",
            "expected the number of a CPU, or a list of them",
        ),
        ("poll = \"interrupt\"", "shards = 0", "host.shards = 0"),
        (
            "poll = \"interrupt\"",
            "shards = 9",
            "host.shards = 9: choose between 1 and 8",
        ),
        ("poll = \"interrupt\"", "polll = 1", "polll"),
        ("file:generation", "etcd:x", "replication.arbiter = etcd:x"),
        ("10.78.0.2:7600", "10.78.0.1:7600", "replication.link_peer"),
        ("10.78.0.2:7600", "nonsense", "link_peer"),
        (
            "10.78.0.1:7600",
            "0.0.0.0:7600",
            "replication.link_listen = 0.0.0.0:7600: name an address of that host alone",
        ),
        (
            "10.78.0.1:7600",
            "[::]:7600",
            "replication.link_listen = [::]:7600",
        ),
        (
            "10.78.0.2:7600",
            "[::ffff:0.0.0.0]:7600",
            "replication.link_peer = [::ffff:0.0.0.0]:7600",
        ),
        (
            "[replication]",
            "[replication]\nack_deadline_ms = 40",
            "delayed ACK",
        ),
        (
            "[replication]",
            "[replication]\nhold_frames = 100000",
            "replication.hold_frames = 100000: host.frame_slots leaves room for 1792 at most",
        ),
        (
            "[replication]",
            "[replication]\nheartbeat_ms = 0",
            "replication.heartbeat_ms = 0",
        ),
        ("[replication]", "[replication]\nalone = \"maybe\"", "maybe"),
        (
            "[replication]",
            "[checkpoint]\nstreams = 0\n[replication]",
            "checkpoint.streams = 0: must be from 1 to 8",
        ),
        (
            "[replication]",
            "[checkpoint]\nstreams = 9\n[replication]",
            "checkpoint.streams = 9",
        ),
        ("name = \"demo\"", "", "name"),
        (
            "[host]",
            "vhost_user = \"x.sock\"\n[host]",
            "net.vhost_user = x.sock: leave it out",
        ),
        ("[vm]", "[vm", ""),
    ] {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD);
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.contains("/etc/colo/demo.toml"), "{error}");
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn numbers_that_would_overflow_are_refused_by_name() {
    let most = i64::MAX;
    for (section, field) in [
        ("replication", "heartbeat_ms"),
        ("replication", "compare_deadline_ms"),
        ("replication", "ack_deadline_ms"),
        ("replication", "checkpoint_interval_ms"),
        ("replication", "remus_interval_ms"),
        ("replication", "storm_window_ms"),
        ("checkpoint", "arena_mib"),
        ("checkpoint", "stage_mib"),
        ("checkpoint", "ahead_mib"),
        ("checkpoint", "cache_mib"),
        ("checkpoint", "ahead_interval_ms"),
        ("checkpoint", "stall_ms"),
    ] {
        let text = match section {
            "replication" => format!("{GOOD}{field} = {most}\n"),
            section => format!("{GOOD}[{section}]\n{field} = {most}\n"),
        };
        let error = parse(&text).unwrap_err().to_string();
        assert!(
            error.contains(&format!("{section}.{field} = {most}: must be")),
            "{error}"
        );
    }
    let error = parse(&format!("{GOOD}heartbeat_count = {}\n", u32::MAX)).unwrap_err();
    let expected = "replication.heartbeat_count = 4294967295: must be from 1 to 1000";
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn missing_and_oversized_files_are_named() {
    let missing = Config::read(Path::new("/nonexistent/colo.toml")).unwrap_err();
    assert!(missing.to_string().contains("/nonexistent/colo.toml"));
    let mut config = parse(GOOD).unwrap();
    let missing = config
        .vm
        .read_kernel(Path::new("/nonexistent/guest.elf"))
        .unwrap_err();
    assert!(
        missing
            .to_string()
            .contains("vm.kernel: /nonexistent/guest.elf")
    );
    config.vm.ram_mib = 0;
    let itself = std::env::current_exe().unwrap();
    assert!(matches!(
        config.vm.read_kernel(&itself),
        Err(ConfigError::KernelTooLarge { .. })
    ));
}

#[test]
fn the_policy_is_read_from_beside_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let text = format!("{GOOD}[compare]\npolicy = \"rules/flows.toml\"\n");
    let parse = || Config::parse(&dir.path().join("demo.toml"), &text);
    let error = parse().unwrap_err().to_string();
    for word in ["demo.toml: compare.policy: ", "rules/flows.toml: "] {
        assert!(error.contains(word), "{error}");
    }
    let file = dir.path().join("rules/flows.toml");
    std::fs::create_dir(dir.path().join("rules")).unwrap();
    std::fs::write(&file, "[[rule]]\nprotocol = \"udp\"\naction = \"hold\"\n").unwrap();
    let compare = parse().unwrap().compare;
    assert_eq!(compare.policy, Some(file.clone()));
    let rule = colo_compare::Rule {
        protocol: Some(colo_compare::PolicyProtocol::Udp),
        action: colo_compare::PolicyAction::Hold,
        ..colo_compare::Rule::default()
    };
    assert_eq!(compare.rules, Policy::new(vec![rule]));
    std::fs::write(&file, "[[rule]]\nprotocol = \"udp\"\n").unwrap();
    let error = parse().unwrap_err().to_string();
    assert!(error.contains("rule 1: action is missing"), "{error}");
    let none = self::parse(GOOD).unwrap().compare;
    assert_eq!((none.policy, none.rules), (None, Policy::default()));
}
