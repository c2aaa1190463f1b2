//! Compiles the XDP program with clang into `OUT_DIR`, where the loader embeds it from.
//!
//! Does not download anything, and has no fallback: without clang the build stops.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const SOURCE: &str = "src/xdp/program.bpf.c";
const PACKAGES: &str = "on Debian: apt-get install clang linux-libc-dev";

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=CLANG");
    match compile() {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            for line in reason.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn compile() -> Result<(), String> {
    let out = PathBuf::from(variable("OUT_DIR")?).join("program.bpf.o");
    let target = match variable("CARGO_CFG_TARGET_ENDIAN")?.as_str() {
        "big" => "bpfeb",
        _ => "bpfel",
    };
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let mut command = Command::new(&clang);
    command
        .args([
            "-target", target, "-O2", "-g", "-Wall", "-Wextra", "-Werror",
        ])
        .args(["-c", SOURCE, "-o"])
        .arg(&out);
    // Debian keeps <asm/types.h> in the directory of the architecture, which clang searches for
    // its own target only.
    let arch = variable("CARGO_CFG_TARGET_ARCH")?;
    let headers = format!("/usr/include/{arch}-linux-gnu");
    if Path::new(&headers).is_dir() {
        command.arg("-isystem").arg(headers);
    }
    let output = command.output().map_err(|e| {
        format!(
            "cannot run {clang} (needed to compile {SOURCE}): {e}; {PACKAGES}; \
             or name a clang in the environment variable CLANG"
        )
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!(
            "{clang} cannot compile {SOURCE} ({}); if a header is missing, {PACKAGES}\n{said}",
            output.status
        ));
    }
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|e| format!("cargo did not set {name}: {e}"))
}
