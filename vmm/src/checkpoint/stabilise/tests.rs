//! Captures of real guests that go on writing, beside host writers, against a full copy made in the pause.

use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use colo_fastpath::ring::Pages;

use super::*;
use crate::checkpoint::guests::{FOR_EVER, Guest, ON_ORDER, ORDERS, is_no_page_table};

mod alone;
mod early;

const BASE: u64 = 0x40_0000;
const FIRST: usize = (BASE / 4096) as usize;
const ARENA_PAGES: u32 = 16_384;
/// Pages that the host writes as well.
const HOST_FIRST: usize = FIRST + 100;
const HOST_PAGES: usize = 400;

struct Lab {
    guest: Guest,
    stabiliser: Stabiliser,
    /// Held by a host writer while it writes, and by a capture while it pauses.
    gate: Mutex<u64>,
    done: AtomicBool,
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a capture has found.
struct Outcome {
    cost: StableCost,
    wrong: Vec<u64>,
}

impl Lab {
    fn new(code: &[u8], arena_pages: u32) -> Self {
        Self::with(code, arena_pages, "")
    }

    /// With more in the configuration.
    fn with(code: &[u8], arena_pages: u32, more: &str) -> Self {
        let guest = Guest::start(code, 64, more);
        let machine = &guest.machine;
        let view = machine.guest_view().cloned();
        let stabiliser = Stabiliser::new(machine.ram().clone(), view, arena_pages).unwrap();
        assert_eq!(stabiliser.unavailable(), None);
        Self {
            guest,
            stabiliser,
            gate: Mutex::new(0),
            done: AtomicBool::new(false),
        }
    }

    /// Runs `captures` beside a thread that writes to the guest's memory in all the ways that devices do.
    fn beside_host_writers(&mut self, captures: impl FnOnce(&mut Stabiliser, &Guest, &Mutex<u64>)) {
        let Self {
            guest,
            stabiliser,
            gate,
            done,
        } = self;
        let (guest, gate, done) = (&*guest, &*gate, &*done);
        let ram = guest.machine.ram();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut n = 0_u64;
                while !done.load(Ordering::Relaxed) {
                    let mut written = gate.lock().unwrap();
                    let page = HOST_FIRST as u64 + n % HOST_PAGES as u64;
                    ram.write(page * 4096 + 4090, &n.to_le_bytes()).unwrap();
                    ram.store_u16(page * 4096 + 2048, n as u16, Ordering::Release)
                        .unwrap();
                    n += 1;
                    *written = n;
                }
            });
            // The writer ends if `captures` panics, too.
            let _end = SetOnDrop(done);
            captures(stabiliser, guest, gate);
        });
    }
}

fn set(guest: &Guest, first: usize, count: usize) -> PageBitmap {
    let mut set = PageBitmap::new(guest.machine.ram().page_count());
    for page in first..first + count {
        set.add(page / 64, 1 << (page % 64));
    }
    set
}

/// Pauses, takes, goes on; gives the capture and what memory held.
fn take(
    stabiliser: &mut Stabiliser,
    guest: &Guest,
    gate: &Mutex<u64>,
    union: &PageBitmap,
    policy: StabilisePolicy,
) -> (Stable, Vec<[u8; PAGE_BYTES]>) {
    guest.machine.pause_vcpus().unwrap();
    let stopped = gate.lock().unwrap();
    let mut truth = Vec::new();
    for page in union.iter() {
        let mut bytes = [0; PAGE_BYTES];
        guest
            .machine
            .ram()
            .copy_page_out(page as usize, &mut bytes)
            .unwrap();
        truth.push(bytes);
    }
    let stable = stabiliser.take(union, policy).unwrap();
    drop(stopped);
    guest.machine.resume_vcpus().unwrap();
    (stable, truth)
}

/// Reads a capture to its end; `each` is called before each page.
fn read(mut stable: Stable, truth: &[[u8; PAGE_BYTES]], each: impl Fn(usize)) -> Outcome {
    let mut wrong = Vec::new();
    for (n, expected) in truth.iter().enumerate() {
        each(n);
        let (page, contents) = stable.next_page().unwrap().unwrap();
        if contents != expected {
            wrong.push(page);
        }
    }
    assert!(stable.next_page().unwrap().is_none());
    Outcome {
        cost: stable.finish(),
        wrong,
    }
}

/// Lets the guest write some more.
fn wait_for_writes(guest: &Guest, rounds: u64) {
    let until = guest.word(ORDERS + 8) + rounds;
    while guest.word(ORDERS + 8) < until {
        std::thread::yield_now();
    }
}

/// Pages of the guest's mapping that are write-protected by userfaultfd (bit 57, Documentation/admin-guide/mm/pagemap.rst).
fn protected(guest: &Guest) -> Vec<u64> {
    let view = guest.machine.guest_view().unwrap();
    let pages = guest.machine.ram().page_count();
    let mut entries = vec![0; pages * 8];
    std::fs::File::open("/proc/self/pagemap")
        .unwrap()
        .read_exact_at(&mut entries, view.address() / 4096 * 8)
        .unwrap();
    let is_protected = |entry: &[u8]| entry[7] & 1 << (57 - 56) != 0;
    let pages = entries.chunks_exact(8).zip(0..);
    pages
        .filter(|(entry, _)| is_protected(entry))
        .map(|(_, page)| page)
        .collect()
}

#[test]
fn a_capture_is_what_memory_held_whatever_guest_and_host_write_afterwards() {
    for policy in [
        StabilisePolicy::Copy,
        StabilisePolicy::Protect,
        StabilisePolicy::Mixed,
        StabilisePolicy::Auto,
    ] {
        let mut lab = Lab::new(FOR_EVER, ARENA_PAGES);
        lab.guest.aim(BASE, 1000, 4096);
        lab.guest.machine.resume_vcpus().unwrap();
        lab.beside_host_writers(|stabiliser, guest, gate| {
            // More than what is written, and another set each time, so that some pages are hot.
            for round in 0..12 {
                let union = set(guest, FIRST - 50 + 100 * (round % 3), 1000 + 10 * round);
                wait_for_writes(guest, 1);
                let (stable, truth) = take(stabiliser, guest, gate, &union, policy);
                let outcome = read(stable, &truth, |n| {
                    if n == 500 {
                        wait_for_writes(guest, 1);
                    }
                });
                assert_eq!(outcome.wrong, [] as [u64; 0], "{policy:?}, round {round}");
                assert_eq!(protected(guest), [] as [u64; 0], "{policy:?}");
                let cost = outcome.cost;
                assert_eq!(cost.pages, 1000 + 10 * round as u64);
                match policy {
                    StabilisePolicy::Copy => assert_eq!((cost.faults, cost.host_saves), (0, 0)),
                    StabilisePolicy::Protect => assert!(cost.faults > 0, "{cost:?}"),
                    _ => {}
                }
            }
        });
        let stats = lab.stabiliser.snapshot();
        assert_eq!(stats.copies + stats.protects + stats.mixed, 12);
        assert_eq!((stats.lost, stats.fallbacks), (0, 0));
        match policy {
            StabilisePolicy::Copy => assert_eq!(stats.copies, 12),
            StabilisePolicy::Protect => {
                assert_eq!(stats.protects, 12);
                assert!(stats.host_saves > 0 && stats.stall_us > 0, "{stats:?}");
            }
            StabilisePolicy::Mixed => assert_eq!(stats.mixed, 12),
            StabilisePolicy::Auto => assert_eq!(stats.copies, 12),
        }
    }
}

#[test]
fn auto_copies_what_there_is_room_for_and_keeps_a_larger_set_as_mixed_does() {
    let mut lab = Lab::new(FOR_EVER, ARENA_PAGES);
    let limit = lab.stabiliser.shared.arena.limit() as usize;
    let auto = StabilisePolicy::Auto;
    let chosen = |stabiliser: &mut Stabiliser, pages| stabiliser.choose(pages, auto).unwrap();
    for (pages, expected) in [
        (1, Mechanism::Copy),
        (100, Mechanism::Copy),
        (limit, Mechanism::Copy),
        (limit + 1, Mechanism::Mixed),
        (usize::MAX, Mechanism::Mixed),
    ] {
        assert_eq!(
            chosen(&mut lab.stabiliser, pages),
            expected,
            "{pages} pages"
        );
    }
    // Before the pause where that pays, and what it finds then is known as hot to a larger one.
    let Lab {
        guest,
        stabiliser,
        gate,
        ..
    } = &mut Lab::new(FOR_EVER, 4096);
    guest.aim(BASE, 300, 4096);
    guest.machine.resume_vcpus().unwrap();
    let (small, none) = (set(guest, FIRST, 300), set(guest, FIRST, 0));
    assert!(stabiliser.wants_early(auto, 300));
    assert_eq!(stabiliser.copy_early(&small), 300);
    drop(stabiliser.take_since(&small, &none, auto).unwrap());
    assert_eq!(stabiliser.snapshot().early, 1);
    let (stable, truth) = take(stabiliser, guest, gate, &set(guest, FIRST, 6000), auto);
    assert_eq!(stable.mechanism(), Mechanism::Mixed);
    assert_eq!(stabiliser.hot.count(), 300);
    let outcome = read(stable, &truth, |_| {});
    assert_eq!(outcome.wrong, [] as [u64; 0]);
    assert_eq!(outcome.cost.faults, 0, "what the guest writes was copied");
}

#[test]
fn pages_are_protected_until_they_are_read_or_the_capture_is_given_up() {
    let mut lab = Lab::new(ON_ORDER, ARENA_PAGES);
    lab.guest.machine.resume_vcpus().unwrap();
    lab.guest.write_once(BASE, 1000, 4096);
    let union = set(&lab.guest, FIRST, 1000);
    for give_up_at in [0, 1, 63, 64, 500, 1000] {
        let (mut stable, _) = take(
            &mut lab.stabiliser,
            &lab.guest,
            &lab.gate,
            &union,
            StabilisePolicy::Protect,
        );
        assert_eq!(protected(&lab.guest).len(), 1000);
        assert!(matches!(
            lab.stabiliser.take(&union, StabilisePolicy::Copy),
            Err(StabiliseError::Busy)
        ));
        for _ in 0..give_up_at {
            stable.next_page().unwrap().unwrap();
        }
        let left = protected(&lab.guest).len();
        assert!(
            left >= 1000 - give_up_at && left <= 1000 - give_up_at / 64 * 64,
            "{left}"
        );
        drop(stable);
        assert_eq!(protected(&lab.guest), [] as [u64; 0]);
        lab.guest.write_once(BASE, 1000, 4096);
    }
    assert_eq!(lab.stabiliser.snapshot().faults, 0);
}

#[test]
fn a_guest_that_waits_at_a_page_goes_on_when_the_capture_is_dropped() {
    let mut lab = Lab::new(FOR_EVER, ARENA_PAGES);
    lab.guest.aim(BASE, 2000, 4096);
    lab.guest.machine.resume_vcpus().unwrap();
    let union = set(&lab.guest, FIRST, 2000);
    for _ in 0..20 {
        wait_for_writes(&lab.guest, 1);
        let (mut stable, truth) = take(
            &mut lab.stabiliser,
            &lab.guest,
            &lab.gate,
            &union,
            StabilisePolicy::Protect,
        );
        for expected in &truth[..30] {
            assert_eq!(stable.next_page().unwrap().unwrap().1, expected);
        }
        drop(stable);
        assert_eq!(protected(&lab.guest), [] as [u64; 0]);
    }
}

#[test]
fn a_full_arena_makes_the_guest_wait_and_loses_nothing() {
    let mut lab = Lab::new(FOR_EVER, 1);
    let limit = u64::from(lab.stabiliser.shared.arena.limit());
    lab.guest.aim(BASE, 6000, 4096);
    lab.guest.machine.resume_vcpus().unwrap();
    let union = set(&lab.guest, FIRST, 6000);
    for _ in 0..3 {
        wait_for_writes(&lab.guest, 1);
        // The set is larger than the arena, so it is protected whatever the policy says.
        let (stable, truth) = take(
            &mut lab.stabiliser,
            &lab.guest,
            &lab.gate,
            &union,
            StabilisePolicy::Copy,
        );
        assert_eq!(stable.mechanism(), Mechanism::Protect);
        let shared = lab.stabiliser.shared.clone();
        let waits = shared.counts.arena_waits.load(Ordering::Relaxed);
        let outcome = read(stable, &truth, |n| {
            // The guest stands still at the end of the arena until this goes on.
            while n == 10 && shared.counts.arena_waits.load(Ordering::Relaxed) == waits {
                std::thread::yield_now();
            }
        });
        assert_eq!(outcome.wrong, [] as [u64; 0]);
        assert!(outcome.cost.faults >= limit - u64::from(HOST_SLOTS));
        wait_for_writes(&lab.guest, 1);
    }
}

#[test]
fn a_host_writer_without_a_slot_fails_the_capture_and_no_more() {
    let mut lab = Lab::new(ON_ORDER, 1);
    let limit = lab.stabiliser.shared.arena.limit() as usize;
    lab.guest.machine.resume_vcpus().unwrap();
    let union = set(&lab.guest, FIRST, 6000);
    let protect = StabilisePolicy::Protect;
    let (mut stable, truth) = take(&mut lab.stabiliser, &lab.guest, &lab.gate, &union, protect);
    let ram = lab.guest.machine.ram().clone();
    for page in FIRST..FIRST + limit + 1 {
        ram.write(page as u64 * 4096, &[0xee]).unwrap();
    }
    for expected in &truth[..limit] {
        assert_eq!(stable.next_page().unwrap().unwrap().1, expected);
    }
    let lost = stable.next_page().unwrap_err().to_string();
    assert!(
        lost.contains(&format!("page {} was written", FIRST + limit)),
        "{lost}"
    );
    assert!(lost.contains("checkpoint.arena_mib = 8"), "{lost}");
    drop(stable);
    assert_eq!(protected(&lab.guest), [] as [u64; 0]);
    let (stable, truth) = take(&mut lab.stabiliser, &lab.guest, &lab.gate, &union, protect);
    assert_eq!(read(stable, &truth, |_| {}).wrong, [] as [u64; 0]);
}

#[test]
fn without_a_view_all_is_copied_and_counted() {
    let guest = Guest::start(FOR_EVER, 64, "");
    guest.aim(BASE, 100, 4096);
    let ram = guest.machine.ram().clone();
    let mut stabiliser = Stabiliser::new(ram.clone(), None, 1).unwrap();
    assert!(stabiliser.unavailable().unwrap().contains("mapping"));
    guest.machine.resume_vcpus().unwrap();
    // Larger than the arena asked for: nothing else is left. Large enough for two threads, and with holes.
    let mut union = set(&guest, FIRST, 15_000);
    for word in union.words_mut().iter_mut().step_by(3) {
        *word &= 0x00ff_f0f0_1234_5678;
    }
    let gate = Mutex::new(0);
    for policy in [StabilisePolicy::Protect, StabilisePolicy::Auto] {
        wait_for_writes(&guest, 1);
        let (stable, truth) = take(&mut stabiliser, &guest, &gate, &union, policy);
        assert_eq!(stable.mechanism(), Mechanism::Copy);
        let outcome = read(stable, &truth, |_| {});
        assert_eq!(outcome.wrong, [] as [u64; 0]);
        assert_eq!(outcome.cost.stall_us, 0);
    }
    let stats = stabiliser.snapshot();
    assert_eq!((stats.copies, stats.fallbacks), (2, 1));
}

#[test]
fn the_dirty_log_goes_on_beside_it() {
    // What the guest writes to a page that is protected or just released is dirty for the next checkpoint.
    let mut lab = Lab::new(ON_ORDER, ARENA_PAGES);
    let machine = &lab.guest.machine;
    machine.resume_vcpus().unwrap();
    // The first touch of a page, by reading or executing, counts as a write.
    lab.guest.write_once(BASE, 1, 1);
    machine.set_dirty_logging(true).unwrap();
    let mut dirty = PageBitmap::new(machine.ram().page_count());
    let written = |dirty: &PageBitmap| dirty.iter().filter(|&page| is_no_page_table(page)).count();
    for round in 0..4 {
        lab.guest.write_once(BASE, 500, 4096);
        dirty.clear();
        lab.guest.machine.take_dirty(&mut dirty).unwrap();
        assert_eq!(written(&dirty), 501, "round {round}");
        let (stable, truth) = take(
            &mut lab.stabiliser,
            &lab.guest,
            &lab.gate,
            &dirty,
            StabilisePolicy::Protect,
        );
        lab.guest.write_once(BASE, 250, 2 * 4096);
        assert_eq!(read(stable, &truth, |_| {}).wrong, [] as [u64; 0]);
        dirty.clear();
        lab.guest.machine.take_dirty(&mut dirty).unwrap();
        assert_eq!(written(&dirty), 251, "round {round}");
    }
}
