//! What every NIC does, said once and tried on each of them: `conformance!(CABLE)` makes the tests.
//!
//! Invariants: nothing in here knows which NIC it is; what differs is how its cable is laid.
//!
//! Does not try what only one kind of NIC has (modes, queues, the link's share).

use std::time::{Duration, Instant};

use colo_compare::Frames;

use super::testing::{PATIENCE_MS, Station, frame, in_namespace, ip, tagged};
use super::*;

/// The guest behind the NIC.
pub(super) const GUEST: Mac = [0x52, 0x54, 0, 0xc0, 0x10, 1];
/// The other station, and one that is nowhere.
const STATION: Mac = [0x52, 0x54, 0, 0xc0, 0x20, 1];
const NOBODY: Mac = [0x52, 0x54, 0, 0xc0, 0x20, 9];
const BROADCAST: Mac = [0xff; 6];
const GROUPS: [Mac; 2] = [[0x01, 0, 0x5e, 0, 0, 1], [0x33, 0x33, 0, 0, 0, 1]];
/// A group that no guest needs.
const DISCOVERY: Mac = [0x01, 0x00, 0x0c, 0xcc, 0xcc, 0xcc];
const SLOTS: u32 = 4096;

/// A kind of NIC and the way from it to the other station.
pub(super) trait Cable: Copy + Send + 'static {
    type End: Nic;

    /// Lays it, in the namespace of this thread.
    fn lay(&self, mtu: u32);
    /// The interface that goes down with the cable, and that with the other station.
    fn interfaces(&self) -> [&'static str; 2];
    fn open(&self, mtu: u16, filter: Filter) -> Self::End;
    /// Frames that the filter has kept away.
    fn kept_away(&self, nic: &Self::End) -> u64;
    /// Makes what the NIC sends stay with it after a while.
    fn stop(&self, nic: &Self::End);
    /// What was stopped goes on.
    fn go_on(&self);
    /// Deletes the NIC's interface, and makes another one of its name.
    fn remove(&self);
    fn replace(&self);
}

/// The tests of this module for one cable.
macro_rules! conformance {
    ($cable:expr) => {
        conformance!($cable, [
            frames_pass_whole_both_ways,
            jumbo_frames_pass_whole_both_ways,
            many_frames_stay_in_order_and_no_slot_is_lost,
            a_nic_without_room_gives_the_frame_back,
            the_filter_decides_what_the_guest_hears,
            a_link_that_goes_and_comes_back_is_seen,
            an_interface_that_is_deleted_and_made_again_is_used_again,
        ]);
    };
    ($cable:expr, [$($name:ident,)*]) => {
        $(#[test]
        fn $name() {
            crate::nic::conformance::$name($cable);
        })*
    };
}
pub(super) use conformance;

/// A NIC in use, and the other station.
struct Bench<C: Cable> {
    cable: C,
    nic: C::End,
    frames: FramePool,
    station: Station,
}

fn on_bench<C: Cable>(cable: C, mtu: u16, filter: Filter, test: fn(&mut Bench<C>)) {
    in_namespace(move || {
        cable.lay(u32::from(mtu));
        let mut nic = cable.open(mtu, filter);
        let mut frames = FramePool::new(SLOTS, nic.slot_bytes());
        nic.start(&mut frames).unwrap();
        let station = Station::on(cable.interfaces()[1]);
        let mut bench = Bench {
            cable,
            nic,
            frames,
            station,
        };
        // The carrier comes a moment after the interfaces are up.
        bench.until(|bench| bench.nic.has_link().then_some(()));
        test(&mut bench);
        bench.nic.recall(&mut bench.frames);
        assert_eq!(bench.frames.free_slots(), SLOTS as usize);
    });
}

impl<C: Cable> Bench<C> {
    /// Works as a worker does until there is an answer.
    fn until<T>(&mut self, mut answer: impl FnMut(&mut Self) -> Option<T>) -> T {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(PATIENCE_MS as u64) {
            self.nic.flush(&mut self.frames).unwrap();
            if let Some(answer) = answer(self) {
                return answer;
            }
            let mut fds = Vec::new();
            self.nic.poll_fds(true, false, &mut fds);
            // SAFETY: the pollfds live through the call.
            unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 10) };
        }
        panic!("never: {} {:?}", self.nic.describe(), self.nic.counters());
    }

    /// What the guest would get next. A NIC that has lost its device may say so.
    fn take(&mut self) -> Option<Vec<u8>> {
        let mut out = VecDeque::new();
        let received = self.nic.receive(&mut self.frames, &mut out, 1);
        assert!(received.is_ok() || !self.nic.has_link(), "{received:?}");
        let token = out.pop_front()?;
        let bytes = self.frames.bytes(&token).to_vec();
        self.frames.release(token);
        Some(bytes)
    }

    fn receive(&mut self) -> Vec<u8> {
        self.until(Self::take)
    }

    fn try_send(&mut self, bytes: &[u8]) -> Sent {
        let token = self.frames.from_bytes(bytes).unwrap();
        self.nic.send(&mut self.frames, token)
    }

    fn send(&mut self, bytes: &[u8]) {
        let sent = self.try_send(bytes);
        assert!(matches!(sent, Sent::Done), "{sent:?}");
    }

    fn counter(&self, name: &str) -> u64 {
        let all = self.nic.counters();
        let found = all.iter().find(|(counter, _)| *counter == name);
        found.unwrap_or_else(|| panic!("{name}: {all:?}")).1
    }

    /// Each frame that one side says is heard by the other, byte for byte.
    fn says_and_hears(&mut self, frames: impl Fn(Mac, Mac) -> Vec<Vec<u8>>) {
        for said in frames(STATION, GUEST) {
            self.station.send(&said);
            assert!(self.receive() == said, "{} bytes to the guest", said.len());
        }
        for said in frames(GUEST, STATION) {
            self.send(&said);
            self.nic.flush(&mut self.frames).unwrap();
            assert!(
                self.station.receive() == said,
                "{} bytes of the guest",
                said.len()
            );
        }
    }

    /// The cable carries again, which may take a moment: frames on the way until then are lost.
    fn meets_the_station(&mut self) {
        let hello = |n: usize| frame(STATION, GUEST, 60, n);
        let mut said = 0;
        self.until(|bench| {
            said += 1;
            bench.station.send(&hello(said));
            bench.take()
        });
        self.station.send(&hello(0));
        self.until(|bench| bench.take().filter(|heard| *heard == hello(0)));
        self.send(&frame(GUEST, STATION, 60, 1));
        self.nic.flush(&mut self.frames).unwrap();
        let said = frame(GUEST, STATION, 60, 1);
        while self.station.receive() != said {}
    }

    /// What is sent without a link is lost, and counted.
    fn loses_what_is_sent(&mut self) {
        let before = self.counter("tx_without_link");
        let free = self.frames.free_slots();
        let sent = self.try_send(&frame(GUEST, STATION, 60, 1));
        assert!(matches!(sent, Sent::Refused(_)), "{sent:?}");
        assert_eq!(self.counter("tx_without_link"), before + 1);
        assert_eq!(self.frames.free_slots(), free);
    }
}

const GUESTS: Filter = Filter::Guest(GUEST);

pub(super) fn frames_pass_whole_both_ways<C: Cable>(cable: C) {
    on_bench(cable, 1500, GUESTS, |bench| {
        bench.says_and_hears(|from, to| {
            let plain = [60, 61, 590, 1513, 1514].map(|len| frame(from, to, len, len));
            let tagged = [60, 1514].map(|len| tagged(&frame(from, to, len, len)));
            [&plain[..], &tagged].concat()
        });
    });
}

pub(super) fn jumbo_frames_pass_whole_both_ways<C: Cable>(cable: C) {
    on_bench(cable, 9000, GUESTS, |bench| {
        bench.says_and_hears(|from, to| {
            let plain = [9014, 60, 4000, 3841, 4096].map(|len| frame(from, to, len, len));
            [&plain[..], &[tagged(&frame(from, to, 9014, 1))]].concat()
        });
    });
}

pub(super) fn many_frames_stay_in_order_and_no_slot_is_lost<C: Cable>(cable: C) {
    on_bench(cable, 1500, GUESTS, |bench| {
        // More than there are slots.
        for batch in 0..2 * SLOTS as usize / 64 {
            let numbers = batch * 64..(batch + 1) * 64;
            for n in numbers.clone() {
                bench.station.send(&frame(STATION, GUEST, 100 + n % 900, n));
                bench.send(&frame(GUEST, STATION, 100 + n % 900, n));
            }
            bench.nic.flush(&mut bench.frames).unwrap();
            for n in numbers {
                assert_eq!(bench.receive(), frame(STATION, GUEST, 100 + n % 900, n));
                let said = frame(GUEST, STATION, 100 + n % 900, n);
                assert_eq!(bench.station.receive(), said);
            }
        }
    });
}

/// What has no room is the worker's still, unharmed, and leaves when there is room, in its turn.
pub(super) fn a_nic_without_room_gives_the_frame_back<C: Cable>(cable: C) {
    on_bench(cable, 1500, GUESTS, |bench| {
        bench.cable.stop(&bench.nic);
        let mut sent = 0;
        let mut kept = loop {
            let free = bench.frames.free_slots();
            match bench.try_send(&frame(GUEST, STATION, 60, sent)) {
                Sent::Done => sent += 1,
                Sent::Full(token) => {
                    assert_eq!(bench.frames.free_slots(), free - 1);
                    break token;
                }
                Sent::Refused(e) => panic!("{e}"),
            }
            assert!(sent < SLOTS as usize - 1, "it has room for all");
        };
        assert!(sent > 0);
        assert_eq!(bench.frames.bytes(&kept), frame(GUEST, STATION, 60, sent));
        bench.cable.go_on();
        loop {
            bench.nic.flush(&mut bench.frames).unwrap();
            match bench.nic.send(&mut bench.frames, kept) {
                Sent::Done => break,
                Sent::Full(token) => kept = token,
                Sent::Refused(e) => panic!("{e}"),
            }
            let mut fds = Vec::new();
            bench.nic.poll_fds(false, true, &mut fds);
            // SAFETY: the pollfds live through the call.
            let ready =
                unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, PATIENCE_MS) };
            assert!(ready > 0, "there is no room");
        }
        bench.nic.flush(&mut bench.frames).unwrap();
        for n in 0..=sent {
            assert_eq!(bench.station.receive(), frame(GUEST, STATION, 60, n));
        }
    });
}

/// Rule 24: a secondary's guest hears nothing before its promotion, not even what came earlier; then its own frames,
/// broadcast and multicast, but nothing else.
pub(super) fn the_filter_decides_what_the_guest_hears<C: Cable>(cable: C) {
    on_bench(cable, 1500, Filter::DropAll, |bench| {
        let to = |mac: Mac, n: usize| frame(STATION, mac, 80, n);
        let [v4, v6] = GROUPS;
        let guests = [GUEST, BROADCAST, v4, v6];
        let hears_nothing = |bench: &mut Bench<C>| {
            let before = bench.cable.kept_away(&bench.nic);
            for mac in guests {
                bench.station.send(&to(mac, 1));
            }
            bench.until(|bench| {
                let kept_away = bench.cable.kept_away(&bench.nic) - before;
                (kept_away == guests.len() as u64).then_some(())
            });
            assert_eq!(bench.take(), None);
        };
        hears_nothing(bench);

        bench.nic.set_filter(GUESTS).unwrap();
        for (n, other) in [NOBODY, DISCOVERY].into_iter().enumerate() {
            bench.station.send(&to(other, 2));
            bench.station.send(&to(GUEST, 3 + n));
            assert_eq!(bench.receive(), to(GUEST, 3 + n));
        }
        for group in [BROADCAST, v4, v6] {
            bench.station.send(&to(group, 5));
            assert_eq!(bench.receive(), to(group, 5));
        }

        bench.nic.set_filter(Filter::DropAll).unwrap();
        hears_nothing(bench);

        bench.nic.set_filter(Filter::Open).unwrap();
        for mac in [NOBODY, GUEST, BROADCAST, v4, v6] {
            bench.station.send(&to(mac, 6));
            assert_eq!(bench.receive(), to(mac, 6));
        }
    });
}

pub(super) fn a_link_that_goes_and_comes_back_is_seen<C: Cable>(cable: C) {
    on_bench(cable, 1500, GUESTS, |bench| {
        let [interface, _] = bench.cable.interfaces();
        for round in 1..3 {
            ip(&format!("link set {interface} down"));
            bench.until(|bench| (!bench.nic.has_link()).then_some(()));
            assert!(bench.nic.describe().ends_with(", no link"));
            bench.loses_what_is_sent();
            ip(&format!("link set {interface} up"));
            bench.until(|bench| bench.nic.has_link().then_some(()));
            assert!(!bench.nic.describe().ends_with(", no link"));
            bench.meets_the_station();
            assert_eq!(bench.counter("link_losses"), round);
        }
        assert_eq!(bench.counter("nic_losses"), 0);
    });
}

/// An error and no panic, nor a worker that is woken all the time; and the filter holds for the new one.
pub(super) fn an_interface_that_is_deleted_and_made_again_is_used_again<C: Cable>(cable: C) {
    on_bench(cable, 1500, GUESTS, |bench| {
        for round in 1..3 {
            bench.station.send(&frame(STATION, GUEST, 60, 1));
            bench.cable.remove();
            while bench.take().is_some() {}
            bench.until(|bench| (bench.counter("nic_losses") == round).then_some(()));
            assert!(bench.nic.describe().contains(", lost"));
            assert!(!bench.nic.has_link());
            bench.loses_what_is_sent();
            assert_eq!(bench.take(), None);
            // A filter that is set meanwhile holds afterwards.
            bench.nic.set_filter(Filter::DropAll).unwrap();
            bench.nic.set_filter(GUESTS).unwrap();

            bench.cable.replace();
            bench.station = Station::on(bench.cable.interfaces()[1]);
            bench.until(|bench| bench.nic.has_link().then_some(()));
            assert_eq!(bench.counter("nic_returns"), round);
            bench.meets_the_station();
            bench.station.send(&frame(STATION, NOBODY, 60, 2));
            bench.station.send(&frame(STATION, GUEST, 60, 3));
            assert_eq!(bench.receive(), frame(STATION, GUEST, 60, 3));
        }
    });
}
