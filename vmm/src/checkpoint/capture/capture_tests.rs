//! Whole captures of a machine on the real KVM.

use std::sync::mpsc::channel;

use colo_fastpath::pair::{OnWorkers, PrimaryRole};

use super::lab::{as_primary, thread};
use super::*;
use crate::checkpoint::guests::{Guest, ON_ORDER};
use crate::checkpoint::pages::PAGE_BYTES;
use crate::checkpoint::stop::StopNumber;

const BASE: u64 = 0x40_0000;
const FIRST: u64 = BASE / 4096;

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
