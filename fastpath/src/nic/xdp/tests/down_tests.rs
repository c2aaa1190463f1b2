//! A NIC that goes while frames are in its tx ring: each of them leaves later, or is counted.

use super::*;

/// Frames that the NIC has taken and the kernel was not told of.
fn queue(near: &mut End, count: usize) {
    for seed in 0..count {
        let token = near.frames.from_bytes(&frame(FAR, 300, seed)).unwrap();
        let sent = near.nic.send(&mut near.frames, token);
        assert!(matches!(sent, Sent::Done), "{sent:?}");
    }
}

impl End {
    /// Tells the kernel before the watch has told the NIC that anything has changed.
    fn push_out_unaware(&mut self) {
        let nic = &mut self.nic;
        let pushed = nic.queues[0].push_out(&mut self.frames, &mut nic.uses, true, &nic.stats);
        pushed.unwrap();
    }

    fn until_link(&mut self, is_there: bool) {
        self.until(|end| (end.nic.has_link() == is_there).then_some(()));
    }

    fn has_lost(&self) -> [u64; 3] {
        ["tx_lost_frames", "tx_dropped_frames", "tx_without_link"].map(|name| self.counter(name))
    }
}

#[test]
fn frames_queued_when_the_nic_goes_down_leave_when_it_is_up_again() {
    with_veth(1, 1500, || {
        let (mut near, mut far) = pair(XdpNicMode::Auto);
        for round in 1..3 {
            queue(&mut near, 3);
            ip("link set a0 down");
            let in_vain = near.counter("tx_kicks_in_vain");
            near.push_out_unaware();
            assert!(near.counter("tx_kicks_in_vain") > in_vain);
            near.until_link(false);
            assert!(near.is_idle().is_none());
            // What comes now is lost, as on a wire.
            let token = near.frames.from_bytes(&frame(FAR, 60, 9)).unwrap();
            let sent = near.nic.send(&mut near.frames, token);
            assert!(matches!(sent, Sent::Refused(_)), "{sent:?}");

            ip("link set a0 up");
            near.until_link(true);
            far.until_link(true);
            near.send(&frame(FAR, 300, 3));
            for seed in 0..4 {
                assert_eq!(far.receive(), frame(FAR, 300, seed));
            }
            near.until(|end| end.is_idle());
            assert_eq!(near.has_lost(), [0, 0, round]);
            assert_eq!(near.counter("link_losses"), round);
        }
        near.end();
        far.end();
    });
}

#[test]
fn frames_that_the_kernel_throws_away_without_a_carrier_are_counted() {
    with_veth(1, 1500, || {
        let (mut near, mut far) = pair(XdpNicMode::Auto);
        queue(&mut near, 5);
        ip("link set a1 down");
        near.push_out_unaware();
        near.until(|end| end.is_idle());
        assert_eq!(near.has_lost(), [0, 5, 0]);
        near.until_link(false);

        ip("link set a1 up");
        near.until_link(true);
        far.until_link(true);
        near.send(&frame(FAR, 300, 7));
        assert_eq!(far.receive(), frame(FAR, 300, 7));
        near.end();
        far.end();
    });
}

#[test]
fn frames_queued_in_a_nic_that_is_deleted_are_counted_and_their_slots_come_back() {
    with_veth(1, 1500, || {
        let (mut near, far) = pair(XdpNicMode::Auto);
        queue(&mut near, 4);
        ip("link del a0");
        near.until(|end| (end.counter("nic_losses") == 1).then_some(()));
        assert_eq!(near.has_lost(), [4, 0, 0]);
        near.end();
        far.end();
    });
}
