//! Packet filters that the kernel runs for colo.
