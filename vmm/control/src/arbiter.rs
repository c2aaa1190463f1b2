//! The arbiter's record and the compare-and-swap on it (rule 18).
//!
//! Invariant: every change of who speaks raises the generation by one, and only from a record the proposer named.

use alloc::string::String;

/// Who may speak besides the holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nobody; the holder is not protected.
    Alone,
    /// The secondary of this session holds a committed state and may propose to take over.
    Paired {
        /// Session of the secondary.
        session: u64,
    },
    /// The VM was shut down; nobody resurrects it (rule 20).
    Off,
}

/// The arbiter's datum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Rises with each change.
    pub generation: u64,
    /// Name of the host that holds the VM.
    pub holder: String,
    /// Who else may.
    pub standing: Standing,
}

/// The record a change starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// Exactly this one.
    Exactly(Record),
    /// Paired with this session, whoever holds it: a secondary that has not yet heard the generation it was
    /// paired under.
    PairedWith {
        /// The session.
        session: u64,
    },
}

/// A question to the arbiter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cas {
    /// Read only: is this still the record?
    Confirm(Record),
    /// If the record is as expected, raise the generation and write holder and standing.
    Swap {
        /// What must be there.
        expect: Expect,
        /// The new holder.
        holder: String,
        /// The new standing.
        standing: Standing,
    },
}

/// The arbiter's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Done (or confirmed); this is the record now.
    Won(Record),
    /// Not as expected; this is the record.
    Lost(Record),
    /// No answer: no change of role.
    Unavailable(String),
}

impl Record {
    /// Decides a question on this record: the new record, or the present one as the loser sees it.
    pub fn decide(&self, cas: &Cas) -> Result<Record, Record> {
        let agrees = match cas {
            Cas::Confirm(expected) => {
                return if self == expected {
                    Ok(self.clone())
                } else {
                    Err(self.clone())
                };
            }
            Cas::Swap {
                expect: Expect::Exactly(expected),
                ..
            } => self == expected,
            Cas::Swap {
                expect: Expect::PairedWith { session },
                ..
            } => self.standing == Standing::Paired { session: *session },
        };
        match cas {
            Cas::Swap {
                holder, standing, ..
            } if agrees => Ok(Record {
                generation: self.generation + 1,
                holder: holder.clone(),
                standing: *standing,
            }),
            _ => Err(self.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paired() -> Record {
        Record {
            generation: 4,
            holder: "a".into(),
            standing: Standing::Paired { session: 9 },
        }
    }

    #[test]
    fn rule_18_one_of_two_proposals_wins() {
        let alone = Cas::Swap {
            expect: Expect::Exactly(paired()),
            holder: "a".into(),
            standing: Standing::Alone,
        };
        let takeover = Cas::Swap {
            expect: Expect::PairedWith { session: 9 },
            holder: "b".into(),
            standing: Standing::Alone,
        };
        for (first, second) in [(&alone, &takeover), (&takeover, &alone)] {
            let won = paired().decide(first).expect("the first wins");
            assert_eq!(won.generation, 5);
            assert_eq!(won.decide(second), Err(won.clone()));
        }
    }

    #[test]
    fn a_secondary_of_another_session_never_wins() {
        let cas = Cas::Swap {
            expect: Expect::PairedWith { session: 8 },
            holder: "b".into(),
            standing: Standing::Alone,
        };
        assert_eq!(paired().decide(&cas), Err(paired()));
    }
}
