//! Questions to the arbiter, asked by a thread of their own: the file may be locked, or far away.
//!
//! Invariants: asking and hearing never block; each question has one answer. A question that is open when its asker
//! goes may still be answered with a change: whoever ends of its own will waits for the answer.
//!
//! Does not decide anything.

use std::io;
use std::os::fd::RawFd;
use std::sync::mpsc::{Sender, channel};

use colo_control::{Cas, Reply};
use colo_fastpath::mailbox::Mailbox;

use super::arbiter::FileArbiter;

/// A control thread's way to the arbiter.
#[derive(Debug)]
pub(super) struct Asking {
    questions: Sender<Cas>,
    answers: Mailbox<Reply>,
    open: usize,
}

impl Asking {
    pub(super) fn start(arbiter: FileArbiter) -> io::Result<Self> {
        let (questions, asked) = channel::<Cas>();
        let (post, answers) = Mailbox::new()?;
        let answer_all = move || {
            while let Ok(cas) = asked.recv() {
                let reply = arbiter.ask(&cas);
                tracing::info!("arbiter: {cas:?}: {reply:?}");
                post.send(reply);
            }
        };
        // Not joined: it may hang in a file system, while its asker has to end.
        let builder = std::thread::Builder::new().name("arbiter".to_owned());
        builder.spawn(answer_all)?;
        Ok(Self {
            questions,
            answers,
            open: 0,
        })
    }

    pub(super) fn ask(&mut self, cas: Cas) {
        match self.questions.send(cas) {
            Ok(()) => self.open += 1,
            Err(_) => tracing::error!("the arbiter's thread has ended"),
        }
    }

    /// Readable when there is an answer.
    pub(super) fn poll_fd(&self) -> RawFd {
        self.answers.poll_fd()
    }

    /// The next answer, if there is one.
    pub(super) fn answer(&mut self) -> Option<Reply> {
        let reply = self.answers.try_next()?;
        self.open = self.open.saturating_sub(1);
        Some(reply)
    }

    /// Whether a question is not answered yet.
    pub(super) fn is_open(&self) -> bool {
        self.open > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locked_arbiter_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let spec = format!("file:{}", dir.path().join("generation").display());
        let arbiter = FileArbiter::from_spec(&spec).unwrap();
        let record = arbiter.claim("a", "").unwrap().unwrap();
        let mut asking = Asking::start(arbiter.clone()).unwrap();
        let locked = arbiter.lock().unwrap();
        asking.ask(Cas::Confirm(record.clone()));
        assert_eq!(asking.answer(), None, "it was waited for");
        assert!(asking.is_open());
        drop(locked);
        let mut fd = libc::pollfd {
            fd: asking.poll_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd.
        assert_eq!(unsafe { libc::poll(&mut fd, 1, -1) }, 1);
        assert_eq!(asking.answer(), Some(Reply::Won(record)));
        assert!(!asking.is_open());
    }
}
