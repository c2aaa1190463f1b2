//! Network namespaces, processes and load for the demo, tests and benches.
