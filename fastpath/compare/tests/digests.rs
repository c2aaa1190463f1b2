//! The tests of the comparator once more, with the SVM's output as digests: nothing may be released that would not
//! be with bytes, and nothing held for longer than it takes to fetch them.
#![allow(clippy::unwrap_used)] // A failed set-up is a failed test.
#![allow(clippy::duplicate_mod, reason = "each of the files has its rig")]

#[path = "datagram_properties.rs"]
mod datagram_properties;
#[path = "findings.rs"]
mod findings;
#[path = "fragment_properties.rs"]
mod fragment_properties;
#[path = "long_epochs.rs"]
mod long_epochs;
#[path = "long_streams.rs"]
mod long_streams;
#[path = "pair_properties.rs"]
mod pair_properties;
#[path = "primary.rs"]
mod primary;
#[path = "primary_contents.rs"]
mod primary_contents;
#[path = "primary_features.rs"]
mod primary_features;
#[path = "primary_fragments.rs"]
mod primary_fragments;
#[path = "primary_policy.rs"]
mod primary_policy;
#[path = "release_properties.rs"]
mod release_properties;
#[path = "stream_properties.rs"]
mod stream_properties;
#[path = "takeover.rs"]
mod takeover;
