//! Login sessions: random tokens that only the guest which gave them out knows.
//!
//! Invariants: at most [`SESSIONS_MAX`] tokens are known; the oldest is forgotten first.

use crate::hash::{BuildHash, scramble};
use alloc::collections::VecDeque;
use indexmap::IndexMap;

/// Most tokens that are remembered.
pub(crate) const SESSIONS_MAX: usize = 65_536;

/// Tokens given out, with the ordinal number of their login.
#[derive(Default)]
pub(crate) struct Sessions {
    known: IndexMap<u128, u64, BuildHash>,
    order: VecDeque<u128>,
    logins: u64,
}

impl Sessions {
    /// A new token, from two readings of the entropy source.
    pub fn login(&mut self, entropy: [u64; 2]) -> u128 {
        let token = (u128::from(scramble(entropy[0])) << 64)
            | u128::from(scramble(entropy[1] ^ self.logins.rotate_left(32)));
        self.logins += 1;
        if self.known.insert(token, self.logins).is_none() {
            self.order.push_back(token);
        }
        if self.order.len() > SESSIONS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.swap_remove(&oldest);
        }
        token
    }

    /// The number of the login that got `token`.
    pub fn find(&self, token: u128) -> Option<u64> {
        self.known.get(&token).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_forgotten() {
        let mut sessions = Sessions::default();
        let first = sessions.login([1, 2]);
        assert_eq!(sessions.find(first), Some(1));
        assert_eq!(sessions.find(first ^ 1), None);
        for i in 0..SESSIONS_MAX as u64 {
            sessions.login([i, i]);
        }
        assert_eq!(sessions.find(first), None);
        assert_eq!(sessions.known.len(), SESSIONS_MAX);
    }
}
