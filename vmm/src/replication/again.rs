//! Opens streams of pages anew that broke, while the pair lives on: the secondary dials, as it did when it joined.
//!
//! Invariants: nobody waits for the peer but a thread of its own, one at a time; streams that break again and again, without a
//! commit in between, are given up, and the session with them.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::RawFd;
use std::thread;

use colo_fastpath::mailbox::{Mailbox, Post};

use super::link::{self, LinkError};

/// So often in a row.
const TRIES_MAX: u32 = 3;

/// What was opened, or why not.
type Opened = Result<Vec<TcpStream>, LinkError>;

/// Opens a session's streams of pages anew.
pub(super) struct PagesAgain {
    address: SocketAddr,
    session: u64,
    streams: usize,
    post: Post<Opened>,
    opened: Mailbox<Opened>,
    /// Since the last commit.
    tries: u32,
    /// In this session.
    reopened: u64,
}

impl PagesAgain {
    /// For a session at this address that has so many.
    pub(super) fn new(address: SocketAddr, session: u64, streams: usize) -> io::Result<Self> {
        let (post, opened) = Mailbox::new()?;
        Ok(Self {
            address,
            session,
            streams,
            post,
            opened,
            tries: 0,
            reopened: 0,
        })
    }

    /// Begins. False when it has been tried too often, or there are no threads.
    pub(super) fn ask(&mut self) -> bool {
        self.tries += 1;
        if self.tries > TRIES_MAX {
            return false;
        }
        let (address, session, streams) = (self.address, self.session, self.streams);
        let post = self.post.clone();
        let open = move || post.send(link::connect_pages_again(address, session, streams));
        let builder = thread::Builder::new().name("page-streams".to_owned());
        builder.spawn(open).is_ok()
    }

    /// Becomes readable when they are open.
    pub(super) fn poll_fd(&self) -> RawFd {
        self.opened.poll_fd()
    }

    /// The new streams.
    pub(super) fn try_next(&mut self) -> Option<Opened> {
        let opened = self.opened.try_next()?;
        self.reopened += u64::from(opened.is_ok());
        Some(opened)
    }

    /// A checkpoint came over them.
    pub(super) fn committed(&mut self) {
        self.tries = 0;
    }

    /// How often it was done.
    pub(super) fn reopened(&self) -> u64 {
        self.reopened
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn streams_that_break_again_and_again_are_given_up_and_a_commit_begins_anew() {
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = nobody.local_addr().unwrap();
        drop(nobody);
        let mut again = PagesAgain::new(address, 7, 1).unwrap();
        let asked = |again: &mut PagesAgain| (0..5).filter(|_| again.ask()).count();
        assert_eq!(asked(&mut again), TRIES_MAX as usize);
        again.committed();
        assert_eq!(asked(&mut again), TRIES_MAX as usize);
        assert_eq!(again.reopened(), 0, "nobody answered");
    }
}
