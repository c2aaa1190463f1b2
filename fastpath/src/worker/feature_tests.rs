//! Mergeable buffers and partial checksums, with mock drivers good and bad.

use std::sync::Arc;

use colo_compare::testing::{Side, udp};
use colo_compare::{Frames, HEADER_MAX};
use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::port::{Delivery, GuestPort, Stays};
use crate::frame::{CopyCause, FramePool};
use crate::net_offer::NetOffer;
use crate::ring::driver_mock::DriverMock;
use crate::ring::{GuestRam, Pages, QueueState, Segment};
use crate::stats::WorkerStats;
use crate::vhost_user::GuestRings;

const DATA: u64 = 0x20000;
/// Where UDP begins in a frame over IPv4, and where its checksum is in it.
const UDP_AT: u16 = 34;
const UDP_CHECKSUM: u16 = 6;

struct Bench {
    ram: Arc<GuestRam>,
    guest_rx: DriverMock,
    guest_tx: DriverMock,
    port: GuestPort,
    frames: FramePool,
    stats: Arc<WorkerStats>,
}

fn bench(features: u64) -> Bench {
    let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
    let guest_rx = DriverMock::new(ram.clone(), 0x4000, 16, true);
    let guest_tx = DriverMock::new(ram.clone(), 0x8000, 16, true);
    let stats = Arc::new(WorkerStats::default());
    let mut port = GuestPort::new(None, stats.clone());
    port.set_frame_max(1522);
    let queue = |driver: &DriverMock| QueueState {
        device_features: features,
        ..driver.queue_state()
    };
    port.attach(GuestRings {
        ram: ram.clone(),
        queues: [queue(&guest_rx), queue(&guest_tx)],
        kicks: [None, None],
        calls: [None, None],
        errors: [None, None],
    });
    let mut frames = FramePool::new(8, 2048);
    frames.set_guest(ram.clone());
    Bench {
        ram,
        guest_rx,
        guest_tx,
        port,
        frames,
        stats,
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 256) as u8).collect()
}

impl Bench {
    /// A receive buffer of each length, side by side.
    fn offer_room(&mut self, lengths: &[u32]) {
        let mut gpa = DATA;
        for &len in lengths {
            self.guest_rx
                .offer(&[], &[Segment { gpa, len }])
                .unwrap()
                .unwrap();
            gpa += u64::from(len);
        }
    }

    /// What came: header and frame, and the bytes in each buffer.
    fn received(&mut self) -> (Vec<u8>, Vec<u32>) {
        self.port.flush();
        let mut written = Vec::new();
        while let Some(used) = self.guest_rx.take_used().unwrap() {
            written.push(used.written);
        }
        let mut bytes = vec![0; written.iter().sum::<u32>() as usize];
        self.ram.read(DATA, &mut bytes).unwrap();
        (bytes, written)
    }

    /// Sends a frame with a checksum to be completed, in pieces of these lengths, the last one endless.
    fn send(&mut self, flags: [u8; 2], start: u16, offset: u16, frame: &[u8], cuts: &[usize]) {
        let mut header = [0; 12];
        header[..2].copy_from_slice(&flags);
        header[6..8].copy_from_slice(&start.to_le_bytes());
        header[8..10].copy_from_slice(&offset.to_le_bytes());
        let bytes = [&header[..], frame].concat();
        self.ram.write(DATA, &bytes).unwrap();
        let mut segments = Vec::new();
        let mut at = 0;
        for cut in cuts.iter().copied().chain([usize::MAX]) {
            let len = cut.min(bytes.len() - at);
            let gpa = DATA + at as u64;
            segments.push(Segment {
                gpa,
                len: len as u32,
            });
            at += len;
            if at == bytes.len() {
                break;
            }
        }
        self.guest_tx.offer(&segments, &[]).unwrap().unwrap();
    }

    fn taken(&mut self, stays: Stays) -> Option<Vec<u8>> {
        let token = self.port.take(&mut self.frames, 1522, stays)?;
        let bytes = self.frames.bytes(&token).to_vec();
        self.frames.release(token);
        Some(bytes)
    }

    /// The device has given everything back.
    fn returns_all(&mut self) -> bool {
        let mut returned = Vec::new();
        self.frames.take_returned(&mut returned);
        self.port.complete(&returned);
        self.port.flush();
        let mut any = false;
        while self.guest_tx.take_used().unwrap().is_some() {
            any = true;
        }
        any
    }
}

/// A datagram, and the same with only the pseudo header in its checksum.
fn partial(payload: usize) -> (Vec<u8>, Vec<u8>) {
    let whole = udp(Side::V4, false, 53, 40_000, &pattern(payload));
    let mut sum: u32 = 17 + (8 + payload as u32);
    for word in whole[26..34].chunks(2) {
        sum += u32::from(u16::from_be_bytes([word[0], word[1]]));
    }
    let sum = (sum & 0xffff) + (sum >> 16);
    let mut partial = whole.clone();
    partial[40..42].copy_from_slice(&(sum as u16).to_be_bytes());
    (whole, partial)
}

#[test]
fn a_frame_is_spread_over_buffers_that_appear_together() {
    let mut bench = bench(NetOffer::MERGEABLE);
    let frame = pattern(250);
    bench.offer_room(&[100, 100, 100, 100]);
    assert_eq!(bench.port.deliver(&frame), Delivery::Done);
    assert!(
        bench.guest_rx.take_used().unwrap().is_none(),
        "not before the flush"
    );
    let (bytes, written) = bench.received();
    assert_eq!(written, [100, 100, 62]);
    assert_eq!(bytes[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
    assert_eq!(bytes[12..], frame);
    assert_eq!(bench.stats.guest_rx_frames.get(), 1);
}

#[test]
fn too_few_buffers_are_left_alone_until_there_are_more() {
    let mut bench = bench(NetOffer::MERGEABLE);
    let frame = pattern(1000);
    bench.offer_room(&[512]);
    assert!(!bench.port.has_room());
    assert_eq!(bench.port.deliver(&frame), Delivery::NoRoom);
    // Asked to ring for more than that one.
    assert!(
        bench.port.sleep_mode(true),
        "nobody rings for a port without lines"
    );
    assert_eq!(bench.guest_rx.avail_event().unwrap(), 1);
    let more = Segment {
        gpa: DATA + 512,
        len: 2000,
    };
    bench.guest_rx.offer(&[], &[more]).unwrap().unwrap();
    assert!(bench.port.has_room());
    assert_eq!(bench.port.deliver(&frame), Delivery::Done);
    let (bytes, written) = bench.received();
    assert_eq!(written, [512, 500]);
    assert_eq!((bytes[10], &bytes[12..]), (2, &frame[..]));
}

#[test]
fn a_queue_that_can_never_hold_a_frame_loses_it_and_counts_it() {
    let mut bench = bench(NetOffer::MERGEABLE);
    bench.offer_room(&[20; 16]);
    assert!(bench.port.has_room(), "all the room that there can be");
    assert_eq!(bench.port.deliver(&pattern(1000)), Delivery::TooSmall);
    assert_eq!(bench.port.deliver(&pattern(100)), Delivery::Done);
    assert_eq!(bench.stats.guest_rx_too_small.get(), 1);
    let (_, written) = bench.received();
    assert_eq!(written, [20, 20, 20, 20, 20, 12]);

    let mut bench = self::bench(NetOffer::MERGEABLE);
    bench.offer_room(&[11, 1000, 1000]);
    assert_eq!(
        bench.port.deliver(&pattern(100)),
        Delivery::TooSmall,
        "no room for a header"
    );
    assert_eq!(bench.stats.guest_rx_too_small.get(), 1);
    assert!(bench.received().1.is_empty());
}

#[test]
fn without_mergeable_buffers_a_frame_has_one() {
    let mut bench = bench(0);
    bench.offer_room(&[100, 100]);
    assert_eq!(bench.port.deliver(&pattern(150)), Delivery::TooSmall);
    assert_eq!(bench.port.deliver(&pattern(80)), Delivery::Done);
    assert_eq!(bench.received().0[10], 1);
}

#[test]
fn checksums_that_hold_are_vouched_for_where_the_guest_asked_for_it() {
    let good = udp(Side::V4, true, 53, 40_000, &pattern(600));
    let mut bad = good.clone();
    bad[300] ^= 1;
    let asked = NetOffer::GUEST_CHECKSUM;
    for features in [0, asked, asked | NetOffer::MERGEABLE] {
        let mut bench = bench(features);
        let flags = [&good, &bad].map(|frame| {
            bench.offer_room(&[2000]);
            assert_eq!(bench.port.deliver(frame), Delivery::Done);
            bench.received().0[0]
        });
        // DATA_VALID; what does not hold is left to the guest.
        assert_eq!(flags, [if features == 0 { 0 } else { 2 }, 0]);
    }
}

#[test]
fn each_queue_has_its_line_and_a_broken_one_is_reported() {
    let mut bench = bench(0);
    let line = || EventFd::new(EFD_NONBLOCK).unwrap();
    let (kicks, calls, errors) = ([line(), line()], [line(), line()], [line(), line()]);
    let copies = |lines: &[EventFd; 2]| lines.each_ref().map(|l| Some(l.try_clone().unwrap()));
    bench.port.detach();
    bench.port.attach(GuestRings {
        ram: bench.ram.clone(),
        queues: [bench.guest_rx.queue_state(), bench.guest_tx.queue_state()],
        kicks: copies(&kicks),
        calls: copies(&calls),
        errors: copies(&errors),
    });
    assert!(!bench.port.sleep_mode(true), "both queues ring");
    kicks[1].write(3).unwrap();
    bench.port.drain_kicks();
    assert_eq!(bench.stats.guest_kicks.get(), 3);

    assert!(!bench.port.has_room());
    bench.offer_room(&[2000]);
    assert!(
        bench.port.sleep_mode(true),
        "room that came after the look rings for nobody"
    );
    assert!(!bench.port.sleep_mode(true));
    assert_eq!(bench.port.deliver(&pattern(60)), Delivery::Done);
    bench.port.flush();
    assert_eq!(calls[0].read().unwrap(), 1);
    assert!(calls[1].read().is_err());

    // A chain that is its own successor.
    let itself = Segment {
        gpa: DATA,
        len: 100,
    };
    bench.guest_tx.write_descriptor(0, itself, 1, 0).unwrap();
    bench.guest_tx.offer_head(0).unwrap();
    assert!(bench.taken(Stays::Payload).is_none());
    assert!(!bench.port.is_active());
    assert_eq!(bench.stats.ring_errors.get(), 1);
    assert!(errors.iter().all(|line| line.read().is_ok()));
    assert_eq!(bench.port.deliver(&pattern(60)), Delivery::NoRoom);
    assert!(bench.port.detach().is_none());
}

#[test]
fn checksums_are_completed_wherever_the_frame_lies() {
    let mut bench = bench(NetOffer::CHECKSUM);
    for payload in [18, 19, 300, 601, 1401, 1472] {
        let (whole, partial) = partial(payload);
        let role = Stays::Nothing(CopyCause::Role);
        let cuts: [&[usize]; 5] = [
            &[],
            &[12],
            &[5, 40],
            &[300, 101, 33],
            &[13, 1, 1, 1, 1, 1, 7],
        ];
        let ways = [Stays::Payload, Stays::Whole, role];
        for (stays, cuts) in ways.iter().flat_map(|way| cuts.map(|cuts| (*way, cuts))) {
            bench.send([1, 0], UDP_AT, UDP_CHECKSUM, &partial, cuts);
            let taken = bench.taken(stays);
            assert_eq!(
                taken.as_deref(),
                Some(&whole[..]),
                "{payload} {stays:?} {cuts:?}"
            );
            assert!(bench.returns_all());
        }
    }
    assert_eq!(bench.stats.guest_tx_bad.get(), 0);
}

#[test]
fn what_was_not_offered_and_places_outside_are_dropped_and_counted() {
    let (whole, partial) = partial(1000);
    let mut without = bench(0);
    without.send([1, 0], UDP_AT, UDP_CHECKSUM, &partial, &[]);
    assert!(without.taken(Stays::Payload).is_none() && without.returns_all());
    assert_eq!(without.stats.guest_tx_bad.get(), 1);

    let mut bench = bench(NetOffer::CHECKSUM);
    let hostile = [
        ([1, 1], UDP_AT, UDP_CHECKSUM),
        ([1, 0], u16::MAX, u16::MAX),
        ([1, 0], UDP_AT, u16::MAX),
        ([1, 0], 1042, 0),
        ([1, 0], 0, 1041),
        ([1, 0], 300, 0),
        ([3, 0], UDP_AT, UDP_CHECKSUM),
        ([0, 4], 0, 0),
    ];
    for (flags, start, offset) in hostile {
        bench.send(flags, start, offset, &partial, &[12]);
        assert!(
            bench.taken(Stays::Payload).is_none(),
            "{flags:?} {start} {offset}"
        );
        assert!(bench.returns_all());
    }
    assert_eq!(bench.stats.guest_tx_bad.get(), hostile.len() as u64);
    assert_eq!(bench.frames.free_slots(), 8);
    bench.send([1, 0], UDP_AT, UDP_CHECKSUM, &partial, &[12]);
    assert_eq!(bench.taken(Stays::Payload), Some(whole), "and goes on");
}

/// What is looked at is a host copy, so a guest that rewrites what it has handed over changes the header of no
/// frame that somebody has judged.
#[test]
fn only_of_a_frame_that_nobody_looks_at_the_header_stays_with_the_guest() {
    let (request, frame) = ([0; 2], pattern(1400));
    for (stays, cuts, held) in [
        (Stays::Whole, &[][..], 0),
        (Stays::Whole, &[12], 0),
        (Stays::Whole, &[5, 7], 0),
        (Stays::Whole, &[700], HEADER_MAX),
        (Stays::Whole, &[12, 54], HEADER_MAX),
        (Stays::Payload, &[], HEADER_MAX),
        (Stays::Nothing(CopyCause::Pressure), &[], 1400),
    ] {
        let mut bench = bench(0);
        bench.send(request, 0, 0, &frame, cuts);
        let token = bench.port.take(&mut bench.frames, 1522, stays).unwrap();
        assert_eq!(bench.frames.len(&token), 1400);
        assert_eq!(bench.frames.in_place(), usize::from(held < 1400));
        bench.ram.write(DATA + 12, &[0xee; 1400]).unwrap();
        let pieces: Vec<_> = bench.frames.pieces(&token).as_slice().to_vec();
        let first = bench.ram.host_range(DATA + 12, 1400).unwrap();
        assert_eq!(pieces[0].address == first, held == 0, "{stays:?} {cuts:?}");
        assert_eq!(pieces.iter().map(|piece| piece.len).sum::<usize>(), 1400);
        assert_eq!(
            (pieces.len() == 1, held == HEADER_MAX),
            (held != HEADER_MAX, pieces.len() > 1)
        );
        // What somebody could look at does not change, and nothing else can be looked at.
        let header = bench.frames.header(&token);
        assert_eq!(header, &frame[..held.min(HEADER_MAX)]);
        // The guest has it back when it has left, not before.
        assert_eq!(bench.returns_all(), held == 1400);
        bench.frames.release(token);
        assert_eq!(bench.returns_all(), held < 1400);
        let copied = bench.stats.copied_pressure_bytes.get();
        assert_eq!(copied, if held == 1400 { 1400 } else { 0 });
    }
}

#[test]
fn what_is_short_or_wants_its_checksum_does_not_stay_as_a_whole() {
    let mut bench = bench(NetOffer::CHECKSUM);
    bench.send([0; 2], 0, 0, &pattern(500), &[12]);
    let token = bench.port.take(&mut bench.frames, 1522, Stays::Whole);
    assert_eq!(bench.frames.bytes(&token.unwrap()), pattern(500));
    assert!(bench.returns_all(), "copied, and the guest's again");
    assert_eq!(bench.stats.copied_small_bytes.get(), 500);
    let (whole, partial) = partial(1000);
    bench.send([1, 0], UDP_AT, UDP_CHECKSUM, &partial, &[12]);
    let token = bench.port.take(&mut bench.frames, 1522, Stays::Whole);
    let token = token.unwrap();
    // The checksum is written to a host copy, never to what the guest owns.
    assert_eq!(bench.frames.header(&token), &whole[..HEADER_MAX]);
    assert_eq!(bench.frames.bytes(&token), whole);
    let mut guests = vec![0; partial.len()];
    bench.ram.read(DATA + 12, &mut guests).unwrap();
    assert_eq!(guests, partial);
}

#[test]
fn what_is_copied_under_pressure_is_what_would_have_stayed() {
    let mut bench = bench(0);
    for (len, cuts) in [
        (500, [12]),
        (300, [40]),
        (60, [0]),
        (511, [0]),
        (1400, [12]),
    ] {
        bench.send(
            [0; 2],
            0,
            0,
            &pattern(len),
            &cuts[..usize::from(cuts != [0])],
        );
        let stays = Stays::Nothing(CopyCause::Pressure);
        let token = bench.port.take(&mut bench.frames, 1522, stays).unwrap();
        bench.frames.release(token);
        assert!(bench.returns_all());
    }
    let stats = bench.stats.snapshot();
    let small = 500 + 300 + 60 + 511;
    assert_eq!(stats.copied_small_bytes, small);
    assert_eq!(stats.copied_pressure_bytes, 1400);
    assert_eq!(stats.tx_in_place_pct(), Some(0.0));
    assert_eq!(stats.guest_tx_bytes, small + 1400);
}

#[test]
fn a_frame_that_nobody_looks_at_can_still_be_copied_at_any_time() {
    let mut bench = bench(0);
    bench.send([0; 2], 0, 0, &pattern(1400), &[]);
    let token = bench.port.take(&mut bench.frames, 1522, Stays::Whole);
    let token = token.unwrap();
    let mut first = [0; HEADER_MAX];
    let glance = bench.frames.glance(&token, &mut first);
    assert_eq!(glance, (&pattern(1400)[..HEADER_MAX], 1400));
    bench.frames.settle_all(CopyCause::Undecided);
    assert!(bench.returns_all());
    bench.ram.write(DATA + 12, &[0xee; 1400]).unwrap();
    assert_eq!(bench.frames.bytes(&token), pattern(1400));
    let glance = bench.frames.glance(&token, &mut first);
    assert_eq!(glance, (&pattern(1400)[..HEADER_MAX], 1400));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever room a guest offers, a frame arrives whole, or not at all and the buffers stay.
    #[test]
    fn any_buffers_hold_a_frame_whole_or_not_at_all(
        rounds in proptest::collection::vec(
            (proptest::collection::vec(1u32..700, 1..16), 14usize..1522), 1..4),
    ) {
        for (lengths, len) in rounds {
            let mut bench = bench(NetOffer::MERGEABLE);
            let frame = pattern(len);
            bench.offer_room(&lengths);
            let delivery = bench.port.deliver(&frame);
            let (bytes, written) = bench.received();
            let room: u32 = lengths.iter().sum();
            if delivery == Delivery::Done {
                prop_assert_eq!(&bytes[12..], &frame[..]);
                prop_assert_eq!(usize::from(bytes[10]), written.len());
            } else {
                prop_assert!(written.is_empty());
                prop_assert!((room as usize) < 12 + len || lengths[0] < 12);
            }
        }
    }

    /// Whatever a header says, the answer is a frame or a count.
    #[test]
    fn any_header_is_served_or_counted(
        header in any::<[u8; 12]>(),
        len in 0usize..1600,
        cuts in proptest::collection::vec(1usize..600, 0..8),
    ) {
        let mut bench = bench(NetOffer::CHECKSUM);
        let frame = pattern(len);
        bench.send([header[0] & 3, header[1] & 1], u16::from(header[2]) * 8, u16::from(header[3]), &frame, &cuts);
        match bench.taken(Stays::Payload) {
            Some(bytes) => prop_assert_eq!(bytes.len(), len),
            None => prop_assert_eq!(bench.stats.guest_tx_bad.get(), 1),
        }
        prop_assert!(bench.returns_all());
        prop_assert_eq!(bench.frames.free_slots(), 8);
    }
}
