//! Both trackers on the real KVM, with a guest that writes what it is told.

use super::choice::RING_FROM_BYTES;
use super::*;
use crate::checkpoint::guests::{Guest, ON_ORDER, ORDERS, ORDERS_PAGE, is_no_page_table};
use crate::checkpoint::pages::PageBitmap;

const BASE: u64 = 0x40_0000;
const BITMAP: &str = "[checkpoint]\ndirty = \"bitmap\"";
const RING: &str = "[checkpoint]\ndirty = \"ring\"";
const SMALL_RING: &str = "[checkpoint]\ndirty = \"ring\"\ndirty_ring_entries = 1024";

fn take(guest: &Guest) -> Vec<u64> {
    let mut bitmap = PageBitmap::new(guest.machine.ram().page_count());
    guest.machine.take_dirty(&mut bitmap).unwrap();
    written(&bitmap)
}

fn written(bitmap: &PageBitmap) -> Vec<u64> {
    bitmap
        .iter()
        .filter(|&page| is_no_page_table(page))
        .collect()
}

fn pages(gpa: u64, count: u64, stride: u64) -> Vec<u64> {
    (0..count).map(|n| (gpa + n * stride) / 4096).collect()
}

fn running(more: &str) -> Guest {
    let guest = Guest::start(ON_ORDER, 64, more);
    guest.machine.resume_vcpus().unwrap();
    // KVM maps a page writable, and so counts it as written, when the guest touches it for the first time.
    guest.write_once(BASE, 1, 1);
    guest
}

/// Equal, or both differences in short.
fn same(found: &[u64], expected: &[u64], what: &str) {
    let lacks = |of: &[u64], page: &u64| of.binary_search(page).is_err();
    let missing: Vec<_> = expected
        .iter()
        .filter(|p| lacks(found, p))
        .take(9)
        .collect();
    let more: Vec<_> = found
        .iter()
        .filter(|p| lacks(expected, p))
        .take(9)
        .collect();
    assert!(
        missing.is_empty() && more.is_empty(),
        "{what}: missing {missing:?}, too many {more:?}"
    );
}

#[test]
fn all_pages_written_are_reported_and_no_others() {
    for more in [BITMAP, RING] {
        let guest = running(more);
        guest.write_once(BASE, 500, 4096);
        guest.machine.set_dirty_logging(true).unwrap();
        assert_eq!(take(&guest), [] as [u64; 0], "{more}: the log starts empty");
        // Every third page, then one page at the end of RAM's first half, then the host.
        guest.write_once(BASE, 300, 3 * 4096);
        let mut expected = pages(BASE, 300, 3 * 4096);
        guest.write_once(32 << 20, 1, 1);
        guest.machine.ram().write((60 << 20) - 1, &[1, 2]).unwrap();
        expected.extend([ORDERS_PAGE, 8192, 15359, 15360]);
        expected.sort_unstable();
        same(&take(&guest), &expected, more);
        assert_eq!(take(&guest), [] as [u64; 0], "{more}: taken once");
    }
}

#[test]
fn a_page_written_again_comes_again() {
    for more in [BITMAP, RING] {
        let guest = running(more);
        guest.machine.set_dirty_logging(true).unwrap();
        for round in 0..20 {
            guest.write_once(BASE + (round % 3) * 4096, 5, 4096);
            let mut expected = pages(BASE + (round % 3) * 4096, 5, 4096);
            expected.insert(0, ORDERS_PAGE);
            same(&take(&guest), &expected, &format!("{more}, round {round}"));
        }
    }
}

#[test]
fn nothing_is_logged_while_it_is_off() {
    for more in [BITMAP, RING] {
        let guest = running(more);
        guest.machine.set_dirty_logging(true).unwrap();
        guest.write_once(BASE, 100, 4096);
        guest.machine.set_dirty_logging(false).unwrap();
        guest.write_once(BASE, 100, 4096);
        let mut bitmap = PageBitmap::new(guest.machine.ram().page_count());
        let off = guest.machine.take_dirty(&mut bitmap).unwrap_err();
        assert!(off.to_string().contains("switched on first"), "{off}");
        guest.machine.set_dirty_logging(true).unwrap();
        assert_eq!(take(&guest), [] as [u64; 0], "{more}");
        guest.write_once(BASE, 2, 4096);
        assert_eq!(take(&guest).len(), 3, "{more}");
    }
}

#[test]
fn auto_is_the_log_that_makes_the_shorter_pause_with_so_much_memory() {
    // Memory that no guest touches takes none.
    let mib = RING_FROM_BYTES >> 20;
    for (ram_mib, expected) in [
        (mib - 1, DirtyMechanism::Bitmap),
        (mib, DirtyMechanism::Ring),
    ] {
        let guest = Guest::start(ON_ORDER, ram_mib, "");
        let machine = &guest.machine;
        assert_eq!(machine.dirty_stats().mechanism, expected, "{ram_mib} MiB");
        machine.resume_vcpus().unwrap();
        guest.write_once(BASE, 1, 1);
        machine.set_dirty_logging(true).unwrap();
        take(&guest);
        guest.write_once(BASE, 3, 4096);
        assert_eq!(take(&guest).len(), 4, "{ram_mib} MiB");
    }
}

#[test]
fn a_ring_that_kvm_refuses_is_the_bitmap_unless_it_was_asked_for_by_name() {
    use crate::machine::Vm;
    use colo_fastpath::ring::Pages;

    let ram = Arc::new(GuestRam::new(RING_FROM_BYTES, Pages::Small).unwrap());
    let with = |choice| {
        // KVM takes no such number, whatever it says of its rings.
        let ring_entries = 3;
        Vm::new(
            ram.clone(),
            Some(DirtySettings {
                choice,
                ring_entries,
            }),
        )
    };
    let auto = with(DirtyChoice::Auto).unwrap();
    assert_ne!(auto.dirty().snapshot().mechanism, DirtyMechanism::Ring);
    let refused = with(DirtyChoice::Ring).unwrap_err().to_string();
    assert!(
        refused.contains("checkpoint.dirty_ring_entries"),
        "{refused}"
    );
}

#[test]
fn a_ring_that_overflows_loses_nothing() {
    let guest = running(SMALL_RING);
    guest.machine.set_dirty_logging(true).unwrap();
    for round in 1..4 {
        guest.write_once(BASE, 6000, 4096);
        let mut expected = pages(BASE, 6000, 4096);
        expected.insert(0, ORDERS_PAGE);
        same(&take(&guest), &expected, "overflow");
        let stats = guest.machine.dirty_stats();
        assert_eq!(stats.mechanism, DirtyMechanism::Ring);
        assert!(stats.ring_full >= 5 * round, "{stats:?}");
        assert_eq!(
            stats.ring_full,
            guest.machine.exits()[0].dirty_ring_full,
            "each time in its vCPU's thread"
        );
    }
}

#[test]
fn what_is_written_between_two_readings_is_in_one_of_them() {
    for more in [BITMAP, SMALL_RING] {
        let guest = running(more);
        guest.machine.set_dirty_logging(true).unwrap();
        let mut seen = PageBitmap::new(guest.machine.ram().page_count());
        let order = guest.word(ORDERS) + 1;
        guest.aim(BASE, 10_000, 4096);
        guest.set(0, order);
        let mut readings = 0;
        while guest.word(ORDERS + 8) != order {
            guest.machine.take_dirty(&mut seen).unwrap();
            readings += 1;
        }
        guest.machine.take_dirty(&mut seen).unwrap();
        let mut expected = pages(BASE, 10_000, 4096);
        expected.insert(0, ORDERS_PAGE);
        assert!(readings > 0);
        same(&written(&seen), &expected, more);
    }
}

#[test]
fn a_copy_made_after_a_reading_has_all_that_was_written_before() {
    // A model of live rounds: the union of all copies must be the guest's memory at the end.
    for more in [BITMAP, SMALL_RING] {
        let guest = running(more);
        let ram = guest.machine.ram().clone();
        guest.machine.set_dirty_logging(true).unwrap();
        let mut copy = vec![[0; 4096]; ram.page_count()];
        for (number, page) in copy.iter_mut().enumerate() {
            ram.copy_page_out(number, page).unwrap();
        }
        for round in 10..40_u64 {
            guest.aim(BASE + (round % 7) * 4096, 2000, 4096);
            guest.set(0, round + 1);
            // While the guest writes, and once when it has stopped.
            let last = round == 39;
            if last {
                while guest.word(ORDERS + 8) != round + 1 {
                    std::thread::yield_now();
                }
                guest.machine.pause_vcpus().unwrap();
            }
            for number in take(&guest) {
                let number = number as usize;
                ram.copy_page_out(number, &mut copy[number]).unwrap();
            }
        }
        let mut page = [0; 4096];
        for (number, copied) in copy.iter().enumerate() {
            ram.copy_page_out(number, &mut page).unwrap();
            assert!(page == *copied, "{more}: page {number} is old");
        }
    }
}

#[test]
fn memory_above_the_register_windows_is_tracked_and_kept_like_the_rest() {
    use crate::checkpoint::stabilise::{StabilisePolicy, Stabiliser};
    use colo_fastpath::ring::{HIGH_RAM_START, LOW_RAM_END};

    let first_high = LOW_RAM_END / 4096;
    for more in [BITMAP, RING] {
        let guest = Guest::start(ON_ORDER, (LOW_RAM_END >> 20) + 8, more);
        let machine = &guest.machine;
        machine.resume_vcpus().unwrap();
        guest.write_once(BASE, 1, 1);
        guest.write_once(HIGH_RAM_START, 100, 4096);
        machine.set_dirty_logging(true).unwrap();
        take(&guest);
        guest.write_once(HIGH_RAM_START, 100, 4096);
        machine.ram().write(LOW_RAM_END - 2, &[7, 8]).unwrap();
        let mut expected = vec![ORDERS_PAGE, first_high - 1];
        expected.extend(first_high..first_high + 100);
        let mut set = PageBitmap::new(machine.ram().page_count());
        machine.take_dirty(&mut set).unwrap();
        same(&written(&set), &expected, more);

        let view = machine.guest_view().cloned();
        let mut stabiliser = Stabiliser::new(machine.ram().clone(), view, 4096).unwrap();
        for policy in [StabilisePolicy::Copy, StabilisePolicy::Protect] {
            machine.pause_vcpus().unwrap();
            let mut kept = stabiliser.take(&set, policy).unwrap();
            machine.resume_vcpus().unwrap();
            let before = guest.word(HIGH_RAM_START + 99 * 4096);
            guest.write_once(HIGH_RAM_START, 100, 4096);
            let mut last = (0, [0; 8]);
            while let Some((number, page)) = kept.next_page().unwrap() {
                let word: &[u8; 8] = page.first_chunk().unwrap();
                last = (number, *word);
            }
            assert_eq!(last, (first_high + 99, before.to_le_bytes()), "{policy:?}");
            assert_eq!(guest.word(HIGH_RAM_START + 99 * 4096), before + 1);
        }
    }
}
