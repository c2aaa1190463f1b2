//! What the guest's queues may cost the host, and which of the host's writes to the guest's memory are marked.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::{Event, Metadata, Subscriber, span};

use super::port::{Delivery, GuestPort, Stays};
use crate::frame::{CopyCause, FramePool};
use crate::net_offer::NetOffer;
use crate::ring::driver_mock::DriverMock;
use crate::ring::{GuestRam, Pages, QueueState, Segment};
use crate::stats::WorkerStats;
use crate::vhost_user::GuestRings;

const RECEIVE: u64 = 0x4000;
const TRANSMIT: u64 = 0x8000;
const ENTRIES: u16 = 8;

fn port(ram: &Arc<GuestRam>, queues: [QueueState; 2]) -> (GuestPort, Arc<WorkerStats>) {
    let stats = Arc::new(WorkerStats::default());
    let mut port = GuestPort::new(None, stats.clone());
    port.set_frame_max(1522);
    port.attach(GuestRings {
        ram: ram.clone(),
        queues,
        kicks: [None, None],
        calls: [None, None],
        errors: [None, None],
    });
    (port, stats)
}

fn drivers(ram: &Arc<GuestRam>) -> [DriverMock; 2] {
    [RECEIVE, TRANSMIT].map(|base| DriverMock::new(ram.clone(), base, ENTRIES, true))
}

/// Invariant 7. The rings lie in one place: what the host says of used buffers makes others available, without an end
/// to it or, as here, until there were as many as the queue has entries and seven.
#[test]
fn a_guest_that_never_stops_making_bad_buffers_keeps_no_worker_to_itself() {
    const AHEAD: u16 = ENTRIES - 1;
    let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
    let [guest_rx, mut guest_tx] = drivers(&ram);
    // No frame is as short as this.
    let short = Segment {
        gpa: 0x20000,
        len: 12,
    };
    guest_tx.write_descriptor(0, short, 0, 0).unwrap();
    // Number 0, over and over.
    guest_tx.set_avail_idx(ENTRIES).unwrap();
    let state = guest_tx.queue_state();
    let state = QueueState {
        used: state.avail,
        next_used: AHEAD,
        ..state
    };
    let (mut port, stats) = port(&ram, [guest_rx.queue_state(), state]);
    let mut frames = FramePool::new(8, 2048);
    let mut take = || port.take(&mut frames, 1514, Stays::Nothing(CopyCause::Role));
    assert!(take().is_none());
    assert_eq!(stats.guest_tx_bad.get(), u64::from(ENTRIES));
    assert!(take().is_none());
    assert_eq!(stats.guest_tx_bad.get(), u64::from(ENTRIES + AHEAD));
    assert_eq!(stats.ring_errors.get(), 0);
}

/// Counts the lines that are logged in it.
#[derive(Debug, Default)]
struct Lines(Arc<AtomicU64>);

impl Subscriber for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn event(&self, _: &Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// Invariant 7, for the log.
#[test]
fn a_guest_that_breaks_its_queues_in_a_loop_does_not_fill_the_log() {
    const TIMES: u64 = 2000;
    let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
    let [guest_rx, mut guest_tx] = drivers(&ram);
    guest_tx.set_avail_idx(3 * ENTRIES).unwrap();
    let queues = [guest_rx.queue_state(), guest_tx.queue_state()];
    let (mut port, stats) = port(&ram, queues);
    let mut frames = FramePool::new(8, 2048);
    let lines = Lines::default();
    let written = lines.0.clone();
    tracing::subscriber::with_default(lines, || {
        for _ in 0..TIMES {
            let taken = port.take(&mut frames, 1514, Stays::Nothing(CopyCause::Role));
            assert!(taken.is_none());
            port.activate(queues);
        }
    });
    assert_eq!(stats.ring_errors.get(), TIMES);
    let written = written.load(Ordering::Relaxed);
    assert!((1..TIMES / 10).contains(&written), "{written}");
}

/// The pages that the host wrote since the last look.
fn marked(ram: &GuestRam) -> Vec<u64> {
    let mut pages = Vec::new();
    ram.take_host_dirty(|at, word| {
        let bits = (0..64).filter(|bit| word & 1 << bit != 0);
        pages.extend(bits.map(|bit| 64 * at as u64 + bit));
    });
    pages
}

#[test]
fn rule_15_a_delivery_marks_what_it_writes_and_no_more() {
    const PAGE: u64 = 4096;
    const BUFFER: u64 = 0x20 * PAGE + 0xf00;
    for features in [0, NetOffer::MERGEABLE] {
        let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
        let [mut guest_rx, guest_tx] = drivers(&ram);
        let queue = |driver: &DriverMock| QueueState {
            device_features: features,
            ..driver.queue_state()
        };
        let (mut port, _) = port(&ram, [queue(&guest_rx), queue(&guest_tx)]);
        // It goes on for longer than the frame.
        let room = Segment {
            gpa: BUFFER,
            len: 3 * PAGE as u32,
        };
        guest_rx.offer(&[], &[room]).unwrap().unwrap();
        let used = guest_rx.queue_state().used / PAGE;
        ram.set_tracking(true);
        assert_eq!(port.deliver(&[7; 1400]), Delivery::Done);
        let written = [used, BUFFER / PAGE, BUFFER / PAGE + 1];
        assert_eq!(marked(&ram), written, "{features:#x}");
        port.flush();
        assert_eq!(marked(&ram), [used], "the used index");
        let mut frame = [0; 1400];
        ram.read(BUFFER + 12, &mut frame).unwrap();
        assert_eq!(frame, [7; 1400]);
    }
}
