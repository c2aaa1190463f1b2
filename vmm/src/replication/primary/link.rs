//! The primary's channels to its secondary: taken when one joins, given others for broken ones, closed.
//!
//! Invariant: link loss is told to the workers before the core, so that a late cut finds no link.

use std::io;
use std::net::{Shutdown, TcpStream};

use colo_control::{PrimaryEvent, PrimaryState};
use colo_fastpath::clock::now_us;

use super::PrimaryShell;
use crate::checkpoint::capture::CaptureCommand;
use crate::replication::control_link::ControlLink;
use crate::replication::host::unix_seconds;
use crate::replication::link::Channels;

/// The channels to the secondary.
pub(super) struct Link {
    pub(super) session: u64,
    pub(super) control: ControlLink,
    /// Handed to worker and checkpoint thread when the synchronisation starts.
    pub(super) packets: Option<Vec<TcpStream>>,
    pub(super) pages: Option<Vec<TcpStream>>,
    /// To end them while the checkpoint thread writes.
    pub(super) pages_end: Vec<TcpStream>,
    /// How often they were opened anew.
    pub(super) pages_opened: u64,
}

impl Link {
    pub(super) fn shut_pages(&self) {
        for stream in &self.pages_end {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn new(channels: Channels) -> io::Result<Self> {
        Ok(Self {
            session: channels.session,
            control: ControlLink::new(channels.control)?,
            pages_end: channels
                .pages
                .iter()
                .map(TcpStream::try_clone)
                .collect::<io::Result<_>>()?,
            pages_opened: 0,
            packets: Some(channels.packets),
            pages: Some(channels.pages),
        })
    }
}

impl PrimaryShell {
    pub(super) fn link_up(&mut self, channels: Channels) {
        if self.link.is_some() {
            tracing::warn!("a second secondary tried to join; it was sent away");
            return;
        }
        match Link::new(channels) {
            Ok(link) => {
                tracing::info!("a secondary has connected");
                self.link = Some(link);
                self.core.handle(now_us(), PrimaryEvent::LinkUp);
            }
            Err(e) => tracing::warn!("a secondary's connection failed at once: {e}"),
        }
    }

    /// The secondary has opened its streams of pages anew: whatever goes over the old ones fails.
    pub(super) fn take_pages(&mut self) {
        let follows = matches!(
            self.core.state(),
            PrimaryState::Pairing | PrimaryState::Paired
        );
        let Some(link) = self.link.as_mut().filter(|_| follows) else {
            return;
        };
        let Some(streams) = self.listener.take_pages(link.session) else {
            return;
        };
        link.shut_pages();
        match streams.iter().map(TcpStream::try_clone).collect() {
            Ok(ends) => {
                link.pages_end = ends;
                link.pages_opened += 1;
                let opened = link.pages_opened;
                tracing::warn!("the page streams were opened anew");
                self.order(CaptureCommand::Reopen { streams, opened });
            }
            Err(e) => self.link_down(&e.to_string()),
        }
    }

    pub(super) fn link_down(&mut self, reason: &str) {
        if self.link.is_none() {
            return;
        }
        tracing::warn!("the link is lost: {reason}");
        self.close_link(reason);
        let reason = reason.to_owned();
        self.core
            .handle(now_us(), PrimaryEvent::LinkDown { reason });
    }

    pub(super) fn close_link(&mut self, reason: &str) {
        let Some(mut link) = self.link.take() else {
            return;
        };
        // The peer takes a closed channel as our end: be silent before it can see one (rule 18).
        self.end_lease();
        self.on_role(|role, edge| role.detach(edge));
        self.opener.forget();
        let _ = link.control.flush();
        link.shut_pages();
        self.unprotected
            .get_or_insert((reason.to_owned(), unix_seconds()));
    }
}
