//! Chance for property tests, and frames of every kind.
#![allow(dead_code, missing_docs, reason = "each test file uses a part of it")]

use colo_compare::Limits;
use colo_compare::testing::{GUEST_MAC, PEER_MAC, Side, echo, ip_frame, udp};
use colo_compare::wire::checksum::ones_sum;

/// A small generator, so that one seed gives one plan (xorshift64*).
pub struct Dice(pub u64);

impl Dice {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n.max(1)
    }

    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub fn side(&mut self) -> Side {
        if self.chance(50) { Side::V4 } else { Side::V6 }
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at + 1));
        }
    }
}

/// Small tables: a property makes hundreds of paths.
pub fn limits() -> Limits {
    Limits {
        max_flows: 64,
        max_translations: 64,
        max_held_frames: 512,
        max_svm_frames: 1024,
        max_input_frames: 512,
        max_stored_output: 1024,
        ..Limits::default()
    }
}

/// Puts VLAN tags into a frame: none, 802.1Q, or that in 802.1ad.
pub fn tagged(frame: &[u8], tags: usize) -> Vec<u8> {
    if frame.len() < 12 {
        return frame.to_vec();
    }
    let inner: &[u8] = &[0x81, 0, 0x20, 5];
    let outer: &[u8] = &[0x88, 0xa8, 0, 9];
    let tags = [&[][..], inner, &[outer, inner].concat()][tags].to_vec();
    [&frame[..12], &tags, &frame[12..]].concat()
}

/// What the frames of one flow of datagrams have in common.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    pub side: Side,
    pub tags: usize,
    pub carried: u8,
}

impl Kind {
    pub fn draw(dice: &mut Dice) -> Self {
        Self {
            side: dice.side(),
            tags: dice.below(3),
            carried: dice.below(5) as u8,
        }
    }

    /// A frame of the guest. `noise` varies what may rightly differ.
    pub fn frame(&self, payload: &[u8], noise: u16) -> Vec<u8> {
        let frame = match self.carried {
            0 => udp(self.side, false, 53, 5000, payload),
            1 => echo(self.side, false, 7, payload),
            2 => ip_frame(self.side, false, 47, 64, 0, payload),
            3 => return tagged(&ethernet(0x88cc, payload), self.tags),
            _ => return tagged(&arp(payload), self.tags),
        };
        tagged(&with_noise(self.side, frame, noise), self.tags)
    }

    /// Bits of a frame that do not count, as masks by offset.
    pub fn ignored(&self) -> Vec<(usize, u8)> {
        let l3 = 14 + 4 * self.tags;
        let network: &[(usize, u8)] = match (self.carried, self.side) {
            (3 | 4, _) => return Vec::new(),
            (_, Side::V4) => &[(1, 3), (4, 0xff), (5, 0xff), (10, 0xff), (11, 0xff)],
            (_, Side::V6) => &[(1, 0x3f), (2, 0xff), (3, 0xff)],
        };
        let l4 = if self.side == Side::V4 { 20 } else { 40 };
        let checksum = match self.carried {
            0 => Some(l4 + 6),
            1 => Some(l4 + 2),
            _ => None,
        };
        let checksum = checksum
            .into_iter()
            .flat_map(|at| [(at, 0xff), (at + 1, 0xff)]);
        let all = network.iter().copied().chain(checksum);
        all.map(|(at, mask)| (l3 + at, mask)).collect()
    }
}

fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&PEER_MAC[..], &GUEST_MAC, &ethertype.to_be_bytes(), payload].concat()
}

/// Answers that differ in the address that is asked for.
fn arp(payload: &[u8]) -> Vec<u8> {
    let sum = payload.iter().fold(payload.len() as u16, |sum, byte| {
        sum.wrapping_mul(31).wrapping_add(u16::from(*byte))
    });
    let mut body = vec![0, 1, 8, 0, 6, 4, 0, 2];
    body.extend_from_slice(&GUEST_MAC);
    body.extend_from_slice(&[10, 77, 0, 10]);
    body.extend_from_slice(&PEER_MAC[..3]);
    // What differs in its first byte must not be equal by a sum that is.
    body.push(payload.first().copied().unwrap_or_default());
    body.extend_from_slice(&sum.to_be_bytes());
    body.extend_from_slice(&[10, 77, 0, 1]);
    ethernet(0x0806, &body)
}

/// Identification or flow label, the ECN mark that routers set, and a checksum that is left out.
fn with_noise(side: Side, mut frame: Vec<u8>, noise: u16) -> Vec<u8> {
    let ecn = if noise & 1 == 0 { 2 } else { 3 };
    match side {
        Side::V4 => {
            frame[15] = ecn;
            frame[18..20].copy_from_slice(&noise.to_be_bytes());
            frame[24..26].fill(0);
            let sum = !ones_sum(&frame[14..34]);
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        Side::V6 => {
            frame[15] |= ecn << 4;
            frame[16..18].copy_from_slice(&noise.to_be_bytes());
        }
    }
    frame
}
