//! The `colo` command.

fn main() {}
