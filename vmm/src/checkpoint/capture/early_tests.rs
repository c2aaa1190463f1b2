//! Pages of a guest that goes on writing, copied before the pause and kept in it.

use std::sync::Arc;

use super::*;
use crate::checkpoint::capture::lab::thread;
use crate::checkpoint::guests::{FOR_EVER, Guest, ORDERS};
use crate::checkpoint::pages::PAGE_BYTES;
use crate::checkpoint::stabilise::StabilisePolicy;
use crate::machine::Machine;

const BASE: u64 = 0x40_0000;
const FIRST: u64 = BASE / 4096;

/// Until the guest has written all of its pages once more.
fn wait_for_writes(machine: &Machine) {
    let rounds = || {
        let mut bytes = [0; 8];
        machine.ram().read(ORDERS + 8, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    };
    let before = rounds();
    while rounds() < before + 1 {
        std::thread::yield_now();
    }
}

fn page(machine: &Machine, number: u64) -> [u8; PAGE_BYTES] {
    let mut bytes = [0; PAGE_BYTES];
    let ram = machine.ram();
    ram.copy_page_out(number as usize, &mut bytes).unwrap();
    bytes
}

#[test]
fn rule_11_what_the_guest_writes_from_the_early_copy_to_the_pause_is_in_the_capture() {
    let guest = Guest::start(FOR_EVER, 64, "");
    // So few that copying early pays, and slowly: some are written once, between any two steps of a capture.
    guest.aim(BASE, 60, 4096);
    guest.set(5, 30_000);
    let machine = Arc::new(guest.machine);
    let (mut thread, _kept) = thread(&machine, StabilisePolicy::Copy);
    machine.resume_vcpus().unwrap();
    let mut again_pages = 0;
    for round in 0..40 {
        wait_for_writes(&machine);
        // What the SVM has written: none of it is in the log.
        for word in &mut thread.in_flight.words_mut()[FIRST as usize / 64..][..30] {
            *word = u64::MAX;
        }
        let mut cost = CaptureCost::default();
        thread.copy_early(&mut cost).unwrap();
        assert!(cost.early_pages >= 30 * 64, "{cost:?}");
        let is_written_again = round % 2 == 0;
        if is_written_again {
            // The rest of a round, and a whole one.
            wait_for_writes(&machine);
            wait_for_writes(&machine);
        }
        machine.pause_vcpus().unwrap();
        thread.collect().unwrap();
        let late = thread.written.count() as u64;
        assert!(late < 120, "most of it was copied before: {late}");
        let truth: Vec<_> = thread.in_flight.iter().collect();
        let truth = truth
            .into_iter()
            .map(|number| (number, page(&machine, number)));
        let truth: Vec<_> = truth.collect();
        let mut stable = thread.keep(&mut cost).unwrap();
        machine.resume_vcpus().unwrap();
        assert!(cost.again_pages <= late, "{cost:?}");
        assert!(cost.again_pages >= 60 || !is_written_again, "{cost:?}");
        again_pages += cost.again_pages;
        for (number, expected) in &truth {
            let (found, bytes) = stable.next_page().unwrap().unwrap();
            assert_eq!(found, *number);
            assert!(bytes == expected, "page {number} in round {round}");
        }
        assert!(stable.next_page().unwrap().is_none());
        drop(stable);
        thread.in_flight.clear();
    }
    let session = thread.session.as_ref().unwrap();
    let counted = session.stabiliser.snapshot();
    assert_eq!(
        (counted.early, counted.early_again_pages),
        (40, again_pages)
    );
}

#[test]
fn rule_14_pages_collected_early_belong_to_the_next_checkpoint_if_this_one_fails() {
    let guest = Guest::start(FOR_EVER, 64, "");
    let machine = Arc::new(guest.machine);
    let (mut thread, _kept) = thread(&machine, StabilisePolicy::Copy);
    machine.ram().write(BASE, &[1]).unwrap();
    thread.copy_early(&mut CaptureCost::default()).unwrap();
    thread.aborted();
    assert_eq!(thread.carry.iter().collect::<Vec<_>>(), [FIRST]);
}

#[test]
fn where_pages_are_protected_nothing_is_collected_before_the_pause() {
    let guest = Guest::start(FOR_EVER, 64, "");
    let machine = Arc::new(guest.machine);
    let (mut thread, _kept) = thread(&machine, StabilisePolicy::Protect);
    machine.ram().write(BASE, &[1]).unwrap();
    let mut cost = CaptureCost::default();
    thread.copy_early(&mut cost).unwrap();
    assert_eq!((cost.early_pages, thread.in_flight.count()), (0, 0));
    thread.collect().unwrap();
    assert_eq!(thread.written.iter().collect::<Vec<_>>(), [FIRST]);
}
