//! What `colo` says to a wrong configuration, and to a host that cannot run it: an error that names the
//! file and the field, and a status that is not 0.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::fs::File;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use colo_lab::topology::{Host, Topology};
use colo_tests::bench::Bench;

/// The configuration cannot be used.
const UNUSABLE: i32 = 2;
/// The host cannot do what it says.
const FAILED: i32 = 1;
/// A `colo` that starts in spite of its mistake ends like this.
const LIMIT_SECONDS: &str = "20";

/// A host, and a configuration to spoil.
struct Place {
    bench: Bench,
    topology: Topology,
}

impl Place {
    fn new() -> Option<Self> {
        let bench = Bench::new(&["timeout", "setpriv", "unshare", "prlimit"])?;
        Some(Self {
            bench,
            topology: Topology::new().unwrap(),
        })
    }

    fn file(&self) -> PathBuf {
        self.bench.dir().join("spoilt.toml")
    }

    /// Runs `colo ROLE FILE`, behind the words of `before`, with one part of a good file replaced.
    fn colo(&self, before: &[&str], role: &str, from: &str, to: &str) -> Output {
        let good = self.bench.settings().pair_file(Host::A, self.bench.dir());
        assert!(
            from.is_empty() || good.contains(from),
            "{from} is not in\n{good}"
        );
        std::fs::write(
            self.file(),
            good.replace(from, if from.is_empty() { "" } else { to }),
        )
        .unwrap();
        let mut command = self.topology.host(Host::A).command("timeout");
        command
            .arg(LIMIT_SECONDS)
            .args(before)
            .arg(self.bench.colo());
        command
            .arg(role)
            .arg(self.file())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

/// It ended with `code` and without a panic, and said each of the words.
fn assert_refused(output: &Output, code: i32, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        output.status.code(),
        Some(code),
        "{words:?}: {}\n{said}",
        output.status
    );
    for word in words {
        assert!(said.contains(word), "{word} is not in\n{said}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn a_file_with_a_mistake_is_refused_by_name() {
    let Some(place) = Place::new() else { return };
    let cases: [(&str, &str, &[&str]); 15] = [
        ("vcpus = 1", "vcpuss = 1", &["vcpuss"]),
        ("[net]", "[network]", &["network"]),
        ("name = \"demo\"", "", &["name"]),
        ("ram_mib = 128", "ram_mib = \"much\"", &["ram_mib"]),
        ("ram_mib = 128", "ram_mib = -1", &["ram_mib"]),
        ("ram_mib = 128", "ram_mib = 1", &["vm.ram_mib", "1"]),
        (
            "ram_mib = 128",
            "ram_mib = 99999999",
            &["vm.ram_mib", "99999999"],
        ),
        ("vcpus = 1", "vcpus = 0", &["vm.vcpus", "0"]),
        ("52:54:00:c0:10:01", "53:54:00:c0:10:01", &["net.mac"]),
        ("52:54:00:c0:10:01", "52:54", &["52:54"]),
        ("tap0", "a-name-that-is-too-long", &["net.tap"]),
        (
            "poll = \"adaptive\"",
            "poll = \"sometimes\"",
            &["sometimes"],
        ),
        (
            "arbiter = \"file:",
            "arbiter = \"dice:",
            &["replication.arbiter", "dice:"],
        ),
        (
            "heartbeat_ms = 20",
            "heartbeat_ms = 0",
            &["replication.heartbeat_ms"],
        ),
        ("[vm]", "[vm", &["TOML"]),
    ];
    for (from, to, words) in cases {
        let output = place.colo(&[], "run", from, to);
        assert_refused(&output, UNUSABLE, &[&["spoilt.toml"], words].concat());
    }
}

#[test]
fn a_file_that_is_not_there_is_refused_by_name() {
    let Some(place) = Place::new() else { return };
    for role in ["run", "primary", "secondary"] {
        let mut command = Command::new(place.bench.colo());
        command.arg(role).arg(place.bench.dir().join("absent.toml"));
        assert_refused(&command.output().unwrap(), UNUSABLE, &["absent.toml"]);
    }
}

#[test]
fn a_pair_without_a_replication_section_is_refused() {
    let Some(place) = Place::new() else { return };
    let good = place.bench.settings().pair_file(Host::A, place.bench.dir());
    let section = &good[good.find("[replication]").unwrap()..];
    for role in ["primary", "secondary"] {
        let output = place.colo(&[], role, section, "");
        assert_refused(&output, UNUSABLE, &["[replication]", "missing"]);
    }
}

#[test]
fn a_kernel_that_cannot_be_loaded_is_refused_by_name() {
    let Some(place) = Place::new() else { return };
    let path = |name: &str| place.bench.dir().join(name);
    File::create(path("large"))
        .unwrap()
        .set_len(200 << 20)
        .unwrap();
    std::fs::write(path("empty"), "").unwrap();
    std::fs::write(
        path("text"),
        "no ELF image, but long enough to look at".repeat(10),
    )
    .unwrap();
    std::fs::copy("/bin/true", path("dynamic")).unwrap();
    for role in ["run", "primary"] {
        for name in ["absent", "large", "empty", "text", "dynamic"] {
            let output = place.colo(&[], role, "builtin:demo", path(name).to_str().unwrap());
            assert_refused(&output, UNUSABLE, &["vm.kernel", name]);
        }
    }
    let output = place.colo(&[], "run", "builtin:demo", "builtin:unknown");
    assert_refused(&output, UNUSABLE, &["vm.kernel", "unknown"]);
}

#[test]
fn an_address_in_use_is_refused_by_name() {
    let Some(place) = Place::new() else { return };
    let socket = place.bench.dir().join("a.sock");
    let taken = UnixListener::bind(&socket).unwrap();
    assert_refused(
        &place.colo(&[], "run", "", ""),
        FAILED,
        &["host.status", "in use"],
    );
    drop(taken);
    std::fs::remove_file(&socket).unwrap();
    let bind = || TcpListener::bind("10.78.0.1:7600").unwrap();
    let _taken = place.topology.host(Host::A).run(bind).unwrap();
    let output = place.colo(&[], "primary", "", "");
    assert_refused(
        &output,
        FAILED,
        &["link_listen", "10.78.0.1:7600", "in use"],
    );
    // Whoever cannot run it has not asked for it.
    assert!(!place.bench.dir().join("generation").exists());
}

#[test]
fn a_host_that_cannot_run_it_is_told_why() {
    let Some(place) = Place::new() else { return };
    // Root without any capability cannot open other users' files or configure a network.
    let powerless = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"];
    let hidden = "mount --bind /dev/null /dev/kvm && exec \"$@\"";
    let without_kvm = ["unshare", "--mount", "sh", "-c", hidden, "sh"];
    let poor = ["prlimit", "--as=1500000000"];
    assert_refused(
        &place.colo(&without_kvm, "run", "", ""),
        FAILED,
        &["/dev/kvm"],
    );
    let output = place.colo(&poor, "run", "ram_mib = 128", "ram_mib = 3000");
    assert_refused(&output, FAILED, &["vm.ram_mib", "3000"]);
    let output = place.colo(&powerless, "run", "", "");
    assert_refused(&output, FAILED, &["net.tap", "tap0", "not permitted"]);
}
