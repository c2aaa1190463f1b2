//! Fixed little-endian records with a magic, a version and a length.
//!
//! Invariants: reading never panics and never trusts a length; what is left over is an error.
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
    /// A field has a value it cannot have.
    #[error("{what} record: bad {field}")]
    Field {
        /// Which record.
        what: &'static str,
        /// Which field.
        field: &'static str,
    },
}

/// Kind of a record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) magic: [u8; 4],
    pub(crate) version: u32,
}

/// Bytes of the header: magic, version, length of all.
const HEADER: usize = 12;

/// Writes one record.
#[derive(Debug)]
pub(crate) struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn new(kind: Kind) -> Self {
        let mut writer = Self(Vec::with_capacity(8192));
        writer.bytes(&kind.magic);
        writer.u32(kind.version);
        writer.u32(0);
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

    pub(crate) fn finish(mut self) -> Vec<u8> {
        let len = self.0.len() as u32;
        self.0[8..HEADER].copy_from_slice(&len.to_le_bytes());
        self.0
    }
}

/// Reads one record.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    name: &'static str,
    rest: &'a [u8],
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
