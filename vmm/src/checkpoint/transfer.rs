//! Checkpoints as bytes on the page channel: checksummed records of version, epoch, generation and length.
//!
//! A record is a 40-byte head (`"CKPT" version:u16 kind:u16 len:u32 0:u32 generation:u64 epoch:u64 payload_crc:u32
//! head_crc:u32`, little-endian) and its payload. A stage is `Begin`, any number of `State` and `Pages`, then `End`
//! with their counts. Outside a stage come `Sync` pages, live and to be overwritten by later ones.
//!
//! Invariants: damage inside a payload spoils the stage it belongs to, never more (it is dropped at its `End`);
//! damage in a head breaks the stream, for its length cannot be trusted; lengths are bounded before memory is taken.

use std::io::{self, Read, Write};

use super::pages::{PAGE_BYTES, PageSet};

const MAGIC: [u8; 4] = *b"CKPT";
const VERSION: u16 = 1;
const HEAD: usize = 40;
/// Pages per record.
pub const PAGES_PER_RECORD: usize = 256;
const PAYLOAD_MAX: usize = 64 << 20;

/// What a state record describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum StateKind {
    /// A vCPU's registers.
    Vcpu = 1,
    /// The devices and queues.
    Devices = 2,
    /// The client-facing translations and the guest's addresses.
    Translations = 3,
    /// A shard's pending output (rule 12). 4 was one frame of it.
    Pending = 5,
    /// What is in KVM once a machine: clock, interrupt controllers.
    Platform = 6,
}

/// One piece of machine state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// What it describes; kinds of a later version are kept as numbers and refused at the stage's end.
    pub kind: u16,
    /// Which one of its kind.
    pub index: u16,
    /// The record, in the format of its owner.
    pub bytes: Vec<u8>,
}

/// A whole checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// Generation it was sent under.
    pub generation: u64,
    /// The epoch it ends.
    pub epoch: u64,
    /// Machine state.
    pub states: Vec<State>,
    /// The pages that differ, or may.
    pub pages: PageSet,
}

impl Checkpoint {
    /// The states of one kind, in order of their index.
    pub fn of_kind(&self, kind: StateKind) -> Vec<&[u8]> {
        let mut found: Vec<_> = self
            .states
            .iter()
            .filter(|s| s.kind == kind as u16)
            .collect();
        found.sort_by_key(|s| s.index);
        found.into_iter().map(|s| s.bytes.as_slice()).collect()
    }
}

/// What came on the page channel.
#[derive(Debug)]
pub enum Incoming {
    /// Live pages of the initial synchronisation.
    Sync(PageSet),
    /// A whole checkpoint.
    Stage(Box<Checkpoint>),
    /// A checkpoint whose stage was damaged.
    Damaged {
        /// Its epoch.
        epoch: u64,
        /// What was wrong.
        reason: String,
    },
}

/// Why the page channel is unusable.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The socket failed or was closed.
    #[error("page channel: {0}")]
    Io(#[from] io::Error),
    /// A head is damaged or of no known version.
    #[error("page channel: {0}")]
    Stream(String),
}

const KIND_SYNC: u16 = 1;
const KIND_BEGIN: u16 = 2;
const KIND_STATE: u16 = 3;
const KIND_PAGES: u16 = 4;
const KIND_END: u16 = 5;

/// Writes records.
#[derive(Debug)]
pub struct Sender<W> {
    stream: W,
    /// Bytes written.
    pub sent_bytes: u64,
}

impl<W: Write> Sender<W> {
    /// Over a blocking stream.
    pub fn new(stream: W) -> Self {
        Self {
            stream,
            sent_bytes: 0,
        }
    }

    /// The stream.
    pub fn get_ref(&self) -> &W {
        &self.stream
    }

    /// Sends live pages.
    pub fn sync(&mut self, generation: u64, pages: &PageSet) -> Result<(), TransferError> {
        self.pages(KIND_SYNC, generation, 0, pages)
    }

    /// Sends a checkpoint; `midway` is called when half of it is on the link.
    pub fn stage(
        &mut self,
        checkpoint: &Checkpoint,
        midway: impl FnOnce(),
    ) -> Result<(), TransferError> {
        let (generation, epoch) = (checkpoint.generation, checkpoint.epoch);
        self.record(KIND_BEGIN, generation, epoch, &[])?;
        for state in &checkpoint.states {
            let ids = [state.kind.to_le_bytes(), state.index.to_le_bytes()].concat();
            self.record(KIND_STATE, generation, epoch, &[&ids, &state.bytes])?;
        }
        midway();
        self.pages(KIND_PAGES, generation, epoch, &checkpoint.pages)?;
        let states = (checkpoint.states.len() as u64).to_le_bytes();
        let pages = (checkpoint.pages.numbers.len() as u64).to_le_bytes();
        self.record(KIND_END, generation, epoch, &[&states, &pages])?;
        self.stream.flush()?;
        Ok(())
    }

    fn pages(
        &mut self,
        kind: u16,
        generation: u64,
        epoch: u64,
        pages: &PageSet,
    ) -> Result<(), TransferError> {
        let mut data = pages.data.as_slice();
        for numbers in pages.numbers.chunks(PAGES_PER_RECORD) {
            let full = numbers.iter().filter(|&&n| n & PageSet::ZERO == 0).count();
            let (now, later) = data.split_at(full * PAGE_BYTES);
            data = later;
            let count = (numbers.len() as u64).to_le_bytes();
            let numbers: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
            self.record(kind, generation, epoch, &[&count, &numbers, now])?;
        }
        Ok(())
    }

    fn record(
        &mut self,
        kind: u16,
        generation: u64,
        epoch: u64,
        payload: &[&[u8]],
    ) -> Result<(), TransferError> {
        let len: usize = payload.iter().map(|p| p.len()).sum();
        let mut crc = crc32fast::Hasher::new();
        payload.iter().for_each(|p| crc.update(p));
        let mut head = [0u8; HEAD];
        head[..4].copy_from_slice(&MAGIC);
        head[4..6].copy_from_slice(&VERSION.to_le_bytes());
        head[6..8].copy_from_slice(&kind.to_le_bytes());
        head[8..12].copy_from_slice(&(len as u32).to_le_bytes());
        head[16..24].copy_from_slice(&generation.to_le_bytes());
        head[24..32].copy_from_slice(&epoch.to_le_bytes());
        head[32..36].copy_from_slice(&crc.finalize().to_le_bytes());
        let head_crc = crc32fast::hash(&head[..36]);
        head[36..].copy_from_slice(&head_crc.to_le_bytes());
        self.stream.write_all(&head)?;
        for part in payload {
            self.stream.write_all(part)?;
        }
        self.sent_bytes += (HEAD + len) as u64;
        Ok(())
    }
}

/// Reads records and puts stages together.
#[derive(Debug)]
pub struct Receiver<R> {
    stream: R,
    page_count: u64,
    stage: Option<Checkpoint>,
    damage: Option<String>,
    payload: Vec<u8>,
    /// Bytes read.
    pub received_bytes: u64,
}

impl<R: Read> Receiver<R> {
    /// Over a blocking stream; `page_count` is the guest's RAM in pages.
    pub fn new(stream: R, page_count: u64) -> Self {
        Self {
            stream,
            page_count,
            stage: None,
            damage: None,
            payload: Vec::new(),
            received_bytes: 0,
        }
    }

    /// Blocks until live pages, a stage or a damaged stage is there.
    pub fn receive(&mut self) -> Result<Incoming, TransferError> {
        loop {
            let head = self.head()?;
            let intact = self.payload(&head)?;
            if head.kind == KIND_SYNC {
                let pages = intact
                    .then(|| parse_pages(&self.payload, self.page_count))
                    .flatten();
                return match pages {
                    Some(pages) => Ok(Incoming::Sync(pages)),
                    // Nothing would ever repair it: the sender believes it has arrived.
                    None => Err(TransferError::Stream(
                        "damaged synchronisation pages".to_owned(),
                    )),
                };
            }
            if !intact {
                self.damage
                    .get_or_insert(format!("record of kind {} has a wrong checksum", head.kind));
            }
            if let Some(incoming) = self.stage_record(&head, intact) {
                return Ok(incoming);
            }
        }
    }

    fn stage_record(&mut self, head: &Head, intact: bool) -> Option<Incoming> {
        if head.kind == KIND_BEGIN {
            self.damage = (!intact).then(|| "damaged begin".to_owned());
            let (generation, epoch) = (head.generation, head.epoch);
            self.stage = Some(Checkpoint {
                generation,
                epoch,
                ..Checkpoint::default()
            });
            return None;
        }
        let stage = self.stage.as_mut()?;
        if (head.generation, head.epoch) != (stage.generation, stage.epoch) {
            self.damage.get_or_insert(format!(
                "record of epoch {} inside {}",
                head.epoch, stage.epoch
            ));
        }
        match head.kind {
            _ if !intact => {}
            KIND_STATE => match parse_state(&self.payload) {
                Some(state) => stage.states.push(state),
                None => drop(
                    self.damage
                        .get_or_insert("state record too short".to_owned()),
                ),
            },
            KIND_PAGES => match parse_pages(&self.payload, self.page_count) {
                Some(pages) => {
                    stage.pages.numbers.extend_from_slice(&pages.numbers);
                    stage.pages.data.extend_from_slice(&pages.data);
                }
                None => drop(
                    self.damage
                        .get_or_insert("page record makes no sense".to_owned()),
                ),
            },
            KIND_END => {
                let counts = [stage.states.len() as u64, stage.pages.numbers.len() as u64];
                let counts = counts.map(u64::to_le_bytes).concat();
                if self.payload != counts {
                    self.damage.get_or_insert("records are missing".to_owned());
                }
            }
            other => drop(
                self.damage
                    .get_or_insert(format!("unknown record kind {other}")),
            ),
        }
        if head.kind != KIND_END {
            return None;
        }
        let stage = self.stage.take()?;
        Some(match self.damage.take() {
            Some(reason) => Incoming::Damaged {
                epoch: stage.epoch,
                reason,
            },
            None => Incoming::Stage(Box::new(stage)),
        })
    }

    fn head(&mut self) -> Result<Head, TransferError> {
        let mut head = [0u8; HEAD];
        self.stream.read_exact(&mut head)?;
        self.received_bytes += HEAD as u64;
        let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let u32_at = |at| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if head[..4] != MAGIC || crc32fast::hash(&head[..36]) != u32_at(36) {
            return Err(TransferError::Stream("damaged record head".to_owned()));
        }
        if u16_at(4) != VERSION {
            let reason = format!("record version {} of the peer, {VERSION} here", u16_at(4));
            return Err(TransferError::Stream(reason));
        }
        let len = u32_at(8) as usize;
        if len > PAYLOAD_MAX {
            return Err(TransferError::Stream(format!("record of {len} bytes")));
        }
        Ok(Head {
            kind: u16_at(6),
            len,
            generation: u64_at(16),
            epoch: u64_at(24),
            payload_crc: u32_at(32),
        })
    }

    fn payload(&mut self, head: &Head) -> Result<bool, TransferError> {
        self.payload.resize(head.len, 0);
        self.stream.read_exact(&mut self.payload)?;
        self.received_bytes += head.len as u64;
        Ok(crc32fast::hash(&self.payload) == head.payload_crc)
    }
}

struct Head {
    kind: u16,
    len: usize,
    generation: u64,
    epoch: u64,
    payload_crc: u32,
}

fn parse_state(payload: &[u8]) -> Option<State> {
    let (ids, bytes) = payload.split_at_checked(4)?;
    let kind = u16::from_le_bytes([ids[0], ids[1]]);
    let index = u16::from_le_bytes([ids[2], ids[3]]);
    Some(State {
        kind,
        index,
        bytes: bytes.to_vec(),
    })
}

fn parse_pages(payload: &[u8], page_count: u64) -> Option<PageSet> {
    let word = |b: &[u8]| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
    let (count, rest) = payload.split_at_checked(8)?;
    let count = usize::try_from(word(count))
        .ok()
        .filter(|&n| n <= PAGES_PER_RECORD)?;
    let (numbers, data) = rest.split_at_checked(count * 8)?;
    let numbers = numbers.chunks_exact(8).map(word).collect();
    let pages = PageSet {
        numbers,
        data: data.to_vec(),
    };
    pages.is_consistent(page_count).then_some(pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint() -> Checkpoint {
        let mut pages = PageSet::default();
        for n in 0..700u64 {
            pages.push_with(n, |b| b.fill((n % 5) as u8));
        }
        let state = |kind: StateKind, index| State {
            kind: kind as u16,
            index,
            bytes: vec![9; 77],
        };
        Checkpoint {
            generation: 3,
            epoch: 12,
            states: vec![
                state(StateKind::Pending, 1),
                state(StateKind::Pending, 0),
                state(StateKind::Vcpu, 0),
            ],
            pages,
        }
    }

    fn bytes_of(checkpoint: &Checkpoint) -> Vec<u8> {
        let mut sender = Sender::new(Vec::new());
        sender.stage(checkpoint, || {}).unwrap();
        sender.stream
    }

    #[test]
    fn a_checkpoint_arrives_as_it_was_sent() {
        let bytes = bytes_of(&checkpoint());
        let mut receiver = Receiver::new(bytes.as_slice(), 700);
        match receiver.receive().unwrap() {
            Incoming::Stage(stage) => assert_eq!(*stage, checkpoint()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn rule_13_a_page_outside_ram_is_refused_before_the_commit_point() {
        let bytes = bytes_of(&checkpoint());
        let mut receiver = Receiver::new(bytes.as_slice(), 699);
        assert!(matches!(
            receiver.receive().unwrap(),
            Incoming::Damaged { epoch: 12, .. }
        ));
    }

    #[test]
    fn invariant_3_a_cut_at_any_byte_gives_no_stage() {
        let mut small = checkpoint();
        small.pages.numbers.truncate(3);
        small.pages.data.truncate(2 * PAGE_BYTES);
        let bytes = bytes_of(&small);
        for n in (0..bytes.len()).step_by(13) {
            let mut receiver = Receiver::new(&bytes[..n], 700);
            assert!(
                matches!(receiver.receive(), Err(TransferError::Io(_))),
                "cut at {n}"
            );
        }
    }

    #[test]
    fn damage_spoils_one_checkpoint_or_breaks_the_stream_but_never_passes() {
        let mut small = checkpoint();
        small.pages.numbers.truncate(2);
        small.pages.data.truncate(PAGE_BYTES);
        let bytes = bytes_of(&small);
        let mut spoilt = 0;
        for at in (0..bytes.len()).step_by(7) {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            damaged.extend_from_slice(&bytes);
            let mut receiver = Receiver::new(damaged.as_slice(), 700);
            match receiver.receive() {
                Ok(Incoming::Damaged { .. }) => {
                    spoilt += 1;
                    // The next checkpoint on the same stream is whole again.
                    assert!(
                        matches!(receiver.receive(), Ok(Incoming::Stage(_))),
                        "after {at}"
                    );
                }
                Ok(Incoming::Stage(stage)) => panic!("damage at {at} passed: {stage:?}"),
                Ok(Incoming::Sync(_)) => panic!("damage became a synchronisation"),
                Err(TransferError::Stream(_)) => {}
                Err(e) => panic!("at {at}: {e}"),
            }
        }
        assert!(spoilt > 100);
    }
}
