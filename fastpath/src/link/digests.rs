//! Digests of output, packed: what an entry says of a frame's headers is how they differ from those of an earlier
//! frame of the same flow.
//!
//! An entry is `flags:u8 place:u8 header_len:u8 [seq:u64] [payload_len:u16] headers digest:u128`, little-endian. `headers`
//! are the bytes themselves ([`WHOLE`]), or a bitmap of the bytes that differ from the ones last seen at `place`, and
//! these bytes. Both ends remember the same [`PLACES`] headers, which needs a channel that keeps order and loses
//! nothing. 1400 bytes of payload take about 40 on the link.
//!
//! Invariants: nothing allocates after `new`; whatever arrives, the reader answers with an entry or an error.
//!
//! Does not compare.

use super::msg::u64_at;

/// Headers that both ends remember.
const PLACES: usize = 64;
/// Longest headers that an entry takes.
pub const HEADERS_MAX: usize = colo_compare::DIGEST_HEADERS_MAX;
/// Longest entry.
const ENTRY_MAX: usize = 3 + 8 + 2 + HEADERS_MAX + HEADERS_MAX / 8 + 16;
/// Shortest entry: headers without a difference.
pub const DIGEST_MIN: usize = 3 + 16;
/// Bytes of a full message.
pub const DIGESTS_MAX: usize = 4096;

/// The headers stand there whole.
const WHOLE: u8 = 1;
/// The number is given; without it, it is the one after the last.
const NUMBERED: u8 = 2;
/// The payload's length is given; without it, it is that of the last entry at the place.
const SIZED: u8 = 4;

/// A digest in the place of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest<'a> {
    /// The output's number.
    pub seq: u64,
    /// From the Ethernet header up to the payload.
    pub header: &'a [u8],
    /// Bytes of payload.
    pub payload_len: u16,
    /// Their keyed digest.
    pub digest: u128,
}

/// An entry that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("entry {0} of a list of digests makes no sense; versions differ or data is damaged")]
pub struct BadEntry(usize);

#[derive(Clone, Copy, Debug)]
struct Remembered {
    header: [u8; HEADERS_MAX],
    len: u8,
    payload_len: u16,
}

#[derive(Debug)]
struct Memory {
    places: Box<[Remembered]>,
    last_seq: u64,
}

impl Memory {
    fn new() -> Self {
        let nothing = Remembered {
            header: [0; HEADERS_MAX],
            len: 0,
            payload_len: 0,
        };
        Self {
            places: vec![nothing; PLACES].into_boxed_slice(),
            last_seq: 0,
        }
    }

    fn remember(&mut self, place: usize, digest: &Digest<'_>) {
        let remembered = &mut self.places[place];
        remembered.header[..digest.header.len()].copy_from_slice(digest.header);
        remembered.len = digest.header.len() as u8;
        remembered.payload_len = digest.payload_len;
        self.last_seq = digest.seq;
    }
}

/// Packs digests into messages.
#[derive(Debug)]
pub struct DigestWriter {
    memory: Memory,
    epoch: u64,
    out: Vec<u8>,
}

impl Default for DigestWriter {
    fn default() -> Self {
        Self {
            memory: Memory::new(),
            epoch: 0,
            out: Vec::with_capacity(DIGESTS_MAX),
        }
    }
}

impl DigestWriter {
    /// Whether a digest of this epoch can be added to what is collected; if not, that must be sent first.
    pub fn has_room(&self, epoch: u64) -> bool {
        self.out.is_empty() || (self.epoch == epoch && self.out.len() + ENTRY_MAX <= DIGESTS_MAX)
    }

    /// Adds a digest. Its headers are at most [`colo_compare::DIGEST_HEADERS_MAX`] bytes long, and there is room.
    pub fn push(&mut self, epoch: u64, digest: &Digest<'_>) {
        self.epoch = epoch;
        let place = place_of(digest.header);
        let known = &self.memory.places[place];
        let is_whole = usize::from(known.len) != digest.header.len();
        let is_numbered = digest.seq != self.memory.last_seq.wrapping_add(1);
        let is_sized = is_whole || known.payload_len != digest.payload_len;
        let mut flags = 0;
        for (set, flag) in [
            (is_whole, WHOLE),
            (is_numbered, NUMBERED),
            (is_sized, SIZED),
        ] {
            flags |= if set { flag } else { 0 };
        }
        self.out
            .extend([flags, place as u8, digest.header.len() as u8]);
        if is_numbered {
            self.out.extend(digest.seq.to_le_bytes());
        }
        if is_sized {
            self.out.extend(digest.payload_len.to_le_bytes());
        }
        if is_whole {
            self.out.extend_from_slice(digest.header);
        } else {
            push_changes(&mut self.out, &known.header, digest.header);
        }
        self.out.extend(digest.digest.to_le_bytes());
        self.memory.remember(place, digest);
    }

    /// What was collected since the last call, and its epoch; `None` if nothing was.
    pub fn collected(&self) -> Option<(u64, &[u8])> {
        (!self.out.is_empty()).then_some((self.epoch, &self.out[..]))
    }

    /// It is on its way.
    pub fn clear(&mut self) {
        self.out.clear();
    }
}

/// Where headers like these are remembered: one place a flow, as long as there are enough.
fn place_of(header: &[u8]) -> usize {
    // Addresses and ports of IPv4 and IPv6 without tags; other frames share places.
    let names = match header.get(12..14) {
        Some([0x08, 0x00]) => header.get(26..38),
        Some([0x86, 0xdd]) => header.get(22..58),
        _ => None,
    };
    let mix = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    let hash = names.unwrap_or(&[]).iter().fold(0x811c_9dc5, mix);
    (hash ^ hash >> 16) as usize % PLACES
}

fn push_changes(out: &mut Vec<u8>, old: &[u8], new: &[u8]) {
    let map_at = out.len();
    out.extend(std::iter::repeat_n(0, new.len().div_ceil(8)));
    for (at, (old, new)) in old.iter().zip(new).enumerate() {
        if old != new {
            out[map_at + at / 8] |= 1 << (at % 8);
            out.push(*new);
        }
    }
}

/// Reads messages of the peer's [`DigestWriter`].
#[derive(Debug)]
pub struct DigestReader {
    memory: Memory,
    header: [u8; HEADERS_MAX],
}

impl Default for DigestReader {
    fn default() -> Self {
        Self {
            memory: Memory::new(),
            header: [0; HEADERS_MAX],
        }
    }
}

impl DigestReader {
    /// Gives `take` each entry of a message, in order.
    pub fn read(
        &mut self,
        message: &[u8],
        mut take: impl FnMut(&Digest<'_>),
    ) -> Result<(), BadEntry> {
        let mut rest = message;
        let mut number = 0;
        while !rest.is_empty() {
            rest = self.entry(rest, &mut take).ok_or(BadEntry(number))?;
            number += 1;
        }
        Ok(())
    }

    /// Reads the first entry of `bytes`. Gives what is behind it.
    fn entry<'b>(
        &mut self,
        bytes: &'b [u8],
        take: &mut impl FnMut(&Digest<'_>),
    ) -> Option<&'b [u8]> {
        let (&[flags, place, len], mut rest) = bytes.split_first_chunk()?;
        let (place, len) = (usize::from(place), usize::from(len));
        let known = self.memory.places.get(place)?;
        if len > HEADERS_MAX || flags > (WHOLE | NUMBERED | SIZED) {
            return None;
        }
        let mut seq = self.memory.last_seq.wrapping_add(1);
        if flags & NUMBERED != 0 {
            (seq, rest) = (u64_at(rest.get(..8)?, 0), &rest[8..]);
        }
        let mut payload_len = known.payload_len;
        if flags & SIZED != 0 {
            let (size, behind) = rest.split_first_chunk()?;
            (payload_len, rest) = (u16::from_le_bytes(*size), behind);
        }
        if flags & WHOLE != 0 {
            self.header[..len].copy_from_slice(rest.get(..len)?);
            rest = &rest[len..];
        } else {
            if usize::from(known.len) != len {
                return None;
            }
            self.header[..len].copy_from_slice(&known.header[..len]);
            rest = apply_changes(&mut self.header[..len], rest)?;
        }
        let (digest, rest) = rest.split_first_chunk()?;
        let entry = Digest {
            seq,
            header: &self.header[..len],
            payload_len,
            digest: u128::from_le_bytes(*digest),
        };
        self.memory.remember(place, &entry);
        take(&entry);
        Some(rest)
    }
}

fn apply_changes<'b>(header: &mut [u8], bytes: &'b [u8]) -> Option<&'b [u8]> {
    let (map, mut rest) = bytes.split_at_checked(header.len().div_ceil(8))?;
    for (at, byte) in header.iter_mut().enumerate() {
        if map[at / 8] & 1 << (at % 8) != 0 {
            let (new, behind) = rest.split_first()?;
            *byte = *new;
            rest = behind;
        }
    }
    Some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(flow: u8, n: u32, len: usize) -> Vec<u8> {
        let mut header = vec![0; len];
        header[12..14].copy_from_slice(&[8, 0]);
        header[18..20].copy_from_slice(&(n as u16).to_be_bytes());
        header[33] = flow;
        header[38..42].copy_from_slice(&(n.wrapping_mul(1448)).to_be_bytes());
        header[50..52].copy_from_slice(&(n as u16).wrapping_mul(31).to_be_bytes());
        header
    }

    type Owned = (u64, u64, Vec<u8>, u16, u128);

    fn through(sent: &[Owned]) -> (Vec<Owned>, usize) {
        let (mut writer, mut reader) = (DigestWriter::default(), DigestReader::default());
        let (mut got, mut bytes) = (Vec::new(), 0);
        let mut carry = |writer: &mut DigestWriter| {
            if let Some((epoch, message)) = writer.collected() {
                bytes += message.len();
                assert!(message.len() <= DIGESTS_MAX);
                let take = |d: &Digest<'_>| {
                    got.push((epoch, d.seq, d.header.to_vec(), d.payload_len, d.digest));
                };
                reader.read(message, take).unwrap();
            }
            writer.clear();
        };
        for (epoch, seq, header, payload_len, digest) in sent {
            if !writer.has_room(*epoch) {
                carry(&mut writer);
            }
            let digest = Digest {
                seq: *seq,
                header,
                payload_len: *payload_len,
                digest: *digest,
            };
            writer.push(*epoch, &digest);
        }
        carry(&mut writer);
        (got, bytes)
    }

    #[test]
    fn a_long_stream_takes_little() {
        let sent: Vec<Owned> = (0..1000)
            .map(|n| {
                (
                    1,
                    u64::from(n) + 7,
                    header(1, n, 66),
                    1400,
                    u128::from(n) << 60,
                )
            })
            .collect();
        let (got, bytes) = through(&sent);
        assert_eq!(got, sent);
        assert!(bytes < 1000 * 1400 * 3 / 100, "{bytes} bytes");
    }

    #[test]
    fn nonsense_is_refused() {
        let mut reader = DigestReader::default();
        let mut read = |bytes: &[u8]| reader.read(bytes, |_| ()).is_err();
        assert!(read(&[0]));
        assert!(read(&[WHOLE, 64, 14]));
        assert!(read(&[0xff; 200]));
        assert!(read(&[0, 0, 66, 0, 0]), "a place that holds nothing");
        assert!(!read(&[]));
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(
            entries in prop::collection::vec(
                (1u64..3, any::<u8>(), any::<u32>(), 54usize..=HEADERS_MAX, any::<u16>(), any::<u128>()),
                1..300,
            ),
            gaps in prop::collection::vec(0u64..3, 300),
        ) {
            let mut seq = 0;
            let mut epoch = 0;
            let sent: Vec<Owned> = entries
                .into_iter()
                .zip(gaps)
                .map(|((step, flow, n, len, payload_len, digest), gap)| {
                    seq += gap;
                    epoch += step / 2;
                    (epoch, seq, header(flow, n, len), payload_len, digest)
                })
                .collect();
            let (got, _) = through(&sent);
            prop_assert_eq!(got, sent);
        }

        #[test]
        fn any_bytes_end_in_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let mut reader = DigestReader::default();
            let _ = reader.read(&bytes, |digest| assert!(digest.header.len() <= HEADERS_MAX));
        }
    }
}
