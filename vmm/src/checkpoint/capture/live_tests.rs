//! Live rounds of a machine whose vCPUs stand still, over TCP on loopback to a peer that puts them into memory.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use colo_fastpath::mailbox::Mailbox;
use colo_fastpath::ring::{GuestRam, Pages};

use super::*;
use crate::checkpoint::ahead::AheadSettings;
use crate::checkpoint::capture::CaptureSettings;
use crate::checkpoint::channel::{Event, Kind, PageChannel, Settings};
use crate::checkpoint::guests::{Guest, ON_ORDER};
use crate::checkpoint::outbound::OutboundSettings;
use crate::checkpoint::pages::{PAGE_BYTES, PageBitmap};
use crate::checkpoint::stabilise::StabilisePolicy;
use crate::checkpoint::staging::LiveMemory;
use crate::machine::Machine;

/// Longer than anything takes that does not hang.
const LONG: Duration = Duration::from_secs(60);
const SESSION: u64 = 9;
/// A page that nothing of the guest's lies near.
const FAR: usize = 5_000;

struct Lab {
    machine: Arc<Machine>,
    thread: CaptureThread,
    events: Mailbox<CaptureEvent>,
    orders: Sender<CaptureCommand>,
    commands: Receiver<CaptureCommand>,
    listener: TcpListener,
}

impl Lab {
    fn new() -> Self {
        let machine = Arc::new(Guest::start(ON_ORDER, 64, "").machine);
        let (post, events) = Mailbox::new().unwrap();
        let settings = CaptureSettings {
            stabilise: StabilisePolicy::Copy,
            arena_pages: 256,
            audit_every: 0,
            ahead: AheadSettings {
                interval: LONG,
                mib_per_s: 1,
            },
            outbound: OutboundSettings {
                channel: Settings::default(),
                cache_mib: 1,
                verify_one_in: 0,
                lends: false,
            },
        };
        let mut thread = CaptureThread::new(machine.clone(), settings, post);
        thread.session_number = SESSION;
        let (orders, commands) = channel();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Self {
            machine,
            thread,
            events,
            orders,
            commands,
            listener,
        }
    }

    fn connect(&self) -> (TcpStream, TcpStream) {
        let near = TcpStream::connect(self.listener.local_addr().unwrap()).unwrap();
        (near, self.listener.accept().unwrap().0)
    }

    fn begin(&mut self, stream: TcpStream) {
        let (generation, key) = (1, [7; 16]);
        self.thread
            .begin_sync(vec![stream], generation, key, &self.commands);
    }

    fn round(&mut self) {
        self.thread.sync_round(&self.commands);
    }

    /// Pages sent in the round that has ended, and those that were written meanwhile.
    fn told(&mut self) -> (u64, u64) {
        match self.events.try_next() {
            Some(CaptureEvent::SyncRound {
                sent_pages,
                dirty_pages,
                ..
            }) => (sent_pages, dirty_pages),
            other => panic!("{other:?}"),
        }
    }

    fn in_use(&self) -> PageBitmap {
        let mut pages = PageBitmap::new(self.machine.ram().page_count());
        self.machine.ram().find_data(pages.words_mut()).unwrap();
        pages
    }

    fn write(&self, first: usize, count: usize, byte: u8) {
        for page in first..first + count {
            let ram = self.machine.ram();
            ram.write_page(page, &[byte; PAGE_BYTES]).unwrap();
        }
    }
}

/// A secondary that takes live pages until the primary closes; gives its memory.
fn secondary(stream: TcpStream, bytes: u64) -> JoinHandle<GuestRam> {
    thread::spawn(move || {
        let mut channel = PageChannel::new(vec![stream], Settings::default()).unwrap();
        let ram = GuestRam::new(bytes, Pages::Small).unwrap();
        let mut memory = LiveMemory::new(ram.page_count());
        loop {
            match channel.poll(LONG).unwrap() {
                Event::Chunk(chunk) => {
                    assert_eq!(chunk.kind, Kind::Sync);
                    memory.write(&ram, chunk.payload).unwrap();
                }
                Event::Closed => return ram,
                _ => {}
            }
        }
    })
}

/// Ends the primary's side, and compares all of memory.
fn assert_same(lab: Lab, peer: JoinHandle<GuestRam>) {
    let machine = lab.machine.clone();
    drop(lab);
    let theirs = peer.join().unwrap();
    for page in 0..machine.ram().page_count() {
        let (mut one, mut other) = ([0; PAGE_BYTES], [1; PAGE_BYTES]);
        machine.ram().copy_page_out(page, &mut one).unwrap();
        theirs.copy_page_out(page, &mut other).unwrap();
        assert!(one == other, "page {page}");
    }
}

#[test]
fn a_first_round_sends_what_is_in_use_and_takes_no_memory_for_the_rest() {
    let mut lab = Lab::new();
    lab.write(FAR, 300, 3);
    let before = lab.in_use();
    let all = lab.machine.ram().page_count();
    assert!(before.count() > 300 && before.count() < all / 4);
    let (near, far) = lab.connect();
    let peer = secondary(far, lab.machine.ram().bytes());
    lab.begin(near);
    let (sent_pages, _) = lab.told();
    assert_eq!(sent_pages, before.count() as u64);
    assert_eq!(lab.in_use(), before);
    assert_same(lab, peer);
}

#[test]
fn rule_15_what_is_written_after_the_first_look_comes_with_a_later_round() {
    let mut lab = Lab::new();
    let (near, far) = lab.connect();
    let peer = secondary(far, lab.machine.ram().bytes());
    lab.begin(near);
    let (_, mut owed) = lab.told();
    for (round, byte) in [0, 5, 6, 0].into_iter().enumerate() {
        // One that was in use, others that were not.
        lab.write(FAR + round, 20, byte);
        lab.round();
        let (sent_pages, dirty_pages) = lab.told();
        assert_eq!(
            sent_pages, owed,
            "a round sends what the one before has told"
        );
        assert!(dirty_pages >= 20, "{dirty_pages}");
        owed = dirty_pages;
    }
    lab.round();
    assert_eq!(lab.told(), (owed, 0));
    assert_same(lab, peer);
}

#[test]
fn an_order_ends_a_round_and_what_was_not_sent_is_owed() {
    let mut lab = Lab::new();
    lab.write(FAR, 300, 3);
    let in_use = lab.in_use();
    let (near, far) = lab.connect();
    let peer = secondary(far, lab.machine.ram().bytes());
    lab.orders.send(CaptureCommand::SyncRound).unwrap();
    lab.begin(near);
    assert!(lab.events.try_next().is_none(), "nobody waits for it");
    assert_eq!(lab.thread.carry, in_use);
    assert_eq!(lab.thread.in_flight.count(), 0);
    assert!(matches!(
        lab.thread.deferred.pop_front(),
        Some(CaptureCommand::SyncRound)
    ));
    // The next one makes up for it, and is not ended by a word about a commit.
    let committed = CaptureCommand::Committed { generation: 1 };
    lab.orders.send(committed).unwrap();
    lab.round();
    assert_eq!(lab.told().0, in_use.count() as u64);
    assert_eq!(lab.thread.deferred.len(), 1);
    assert_same(lab, peer);
}

#[test]
fn a_link_that_is_gone_is_told_of_with_whose_it_was() {
    let mut lab = Lab::new();
    // More than a socket takes without a reader.
    lab.write(FAR, 8_000, 3);
    let (near, far) = lab.connect();
    drop(far);
    lab.begin(near);
    let told = lab.events.try_next();
    assert!(
        matches!(
            told,
            Some(CaptureEvent::LinkDown {
                session: SESSION,
                ..
            })
        ),
        "{told:?}"
    );
    assert!(lab.thread.session.is_none());
    // There is nobody to send another round to.
    lab.round();
    assert!(lab.events.try_next().is_none());
}

#[test]
fn a_round_is_ended_by_what_cannot_wait_for_it() {
    let [committed, aborted, detach, round] = [
        CaptureCommand::Committed { generation: 1 },
        CaptureCommand::Aborted,
        CaptureCommand::Detach,
        CaptureCommand::SyncRound,
    ]
    .map(|command| ends_round(&command));
    assert!(!committed && aborted && detach && round);
}

/// A secondary that has had a first round, whose streams then broke; with the ends of streams that can be opened.
fn broken(lab: &mut Lab) -> JoinHandle<GuestRam> {
    let (near, far) = lab.connect();
    let peer = secondary(far, lab.machine.ram().bytes());
    lab.begin(near);
    lab.told();
    for _ in 0..2 {
        lab.thread.streams_broken("damaged".to_owned());
    }
    let told = lab.events.try_next();
    assert!(
        matches!(
            told,
            Some(CaptureEvent::StreamsBroken {
                session: SESSION,
                opened: 0,
                ..
            })
        ),
        "{told:?}"
    );
    assert!(lab.events.try_next().is_none(), "told once");
    peer
}

#[test]
fn rule_14_a_capture_waits_for_streams_that_are_opened_anew_and_goes_over_them() {
    let mut lab = Lab::new();
    let old = broken(&mut lab);
    let (near, far) = lab.connect();
    let peer = secondary(far, lab.machine.ram().bytes());
    let streams = vec![near];
    lab.orders
        .send(CaptureCommand::Committed { generation: 1 })
        .unwrap();
    let opened = 1;
    lab.orders
        .send(CaptureCommand::Reopen { streams, opened })
        .unwrap();
    assert!(lab.thread.has_streams(&lab.commands));
    assert_eq!(lab.thread.deferred.len(), 1, "other orders come in turn");
    old.join().unwrap();
    lab.write(FAR, 20, 5);
    lab.round();
    lab.round();
    let found = lab.told().0 + lab.told().0;
    assert!(found >= 20, "{found}");
    drop(lab);
    let theirs = peer.join().unwrap();
    let mut page = [0; PAGE_BYTES];
    theirs.copy_page_out(FAR, &mut page).unwrap();
    assert_eq!(page, [5; PAGE_BYTES]);
}

#[test]
fn rule_14_nobody_waits_for_streams_of_a_checkpoint_that_is_off() {
    let mut lab = Lab::new();
    let peer = broken(&mut lab);
    lab.orders.send(CaptureCommand::Aborted).unwrap();
    assert!(!lab.thread.has_streams(&lab.commands));
    assert!(matches!(
        lab.thread.deferred.pop_front(),
        Some(CaptureCommand::Aborted)
    ));
    assert!(lab.thread.session.is_some(), "the next one may have some");
    drop(lab);
    peer.join().unwrap();
}

#[test]
fn rule_14_a_capture_that_is_off_does_not_stop_the_guest_though_other_streams_are_there() {
    for reopen_first in [true, false] {
        let mut lab = Lab::new();
        let old = broken(&mut lab);
        let (near, far) = lab.connect();
        let peer = secondary(far, lab.machine.ram().bytes());
        let (streams, opened) = (vec![near], 1);
        let mut orders = [
            CaptureCommand::Reopen { streams, opened },
            CaptureCommand::Aborted,
        ];
        if !reopen_first {
            orders.reverse();
        }
        for order in orders {
            lab.orders.send(order).unwrap();
        }
        assert!(
            !lab.thread.has_streams(&lab.commands),
            "reopened first: {reopen_first}"
        );
        // The next one has them, once these orders were obeyed.
        while let Some(order) = lab.thread.deferred.pop_front() {
            match order {
                CaptureCommand::Reopen { streams, opened } => lab.thread.reopen(streams, opened),
                CaptureCommand::Aborted => lab.thread.aborted(),
                odd => panic!("{odd:?}"),
            }
        }
        assert!(lab.thread.has_streams(&lab.commands));
        // Nor if nothing ever broke.
        lab.orders.send(CaptureCommand::Aborted).unwrap();
        assert!(!lab.thread.has_streams(&lab.commands));
        drop(lab);
        old.join().unwrap();
        peer.join().unwrap();
    }
}
