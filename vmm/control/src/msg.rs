//! The messages of the control channel and their bytes.
//!
//! A message is `len:u32 kind:u16 version:u16 generation:u64 epoch:u64 body crc:u32`, little-endian; `len` counts
//! what follows it. Unknown kinds are skipped, bytes behind a known body are ignored (rule 22). The generation
//! travels in every message; an older one is refused by the receiver (rule 18).

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

/// Oldest protocol version that this build speaks.
pub const VERSION_MIN: u16 = 1;
/// Newest protocol version that this build speaks. Since 2 an abort by the primary is answered by the secondary, and
/// the SVM can be told to stand still after a commit. Since 3 the secondary takes pages apart from their records. Since 4 it
/// leaves out what is clear of the dirty bitmap that it tells.
pub const VERSION_MAX: u16 = 4;
/// First version in which [`Msg::Aborted`] of the primary has an answer.
pub const VERSION_ABORT_ANSWERED: u16 = 2;
/// First version in which whole pages lie behind the records of a page chunk, outside its checksum.
pub const VERSION_BULK: u16 = 3;
/// First version in which [`Msg::SvmStopped`] has only the words of the bitmap that are not 0.
pub const VERSION_SPARSE: u16 = 4;
/// Longest message in bytes: the dirty bitmap of 2 TiB of guest RAM, or of somewhat less if most of it is set.
pub const LEN_MAX: usize = 64 << 20;

/// After the commit the SVM stands still.
const FLAG_HALT: u16 = 1;

const HEAD: usize = 2 + 2 + 8 + 8;
const CRC: usize = 4;

/// What both hosts must agree on, as named values (`ram_bytes`, `cpuid`, `net0.mac`, ...).
pub type Geometry = Vec<(String, String)>;

/// What a host that has none of something says of it in its [`Geometry`]; an older peer does not name it at all (rule 22).
pub const NOTHING: &str = "none";

/// In the [`Geometry`] of a `Hello`: the secondary's name at the arbiter, where the two must differ (rule 18). An older
/// peer does not tell it.
pub const HOLDER: &str = "replication.link_listen";

/// A control message.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields repeat what the variants say")]
pub enum Msg {
    /// Secondary: may I join?
    Hello {
        min: u16,
        max: u16,
        session: u64,
        geometry: Geometry,
        /// Memory for pages that come ahead of a checkpoint; 0 of a version that keeps none.
        ahead_mib: u32,
    },
    /// Primary: yes. `halt`: the SVM does not run after the first commit (Remus mode).
    Welcome {
        version: u16,
        generation: u64,
        halt: bool,
    },
    /// Either: no, for good.
    Refuse { reason: String },
    /// A sign of life, with the sender's clock.
    Heartbeat { generation: u64, sent_us: u64 },
    /// The clock of the heartbeat that is answered.
    Echo {
        generation: u64,
        sent_us: u64,
        /// Epoch of the last checkpoint that began to come in; 0: none. A version before does not tell.
        begun_epoch: Option<u64>,
    },
    /// Primary: stop the SVM, this epoch ends. `halt`: it does not run after the commit either (Remus mode).
    StopSvm {
        generation: u64,
        epoch: u64,
        halt: bool,
    },
    /// Secondary: stopped; the pages it dirtied, in bytes of the negotiated version that the shells know.
    SvmStopped {
        generation: u64,
        epoch: u64,
        dirty: Vec<u8>,
    },
    /// Secondary: the stage is whole and accepted (rule 13).
    Committed { generation: u64, epoch: u64 },
    /// Primary: this checkpoint is to be off. Secondary: it is off, by its own decision or as asked. Who is past the
    /// commit point says [`Self::Committed`] instead. Of epoch 0, either: the link is given up though both
    /// hosts live, and the primary asks the arbiter first (`farewell`).
    Aborted {
        generation: u64,
        epoch: u64,
        reason: String,
    },
    /// Primary: the arbiter has this pair, under this generation.
    Paired { generation: u64 },
    /// Primary: the VM was shut down.
    Off { generation: u64 },
    /// Secondary: noted.
    OffAck { generation: u64 },
}

/// Why bytes are no message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MsgError {
    /// The length field is below the smallest or above the largest message.
    Length(usize),
    /// The checksum differs.
    Checksum,
    /// The body is shorter than its kind needs, or not UTF-8 where text must be.
    Body(u16),
}

impl fmt::Display for MsgError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length(n) => write!(
                f,
                "control message of {n} bytes: the peer is not a colo of this kind"
            ),
            Self::Checksum => {
                f.write_str("control message with a wrong checksum: the link damages data")
            }
            Self::Body(kind) => write!(f, "control message of kind {kind} with a malformed body"),
        }
    }
}

impl core::error::Error for MsgError {}

impl Msg {
    /// The generation the sender is in; `None` before one is known to both.
    pub fn generation(&self) -> Option<u64> {
        match self {
            Self::Hello { .. } | Self::Refuse { .. } | Self::Welcome { .. } => None,
            Self::Heartbeat { generation, .. }
            | Self::Echo { generation, .. }
            | Self::StopSvm { generation, .. }
            | Self::SvmStopped { generation, .. }
            | Self::Committed { generation, .. }
            | Self::Aborted { generation, .. }
            | Self::Paired { generation }
            | Self::Off { generation }
            | Self::OffAck { generation } => Some(*generation),
        }
    }

    /// Appends the bytes of this message to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; 4]);
        let (kind, generation, epoch) = self.head();
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&VERSION_MAX.to_le_bytes());
        out.extend_from_slice(&generation.to_le_bytes());
        out.extend_from_slice(&epoch.to_le_bytes());
        self.encode_body(out);
        let crc = crc32fast::hash(&out[start + 4..]);
        out.extend_from_slice(&crc.to_le_bytes());
        let len = (out.len() - start - 4) as u32;
        out[start..start + 4].copy_from_slice(&len.to_le_bytes());
    }

    fn head(&self) -> (u16, u64, u64) {
        match self {
            Self::Hello { session, .. } => (1, 0, *session),
            Self::Welcome { generation, .. } => (2, *generation, 0),
            Self::Refuse { .. } => (3, 0, 0),
            Self::Heartbeat {
                generation,
                sent_us,
            } => (4, *generation, *sent_us),
            Self::Echo {
                generation,
                sent_us,
                ..
            } => (5, *generation, *sent_us),
            Self::StopSvm {
                generation, epoch, ..
            } => (6, *generation, *epoch),
            Self::SvmStopped {
                generation, epoch, ..
            } => (7, *generation, *epoch),
            Self::Committed { generation, epoch } => (8, *generation, *epoch),
            Self::Aborted {
                generation, epoch, ..
            } => (9, *generation, *epoch),
            Self::Paired { generation } => (10, *generation, 0),
            Self::Off { generation } => (11, *generation, 0),
            Self::OffAck { generation } => (12, *generation, 0),
        }
    }

    fn encode_body(&self, out: &mut Vec<u8>) {
        match self {
            Self::Hello {
                min,
                max,
                geometry,
                ahead_mib,
                ..
            } => {
                out.extend_from_slice(&min.to_le_bytes());
                out.extend_from_slice(&max.to_le_bytes());
                out.extend_from_slice(&(geometry.len() as u32).to_le_bytes());
                for (name, value) in geometry {
                    put_text(out, name);
                    put_text(out, value);
                }
                out.extend_from_slice(&ahead_mib.to_le_bytes());
            }
            Self::Welcome { version, halt, .. } => {
                out.extend_from_slice(&version.to_le_bytes());
                out.extend_from_slice(&flags(*halt).to_le_bytes());
            }
            Self::StopSvm { halt, .. } => out.extend_from_slice(&flags(*halt).to_le_bytes()),
            Self::Refuse { reason } | Self::Aborted { reason, .. } => put_text(out, reason),
            Self::SvmStopped { dirty, .. } => {
                out.extend_from_slice(&(dirty.len() as u32).to_le_bytes());
                out.extend_from_slice(dirty);
            }
            Self::Echo {
                begun_epoch: Some(begun_epoch),
                ..
            } => out.extend_from_slice(&begun_epoch.to_le_bytes()),
            _ => {}
        }
    }

    /// Takes the first message from `bytes`: the message (`None`: a kind this build does not know) and its length.
    /// `Ok(None)` when more bytes are needed.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Option<Self>, usize)>, MsgError> {
        let Some(len) = bytes.get(..4) else {
            return Ok(None);
        };
        let len = u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize;
        if !(HEAD + CRC..=LEN_MAX).contains(&len) {
            return Err(MsgError::Length(len));
        }
        let Some(record) = bytes.get(4..4 + len) else {
            return Ok(None);
        };
        let (covered, crc) = record.split_at(len - CRC);
        if crc32fast::hash(covered).to_le_bytes() != crc {
            return Err(MsgError::Checksum);
        }
        let mut body = Reader {
            bytes: covered,
            kind: 0,
        };
        let kind = body.u16()?;
        body.kind = kind;
        let _version = body.u16()?;
        let generation = body.u64()?;
        let epoch = body.u64()?;
        Ok(Some((
            Self::decode_body(kind, generation, epoch, &mut body)?,
            4 + len,
        )))
    }

    fn decode_body(
        kind: u16,
        generation: u64,
        epoch: u64,
        body: &mut Reader<'_>,
    ) -> Result<Option<Self>, MsgError> {
        Ok(Some(match kind {
            1 => {
                let (min, max) = (body.u16()?, body.u16()?);
                let mut geometry = Geometry::new();
                for _ in 0..body.u32()? {
                    geometry.push((body.text()?, body.text()?));
                }
                Self::Hello {
                    min,
                    max,
                    session: epoch,
                    geometry,
                    ahead_mib: body.added_u32()?,
                }
            }
            2 => Self::Welcome {
                version: body.u16()?,
                generation,
                halt: body.flags()? & FLAG_HALT != 0,
            },
            3 => Self::Refuse {
                reason: body.text()?,
            },
            4 => Self::Heartbeat {
                generation,
                sent_us: epoch,
            },
            5 => Self::Echo {
                generation,
                sent_us: epoch,
                begun_epoch: body.added_u64()?,
            },
            6 => Self::StopSvm {
                generation,
                epoch,
                halt: body.flags()? & FLAG_HALT != 0,
            },
            7 => {
                let n = body.u32()? as usize;
                Self::SvmStopped {
                    generation,
                    epoch,
                    dirty: body.take(n)?.to_vec(),
                }
            }
            8 => Self::Committed { generation, epoch },
            9 => Self::Aborted {
                generation,
                epoch,
                reason: body.text()?,
            },
            10 => Self::Paired { generation },
            11 => Self::Off { generation },
            12 => Self::OffAck { generation },
            _ => return Ok(None),
        }))
    }
}

const fn flags(halt: bool) -> u16 {
    if halt { FLAG_HALT } else { 0 }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u32).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

struct Reader<'a> {
    bytes: &'a [u8],
    kind: u16,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], MsgError> {
        if n > self.bytes.len() {
            return Err(MsgError::Body(self.kind));
        }
        let (head, tail) = self.bytes.split_at(n);
        self.bytes = tail;
        Ok(head)
    }

    fn u16(&mut self) -> Result<u16, MsgError> {
        let b = self.take(2)?;
        Ok(u16::from_le_bytes([b[0], b[1]]))
    }

    fn u32(&mut self) -> Result<u32, MsgError> {
        let b = self.take(4)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn u64(&mut self) -> Result<u64, MsgError> {
        let b = self.take(8)?;
        Ok(u64::from_le_bytes([
            b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7],
        ]))
    }

    /// Flags at the end of a body that the version before did not have (rule 22).
    fn flags(&mut self) -> Result<u16, MsgError> {
        if self.bytes.is_empty() {
            return Ok(0);
        }
        self.u16()
    }

    /// A number at the end of a body that the version before did not have.
    fn added_u32(&mut self) -> Result<u32, MsgError> {
        if self.bytes.is_empty() {
            return Ok(0);
        }
        self.u32()
    }

    fn added_u64(&mut self) -> Result<Option<u64>, MsgError> {
        if self.bytes.is_empty() {
            return Ok(None);
        }
        self.u64().map(Some)
    }

    fn text(&mut self) -> Result<String, MsgError> {
        let n = self.u32()? as usize;
        let bytes = self.take(n)?;
        match core::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_string()),
            Err(_) => Err(MsgError::Body(self.kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    fn all() -> Vec<Msg> {
        vec![
            Msg::Hello {
                min: 1,
                max: 3,
                session: 77,
                geometry: vec![("ram_bytes".into(), "134217728".into())],
                ahead_mib: 64,
            },
            Msg::Welcome {
                version: 1,
                generation: 3,
                halt: true,
            },
            Msg::Refuse {
                reason: "ram_bytes differs".into(),
            },
            Msg::Heartbeat {
                generation: 3,
                sent_us: 12,
            },
            Msg::Echo {
                generation: 3,
                sent_us: 12,
                begun_epoch: Some(7),
            },
            Msg::StopSvm {
                generation: 3,
                epoch: 8,
                halt: true,
            },
            Msg::SvmStopped {
                generation: 3,
                epoch: 8,
                dirty: vec![1, 2, 3],
            },
            Msg::Committed {
                generation: 3,
                epoch: 8,
            },
            Msg::Aborted {
                generation: 3,
                epoch: 8,
                reason: "checksum".into(),
            },
            Msg::Paired { generation: 4 },
            Msg::Off { generation: 4 },
            Msg::OffAck { generation: 4 },
        ]
    }

    #[test]
    fn every_message_survives_the_link_and_any_cut_waits_for_more() {
        for msg in all() {
            let mut bytes = Vec::new();
            msg.encode(&mut bytes);
            for n in 0..bytes.len() {
                assert_eq!(Msg::decode(&bytes[..n]), Ok(None), "{msg:?} cut at {n}");
            }
            assert_eq!(Msg::decode(&bytes), Ok(Some((Some(msg), bytes.len()))));
        }
    }

    #[test]
    fn a_flipped_bit_is_an_error_never_another_message() {
        for msg in all() {
            let mut bytes = Vec::new();
            msg.encode(&mut bytes);
            for bit in 0..bytes.len() * 8 {
                let mut damaged = bytes.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert!(
                    !matches!(Msg::decode(&damaged), Ok(Some((Some(_), _)))),
                    "{msg:?} with bit {bit} flipped was taken for a message"
                );
            }
        }
    }

    fn frame(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut covered = Vec::new();
        covered.extend_from_slice(&kind.to_le_bytes());
        covered.extend_from_slice(&2u16.to_le_bytes());
        covered.extend_from_slice(&[0; 16]);
        covered.extend_from_slice(body);
        let mut out = ((covered.len() + 4) as u32).to_le_bytes().to_vec();
        out.extend_from_slice(&covered);
        out.extend_from_slice(&crc32fast::hash(&covered).to_le_bytes());
        out
    }

    #[test]
    fn rule_22_bodies_of_the_version_before_are_read_without_what_was_added() {
        let (generation, epoch, halt) = (0, 0, false);
        let stop = Msg::StopSvm {
            generation,
            epoch,
            halt,
        };
        let welcome = Msg::Welcome {
            version: 1,
            generation,
            halt,
        };
        let hello = Msg::Hello {
            min: 1,
            max: 2,
            session: 0,
            geometry: vec![],
            ahead_mib: 0,
        };
        let echo = Msg::Echo {
            generation,
            sent_us: 0,
            begun_epoch: None,
        };
        let cases = [
            (5, &[][..], echo),
            (6, &[][..], stop),
            (2, &[1, 0][..], welcome),
            (1, &[1, 0, 2, 0, 0, 0, 0, 0][..], hello),
        ];
        for (kind, body, msg) in cases {
            let bytes = frame(kind, body);
            assert_eq!(Msg::decode(&bytes), Ok(Some((Some(msg), bytes.len()))));
        }
    }

    #[test]
    fn rule_22_unknown_kinds_are_skipped_and_longer_bodies_accepted() {
        let unknown = frame(999, b"news");
        assert_eq!(Msg::decode(&unknown), Ok(Some((None, unknown.len()))));
        let longer = frame(10, b"a field of the next version");
        assert_eq!(
            Msg::decode(&longer),
            Ok(Some((Some(Msg::Paired { generation: 0 }), longer.len())))
        );
    }

    #[test]
    fn garbage_is_refused_at_once() {
        assert_eq!(Msg::decode(b"GET / HT"), Err(MsgError::Length(0x2054_4547)));
    }
}
