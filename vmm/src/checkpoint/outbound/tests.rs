//! Checkpoints to a secondary whose digests are damaged on their way, or make no sense.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use super::*;
use crate::checkpoint::channel::HEADER_BYTES;
use crate::checkpoint::codec::DigestListEncoder;
use crate::checkpoint::stabilise::{StabilisePolicy, Stabiliser};
use crate::checkpoint::states::StateKind;
use colo_fastpath::ring::Pages;

const PAGES: usize = 256;
const KEY: [u8; KEY_BYTES] = [7; KEY_BYTES];
/// Longer than anything takes that does not hang.
const LONG: Duration = Duration::from_secs(20);

/// What becomes of the first list of digests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// A bit of the n-th chunk of this kind is turned over.
    Damaged(Kind, usize),
    /// Every chunk is intact and none makes sense.
    Senseless,
    /// The second half is not sent.
    Short,
    /// It is given up after the first half.
    GivenUp,
}

fn settings() -> OutboundSettings {
    OutboundSettings {
        channel: Settings {
            timeout: LONG,
            ..Settings::default()
        },
        cache_mib: 0,
        verify_one_in: 0,
        lends: true,
    }
}

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

/// Passes chunks on; of the first `victim` a bit of the payload is turned over.
fn relay(mut from: TcpStream, mut to: TcpStream, victim: Option<(Kind, usize)>) -> io::Result<()> {
    let mut seen = 0;
    loop {
        let mut head = [0; HEADER_BYTES];
        from.read_exact(&mut head)?;
        let length = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
        let mut payload = vec![0; length as usize];
        from.read_exact(&mut payload)?;
        let kind = u16::from_le_bytes([head[6], head[7]]);
        if let Some((wanted, nth)) = victim
            && kind == wanted as u16
        {
            if seen == nth {
                payload[length as usize - 1] ^= 4;
            }
            seen += 1;
        }
        to.write_all(&head)?;
        to.write_all(&payload)?;
    }
}

/// The secondary's end, whose SVM has written all pages: two chunks of digests in each checkpoint. Gives how each ended.
fn secondary(socket: TcpStream, fault: Fault) -> Vec<&'static str> {
    let mut channel = PageChannel::new(vec![socket], settings().channel).unwrap();
    let mut stop = StopNumber::default();
    let mut ends = Vec::new();
    for epoch in 1..3 {
        let spoilt = Some(fault).filter(|_| epoch == 1);
        channel.begin(epoch, &stop.advance().to_bytes()).unwrap();
        let halves = match spoilt {
            Some(Fault::Short | Fault::GivenUp) => 1,
            _ => 2,
        };
        for half in 0..halves {
            let buffer = channel.next_buffer().unwrap();
            let mut list = DigestListEncoder::new(buffer, half * PAGES as u64 / 2).unwrap();
            for _ in 0..PAGES / 2 {
                assert!(list.push(PageDigest::default()));
            }
            let (count, length) = (list.count(), list.finish());
            if spoilt == Some(Fault::Senseless) {
                channel.next_buffer().unwrap()[0] = 99;
            }
            channel.submit(Kind::Digests, count, length).unwrap();
        }
        match spoilt {
            Some(Fault::GivenUp) => channel.abort().unwrap(),
            _ => channel.finish().unwrap(),
        }
        ends.push(loop {
            match channel.poll(LONG).unwrap() {
                Event::Complete { .. } => break "complete",
                Event::Aborted { .. } => break "aborted",
                Event::Damaged { .. } => break "damaged",
                // Gone: the primary must notice that it waits for nothing.
                Event::Idle | Event::Closed => return ends,
                _ => {}
            }
        });
    }
    ends
}

struct Pair {
    outbound: Outbound,
    stabiliser: Stabiliser,
    secondary: JoinHandle<Vec<&'static str>>,
}

fn pair(fault: Fault) -> Pair {
    let (ours, far) = sockets();
    let (near, theirs) = sockets();
    let victim = match fault {
        Fault::Damaged(kind, nth) => Some((kind, nth)),
        _ => None,
    };
    let (from, to) = (near.try_clone().unwrap(), far.try_clone().unwrap());
    thread::spawn(move || relay(from, to, victim));
    thread::spawn(move || relay(far, near, None));
    let ram = GuestRam::new((PAGES * PAGE_BYTES) as u64, Pages::Small).unwrap();
    for number in 0..PAGES {
        ram.write_page(number, &[number as u8 | 1; PAGE_BYTES])
            .unwrap();
    }
    Pair {
        outbound: Outbound::new(vec![ours], PAGES, KEY, &settings()).unwrap(),
        stabiliser: Stabiliser::new(Arc::new(ram), None, PAGES as u32).unwrap(),
        secondary: thread::spawn(move || secondary(theirs, fault)),
    }
}

impl Pair {
    /// Gives what came of it, and how many had the captured pages before and have them now.
    fn send(&mut self, epoch: u64, number: StopNumber) -> (Result<Sent, SendError>, [usize; 2]) {
        let dirty = PageBitmap::full(PAGES);
        let stable = self.stabiliser.take(&dirty, StabilisePolicy::Copy);
        let mut stable = stable.unwrap();
        let keeper = stable.keeper();
        let before = Arc::strong_count(&keeper);
        let stop = SvmStop {
            number: Some(number),
            dirty,
        };
        let states = [State::new(StateKind::Vcpu, 0, vec![1; 100])];
        let send = &mut self.outbound;
        let sent = send.send(epoch, &states, &mut stable, &stop, None::<fn()>, || false);
        let after = || Arc::strong_count(&keeper);
        // The thread for digests lets go of them in its own time; nobody turns the channel meanwhile.
        let begun = Instant::now();
        while after() > before && begun.elapsed() < LONG {
            thread::yield_now();
        }
        (sent, [before, after()])
    }
}

#[test]
fn rule_14_digests_that_are_of_no_use_cost_their_checkpoint_and_no_more() {
    for fault in [
        Fault::Damaged(Kind::Begin, 0),
        Fault::Damaged(Kind::Digests, 0),
        Fault::Damaged(Kind::Digests, 1),
        Fault::Damaged(Kind::End, 0),
        Fault::Senseless,
        Fault::Short,
        Fault::GivenUp,
    ] {
        let mut pair = pair(fault);
        let mut stop = StopNumber::default();
        let (sent, [before, after]) = pair.send(1, stop.advance());
        let expected = match &sent {
            Err(SendError::Digests(_)) => fault == Fault::Senseless,
            Err(SendError::DamagedDigests(_)) => fault != Fault::Senseless,
            _ => false,
        };
        assert!(expected, "{fault:?}: {sent:?}");
        assert_eq!(
            before, after,
            "rule 15: the kernel reads none of it any more"
        );
        pair.outbound.aborted();
        let (sent, _) = pair.send(2, stop.advance());
        let sent = sent.unwrap();
        assert_eq!(sent.pages.raw.pages, PAGES as u64, "{fault:?}");
        pair.outbound.committed();
        drop(pair.outbound);
        let ends = pair.secondary.join().unwrap();
        assert_eq!(ends, ["aborted", "complete"], "{fault:?}");
    }
}

#[test]
fn rule_14_a_damaged_list_of_an_earlier_stop_costs_nothing() {
    // The first list is of a stop that was given up before anything was sent.
    let mut pair = pair(Fault::Damaged(Kind::Digests, 1));
    let mut stop = StopNumber::default();
    stop.advance();
    drop(pair.outbound.channel.begin(1, &KEY));
    pair.outbound.channel.abort().unwrap();
    let (sent, _) = pair.send(2, stop.advance());
    assert!(sent.is_ok(), "{sent:?}");
    drop(pair.outbound);
    assert_eq!(pair.secondary.join().unwrap(), ["aborted", "complete"]);
}
