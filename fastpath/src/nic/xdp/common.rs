//! What the ends of one NIC have in common: one for each shard, each with sockets on its own queues,
//! behind one XDP program.
//!
//! Invariants: the first end attaches the program and watches the interface, the others follow it;
//! nothing of the guest gets through before every end has its sockets and a probe has shown that they
//! are reached (rule 24). Who moves packets pays one load a batch for it.
//!
//! Does not bind sockets.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use colo_bpf::{GuestFrames, LINK_ETHERTYPE, LinkChannel, Mac, XdpProgram};

use super::membership::Membership;
use super::news::News;
use super::{XdpAbilities, XdpNicError, XdpNicMode};
use crate::lock::{Lock, Locked};
use crate::nic::Filter;

/// How the first end is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attachment {
    /// Which one this is: every attachment has another number.
    pub(super) number: u64,
    pub(super) index: u32,
    pub(super) mode: XdpNicMode,
    pub(super) abilities: XdpAbilities,
    /// Receive queues of the interface.
    pub(super) queues: u32,
}

/// The part that is changed seldom and by one end at a time.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) interface: String,
    pub(super) program: XdpProgram,
    pub(super) membership: Option<Membership>,
    pub(super) macs: Vec<Mac>,
    filter: Filter,
    attachment: Option<Attachment>,
    last_number: u64,
    /// Ends, by bit, that have all their sockets.
    ready: u32,
    /// Ends, by bit, that have sockets for the link's frames.
    link_ends: u32,
}

/// What the ends share.
#[derive(Debug)]
pub(super) struct Common {
    control: Lock<Control>,
    shards: u32,
    /// Of what the ends have to look at.
    news: News,
    /// The guest hears nothing (rule 24).
    is_closed: AtomicBool,
    has_link: AtomicBool,
}

impl Common {
    pub(super) fn new(
        interface: &str,
        program: XdpProgram,
        macs: Vec<Mac>,
        filter: Filter,
        shards: u32,
    ) -> io::Result<Self> {
        Ok(Self {
            control: Lock::new(Control {
                interface: interface.to_owned(),
                program,
                membership: None,
                macs,
                filter,
                attachment: None,
                last_number: 0,
                ready: 0,
                link_ends: 0,
            }),
            shards,
            news: News::new(shards)?,
            is_closed: AtomicBool::new(filter == Filter::DropAll),
            has_link: AtomicBool::new(true),
        })
    }

    pub(super) fn control(&self) -> Locked<'_, Control> {
        // Nothing is left half done under this lock that the next attachment does not put right.
        self.control.lock()
    }

    /// How many ends there are.
    pub(super) fn shards(&self) -> u32 {
        self.shards
    }

    /// Changes so far.
    pub(super) fn changes(&self) -> u64 {
        self.news.changes()
    }

    /// Readable when there was a change; for an end that sleeps.
    pub(super) fn poll_fd(&self, shard: u32) -> RawFd {
        self.news.poll_fd(shard)
    }

    /// An end is about to look at all that there is: which changes that covers.
    pub(super) fn heed(&self, shard: u32) -> u64 {
        self.news.heed(shard)
    }

    /// Whether the guest is to hear nothing.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Relaxed)
    }

    pub(super) fn has_link(&self) -> bool {
        self.has_link.load(Ordering::Relaxed)
    }

    pub(super) fn set_link(&self, has_link: bool) {
        if self.has_link.swap(has_link, Ordering::Relaxed) != has_link {
            self.news.tell();
        }
    }

    /// The present attachment.
    pub(super) fn attachment(&self) -> Option<Attachment> {
        self.control().attachment
    }

    /// The filter of the moment.
    pub(super) fn filter(&self) -> Filter {
        self.control().filter
    }

    /// Replaces the filter, for all ends.
    pub(super) fn set_filter(&self, filter: Filter) -> Result<(), XdpNicError> {
        let mut control = self.control();
        control.apply(filter)?;
        self.is_closed
            .store(filter == Filter::DropAll, Ordering::Relaxed);
        drop(control);
        self.news.tell();
        Ok(())
    }

    /// Whether an end has the link's frames. They are the host's when none has.
    pub(super) fn lead_link(&self, shard: u32, here: bool) -> Result<(), XdpNicError> {
        let mut control = self.control();
        control.link_ends &= !(1 << shard);
        control.link_ends |= u32::from(here) << shard;
        let is_led = control.link_ends != 0;
        let channel = LinkChannel {
            ethertype: is_led.then_some(LINK_ETHERTYPE),
            udp_port: None,
        };
        Ok(control.program.set_link_channel(channel)?)
    }

    /// The NIC is lost, or about to be attached anew: every end closes its sockets.
    pub(super) fn release(&self) {
        let mut control = self.control();
        control.membership = None;
        control.ready = 0;
        if control.attachment.take().is_some() {
            drop(control);
            self.news.tell();
        }
    }

    /// The first end has attached the program and has its sockets: the others follow.
    pub(super) fn attached(&self, mut attachment: Attachment) -> Attachment {
        let mut control = self.control();
        control.last_number += 1;
        attachment.number = control.last_number;
        control.attachment = Some(attachment);
        drop(control);
        self.news.tell();
        attachment
    }

    /// The interface has more queues now: every end binds its share.
    pub(super) fn has_queues(&self, queues: u32) {
        let mut control = self.control();
        if let Some(attachment) = &mut control.attachment {
            attachment.queues = queues;
        }
        drop(control);
        self.news.tell();
    }

    /// An end has its sockets on this attachment. The last one proves that all are reached and lets
    /// through what the filter says; `Err`: they are not, and all begin anew.
    pub(super) fn ready(&self, shard: u32, attachment: &Attachment) -> Result<(), XdpNicError> {
        let mut control = self.control();
        if control
            .attachment
            .is_none_or(|a| a.number != attachment.number)
        {
            return Ok(());
        }
        control.ready |= 1 << shard;
        if control.ready.count_ones() < self.shards {
            return Ok(());
        }
        // What comes while the probe runs is not the guest's yet: ends throw it away.
        self.is_closed.store(true, Ordering::Relaxed);
        let probed = control.probe(attachment);
        let closed = control.program.set_guest_frames(GuestFrames::Drop);
        let filter = control.filter;
        let opened = probed
            .and(closed.map_err(Into::into))
            .and_then(|()| control.apply(filter));
        if opened.is_ok() {
            self.is_closed
                .store(filter == Filter::DropAll, Ordering::Relaxed);
            return Ok(());
        }
        drop(control);
        self.release();
        opened
    }
}

impl Control {
    /// Lets through what `filter` says, if the program is attached; else it will.
    fn apply(&mut self, filter: Filter) -> Result<(), XdpNicError> {
        if let Filter::Guest(mac) = filter
            && !self.macs.contains(&mac)
        {
            self.program.add_guest_mac(mac)?;
            self.macs.push(mac);
        }
        if let Some(membership) = &self.membership {
            let told = match filter {
                Filter::Guest(mac) => membership.add_mac(mac),
                Filter::Open => membership.add_everybody(),
                Filter::DropAll => Ok(()),
            };
            told.map_err(|source| XdpNicError::Address {
                interface: self.interface.clone(),
                source,
            })?;
        }
        self.filter = filter;
        self.program.set_guest_frames(match filter {
            Filter::Open => GuestFrames::Everything,
            Filter::Guest(_) => GuestFrames::Accept,
            Filter::DropAll => GuestFrames::Drop,
        })?;
        Ok(())
    }

    /// Rule 24: shows for every queue that the program leads the guest's frames to a socket.
    fn probe(&mut self, attachment: &Attachment) -> Result<(), XdpNicError> {
        let Some(&mac) = self.macs.first() else {
            return Ok(());
        };
        self.program.set_guest_frames(GuestFrames::Accept)?;
        for queue in 0..attachment.queues {
            if !self.program.takes_from(attachment.index, queue, mac)? {
                return Err(XdpNicError::Probe {
                    interface: self.interface.clone(),
                    queue,
                });
            }
        }
        Ok(())
    }
}
