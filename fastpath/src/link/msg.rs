//! The messages of the packet channel, as bytes.
//!
//! A message is `len:u32 kind:u8 0 0 0 epoch:u64 seq:u64 body`, little-endian; `len` counts the body. The bytes are the
//! same on a stream and in datagrams. Kinds that this version does not know are skipped (rule 22).
//!
//! Does not interpret frames.

use super::digests::DIGESTS_MAX;

/// Bytes before the body.
pub const HEAD_BYTES: usize = 24;
/// Longest body in bytes: a jumbo frame, or a list of sequence numbers.
pub const BODY_MAX: usize = 64 << 10;
/// Bytes of a key.
const KEY_BYTES: usize = 16;
/// Shortest frame: an Ethernet header.
const FRAME_MIN: usize = 14;

/// A message of the packet channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PacketMsg<'a> {
    /// Primary to secondary: a frame the PVM got (rule 4).
    Input {
        /// Epoch it was delivered in.
        epoch: u64,
        /// Its place in the order of delivery.
        seq: u64,
        /// From the Ethernet header on.
        frame: &'a [u8],
    },
    /// Secondary to primary: all input up to here is kept (rule 5).
    InputAck {
        /// The last sequence number covered.
        up_to: u64,
    },
    /// Secondary to primary: a frame the SVM sent, in the PVM's space.
    Output {
        /// The SVM's epoch.
        epoch: u64,
        /// Names it in `Released`.
        seq: u64,
        /// From the Ethernet header on.
        frame: &'a [u8],
    },
    /// Primary to secondary: these outputs have left (rule 9).
    Released {
        /// Sequence numbers of outputs, 8 bytes each, little-endian.
        seqs: &'a [u8],
    },
    /// Primary to secondary: the pending output of this checkpoint has left (rule 12).
    PendingReleased {
        /// The checkpoint's epoch.
        epoch: u64,
    },
    /// Secondary to primary: the SVM has consumed its backlog (rule 9).
    CaughtUp {
        /// The SVM's epoch.
        epoch: u64,
    },
    /// Secondary to primary: a limit here needs a checkpoint.
    CheckpointWanted,
    /// Secondary to primary: frames the SVM sent, their payloads as keyed digests. The frames themselves stay with
    /// the secondary until they are reported released or fetched.
    Digests {
        /// The SVM's epoch.
        epoch: u64,
        /// As [`super::DigestWriter`] packs them.
        entries: &'a [u8],
    },
    /// Primary to secondary: send this output as a frame after all.
    Fetch {
        /// The output.
        seq: u64,
    },
    /// Primary to secondary: from now on send digests of payloads, keyed like this.
    DigestKey {
        /// The key.
        key: [u8; 16],
    },
}

/// Bytes that are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("message kind {kind} with {len} bytes makes no sense; versions differ or data is damaged")]
pub struct Malformed {
    /// Kind field.
    pub kind: u8,
    /// Length field.
    pub len: usize,
}

/// What stands before a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) kind: u8,
    pub(super) epoch: u64,
    pub(super) seq: u64,
    pub(super) len: usize,
}

impl Head {
    pub(super) fn to_bytes(self) -> [u8; HEAD_BYTES] {
        let mut out = [0; HEAD_BYTES];
        out[..4].copy_from_slice(&(self.len as u32).to_le_bytes());
        out[4] = self.kind;
        out[8..16].copy_from_slice(&self.epoch.to_le_bytes());
        out[16..24].copy_from_slice(&self.seq.to_le_bytes());
        out
    }

    /// False for kinds of later versions, which are skipped (rule 22).
    pub(super) fn is_known(&self) -> bool {
        self.kind < 11
    }

    pub(super) fn malformed(&self) -> Malformed {
        Malformed {
            kind: self.kind,
            len: self.len,
        }
    }

    /// The head at the start of `bytes` if it is there whole.
    pub(super) fn read(bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let Some(head) = bytes.get(..HEAD_BYTES) else {
            return Ok(None);
        };
        let len = u32_at(head, 0) as usize;
        let kind = head[4];
        if len > BODY_MAX {
            return Err(Malformed { kind, len });
        }
        let (epoch, seq) = (u64_at(head, 8), u64_at(head, 16));
        Ok(Some(Self {
            kind,
            epoch,
            seq,
            len,
        }))
    }
}

/// A message in two pieces: what was made of its fields, and what lies elsewhere.
#[derive(Debug)]
pub(super) struct Encoded<'a> {
    head: [u8; HEAD_BYTES + KEY_BYTES],
    head_len: usize,
    pub(super) body: &'a [u8],
}

impl Encoded<'_> {
    pub(super) fn head(&self) -> &[u8] {
        &self.head[..self.head_len]
    }
}

impl<'a> PacketMsg<'a> {
    pub(super) fn encode(&self) -> Encoded<'a> {
        let (kind, epoch, seq, body): (u8, u64, u64, &[u8]) = match *self {
            Self::Input { epoch, seq, frame } => (1, epoch, seq, frame),
            Self::InputAck { up_to } => (2, 0, up_to, &[]),
            Self::Output { epoch, seq, frame } => (3, epoch, seq, frame),
            Self::Released { seqs } => (4, 0, 0, seqs),
            Self::PendingReleased { epoch } => (5, epoch, 0, &[]),
            Self::CaughtUp { epoch } => (6, epoch, 0, &[]),
            Self::CheckpointWanted => (7, 0, 0, &[]),
            Self::Digests { epoch, entries } => (8, epoch, 0, entries),
            Self::Fetch { seq } => (9, 0, seq, &[]),
            Self::DigestKey { .. } => (10, 0, 0, &[]),
        };
        let mut head = [0; HEAD_BYTES + KEY_BYTES];
        let mut head_len = HEAD_BYTES;
        if let Self::DigestKey { key } = self {
            head_len += KEY_BYTES;
            head[HEAD_BYTES..].copy_from_slice(key);
        }
        let len = head_len - HEAD_BYTES + body.len();
        let fixed = Head {
            kind,
            epoch,
            seq,
            len,
        };
        head[..HEAD_BYTES].copy_from_slice(&fixed.to_bytes());
        Encoded {
            head,
            head_len,
            body,
        }
    }

    /// The message that `head` and `body` make, if its kind [`is known`](Head::is_known).
    pub(super) fn decode(head: Head, body: &'a [u8]) -> Result<Self, Malformed> {
        let Head {
            kind,
            epoch,
            seq,
            len,
        } = head;
        let frame = body;
        Ok(match kind {
            1 if len >= FRAME_MIN => Self::Input { epoch, seq, frame },
            2 => Self::InputAck { up_to: seq },
            3 if len >= FRAME_MIN => Self::Output { epoch, seq, frame },
            4 if len.is_multiple_of(8) => Self::Released { seqs: body },
            5 => Self::PendingReleased { epoch },
            6 => Self::CaughtUp { epoch },
            7 => Self::CheckpointWanted,
            // More than a writer packs, each with a slot for its headers, might be more than there are slots.
            8 if len <= DIGESTS_MAX => Self::Digests {
                epoch,
                entries: body,
            },
            9 => Self::Fetch { seq },
            10 if len == KEY_BYTES => {
                let mut key = [0; KEY_BYTES];
                key.copy_from_slice(body);
                Self::DigestKey { key }
            }
            _ => return Err(Malformed { kind, len }),
        })
    }
}

/// Reads `bytes[at..at + 4]`, which must be there.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Reads `bytes[at..at + 8]`, which must be there.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(msg: &PacketMsg<'_>) -> Vec<u8> {
        let encoded = msg.encode();
        [encoded.head(), encoded.body].concat()
    }

    fn read(bytes: &[u8]) -> Result<PacketMsg<'_>, Malformed> {
        let head = Head::read(bytes)?.unwrap();
        assert_eq!(head.len, bytes.len() - HEAD_BYTES);
        PacketMsg::decode(head, &bytes[HEAD_BYTES..])
    }

    #[test]
    fn what_was_written_is_read() {
        let frame = [7; 60];
        let (epoch, seq) = (u64::MAX - 1, 0x1122_3344_5566_7788);
        for msg in [
            PacketMsg::Input {
                epoch,
                seq,
                frame: &frame,
            },
            PacketMsg::InputAck { up_to: seq },
            PacketMsg::Output {
                epoch,
                seq,
                frame: &frame,
            },
            PacketMsg::Released { seqs: &frame[..56] },
            PacketMsg::PendingReleased { epoch },
            PacketMsg::CaughtUp { epoch },
            PacketMsg::CheckpointWanted,
            PacketMsg::Digests {
                epoch,
                entries: &frame[..54],
            },
            PacketMsg::Fetch { seq },
            PacketMsg::DigestKey { key: [9; 16] },
        ] {
            assert_eq!(read(&whole(&msg)), Ok(msg));
        }
    }

    #[test]
    fn what_is_too_short_or_too_long_is_no_message() {
        let head = |kind, len: u32| {
            let mut bytes = vec![0; HEAD_BYTES + len as usize];
            bytes[..4].copy_from_slice(&len.to_le_bytes());
            bytes[4] = kind;
            bytes
        };
        let digests = DIGESTS_MAX as u32 + 1;
        for (kind, len) in [(0, 0), (1, 13), (3, 0), (4, 12), (8, digests), (10, 15)] {
            let bytes = head(kind, len);
            let len = len as usize;
            assert_eq!(read(&bytes), Err(Malformed { kind, len }));
        }
        let mut long = head(200, 0);
        long[..4].copy_from_slice(&(BODY_MAX as u32 + 1).to_le_bytes());
        assert!(Head::read(&long).is_err());
        assert_eq!(Head::read(&long[..HEAD_BYTES - 1]), Ok(None));
        let later = Head::read(&head(200, 5)).unwrap().unwrap();
        assert!(!later.is_known(), "a later kind is skipped");
    }
}
