//! Benchmarks, one per claim.
