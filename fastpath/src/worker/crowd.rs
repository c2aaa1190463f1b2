//! Whether a thread that polls has to share its processor with another that polls, and is to look for another one.
//!
//! In a pair a frame passes several workers, each of which polls for what the one before it sends. Two of them on one
//! processor let each other run at every turn, so that neither ever sleeps: Linux then leaves both where they are,
//! though another processor idles, and all that the hosts do at the same time is done one after the other.
//!
//! Invariants: it is told of each turn in which others were let run; what counts are turns that brought nothing and in
//! which somebody else did run, since one that brings work has let the right one run. A thread that moves does so after
//! [`LOOKS_MIN`] looks that all found a crowd, and after twice as many where that did not help, up to [`LOOKS_MAX`]. Two that
//! share a processor do not wait equally long ([`Crowd::look`]), so that only one of them moves.
//!
//! Does not move anybody: [`crate::processor`] does.

/// Turns in vain after which it looks.
const TURNS: u64 = 64;
/// Looks in a row that make it move.
const LOOKS_MIN: u32 = 8;
const LOOKS_MAX: u32 = LOOKS_MIN << 8;

/// What is known of a thread's company.
#[derive(Debug)]
pub(super) struct Crowd {
    /// Turns since the last look: all, and those that brought work.
    turns: u64,
    useful: u64,
    /// The last turn has not brought anything yet.
    open: bool,
    /// How often others had run at the last look.
    switches: u64,
    /// Looks in a row that found a crowd, and how many make it move.
    crowded: u32,
    enough: u32,
    patience: u32,
}

impl Default for Crowd {
    fn default() -> Self {
        Self {
            turns: 0,
            useful: 0,
            open: false,
            switches: 0,
            crowded: 0,
            enough: LOOKS_MIN,
            patience: LOOKS_MIN,
        }
    }
}

impl Crowd {
    /// Others have been let run. Gives whether it is time to look.
    #[inline]
    pub(super) fn yielded(&mut self) -> bool {
        self.turns += 1;
        self.open = true;
        self.turns - self.useful > TURNS
    }

    /// A step found work.
    #[inline]
    pub(super) fn worked(&mut self) {
        self.useful += u64::from(std::mem::take(&mut self.open));
    }

    /// Others have run so often since this thread began, while it wanted to. Gives whether it is time to move. `dice`
    /// are not the same for two threads.
    pub(super) fn look(&mut self, switches: u64, dice: u64) -> bool {
        let others = switches.saturating_sub(self.switches);
        let in_vain = self.turns - self.useful;
        let crowded = others.saturating_sub(self.useful) > in_vain / 2;
        (self.turns, self.useful, self.switches) = (0, 0, switches);
        if !crowded {
            (self.crowded, self.patience) = (0, LOOKS_MIN);
            return false;
        }
        if self.crowded == 0 {
            self.enough = self.patience + (dice % u64::from(self.patience)) as u32;
        }
        self.crowded += 1;
        if self.crowded < self.enough {
            return false;
        }
        self.crowded = 0;
        self.patience = (self.patience * 2).min(LOOKS_MAX);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER: [u32; 0] = [];

    /// So many looks, each after turns of which others use `others` in a hundred and `useful` bring work.
    fn moves(crowd: &mut Crowd, looks: u32, others: u64, useful: u64) -> Vec<u32> {
        let mut switches = crowd.switches;
        let looked = (1..=looks).filter(|_| {
            let mut turns = 0;
            while !crowd.yielded() {
                turns += 1;
                if turns % 100 < useful {
                    crowd.worked();
                }
            }
            switches += crowd.turns * others / 100;
            crowd.look(switches, 0)
        });
        looked.collect()
    }

    #[test]
    fn who_polls_beside_another_moves_and_waits_longer_each_time() {
        let mut crowd = Crowd::default();
        let moved = moves(&mut crowd, 8 + 16 + 32, 100, 0);
        assert_eq!(moved, [8, 8 + 16, 8 + 16 + 32]);
        assert_eq!(moves(&mut crowd, 1, 0, 0), NEVER, "alone at last");
        assert_eq!(moves(&mut crowd, 8, 100, 0), [8], "which counts");
    }

    #[test]
    fn waits_have_an_end() {
        let mut crowd = Crowd::default();
        moves(&mut crowd, 100_000, 100, 0);
        assert_eq!(moves(&mut crowd, 2 * LOOKS_MAX, 100, 0).len(), 2);
    }

    #[test]
    fn turns_that_bring_work_are_not_held_against_whom_they_let_run() {
        let mut crowd = Crowd::default();
        assert_eq!(moves(&mut crowd, 1000, 60, 60), NEVER);
        assert_ne!(moves(&mut crowd, 1000, 90, 20), NEVER);
    }

    #[test]
    fn now_and_then_somebody_runs_everywhere() {
        let mut crowd = Crowd::default();
        assert_eq!(moves(&mut crowd, 1000, 45, 0), NEVER);
        for _ in 0..100 {
            assert_eq!(moves(&mut crowd, LOOKS_MIN - 1, 100, 0), NEVER);
            assert_eq!(moves(&mut crowd, 1, 10, 0), NEVER, "not in a row");
        }
    }

    #[test]
    fn two_that_share_a_processor_do_not_move_together() {
        let (mut one, mut other) = (Crowd::default(), Crowd::default());
        let first = |crowd: &mut Crowd, dice| {
            (1..)
                .find(|n| {
                    while !crowd.yielded() {}
                    crowd.look(n * (TURNS + 1), dice)
                })
                .unwrap()
        };
        assert_ne!(first(&mut one, 3), first(&mut other, 4));
    }
}
