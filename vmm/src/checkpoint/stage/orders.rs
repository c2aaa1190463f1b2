//! The control thread's orders to the secondary's checkpoint thread.
//!
//! Invariant: an order wakes the thread.
//!
//! Does not carry orders out.

use std::sync::mpsc::Sender;

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
    /// Apply what was [staged](StageEvent::Staged) and let the SVM run, or stand still there (`halt`).
    Apply {
        /// Remus mode.
        halt: bool,
    },
    /// Forget it.
    Discard,
}

/// Gives orders to the thread; dropped, it ends the thread.
#[derive(Debug)]
pub struct StageOrders {
    pub(super) commands: Sender<StageCommand>,
    pub(super) waker: Waker,
}

impl StageOrders {
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
