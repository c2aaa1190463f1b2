//! The thread that answers faults at protected pages when nobody else does.
//!
//! Invariant: it never writes guest memory and waits for nobody but the descriptor and its own end.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::shared::Shared;

#[derive(Debug)]
pub(super) struct FaultThread {
    end: Arc<EventFd>,
    thread: JoinHandle<()>,
}

impl FaultThread {
    pub(super) fn spawn(shared: Arc<Shared>) -> io::Result<Self> {
        let end = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let ended = end.clone();
        let thread = std::thread::Builder::new()
            .name("page-faults".to_owned())
            .spawn(move || run(&shared, &ended))?;
        Ok(Self { end, thread })
    }

    pub(super) fn stop(self) {
        let _ = self.end.write(1);
        if self.thread.join().is_err() {
            tracing::error!("the thread for page faults panicked");
        }
    }
}

fn run(shared: &Shared, end: &EventFd) {
    let Some(uffd) = &shared.uffd else { return };
    let poll = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut fds = [poll(uffd.descriptor()), poll(end.as_raw_fd())];
    loop {
        // SAFETY: two pollfds on this stack.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        if fds[1].revents != 0 {
            return;
        }
        shared.serve();
    }
}
