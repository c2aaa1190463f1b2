//! A host that has no more threads to give.

use std::thread;

use super::super::copying::copy_by_two;
use super::*;

const PAGES: usize = 300;

#[test]
fn a_set_is_copied_though_there_is_no_second_thread() {
    let ram = Arc::new(GuestRam::new((PAGES * PAGE_BYTES) as u64, Pages::Small).unwrap());
    let mut set = PageBitmap::new(PAGES);
    let number = |page: usize| [page as u8 ^ (page >> 8) as u8 | 1; PAGE_BYTES];
    let pages: Vec<_> = (0..PAGES).filter(|page| page % 3 != 1).collect();
    for &page in &pages {
        ram.write_page(page, &number(page)).unwrap();
        set.add(page / 64, 1 << (page % 64));
    }
    let shared = Shared::new(ram, None, Arena::new(1).unwrap(), 0);
    let expected: Vec<_> = pages.iter().flat_map(|&page| number(page)).collect();
    // The second needs a stack that no address space has room for.
    for stack_bytes in [64 << 10, 1 << 60] {
        let mut out = vec![0; pages.len() * PAGE_BYTES];
        let other = thread::Builder::new().stack_size(stack_bytes);
        copy_by_two(&shared, &set, Room::of(&mut out), other);
        assert!(out == expected, "{stack_bytes}");
    }
    assert_eq!(shared.counts.alone.load(Ordering::Relaxed), 1);
}
