//! How the kernel is told of what is in a tx ring.
//!
//! Invariants: it is told only while the ring asks for it (need_wakeup); a call that came to nothing ends the batch, so no
//! thread calls in vain over and over; what is left stays in the ring, in order, for the next batch; whatever was thrown away
//! is counted.
//!
//! Does not wait.

use std::io;

use super::socket::Kick;

/// A tx ring with its completions.
pub(crate) trait TxRing {
    /// Pieces that the kernel has not taken yet.
    fn pending(&mut self) -> u32;

    /// Whether the kernel must be told of them.
    fn needs_wakeup(&self) -> bool;

    /// Tells it: one system call.
    fn kick(&mut self) -> io::Result<Kick>;

    /// Takes back what has been sent; how many pieces. Without room for completions the kernel sends nothing.
    fn reap(&mut self) -> u32;
}

/// What came of telling the kernel.
#[derive(Debug, Default)]
pub(crate) struct Kicks {
    /// System calls.
    pub(crate) calls: u32,
    /// Times that the ring asked for one.
    pub(crate) asked: u32,
    /// Calls after which the kernel had taken nothing.
    pub(crate) in_vain: u32,
    /// Frames that it threw away, because the interface has no carrier or no room.
    pub(crate) dropped: u32,
    /// A call that failed for no reason that passes by itself.
    pub(crate) failure: Option<io::Error>,
}

/// Makes the kernel send what was submitted, with `calls_max` calls at most.
pub(crate) fn kick_all(ring: &mut impl TxRing, calls_max: u32) -> Kicks {
    let mut kicks = Kicks::default();
    while kicks.calls < calls_max {
        let pending = ring.pending();
        if pending == 0 || !ring.needs_wakeup() {
            break;
        }
        kicks.asked += 1;
        kicks.calls += 1;
        let outcome = ring.kick();
        let moved = ring.pending() < pending;
        kicks.in_vain += u32::from(!moved);
        let reaped = ring.reap() > 0;
        match outcome {
            // What a driver that sends by itself has not taken yet it takes without being told again.
            Ok(Kick::Done | Kick::Down) => break,
            Ok(Kick::Dropped) => kicks.dropped += 1,
            // As many as it sends in one call, or as there was room for completions.
            Ok(Kick::Again) if moved || reaped => {}
            Ok(Kick::Again) => break,
            Err(e) => {
                kicks.failure = Some(e);
                break;
            }
        }
    }
    kicks
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    /// What the kernel does with one call: takes so many pieces, and says this.
    type Answer = (u32, io::Result<Kick>);

    /// A kernel that does what it is told; completions are there at once.
    struct Kernel {
        pending: u32,
        answers: VecDeque<Answer>,
        completed: u32,
        wakes_itself: bool,
    }

    impl TxRing for Kernel {
        fn pending(&mut self) -> u32 {
            self.pending
        }

        fn needs_wakeup(&self) -> bool {
            !self.wakes_itself
        }

        fn kick(&mut self) -> io::Result<Kick> {
            let (taken, said) = self.answers.pop_front().unwrap();
            self.pending -= taken;
            self.completed += taken;
            said
        }

        fn reap(&mut self) -> u32 {
            std::mem::take(&mut self.completed)
        }
    }

    fn kicked(pending: u32, answers: Vec<Answer>) -> (Kicks, Kernel) {
        let mut kernel = Kernel {
            pending,
            answers: answers.into(),
            completed: 0,
            wakes_itself: false,
        };
        let kicks = kick_all(&mut kernel, 8);
        assert_eq!(kicks.calls, kicks.asked);
        (kicks, kernel)
    }

    #[test]
    fn one_call_is_enough_where_the_kernel_gets_through() {
        let (kicks, kernel) = kicked(5, vec![(5, Ok(Kick::Done))]);
        assert_eq!((kicks.calls, kicks.in_vain, kernel.pending), (1, 0, 0));
        let (kicks, _) = kicked(0, vec![]);
        assert_eq!(kicks.calls, 0);
    }

    #[test]
    fn a_kernel_that_looks_by_itself_is_not_told() {
        let mut kernel = Kernel {
            pending: 3,
            answers: VecDeque::new(),
            completed: 0,
            wakes_itself: true,
        };
        assert_eq!(kick_all(&mut kernel, 8).calls, 0);
        // One that asked to be told and sends later is told once.
        let (kicks, kernel) = kicked(3, vec![(0, Ok(Kick::Done))]);
        assert_eq!((kicks.calls, kernel.pending), (1, 3));
    }

    #[test]
    fn as_long_as_it_gets_on_it_is_told_again() {
        let again = |taken| (taken, Ok(Kick::Again));
        let (kicks, kernel) = kicked(70, vec![again(32), again(32), (6, Ok(Kick::Done))]);
        assert_eq!((kicks.calls, kicks.in_vain, kernel.pending), (3, 0, 0));
        // Not for ever.
        let (kicks, kernel) = kicked(70, (0..70).map(|_| again(1)).collect());
        assert_eq!((kicks.calls, kernel.pending), (8, 62));
    }

    #[test]
    fn a_call_in_vain_is_the_last_and_nothing_is_lost() {
        let (kicks, kernel) = kicked(40, vec![(32, Ok(Kick::Again)), (0, Ok(Kick::Again))]);
        assert_eq!((kicks.calls, kicks.in_vain, kernel.pending), (2, 1, 8));
        assert_eq!(kicks.dropped, 0);
        assert!(kicks.failure.is_none());
    }

    #[test]
    fn completions_that_are_taken_back_make_room_for_another_call() {
        let mut kernel = Kernel {
            pending: 2,
            answers: vec![(0, Ok(Kick::Again)), (2, Ok(Kick::Done))].into(),
            completed: 4,
            wakes_itself: false,
        };
        let kicks = kick_all(&mut kernel, 8);
        assert_eq!((kicks.calls, kicks.in_vain, kernel.pending), (2, 1, 0));
    }

    #[test]
    fn what_the_kernel_throws_away_is_counted_and_the_rest_goes_on() {
        let answers = vec![
            (1, Ok(Kick::Dropped)),
            (1, Ok(Kick::Dropped)),
            (1, Ok(Kick::Done)),
        ];
        let (kicks, kernel) = kicked(3, answers);
        assert_eq!((kicks.calls, kicks.dropped, kernel.pending), (3, 2, 0));
    }

    #[test]
    fn an_interface_that_is_down_keeps_what_is_in_the_ring() {
        let (kicks, kernel) = kicked(3, vec![(0, Ok(Kick::Down))]);
        assert_eq!((kicks.calls, kicks.in_vain, kernel.pending), (1, 1, 3));
        let (kicks, kernel) = kicked(3, vec![(0, Err(io::Error::other("?")))]);
        assert_eq!((kicks.calls, kernel.pending), (1, 3));
        assert!(kicks.failure.is_some());
    }
}
