//! Page streams of a process: what goes over them, and others in their place when they broke, as in production: who finds them
//! broken ends them, the secondary dials, the primary takes the new ones, and its next capture waits for that.
//!
//! Invariants: nothing of a stage is left of streams that broke; the checkpoint thread and the control thread hear of all of it
//! at times of their own; streams that break again and again without a commit in between cost the link.

use super::*;
use crate::link::PageMsg;

/// So often in a row.
const TRIES_MAX: u32 = 3;
/// How long the secondary waits for the primary's word, and the primary keeps streams that it cannot take yet.
const DIAL_US: u64 = 60_000;
/// How long a capture waits for streams.
const PATIENCE_US: u64 = 80_000;

/// One end of a link's page streams.
#[derive(Debug, Default)]
pub struct Streams {
    /// Those that the checkpoint thread is on.
    opened: u64,
    /// It knows that they are of no use.
    is_broken: bool,
    /// The link ended while it waited for others.
    ended_broken: bool,
    /// They have ended; who sends over them notices.
    has_ended: bool,
    /// Those that the control thread has dialled or taken last.
    dialled: u64,
    /// Secondary: tries since the last commit.
    tries: u32,
    /// Primary: came when it could not be taken.
    calling: Option<(u64, u64)>,
    /// Primary: a capture that waits for streams, since when.
    waiting: Option<(CaptureOrder, u64)>,
    /// Secondary: what has come over streams that the checkpoint thread is not on yet.
    early: Vec<(u64, PageMsg)>,
}

/// A capture that was ordered.
#[derive(Debug, Clone, Copy)]
pub struct CaptureOrder {
    pub epoch: u64,
    pub first: bool,
    pub svm_dirty: u64,
    pub buffer: bool,
}

/// A stage that fills.
#[derive(Debug)]
pub struct Arriving {
    pub image: Rc<Image>,
    /// Chunks that came.
    pub chunks: u64,
    pub pages: PageSet,
    /// By mistake it has outlived its streams.
    pub is_stale: bool,
}

impl Arriving {
    pub fn new(image: Rc<Image>) -> Self {
        Self {
            image,
            chunks: 0,
            pages: PageSet::new(),
            is_stale: false,
        }
    }

    /// Adds the pages of a chunk.
    pub fn add(&mut self, index: u64, of: u64, image: &Rc<Image>) {
        let pages = image.pages.iter();
        let pages = pages.skip(index as usize).step_by(of as usize);
        for (number, page) in pages {
            if !self.is_stale || self.pages.iter().all(|(n, _)| n != number) {
                self.pages.push((*number, page.clone()));
            }
        }
        self.chunks += 1;
        self.image = image.clone();
    }
}

impl Streams {
    /// Whether others are waited for.
    pub fn is_broken(&self) -> bool {
        self.is_broken
    }

    /// The link ends; the checkpoint thread hears of it in its turn.
    pub fn close(&mut self) {
        let before = std::mem::take(self);
        self.ended_broken = before.is_broken;
        self.waiting = before.waiting;
    }
}

impl SecondarySide {
    /// What has come of a checkpoint is of no use.
    pub(super) fn forget_arriving(&mut self) {
        self.arriving.take_if(|arriving| !arriving.is_stale);
    }
}

impl Process {
    /// Which page streams it uses.
    pub fn streams_opened(&self) -> u64 {
        self.streams.opened
    }

    /// Whether it waits for others, or did when the link ended.
    pub fn has_broken_streams(&self) -> bool {
        self.streams.is_broken || self.streams.ended_broken
    }
}

impl Shell<'_> {
    /// Sends over the page streams; false if they are of no use.
    pub(super) fn send_pages(&mut self, msg: PageMsg) -> bool {
        let streams = &self.p.streams;
        if streams.is_broken {
            return false;
        }
        if streams.has_ended {
            self.primary_streams_broken();
            return false;
        }
        let opened = streams.opened;
        self.send(Channel::Pages, LinkMsg::Pages { opened, msg });
        true
    }

    // ---- what comes over them ----

    pub(super) fn page_msg(&mut self, link: usize, opened: u64, msg: PageMsg) {
        if self.p.link != Some(link) {
            return;
        }
        match self.p.role {
            Role::Primary(_) => self.primary_page_msg(opened, &msg),
            Role::Secondary(_) => self.secondary_page_msg(link, opened, msg),
            Role::None => {}
        }
    }

    /// Digests are no part of the model: what comes to a primary is the end of its streams.
    fn primary_page_msg(&mut self, opened: u64, msg: &PageMsg) {
        let ends = matches!(msg, PageMsg::End | PageMsg::Damaged);
        if !ends || opened != self.p.streams.opened || self.p.streams.is_broken {
            return;
        }
        self.p.streams.has_ended = true;
        // The sender looks for digests all the time.
        if self.primary().is_some_and(|side| side.sending.is_some()) {
            self.primary_streams_broken();
        }
    }

    fn secondary_page_msg(&mut self, link: usize, opened: u64, msg: PageMsg) {
        let streams = &mut self.p.streams;
        if opened > streams.opened {
            streams.early.push((opened, msg));
            return;
        }
        if opened < streams.opened || streams.is_broken {
            return;
        }
        if let Some(side) = self.secondary()
            && side.staged.is_some()
        {
            // Nobody reads between a whole stage and the word about it.
            return side.behind.push((opened, msg));
        }
        match msg {
            PageMsg::Live(pages) => self.receive_live(&pages),
            PageMsg::Ahead(chunk) => self.receive_ahead(link, &chunk),
            PageMsg::Chunk { index, of, image } => self.receive_chunk(index, of, image),
            PageMsg::Damaged | PageMsg::End => self.secondary_streams_broken(link),
        }
    }

    /// There was a word about the stage: the page channel is read again.
    pub(super) fn read_behind(&mut self) {
        let Some(side) = self.secondary() else { return };
        let Some(link) = side.link else { return };
        for (opened, msg) in std::mem::take(&mut side.behind) {
            self.page_msg(link, opened, msg);
        }
    }

    // ---- broken: the primary ----

    fn primary_streams_broken(&mut self) {
        let Some(link) = self.p.link else { return };
        if std::mem::replace(&mut self.p.streams.is_broken, true) {
            return;
        }
        self.count_broken();
        self.trace(|| "finds its page streams broken".into());
        let opened = self.p.streams.opened;
        let at = self.world.now + self.below(300);
        let event = HostEvent::StreamsBroken { link, opened };
        self.world.host_event(at, self.host, self.p.inc, event);
        let sending = self.primary().and_then(|side| side.sending.take());
        if let Some((image, ..)) = sending {
            self.capture_failed(image.epoch);
        }
        self.pass("streams_broken");
    }

    /// The control thread hears of broken streams.
    pub(super) fn streams_broken(&mut self, link: usize, opened: u64) {
        if self.p.link != Some(link) {
            return;
        }
        match self.p.role {
            // The secondary sees their end.
            Role::Primary(_) if self.p.streams.dialled == opened => {
                self.world.end_streams(link, opened, true);
            }
            Role::Secondary(_) => self.dial(link, opened),
            _ => {}
        }
    }

    /// The primary's control thread takes them to be stuck.
    pub(super) fn shut_streams(&mut self) {
        if let (Some(link), Role::Primary(_)) = (self.p.link, &self.p.role) {
            let opened = self.p.streams.dialled;
            self.world.end_streams(link, opened, true);
        }
    }

    /// Others have been opened by the secondary.
    fn called(&mut self, opened: u64) {
        let until_us = self.world.now + DIAL_US;
        self.p.streams.calling = Some((opened, until_us));
        self.take_streams();
    }

    /// The primary takes streams that were opened anew, once it knows that the secondary follows.
    pub(super) fn take_streams(&mut self) {
        let now = self.world.now;
        let follows = self.primary().is_some_and(|side| {
            matches!(
                side.core.state(),
                PrimaryState::Pairing | PrimaryState::Paired
            )
        });
        let Some(link) = self.p.link.filter(|_| follows) else {
            return;
        };
        let Some((opened, until_us)) = self.p.streams.calling.take() else {
            return;
        };
        if until_us < now {
            return;
        }
        let before = std::mem::replace(&mut self.p.streams.dialled, opened);
        self.world.end_streams(link, before, true);
        self.send(Channel::Dial, LinkMsg::Dialled { opened });
        self.tell_worker(Command::Reopen { opened }, 300);
    }

    fn reopen_primary(&mut self, opened: u64) {
        // What goes over the old ones fails first.
        if self.primary().is_some_and(|side| side.sending.is_some()) {
            self.primary_streams_broken();
        }
        let streams = &mut self.p.streams;
        (streams.opened, streams.is_broken, streams.has_ended) = (opened, false, false);
        self.world.outcome.streams_reopened += 1;
        self.rest_ahead();
        self.pass("streams_reopened");
        if let Some((order, _)) = self.p.streams.waiting.take() {
            self.capture(order);
        }
    }

    /// Whether a capture has to wait for streams.
    pub(super) fn waits_for_streams(&mut self, order: CaptureOrder) -> bool {
        let streams = &mut self.p.streams;
        if !streams.is_broken || self.p.link.is_none() {
            return false;
        }
        let at = self.world.now + PATIENCE_US;
        streams.waiting = Some((order, at));
        self.world.outcome.captures_waited += 1;
        let event = HostEvent::StreamsAwaited;
        self.world.host_event(at, self.host, self.p.inc, event);
        true
    }

    /// It has waited for long.
    pub(super) fn streams_awaited(&mut self) {
        let now = self.world.now;
        let waiting = self.p.streams.waiting.as_ref();
        if self.p.link.is_some() && waiting.is_some_and(|(_, at)| *at <= now) {
            self.p.streams.waiting = None;
            self.pages_gone("not opened anew");
        }
    }

    /// Nobody waits for streams of a checkpoint that is off.
    pub(super) fn forget_capture(&mut self) {
        if let Some((order, _)) = self.p.streams.waiting.take() {
            self.world.outcome.captures_called_off += 1;
            self.capture_failed(order.epoch);
        }
    }

    // ---- broken: the secondary ----

    fn secondary_streams_broken(&mut self, link: usize) {
        self.count_broken();
        self.trace(|| "finds its page streams broken".into());
        if self.p.guest.is_none() {
            // Nothing tells which live pages have come.
            self.world.outcome.syncs_torn += 1;
            return self.pages_gone("torn");
        }
        self.p.streams.is_broken = true;
        let keeps = self.mutated(Mutation::KeepHalfStage);
        if let Some(side) = self.secondary() {
            match &mut side.arriving {
                Some(arriving) if keeps => arriving.is_stale = true,
                arriving => *arriving = None,
            }
            side.area.clear();
        }
        let opened = self.p.streams.opened;
        let at = self.world.now + self.below(300);
        let event = HostEvent::StreamsBroken { link, opened };
        self.world.host_event(at, self.host, self.p.inc, event);
        self.pass("streams_broken");
    }

    /// The secondary's control thread ends the old streams and opens others.
    fn dial(&mut self, link: usize, opened: u64) {
        self.world.end_streams(link, opened, true);
        self.p.streams.tries += 1;
        if self.p.streams.tries > TRIES_MAX {
            self.world.outcome.streams_given_up += 1;
            return self.pages_gone("again and again");
        }
        self.p.streams.dialled = opened + 1;
        let opened = opened + 1;
        self.send(Channel::Dial, LinkMsg::Dial { opened });
        let at = self.world.now + DIAL_US;
        let event = HostEvent::NotDialled { link, opened };
        self.world.host_event(at, self.host, self.p.inc, event);
        let reason = "the page streams broke".into();
        self.secondary_core(SecondaryEvent::PagesLost { reason });
        self.pass("dialled");
    }

    pub(super) fn not_dialled(&mut self, link: usize, opened: u64) {
        if self.p.link == Some(link) && self.p.streams.dialled == opened {
            let is_open = self.p.streams.opened >= opened;
            if !is_open {
                self.pages_gone("not answered");
            }
        }
    }

    /// A message of the handshake.
    pub(super) fn dial_msg(&mut self, link: usize, msg: &LinkMsg) {
        if self.p.link != Some(link) {
            return;
        }
        match *msg {
            LinkMsg::Dial { opened } => self.called(opened),
            LinkMsg::Dialled { opened } => {
                self.tell_worker(Command::Reopen { opened }, 300);
            }
            _ => {}
        }
    }

    /// The checkpoint thread goes on over other streams.
    pub(super) fn reopen(&mut self, opened: u64) {
        let Some(link) = self.p.link else { return };
        if opened != self.p.streams.dialled {
            return;
        }
        if matches!(self.p.role, Role::Primary(_)) {
            return self.reopen_primary(opened);
        }
        let streams = &mut self.p.streams;
        (streams.opened, streams.is_broken) = (opened, false);
        for (opened, msg) in std::mem::take(&mut streams.early) {
            self.page_msg(link, opened, msg);
        }
        self.pass("streams_back");
    }

    /// A checkpoint came over them.
    pub(super) fn streams_proved(&mut self) {
        self.p.streams.tries = 0;
    }

    fn count_broken(&mut self) {
        let primary = self.world.record.holder == NAMES[0];
        let host = usize::from(!primary);
        let core = match &self.p.role {
            Role::Primary(side) => side.core.step(),
            _ => self.world.hosts[host].step,
        };
        if let Some(step) = core {
            self.world.outcome.streams_broken_at[step.index()] += 1;
        }
    }

    /// The page channel is of no use, and no other is wanted.
    pub(super) fn pages_gone(&mut self, reason: &str) {
        let reason: String = reason.into();
        self.p.streams.is_broken = true;
        match &mut self.p.role {
            Role::Primary(side) => {
                side.sending = None;
                self.tell_primary_core(PrimaryEvent::PagesGone { reason });
            }
            Role::Secondary(side) => {
                side.arriving = None;
                self.secondary_core(SecondaryEvent::PagesGone { reason });
            }
            Role::None => {}
        }
    }
}
