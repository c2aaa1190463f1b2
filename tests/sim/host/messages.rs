//! The link, seen from a process.
//!
//! Invariant: the secondary reads its packet channel until it takes over; the primary lets go of it at once.

use super::*;

impl Shell<'_> {
    pub(super) fn link_msg(&mut self, link: usize, channel: Channel, msg: LinkMsg) {
        let now = self.local_us();
        match msg {
            LinkMsg::Up => self.link_up(link),
            LinkMsg::Down => self.link_down(link),
            LinkMsg::Control(bytes) => {
                if let Ok(Some((Some(msg), _))) = Msg::decode(&bytes) {
                    self.control_msg(msg);
                }
            }
            LinkMsg::Pages { opened, msg } => self.page_msg(link, opened, msg),
            LinkMsg::Dial { .. } | LinkMsg::Dialled { .. } => self.dial_msg(link, &msg),
            LinkMsg::PagesStalled if self.p.link == Some(link) => self.pages_gone("stalled"),
            LinkMsg::PagesStalled => {}
            LinkMsg::CheckpointWanted => self.tell_primary_core(PrimaryEvent::CheckpointWanted),
            packet => {
                debug_assert_eq!(channel, Channel::Packets);
                self.packet_msg(now, packet);
            }
        }
    }

    pub(super) fn control_msg(&mut self, msg: Msg) {
        match msg {
            Msg::Heartbeat { .. } | Msg::Echo { .. } => {}
            _ => self.trace(|| format!("hears {msg:?}")),
        }
        match msg {
            Msg::SvmStopped { .. } => self.pass("svm_stopped_received"),
            Msg::Committed { .. } => self.pass("committed_received"),
            Msg::Aborted { .. } => self.pass("aborted_received"),
            _ => {}
        }
        match self.p.role {
            Role::Primary(_) => self.primary_core(PrimaryEvent::Msg(msg)),
            _ => self.secondary_core(SecondaryEvent::Msg(msg)),
        }
    }

    pub(super) fn packet_msg(&mut self, now: u64, msg: LinkMsg) {
        let p = &mut *self.p;
        match (&mut p.role, msg) {
            (Role::Primary(side), LinkMsg::Output { epoch, seq, frame }) => {
                self.world
                    .trace(|| format!("svm out {epoch} {seq} {}", show(&frame)));
                if let Some(token) = p.frames.insert(&frame) {
                    side.path
                        .handle_svm_output(now, &mut p.frames, epoch, seq, token);
                }
            }
            (
                Role::Primary(side),
                LinkMsg::Digest {
                    epoch,
                    seq,
                    headers,
                    payload_len,
                    digest,
                },
            ) => {
                self.world
                    .trace(|| format!("svm digest {epoch} {seq} {payload_len}"));
                let (path, frames) = (&mut side.path, &mut p.frames);
                if let Some(token) = frames.insert(&headers) {
                    path.handle_svm_digest(now, frames, epoch, seq, token, payload_len, digest);
                }
            }
            (Role::Secondary(side), LinkMsg::Fetch { seq }) => side.path.fetch(seq),
            (Role::Primary(side), LinkMsg::InputAck { up_to }) => {
                side.path.handle_input_ack(now, &mut p.frames, up_to);
            }
            (Role::Primary(side), LinkMsg::CaughtUp { epoch }) => {
                side.late_since_us = side.late_since_us.min(now);
                side.path.caught_up(now, epoch);
            }
            (Role::Secondary(side), LinkMsg::Input { epoch, seq, frame }) => {
                if let Some(token) = p.frames.insert(&frame)
                    && let Err(e) = side
                        .path
                        .handle_mirror(now, &mut p.frames, epoch, seq, token)
                {
                    self.fail("protocol", e.to_string());
                }
            }
            (Role::Secondary(side), LinkMsg::Released { seq }) => {
                side.path.handle_released(&mut p.frames, seq);
            }
            (Role::Secondary(side), LinkMsg::PendingReleased { epoch }) => {
                side.path.handle_pending_released(&mut p.frames, epoch);
            }
            _ => {}
        }
    }

    pub(super) fn link_up(&mut self, link: usize) {
        if self.p.link.is_some() {
            return;
        }
        self.p.link = Some(link);
        self.p.streams = Streams::default();
        match &mut self.p.role {
            Role::Primary(_) => self.primary_core(PrimaryEvent::LinkUp),
            Role::Secondary(side) => {
                side.link = Some(link);
                self.secondary_core(SecondaryEvent::LinkUp);
            }
            Role::None => {}
        }
    }

    pub(super) fn link_down(&mut self, link: usize) {
        if self.p.link != Some(link) {
            return;
        }
        self.close_link();
        let reason: String = "reset".into();
        match self.p.role {
            Role::Primary(_) => self.primary_core(PrimaryEvent::LinkDown { reason }),
            _ => self.secondary_core(SecondaryEvent::LinkDown { reason }),
        }
    }

    pub(super) fn close_link(&mut self) {
        let Some(link) = self.p.link.take() else {
            return;
        };
        self.trace(|| "closes the link".into());
        self.p.streams.close();
        let is_primary = match &mut self.p.role {
            Role::Primary(side) => {
                (side.packets, side.mirrors, side.ahead) = (None, false, None);
                true
            }
            _ => false,
        };
        // The secondary reads what is in the packet channel until it takes over.
        self.world.close(link, self.host, is_primary);
    }

    pub(super) fn send(&mut self, channel: Channel, msg: LinkMsg) {
        let link = match &self.p.role {
            Role::Primary(side) if channel == Channel::Packets => side.packets,
            _ => self.p.link,
        };
        if let Some(link) = link {
            self.world.link_send(link, self.host, channel, msg);
        }
    }

    pub(super) fn send_control(&mut self, msg: &Msg) {
        if !matches!(msg, Msg::Heartbeat { .. } | Msg::Echo { .. }) {
            self.trace(|| format!("says {msg:?}"));
        }
        let mut bytes = Vec::new();
        msg.encode(&mut bytes);
        self.send(Channel::Control, LinkMsg::Control(bytes));
        match msg {
            Msg::StopSvm { .. } => self.pass("stop_svm_sent"),
            Msg::SvmStopped { .. } => self.pass("svm_stopped_sent"),
            Msg::Committed { .. } => self.pass("committed_sent"),
            Msg::Aborted { .. } => self.pass("aborted_sent"),
            Msg::Paired { .. } => self.pass("paired_sent"),
            _ => {}
        }
    }
}
