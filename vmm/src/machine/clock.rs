//! How a guest's clocks go on in a restored machine (rule 16).
//!
//! A record says what the time stamp counter was at which wall clock time. At the resume it is set to
//! what it would be now, had the guest never stopped: forward by the time that has passed, and never
//! behind what this machine has shown already. All vCPUs are moved by one and the same shift, so that
//! they stay as equal as they were.
//!
//! Invariants: no clock goes back; how far one jumps is bounded on both sides by what the caller knows to
//! have passed ([`Passed`]), so that hosts whose wall clocks differ do no harm to a running pair.
//!
//! Does not scale: hosts whose TSC frequencies differ by more than [`TSC_TOLERANCE_PPM`] are refused.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::record::RecordError;
use super::vcpu_ioctl::host_tsc;

/// What KVM itself takes as the same frequency: calibrations differ from boot to boot.
pub(super) const TSC_TOLERANCE_PPM: u64 = 250;
/// A guest's clock that cannot be set may be so far behind: counters of two cores.
const BEHIND_US: u64 = 1000;

/// A vCPU's time stamp counter, and when it was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TscState {
    pub(super) khz: u32,
    /// Present if KVM tells it.
    pub(super) offset: Option<u64>,
    pub(super) value: u64,
    /// Wall clock, nanoseconds since 1970.
    pub(super) realtime_ns: u64,
}

/// How this host sets a guest's TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TscControl {
    /// By its offset.
    Offset,
    /// By writing the MSR.
    Msr,
    /// Not at all: the guest sees the host's.
    Fixed,
}

/// Nanoseconds since 1970.
pub(super) fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or(Duration::ZERO).as_nanos() as u64
}

/// What is known of the time since a capture, whatever wall clocks say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Passed {
    pub(super) at_least: Duration,
    /// `None`: nobody knows.
    pub(super) at_most: Option<Duration>,
}

impl Passed {
    /// Nanoseconds from a reading of one host's wall clock until one of another's, as far as these can be believed.
    fn between_ns(self, then_ns: u64, now_ns: u64) -> u64 {
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let at_most = self.at_most.map_or(u64::MAX, ns);
        let elapsed = now_ns.saturating_sub(then_ns);
        elapsed.clamp(ns(self.at_least).min(at_most), at_most)
    }

    /// The same until now.
    pub(super) fn since_ns(self, then_ns: u64) -> u64 {
        self.between_ns(then_ns, realtime_ns())
    }
}

fn ticks(khz: u32, ns: u64) -> u64 {
    u64::try_from(u128::from(ns) * u128::from(khz) / 1_000_000).unwrap_or(u64::MAX)
}

impl TscState {
    /// What the counter shows after so many nanoseconds.
    pub(super) fn after(&self, ns: u64) -> u64 {
        self.value.wrapping_add(ticks(self.khz, ns))
    }

    /// Whether a vCPU with this frequency and control can go on from here.
    pub(super) fn check(&self, khz: u32, control: TscControl) -> Result<(), RecordError> {
        let unfit = |field: &str, theirs: String, ours: String| RecordError::Unfit {
            what: "vCPU",
            field: field.to_owned(),
            theirs,
            ours,
        };
        let apart = u64::from(self.khz.abs_diff(khz)) * 1_000_000;
        if apart > u64::from(khz) * TSC_TOLERANCE_PPM {
            let (theirs, ours) = (format!("{} kHz", self.khz), format!("{khz} kHz"));
            return Err(unfit("TSC frequency", theirs, ours));
        }
        let present = host_tsc();
        let behind = self.value.saturating_sub(present);
        if control == TscControl::Fixed && behind > ticks(khz, BEHIND_US * 1000) {
            let (theirs, ours) = (self.value.to_string(), format!("{present} and fixed"));
            return Err(unfit("TSC", theirs, ours));
        }
        Ok(())
    }
}

/// The offset of each vCPU, given what each has now. `records` and `present` have the same order.
pub(super) fn offsets(
    records: &[TscState],
    present: &[Option<u64>],
    passed: Passed,
) -> Vec<Option<u64>> {
    offsets_at(host_tsc(), records, present, |tsc| {
        passed.since_ns(tsc.realtime_ns)
    })
}

fn offsets_at(
    host: u64,
    records: &[TscState],
    present: &[Option<u64>],
    elapsed_ns: impl Fn(&TscState) -> u64,
) -> Vec<Option<u64>> {
    // Offsets are signed: they are added modulo 2^64.
    let ahead = |a: u64, b: u64| a.wrapping_sub(b) as i64;
    // How much more than in the record each vCPU's offset would have to be; all take the largest.
    let shift = records
        .iter()
        .zip(present)
        .filter_map(|(record, &own)| {
            let (own, then) = (own?, record.offset.unwrap_or(0));
            let wanted = record.after(elapsed_ns(record)).wrapping_sub(host);
            Some(ahead(wanted, then).max(ahead(own, then)))
        })
        .max();
    let shifted = |record: &TscState| {
        let then = record.offset.unwrap_or(0);
        shift.map(|shift| then.wrapping_add_signed(shift))
    };
    records.iter().map(shifted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: u32 = 1_000_000;

    fn tsc(value: u64, offset: u64) -> TscState {
        TscState {
            khz: KHZ,
            offset: Some(offset),
            value,
            realtime_ns: 0,
        }
    }

    #[test]
    fn rule_16_a_clock_jumps_forward_by_what_has_passed_on_every_vcpu_alike() {
        // The record's host had a TSC of 900, this one has 5000; 70 ns have passed since.
        let records = [tsc(1000, 100), tsc(1007, 107)];
        let present = [Some(0u64.wrapping_sub(5000)), Some(0u64.wrapping_sub(4990))];
        let offsets = offsets_at(5000, &records, &present, |_| 70);
        let shown: Vec<_> = offsets
            .iter()
            .map(|offset| 5000u64.wrapping_add(offset.unwrap()))
            .collect();
        assert_eq!(shown, [1070, 1077]);
    }

    #[test]
    fn rule_16_a_clock_never_goes_back() {
        // This machine has shown 2000 already.
        let present = [Some(0u64.wrapping_sub(3000)), Some(0u64.wrapping_sub(3000))];
        let records = [tsc(1000, 100), tsc(1007, 107)];
        let offsets = offsets_at(5000, &records, &present, |_| 70);
        for (offset, present) in offsets.iter().zip(present) {
            let ahead = offset.unwrap().wrapping_sub(present.unwrap()) as i64;
            assert!((0..10).contains(&ahead), "{ahead}");
        }
        assert_eq!(offsets_at(5000, &records, &[None, None], |_| 70), [None; 2]);
    }

    #[test]
    fn rule_16_wall_clocks_are_believed_between_what_has_passed_at_least_and_at_most() {
        const MS: u64 = 1_000_000;
        let passed = |least: u64, most: u64| Passed {
            at_least: Duration::from_millis(least),
            at_most: Some(Duration::from_millis(most)),
        };
        let then_ns = 1_000_000 * MS;
        // What the other host's clock shows 3 ms later, if it is ahead by so much.
        let ahead = |by_ms: i64| (then_ns + 3 * MS).saturating_add_signed(by_ms * MS as i64);
        for (by_ms, found_ms) in [
            (0, 3),
            (1, 4),
            (900, 5),
            (3_600_000, 5),
            (-2, 2),
            (-900, 2),
            (-3_600_000, 2),
        ] {
            let found_ns = passed(2, 5).between_ns(then_ns, ahead(by_ms));
            assert_eq!(found_ns, found_ms * MS, "{by_ms} ms ahead");
        }
        // Without a stop before the capture, the time since then is all that is known.
        assert_eq!(passed(2, 2).between_ns(then_ns, ahead(900)), 2 * MS);
        let unknown = Passed::default();
        assert_eq!(unknown.between_ns(then_ns, ahead(60_000)), 60_003 * MS);
        assert_eq!(unknown.between_ns(then_ns, ahead(-60_000)), 0);
        assert!(unknown.since_ns(realtime_ns() - MS) >= MS);
    }

    #[test]
    fn rule_22_other_frequencies_and_a_fixed_clock_that_is_behind_are_refused_by_name() {
        let here = host_tsc();
        let good = tsc(here, 0);
        good.check(KHZ, TscControl::Fixed).unwrap();
        good.check(KHZ + 200, TscControl::Fixed).unwrap();
        let refused = good.check(KHZ + 300, TscControl::Offset).unwrap_err();
        assert!(refused.to_string().contains("TSC frequency"), "{refused}");
        let later = tsc(here + (1 << 40), 0);
        later.check(KHZ, TscControl::Offset).unwrap();
        let refused = later.check(KHZ, TscControl::Fixed).unwrap_err();
        assert!(refused.to_string().contains("and fixed"), "{refused}");
    }
}
