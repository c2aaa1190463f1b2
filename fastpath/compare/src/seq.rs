//! TCP sequence arithmetic (RFC 9293 section 3.4): comparisons modulo 2^32.
//!
//! Invariant: every function is right as long as the two numbers are less than 2^31 apart.

/// `a` comes before `b`.
pub const fn lt(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// `a` comes before `b` or is `b`.
pub const fn le(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) <= 0
}

/// The later one.
pub const fn max(a: u32, b: u32) -> u32 {
    if lt(a, b) { b } else { a }
}

/// The earlier one.
pub const fn min(a: u32, b: u32) -> u32 {
    if lt(b, a) { b } else { a }
}

/// The later one of a number and one that may be unknown.
pub const fn max_known(a: u32, b: Option<u32>) -> u32 {
    match b {
        Some(b) => max(a, b),
        None => a,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comparisons_survive_the_wrap() {
        assert!(lt(u32::MAX, 0));
        assert!(lt(u32::MAX - 5, 10));
        assert!(!lt(10, u32::MAX - 5));
        assert!(le(7, 7) && !lt(7, 7));
        assert_eq!(max(u32::MAX, 3), 3);
        assert_eq!(min(u32::MAX, 3), u32::MAX);
        assert_eq!(max_known(u32::MAX, Some(1)), 1);
        assert_eq!(max_known(9, None), 9);
    }
}
