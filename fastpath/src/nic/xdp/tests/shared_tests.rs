//! Guest RAM and frames are registered with the kernel once, for all ends of a NIC, other NICs and the link.

use super::queue_tests::until_all;
use super::*;
use crate::link::{PoolMemory, XdpPort};

/// Ends of which all frames lie beside one guest's RAM, as the workers of a guest have them.
fn beside_one_guest(nics: Vec<XdpNic>, slots: u32) -> Vec<End> {
    let ram = Arc::new(GuestRam::new(4 << 20, Pages::Small).unwrap());
    let with_pool = |nic: XdpNic| {
        let stats = Arc::<WorkerStats>::default();
        let area = ram.area().clone();
        let mut frames = FramePool::in_area(area, slots, nic.slot_bytes(), stats.clone()).unwrap();
        frames.set_guest(ram.clone());
        let ram = ram.clone();
        End {
            nic,
            frames,
            ram,
            stats,
        }
    };
    let mut ends: Vec<End> = nics.into_iter().map(with_pool).collect();
    for end in &mut ends {
        end.nic.start(&mut end.frames).unwrap();
    }
    ends
}

fn shards(interface: &str, mac: Mac) -> Vec<XdpNic> {
    XdpNic::open_shards(config(interface, mac), 2).unwrap()
}

/// Registrations now, their bytes, and how many were made although there was one.
fn registered(end: &End) -> [u64; 3] {
    ["registrations", "registered_bytes", "registered_again"]
        .map(|what| end.counter(&format!("umem_{what}")))
}

/// One registration of everything, and one of the slots of each of these ends.
fn once(all: &[End], with_slots: &[&End]) -> [u64; 3] {
    let slots = with_slots.iter().map(|end| end.frames.slots_place().1);
    let bytes = all[0].frames.area().mapped_bytes() + slots.sum::<usize>();
    [1 + with_slots.len() as u64, bytes as u64, 0]
}

/// What the guest has in its RAM leaves from there by this end, and comes by one of those.
fn sends_in_place(from: &mut End, to: &mut [End], mac: Mac, seed: usize) {
    let whole = frame(mac, 1400, seed);
    let buffer = Buffer {
        life: 0,
        head: 1,
        descriptors: 1,
    };
    let token = from.keep(buffer, &whole, 0x1003);
    let sent = from.nic.send(&mut from.frames, token);
    assert!(matches!(sent, Sent::Done), "{sent:?}");
    from.until(|end| end.is_idle());
    let mut returned = Vec::new();
    from.frames.take_returned(&mut returned);
    assert_eq!(returned, [buffer]);
    let received = from.until(|_| {
        to.iter_mut().find_map(|end| {
            end.flush();
            end.take()
        })
    });
    assert_eq!(received, whole);
    assert_eq!((from.gathered(), from.counter("xsk_tx_invalid")), (0, 0));
}

fn all_carry(near: &mut End, far: &mut [End], queues: usize) {
    for queue in 0..queues {
        let sent = frame(FAR, 200, queue);
        send_by(near, queue, &sent);
        assert_eq!(far[queue % 2].receive(), sent);
    }
    for (seed, end) in far.iter_mut().enumerate() {
        sends_in_place(end, std::slice::from_mut(near), NEAR, seed);
    }
}

fn are_up(ends: &mut [End]) {
    until_all(ends, |end| end.nic.attachment.is_some() && end.nic.has_link);
}

#[test]
fn all_ends_of_a_nic_have_one_registration_whichever_comes_and_goes() {
    with_veth(2, 1500, || {
        let mut near = End::new(config("a0", NEAR));
        let mut far = beside_one_guest(shards("a1", FAR), SLOTS);
        are_up(&mut far);
        all_carry(&mut near, &mut far, 2);
        assert_eq!(registered(&far[0]), once(&far, &[]));
        let told = far[1].nic.counters();
        assert!(told.iter().all(|(name, _)| !name.starts_with("umem_")));

        // The end that has registered it closes its socket, and has what the other one still has when it is back.
        for _ in 0..3 {
            let first = &mut far[0];
            first.nic.lose(&mut first.frames);
            assert_eq!(first.counter("umem_registrations"), 1);
            first.until(|end| (end.nic.queues.len() == 1).then_some(()));
            are_up(&mut far);
            all_carry(&mut near, &mut far, 2);
            assert_eq!(registered(&far[0]), once(&far, &[]));
        }

        // The NIC itself goes, and all of it with it.
        ip("link del a1");
        until_all(&mut far, |end| end.nic.queues.is_empty());
        near.until(|end| end.nic.queues.is_empty().then_some(()));
        assert_eq!(registered(&far[0]), [0; 3]);
        make_veth(4, 1500);
        are_up(&mut far);
        near.until(|end| (end.nic.queues.len() == 4 && end.nic.has_link).then_some(()));
        all_carry(&mut near, &mut far, 4);
        // The queues that are not sent from are on the slots alone.
        assert_eq!(registered(&far[0]), once(&far, &[&far[0], &far[1]]));
        near.end();
        far.into_iter().for_each(End::end);
    });
}

#[test]
fn queues_that_are_added_share_what_there_is() {
    with_veth(4, 1500, || {
        set_queues("a1", 2);
        set_queues("a0", 2);
        let mut far = beside_one_guest(shards("a1", FAR), SLOTS);
        are_up(&mut far);
        assert_eq!(registered(&far[0]), once(&far, &[]));
        set_queues("a1", 3);
        until_all(&mut far, |end| {
            end.nic.attachment.is_some_and(|at| at.queues == 3)
        });
        assert_eq!(registered(&far[0]), once(&far, &[&far[0]]));
        set_queues("a1", 4);
        until_all(&mut far, |end| end.nic.queues.len() == 2);
        assert_eq!(registered(&far[0]), once(&far, &[&far[0], &far[1]]));
        far.into_iter().for_each(End::end);
    });
}

#[test]
fn two_nics_of_a_guest_have_one_registration_if_both_copy() {
    for mode in [XdpNicMode::Auto, XdpNicMode::Generic] {
        with_veth(2, 1500, move || {
            let near = XdpNicConfig {
                mode,
                ..config("a0", NEAR)
            };
            let mut nics = XdpNic::open_shards(near, 2).unwrap();
            nics.extend(shards("a1", FAR));
            let mut ends = beside_one_guest(nics, SLOTS);
            are_up(&mut ends);
            assert_eq!(registered(&ends[0]), once(&ends, &[]));
            let mut far = ends.split_off(2);
            for shard in 0..2 {
                sends_in_place(&mut ends[shard], &mut far, FAR, shard);
                sends_in_place(&mut far[shard], &mut ends, NEAR, shard);
            }
            let area = ends[0].frames.area().clone();
            let first = ends.remove(0);
            first.end();
            assert_eq!(registered(&far[0])[0], 1);
            assert_eq!(registered(&far[0])[1], area.mapped_bytes() as u64);
            ends.into_iter().chain(far).for_each(End::end);
        });
    }
}

/// The link's sockets are on another interface, and on slots only.
#[test]
fn the_links_sockets_share_the_slots() {
    const MANY: u32 = 4096;
    with_veth(2, 1500, || {
        ip("link add b0 type veth peer name b1");
        for name in ["b0", "b1"] {
            bring_up(name);
        }
        let mut ends = beside_one_guest(vec![XdpNic::open(config("a1", FAR)).unwrap()], MANY);
        are_up(&mut ends);
        let with_slots = once(&ends, &[&ends[0]]);
        assert_eq!(registered(&ends[0]), with_slots);
        let pool = PoolMemory::of(&ends[0].frames);
        let port = XdpPort::for_shards("b0", &[Some(&pool)]).unwrap();
        assert_eq!(registered(&ends[0]), with_slots);
        // The NIC goes, the link's sockets keep what they have, and the NIC comes back to that.
        let mut end = ends.remove(0);
        end.nic.lose(&mut end.frames);
        let slots = end.frames.slots_place().1 as u64;
        assert_eq!(registered(&end), [1, slots, 0]);
        end.until(|end| (end.nic.queues.len() == 2).then_some(()));
        assert_eq!(registered(&end), with_slots);
        drop(port);
        assert_eq!(registered(&end), with_slots);
        end.nic.recall(&mut end.frames);
        assert_eq!(registered(&end), [0; 3]);
        assert_eq!(end.frames.free_slots(), MANY as usize);
    });
}
