//! Page content whose every byte tells its position, made on the fly.
//!
//! Byte `i` of a page is `b'a' + ((i * 7 + i / 251) % 26)`, so that a shifted, lost or damaged byte
//! shows.

const ROW: usize = 251;
const LETTERS: usize = 26;
/// 15 is the inverse of 7 modulo 26: `7 * i + c` is `7 * (i + 15 * c)` there.
const INVERSE_OF_7: usize = 15;

/// `b'a' + (i * 7) % 26`, long enough for a whole row from any phase.
const TABLE: [u8; ROW + LETTERS] = {
    let mut table = [0; ROW + LETTERS];
    let mut i = 0;
    while i < table.len() {
        table[i] = b'a' + ((i * 7) % LETTERS) as u8;
        i += 1;
    }
    table
};

/// Byte `i` of every page.
pub const fn page_byte(i: usize) -> u8 {
    b'a' + ((i * 7 + i / ROW) % LETTERS) as u8
}

/// The part of a page that is still to be sent.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Page {
    next: usize,
    end: usize,
}

impl Page {
    /// A page of `len` bytes.
    pub fn new(len: usize) -> Self {
        Self { next: 0, end: len }
    }

    pub fn is_empty(&self) -> bool {
        self.next == self.end
    }

    /// Fills the front of `out`; gives the number of bytes.
    pub fn fill(&mut self, out: &mut [u8]) -> usize {
        let total = out.len().min(self.end - self.next);
        let mut done = 0;
        while done < total {
            let row = self.next / ROW;
            let n = (ROW - self.next % ROW).min(total - done);
            let phase = (self.next + INVERSE_OF_7 * (row % LETTERS)) % LETTERS;
            out[done..done + n].copy_from_slice(&TABLE[phase..phase + n]);
            self.next += n;
            done += n;
        }
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cut_gives_the_formula() {
        for step in [1, 7, 250, 251, 252, 4096] {
            let mut page = Page::new(20_000);
            let mut at = 0;
            let mut buffer = vec![0; step];
            while !page.is_empty() {
                let n = page.fill(&mut buffer);
                for (i, byte) in buffer[..n].iter().enumerate() {
                    assert_eq!(*byte, page_byte(at + i), "byte {}", at + i);
                }
                at += n;
            }
            assert_eq!(at, 20_000);
        }
    }
}
