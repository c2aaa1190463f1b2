//! How long to wait for an acknowledgement (the estimator of RFC 6298, with the times of a local link).

/// Shortest wait: above the peer's delay of acknowledgements.
const RTO_MIN_US: u64 = 1_000;
/// Longest wait.
const RTO_MAX_US: u64 = 200_000;
/// Before the first measurement.
const RTO_START_US: u64 = 5_000;

#[derive(Debug, Default)]
pub(super) struct Rtt {
    smoothed_us: Option<u64>,
    variation_us: u64,
}

impl Rtt {
    pub(super) fn sample(&mut self, rtt_us: u64) {
        let Some(smoothed) = &mut self.smoothed_us else {
            self.smoothed_us = Some(rtt_us);
            self.variation_us = rtt_us / 2;
            return;
        };
        self.variation_us = (3 * self.variation_us + smoothed.abs_diff(rtt_us)) / 4;
        *smoothed = (7 * *smoothed + rtt_us) / 8;
    }

    /// Zero before the first measurement.
    pub(super) fn smoothed_us(&self) -> u64 {
        self.smoothed_us.unwrap_or(0)
    }

    /// The wait after `rounds` in vain. The first three are equally long: silence on a local link is noticed soon.
    pub(super) fn timeout_us(&self, rounds: u32) -> u64 {
        let plain_us = self
            .smoothed_us
            .map_or(RTO_START_US, |s| s + 4 * self.variation_us);
        let doublings = rounds.saturating_sub(2).min(8);
        (plain_us.max(RTO_MIN_US) << doublings).min(RTO_MAX_US)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows_what_is_measured_within_its_limits() {
        let mut rtt = Rtt::default();
        assert_eq!(rtt.timeout_us(0), RTO_START_US);
        for _ in 0..100 {
            rtt.sample(100);
        }
        assert_eq!(rtt.timeout_us(0), RTO_MIN_US);
        for _ in 0..100 {
            rtt.sample(20_000);
        }
        assert!((20_000..40_000).contains(&rtt.timeout_us(2)));
        assert_eq!(rtt.timeout_us(3), 2 * rtt.timeout_us(0));
        assert_eq!(rtt.timeout_us(100), RTO_MAX_US);
    }
}
