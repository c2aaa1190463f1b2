//! What a NIC or kernel that takes less than others makes of frames in several places.

use colo_compare::Frames;

use super::*;

const HEAD_BYTES: usize = 128;

fn able(multi_buffer: bool, crosses_pages: bool, mode: XdpNicMode) -> [XdpNicConfig; 2] {
    [("a0", NEAR), ("a1", FAR)].map(|(name, mac)| XdpNicConfig {
        mode,
        abilities: XdpAbilities {
            multi_buffer,
            crosses_pages,
        },
        ..config(name, mac)
    })
}

fn buffer(n: usize) -> Buffer {
    Buffer {
        head: n as u16,
        ..Buffer::default()
    }
}

/// Hands a frame to the NIC, which makes so many descriptors of it, and sees it arrive.
fn arrives(near: &mut End, far: &mut End, token: Token, whole: &[u8], pieces: u32) {
    let sent = near.nic.send(&mut near.frames, token);
    assert!(matches!(sent, Sent::Done), "{sent:?}");
    assert_eq!(near.nic.queues[0].socket.tx_unsubmitted(), pieces);
    near.until(|end| end.is_idle());
    assert!(far.receive() == whole, "{} bytes", whole.len());
}

/// The buffers that the guest has back.
fn returned(end: &mut End) -> Vec<Buffer> {
    let mut returned = Vec::new();
    end.frames.take_returned(&mut returned);
    returned
}

/// In one piece, from wherever it lies, nothing is copied; in several it is, and that is counted.
fn gathers(crosses_pages: bool, mode: XdpNicMode) {
    let [mut near, mut far] = able(false, crosses_pages, mode).map(End::new);
    let said = near.nic.describe();
    assert!(said.ends_with("1 queue, frames in one piece"), "{said}");
    for n in 0..20 {
        let whole = frame(FAR, 60 + 70 * n, n);
        let token = near.frames.from_bytes(&whole).unwrap();
        arrives(&mut near, &mut far, token, &whole, 1);
    }
    // Inside a page of the guest.
    let whole = frame(FAR, 1400, 30);
    near.ram.write(0x5001, &whole).unwrap();
    let place = Segment {
        gpa: 0x5001,
        len: 1400,
    };
    let token = near.frames.keep_whole(buffer(1), place).unwrap();
    arrives(&mut near, &mut far, token, &whole, 1);
    assert_eq!(returned(&mut near), [buffer(1)]);
    assert_eq!(
        (near.gathered(), near.stats.copied_gathered_bytes.get()),
        (0, 0)
    );

    for n in 1..=20 {
        let whole = frame(FAR, 1400, n);
        let token = near.keep(buffer(n), &whole, 0x2fff);
        arrives(&mut near, &mut far, token, &whole, 1);
        assert_eq!(returned(&mut near), [buffer(n)]);
        assert_eq!(near.counter("tx_gathered_one_piece_frames"), n as u64);
        let copied = near.stats.copied_gathered_bytes.get();
        assert_eq!(copied, (n * (1400 - HEAD_BYTES)) as u64);
    }

    // What was compared leaves with the other VM's bytes, in one piece by itself.
    let whole = frame(FAR, 1400, 40);
    let pvm = near.keep(buffer(40), &whole, 0x2fff);
    let svm = near.frames.from_bytes(&whole).unwrap();
    let at = HEAD_BYTES;
    assert!(near.frames.match_payload(&pvm, at, &svm, at, 1400 - at));
    near.frames.release(svm);
    arrives(&mut near, &mut far, pvm, &whole, 1);
    assert_eq!(near.gathered(), 20);
    for counter in ["tx_too_long", "xsk_tx_invalid", "strange_completions"] {
        assert_eq!(near.counter(counter), 0, "{counter}");
    }
    near.end();
    far.end();
}

#[test]
fn without_multi_buffer_what_is_in_several_pieces_is_copied_and_counted() {
    for mode in [XdpNicMode::Driver, XdpNicMode::Generic] {
        for crosses_pages in [true, false] {
            with_veth(1, 1500, move || gathers(crosses_pages, mode));
        }
    }
}

/// Whose pages do not follow each other for the NIC is sent in pieces that do not cross them.
#[test]
fn where_pages_do_not_follow_each_other_no_piece_crosses_one() {
    with_veth(1, 1500, || {
        let [mut near, mut far] = able(true, false, XdpNicMode::Driver).map(End::new);
        let places = [
            (0x5001, 1),
            (0x2fff, 2),
            (0x3a88, 1),
            (0x3a89, 2),
            ((4 << 20) - 1400, 1),
        ];
        for (n, (gpa, pieces)) in places.into_iter().enumerate() {
            let whole = frame(FAR, 1400, n);
            near.ram.write(gpa, &whole).unwrap();
            let place = Segment { gpa, len: 1400 };
            let token = near.frames.keep_whole(buffer(n), place).unwrap();
            arrives(&mut near, &mut far, token, &whole, pieces);
            assert_eq!(returned(&mut near), [buffer(n)]);
        }
        // The header, two pieces of the first part, one of the second.
        let whole = frame(FAR, 1400, 9);
        let token = near.keep(buffer(9), &whole, 0x2fff);
        arrives(&mut near, &mut far, token, &whole, 4);
        assert_eq!(returned(&mut near), [buffer(9)]);
        assert_eq!(
            (near.gathered(), near.stats.copied_gathered_bytes.get()),
            (0, 0)
        );
        for counter in ["tx_too_long", "xsk_tx_invalid", "strange_completions"] {
            assert_eq!(near.counter(counter), 0, "{counter}");
        }
        near.end();
        far.end();
    });
}

/// A whole frame of the guest that crosses a page cannot leave from there in one piece.
#[test]
fn without_both_a_frame_of_the_guest_across_pages_is_copied() {
    with_veth(1, 1500, || {
        let [mut near, mut far] = able(false, false, XdpNicMode::Driver).map(End::new);
        for (n, gpa) in [0x2fff, 0x3a89, 0x1a17].into_iter().enumerate() {
            let whole = frame(FAR, 1514, n);
            near.ram.write(gpa, &whole).unwrap();
            let place = Segment { gpa, len: 1514 };
            let token = near.frames.keep_whole(buffer(n), place).unwrap();
            arrives(&mut near, &mut far, token, &whole, 1);
            assert_eq!(returned(&mut near), [buffer(n)]);
            let gathered = near.counter("tx_gathered_one_piece_frames");
            assert_eq!(gathered, 1 + n as u64);
        }
        assert_eq!(near.stats.copied_gathered_bytes.get(), 3 * 1514);
        near.end();
        far.end();
    });
}

#[test]
fn frames_that_do_not_fit_one_buffer_are_refused_without_multi_buffer() {
    with_veth(2, 9000, || {
        let [near, far] = able(false, true, XdpNicMode::Auto);
        let mut nic = XdpNic::open(XdpNicConfig { mtu: 9000, ..near }).unwrap();
        let mut frames = FramePool::new(SLOTS, nic.slot_bytes());
        let refused = nic.start(&mut frames).unwrap_err().to_string();
        for part in ["net.mtu = 9000", "\"a0\"", "lower net.mtu to 38", "TAP"] {
            assert!(refused.contains(part), "{refused}");
        }
        assert_eq!(frames.free_slots(), SLOTS as usize);
        let mut far = End::new(XdpNicConfig { mtu: 3800, ..far });
        assert!(far.nic.describe().contains("frames in one piece"));
        // A frame that is too long for one buffer is dropped by the kernel before it is here.
        let mut near = End::new(XdpNicConfig {
            mtu: 9000,
            ..config("a0", NEAR)
        });
        near.send(&frame(FAR, 9014, 1));
        near.send(&frame(FAR, 3814, 2));
        assert_eq!(far.receive(), frame(FAR, 3814, 2));
        near.until(|end| end.is_idle());
        near.end();
        far.end();
    });
}

#[test]
fn received_pieces_are_put_together_and_counted() {
    with_veth(1, 9000, || {
        let [mut near, mut far] = [("a0", NEAR), ("a1", FAR)].map(|(name, mac)| {
            End::new(XdpNicConfig {
                mtu: 9000,
                ..config(name, mac)
            })
        });
        for (len, pieces) in [(3840, 0), (3841, 1), (9014, 2)] {
            let before = far.counter("rx_gathered_pieces");
            near.send(&frame(FAR, len, len));
            assert_eq!(far.receive(), frame(FAR, len, len));
            assert_eq!(far.counter("rx_gathered_pieces") - before, pieces);
        }
        near.until(|end| end.is_idle());
        near.end();
        far.end();
    });
}
