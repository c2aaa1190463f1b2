//! Queues: how many there are, which of them are whose, and what happens when that changes.

use super::*;
use crate::nic::testing::{Station, try_queues};
use crate::ring::xsk::{BindOptions, UmemSettings, XskError, XskSocket};
use watch::Seen;

#[test]
fn queues_that_are_added_are_bound() {
    with_veth(3, 1500, || {
        set_queues("a0", 3);
        set_queues("a1", 1);
        let mut near = End::new(config("a0", NEAR));
        let mut far = End::new(config("a1", FAR));
        assert!(near.nic.describe().contains("3 queues"));
        assert!(far.nic.describe().contains("1 queue"));
        set_queues("a1", 3);
        far.until(|end| (end.nic.queues.len() == 3).then_some(()));
        assert_eq!(far.counter("queues_added"), 2);
        // A frame leaves by the queue of its number, and comes by that.
        for queue in [2, 1, 0] {
            send_by(&mut near, queue, &frame(FAR, 60, queue));
            assert_eq!(far.receive(), frame(FAR, 60, queue));
        }
        assert_eq!(far.counter("xdp_guest_unbound_frames"), 0);
        near.end();
        far.end();
    });
}

/// Works as all workers together do until all say so.
fn until_all(ends: &mut [End], mut is_so: impl FnMut(&End) -> bool) {
    let begun = Instant::now();
    loop {
        ends.iter_mut().for_each(End::flush);
        if ends.iter().all(&mut is_so) {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "never");
        let mut fds = Vec::new();
        for end in &*ends {
            end.nic.poll_fds(false, false, &mut fds);
        }
        // SAFETY: the pollfds live through the call.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 10) };
    }
}

#[test]
fn each_shard_has_its_queues_behind_one_program() {
    with_veth(5, 1500, || {
        let mut near = End::new(config("a0", NEAR));
        let closed = XdpNicConfig {
            filter: Filter::DropAll,
            ..config("a1", FAR)
        };
        let mut far: Vec<End> = XdpNic::open_shards(closed, 2)
            .unwrap()
            .into_iter()
            .map(End::of)
            .collect();
        until_all(&mut far, |end| end.nic.has_link);
        let queues = |far: &[End]| [far[0].nic.queues.len(), far[1].nic.queues.len()];
        assert_eq!(queues(&far), [3, 2]);
        for queue in 0..5 {
            send_by(&mut near, queue, &frame(FAR, 60, queue));
        }
        far[0].until(|end| (end.counter("xdp_guest_dropped_frames") >= 5).then_some(()));
        assert!(far.iter_mut().all(|end| end.take().is_none()));

        // Whichever end opens the filter opens it for all.
        far[1].nic.set_filter(Filter::Guest(FAR)).unwrap();
        let check = |near: &mut End, far: &mut [End], queues: usize| {
            for queue in 0..queues {
                let sent = frame(FAR, 200, queue);
                send_by(near, queue, &sent);
                assert_eq!(far[queue % 2].receive(), sent);
                assert_eq!(far[1 - queue % 2].take(), None);
            }
            for end in far {
                end.send(&frame(NEAR, 100, 9));
                assert_eq!(near.receive(), frame(NEAR, 100, 9));
                end.until(|end| end.is_idle());
            }
        };
        check(&mut near, &mut far, 5);

        // Its loss and return is that of all ends.
        ip("link del a1");
        until_all(&mut far, |end| end.nic.queues.is_empty());
        near.until(|end| end.nic.retry_at_us.map(drop));
        assert!(far[0].nic.describe().contains(", lost"));
        make_veth(3, 1500);
        until_all(&mut far, |end| {
            end.nic.attachment.is_some() && end.nic.has_link
        });
        near.until(|end| (end.nic.retry_at_us.is_none() && end.nic.has_link).then_some(()));
        assert_eq!(queues(&far), [2, 1]);
        check(&mut near, &mut far, 3);

        // With fewer queues than shards it stays lost until there are enough.
        ip("link del a1");
        until_all(&mut far, |end| end.nic.queues.is_empty());
        make_veth(1, 1500);
        let failures = far[0].counter("return_failures");
        until_all(&mut far[..1], |end| {
            end.counter("return_failures") > failures + 2
        });
        assert_eq!(queues(&far), [0, 0]);
        ip("link del a1");
        make_veth(2, 1500);
        until_all(&mut far, |end| {
            end.nic.attachment.is_some() && end.nic.has_link
        });
        near.until(|end| (end.nic.queues.len() == 2 && end.nic.has_link).then_some(()));
        check(&mut near, &mut far, 2);
        near.end();
        far.into_iter().for_each(End::end);
    });
}

#[test]
fn queues_that_are_added_go_to_their_shards() {
    with_veth(4, 1500, || {
        set_queues("a0", 4);
        set_queues("a1", 2);
        let mut near = End::new(config("a0", NEAR));
        let ends = XdpNic::open_shards(config("a1", FAR), 2).unwrap();
        let mut far: Vec<End> = ends.into_iter().map(End::of).collect();
        until_all(&mut far, |end| {
            end.nic.has_link && end.nic.queues.len() == 1
        });
        set_queues("a1", 4);
        until_all(&mut far, |end| end.nic.queues.len() == 2);
        for queue in 0..4 {
            let sent = frame(FAR, 60, queue);
            send_by(&mut near, queue, &sent);
            // A veth with fewer queues than its peer is no native one, and then all comes by the first.
            let take = |far: &mut [End]| {
                far.iter_mut().find_map(|end| {
                    end.flush();
                    end.take()
                })
            };
            assert_eq!(near.until(|_| take(&mut far)), sent);
        }
        assert_eq!(far[0].counter("xdp_guest_unbound_frames"), 0);
        near.end();
        far.into_iter().for_each(End::end);
    });
}

#[test]
fn fewer_queues_than_shards_are_refused_by_name() {
    with_veth(2, 1500, || {
        let refused = XdpNic::open_shards(config("a0", NEAR), 3).unwrap_err();
        let text = refused.to_string();
        for part in [
            "\"a0\" has 2 receive queues",
            "host.shards = 3",
            "ethtool -L a0",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(XdpNic::open_shards(config("a0", NEAR), 2).unwrap().len(), 2);
    });
}

#[test]
fn a_nic_that_is_made_again_is_used_with_the_queues_that_it_has_then() {
    with_veth(1, 1500, || {
        let (mut near, mut far) = pair(XdpNicMode::Auto);
        for (round, queues) in [(1, 3), (2, 1)] {
            near.send(&frame(FAR, 60, 0));
            ip("link del a0");
            for end in [&mut near, &mut far] {
                end.until(|end| end.nic.failure.as_ref().map(drop));
                let said = end.nic.describe();
                assert!(said.contains("0 queues, lost ("), "{said}");
                assert!(said.ends_with("; `ip link` lists those that do)"), "{said}");
            }
            make_veth(queues, 1500);
            for end in [&mut near, &mut far] {
                end.until(|end| (end.nic.retry_at_us.is_none() && end.nic.has_link).then_some(()));
                assert_eq!(end.counter("nic_returns"), round);
                assert_eq!(end.nic.queues.len(), queues as usize);
            }
            for queue in 0..queues as usize {
                send_by(&mut near, queue, &frame(FAR, 60, queue));
                assert_eq!(far.receive(), frame(FAR, 60, queue));
            }
        }
        near.end();
        far.end();
    });
}

/// The station may send by as many queues as `a1` has, and is heard by all of them.
fn hears_by_each_queue(station: &Station, far: &mut End, queues: u32) {
    set_queues("a0", queues);
    // The kernel chooses the queue of each frame; more at once might not fit into the rings.
    for batch in 0..8 {
        let numbers = batch * 16..(batch + 1) * 16;
        let of = |n: usize| frame(FAR, 60 + n, n);
        numbers.clone().for_each(|n| station.send(&of(n)));
        let mut awaited: Vec<_> = numbers.collect();
        while !awaited.is_empty() {
            let heard = far.receive();
            let n = heard.len() - 60;
            assert_eq!(heard, of(n));
            let at = awaited.iter().position(|awaited| *awaited == n);
            awaited.remove(at.unwrap());
        }
    }
    set_queues("a0", 1);
}

/// Every queue has a socket, and the kernel does not let `ethtool -L` take such a queue away.
#[test]
fn the_kernel_takes_no_queue_away_that_is_used() {
    with_veth(3, 1500, || {
        set_queues("a0", 1);
        let station = Station::on("a0");
        for mode in [XdpNicMode::Driver, XdpNicMode::Generic] {
            let mut far = End::new(XdpNicConfig {
                mode,
                ..config("a1", FAR)
            });
            hears_by_each_queue(&station, &mut far, 3);
            for queues in [1, 2] {
                let refused = try_queues("a1", queues).unwrap_err();
                assert_eq!(refused.raw_os_error(), Some(libc::EINVAL));
            }
            hears_by_each_queue(&station, &mut far, 3);
            assert_eq!(far.nic.queues.len(), 3);
            assert_eq!(far.counter("nic_losses"), 0);
            far.end();
        }
    });
}

/// A driver may take queues away by itself all the same.
#[test]
fn a_nic_that_loses_queues_goes_on_with_the_rest_and_gets_them_back() {
    with_veth(3, 1500, || {
        set_queues("a0", 1);
        let station = Station::on("a0");
        let mut far = End::new(config("a1", FAR));
        for round in 1..3 {
            let queues = 3 - round as u32;
            // A frame that has come and was not fetched is lost with its queue.
            station.send(&frame(FAR, 60, 1));
            let fewer = Seen {
                rx_queues: queues,
                ..Seen::of("a1").unwrap()
            };
            far.nic.look(&mut far.frames, &fewer);
            assert!(far.nic.describe().contains("0 queues, lost"));
            assert_eq!(far.counter("nic_losses"), round);
            let begun = Instant::now();
            // The kernel lets go of a queue a little after its socket was closed.
            while try_queues("a1", queues).is_err() {
                assert!(begun.elapsed() < Duration::from_secs(30), "never");
                std::thread::yield_now();
            }
            far.until(|end| (end.counter("nic_returns") == round).then_some(()));
            far.until(|end| end.nic.has_link.then_some(()));
            assert_eq!(far.nic.queues.len(), queues as usize);
            hears_by_each_queue(&station, &mut far, queues);

            set_queues("a1", 3);
            far.until(|end| (end.nic.queues.len() == 3 && end.nic.has_link).then_some(()));
            hears_by_each_queue(&station, &mut far, 3);
        }
        assert_eq!(far.counter("queues_added"), 3);
        assert_eq!(far.counter("xdp_guest_unbound_frames"), 0);
        far.end();
    });
}

/// Rule 24: no frame gets through before each queue was seen to lead to its socket.
#[test]
fn a_queue_that_is_not_reached_is_named_and_nothing_gets_through() {
    with_veth(3, 1500, || {
        set_queues("a0", 1);
        let station = Station::on("a0");
        let ends = XdpNic::open_shards(config("a1", FAR), 2).unwrap();
        let [first, mut second] = <[XdpNic; 2]>::try_from(ends).unwrap();
        let mut first = End::of(first);
        // Somebody has closed the socket of queue 2 before the last end is ready.
        drop(first.nic.queues.pop());
        let mut frames = FramePool::new(SLOTS, second.slot_bytes());
        let refused = second.start(&mut frames).unwrap_err().to_string();
        for part in ["probe", "queue 2 of \"a1\"", "not reach its socket"] {
            assert!(refused.contains(part), "{refused}");
        }
        assert!(second.common.attachment().is_none());
        assert_eq!(second.common.control().program.interface(), None);
        assert_eq!(frames.free_slots(), SLOTS as usize);
        station.send(&frame(FAR, 60, 1));
        assert_eq!(first.take(), None);
        first.end();
    });
}

/// A NIC that has carried frames already tries again, and says why.
#[test]
fn a_probe_that_fails_at_a_return_is_counted_and_tried_again() {
    with_veth(3, 1500, || {
        set_queues("a0", 1);
        let station = Station::on("a0");
        let ends = XdpNic::open_shards(config("a1", FAR), 2).unwrap();
        let mut far: Vec<End> = ends.into_iter().map(End::of).collect();
        until_all(&mut far, |end| end.nic.has_link);
        let [first, second] = &mut far[..] else {
            panic!("two ends");
        };
        first.nic.lose(&mut first.frames);
        first.until(|end| (end.nic.queues.len() == 2).then_some(()));
        drop(first.nic.queues.pop());
        second.until(|end| end.nic.common.attachment().is_none().then_some(()));
        let said = second.nic.describe();
        assert!(said.contains("lost (probe: "), "{said}");
        assert!(said.contains("queue 2 of \"a1\""), "{said}");
        assert!(second.counter("return_failures") > 0);

        until_all(&mut far, |end| {
            end.nic.attachment.is_some() && end.nic.has_link
        });
        assert!(far.iter().all(|end| end.nic.failure.is_none()));
        assert_eq!(far[0].nic.queues.len() + far[1].nic.queues.len(), 3);
        // The station has one queue, which is that of the first end.
        station.send(&frame(FAR, 60, 1));
        assert_eq!(far[0].receive(), frame(FAR, 60, 1));
        far.into_iter().for_each(End::end);
    });
}

/// A socket of another program on a queue, as soon as it is free.
fn occupy(interface: &str, queue: u32) -> XskSocket {
    let ram = GuestRam::new(1 << 20, Pages::Small).unwrap();
    let base = std::ptr::NonNull::new(ram.area().base()).unwrap();
    let owner = Box::new(ram);
    // SAFETY: the memory is mapped as long as `owner` lives, and nobody refers to it.
    let umem = unsafe { Umem::register(base, 1 << 20, UmemSettings::default(), owner) }.unwrap();
    let interface = Interface::find(interface).unwrap();
    let begun = Instant::now();
    loop {
        match XskSocket::bind(&umem, &interface, queue, &BindOptions::default()) {
            Err(XskError::Busy { .. }) if begun.elapsed() < Duration::from_secs(30) => {
                std::thread::yield_now();
            }
            bound => return bound.unwrap(),
        }
    }
}

#[test]
fn a_queue_that_another_program_has_is_named() {
    with_veth(2, 1500, || {
        let other = occupy("a1", 1);
        let mut nic = XdpNic::open(config("a1", FAR)).unwrap();
        let mut frames = FramePool::new(SLOTS, nic.slot_bytes());
        let refused = nic.start(&mut frames).unwrap_err().to_string();
        let named = "queue 1 of \"a1\" is in use by another AF_XDP socket";
        assert!(refused.contains(named), "{refused}");
        assert_eq!(frames.free_slots(), SLOTS as usize);
        drop((nic, other));
        // And a NIC in use waits for it.
        let mut far = End::new(config("a1", FAR));
        assert_eq!(far.nic.queues.len(), 2);
        far.nic.close_queues(&mut far.frames);
        far.nic.retry_at_us = Some(0);
        let other = occupy("a1", 1);
        far.until(|end| {
            let why = end.nic.failure.as_ref()?;
            why.contains(named).then_some(())
        });
        drop(other);
        far.until(|end| (end.nic.queues.len() == 2 && end.nic.has_link).then_some(()));
        let mut near = End::new(config("a0", NEAR));
        near.send(&frame(FAR, 60, 1));
        assert_eq!(far.receive(), frame(FAR, 60, 1));
        near.until(|end| end.is_idle());
        near.end();
        far.end();
    });
}
