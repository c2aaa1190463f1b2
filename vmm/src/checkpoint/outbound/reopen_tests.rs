//! Checkpoints around streams that broke and were opened anew.

use std::net::TcpListener;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use super::*;
use crate::checkpoint::codec::DigestListEncoder;
use crate::checkpoint::stabilise::{StabilisePolicy, Stabiliser};
use colo_fastpath::ring::Pages;

const PAGES: usize = 64;
const KEY: [u8; KEY_BYTES] = [7; KEY_BYTES];
const GENERATION: u64 = 9;
/// A peer of which nothing comes is given up after it.
const STALL: Duration = Duration::from_secs(2);

/// A primary's end with a guest.
struct Primary {
    outbound: Outbound,
    stabiliser: Stabiliser,
    ram: Arc<GuestRam>,
}

/// What the secondary's end has seen on some streams: the generations of chunks.
type Secondary = JoinHandle<Vec<u64>>;

fn settings() -> OutboundSettings {
    OutboundSettings {
        channel: Settings {
            timeout: STALL,
            ..Settings::default()
        },
        cache_mib: 1,
        verify_one_in: 0,
        lends: true,
    }
}

/// A stream, and a secondary that reads it to its end. It sends the digest of page 0 as the list of `stop`, if there is one.
fn stream(stop: Option<StopNumber>) -> (Vec<TcpStream>, Secondary) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    let read = move || {
        let settings = Settings {
            timeout: 10 * STALL,
            ..settings().channel
        };
        let mut channel = PageChannel::new(vec![far], settings).unwrap();
        channel.set_generation(GENERATION);
        if let Some(stop) = stop {
            channel.begin(1, &stop.to_bytes()).unwrap();
            let mut list = DigestListEncoder::new(channel.next_buffer().unwrap(), 0).unwrap();
            assert!(list.push(PageDigest::default()));
            let (count, length) = (list.count(), list.finish());
            channel.submit(Kind::Digests, count, length).unwrap();
            channel.finish().unwrap();
        }
        let mut generations = Vec::new();
        loop {
            match channel.poll(STALL) {
                Ok(Event::Chunk(chunk)) => generations.push(chunk.generation),
                Ok(Event::Closed) | Err(_) => return generations,
                Ok(_) => {}
            }
        }
    };
    (vec![near], thread::spawn(read))
}

impl Primary {
    fn new(streams: Vec<TcpStream>) -> Self {
        let ram = GuestRam::new((PAGES * PAGE_BYTES) as u64, Pages::Small).unwrap();
        let ram = Arc::new(ram);
        let mut outbound = Outbound::new(streams, PAGES, KEY, &settings()).unwrap();
        outbound.set_generation(GENERATION);
        Self {
            outbound,
            stabiliser: Stabiliser::new(ram.clone(), None, PAGES as u32).unwrap(),
            ram,
        }
    }

    /// A checkpoint of page 0, filled with `byte`, to an SVM that has written nothing, or page 0 before this stop.
    fn send(
        &mut self,
        epoch: u64,
        byte: u8,
        number: Option<StopNumber>,
        is_off: bool,
    ) -> Result<Sent, SendError> {
        self.ram.write_page(0, &[byte; PAGE_BYTES]).unwrap();
        let mut set = PageBitmap::new(PAGES);
        set.add(0, 1);
        let stable = self.stabiliser.take(&set, StabilisePolicy::Copy);
        let mut stable = stable.unwrap();
        let dirty = match number {
            Some(_) => set,
            None => PageBitmap::new(PAGES),
        };
        let stop = SvmStop { number, dirty };
        let outbound = &mut self.outbound;
        outbound.send(epoch, &[], &mut stable, &stop, None::<fn()>, || is_off)
    }
}

#[test]
fn rule_13_a_commit_that_is_told_after_its_streams_broke_counts() {
    let (streams, _) = stream(None);
    let mut primary = Primary::new(streams);
    primary.send(1, 1, None, false).unwrap();
    primary.outbound.committed();
    primary.send(2, 2, None, false).unwrap();
    // Its word goes another way than the new streams, and may be slower.
    primary.outbound.reopen(stream(None).0).unwrap();
    primary.outbound.committed();
    // As before the last commit, which the SVM has.
    let sent = primary.send(3, 1, None, false).unwrap();
    assert_eq!(sent.pages.equal, 0, "the SVM has another page");
    primary.outbound.committed();
    let sent = primary.send(4, 1, None, false).unwrap();
    assert_eq!(sent.pages.equal, 1);
}

#[test]
fn rule_14_nothing_of_a_checkpoint_counts_that_is_aborted_after_its_streams_broke() {
    let (streams, _) = stream(None);
    let mut primary = Primary::new(streams);
    primary.send(1, 1, None, false).unwrap();
    primary.outbound.committed();
    primary.send(2, 2, None, false).unwrap();
    primary.outbound.reopen(stream(None).0).unwrap();
    primary.outbound.aborted();
    let sent = primary.send(2, 2, None, false).unwrap();
    assert_eq!(sent.pages.equal, 0, "the SVM has the page before");
}

#[test]
fn rule_18_new_streams_go_on_with_the_generation_and_counts_only_grow() {
    let (streams, first) = stream(None);
    let mut primary = Primary::new(streams);
    let before = primary.send(1, 1, None, false).unwrap();
    primary.outbound.committed();
    let (streams, second) = stream(None);
    primary.outbound.reopen(streams).unwrap();
    let after = primary.send(2, 2, None, false).unwrap();
    let (before, after) = (before.channel, after.channel);
    assert!(
        after.sent_bytes > before.sent_bytes,
        "{before:?}, {after:?}"
    );
    assert!(after.sent_chunks > before.sent_chunks && after.enters > before.enters);
    drop(primary);
    for secondary in [first, second] {
        let generations = secondary.join().unwrap();
        assert!(!generations.is_empty());
        assert!(
            generations
                .iter()
                .all(|&generation| generation == GENERATION)
        );
    }
}

#[test]
fn rule_14_a_list_that_went_over_broken_streams_costs_its_checkpoint_and_no_more() {
    let (streams, _) = stream(None);
    let mut primary = Primary::new(streams);
    let mut stop = StopNumber::default();
    let lost = stop.advance();
    let (streams, _) = stream(Some(stop.advance()));
    primary.outbound.reopen(streams).unwrap();
    // The secondary has given it up, and nobody sends the digests of that stop.
    let sent = primary.send(1, 1, Some(lost), true);
    assert!(matches!(sent, Err(SendError::CalledOff)), "{sent:?}");
    primary.outbound.aborted();
    let sent = primary.send(1, 1, Some(stop), false).unwrap();
    assert_eq!(sent.pages.raw.pages, 1);
}
