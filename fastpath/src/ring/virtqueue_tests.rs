//! The queue against an honest and a hostile driver.

use std::ops::RangeInclusive;
use std::sync::{Mutex, Weak};

use proptest::prelude::*;

use super::super::driver_mock::DriverMock;
use super::super::guard::WriteGuard;
use super::super::memory::{Pages, RegionSource};
use super::*;

const BASE: u64 = 0x10000;
const DATA: u64 = 0x40000;

fn pair(size: u16, event_idx: bool) -> (Arc<GuestRam>, DriverMock, Virtqueue) {
    let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
    let driver = DriverMock::new(ram.clone(), BASE, size, event_idx);
    let queue = Virtqueue::new(ram.clone(), driver.queue_state()).unwrap();
    (ram, driver, queue)
}

fn seg(gpa: u64, len: u32) -> Segment {
    Segment { gpa, len }
}

/// What the device says about one descriptor offered raw as head 0.
fn verdict(buffer: Segment, flags: u16, next: u16) -> Result<bool, RingError> {
    let (_, mut driver, mut queue) = pair(8, true);
    driver.write_descriptor(0, buffer, flags, next).unwrap();
    driver.offer_head(0).unwrap();
    queue.pop(&mut Chain::default())
}

#[test]
fn chains_come_back_in_order_over_several_wraps() {
    let (_, mut driver, mut queue) = pair(8, true);
    let mut chain = Chain::default();
    for round in 0..70_000_u32 {
        let head = driver
            .offer(&[seg(DATA, 12), seg(DATA + 64, 100)], &[seg(DATA + 512, 7)])
            .unwrap()
            .unwrap();
        assert!(queue.pop(&mut chain).unwrap());
        assert_eq!(chain.head(), head);
        assert_eq!(chain.readable(), [seg(DATA, 12), seg(DATA + 64, 100)]);
        assert_eq!(chain.writable(), [seg(DATA + 512, 7)]);
        queue.complete(head, round).unwrap();
        queue.publish().unwrap();
        let used = driver.take_used().unwrap().unwrap();
        assert_eq!((used.head, used.written), (head, round));
    }
    assert!(!queue.pop(&mut chain).unwrap());
}

#[test]
fn an_undone_pop_gives_the_same_chain_again() {
    let (_, mut driver, mut queue) = pair(8, true);
    driver.offer(&[], &[seg(DATA, 10)]).unwrap();
    let mut chain = Chain::default();
    assert!(queue.pop(&mut chain).unwrap());
    queue.undo_pop();
    assert!(queue.has_available().unwrap());
    assert!(queue.pop(&mut chain).unwrap());
    assert!(!queue.pop(&mut chain).unwrap());
}

#[test]
fn calls_come_only_when_used_event_is_passed() {
    let (_, mut driver, mut queue) = pair(8, true);
    let mut chain = Chain::default();
    let mut use_one = |driver: &mut DriverMock| {
        driver.offer(&[seg(DATA, 1)], &[]).unwrap();
        assert!(queue.pop(&mut chain).unwrap());
        queue.complete(chain.head(), 0).unwrap();
        let call = queue.publish().unwrap();
        driver.take_used().unwrap().unwrap();
        call
    };
    driver.set_used_event(2).unwrap();
    assert!(!use_one(&mut driver));
    assert!(!use_one(&mut driver));
    assert!(use_one(&mut driver));
    assert!(!use_one(&mut driver));
}

#[test]
fn notifications_are_wanted_only_while_enabled() {
    let (_, mut driver, mut queue) = pair(8, true);
    let mut chain = Chain::default();
    assert!(!queue.enable_notifications().unwrap());
    assert_eq!(driver.avail_event().unwrap(), 0);
    driver.offer(&[seg(DATA, 1)], &[]).unwrap();
    assert!(queue.pop(&mut chain).unwrap());
    queue.disable_notifications().unwrap();
    assert_eq!(driver.avail_event().unwrap(), 0, "stays behind");
    driver.offer(&[seg(DATA, 1)], &[]).unwrap();
    assert!(
        queue.enable_notifications().unwrap(),
        "came before the guest could see the wish"
    );
    assert_eq!(driver.avail_event().unwrap(), 1);
}

#[test]
fn flags_do_the_same_without_event_idx() {
    let (_, mut driver, mut queue) = pair(8, false);
    let mut chain = Chain::default();
    queue.disable_notifications().unwrap();
    assert_eq!(driver.used_flags().unwrap(), 1);
    queue.enable_notifications().unwrap();
    assert_eq!(driver.used_flags().unwrap(), 0);
    driver.offer(&[seg(DATA, 1)], &[]).unwrap();
    assert!(queue.pop(&mut chain).unwrap());
    queue.complete(chain.head(), 0).unwrap();
    assert!(queue.publish().unwrap());
    assert!(!queue.publish().unwrap(), "once per batch");
}

#[test]
fn a_moved_queue_goes_on_where_it_was() {
    let (ram, mut driver, mut queue) = pair(8, true);
    let mut chain = Chain::default();
    for _ in 0..5 {
        driver.offer(&[seg(DATA, 1)], &[]).unwrap();
        queue.pop(&mut chain).unwrap();
        queue.complete(chain.head(), 0).unwrap();
        queue.publish().unwrap();
        driver.take_used().unwrap().unwrap();
    }
    driver.offer(&[seg(DATA, 9)], &[]).unwrap();
    let mut moved = Virtqueue::new(ram, queue.state()).unwrap();
    assert!(moved.pop(&mut chain).unwrap());
    assert_eq!(chain.readable(), [seg(DATA, 9)]);
}

#[test]
fn bad_layouts_are_refused() {
    let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
    let good = DriverMock::new(ram.clone(), BASE, 8, true).queue_state();
    for size in [0, 3, 257, 512, 32768] {
        let bad = QueueState { size, ..good };
        assert!(matches!(
            Virtqueue::new(ram.clone(), bad),
            Err(RingError::BadSize(_))
        ));
    }
    for bad in [
        QueueState {
            descriptors: 8,
            ..good
        },
        QueueState {
            descriptors: (1 << 20) - 16,
            ..good
        },
        QueueState { avail: 1, ..good },
        QueueState {
            avail: u64::MAX - 1,
            ..good
        },
        QueueState { used: 2, ..good },
        QueueState {
            used: 0xd000_0000,
            ..good
        },
    ] {
        assert!(matches!(
            Virtqueue::new(ram.clone(), bad),
            Err(RingError::BadLayout { .. })
        ));
    }
}

#[test]
fn a_region_at_an_odd_address_gives_no_misaligned_ring() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let source = RegionSource {
        gpa: 8,
        bytes: 1 << 20,
        file,
        offset: 0,
    };
    let ram = Arc::new(GuestRam::from_regions(vec![source]).unwrap());
    let state = DriverMock::new(ram.clone(), BASE, 8, true).queue_state();
    assert!(matches!(
        Virtqueue::new(ram, state),
        Err(RingError::BadLayout { .. })
    ));
}

#[test]
fn hostile_descriptors_are_named() {
    assert!(matches!(verdict(seg(DATA, 4), 1, 0), Err(RingError::Loop)));
    assert!(matches!(
        verdict(seg(DATA, 4), 1, 8),
        Err(RingError::BadDescriptor { .. })
    ));
    assert!(matches!(
        verdict(seg(DATA, 0), 0, 0),
        Err(RingError::ZeroLength)
    ));
    assert!(matches!(
        verdict(seg(1 << 20, 1), 0, 0),
        Err(RingError::OutsideRam { .. })
    ));
    assert!(matches!(
        verdict(seg(u64::MAX, 2), 0, 0),
        Err(RingError::OutsideRam { .. })
    ));
    assert!(matches!(
        verdict(seg(0, u32::MAX), 0, 0),
        Err(RingError::OutsideRam { .. })
    ));
    for len in [0, 8, 17, 16 * 9, u32::MAX] {
        assert!(matches!(
            verdict(seg(DATA, len), 4, 0),
            Err(RingError::BadIndirect(_))
        ));
    }
    assert!(matches!(
        verdict(seg((1 << 20) - 8, 16), 4, 0),
        Err(RingError::OutsideRam { .. })
    ));
    assert!(matches!(
        verdict(seg(DATA, 16), 5, 0),
        Err(RingError::BadIndirect(_))
    ));
}

#[test]
fn indirect_tables_work_and_do_not_nest() {
    let (ram, mut driver, mut queue) = pair(8, true);
    let mut chain = Chain::default();
    let mut table = [0; 16];
    table[..8].copy_from_slice(&(DATA + 0x1000).to_le_bytes());
    table[8] = 33;
    ram.write(DATA, &table).unwrap();
    driver.write_descriptor(0, seg(DATA, 16), 4, 0).unwrap();
    driver.offer_head(0).unwrap();
    assert!(queue.pop(&mut chain).unwrap());
    assert_eq!(chain.readable(), [seg(DATA + 0x1000, 33)]);

    table[12] = 4;
    ram.write(DATA, &table).unwrap();
    driver.offer_head(0).unwrap();
    assert!(matches!(
        queue.pop(&mut chain),
        Err(RingError::BadIndirect(_))
    ));
}

#[test]
fn an_indirect_table_that_was_not_negotiated_is_named() {
    let (ram, mut driver, _) = pair(8, true);
    let state = QueueState {
        indirect: false,
        ..driver.queue_state()
    };
    let mut queue = Virtqueue::new(ram, state).unwrap();
    driver.write_descriptor(0, seg(DATA, 16), 4, 0).unwrap();
    driver.offer_head(0).unwrap();
    assert!(matches!(
        queue.pop(&mut Chain::default()),
        Err(RingError::BadIndirect(16))
    ));
}

#[test]
fn only_a_lone_buffer_to_read_is_shown_ahead() {
    let (_, mut driver, mut queue) = pair(8, true);
    let lone = seg(DATA, 100);
    driver.offer(&[lone], &[]).unwrap();
    driver.offer(&[lone, seg(DATA + 512, 7)], &[]).unwrap();
    driver.offer(&[], &[lone]).unwrap();
    assert!(queue.has_available().unwrap());
    let shown = [0, 1, 2, 3].map(|n| queue.peek_lone(n).map(|(_, segment)| segment));
    assert_eq!(shown, [Some(lone), None, None, None]);
}

/// What a used ring of two entries held whenever the guard was asked.
#[derive(Debug)]
struct Asked {
    ram: Weak<GuestRam>,
    used: u64,
    held: Mutex<Vec<[u8; 22]>>,
}

impl WriteGuard for Asked {
    fn before_write(&self, pages: RangeInclusive<usize>) {
        let page = (self.used / 4096) as usize;
        assert_eq!(pages, page..=page);
        let ram = self.ram.upgrade().unwrap();
        self.held.lock().unwrap().push(ring_at(&ram, self.used));
    }
}

fn ring_at(ram: &GuestRam, used: u64) -> [u8; 22] {
    let mut held = [0; 22];
    ram.read(used, &mut held).unwrap();
    held
}

#[test]
fn rule_15_the_guard_is_asked_before_each_write_to_the_used_ring() {
    for event_idx in [true, false] {
        let (ram, mut driver, mut queue) = pair(2, event_idx);
        let used = queue.state().used;
        driver.offer(&[], &[seg(DATA, 9)]).unwrap();
        assert!(queue.pop(&mut Chain::default()).unwrap());
        let asked = Arc::new(Asked {
            ram: Arc::downgrade(&ram),
            used,
            held: Mutex::default(),
        });
        let guard: Arc<dyn WriteGuard> = asked.clone();
        ram.set_guard(Arc::downgrade(&guard));
        ram.arm_guard(true);
        for n in 0..3 {
            let before = ring_at(&ram, used);
            match (n, event_idx) {
                (0, _) => queue.complete(0, 9).unwrap(),
                (1, _) => assert!(queue.publish().unwrap()),
                (_, true) => assert!(!queue.enable_notifications().unwrap()),
                (_, false) => queue.disable_notifications().unwrap(),
            }
            assert_eq!(
                std::mem::take(&mut *asked.held.lock().unwrap()),
                [before],
                "write {n}"
            );
            assert_ne!(ring_at(&ram, used), before, "write {n}");
        }
    }
}

#[test]
fn a_jumping_index_and_a_reversed_chain_are_named() {
    let (_, mut driver, mut queue) = pair(8, true);
    driver.set_avail_idx(9).unwrap();
    assert!(matches!(
        queue.has_available(),
        Err(RingError::AvailJump { .. })
    ));
    assert!(matches!(
        queue.enable_notifications(),
        Err(RingError::AvailJump { .. })
    ));

    let (_, mut driver, mut queue) = pair(8, true);
    driver.write_descriptor(0, seg(DATA, 4), 3, 1).unwrap();
    driver.write_descriptor(1, seg(DATA, 4), 0, 0).unwrap();
    driver.offer_head(0).unwrap();
    assert!(matches!(
        queue.pop(&mut Chain::default()),
        Err(RingError::Order)
    ));
}

proptest! {
    /// Whatever is in the rings, the device neither panics nor leaves RAM nor runs for ever.
    #[test]
    fn any_ring_contents_end_in_an_answer(
        table in proptest::collection::vec(any::<u8>(), 16 * 16),
        near in proptest::collection::vec((0u64..16, 0u32..64, 0u16..8, 0u16..17), 16),
        mix in any::<u16>(),
        heads in proptest::collection::vec(0u16..18, 16),
        jump in 0u16..20,
    ) {
        let (ram, mut driver, mut queue) = pair(16, true);
        ram.write(BASE, &table).unwrap();
        for (at, (page, len, flags, next)) in near.into_iter().enumerate() {
            if mix & (1 << at) != 0 {
                let buffer = seg(BASE + page * 16, len);
                driver.write_descriptor(at as u16, buffer, flags, next).unwrap();
            }
        }
        for head in heads {
            driver.offer_head(head).unwrap();
        }
        driver.set_avail_idx(jump).unwrap();
        let mut chain = Chain::default();
        for _ in 0..32 {
            match queue.pop(&mut chain) {
                Ok(true) => {
                    for part in chain.readable().iter().chain(chain.writable()) {
                        prop_assert!(ram.contains(part.gpa, part.len.into()) && part.len > 0);
                    }
                    prop_assert!(chain.readable().len() + chain.writable().len() <= 16);
                    queue.complete(chain.head(), 0).unwrap();
                }
                Ok(false) | Err(_) => break,
            }
        }
        queue.publish().unwrap();
    }
}
