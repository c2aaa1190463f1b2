//! The demo guest, built and embedded.
