//! The frames in flight on this host: a fixed slab of slots, owned through linear tokens.
//!
//! Invariants: nothing allocates after [`FramePool::new`]; a slot is either free or owned by exactly
//! one [`Token`]; the number of slots bounds every queue of frames.
//!
//! Does not touch guest memory: frames are host copies here.

use colo_compare::{Frames, HEADER_MAX, Token};

use crate::hint::prefetch;

/// Bytes in front of the payload of the largest frame: Ethernet and two VLAN tags.
pub const LINK_HEADER_MAX: usize = 14 + 8;

/// Slot size that holds every frame of an MTU.
pub const fn slot_bytes_for(mtu: u16) -> usize {
    let need = mtu as usize + LINK_HEADER_MAX;
    if need <= 2048 {
        2048
    } else {
        need.next_power_of_two()
    }
}

/// A slab of frame slots.
#[derive(Debug)]
pub struct FramePool {
    slab: Box<[u8]>,
    lengths: Box<[u32]>,
    free: Vec<u32>,
    slot_bytes: usize,
}

impl FramePool {
    /// Makes `slots` slots of `slot_bytes` each.
    pub fn new(slots: u32, slot_bytes: usize) -> Self {
        Self {
            slab: vec![0; slots as usize * slot_bytes].into_boxed_slice(),
            lengths: vec![0; slots as usize].into_boxed_slice(),
            free: (0..slots).rev().collect(),
            slot_bytes,
        }
    }

    /// Bytes of a slot: no frame is longer.
    pub fn slot_bytes(&self) -> usize {
        self.slot_bytes
    }

    /// Slots nobody owns.
    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    /// Takes a slot and lets `fill` write it. `fill` gives the frame's length (at most the slot's)
    /// or `None` to give the slot back. `None` as well when no slot is free.
    pub fn fill(&mut self, fill: impl FnOnce(&mut [u8]) -> Option<usize>) -> Option<Token> {
        let slot = self.free.pop()?;
        let start = slot as usize * self.slot_bytes;
        match fill(&mut self.slab[start..start + self.slot_bytes]) {
            Some(len) => {
                assert!(
                    len <= self.slot_bytes,
                    "frame of {len} bytes in a shorter slot"
                );
                self.lengths[slot as usize] = len as u32;
                Some(Token::new(slot))
            }
            None => {
                self.free.push(slot);
                None
            }
        }
    }

    /// A frame with these bytes; `None` when no slot is free or the frame is too long.
    pub fn from_bytes(&mut self, bytes: &[u8]) -> Option<Token> {
        self.fill(|slot| {
            slot.get_mut(..bytes.len())?.copy_from_slice(bytes);
            Some(bytes.len())
        })
    }

    /// The whole frame.
    #[inline]
    pub fn bytes(&self, token: &Token) -> &[u8] {
        let start = token.slot() as usize * self.slot_bytes;
        &self.slab[start..start + self.lengths[token.slot() as usize] as usize]
    }

    fn bytes_mut(&mut self, token: &Token) -> &mut [u8] {
        let start = token.slot() as usize * self.slot_bytes;
        &mut self.slab[start..start + self.lengths[token.slot() as usize] as usize]
    }
}

impl Frames for FramePool {
    fn len(&self, token: &Token) -> usize {
        self.lengths[token.slot() as usize] as usize
    }

    #[inline]
    fn header(&self, token: &Token) -> &[u8] {
        let bytes = self.bytes(token);
        &bytes[..bytes.len().min(HEADER_MAX)]
    }

    #[inline]
    fn view(&self, token: &Token) -> (&[u8], usize) {
        let bytes = self.bytes(token);
        (&bytes[..bytes.len().min(HEADER_MAX)], bytes.len())
    }

    fn header_mut(&mut self, token: &Token) -> &mut [u8] {
        let bytes = self.bytes_mut(token);
        let len = bytes.len().min(HEADER_MAX);
        &mut bytes[..len]
    }

    #[inline]
    fn first_difference(
        &self,
        a: &Token,
        a_at: usize,
        b: &Token,
        b_at: usize,
        n: usize,
    ) -> Option<usize> {
        let a = &self.bytes(a)[a_at..a_at + n];
        let b = &self.bytes(b)[b_at..b_at + n];
        // memcmp first: equality is the common case and is the fast one.
        if a == b { None } else { position(a, b) }
    }

    fn copy_out(&self, token: &Token, at: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.bytes(token)[at..at + out.len()]);
    }

    fn ones_sum(&self, token: &Token, at: usize, n: usize) -> u16 {
        ones_sum(&self.bytes(token)[at..at + n])
    }

    fn duplicate(&mut self, token: &Token) -> Option<Token> {
        let slot = self.free.pop()?;
        let from = token.slot() as usize * self.slot_bytes;
        let len = self.lengths[token.slot() as usize];
        let to = slot as usize * self.slot_bytes;
        self.slab.copy_within(from..from + len as usize, to);
        self.lengths[slot as usize] = len;
        Some(Token::new(slot))
    }

    fn release(&mut self, token: Token) {
        debug_assert!(
            !self.free.contains(&token.slot()),
            "slot {} freed twice",
            token.slot()
        );
        self.free.push(token.slot());
    }

    #[inline]
    fn prefetch(&self, address: *const u8) {
        prefetch(address);
    }
}

#[cold]
fn position(a: &[u8], b: &[u8]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}

/// Ones' complement sum of big-endian words, folded, not inverted (RFC 1071).
fn ones_sum(bytes: &[u8]) -> u16 {
    let mut sum: u64 = 0;
    let mut words = bytes.chunks_exact(4);
    for word in &mut words {
        sum += u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
    }
    let rest = words.remainder();
    let mut tail = [0; 4];
    tail[..rest.len()].copy_from_slice(rest);
    sum += u64::from(u32::from_be_bytes(tail));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_bounded_and_come_back() {
        let mut pool = FramePool::new(2, 64);
        let a = pool.from_bytes(b"abc").unwrap();
        let b = pool.duplicate(&a).unwrap();
        assert!(pool.from_bytes(b"x").is_none());
        assert_eq!(pool.bytes(&b), b"abc");
        assert_eq!(pool.first_difference(&a, 1, &b, 0, 2), Some(0));
        assert_eq!(pool.first_difference(&a, 1, &b, 1, 2), None);
        pool.release(a);
        assert_eq!(pool.free_slots(), 1);
        assert!(pool.from_bytes(&[0; 65]).is_none());
        assert_eq!(pool.free_slots(), 1, "a refused frame keeps no slot");
        pool.release(b);
    }

    #[test]
    fn sums_follow_rfc_1071() {
        assert_eq!(
            ones_sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            0xddf2
        );
        assert_eq!(ones_sum(&[0xff]), 0xff00);
        assert_eq!(ones_sum(&[0x12, 0x34, 0x56]), 0x1234 + 0x5600);
        assert_eq!(ones_sum(&[]), 0);
    }

    #[test]
    fn headers_stop_at_their_limit() {
        let mut pool = FramePool::new(1, 2048);
        let token = pool.from_bytes(&[7; 1000]).unwrap();
        assert_eq!(pool.header(&token).len(), HEADER_MAX);
        pool.header_mut(&token)[0] = 9;
        let mut out = [0; 2];
        pool.copy_out(&token, 0, &mut out);
        assert_eq!(out, [9, 7]);
        pool.release(token);
    }

    #[test]
    fn slots_fit_their_mtu() {
        assert_eq!(slot_bytes_for(1500), 2048);
        assert_eq!(slot_bytes_for(9000), 16384);
        assert_eq!(slot_bytes_for(65535), 131_072);
    }
}
