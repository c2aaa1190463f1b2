//! The shipped binary needs nothing at run time but libc.

use std::process::Command;

use colo_tests::bench::{colo, installed};

/// What glibc and the compiler's runtime bring.
const ALLOWED: [&str; 5] = [
    "libc.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libpthread.so.0",
    "ld-linux-x86-64.so.2",
];

#[test]
fn the_dynamic_section_names_libc_only() {
    if !installed("readelf") {
        println!("SKIPPED: readelf is not installed");
        return;
    }
    let output = Command::new("readelf")
        .arg("-d")
        .arg(colo())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let needed: Vec<&str> = text
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| line.split(['[', ']']).nth(1))
        .collect();
    assert!(needed.contains(&"libc.so.6"), "{text}");
    for library in needed {
        assert!(ALLOWED.contains(&library), "needs {library}");
    }
    assert!(
        !text.contains("RPATH") && !text.contains("RUNPATH"),
        "{text}"
    );
}
