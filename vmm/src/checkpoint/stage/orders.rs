//! The control thread's orders to the secondary's checkpoint thread.
//!
//! Invariants: an order wakes the thread; an order for digests outlives the checkpoint that was waiting for its word when
//! it came, unless that checkpoint is applied: the primary waits for these digests.
//!
//! Does not carry orders out.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};

use crate::checkpoint::channel::Waker;
use crate::checkpoint::pages::PageBitmap;
use crate::checkpoint::stop::StopNumber;

/// What the control thread orders.
#[derive(Debug)]
pub enum StageCommand {
    /// The SVM stands still: send the digests of these pages.
    Digests {
        /// The epoch that ends.
        epoch: u64,
        /// For the records (rule 18).
        generation: u64,
        /// Which stop it is.
        stop: StopNumber,
        /// What it has written since the last commit.
        dirty: Box<PageBitmap>,
    },
    /// Apply what was [staged](super::StageEvent::Staged) and let the SVM run, or stand still there (`halt`).
    Apply {
        /// Remus mode.
        halt: bool,
    },
    /// Forget it.
    Discard,
    /// The page channel goes on over these.
    Reopen(Vec<TcpStream>),
}

/// Gives orders to the thread; dropped, it ends the thread.
#[derive(Debug)]
pub struct StageOrders {
    pub(super) commands: Sender<StageCommand>,
    pub(super) waker: Waker,
    /// See [`Self::begun_epoch`].
    pub(super) begun: Arc<AtomicU64>,
}

impl StageOrders {
    /// The thread has another channel, which this wakes.
    pub fn rewire(&mut self, waker: Waker) {
        self.waker = waker;
        // For what was ordered meanwhile.
        self.waker.wake();
    }

    /// The epoch of the last checkpoint that began to come in, 0 before the first. Read, not told of: whoever asks does so now
    /// and then, and a checkpoint that takes its usual course needs nobody to be woken for this.
    pub fn begun_epoch(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    /// False if the thread has ended.
    pub fn give(&self, command: StageCommand) -> bool {
        let given = self.commands.send(command).is_ok();
        self.waker.wake();
        given
    }
}

impl Drop for StageOrders {
    fn drop(&mut self) {
        self.waker.shut_down();
    }
}

/// What becomes of a checkpoint that is whole and accepted.
#[derive(Debug)]
pub(super) enum Word {
    /// See [`StageCommand::Apply`].
    Apply { halt: bool },
    /// It was aborted meanwhile.
    Discard {
        /// The SVM has stopped anew: to be done then.
        then: Option<StageCommand>,
    },
    /// Nobody gives orders any more.
    None,
}

/// Waits for the control thread's word on a checkpoint.
pub(super) fn await_word(commands: &Receiver<StageCommand>) -> Word {
    let mut later = None;
    loop {
        match commands.recv() {
            Err(_) => return Word::None,
            // Only the last stop of an SVM has a list that somebody waits for.
            Ok(digests @ StageCommand::Digests { .. }) => later = Some(digests),
            // Streams are opened anew only by who waits for them.
            Ok(StageCommand::Reopen(_)) => {}
            Ok(StageCommand::Discard) => return Word::Discard { then: later },
            // The stop of which the list would be is over.
            Ok(StageCommand::Apply { halt }) => return Word::Apply { halt },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    fn digests(stop: StopNumber) -> StageCommand {
        StageCommand::Digests {
            epoch: 1,
            generation: 1,
            stop,
            dirty: Box::default(),
        }
    }

    #[test]
    fn rule_14_a_stop_that_overtakes_the_word_on_an_aborted_checkpoint_gets_its_digests() {
        let (orders, commands) = channel();
        let mut number = StopNumber::default();
        for _ in 0..2 {
            orders.send(digests(number.advance())).unwrap();
        }
        orders.send(StageCommand::Discard).unwrap();
        let word = await_word(&commands);
        assert!(
            matches!(word, Word::Discard { then: Some(StageCommand::Digests { stop, .. }) } if stop == number),
            "{word:?}"
        );
        // The next checkpoint's word says nothing of it.
        orders.send(StageCommand::Discard).unwrap();
        let word = await_word(&commands);
        assert!(matches!(word, Word::Discard { then: None }), "{word:?}");
        // An SVM that goes on from a commit has no stop before it.
        orders.send(digests(number.advance())).unwrap();
        orders.send(StageCommand::Apply { halt: true }).unwrap();
        let word = await_word(&commands);
        assert!(matches!(word, Word::Apply { halt: true }), "{word:?}");
        drop(orders);
        assert!(matches!(await_word(&commands), Word::None));
    }
}
