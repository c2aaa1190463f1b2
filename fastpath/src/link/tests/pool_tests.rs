//! Frames that are received over AF_XDP straight into the slots of a frame pool.

use colo_compare::Frames;

use super::xdp_tests::links_opened;
use super::*;
use crate::ring::Area;

pub(super) const SLOTS: u32 = 4096;
const SLOT_BYTES: usize = 4096;
/// Tokens kept for a while: what they hold must not change.
const KEPT: usize = 300;

/// A frame pool and what was received into it.
pub(super) struct Pool {
    pub(super) frames: FramePool,
    kept: VecDeque<(Token, usize, u8)>,
    /// Frames of 1514 bytes so far.
    whole: u64,
}

impl Pool {
    pub(super) fn new(slots: u32) -> Self {
        let area = Arc::new(Area::reserve(slots as usize * SLOT_BYTES).unwrap());
        Self {
            frames: FramePool::in_area(area, slots, SLOT_BYTES, Arc::default()).unwrap(),
            kept: VecDeque::new(),
            whole: 0,
        }
    }

    fn keep(&mut self, token: Token, len: usize, fill: u8) {
        self.whole += u64::from(len == 1514);
        self.kept.push_back((token, len, fill));
        let slots = self.frames.slots_place().1 / SLOT_BYTES;
        if self.kept.len() > KEPT.min(slots / 4) {
            self.release_one();
        }
    }

    fn release_one(&mut self) {
        let Some((token, len, fill)) = self.kept.pop_front() else {
            return;
        };
        let bytes = self.frames.bytes(&token);
        assert!(bytes.len() == len && bytes.iter().all(|byte| *byte == fill));
        self.frames.release(token);
    }
}

impl Ends {
    pub(super) fn hear_in_pool(&mut self, end: usize) {
        let Some(pools) = &mut self.pools else { return };
        let pool = &mut pools[end];
        while let Some(incoming) = self.links[end].next(&mut pool.frames).unwrap() {
            let (Incoming::Input { seq, token, .. } | Incoming::Output { seq, token, .. }) =
                incoming
            else {
                panic!("nobody said {incoming:?}");
            };
            let (said, len, fill) = self.unheard[1 - end].pop_front().unwrap();
            let bytes = pool.frames.bytes(&token);
            assert_eq!((seq, bytes.len(), bytes[0]), (said, len, fill));
            pool.keep(token, len, fill);
        }
    }

    pub(super) fn pool(&mut self, end: usize) -> &mut Pool {
        &mut self.pools.as_mut().unwrap()[end]
    }

    /// Both ends leave, and every slot is free again.
    pub(super) fn leave(mut self) {
        let mut pools = self.pools.take().unwrap();
        for (end, (link, pool)) in self.links.into_iter().zip(&mut pools).enumerate() {
            link.leave(&mut pool.frames);
            if let Some(nics) = &mut self.nics {
                nics[end].recall(&mut pool.frames);
            }
            while !pool.kept.is_empty() {
                pool.release_one();
            }
            assert_eq!(
                pool.frames.free_slots(),
                pool.frames.slots_place().1 / SLOT_BYTES
            );
        }
    }
}

/// Two ends whose AF_XDP sockets share the memory of `pools`, in a network that loses frames.
fn ends(mtu: u32, queues: u32, pools: [Pool; 2], network: &Arc<Network>) -> Ends {
    let memory = pools.each_ref().map(|pool| PoolMemory::of(&pool.frames));
    let network = network.clone();
    let open = move |stream: TcpStream, end: usize| {
        let port = XdpPort::beside(&stream, Some(&memory[end])).unwrap();
        let port = BadPort {
            port: Box::new(port),
            mtu_max: usize::MAX,
            network: network.clone(),
            dice: end as u64,
            lost_in_a_row: 0,
        };
        let key = [11, 22][end];
        PacketLink::with_ports(stream, vec![Box::new(port)], key, PATIENCE_US).unwrap()
    };
    let mut ends = Ends::of(links_opened(mtu, queues, open).0);
    ends.pools = Some(pools);
    ends.until_both_use("xdp");
    ends.until_heard();
    ends
}

fn pools() -> [Pool; 2] {
    [Pool::new(SLOTS), Pool::new(SLOTS)]
}

/// Every frame of 1514 bytes was received in place, and some were copied: those longer than a datagram.
pub(super) fn assert_in_place(ends: &mut Ends) {
    for end in [0, 1] {
        let stats = ends.links[end].stats();
        let whole = ends.pool(end).whole;
        assert!(
            whole > 0 && stats.frames_in_place >= whole,
            "{whole}, {stats:?}"
        );
        assert!(stats.frames_copied > 0, "{stats:?}");
        assert_eq!((stats.fallbacks, stats.pool_refusals), (0, 0), "{stats:?}");
    }
}

#[test]
fn frames_stay_where_the_socket_put_them_and_every_slot_comes_back() {
    for (mtu, queues) in [(1700, 1), (3000, 2)] {
        let mut ends = ends(mtu, queues, pools(), &Network::new(0));
        ends.talk(500);
        assert_in_place(&mut ends);
        ends.leave();
    }
}

#[test]
fn lost_frames_are_sent_again_into_other_slots() {
    let network = Network::new(0);
    let mut ends = ends(1700, 1, pools(), &network);
    network.set_loss(15);
    ends.talk(500);
    assert!(ends.links[0].stats().retransmitted > 50);
    assert_in_place(&mut ends);
    // What waits for a lost one before it lies in lent slots, too.
    ends.say(0, 200);
    for _ in 0..20 {
        ends.links[0].flush().unwrap();
        ends.links[1].fill().unwrap();
    }
    ends.leave();
}

#[test]
fn without_a_free_slot_reading_waits_and_nothing_is_lost() {
    let mut ends = ends(1700, 1, pools(), &Network::new(0));
    let mut taken = Vec::new();
    while let Some(token) = ends.pool(1).frames.from_bytes(&[7; 60]) {
        taken.push(token);
    }
    ends.say(0, 2_000);
    ends.until(|ends| ends.links[1].stats().slot_waits > 1_000);
    assert_eq!(ends.unheard[0].len(), 2_000);
    for token in taken {
        ends.pool(1).frames.release(token);
    }
    ends.until_heard();
    let stats = ends.links[1].stats();
    assert!(stats.frames_in_place > 200, "{stats:?}");
    ends.leave();
}

#[test]
fn a_pool_that_cannot_lend_is_done_without() {
    let pools = [Pool::new(SLOTS), Pool::new(64)];
    let mut ends = ends(1700, 1, pools, &Network::new(0));
    ends.talk(100);
    let [near, far] = ends.links.each_ref().map(PacketLink::stats);
    assert!(near.frames_in_place > 0, "{near:?}");
    assert_eq!((near.pool_refusals, far.pool_refusals), (0, 1));
    assert!(far.frames_in_place == 0 && far.frames_copied > 0, "{far:?}");
    ends.leave();
}
