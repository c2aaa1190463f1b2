//! Benchmarks that measure whole systems still run and give what their manual says: smallest parameters, no judgement
//! of figures.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::path::Path;
use std::process::Command;

use colo_tests::bench::Bench;
use serde_json::Value;

/// Runs `colo-bench` with these arguments, split at spaces. Gives its rows.
fn rows(bench: &Bench, arguments: &str, more: &[&Path]) -> Vec<Value> {
    let mut command = Command::new(bench.colo().with_file_name("colo-bench"));
    command.args(["--colo".as_ref(), bench.colo().as_os_str()]);
    rows_of(command, bench, arguments, more).0
}

/// The same by `colo bench`.
fn rows_by_colo(bench: &Bench, arguments: &str) -> Vec<Value> {
    rows_and_text_by_colo(bench, arguments).0
}

/// The same with what is printed.
fn rows_and_text_by_colo(bench: &Bench, arguments: &str) -> (Vec<Value>, String) {
    let mut command = Command::new(bench.colo());
    command.arg("bench");
    rows_of(command, bench, arguments, &[])
}

fn rows_of(
    mut command: Command,
    bench: &Bench,
    arguments: &str,
    more: &[&Path],
) -> (Vec<Value>, String) {
    let file = bench.dir().join("rows.json");
    let output = command
        .args(arguments.split(' '))
        .args(more)
        .arg("--json")
        .arg(&file)
        .output()
        .expect("build it with `cargo build --release -p colo-bench`");
    assert!(output.status.success(), "{output:?}");
    let rows: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let rows = rows.as_array().unwrap().clone();
    for row in &rows {
        positive(&row["machine"], &["cores"]);
    }
    (rows, String::from_utf8(output.stdout).unwrap())
}

fn positive(row: &Value, keys: &[&str]) {
    for key in keys {
        assert!(row[key].as_f64() > Some(0.0), "{key} in {row:#}");
    }
}

/// The names of the elements of an XML document, whose tags must be balanced and attributes quoted.
fn elements(xml: &str) -> Vec<&str> {
    let (mut open, mut all) = (Vec::new(), Vec::new());
    for part in xml.split('<').skip(1) {
        let (tag, text) = part
            .split_once('>')
            .unwrap_or_else(|| panic!("no end: {part}"));
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        assert!(!text.contains('>'), "{text}");
        let name = tag
            .trim_start_matches('/')
            .split([' ', '/', '\n'])
            .next()
            .unwrap();
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "{tag}");
            continue;
        }
        all.push(name);
        if !tag.ends_with('/') && !tag.starts_with(['?', '!']) {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?}");
    all
}

#[test]
fn modes_gives_a_row_for_each_mode_and_load_and_a_picture_of_them() {
    let Some(bench) = Bench::new(&["wrk", "redis-benchmark"]) else {
        return;
    };
    let svg = bench.dir().join("modes.svg");
    let arguments = "modes --rounds 1 --seconds 1 --intervals 20 --connections 8 --loads diverging10,get1 --svg";
    let rows = rows(&bench, arguments, &[&svg]);
    let names = |key| -> Vec<&str> { rows.iter().map(|r| r[key].as_str().unwrap()).collect() };
    assert_eq!(names("mode"), ["run", "colo", "remus-20"].repeat(2));
    assert_eq!(names("load")[2..4], ["GET -P 1", "page, 10 div/s"]);
    for row in &rows {
        let always = [
            "per_second",
            "ratio",
            "p50_us",
            "p99_us",
            "primary_cpu_s",
            "seconds",
        ];
        positive(row, &always);
        positive(
            row,
            &["per_second_min", "per_second_max", "cpu_us_per_request"],
        );
        assert_eq!(row["rounds"].as_array().unwrap().len(), 1, "{row:#}");
        let pair = [
            "link_bytes_per_s",
            "link_bytes_per_request",
            "secondary_cpu_s",
        ];
        match row["mode"] == "run" {
            true => assert!(pair.iter().all(|key| row[key].is_null()), "{row:#}"),
            false => positive(row, &pair),
        }
    }
    positive(&rows[4], &["checkpoints_per_s", "divergences_per_s"]);
    positive(&rows[5], &["checkpoints_per_s"]);

    let picture = std::fs::read_to_string(svg).unwrap();
    let bars = elements(&picture)
        .iter()
        .filter(|name| **name == "rect")
        .count();
    // The ground, three colours explained, and in three panels a bar for each row; the link is no matter for `run`.
    assert_eq!(bars, 1 + 3 + 6 + 6 + 4, "{picture}");
    for part in ["not replicated", "COLO", "Remus, 20 ms", "GET -P 1", "MB/s"] {
        assert!(picture.contains(part), "{part} is not in\n{picture}");
    }
}

#[test]
fn qemu_migration_sends_the_known_set_while_the_guest_stands_still() {
    let Some(bench) = Bench::new(&["qemu-system-x86_64", "iperf3"]) else {
        return;
    };
    let arguments = "qemu-migration --pages 1000 --count 1 --same 50 --multifd 2";
    let rows = rows(&bench, arguments, &[]);
    let kinds: Vec<&str> = rows
        .iter()
        .map(|row| row["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["qemu", "qemu-multifd", "colo"]);
    for row in &rows {
        assert_eq!(row["pages"], 1000, "{row:#}");
        positive(row, &["pause_us_p50"]);
    }
    for row in &rows[..2] {
        positive(
            row,
            &["pause_us_max", "precopy_bytes", "ram_mib", "total_ms_p50"],
        );
    }
    positive(&rows[0], &["bytes_sent"]);
    let sent = rows[0]["pages_sent"].as_f64().unwrap();
    assert!((1000.0..1100.0).contains(&sent), "{:#}", rows[0]);
    assert!(rows[1]["bytes_sent"].is_null(), "{:#}", rows[1]);
    // A row of `checkpoint`.
    assert_eq!(rows[2]["same_pct"], 50, "{:#}", rows[2]);
    positive(
        &rows[2],
        &[
            "bytes_sent",
            "memcpy_us",
            "link_bytes_per_s",
            "raw_link_bytes_per_s",
            "pause_us_p99",
            "stolen_us_p50",
            "hold_us_p50",
            "commit_us_p50",
        ],
    );
}

#[test]
fn checkpoint_tells_both_bare_streams_what_went_ahead_and_which_aims_are_met() {
    let Some(bench) = Bench::new(&["iperf3"]) else {
        return;
    };
    let arguments = "checkpoint --pages 300 --same 0,75 --rest-ms 500 --count 1";
    let rows = rows(&bench, arguments, &[]);
    assert_eq!(rows.len(), 2);
    for row in &rows {
        let number = |key: &str| {
            row[key]
                .as_f64()
                .unwrap_or_else(|| panic!("{key}: {row:#}"))
        };
        let streams = ["raw_iperf3_bytes_per_s", "raw_uring_bytes_per_s"];
        positive(row, &streams);
        let better = number(streams[0]).max(number(streams[1]));
        assert_eq!(number("raw_link_bytes_per_s"), better, "{row:#}");
        let way = row["raw_uring_way"].as_str().unwrap();
        assert!(way.starts_with("uring"), "{row:#}");

        // The medians of one are what it says itself.
        let told = &row["checkpoints"][0];
        let ahead = told["ahead"]["sent_bytes"].as_f64().unwrap();
        assert_eq!(number("ahead_bytes"), ahead, "{row:#}");
        let all = number("bytes_sent") + ahead;
        let of_dirty = all / (told["dirty_pages"].as_f64().unwrap() * 4096.0);
        let off = (number("sent_of_dirty") - of_dirty).abs();
        assert!(of_dirty > 0.0 && off < 1e-9, "{row:#}");

        let (aims, limit_us) = (&row["aims"], 2.0 * number("memcpy_us") + 300.0);
        assert!((aims["limit_us"].as_f64().unwrap() - limit_us).abs() < 1e-6);
        for (aim, key) in [
            ("pause_met", "pause_us_p50"),
            ("stolen_met", "stolen_us_p50"),
        ] {
            assert_eq!(aims[aim], number(key) <= limit_us, "{aim} in {row:#}");
        }
        let reaches = |link: f64| Value::from(number("link_bytes_per_s") / link >= 0.8);
        let shares = match row["same_pct"] == 0 {
            true => {
                let burst = reaches(number("raw_burst_bytes_per_s"));
                [Value::Null, reaches(better), burst]
            }
            false => [(of_dirty < 0.3).into(), Value::Null, Value::Null],
        };
        let told = ["sent_met", "link_met", "burst_met"].map(|aim| aims[aim].clone());
        assert_eq!(told, shares, "{row:#}");
    }
}

#[test]
fn compare_gives_a_row_for_each_kind_with_what_the_peer_took() {
    let Some(bench) = Bench::new(&["qemu-system-x86_64"]) else {
        return;
    };
    let arguments =
        "compare --kind core,path --peer qemu --protocol tcp --payload 64 --flows 64 --rounds 1";
    let rows = rows_by_colo(&bench, arguments);
    let kinds: Vec<&str> = rows
        .iter()
        .map(|row| row["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["core", "memcmp", "path", "floor"]);
    for row in &rows {
        let shape = (&row["protocol"], &row["payload"], &row["flows"]);
        assert_eq!(shape, (&"tcp".into(), &64.into(), &64.into()), "{row:#}");
        positive(row, &["ns_per_pair", "pairs_per_s", "gbit_s"]);
        let number = |key: &str| row[key].as_f64().unwrap();
        // Of the primary's frames: 54 bytes of headers and the payload, as a quotient; less than twice as much as both.
        let bytes_per_pair = number("gbit_s") * 1e9 / 8.0 / number("pairs_per_s");
        assert!((117.9..256.0).contains(&bytes_per_pair), "{row:#}");
        let has_peer = row["kind"] == "path";
        assert_eq!(row["peer_cpu_ns_per_pair"].is_number(), has_peer, "{row:#}");
        if has_peer {
            positive(row, &["peer_cpu_ns_per_pair", "ratio"]);
            let ratio = number("peer_cpu_ns_per_pair") / number("ns_per_pair");
            assert!((number("ratio") / ratio - 1.0).abs() < 1e-6, "{row:#}");
        }
    }
    // In memory nothing else comes in between.
    let product =
        |row: &Value| row["ns_per_pair"].as_f64().unwrap() * row["pairs_per_s"].as_f64().unwrap();
    assert!(
        (product(&rows[0]) / 1e9 - 1.0).abs() < 1e-6,
        "{:#}",
        rows[0]
    );
}

#[test]
fn datapath_gives_a_row_for_each_kind_and_process() {
    let Some(bench) = Bench::new(&[]) else {
        return;
    };
    let arguments = "datapath --kind idle,forward --payload 64 --rounds 1 --seconds 1";
    let rows = rows_by_colo(&bench, arguments);
    let kinds: Vec<&str> = rows
        .iter()
        .map(|row| row["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["idle", "idle", "forward"]);
    for (row, process) in rows.iter().zip(["primary", "secondary"]) {
        assert_eq!(
            (&row["process"], &row["payload"]),
            (&process.into(), &Value::Null),
            "{row:#}"
        );
        positive(row, &["cpu_percent", "peer_cpu_percent"]);
        for key in [
            "worker_cpu_percent",
            "worker_sleeps_per_s",
            "colo_cpu_percent",
        ] {
            assert!(row[key].as_f64() >= Some(0.0), "{key} in {row:#}");
        }
    }
    let forward = &rows[2];
    assert_eq!(forward["payload"], 64, "{forward:#}");
    for key in ["packets_per_s", "packets_per_cpu_s", "cpu_ns_per_packet"] {
        positive(forward, &[key, &format!("peer_{key}")]);
    }
    let rate = |key: &str| forward[key].as_f64().unwrap();
    let ratio = rate("packets_per_cpu_s") / rate("peer_packets_per_cpu_s");
    assert!((rate("ratio") / ratio - 1.0).abs() < 1e-6, "{forward:#}");
}

/// `ratio` is that of a figure and the baseline's.
fn assert_ratio(row: &Value, figure: &str) {
    let number = |key: &str| row[key].as_f64().unwrap();
    let ratio = number(figure) / number(&format!("peer_{figure}"));
    assert!((number("ratio") / ratio - 1.0).abs() < 1e-6, "{row:#}");
}

/// Figures that are there, of both sides, and are percentiles of the same.
fn assert_percentiles(row: &Value, names: &[&str]) {
    for side in ["", "peer_"] {
        let names: Vec<String> = names.iter().map(|name| format!("{side}{name}")).collect();
        let values = names.iter().map(|name| row[name].as_f64().unwrap());
        let values: Vec<f64> = values.collect();
        assert!(values[0] > 0.0 && values.is_sorted(), "{names:?}: {row:#}");
    }
}

#[test]
fn datapath_echo_gives_rates_and_percentiles_of_both_nics_and_prints_them() {
    let Some(bench) = Bench::new(&["ethtool"]) else {
        return;
    };
    let arguments = "datapath --kind echo --payload 64 --rounds 1 --seconds 1";
    let (rows, text) = rows_and_text_by_colo(&bench, arguments);
    let [row] = &rows[..] else {
        panic!("{rows:#?}");
    };
    let labels = ["kind", "nic", "peer_nic", "poll"].map(|key| row[key].as_str().unwrap());
    assert_eq!(labels, ["echo", "af_xdp", "tap", "adaptive"]);
    assert_eq!(row["payload"], 64, "{row:#}");
    for key in [
        "packets_per_s",
        "packets_per_cpu_s",
        "packets_per_process_cpu_s",
        "worker_cpu_percent",
        "process_cpu_percent",
    ] {
        positive(row, &[key, &format!("peer_{key}")]);
    }
    assert_percentiles(row, &["p50_us", "p99_us", "p999_us"]);
    let saturated = ["saturated_p50_us", "saturated_p99_us", "saturated_p999_us"];
    assert_percentiles(row, &saturated);
    for key in ["lost_percent", "saturated_lost_percent"] {
        let lost = 0.0..100.0;
        assert!(lost.contains(&row[key].as_f64().unwrap()), "{row:#}");
    }
    assert_ratio(row, "packets_per_cpu_s");
    for name in ["packets_per_cpu_s", "p50_us", "p99_us", "p999_us", "ratio"] {
        let mut lines = text.lines().map(str::split_whitespace);
        let line = lines.find(|line| line.clone().next() == Some(name));
        assert!(line.is_some_and(|line| line.count() > 1), "{name}: {text}");
    }
}

#[test]
fn datapath_latency_gives_a_row_for_each_request_with_what_the_pair_adds() {
    let Some(bench) = Bench::new(&[]) else {
        return;
    };
    let arguments =
        "datapath --kind latency --payload 64,1400 --tx in-place --rounds 1 --requests 100";
    let rows = rows_by_colo(&bench, arguments);
    let requests: Vec<_> = rows
        .iter()
        .map(|row| (&row["request"], &row["payload"]))
        .collect();
    let known = [("udp", 64), ("udp", 1400), ("http", 100), ("resp", 7)]
        .map(|(n, len)| (n.into(), len.into()));
    assert_eq!(
        requests,
        known.each_ref().map(|(n, len): &(Value, Value)| (n, len))
    );
    for row in &rows {
        assert_eq!(row["kind"], "latency", "{row:#}");
        assert_percentiles(row, &["p50_us", "p99_us"]);
        assert_ratio(row, "p50_us");
        let number = |key: &str| row[key].as_f64().unwrap();
        for of in ["p50_us", "p99_us"] {
            let added = number(of) - number(&format!("peer_{of}"));
            let given = number(&format!("added_{of}"));
            assert!((given - added).abs() < 1e-6, "{of} in {row:#}");
        }
        let parts = [
            "link_p50_us",
            "link_p99_us",
            "wakeup_p50_us",
            "switch_p50_us",
        ];
        positive(row, &parts);
    }
}

#[test]
fn datapath_virtqueues_gives_a_row_beside_dpdk() {
    let Some(bench) = Bench::new(&["dpdk-testpmd"]) else {
        return;
    };
    let arguments = "datapath --kind virtqueues --payload 64 --rounds 1";
    let rows = rows_by_colo(&bench, arguments);
    let [row] = &rows[..] else {
        panic!("{rows:#?}");
    };
    assert_eq!(
        (&row["kind"], &row["payload"]),
        (&"virtqueues".into(), &64.into())
    );
    assert_eq!(
        row["tx"], "twin",
        "short frames are copied in any case: {row:#}"
    );
    positive(row, &["pairs_per_s", "peer_packets_per_s"]);
    // One round, or on a machine that moved in all of them each that was made.
    let ratio = |round: &Value| {
        positive(round, &["pairs_per_s", "peer_packets_per_s"]);
        round["pairs_per_s"].as_f64().unwrap() / round["peer_packets_per_s"].as_f64().unwrap()
    };
    let mut ratios: Vec<_> = row["rounds"]
        .as_array()
        .unwrap()
        .iter()
        .map(ratio)
        .collect();
    ratios.sort_by(f64::total_cmp);
    assert!([1, 3].contains(&ratios.len()), "{row:#}");
    for (key, expected) in [
        ("ratio_min", ratios[0]),
        ("ratio", ratios[ratios.len() / 2]),
        ("ratio_max", ratios[ratios.len() - 1]),
    ] {
        let told = row[key].as_f64().unwrap();
        assert!((told / expected - 1.0).abs() < 1e-6, "{key}: {row:#}");
    }
}
