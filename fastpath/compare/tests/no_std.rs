//! The core needs neither the standard library nor the C library: a static program that has none of
//! them is linked with it, and runs. A second one shows that the first could not be built if any
//! crate below it took in `std`.
//!
//! Checking for another target would prove the same, but hosts have only their own target's
//! libraries. That a crate says `#![no_std]` proves nothing: it may say `extern crate std` below.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::{env, fs, process};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What of the environment reaches the inner cargo: the rest may carry settings of the outer one.
const KEPT: [&str; 6] = [
    "HOME",
    "PATH",
    "CARGO_HOME",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "TMPDIR",
];

/// Replaces a file at once, for other runs of this test look at it too.
fn write(path: &Path, text: &str) {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return;
    }
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let new = path.with_extension(format!("{}.new", process::id()));
    fs::write(&new, text).unwrap();
    fs::rename(new, path).unwrap();
}

/// A package of its own, beside this test's other results, with the versions of the workspace.
fn write_package() -> PathBuf {
    let core = Path::new(env!("CARGO_MANIFEST_DIR"));
    let package = Path::new(env!("CARGO_TARGET_TMPDIR")).join("no_std");
    let manifest = format!(
        "[package]\nname = \"no-std-probe\"\nedition = \"2024\"\n\
         [workspace]\n\
         [[bin]]\nname = \"probe\"\npath = {probe:?}\n\
         [features]\nwith_std = [\"dep:needs_std\"]\n\
         [dependencies]\ncolo-compare = {{ path = {core:?} }}\n\
         needs_std = {{ path = \"needs_std\", optional = true }}\n\
         [profile.dev]\npanic = \"abort\"\ndebug = false\n",
        probe = core.join("tests/no_std/probe.rs"),
    );
    write(&package.join("Cargo.toml"), &manifest);
    let lock = fs::read_to_string(core.join("../../Cargo.lock")).unwrap();
    write(&package.join("Cargo.lock"), &lock);
    let needs_std = package.join("needs_std");
    let manifest = "[package]\nname = \"needs_std\"\nedition = \"2024\"\n";
    write(&needs_std.join("Cargo.toml"), manifest);
    let source = "#![no_std]\nextern crate std;\n";
    write(&needs_std.join("src/lib.rs"), source);
    package
}

fn cargo(package: &Path, task: &str, options: &[&str]) -> Output {
    let kept = KEPT
        .into_iter()
        .filter_map(|name| Some((name, env::var_os(name)?)));
    Command::new(env!("CARGO"))
        .current_dir(package)
        .env_clear()
        .envs(kept)
        .args([task, "--offline", "--quiet", "--bin", "probe"])
        .args(["--target", TARGET, "--target-dir"])
        .arg(package.join("target"))
        .args(options)
        .output()
        .unwrap()
}

/// No start files and no libraries: what the program needs it brings along.
const LINK: [&str; 6] = [
    "--",
    "-Crelocation-model=static",
    "-Cdefault-linker-libraries=no",
    "-Clink-arg=-nostdlib",
    "-Clink-arg=-static",
    "-Clink-arg=-no-pie",
];

#[test]
fn the_core_compares_without_a_standard_library() {
    let package = write_package();
    let built = cargo(&package, "rustc", &LINK);
    let errors = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "the program without std: {errors}");
    let program = package.join("target").join(TARGET).join("debug/probe");
    let ran = Command::new(&program).status().unwrap();
    assert!(ran.success(), "{}: {ran}", program.display());
    // The control: the same with `extern crate std` in a crate below.
    let with_std = cargo(
        &package,
        "rustc",
        &[&["--features", "with_std"], &LINK[..]].concat(),
    );
    let errors = String::from_utf8_lossy(&with_std.stderr);
    assert!(
        !with_std.status.success() && errors.contains("duplicate lang item `panic_impl`"),
        "std below goes unnoticed: {errors}"
    );
}
