//! See `colo_tests::fuzz::pairs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| colo_tests::fuzz::pairs(input));
