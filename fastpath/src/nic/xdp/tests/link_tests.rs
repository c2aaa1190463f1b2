//! The link's frames on the NIC that carries the guest's.

use colo_bpf::LINK_ETHERTYPE;

use super::*;

impl End {
    fn share(&mut self) -> LinkShare {
        let shared = self.nic.share_link(&mut self.frames, "a1");
        shared.unwrap().unwrap()
    }

    /// The next frame of the link. Its slot goes back to the NIC.
    fn take_link(&mut self) -> Option<Vec<u8>> {
        let mut out = VecDeque::new();
        self.nic.receive_link(&mut self.frames, &mut out, 1);
        let frame = out.pop_front()?;
        let token = self.frames.adopt(frame.slot, frame.start, frame.len);
        let token = token.unwrap();
        let bytes = self.frames.bytes(&token).to_vec();
        self.frames.release(token);
        let (slot, _) = self.frames.lend().unwrap();
        self.nic.take_link_slots(&mut self.frames, &mut vec![slot]);
        Some(bytes)
    }
}

fn link_frame(to: Mac, len: usize, seed: usize) -> Vec<u8> {
    let mut frame = frame(to, len, seed);
    frame[12..14].copy_from_slice(&LINK_ETHERTYPE.to_be_bytes());
    frame
}

fn until_host_has(end: &mut End, frames: u64) {
    end.until(|end| (end.counter("xdp_host_frames") == frames).then_some(()));
}

fn shares_in(mode: XdpNicMode, queues: u32) {
    let mut near = End::new(config("a0", NEAR));
    let mut far = End::new(XdpNicConfig {
        mode,
        filter: Filter::DropAll,
        ..config("a1", FAR)
    });
    assert!(far.nic.share_link(&mut far.frames, "a0").is_none());
    near.send(&link_frame(HOST, 100, 0));
    until_host_has(&mut far, 1);

    let share = far.share();
    assert_eq!(share.mac, far.nic.interface.mac().unwrap());
    assert!(far.nic.describe().contains("link packets too"));
    let refused = far.nic.share_link(&mut far.frames, "a1").unwrap();
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("have \"a1\" already"), "{refused}");

    // The guest hears nothing before its promotion, the link does.
    for is_open in [false, true] {
        if is_open {
            far.nic.set_filter(Filter::Guest(FAR)).unwrap();
        }
        let dropped = far.counter("xdp_guest_dropped_frames");
        for queue in 0..queues as usize {
            for len in [60, 1514] {
                send_by(&mut near, queue, &frame(FAR, len, queue));
                let sent = link_frame(share.mac, len, queue);
                send_by(&mut near, queue, &sent);
                assert_eq!(far.until(End::take_link), sent);
                match is_open {
                    true => assert_eq!(far.receive(), frame(FAR, len, queue)),
                    false => assert_eq!(far.take(), None),
                }
            }
        }
        let dropped = far.counter("xdp_guest_dropped_frames") - dropped;
        assert_eq!(dropped, if is_open { 0 } else { u64::from(2 * queues) });
    }
    near.send(&frame(HOST, 60, 9));
    until_host_has(&mut far, 2);
    assert_eq!(far.counter("link_frames"), u64::from(4 * queues));
    assert_eq!(far.counter("xdp_link_unbound_frames"), 0);

    // Without a holder they are the host's, until there is another one.
    drop(share);
    far.flush();
    assert!(!far.nic.describe().contains("link packets too"));
    near.send(&link_frame(HOST, 100, 1));
    until_host_has(&mut far, 3);
    let share = far.share();
    near.send(&link_frame(share.mac, 100, 2));
    assert_eq!(far.until(End::take_link), link_frame(share.mac, 100, 2));
    near.until(|end| end.is_idle());
    near.end();
    far.end();
}

#[test]
fn the_links_frames_come_beside_the_guests_in_every_mode_and_by_every_queue() {
    for (mode, queues) in [
        (XdpNicMode::Driver, 1),
        (XdpNicMode::Generic, 1),
        (XdpNicMode::Driver, 3),
    ] {
        with_veth(queues, 1500, move || shares_in(mode, queues));
    }
}

#[test]
fn neither_the_guest_nor_the_link_starves_the_other() {
    with_veth(1, 1500, || {
        let mut near = End::new(config("a0", NEAR));
        let mut far = End::new(config("a1", FAR));
        let share = far.share();
        let send_many = |near: &mut End, frame: &dyn Fn(usize) -> Vec<u8>| {
            for n in 0..3 * SLOTS as usize {
                near.send(&frame(n));
                near.until(|end| end.is_idle());
            }
        };
        let link_goes_on = |near: &mut End, far: &mut End| {
            for n in 0..2 * SLOTS as usize {
                let sent = link_frame(share.mac, 200, n);
                near.send(&sent);
                assert_eq!(far.until(End::take_link), sent, "{n}");
                near.until(|end| end.is_idle());
            }
        };
        // Nobody takes the guest's frames.
        send_many(&mut near, &|n| frame(FAR, 100, n));
        link_goes_on(&mut near, &mut far);
        // Nor is there a slot for any more of them.
        let mut kept = Vec::new();
        loop {
            let mut out = VecDeque::new();
            far.nic.receive(&mut far.frames, &mut out, 64).unwrap();
            kept.extend(out);
            match far.frames.from_bytes(&[0; 60]) {
                Some(token) => kept.push(token),
                None => break,
            }
        }
        send_many(&mut near, &|n| frame(FAR, 100, n));
        assert_eq!(far.take(), None);
        link_goes_on(&mut near, &mut far);
        for token in kept {
            far.frames.release(token);
        }
        assert_eq!(far.receive()[..6], FAR);
        while far.take().is_some() {}

        // Nobody takes the link's.
        send_many(&mut near, &|n| link_frame(share.mac, 100, n));
        assert!(far.counter("xsk_link_rx_dropped") > 0);
        for n in 0..2 * SLOTS as usize {
            near.send(&frame(FAR, 100, n));
            assert_eq!(far.receive(), frame(FAR, 100, n));
            near.until(|end| end.is_idle());
        }
        near.end();
        far.end();
    });
}

#[test]
fn a_nic_that_is_made_again_has_the_links_frames_again() {
    with_veth(1, 1500, || {
        let mut near = End::new(config("a0", NEAR));
        let mut far = End::new(config("a1", FAR));
        let share = far.share();
        for queues in [3, 1] {
            near.send(&link_frame(share.mac, 60, 1));
            ip("link del a0");
            near.until(|end| end.nic.retry_at_us.map(drop));
            far.until(|end| end.nic.retry_at_us.map(drop));
            make_veth(queues, 1500);
            for end in [&mut near, &mut far] {
                end.until(|end| (end.nic.retry_at_us.is_none() && end.nic.has_link).then_some(()));
            }
            assert_eq!(far.nic.queues.len(), queues as usize);
            for queue in 0..queues as usize {
                let sent = link_frame(share.mac, 60, queue);
                send_by(&mut near, queue, &sent);
                assert_eq!(far.until(End::take_link), sent);
            }
            near.send(&frame(FAR, 60, 7));
            assert_eq!(far.receive(), frame(FAR, 60, 7));
        }
        near.until(|end| end.is_idle());
        near.end();
        far.end();
    });
}
