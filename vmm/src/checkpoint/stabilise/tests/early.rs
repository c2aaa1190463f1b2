//! What is copied before a pause, beside guests and host writers that go on writing, against a full copy made in the pause.

use std::thread;

use proptest::prelude::*;

use super::*;
use crate::checkpoint::guests::ORDERS_PAGE;

const PAGES: usize = 2000;
/// Of these the guest writes so many: less than half.
const WRITTEN: u64 = 300;

/// Looks at the log, with which an early copy begins; gives the pages.
fn collect(guest: &Guest) -> PageBitmap {
    let mut dirty = PageBitmap::new(guest.machine.ram().page_count());
    guest.machine.take_dirty(&mut dirty).unwrap();
    dirty
}

/// Pauses, looks at the log again, takes, goes on; gives the capture and what memory held.
fn take_since(
    stabiliser: &mut Stabiliser,
    guest: &Guest,
    gate: &Mutex<u64>,
    union: &mut PageBitmap,
) -> (Stable, Vec<[u8; PAGE_BYTES]>) {
    guest.machine.pause_vcpus().unwrap();
    let stopped = gate.lock().unwrap();
    let late = collect(guest);
    union.merge(&late);
    let page = |page: u64| {
        let mut bytes = [0; PAGE_BYTES];
        let ram = guest.machine.ram();
        ram.copy_page_out(page as usize, &mut bytes).unwrap();
        bytes
    };
    let truth = union.iter().map(page).collect();
    let stable = stabiliser.take_since(union, &late, StabilisePolicy::Copy);
    drop(stopped);
    guest.machine.resume_vcpus().unwrap();
    (stable.unwrap(), truth)
}

#[test]
fn rule_11_a_page_is_captured_as_it_is_in_the_pause_though_it_was_copied_before() {
    for log in ["bitmap", "ring"] {
        let more = format!("[checkpoint]\ndirty = \"{log}\"");
        let mut lab = Lab::with(FOR_EVER, ARENA_PAGES, &more);
        lab.guest.aim(BASE, WRITTEN, 4096);
        lab.guest.machine.set_dirty_logging(true).unwrap();
        lab.guest.machine.resume_vcpus().unwrap();
        lab.beside_host_writers(|stabiliser, guest, gate| {
            for round in 0..30 {
                wait_for_writes(guest, 1);
                let mut union = collect(guest);
                union.merge(&set(guest, FIRST - 50, PAGES));
                let early = stabiliser.copy_early(&union);
                assert_eq!(early, union.count() as u64);
                if round % 2 == 0 {
                    wait_for_writes(guest, 1);
                }
                let (stable, truth) = take_since(stabiliser, guest, gate, &mut union);
                let outcome = read(stable, &truth, |n| {
                    if n == 500 {
                        wait_for_writes(guest, 1);
                    }
                });
                assert_eq!(outcome.wrong, [] as [u64; 0], "{log}, round {round}");
            }
        });
        let stats = lab.stabiliser.snapshot();
        assert_eq!((stats.copies, stats.early), (30, 30), "{log}");
    }
}

#[test]
fn what_was_first_written_between_copy_and_pause_is_captured_too() {
    let mut lab = Lab::new(ON_ORDER, ARENA_PAGES);
    let Lab {
        guest,
        stabiliser,
        gate,
        ..
    } = &mut lab;
    guest.machine.resume_vcpus().unwrap();
    guest.write_once(BASE, 1, 1);
    guest.machine.set_dirty_logging(true).unwrap();
    for round in 0..3 {
        guest.write_once(BASE, 400, 2 * 4096);
        let mut union = collect(guest);
        assert!(stabiliser.copy_early(&union) > 400);
        // Between those copied, at both of their ends, and some of them once more.
        guest.write_once(BASE - 5 * 4096, 60, 4096);
        guest.machine.ram().write(60 << 20, &[round]).unwrap();
        guest.machine.ram().write(BASE + 9, &[round]).unwrap();
        let (stable, truth) = take_since(stabiliser, guest, gate, &mut union);
        let is_in = |page: u64| union.word(page as usize / 64) & 1 << (page % 64) != 0;
        assert!(is_in(FIRST as u64 - 5) && is_in(15_360) && is_in(ORDERS_PAGE));
        assert_eq!(read(stable, &truth, |_| {}).wrong, [] as [u64; 0]);
    }
    assert_eq!(lab.stabiliser.snapshot().early, 3);
}

/// Sets of pages, and what becomes of them.
fn small_set() -> impl Strategy<Value = PageBitmap> {
    let word = prop_oneof![Just(0), Just(u64::MAX), any::<u64>()];
    let sparse = (any::<u64>(), any::<u64>()).prop_map(|(a, b)| a & b);
    let words = proptest::collection::vec(prop_oneof![word, sparse], 4);
    words.prop_map(|words| {
        let mut set = PageBitmap::new(64 * words.len());
        set.words_mut().copy_from_slice(&words);
        set
    })
}

fn fill(ram: &GuestRam, set: &PageBitmap, turn: u8) {
    for page in set.iter() {
        let bytes = [turn ^ page as u8; PAGE_BYTES];
        ram.write_page(page as usize, &bytes).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_sets_are_captured_as_they_are_and_every_slot_is_the_pages_own(
        early in small_set(),
        union in small_set(),
        written in small_set(),
        is_digested: bool,
    ) {
        let ram = GuestRam::new(4 * 64 * PAGE_BYTES as u64, Pages::Small).unwrap();
        let ram = Arc::new(ram);
        let mut stabiliser = Stabiliser::new(ram.clone(), None, 1).unwrap();
        let key = || PageKey::new([3; 16]);
        if is_digested {
            stabiliser.digest_with(key());
        }
        let all = PageBitmap::full(4 * 64);
        fill(&ram, &all, 1);
        prop_assert_eq!(stabiliser.copy_early(&early), early.count() as u64);
        // A page that is not said to be written is not looked at again: so it shows which copy was taken.
        fill(&ram, &all, 2);
        let stable = stabiliser.take_since(&union, &written, StabilisePolicy::Copy);
        let mut stable = stable.unwrap();
        let is_early = stabiliser.snapshot().early == 1;
        let keeper = stable.keeper();
        let in_order = stable.undigested().unwrap();
        let mut last = None;
        for page in union.iter() {
            let (at, bit) = (page as usize / 64, 1 << (page % 64));
            let is_old = is_early && early.word(at) & !written.word(at) & bit != 0;
            let turn = if is_old { 1 } else { 2 };
            let kept = stable.next_kept().unwrap().unwrap();
            prop_assert_eq!((kept.number, kept.page[7]), (page, turn ^ page as u8));
            let digest = (is_old && is_digested).then(|| key().of(kept.page));
            prop_assert_eq!(kept.digest, digest);
            let slot = kept.slot.unwrap();
            prop_assert_eq!(keeper.bytes(slot..slot + 1), &kept.page[..]);
            if in_order.contains(&slot) {
                prop_assert!(last < Some(slot), "{:?} {}", last, slot);
                prop_assert!(digest.is_none());
                last = Some(slot);
            } else {
                let is_again = is_early && early.word(at) & written.word(at) & bit != 0;
                prop_assert!(digest.is_some() || is_again || !is_digested);
            }
        }
        prop_assert!(stable.next_kept().unwrap().is_none());
        drop(stable);
        // What was copied early has served.
        let again = stabiliser.take_since(&all, &PageBitmap::new(4 * 64), StabilisePolicy::Copy);
        let (_, page) = again.unwrap().next_page().unwrap().map(|(n, page)| (n, page[0])).unwrap();
        prop_assert_eq!(page, 2);
    }
}

fn memory(pages: usize) -> (Arc<GuestRam>, Stabiliser) {
    let ram = GuestRam::new((pages * PAGE_BYTES) as u64, Pages::Small).unwrap();
    let ram = Arc::new(ram);
    let stabiliser = Stabiliser::new(ram.clone(), None, 1).unwrap();
    (ram, stabiliser)
}

#[test]
fn a_guest_that_writes_most_of_it_again_is_left_alone_for_a_while() {
    let (_ram, mut stabiliser) = memory(64 * 64);
    let copy = StabilisePolicy::Copy;
    let (mut union, mut again) = (PageBitmap::new(64 * 64), PageBitmap::new(64 * 64));
    union.words_mut()[..4].fill(u64::MAX);
    again.words_mut()[..2].fill(u64::MAX);
    assert!(!stabiliser.wants_early(StabilisePolicy::Protect, 256));
    assert!(stabiliser.wants_early(copy, 256));
    stabiliser.copy_early(&union);
    drop(stabiliser.take_since(&union, &again, copy).unwrap());
    let stats = stabiliser.snapshot();
    assert_eq!((stats.copies, stats.early, stats.early_left), (1, 1, 0));
    // For a set that is large beside what is written again it still pays.
    assert!(stabiliser.wants_early(copy, 16 * 128));
    let left = (0..1000).take_while(|_| !stabiliser.wants_early(copy, 256));
    let left = left.count() as u64;
    assert!((10..100).contains(&left), "{left}");
    assert_eq!(stabiliser.snapshot().early_left, left);
    // And when it is found to pay again, it goes on.
    stabiliser.copy_early(&union);
    let none = PageBitmap::new(64 * 64);
    drop(stabiliser.take_since(&union, &none, copy).unwrap());
    assert!(stabiliser.wants_early(copy, 0));
}

#[test]
fn nothing_is_copied_early_while_a_capture_is_read_nor_used_where_pages_are_protected() {
    let mut lab = Lab::new(ON_ORDER, ARENA_PAGES);
    let Lab {
        guest,
        stabiliser,
        gate,
        ..
    } = &mut lab;
    let union = set(guest, FIRST, 100);
    let (stable, truth) = take(stabiliser, guest, gate, &union, StabilisePolicy::Copy);
    assert_eq!(stabiliser.copy_early(&union), 0);
    assert_eq!(read(stable, &truth, |_| {}).wrong, [] as [u64; 0]);
    assert_eq!(stabiliser.copy_early(&union), 100);
    let none = PageBitmap::new(union.words().len() * 64);
    let stable = stabiliser.take_since(&union, &none, StabilisePolicy::Protect);
    assert_eq!(stable.unwrap().mechanism(), Mechanism::Protect);
    assert_eq!(stabiliser.snapshot().early, 0);
    // More than there is room for.
    let limit = stabiliser.shared.arena.limit() as usize;
    let all = PageBitmap::full(limit + 1);
    assert_eq!(stabiliser.copy_early(&all), 0);
}

#[test]
fn rule_15_no_slot_is_given_out_anew_that_a_writer_of_the_host_still_fills() {
    let mut lab = Lab::new(ON_ORDER, 1);
    let Lab {
        guest, stabiliser, ..
    } = &mut lab;
    let shared = stabiliser.shared.clone();
    let due = set(guest, FIRST, 10);
    let stable = stabiliser.take(&due, StabilisePolicy::Protect).unwrap();
    // Whoever writes to the first slot stops there.
    let arena_bytes = u64::from(shared.arena.limit()) * PAGE_BYTES as u64;
    let arena = uffd::Uffd::new(shared.arena.page(0).as_ptr() as u64, arena_bytes).unwrap();
    arena.protect(0, 1).unwrap();
    let next_stop = || {
        (0..).find_map(|_| {
            arena.next_fault().or_else(|| {
                thread::yield_now();
                None
            })
        })
    };
    let (early, others) = thread::scope(|scope| {
        let writer = scope.spawn(|| shared.before_write(FIRST..=FIRST));
        next_stop();
        // The capture is over, and the next one begins.
        drop(stable);
        let early = scope.spawn(|| stabiliser.copy_early(&due));
        let mut others = 0;
        while !early.is_finished() && others == 0 {
            others += arena.next_fault().iter().count();
            thread::yield_now();
        }
        arena.release(0, 1).unwrap();
        writer.join().unwrap();
        (early.join().unwrap(), others)
    });
    assert_eq!((early, others), (0, 0), "the writer alone has the slot");
    assert_eq!(stabiliser.copy_early(&due), 10);
}
