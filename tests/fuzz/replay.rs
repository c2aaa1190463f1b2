//! Replays the committed corpus and the captures through the bodies of the fuzz targets, with a
//! stable compiler. What fuzzing found has tests of its own: `fastpath/compare/tests/findings.rs`.
//!
//! A corpus is one file, `corpus/TARGET.inputs`: for each input two bytes of length, little-endian,
//! then the input. To fuzz on:
//!
//! ```text
//! COLO_FUZZ_UNPACK=TARGET:DIR cargo test -p colo-tests --test fuzz_corpus
//! cargo +nightly fuzz run --fuzz-dir tests/fuzz TARGET DIR
//! cargo +nightly fuzz cmin --fuzz-dir tests/fuzz TARGET DIR
//! COLO_FUZZ_PACK=TARGET:DIR cargo test -p colo-tests --test fuzz_corpus
//! ```
//!
//! Fuzzed last at the end of November 2026, each target for 15 minutes or more (inputs tried): capture (25.7 million), parser
//! (29.1 million), pairs (315 thousand), comparator (99 thousand), secondary (304 thousand), translations (568 thousand), replay
//! (431 thousand).
//!
//! `COLO_FUZZ_INPUT=TARGET:FILE` replays one input, as libFuzzer wrote it, and shows what happens.
#![allow(missing_docs, reason = "a test")]
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.

use std::fs;
use std::path::{Path, PathBuf};

use colo_tests::fuzz;

type Body = fn(&[u8]);

const TARGETS: [(&str, Body); 7] = [
    ("parser", fuzz::parser),
    ("translations", fuzz::translations),
    ("comparator", fuzz::comparator),
    ("pairs", fuzz::pairs),
    ("secondary", fuzz::secondary),
    ("capture", fuzz::capture),
    ("replay", fuzz::replay),
];

fn body(target: &str) -> Body {
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    found.unwrap_or_else(|| panic!("no target {target}")).1
}

fn place(name: &str) -> PathBuf {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    fuzz.join(name)
}

fn corpus_file(target: &str) -> PathBuf {
    place(&format!("corpus/{target}.inputs"))
}

/// The files of a directory, in the order of their names.
fn files(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(directory);
    let entries = entries.unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let with_bytes = |path: PathBuf| {
        let bytes = fs::read(&path).unwrap();
        (path, bytes)
    };
    paths.into_iter().map(with_bytes).collect()
}

fn inputs(target: &str) -> Vec<Vec<u8>> {
    let path = corpus_file(target);
    let packed = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut rest = &packed[..];
    let mut inputs = Vec::new();
    while let Some((len, body)) = rest.split_first_chunk::<2>() {
        let (input, next) = body.split_at(usize::from(u16::from_le_bytes(*len)));
        inputs.push(input.to_vec());
        rest = next;
    }
    inputs
}

/// Runs the body; a panic is told together with what caused it.
fn replay(body: Body, name: &str, input: &[u8]) {
    let run = std::panic::catch_unwind(|| body(input));
    assert!(run.is_ok(), "{name}: {input:02x?}");
}

fn replay_corpus(target: &str) {
    let inputs = inputs(target);
    assert!(inputs.len() > 20, "the corpus of {target} is incomplete");
    for (n, input) in inputs.iter().enumerate() {
        replay(body(target), &format!("input {n} of {target}"), input);
    }
}

#[test]
fn corpus_of_parser() {
    replay_corpus("parser");
}

#[test]
fn corpus_of_translations() {
    replay_corpus("translations");
}

#[test]
fn corpus_of_comparator() {
    replay_corpus("comparator");
}

#[test]
fn corpus_of_pairs() {
    replay_corpus("pairs");
    let taken = inputs("pairs")
        .into_iter()
        .map(|input| fuzz::taken_by_twos(&input));
    let taken: usize = taken.sum();
    assert!(taken > 200, "{taken} pairs only left by twos");
}

#[test]
fn corpus_of_secondary() {
    replay_corpus("secondary");
}

#[test]
fn corpus_of_capture() {
    replay_corpus("capture");
}

#[test]
fn corpus_of_replay() {
    replay_corpus("replay");
}

/// The target and the path that a variable names.
fn asked(variable: &str) -> Option<(String, PathBuf)> {
    let value = std::env::var(variable).ok()?;
    let (target, path) = value.split_once(':').expect("TARGET:PATH");
    Some((target.to_owned(), PathBuf::from(path)))
}

#[test]
fn what_the_environment_asks_for() {
    if let Some((target, path)) = asked("COLO_FUZZ_INPUT") {
        fuzz::show();
        body(&target)(&fs::read(path).unwrap());
    }
    if let Some((target, directory)) = asked("COLO_FUZZ_PACK") {
        let mut packed = Vec::new();
        for (_, input) in files(&directory) {
            let len = u16::try_from(input.len()).expect("a small input");
            packed.extend_from_slice(&len.to_le_bytes());
            packed.extend_from_slice(&input);
        }
        fs::write(corpus_file(&target), packed).unwrap();
    }
    if let Some((target, directory)) = asked("COLO_FUZZ_UNPACK") {
        for (n, input) in inputs(&target).iter().enumerate() {
            fs::write(directory.join(format!("{n:05}")), input).unwrap();
        }
    }
}

/// The frames of a classic little-endian capture.
fn frames(capture: &[u8]) -> Vec<&[u8]> {
    let mut rest = &capture[24..];
    let mut frames = Vec::new();
    while let Some((header, body)) = rest.split_at_checked(16) {
        let len = u32::from_le_bytes(header[8..12].try_into().unwrap()) as usize;
        let (frame, next) = body.split_at(len);
        frames.push(frame);
        rest = next;
    }
    frames
}

#[test]
fn captured_frames_parse_and_translate() {
    let mut total = 0;
    for (path, capture) in files(&place("captures")) {
        let path = path.display();
        replay(fuzz::capture, &format!("{path}"), &capture);
        replay(
            fuzz::replay,
            &format!("{path}"),
            &[&[0, 0], &capture[..]].concat(),
        );
        for (n, frame) in frames(&capture).into_iter().enumerate() {
            let name = format!("frame {n} of {path}");
            replay(fuzz::parser, &name, &[&[3], frame].concat());
            let offsets = [0, 1, 2, 3, 4, 250, 251, 252, 253];
            replay(fuzz::translations, &name, &[&offsets, frame].concat());
            total += 1;
        }
    }
    assert!(total > 100, "{total} frames only");
}
