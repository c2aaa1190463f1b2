//! Lent memory is kept as long as the kernel may read it.

use std::sync::Arc;

use super::lent::{SLOT, Slots};
use super::*;

/// Much more than a peer takes that reads nothing, and less than a sending socket holds.
const LENT: u32 = 128;

#[test]
fn rule_15_a_page_is_kept_until_the_kernel_has_said_that_it_reads_it_no_more() {
    let settings = Settings {
        chunk_bytes: LENT as usize * SLOT,
        send_buffers: 4,
        zero_copy: true,
        ..settings()
    };
    let (near, mut far) = sockets(1);
    let mut sender = PageChannel::new(near, settings).unwrap();
    let slots = Arc::new(Slots(pattern(9, LENT as usize * SLOT)));
    let keeper: Arc<dyn Keeper> = slots.clone();
    sender.begin(3, &[]).unwrap();
    sender.next_buffer().unwrap();
    let lent: Vec<_> = (0..LENT).collect();
    sender.submit_lent(1, 0, &keeper, (&lent, SLOT)).unwrap();
    drop(keeper);
    // All sends have ended: that is not all there is to wait for.
    sender.finish().unwrap();
    let counters = sender.counters();
    if counters.unregistered_buffers == 0 {
        assert_eq!(counters.zero_copy_sends, 1);
        assert_eq!(counters.zero_copy_copied, 0, "the peer has read nothing");
        assert_eq!(Arc::strong_count(&slots), 2, "kept");
    }
    let mut far = far.remove(0);
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        far.read_to_end(&mut bytes).unwrap();
        bytes
    });
    sender.settle().unwrap();
    assert_eq!(Arc::strong_count(&slots), 1, "let go of");
    drop(sender);
    let bytes = reader.join().unwrap();
    assert!(bytes.windows(slots.0.len()).any(|part| part == slots.0));
}
