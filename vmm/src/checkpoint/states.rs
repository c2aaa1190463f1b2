//! Machine state in a checkpoint: records of their owners, cut into parts that fit chunks.
//!
//! A part is `kind:u16 index:u16 total:u32 offset:u32` and bytes of the record, little-endian. Parts of a record come in
//! any order.
//!
//! Invariants: a record is given only whole, each byte of it having come once; the memory of all records of a
//! checkpoint is bounded.
//!
//! Does not know what is in a record.

use std::collections::BTreeMap;

/// Bytes of a part before those of its record.
pub(super) const PART_HEAD_BYTES: usize = 12;
/// Bytes of all records of a checkpoint together: a million connections have 100 MiB of translations.
const TOTAL_MAX: usize = 512 << 20;
/// Parts of all records of a checkpoint together: a sender cuts nothing shorter than 4 KiB off, but for the ends.
const PARTS_MAX: usize = TOTAL_MAX / 4096;

/// What a state record describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum StateKind {
    /// One vCPU.
    Vcpu = 1,
    /// The devices and queues.
    Devices = 2,
    /// A shard's client-facing translations and the guest's addresses.
    Translations = 3,
    /// A shard's pending output (rule 12). 4 was one frame of it.
    Pending = 5,
    /// What is of the machine as a whole: clocks, interrupt controllers.
    Platform = 6,
    /// Digests of the captured image, for the audit (rule 16).
    Audit = 7,
}

/// One piece of machine state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// See [`StateKind`]; kinds of a later version stay numbers, for who accepts the stage to refuse.
    pub kind: u16,
    /// Which one of its kind.
    pub index: u16,
    /// The record, in the format of its owner.
    pub bytes: Vec<u8>,
}

impl State {
    /// A record of a known kind.
    pub fn new(kind: StateKind, index: usize, bytes: Vec<u8>) -> Self {
        Self {
            kind: kind as u16,
            index: index as u16,
            bytes,
        }
    }

    /// Its parts, each of so many bytes at most: head and body.
    pub(super) fn parts(
        &self,
        part_max: usize,
    ) -> impl Iterator<Item = ([u8; PART_HEAD_BYTES], &[u8])> {
        let body_max = part_max - PART_HEAD_BYTES;
        // A record without bytes is a part, too.
        let count = self.bytes.len().div_ceil(body_max).max(1);
        (0..count).map(move |n| {
            let start = n * body_max;
            let end = self.bytes.len().min(start + body_max);
            let mut head = [0; PART_HEAD_BYTES];
            head[..2].copy_from_slice(&self.kind.to_le_bytes());
            head[2..4].copy_from_slice(&self.index.to_le_bytes());
            head[4..8].copy_from_slice(&(self.bytes.len() as u32).to_le_bytes());
            head[8..].copy_from_slice(&(start as u32).to_le_bytes());
            (head, &self.bytes[start..end])
        })
    }
}

/// The records of one kind, in their order.
pub(super) fn of_kind(states: &[State], kind: StateKind) -> impl Iterator<Item = &[u8]> {
    let found = states.iter().filter(move |s| s.kind == kind as u16);
    found.map(|s| s.bytes.as_slice())
}

/// Why the states of a checkpoint are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// A part without a head.
    #[error("a part of a state record is cut off")]
    Cut,
    /// A part that does not fit what came before.
    #[error("a part of the state record of kind {kind} does not fit the others")]
    Part {
        /// Of the record.
        kind: u16,
    },
    /// Not all of a record came.
    #[error("the state record of kind {kind} is not whole")]
    Missing {
        /// Of the record.
        kind: u16,
    },
    /// More than a checkpoint can have.
    #[error("the state records are larger than {TOTAL_MAX} bytes together")]
    TooLarge,
    /// Cut into more than anybody would.
    #[error("the state records come in more than {PARTS_MAX} parts")]
    TooMany,
}

#[derive(Debug)]
struct Partial {
    bytes: Vec<u8>,
    /// Where parts began and ended.
    parts: Vec<(usize, usize)>,
}

impl Partial {
    /// Whether the parts lie side by side.
    fn is_whole(&mut self) -> bool {
        self.parts.sort_unstable();
        let follow = |end, &(start, next): &(usize, usize)| (start == end).then_some(next);
        self.parts.iter().try_fold(0, follow) == Some(self.bytes.len())
    }
}

/// Puts states together.
#[derive(Debug, Default)]
pub(super) struct StateAssembly {
    /// By kind and index, in which order they are given.
    records: BTreeMap<(u16, u16), Partial>,
    total: usize,
    parts: usize,
}

impl StateAssembly {
    /// Takes a part.
    pub(super) fn add(&mut self, part: &[u8]) -> Result<(), StateError> {
        let (head, body) = part
            .split_first_chunk::<PART_HEAD_BYTES>()
            .ok_or(StateError::Cut)?;
        let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let u32_at = |at| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let (kind, index) = (u16_at(0), u16_at(2));
        let (total, offset) = (u32_at(4) as usize, u32_at(8));
        // What is kept of a part and of a record takes memory, too, also of ones without bytes.
        self.parts += 1;
        if self.parts > PARTS_MAX {
            return Err(StateError::TooMany);
        }
        let misfit = StateError::Part { kind };
        let record = match self.records.entry((kind, index)) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                self.total = self.total.saturating_add(total);
                if self.total > TOTAL_MAX {
                    return Err(StateError::TooLarge);
                }
                entry.insert(Partial {
                    bytes: vec![0; total],
                    parts: Vec::new(),
                })
            }
        };
        let start = offset as usize;
        let end = start.checked_add(body.len()).ok_or(misfit)?;
        let place = record.bytes.get_mut(start..end).ok_or(misfit)?;
        place.copy_from_slice(body);
        record.parts.push((start, end));
        Ok(())
    }

    /// All records, by kind and index.
    pub(super) fn finish(self) -> Result<Vec<State>, StateError> {
        let state = |((kind, index), mut record): (_, Partial)| match record.is_whole() {
            true => Ok(State {
                kind,
                index,
                bytes: record.bytes,
            }),
            false => Err(StateError::Missing { kind }),
        };
        self.records.into_iter().map(state).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(state: &State, part_max: usize) -> Vec<Vec<u8>> {
        let whole = |(head, body): ([u8; PART_HEAD_BYTES], &[u8])| [&head, body].concat();
        state.parts(part_max).map(whole).collect()
    }

    fn states() -> Vec<State> {
        let long = (0..10_000u32).map(|n| n as u8).collect();
        vec![
            State::new(StateKind::Vcpu, 0, vec![1; 77]),
            State::new(StateKind::Vcpu, 1, Vec::new()),
            State::new(StateKind::Translations, 0, long),
        ]
    }

    #[test]
    fn records_come_back_whatever_the_order_of_their_parts() {
        let states = states();
        let mut all: Vec<_> = states.iter().flat_map(|s| parts(s, 100)).collect();
        assert!(all.len() > 100);
        for turn in 0..3 {
            all.rotate_left(turn * 31);
            let mut assembly = StateAssembly::default();
            all.iter().for_each(|part| assembly.add(part).unwrap());
            assert_eq!(assembly.finish().unwrap(), states);
        }
    }

    #[test]
    fn a_part_that_lacks_comes_twice_or_lies_is_refused() {
        let state = State::new(StateKind::Devices, 0, vec![7; 300]);
        let all = parts(&state, 112);
        let mut assembly = StateAssembly::default();
        all[1..].iter().for_each(|part| assembly.add(part).unwrap());
        assert_eq!(
            assembly.finish().unwrap_err(),
            StateError::Missing { kind: 2 }
        );

        // Twice, or an overlap that makes up for a gap.
        for again in [&all[0], &all[1]] {
            let mut assembly = StateAssembly::default();
            all.iter().for_each(|part| assembly.add(part).unwrap());
            assembly.add(again).unwrap();
            assert!(assembly.finish().is_err());
        }

        for (at, value) in [(8, 0xff), (4, 50), (11, 0xff)] {
            let mut lying = all[0].clone();
            lying[at] = value;
            let mut assembly = StateAssembly::default();
            let refused = assembly.add(&lying).is_err() || assembly.finish().is_err();
            assert!(refused, "byte {at}");
        }
        for len in 0..PART_HEAD_BYTES {
            let cut = StateAssembly::default().add(&all[0][..len]);
            assert_eq!(cut, Err(StateError::Cut));
        }
        // Nothing, again and again, or in a record of its own each time.
        for is_new in [0, 1] {
            let mut assembly = StateAssembly::default();
            let refused = (0..=PARTS_MAX as u32).find_map(|n| {
                let mut head = [0; PART_HEAD_BYTES];
                head[..4].copy_from_slice(&(n * is_new).to_le_bytes());
                assembly.add(&head).err().map(|e| (n as usize, e))
            });
            assert_eq!(refused, Some((PARTS_MAX, StateError::TooMany)));
        }
        let mut huge = all[0].clone();
        huge[4..8].fill(0xff);
        assert_eq!(
            StateAssembly::default().add(&huge),
            Err(StateError::TooLarge)
        );
    }
}
