//! Builds the demo guest into `OUT_DIR`.
//!
//! The guest is a package of its own with other compiler flags, so a second cargo runs here,
//! without the variables by which the outer cargo (or clippy, or rustdoc) would pass its own
//! settings on.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Variables of the outer build that must not reach the inner one.
const OUTER: [&str; 20] = [
    "CARGO_TARGET_DIR",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_BUILD_BUILD_DIR",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_ENCODED_RUSTDOCFLAGS",
    "CARGO_INCREMENTAL",
    "CARGO_MAKEFLAGS",
    "MAKEFLAGS",
    "MFLAGS",
    "CLIPPY_ARGS",
    "CLIPPY_CONF_DIR",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTFLAGS",
    "RUSTDOC",
    "RUSTDOCFLAGS",
    "RUSTC_LINKER",
    "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
];

/// Prefixes of more such variables.
const OUTER_PREFIXES: [&str; 5] = [
    "CARGO_PKG_",
    "CARGO_FEATURE_",
    "CARGO_CFG_",
    "CARGO_PROFILE_",
    "CARGO_MANIFEST_",
];

fn main() {
    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let guest = manifest_dir.join("../guest");
    for path in [
        "src",
        "server/src",
        "server/Cargo.toml",
        "Cargo.toml",
        "Cargo.lock",
    ] {
        println!("cargo:rerun-if-changed={}", guest.join(path).display());
    }
    for path in ["build.rs", "link.ld", ".cargo/config.toml"] {
        println!("cargo:rerun-if-changed={}", guest.join(path).display());
    }
    println!("cargo:rerun-if-changed=build.rs");
    let out_dir = PathBuf::from(variable("OUT_DIR"));
    let target_dir = out_dir.join("guest");
    build(&guest, &target_dir);
    let built = target_dir.join(TARGET).join("release/colo-guest");
    let image = out_dir.join("colo-guest.elf");
    if let Err(error) = fs::copy(&built, &image) {
        panic!(
            "cannot copy {} to {}: {error}",
            built.display(),
            image.display()
        );
    }
}

fn build(guest: &Path, target_dir: &Path) {
    let mut cargo = Command::new(variable("CARGO"));
    cargo
        .current_dir(guest)
        .args([
            "build",
            "--release",
            "--locked",
            "--target",
            TARGET,
            "--target-dir",
        ])
        .arg(target_dir)
        // Without debug information: the image is embedded in the release binary.
        .args(["--config", "profile.release.strip=\"debuginfo\""]);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if OUTER.contains(&&*text) || OUTER_PREFIXES.iter().any(|p| text.starts_with(p)) {
            cargo.env_remove(&name);
        }
    }
    // The outer rustc may be clippy's driver or another wrapper's idea of it.
    cargo.env_remove("RUSTC");
    match cargo.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!(
            "building the demo guest in {} failed: {status}",
            guest.display()
        ),
        Err(error) => panic!("cannot start cargo for the demo guest: {error}"),
    }
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name} for build scripts"))
}
