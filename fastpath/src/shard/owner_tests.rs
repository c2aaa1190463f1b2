//! What the owner of a frame must and must not depend on.

use colo_compare::HEADER_MAX;
use colo_compare::testing::{Segment, Side, echo, ip_frame, udp};
use proptest::prelude::*;

use super::*;

const SIDES: [Side; 2] = [Side::V4, Side::V6];

fn of(frame: &[u8], shards: u32) -> u32 {
    owner(&frame[..frame.len().min(HEADER_MAX)], frame.len(), shards)
}

fn tcp(side: Side, to_guest: bool, guest: u16, peer: u16, payload: &[u8]) -> Vec<u8> {
    let segment = Segment::new(side).ports(guest, peer).payload(payload);
    if to_guest {
        segment.to_guest().bytes()
    } else {
        segment.bytes()
    }
}

fn tagged(frame: &[u8], tags: &[[u8; 4]]) -> Vec<u8> {
    [&frame[..12], &tags.concat(), &frame[12..]].concat()
}

/// Cuts an IPv4 frame into fragments of `at` bytes and the rest.
fn fragments(frame: &[u8], at: usize) -> [Vec<u8>; 2] {
    let mut first = frame[..34 + at].to_vec();
    first[16..18].copy_from_slice(&(20 + at as u16).to_be_bytes());
    first[20..22].copy_from_slice(&0x2000_u16.to_be_bytes());
    let mut second = [&frame[..34], &frame[34 + at..]].concat();
    let second_len = (second.len() - 14) as u16;
    second[16..18].copy_from_slice(&second_len.to_be_bytes());
    second[20..22].copy_from_slice(&((at / 8) as u16).to_be_bytes());
    [first, second]
}

proptest! {
    #[test]
    fn both_directions_meet(
        side in prop::sample::select(&SIDES[..]),
        guest: u16,
        peer: u16,
        shards in 1..=8_u32,
        tag: u16,
    ) {
        let out = tcp(side, false, guest, peer, b"x");
        let owner = of(&out, shards);
        prop_assert!(owner < shards);
        prop_assert_eq!(of(&tcp(side, true, guest, peer, b"other bytes"), shards), owner);
        let [t0, t1] = tag.to_be_bytes();
        let vlan = tagged(&out, &[[0x81, 0, t0, t1]]);
        let qinq = tagged(&out, &[[0x88, 0xa8, t0, t1], [0x81, 0, t1, t0]]);
        prop_assert_eq!(of(&vlan, shards), owner);
        prop_assert_eq!(of(&qinq, shards), owner);
        let datagrams = [false, true].map(|to_guest| of(&udp(side, to_guest, guest, peer, b"x"), shards));
        prop_assert_eq!(datagrams[0], datagrams[1]);
        let echoes = [false, true].map(|to_guest| of(&echo(side, to_guest, guest, b"x"), shards));
        prop_assert_eq!(echoes[0], echoes[1]);
    }

    #[test]
    fn what_is_no_packet_never_panics(
        mut bytes in prop::collection::vec(any::<u8>(), 0..300),
        ethertype in prop::sample::select(&[0x0800_u16, 0x86dd, 0x8100, 0x88a8, 0x0806][..]),
        shards in 1..=8_u32,
    ) {
        if let Some(place) = bytes.get_mut(12..14) {
            place.copy_from_slice(&ethertype.to_be_bytes());
        }
        prop_assert!(of(&bytes, shards) < shards);
    }

    #[test]
    fn packets_cut_or_damaged_never_panic(
        side in prop::sample::select(&SIDES[..]),
        at in 0..74_usize,
        byte: u8,
        len in 0..74_usize,
        shards in 1..=8_u32,
    ) {
        let mut frame = tcp(side, false, 1, 2, &[0; 40]);
        frame[at] = byte;
        prop_assert!(of(&frame[..len], shards) < shards);
        prop_assert!(owner(&frame[..len], frame.len(), shards) < shards);
    }
}

#[test]
fn fragments_stay_with_their_datagram() {
    let frame = udp(Side::V4, true, 53, 4000, &[7; 64]);
    for shards in 2..=8 {
        for piece in fragments(&frame, 32) {
            assert_eq!(of(&piece, shards), of(&frame, shards));
        }
        // Those of TCP stay with each other, whatever connection they are of.
        let owners = [4000, 4001, 4002].map(|port| {
            fragments(&tcp(Side::V4, true, 80, port, &[7; 64]), 32).map(|piece| of(&piece, shards))
        });
        assert!(owners.as_flattened().iter().all(|&o| o == owners[0][0]));
    }
}

#[test]
fn extension_headers_are_skipped() {
    let plain = tcp(Side::V6, false, 80, 4000, b"x");
    let (head, transport) = plain.split_at(54);
    let options = [6, 0, 1, 4, 0, 0, 0, 0];
    let mut frame = [head, &options, transport].concat();
    frame[20] = 60;
    let payload = (frame.len() - 54) as u16;
    frame[18..20].copy_from_slice(&payload.to_be_bytes());
    for shards in 2..=8 {
        assert_eq!(of(&frame, shards), of(&plain, shards));
    }
}

#[test]
fn an_error_goes_with_the_connection_that_it_quotes() {
    for (side, protocol, kind) in [(Side::V4, 1, 3), (Side::V6, 58, 1)] {
        let mut owners = Vec::new();
        for port in 4000..4032 {
            let sent = tcp(side, false, 80, port, b"lost");
            let mut error = vec![kind, 4, 0, 0, 0, 0, 0, 0];
            error.extend(&sent[14..]);
            let frame = ip_frame(side, true, protocol, 64, 0, &error);
            assert_eq!(of(&frame, 8), of(&sent, 8));
            owners.push(of(&frame, 8));
        }
        owners.sort_unstable();
        owners.dedup();
        assert!(owners.len() > 4, "{owners:?}");
    }
}

#[test]
fn what_has_no_addresses_belongs_to_the_first() {
    let mut arp = vec![0xff; 12];
    arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.resize(60, 3);
    for frame in [arp, vec![], vec![0x88; 60], vec![0; 13]] {
        assert_eq!(of(&frame, 8), 0);
    }
}

#[test]
fn ports_of_clients_are_spread_evenly() {
    for side in SIDES {
        for shards in [2, 3, 8] {
            let mut counts = vec![0_u32; shards as usize];
            for port in 20_000..36_000 {
                counts[of(&tcp(side, true, 80, port, b""), shards) as usize] += 1;
            }
            let fair = 16_000 / shards;
            for count in &counts {
                // Six standard deviations of a fair die at least.
                let off = i64::from(*count) - i64::from(fair);
                assert!(off.abs() < 380, "{side:?} {shards}: {counts:?}");
            }
        }
    }
}

/// These numbers are part of the protocol between the hosts: a change of them is a change of it.
#[test]
fn owners_are_the_same_for_ever() {
    let frames = [
        tcp(Side::V4, false, 80, 40_000, b""),
        tcp(Side::V4, false, 80, 40_001, b""),
        tcp(Side::V6, false, 443, 40_000, b""),
        udp(Side::V4, false, 53, 1, b""),
        udp(Side::V6, false, 53, 1, b""),
        echo(Side::V4, false, 7, b""),
        echo(Side::V6, false, 7, b""),
    ];
    let owners = frames.map(|frame| of(&frame, 1 << 16));
    let known = [64_179, 33_893, 30_401, 53_474, 46_135, 15_700, 44_319];
    assert_eq!(owners, known);
}
