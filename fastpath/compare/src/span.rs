//! A range of payload bytes that a policy leaves out of the comparison.

/// Bytes `from..end`; an end of `u32::MAX` means all that follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    from: u64,
    end: u64,
}

impl Span {
    pub(crate) fn new(from: u32, end: u32) -> Self {
        let end = if end == u32::MAX {
            u64::MAX
        } else {
            u64::from(end)
        };
        Self {
            from: u64::from(from),
            end,
        }
    }

    /// Looks for a difference in `n` bytes that begin at `place`, outside of the span.
    /// `difference(at, n)` compares `n` bytes that are `at` behind the first.
    pub(crate) fn first_counted(
        &self,
        place: u64,
        n: usize,
        difference: impl Fn(usize, usize) -> Option<usize>,
    ) -> Option<usize> {
        let within = |number: u64| number.saturating_sub(place).min(n as u64) as usize;
        let (from, end) = (within(self.from), within(self.end.max(self.from)));
        difference(0, from).or_else(|| Some(end + difference(end, n - end)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn exactly_the_span_is_left_out(from in 0u32..12, end in 0u32..12, place in 0u64..12, n in 0usize..12, at in 0usize..12) {
            let span = Span::new(from, end);
            let differs = |start: usize, n: usize| (start..start + n).contains(&at).then(|| at - start);
            let number = place + at as u64;
            let is_left_out = (u64::from(from)..u64::from(end)).contains(&number);
            let expected = (at < n && !is_left_out).then_some(at);
            prop_assert_eq!(span.first_counted(place, n, differs), expected);
        }
    }

    #[test]
    fn an_open_span_has_no_end() {
        let span = Span::new(4, u32::MAX);
        assert_eq!(
            span.first_counted(u64::from(u32::MAX), 9, |_, n| (n > 0).then_some(0)),
            None
        );
    }
}
