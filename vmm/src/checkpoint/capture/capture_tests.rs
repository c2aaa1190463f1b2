//! Whole captures of a machine on the real KVM.

use std::sync::mpsc::channel;
use std::time::Duration;

use colo_fastpath::pair::{OnWorkers, PrimaryRole};

use super::lab::{as_primary, thread};
use super::*;
use crate::checkpoint::guests::{FOR_EVER, Guest, ON_ORDER, ORDERS, is_no_page_table};
use crate::checkpoint::pages::PAGE_BYTES;
use crate::checkpoint::stop::StopNumber;

const BASE: u64 = 0x40_0000;
const FIRST: u64 = BASE / 4096;
/// Longest wait for a guest that runs.
const PATIENCE: Duration = Duration::from_secs(20);

fn order(svm_stopped: &[u8]) -> Order<'_> {
    Order {
        first: true,
        svm_stopped,
        buffer: false,
    }
}

#[test]
fn rule_11_the_union_of_what_both_guests_have_written_is_captured() {
    for policy in [StabilisePolicy::Copy, StabilisePolicy::Protect] {
        let guest = Guest::start(ON_ORDER, 64, "");
        let machine = Arc::new(guest.machine);
        let _primary = as_primary(&machine);
        // Before anything is logged: only the SVM knows that it differs.
        machine.ram().write(BASE, &[7; PAGE_BYTES]).unwrap();
        let (mut thread, _kept) = thread(&machine, policy);
        machine.ram().write(BASE + 4096, &[8; PAGE_BYTES]).unwrap();
        let mut dirty = PageBitmap::new(machine.ram().page_count());
        dirty.add(FIRST as usize / 64, 1 << (FIRST % 64));
        let number = StopNumber::default().advance();
        let svm_stopped = stop::to_bytes(&dirty, number, thread.version);
        let (cost, mut capture) = thread.capture(order(&svm_stopped)).unwrap();
        assert_eq!(cost.dirty_pages, 2, "{policy:?}");
        let mut kept = Vec::new();
        while let Some((page, bytes)) = capture.stable.next_page().unwrap() {
            kept.push((page, *bytes));
        }
        let both = [(FIRST, [7; PAGE_BYTES]), (FIRST + 1, [8; PAGE_BYTES])];
        assert!(kept == both, "{policy:?}: {} pages", kept.len());
    }
}

#[test]
fn rule_14_the_pages_of_an_aborted_checkpoint_are_in_the_next_one_and_in_no_later_one() {
    let guest = Guest::start(ON_ORDER, 64, "");
    let machine = Arc::new(guest.machine);
    let _primary = as_primary(&machine);
    let (mut thread, _kept) = thread(&machine, StabilisePolicy::Copy);
    let capture = |thread: &mut CaptureThread, first| {
        let order = Order {
            first,
            ..order(&[])
        };
        let (_, mut capture) = thread.capture(order).unwrap();
        let mut pages = Vec::new();
        while let Some((page, bytes)) = capture.stable.next_page().unwrap() {
            if is_no_page_table(page) {
                pages.push((page, bytes[0]));
            }
        }
        pages
    };
    let ram = machine.ram();
    ram.write(BASE, &[1]).unwrap();
    assert_eq!(capture(&mut thread, true), [(FIRST, 1)]);
    thread.aborted();
    let abort = |role: &mut PrimaryRole, edge: &mut _| role.abort(edge, 1);
    PrimaryRole::on_worker(machine.worker(), abort).unwrap();
    // As they are then.
    ram.write(BASE + 4096, &[2]).unwrap();
    assert_eq!(capture(&mut thread, false), [(FIRST, 1), (FIRST + 1, 2)]);
    let commit = |role: &mut PrimaryRole, edge: &mut _| role.commit(edge, 2);
    PrimaryRole::on_worker(machine.worker(), commit).unwrap();
    // As when the commit is told.
    thread.in_flight.clear();
    assert_eq!(capture(&mut thread, false), []);
}

/// How often [`FOR_EVER`] has written to all that it was aimed at.
fn rounds(machine: &Machine) -> u64 {
    let mut bytes = [0; 8];
    machine.ram().read(ORDERS + 8, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// Whether the guest runs, or does soon.
fn goes_on(machine: &Machine) -> bool {
    let (before, until) = (rounds(machine), Instant::now() + PATIENCE);
    while rounds(machine) == before && Instant::now() < until {
        std::thread::yield_now();
    }
    rounds(machine) != before
}

#[test]
fn rule_11_the_guest_runs_on_before_a_page_of_the_capture_is_read() {
    for policy in [StabilisePolicy::Copy, StabilisePolicy::Protect] {
        let guest = Guest::start(FOR_EVER, 64, "");
        guest.aim(BASE, 8, 4096);
        let machine = Arc::new(guest.machine);
        let _primary = as_primary(&machine);
        let (mut thread, _kept) = thread(&machine, policy);
        machine.resume_vcpus().unwrap();
        assert!(goes_on(&machine), "{policy:?}");
        let (cost, mut capture) = thread.capture(order(&[])).unwrap();
        assert!(goes_on(&machine), "{policy:?}");
        // Rule 17: waiting for other threads is a part of the pause.
        assert!(
            0 < cost.quiesce_us && cost.quiesce_us < cost.pause_us,
            "{cost:?}"
        );
        // What it writes now is not in the capture: all of it is of one instant.
        let mut written = Vec::new();
        while let Some((page, bytes)) = capture.stable.next_page().unwrap() {
            if (FIRST..FIRST + 8).contains(&page) {
                let (count, _) = bytes.split_first_chunk().unwrap();
                written.push(u64::from_le_bytes(*count));
            }
        }
        // It writes them in turn, so the count falls once at most, by one.
        assert_eq!(written.len(), 8, "{policy:?}");
        assert!(
            written.is_sorted_by(|a, b| a >= b),
            "{policy:?}: {written:?}"
        );
        assert!(written[0] - written[7] <= 1, "{policy:?}: {written:?}");
        drop(capture);
        machine.pause_vcpus().unwrap();
    }
}

#[test]
fn records_are_made_in_the_memory_of_those_before() {
    let guest = Guest::start(ON_ORDER, 64, "");
    let machine = Arc::new(guest.machine);
    let _primary = as_primary(&machine);
    let (mut thread, _kept) = thread(&machine, StabilisePolicy::Copy);
    let (_orders, commands) = channel();
    let before = thread.session.as_ref().unwrap().records.places();
    assert!(
        before
            .iter()
            .all(|place| place.capacity >= 8192 && place.bytes == 0)
    );
    // A vCPU has two of them in turn: one is its thread's.
    for epoch in 1..=6 {
        let order = Order {
            first: epoch == 1,
            ..order(&[])
        };
        thread.checkpoint(epoch, order, &commands);
        assert!(thread.is_cut, "epoch {epoch}");
        thread.in_flight.clear();
        thread.session.as_mut().unwrap().outbound.committed();
        PrimaryRole::on_worker(machine.worker(), move |role, edge| role.commit(edge, epoch))
            .unwrap();
        let after = thread.session.as_ref().unwrap().records.places();
        assert_eq!(after.len(), before.len());
        for (was, is) in before.iter().zip(&after) {
            assert!(is.bytes > 0, "{is:?} has another's memory");
            if !is.is_vcpu || epoch % 2 == 0 {
                assert_eq!((is.at, is.capacity), (was.at, was.capacity), "{is:?}");
            }
        }
    }
}
