//! TCP echo: a stream whose every byte tells its place, so that a lost, repeated or foreign one shows.
//!
//! Does not keep what it sent: the pattern is computed again.

use super::conversation::{Broken, Conversation, Kind};
use super::facts::Facts;
use super::random::Random;

const CHUNK_MAX: u64 = 6000;

/// One echo connection.
#[derive(Debug)]
pub(crate) struct Echo {
    number: u64,
    random: Random,
    sent: u64,
    heard: u64,
}

impl Echo {
    pub(crate) fn new(number: u64, seed: u64) -> Self {
        Self {
            number,
            random: Random::new(seed),
            sent: 0,
            heard: 0,
        }
    }

    fn pattern(&self, at: u64) -> u8 {
        // Only the low byte matters.
        (at.wrapping_mul(31) ^ (at >> 8).wrapping_mul(17) ^ self.number.wrapping_mul(101)) as u8
    }
}

impl Conversation for Echo {
    fn kind(&self) -> Kind {
        Kind::Echo
    }

    fn ask(&mut self, _facts: &mut Facts, out: &mut Vec<u8>) -> usize {
        // Mostly small, sometimes several segments.
        let limit = if self.random.below(4) == 0 {
            CHUNK_MAX
        } else {
            200
        };
        let end = self.sent + 1 + self.random.below(limit);
        out.extend((self.sent..end).map(|at| self.pattern(at)));
        self.sent = end;
        1
    }

    fn begin_audit(&mut self) {}

    fn audit(&mut self, _facts: &mut Facts, _out: &mut Vec<u8>) -> usize {
        0
    }

    fn hear(&mut self, _facts: &mut Facts, bytes: &[u8]) -> Result<usize, Broken> {
        for &byte in bytes {
            if self.heard == self.sent {
                return Err(Broken(format!(
                    "echo {}: more bytes than were sent",
                    self.number
                )));
            }
            if byte != self.pattern(self.heard) {
                let (at, want) = (self.heard, self.pattern(self.heard));
                return Err(Broken(format!(
                    "echo {}: byte {at} is {byte:#04x}, not {want:#04x}",
                    self.number
                )));
            }
            self.heard += 1;
        }
        Ok(usize::from(!bytes.is_empty() && self.heard == self.sent))
    }

    fn hang_up(&mut self, _facts: &mut Facts) {
        self.sent = 0;
        self.heard = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_echo_of_every_byte_is_checked() {
        let mut facts = Facts::new("t".to_owned(), true);
        let mut echo = Echo::new(1, 7);
        let mut out = Vec::new();
        assert_eq!(echo.ask(&mut facts, &mut out), 1);
        let (last, rest) = out.split_last().unwrap();
        assert_eq!(echo.hear(&mut facts, rest).unwrap(), 0);
        assert!(echo.hear(&mut facts, &[!last]).is_err());
        assert_eq!(echo.hear(&mut facts, &[*last]).unwrap(), 1);
        assert!(echo.hear(&mut facts, b"x").is_err());
    }
}
