//! See `colo_tests::fuzz::comparator`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| colo_tests::fuzz::comparator(input));
