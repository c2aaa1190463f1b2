//! When the space for held output counts as exhausted (rule 14), and when there is room again.
//!
//! Invariants: a moment without room is back-pressure and nothing else; only a while of it is told, once, and taken back
//! once half of the space is free.
//!
//! Does not keep the guest's output back: whoever has no room does not read it.

/// So long there must be no room: a commit that is about to come makes some.
const PATIENCE_US: u64 = 5_000;

/// Watches one shard's space.
#[derive(Debug)]
pub(super) struct HoldWatch {
    /// So many frames of room take it back.
    enough_frames: usize,
    full_since_us: Option<u64>,
    told: bool,
}

impl HoldWatch {
    /// For a space of so many frames.
    pub(super) fn new(frames: usize) -> Self {
        Self {
            enough_frames: frames.div_ceil(2).max(1),
            full_since_us: None,
            told: false,
        }
    }

    /// There is room for so many frames now. Gives what is to be told, if anything: that there is no space (true), or
    /// that there is again.
    pub(super) fn look(&mut self, now_us: u64, room_frames: usize) -> Option<bool> {
        if self.told {
            let enough = room_frames >= self.enough_frames;
            self.told = !enough;
            return enough.then_some(false);
        }
        if room_frames > 0 {
            self.full_since_us = None;
            return None;
        }
        let since_us = *self.full_since_us.get_or_insert(now_us);
        self.told = since_us + PATIENCE_US <= now_us;
        if self.told {
            self.full_since_us = None;
        }
        self.told.then_some(true)
    }

    /// When to look again, though nothing happens.
    pub(super) fn deadline_us(&self) -> Option<u64> {
        self.full_since_us.map(|since_us| since_us + PATIENCE_US)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_14_space_is_exhausted_after_a_while_without_room_and_back_at_half() {
        let mut watch = HoldWatch::new(100);
        assert_eq!(watch.look(0, 1), None);
        assert_eq!(watch.deadline_us(), None);
        assert_eq!(watch.look(10, 0), None);
        assert_eq!(watch.deadline_us(), Some(10 + PATIENCE_US));
        // A moment of room starts the while anew.
        assert_eq!(watch.look(20, 1), None);
        assert_eq!(watch.look(30, 0), None);
        assert_eq!(watch.look(29 + PATIENCE_US, 0), None);
        assert_eq!(watch.look(30 + PATIENCE_US, 0), Some(true));
        assert_eq!(watch.deadline_us(), None);
        for room in [0, 1, 49] {
            assert_eq!(watch.look(10_000_000, room), None, "told once");
        }
        assert_eq!(watch.look(10_000_000, 50), Some(false));
        assert_eq!(watch.look(10_000_000, 50), None);
        assert_eq!(watch.look(10_000_000, 0), None);
        assert_eq!(watch.look(10_000_000 + PATIENCE_US, 0), Some(true));
    }
}
