use std::ops::RangeInclusive;
use std::sync::Weak;

use super::super::guard::WriteGuard;
use super::mapping::memory_file;
use super::*;

fn ram() -> GuestRam {
    GuestRam::new(1 << 20, Pages::Small).unwrap()
}

#[test]
fn ranges_are_checked_to_the_last_byte() {
    let ram = ram();
    assert!(ram.write((1 << 20) - 4, &[1, 2, 3, 4]).is_ok());
    assert!(ram.write((1 << 20) - 3, &[1, 2, 3, 4]).is_err());
    assert!(ram.read(u64::MAX - 1, &mut [0; 4]).is_err());
    assert!(ram.load_u16(1 << 20, Ordering::Relaxed).is_err());
    assert!(ram.load_u16(1, Ordering::Relaxed).is_err());
    assert!(ram.contains(0, 1 << 20) && !ram.contains(1, 1 << 20));
    assert!(!ram.contains(u64::MAX, 2));
}

#[test]
fn host_writes_are_marked_only_while_tracking() {
    let ram = ram();
    let taken = || taken(&ram);
    ram.write(0x3000, &[1]).unwrap();
    assert_eq!(taken(), []);

    ram.set_tracking(true);
    ram.write(0x4fff, &[1, 2]).unwrap();
    ram.store_u16(0x9000, 7, Ordering::Release).unwrap();
    assert_eq!(taken(), [(0, 1 << 4 | 1 << 5 | 1 << 9)]);
    assert_eq!(taken(), [], "taken once");
    ram.write(0x4000, &[1]).unwrap();
    ram.set_tracking(false);
    ram.set_tracking(true);
    assert_eq!(taken(), [], "off and on again forgets");
    ram.write(0x4000, &[1]).unwrap();
    assert_eq!(taken(), [(0, 1 << 4)]);
}

fn taken(ram: &GuestRam) -> Vec<(usize, u64)> {
    let mut taken = Vec::new();
    ram.take_host_dirty(|at, pages| taken.push((at, pages)));
    taken
}

#[test]
fn host_writes_are_found_in_any_block_of_a_large_memory() {
    // Only addresses: pages that nobody writes take no memory.
    let ram = GuestRam::new(2 << 30, Pages::Small).unwrap();
    ram.set_tracking(true);
    let pages = [
        0,
        63,
        64,
        64 * 64 - 1,
        64 * 64,
        64 * 64 * 64 + 7,
        (2 << 18) - 1,
    ];
    for _ in 0..3 {
        for page in pages {
            ram.write((page * PAGE_BYTES) as u64, &[1]).unwrap();
        }
        let mut marks: Vec<(usize, u64)> = Vec::new();
        for page in pages {
            match marks.last_mut() {
                Some((at, word)) if *at == page / 64 => *word |= 1 << (page % 64),
                _ => marks.push((page / 64, 1 << (page % 64))),
            }
        }
        assert_eq!(taken(&ram), marks);
        assert_eq!(taken(&ram), []);
    }
}

#[derive(Debug, Default)]
struct Asked(
    std::sync::Mutex<Vec<(RangeInclusive<usize>, u8)>>,
    Weak<GuestRam>,
);

impl WriteGuard for Asked {
    fn before_write(&self, pages: RangeInclusive<usize>) {
        let mut byte = [0];
        let ram = self.1.upgrade().unwrap();
        ram.read(*pages.start() as u64 * 4096, &mut byte).unwrap();
        self.0.lock().unwrap().push((pages, byte[0]));
    }
}

#[test]
fn the_guard_is_asked_before_each_write_while_it_is_armed() {
    let ram = Arc::new(ram());
    let asked = Arc::new(Asked(Default::default(), Arc::downgrade(&ram)));
    let guard: Arc<dyn WriteGuard> = asked.clone();
    ram.set_guard(Arc::downgrade(&guard));
    ram.write(0x3000, &[1]).unwrap();
    ram.arm_guard(true);
    ram.write(0x3000, &[2; 4097]).unwrap();
    ram.store_u16(0x3000, 0x0303, Ordering::Release).unwrap();
    ram.write(0x3000, &[]).unwrap();
    assert!(ram.write(1 << 20, &[4]).is_err());
    ram.arm_guard(false);
    ram.write(0x3000, &[5]).unwrap();
    assert_eq!(*asked.0.lock().unwrap(), [(3..=4, 1), (3..=3, 2)]);
    ram.arm_guard(true);
    drop((guard, asked));
    ram.write(0x3000, &[6]).unwrap();
}

#[test]
fn pages_go_out_and_in() {
    let ram = ram();
    let page = [0x5a; PAGE_BYTES];
    ram.write_page(255, &page).unwrap();
    let mut back = [0; PAGE_BYTES];
    ram.copy_page_out(255, &mut back).unwrap();
    assert_eq!(page, back);
    assert!(ram.write_page(256, &page).is_err());
}

#[test]
fn odd_sizes_are_refused() {
    assert!(matches!(
        GuestRam::new(0, Pages::Small),
        Err(MemoryError::BadSize(0))
    ));
    assert!(GuestRam::new(4097, Pages::Small).is_err());
    assert!(GuestRam::new(1 << 62, Pages::Small).is_err());
}

#[test]
fn regions_are_one_memory() {
    let source = |gpa, bytes, offset| RegionSource {
        gpa,
        bytes,
        file: memory_file(1 << 20, 0).unwrap(),
        offset,
    };
    let ram = GuestRam::from_regions(vec![
        source(0x10_0000, 0x8000, 0x4000),
        source(0, 0x4000, 0),
    ])
    .unwrap();
    assert_eq!((ram.bytes(), ram.page_count()), (0xc000, 12));
    assert!(ram.contains(0x3fff, 1) && ram.contains(0x10_7ffe, 2));
    assert!(!ram.contains(0x3fff, 2) && !ram.contains(0x10_7fff, 2) && !ram.contains(0x8000, 1));
    ram.set_tracking(true);
    ram.write(0x10_1000, b"high").unwrap();
    ram.write(0x3ffc, b"low!").unwrap();
    assert!(ram.write(0x3ffd, b"over").is_err());
    assert_eq!(taken(&ram), [(0, 1 << 3 | 1 << 5)]);
    let mut page = [0; PAGE_BYTES];
    ram.copy_page_out(5, &mut page).unwrap();
    assert_eq!(&page[..4], b"high");
    assert!(ram.equals(0x3ffc, b"low!").unwrap() && !ram.equals(0x3ffc, b"low?").unwrap());
    assert!(ram.copy_page_out(12, &mut page).is_err());
    let overlap = GuestRam::from_regions(vec![source(0, 0x4000, 0), source(0x3000, 0x1000, 0)]);
    assert!(matches!(overlap, Err(MemoryError::Overlap(0x3000))));
    assert!(GuestRam::from_regions(Vec::new()).is_err());
}

#[test]
fn ram_leaves_the_register_windows_free() {
    let ram = GuestRam::new(LOW_RAM_END + (1 << 20), Pages::Small).unwrap();
    let high = HIGH_RAM_START..HIGH_RAM_START + (1 << 20);
    assert!(ram.ranges().eq([0..LOW_RAM_END, high]) && ram.is_in_a_row());
    assert!(!ram.contains(LOW_RAM_END, 1) && !ram.contains(LOW_RAM_END - 1, 2));
    ram.write(HIGH_RAM_START + 0x3000, b"high").unwrap();
    let mut page = [0; PAGE_BYTES];
    let number = (LOW_RAM_END >> 12) as usize + 3;
    ram.copy_page_out(number, &mut page).unwrap();
    assert_eq!(&page[..4], b"high");
    ram.write(LOW_RAM_END - 4, b"low!").unwrap();
    ram.write(HIGH_RAM_START, b"next").unwrap();
    let mut both = vec![0; 2 * PAGE_BYTES];
    ram.copy_pages_out(number - 4, &mut both).unwrap();
    assert_eq!(&both[PAGE_BYTES - 4..PAGE_BYTES + 4], b"low!next");
    assert!(ram.copy_pages_out(ram.page_count() - 1, &mut both).is_err());
}

#[test]
fn huge_pages_fall_back() {
    assert!(GuestRam::new(4 << 20, Pages::HugeIfReserved).is_ok());
}

#[test]
fn regions_that_are_more_than_can_be_counted_are_refused() {
    let sources = [0, 1 << 63].map(|gpa| RegionSource {
        gpa,
        bytes: 1 << 63,
        file: tempfile::tempfile().unwrap(),
        offset: 0,
    });
    let refused = GuestRam::from_regions(sources.into()).unwrap_err();
    assert!(matches!(refused, MemoryError::BadSize(_)), "{refused}");
}
