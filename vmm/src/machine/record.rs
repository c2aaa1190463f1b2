//! Fixed little-endian records with a magic, a version, a length and a checksum, and sections in them.
//!
//! Invariants: reading never panics and never trusts a length; a record that is cut or has any byte
//! changed is refused before a field of it is used; what is left over is an error. A section that
//! this program does not know is skipped if whoever wrote it says that it may be (rule 22), else
//! refused by its number.
//!
//! Does not know what is in a record.

/// A record cannot be read. Nothing of it has been applied.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Another kind of record.
    #[error("not a {0} record")]
    Magic(&'static str),
    /// Another version.
    #[error("{what} record of version {found}; this program reads version {known}")]
    Version {
        /// Which record.
        what: &'static str,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// It ends early, or goes on, or says another length than it has.
    #[error("{0} record of a wrong length")]
    Length(&'static str),
    /// Its checksum does not fit its bytes.
    #[error("{0} record is damaged: its checksum is wrong")]
    Damaged(&'static str),
    /// A field has a value it cannot have.
    #[error("{what} record: bad {field}")]
    Field {
        /// Which record.
        what: &'static str,
        /// Which field.
        field: &'static str,
    },
    /// A section of a later version that may not be left out.
    #[error("{what} record: section {tag} is needed and not known here; update this program")]
    UnknownSection {
        /// Which record.
        what: &'static str,
        /// Number of the section.
        tag: u16,
    },
    /// A section of another version.
    #[error("{what} record: section {tag} is of version {found}; this program reads version 1")]
    SectionVersion {
        /// Which record.
        what: &'static str,
        /// Number of the section.
        tag: u16,
        /// Its version.
        found: u8,
    },
    /// A section that every record has.
    #[error("{what} record: lacks {section}")]
    Lacks {
        /// Which record.
        what: &'static str,
        /// Which section.
        section: &'static str,
    },
    /// The record is whole, but not for this machine (rule 22).
    #[error("{what} record: {field} is {theirs}, here it is {ours}")]
    Unfit {
        /// Which record.
        what: &'static str,
        /// What differs.
        field: String,
        /// In the record.
        theirs: String,
        /// In this machine.
        ours: String,
    },
}

/// Kind of a record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
}

/// Bytes of the header: magic, version, length of all, checksum of all but itself.
const HEADER: usize = 16;
const LENGTH_AT: usize = 8;
const CHECKSUM_AT: usize = 12;

/// Bytes before a section: number (16 bits), version and flags (8 each), length of the rest (32).
const SECTION_HEADER: usize = 8;
/// The only version of a section so far.
const SECTION_VERSION: u8 = 1;
/// Flag of a section that a reader who does not know it may skip.
const SKIPPABLE: u8 = 1;

/// Writes one record.
#[derive(Debug)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn new(kind: Kind) -> Self {
        Self::reuse(kind, Vec::with_capacity(8192))
    }

    /// Takes the memory of `buffer`; what is in it is lost.
    pub(crate) fn reuse(kind: Kind, mut buffer: Vec<u8>) -> Self {
        buffer.clear();
        let mut writer = Self(buffer);
        writer.bytes(&kind.magic);
        writer.u32(kind.version);
        writer.u64(0);
        writer
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// A section that every reader must know.
    pub(crate) fn section(&mut self, tag: u16, write: impl FnOnce(&mut Self)) {
        self.section_with(tag, 0, write);
    }

    /// A section that a reader who does not know it skips (rule 22).
    pub(crate) fn skippable_section(&mut self, tag: u16, write: impl FnOnce(&mut Self)) {
        self.section_with(tag, SKIPPABLE, write);
    }

    fn section_with(&mut self, tag: u16, flags: u8, write: impl FnOnce(&mut Self)) {
        self.u16(tag);
        self.u8(SECTION_VERSION);
        self.u8(flags);
        let length_at = self.0.len();
        self.u32(0);
        write(self);
        let len = (self.0.len() - length_at - 4) as u32;
        self.0[length_at..length_at + 4].copy_from_slice(&len.to_le_bytes());
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        seal(&mut self.0);
        self.0
    }
}

/// Puts length and checksum into a record's header.
pub(crate) fn seal(record: &mut [u8]) {
    let len = record.len() as u32;
    record[LENGTH_AT..CHECKSUM_AT].copy_from_slice(&len.to_le_bytes());
    let sum = checksum(record);
    record[CHECKSUM_AT..HEADER].copy_from_slice(&sum.to_le_bytes());
}

fn checksum(record: &[u8]) -> u32 {
    let mut hash = crc32fast::Hasher::new();
    hash.update(&record[..CHECKSUM_AT]);
    hash.update(&record[HEADER..]);
    hash.finalize()
}

/// Reads one record.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    name: &'static str,
    rest: &'a [u8],
}

/// One section of a record, of a version that is known.
#[derive(Debug)]
pub(crate) struct Section<'a> {
    pub(crate) tag: u16,
    skippable: bool,
    pub(crate) body: Reader<'a>,
}

impl Section<'_> {
    /// What becomes of a section that nobody knows.
    pub(crate) fn unknown(&self) -> Result<(), RecordError> {
        match self.skippable {
            true => Ok(()),
            false => Err(RecordError::UnknownSection {
                what: self.body.name,
                tag: self.tag,
            }),
        }
    }
}

impl<'a> Reader<'a> {
    pub(crate) fn new(kind: Kind, bytes: &'a [u8]) -> Result<Self, RecordError> {
        let mut reader = Self {
            name: kind.name,
            rest: bytes,
        };
        if reader.array()? != kind.magic {
            return Err(RecordError::Magic(kind.name));
        }
        let found = reader.u32()?;
        if found != kind.version {
            return Err(RecordError::Version {
                what: kind.name,
                found,
                known: kind.version,
            });
        }
        if reader.u32()? as usize != bytes.len() {
            return Err(RecordError::Length(kind.name));
        }
        if reader.u32()? != checksum(bytes) {
            return Err(RecordError::Damaged(kind.name));
        }
        Ok(reader)
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], RecordError> {
        let (taken, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(RecordError::Length(self.name))?;
        self.rest = rest;
        Ok(taken)
    }

    /// All that is left.
    pub(crate) fn take_rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Whether nothing is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next section, `None` at the end.
    pub(crate) fn section(&mut self) -> Result<Option<Section<'a>>, RecordError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let mut header = Reader {
            name: self.name,
            rest: self.take(SECTION_HEADER)?,
        };
        let (tag, version, flags) = (header.u16()?, header.u8()?, header.u8()?);
        let len = header.u32()?;
        let rest = self.take(len as usize)?;
        let skippable = flags & SKIPPABLE != 0;
        if version != SECTION_VERSION && !skippable {
            return Err(RecordError::SectionVersion {
                what: self.name,
                tag,
                found: version,
            });
        }
        let (name, body) = (self.name, rest);
        Ok(Some(Section {
            // A later version of a section that may be skipped is as one that is not known.
            tag: if version == SECTION_VERSION { tag } else { 0 },
            skippable,
            body: Reader { name, rest: body },
        }))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], RecordError> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| RecordError::Length(self.name))
    }

    pub(crate) fn u8(&mut self) -> Result<u8, RecordError> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, RecordError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, RecordError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, RecordError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A number that is 0 or 1.
    pub(crate) fn flag(&mut self, field: &'static str) -> Result<bool, RecordError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.bad(field)),
        }
    }

    /// A structure of the KVM API, which is little-endian on this architecture.
    pub(crate) fn plain<T: zerocopy::FromBytes>(&mut self) -> Result<T, RecordError> {
        let bytes = self.take(size_of::<T>())?;
        T::read_from_bytes(bytes).map_err(|_| RecordError::Length(self.name))
    }

    pub(crate) fn bad(&self, field: &'static str) -> RecordError {
        RecordError::Field {
            what: self.name,
            field,
        }
    }

    pub(crate) fn finish(self) -> Result<(), RecordError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(RecordError::Length(self.name))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind {
        name: "test",
        magic: *b"TEST",
        version: 3,
    };

    fn record() -> Vec<u8> {
        let mut writer = Writer::reuse(KIND, vec![9; 100]);
        writer.section(1, |w| w.u64(7));
        writer.skippable_section(200, |w| w.bytes(b"later"));
        writer.section(2, |_| {});
        writer.finish()
    }

    fn tags(record: &[u8]) -> Result<Vec<u16>, RecordError> {
        let mut reader = Reader::new(KIND, record)?;
        let mut tags = Vec::new();
        while let Some(section) = reader.section()? {
            match section.tag {
                1 | 2 => tags.push(section.tag),
                _ => section.unknown()?,
            }
        }
        reader.finish()?;
        Ok(tags)
    }

    #[test]
    fn rule_22_sections_that_may_be_skipped_are_skipped_and_others_refused_by_number() {
        assert_eq!(tags(&record()).unwrap(), [1, 2]);
        let mut writer = Writer::new(KIND);
        writer.section(77, |w| w.u8(1));
        let refused = tags(&writer.finish()).unwrap_err();
        assert!(refused.to_string().contains("section 77"), "{refused}");
        let mut newer = record();
        newer[HEADER + 2] = 9;
        seal(&mut newer);
        let refused = tags(&newer).unwrap_err();
        assert!(refused.to_string().contains("version 9"), "{refused}");
    }

    #[test]
    fn every_damaged_bit_and_every_cut_is_refused() {
        let good = record();
        for len in 0..good.len() {
            assert!(tags(&good[..len]).is_err(), "cut at {len}");
        }
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(tags(&bad).is_err(), "bit {bit}");
        }
        let mut longer = good.clone();
        longer.push(0);
        assert_eq!(tags(&longer), Err(RecordError::Length("test")));
        seal(&mut longer);
        assert_eq!(tags(&longer), Err(RecordError::Length("test")));
    }
}
