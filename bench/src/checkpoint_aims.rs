//! What the figures of `checkpoint` are to stay below or to reach, and which of them do.
//!
//! Invariants: an aim that belongs to one share of equal pages is `None` in rows of another; bytes that went ahead of a
//! checkpoint count with those of the checkpoint.
//!
//! Does not make the benchmark fail: a missed aim is told.

use serde::Serialize;

/// What a pause may take besides copies, in microseconds.
const PAUSE_US: f64 = 300.0;
/// And how often each captured page could be copied meanwhile.
const COPIES: f64 = 2.0;
/// Where so many of a hundred pages are the same on both guests,
const SENT_SAME_PCT: u32 = 75;
/// less than this part of the dirty bytes travels.
const SENT_OF_DIRTY: f64 = 0.3;
/// Where nothing is the same, so that the transfer is bytes on the link and not digests of pages that stay,
const LINK_SAME_PCT: u32 = 0;
/// it has at least this part of what the link carries, as a stream without end and of as many bytes after a rest.
const LINK_OF_RAW: f64 = 0.8;

/// The figures of a row that there are aims for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measured {
    pub(crate) same_pct: u32,
    pub(crate) memcpy_us: f64,
    pub(crate) pause_us: f64,
    pub(crate) stolen_us: f64,
    /// With what went ahead.
    pub(crate) sent_of_dirty: f64,
    pub(crate) link_of_raw: f64,
    pub(crate) link_of_burst: f64,
}

/// Which aims a row meets.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Aims {
    /// Of pause and stolen time.
    pub(crate) limit_us: f64,
    pub(crate) pause_met: bool,
    pub(crate) stolen_met: bool,
    pub(crate) sent_met: Option<bool>,
    pub(crate) link_met: Option<bool>,
    pub(crate) burst_met: Option<bool>,
}

impl Aims {
    pub(crate) fn of(row: &Measured) -> Self {
        let limit_us = COPIES * row.memcpy_us + PAUSE_US;
        let on_link = |part: f64| (row.same_pct == LINK_SAME_PCT).then_some(part >= LINK_OF_RAW);
        Self {
            limit_us,
            pause_met: row.pause_us <= limit_us,
            stolen_met: row.stolen_us <= limit_us,
            sent_met: (row.same_pct == SENT_SAME_PCT).then_some(row.sent_of_dirty < SENT_OF_DIRTY),
            link_met: on_link(row.link_of_raw),
            burst_met: on_link(row.link_of_burst),
        }
    }

    /// What the columns of [`Self::cells`] are.
    pub(crate) fn header() -> [String; 5] {
        let percent = LINK_OF_RAW * 100.0;
        [
            "pause, limit us".to_owned(),
            "stolen, limit us".to_owned(),
            format!("sent of dirty at {SENT_SAME_PCT} % (< {SENT_OF_DIRTY:.2})"),
            format!("link of raw at {LINK_SAME_PCT} % (>= {percent:.0} %)"),
            "of a burst".to_owned(),
        ]
    }

    /// Each figure beside its limit, and whether that is met.
    pub(crate) fn cells(&self, row: &Measured) -> [String; 5] {
        let time = |us: f64, met| format!("{us:.0}, {:.0}: {}", self.limit_us, told(met));
        let share = |figure: String, met: Option<bool>| {
            met.map_or("-".to_owned(), |met| format!("{figure}: {}", told(met)))
        };
        [
            time(row.pause_us, self.pause_met),
            time(row.stolen_us, self.stolen_met),
            share(format!("{:.3}", row.sent_of_dirty), self.sent_met),
            share(format!("{:.0} %", row.link_of_raw * 100.0), self.link_met),
            share(
                format!("{:.0} %", row.link_of_burst * 100.0),
                self.burst_met,
            ),
        ]
    }
}

fn told(met: bool) -> &'static str {
    if met { "met" } else { "MISSED" }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: Measured = Measured {
        same_pct: 75,
        memcpy_us: 100.0,
        pause_us: 500.0,
        stolen_us: 500.0,
        sent_of_dirty: 0.299,
        link_of_raw: 0.8,
        link_of_burst: 0.8,
    };

    #[test]
    fn each_aim_is_met_up_to_its_limit_and_missed_behind_it() {
        let met = Aims::of(&ROW);
        assert_eq!(met.limit_us, 500.0);
        assert!(met.pause_met && met.stolen_met && met.sent_met == Some(true));
        let slow = Aims::of(&Measured {
            pause_us: 499.0,
            stolen_us: 501.0,
            sent_of_dirty: 0.3,
            ..ROW
        });
        assert!(slow.pause_met && !slow.stolen_met && slow.sent_met == Some(false));
        let paused = Measured {
            pause_us: 501.0,
            ..ROW
        };
        assert!(!Aims::of(&paused).pause_met);
        for (raw, burst) in [(0.8, 0.79), (0.79, 0.8)] {
            let row = Measured {
                same_pct: 0,
                link_of_raw: raw,
                link_of_burst: burst,
                ..ROW
            };
            let aims = Aims::of(&row);
            assert_eq!(aims.link_met, Some(raw >= 0.8));
            assert_eq!(aims.burst_met, Some(burst >= 0.8));
        }
    }

    #[test]
    fn shares_are_judged_where_as_many_pages_are_the_same() {
        let of = |same_pct| Aims::of(&Measured { same_pct, ..ROW });
        assert_eq!((of(75).sent_met, of(75).link_met), (Some(true), None));
        assert_eq!((of(0).sent_met, of(0).link_met), (None, Some(true)));
        assert_eq!((of(50).sent_met, of(50).link_met), (None, None));
    }

    #[test]
    fn figures_stand_beside_their_limits() {
        let cells = Aims::of(&ROW).cells(&ROW);
        assert_eq!(
            cells,
            ["500, 500: met", "500, 500: met", "0.299: met", "-", "-"]
        );
        let late = Measured {
            stolen_us: 600.0,
            same_pct: 0,
            link_of_raw: 0.5,
            link_of_burst: 0.9,
            ..ROW
        };
        let cells = Aims::of(&late).cells(&late);
        assert_eq!(
            [&cells[1], &cells[3], &cells[4]],
            ["600, 500: MISSED", "50 %: MISSED", "90 %: met"]
        );
    }
}
