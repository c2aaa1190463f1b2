//! See `colo_tests::fuzz::capture`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| colo_tests::fuzz::capture(input));
