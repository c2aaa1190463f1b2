//! Clients that no one here wrote, run in the laboratory's client namespace against the guest.
//!
//! Each function panics with the client's own words when anything is not as it must be, so that the same
//! functions serve a single guest and a pair.

use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use colo_lab::netns::Netns;
use colo_lab::topology::{GUEST, GUEST_V4};

/// What all functions together need.
pub const PROGRAMS: [&str; 6] = [
    "curl",
    "wrk",
    "redis-cli",
    "redis-benchmark",
    "ping",
    "timeout",
];

/// Commands that redis-benchmark must measure.
const BENCHMARKS: &str = "ping,set,get,incr,mset,lpush,rpush,lpop";
/// Longest time for one client, so that a silent guest fails its test instead of hanging it.
const LIMIT_SECONDS: &str = "120";

/// Byte `i` of the guest's `/bytes/N`.
fn page(length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| b'a' + ((i * 7 + i / 251) % 26) as u8)
        .collect()
}

fn url(guest: IpAddr, path: &str) -> String {
    match guest {
        IpAddr::V4(address) => format!("http://{address}{path}"),
        IpAddr::V6(address) => format!("http://[{address}]{path}"),
    }
}

fn in_client(client: &Netns, program: &str, args: &[&str]) -> Command {
    let mut command = client.command("timeout");
    command
        .arg(LIMIT_SECONDS)
        .arg(program)
        .args(args)
        .stdin(Stdio::null());
    command
}

/// Runs a client to its end. Gives its standard output.
fn run(client: &Netns, program: &str, args: &[&str]) -> String {
    let output = in_client(client, program, args).output();
    checked(
        program,
        args,
        output.unwrap_or_else(|error| panic!("{program}: {error}")),
    )
}

fn checked(program: &str, args: &[&str], output: Output) -> String {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {}: {}\n{stdout}\n{stderr}",
        args.join(" "),
        output.status
    );
    stdout
}

/// One request to the guest with `curl`; gives the answer.
pub fn ask(client: &Netns, method: &str, path: &str) -> String {
    let mut curl = client.command("curl");
    curl.args(["-sS", "--fail", "--max-time", "60", "-X", method]);
    let output = curl.arg(format!("http://{GUEST_V4}{path}")).output();
    let output = output.expect("curl starts");
    assert!(output.status.success(), "{method} {path}: {output:?}");
    String::from_utf8(output.stdout).expect("an answer in UTF-8")
}

/// Several pages over one connection, each byte checked, for both address families.
pub fn curl_keeps_its_connection(client: &Netns, dir: &Path) {
    let lengths = [0, 1, 1447, 1448, 1449, 65_536, 1 << 20, 100];
    for guest in GUEST {
        let files: Vec<_> = lengths
            .map(|length| dir.join(format!("page-{length}")))
            .into();
        let mut args = vec!["-sS".to_owned(), "--fail".to_owned(), "-g".to_owned()];
        for (length, file) in lengths.iter().zip(&files) {
            args.extend(["-o".to_owned(), file.display().to_string()]);
            args.push(url(guest, &format!("/bytes/{length}")));
        }
        args.extend(["-w".to_owned(), "%{http_code} %{num_connects}\n".to_owned()]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let report = run(client, "curl", &args);
        let expected = format!("200 1\n{}", "200 0\n".repeat(lengths.len() - 1));
        assert_eq!(report, expected, "status and new connections, page by page");
        for (length, file) in lengths.iter().zip(&files) {
            // curl makes no file for an empty body.
            let body = std::fs::read(file).unwrap_or_default();
            assert!(
                body == page(*length),
                "/bytes/{length} of {guest} has other content"
            );
            std::fs::remove_file(file).ok();
        }
    }
}

/// Sessions and the counter, over new connections each time.
pub fn curl_sees_state(client: &Netns) {
    for guest in GUEST {
        let get = |path: &str| run(client, "curl", &["-sS", "--fail", "-g", &url(guest, path)]);
        let post = |path: &str| {
            run(
                client,
                "curl",
                &["-sS", "--fail", "-g", "-X", "POST", &url(guest, path)],
            )
        };
        let before: u64 = get("/counter")
            .trim()
            .parse()
            .expect("the counter is a number");
        let after: u64 = post("/counter")
            .trim()
            .parse()
            .expect("the counter is a number");
        assert_eq!(after, before + 1);
        let token = post("/login");
        get(&format!("/session/{}", token.trim()));
        let stranger = url(guest, "/session/00000000000000000000000000000000");
        let args = [
            "-sS",
            "-g",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            &stranger,
        ];
        assert_eq!(run(client, "curl", &args), "404");
    }
}

/// What a load run gave.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Requests a second.
    pub per_second: f64,
}

/// wrk without a socket error and with success statuses only.
pub fn wrk(client: &Netns, guest: IpAddr, path: &str, connections: u32, seconds: u32) -> Rate {
    let (connections, duration) = (connections.to_string(), format!("{seconds}s"));
    let url = url(guest, path);
    let args = [
        "-t",
        "1",
        "-c",
        &connections,
        "-d",
        &duration,
        "--timeout",
        "10s",
        &url,
    ];
    let report = run(client, "wrk", &args);
    for complaint in ["Socket errors", "Non-2xx"] {
        assert!(!report.contains(complaint), "{report}");
    }
    let rate = report
        .lines()
        .find_map(|line| line.strip_prefix("Requests/sec:"));
    let per_second = rate.and_then(|rate| rate.trim().parse().ok());
    let per_second = per_second.unwrap_or_else(|| panic!("no rate in\n{report}"));
    assert!(per_second > 0.0, "{report}");
    Rate { per_second }
}

/// redis-cli, command by command.
pub fn redis_cli(client: &Netns, guest: IpAddr) {
    let host = guest.to_string();
    let ask = |command: &[&str]| {
        let mut args = vec!["-h", &host];
        args.extend(command);
        run(client, "redis-cli", &args).trim_end().to_owned()
    };
    let cases: [(&[&str], &str); 24] = [
        (&["FLUSHALL"], "OK"),
        (&["PING"], "PONG"),
        (&["PING", "hello"], "hello"),
        (&["ECHO", "two words"], "two words"),
        (&["SET", "key", "value"], "OK"),
        (&["GET", "key"], "value"),
        (&["GET", "none"], ""),
        (&["EXISTS", "key"], "1"),
        (&["APPEND", "key", "+more"], "10"),
        (&["INCR", "n"], "1"),
        (&["INCRBY", "n", "41"], "42"),
        (
            &["INCR", "key"],
            "ERR value is not an integer or out of range",
        ),
        (&["MSET", "a", "1", "b", "2"], "OK"),
        (&["MGET", "a", "b"], "1\n2"),
        (&["RPUSH", "list", "x", "y"], "2"),
        (&["LPUSH", "list", "w"], "3"),
        (&["LRANGE", "list", "0", "-1"], "w\nx\ny"),
        (&["LPOP", "list"], "w"),
        (
            &["GET", "list"],
            "WRONGTYPE Operation against a key holding the wrong kind of value",
        ),
        (&["EXPIRE", "a", "100"], "1"),
        (&["TTL", "b"], "-1"),
        (&["SADD", "set", "m"], "1"),
        (&["SPOP", "set"], "m"),
        (&["DBSIZE"], "5"),
    ];
    for (command, expected) in cases {
        assert_eq!(ask(command), expected, "{command:?}");
    }
    let unknown = ask(&["NOSUCH", "thing"]);
    assert!(unknown.starts_with("ERR unknown command"), "{unknown}");
}

/// redis-benchmark with every command measured. Gives the rates in the order of its report.
pub fn redis_benchmark(client: &Netns, guest: IpAddr, pipeline: u32) -> Vec<(String, f64)> {
    let (host, pipeline) = (guest.to_string(), pipeline.to_string());
    let args = [
        "-h", &host, "-t", BENCHMARKS, "-c", "32", "-n", "20000", "-P", &pipeline, "--csv",
    ];
    let report = run(client, "redis-benchmark", &args);
    let rates: Vec<(String, f64)> = report
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(',').map(|field| field.trim_matches('"'));
            Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?))
        })
        .collect();
    // PING is measured inline and as an array.
    assert_eq!(rates.len(), BENCHMARKS.split(',').count() + 1, "{report}");
    assert!(rates.iter().all(|(_, rate)| *rate > 0.0), "{report}");
    rates
}

/// Echo requests without a loss, short and long.
pub fn ping(client: &Netns, guest: IpAddr) {
    for size in [56, 1400] {
        ping_with(client, guest, size);
    }
}

/// Echo requests of `size` bytes, each in one frame, without a loss.
pub fn ping_with(client: &Netns, guest: IpAddr, size: usize) {
    const COUNT: usize = 20;
    let family = if guest.is_ipv6() { "-6" } else { "-4" };
    let (count, size, guest) = (COUNT.to_string(), size.to_string(), guest.to_string());
    // With a deadline it waits for so many answers. Without one the last has only twice as long as the slowest before it.
    let args = [
        family, "-c", &count, "-w", "30", "-i", "0.01", "-M", "do", "-s", &size, &guest,
    ];
    let report = run(client, "ping", &args);
    for number in 1..=COUNT {
        assert!(
            report.contains(&format!("icmp_seq={number} ")),
            "{number}: {report}"
        );
    }
}
