//! How this host's guest came to its end, if it did.
//!
//! Invariants: an end that the SVM came to is not lost as long as no commit gives it another state: who takes over with it
//! does what it would do had its guest ended then.
//!
//! Does not stop anything.

use std::os::fd::{AsRawFd, RawFd};

use crate::machine::{Events, VmExit};

/// What the machine of a host tells of its guest.
#[derive(Debug)]
pub(super) struct GuestEnd {
    events: Events,
    /// Of the SVM, since its last commit.
    of_svm: Option<VmExit>,
    powered_off: bool,
}

impl GuestEnd {
    pub(super) fn new(events: Events) -> Self {
        Self {
            events,
            of_svm: None,
            powered_off: false,
        }
    }

    /// Readable when there may be news.
    pub(super) fn poll_fd(&self) -> RawFd {
        self.events.wake_fd().as_raw_fd()
    }

    /// Whether the guest switched the VM off.
    pub(super) fn is_powered_off(&self) -> bool {
        self.powered_off
    }

    /// What the VM's guest died of, once.
    pub(super) fn fault(&mut self) -> Option<String> {
        let exit = self.of_svm.take().or_else(|| self.next())?;
        match exit {
            VmExit::PowerOff => {
                self.powered_off = true;
                None
            }
            VmExit::Fault { .. } => Some(exit.to_string()),
            VmExit::Stopped => None,
        }
    }

    /// How the SVM came to its end, once; [`Self::fault`] knows it, too, unless it is [forgotten](Self::forget).
    pub(super) fn svm_ended(&mut self) -> Option<&VmExit> {
        let exit = self.next().filter(|exit| *exit != VmExit::Stopped)?;
        Some(self.of_svm.insert(exit))
    }

    /// The SVM, which stands still and has been [asked](Self::svm_ended) about, gets another state.
    pub(super) fn forget(&mut self) {
        self.of_svm = None;
    }

    fn next(&self) -> Option<VmExit> {
        self.events.next().map(|event| event.exit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tests::{Lab, POWER_OFF, running};

    /// An instruction that is none.
    const FAULT: &[u8] = &[0x0f, 0x0b];

    /// As the host of an SVM that has come to its end, and knows it.
    fn ended(code: &[u8]) -> (impl Sized, GuestEnd) {
        let Lab {
            machine, events, ..
        } = running(code);
        let mut guest = GuestEnd::new(events);
        while guest.svm_ended().is_none() {
            std::thread::yield_now();
        }
        (machine, guest)
    }

    #[test]
    fn who_takes_over_with_a_guest_that_has_ended_knows_it() {
        let (_machine, mut guest) = ended(POWER_OFF);
        assert!(!guest.is_powered_off(), "the SVM is not the VM");
        assert_eq!(guest.fault(), None);
        assert!(guest.is_powered_off());

        let (_machine, mut guest) = ended(FAULT);
        assert!(guest.fault().is_some_and(|what| what.contains("fault")));
        assert_eq!(guest.fault(), None, "once");
    }

    #[test]
    fn a_commit_revives_the_guest() {
        let (_machine, mut guest) = ended(POWER_OFF);
        guest.forget();
        assert_eq!(guest.fault(), None);
        assert!(!guest.is_powered_off());
    }
}
