//! What a compared pair costs, counted and not timed: a regression shows on a busy machine too.

use std::process::Command;

use colo_tests::bench::{colo, installed};

/// Instructions of `colo compare --sockets` per pair of 64-byte TCP segments in 64 flows, all of user space:
/// 479 were counted with Rust 1.95 on Debian 12. The rest is room for other compilers, and for frames that the
/// scheduler lets one guest send long before the other.
const CEILING: f64 = 600.0;

#[test]
fn a_pair_takes_no_more_instructions_than_it_did() {
    if !installed("valgrind") {
        println!("SKIPPED: valgrind is not installed");
        return;
    }
    if cfg!(debug_assertions) {
        println!("SKIPPED: only an optimised build is counted");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rows.json");
    let output = Command::new(colo().with_file_name("colo-bench"))
        .args(["--colo".as_ref(), colo().as_os_str()])
        .args(["compare", "--kind", "instructions", "--protocol", "tcp"])
        .args(["--payload", "64", "--flows", "64", "--json"])
        .arg(&file)
        .output()
        .expect("build it with `cargo build --release -p colo-bench`");
    assert!(output.status.success(), "{output:?}");
    let rows: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let counted = rows[0]["instructions_per_pair"].as_f64().unwrap();
    assert!(
        (300.0..CEILING).contains(&counted),
        "{counted} instructions per pair, {CEILING} is the ceiling: profile it with callgrind, or say \
         why it has to be more"
    );
}
