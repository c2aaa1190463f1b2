//! The parts of a snapshot file as bytes.
//!
//! Invariants: reading trusts no number before its checksum fits and its range lies in the file.
//!
//! Does not do input or output.

use crate::machine::RecordError;
use crate::machine::record::{Kind, Reader, Writer};

pub(super) const PAGE_BYTES: u64 = 4096;
pub(super) const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"COLOSNAP";
/// Of the header: its checksum is the last four bytes of its page.
const CHECKSUM_AT: usize = PAGE_BYTES as usize - 4;
/// More than any machine's states take.
const META_BYTES_MAX: u64 = 256 << 20;

/// Flag of a page that the file holds; its checksum is in the low 32 bits.
pub(super) const STORED: u64 = 1 << 63;

/// The first page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) ram_bytes: u64,
    pub(super) meta_bytes: u64,
    pub(super) table_at: u64,
    pub(super) ram_at: u64,
    pub(super) stored_pages: u64,
    pub(super) table_crc: u32,
}

/// What is wrong with a header.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HeaderError {
    NotASnapshot,
    Version(u32),
    Damaged,
}

impl Header {
    /// Lays a file out.
    pub(super) fn plan(ram_bytes: u64, meta_bytes: u64) -> Self {
        let table_at = (PAGE_BYTES + meta_bytes).next_multiple_of(PAGE_BYTES);
        let table_bytes = ram_bytes / PAGE_BYTES * 8;
        Self {
            ram_bytes,
            meta_bytes,
            table_at,
            ram_at: (table_at + table_bytes).next_multiple_of(PAGE_BYTES),
            ..Self::default()
        }
    }

    /// Length of the whole file.
    pub(super) fn file_bytes(&self) -> u64 {
        self.ram_at + self.ram_bytes
    }

    /// Length of the page table.
    pub(super) fn table_bytes(&self) -> u64 {
        self.ram_bytes / PAGE_BYTES * 8
    }

    pub(super) fn to_page(self) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE_BYTES as usize);
        page.extend_from_slice(&MAGIC);
        page.extend_from_slice(&VERSION.to_le_bytes());
        page.extend_from_slice(&self.table_crc.to_le_bytes());
        for number in [
            self.ram_bytes,
            self.meta_bytes,
            self.table_at,
            self.ram_at,
            self.stored_pages,
        ] {
            page.extend_from_slice(&number.to_le_bytes());
        }
        page.resize(CHECKSUM_AT, 0);
        let sum = crc32fast::hash(&page);
        page.extend_from_slice(&sum.to_le_bytes());
        page
    }

    /// Reads a first page, which may be shorter.
    pub(super) fn from_page(page: &[u8]) -> Result<Self, HeaderError> {
        if !page.starts_with(&MAGIC) {
            return Err(HeaderError::NotASnapshot);
        }
        let word = |at: usize| page.get(at..at + 4).and_then(|b| b.try_into().ok());
        let long = |at: usize| page.get(at..at + 8).and_then(|b| b.try_into().ok());
        let u32_at = |at| word(at).map(u32::from_le_bytes).ok_or(HeaderError::Damaged);
        let u64_at = |at| long(at).map(u64::from_le_bytes).ok_or(HeaderError::Damaged);
        let version = u32_at(8)?;
        if version != VERSION {
            return Err(HeaderError::Version(version));
        }
        let sum = page.get(..CHECKSUM_AT).map(crc32fast::hash);
        if sum != Some(u32_at(CHECKSUM_AT)?) {
            return Err(HeaderError::Damaged);
        }
        let header = Self {
            table_crc: u32_at(12)?,
            ram_bytes: u64_at(16)?,
            meta_bytes: u64_at(24)?,
            table_at: u64_at(32)?,
            ram_at: u64_at(40)?,
            stored_pages: u64_at(48)?,
        };
        header
            .is_sound()
            .then_some(header)
            .ok_or(HeaderError::Damaged)
    }

    /// Whether the parts are where they have to be.
    fn is_sound(&self) -> bool {
        let sizes = self.ram_bytes > 0
            && self.ram_bytes < 1 << 48
            && self.ram_bytes.is_multiple_of(PAGE_BYTES)
            && self.meta_bytes <= META_BYTES_MAX;
        let planned = || Self::plan(self.ram_bytes, self.meta_bytes);
        sizes && (planned().table_at, planned().ram_at) == (self.table_at, self.ram_at)
    }
}

const META: Kind = Kind {
    name: "snapshot",
    magic: *b"CSNP",
    version: 1,
};
const GEOMETRY: u16 = 1;
const VCPU: u16 = 2;
const PLATFORM: u16 = 3;
const DEVICES: u16 = 4;

/// Geometry and states.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Meta {
    /// What both machines must agree on, name and value.
    pub(super) geometry: Vec<(String, String)>,
    /// In order.
    pub(super) vcpus: Vec<Vec<u8>>,
    pub(super) platform: Vec<u8>,
    pub(super) devices: Vec<u8>,
}

impl Meta {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut writer = Writer::new(META);
        writer.section(GEOMETRY, |w| {
            for (name, value) in &self.geometry {
                w.bytes(format!("{name}={value}\n").as_bytes());
            }
        });
        for vcpu in &self.vcpus {
            writer.section(VCPU, |w| w.bytes(vcpu));
        }
        writer.section(PLATFORM, |w| w.bytes(&self.platform));
        writer.section(DEVICES, |w| w.bytes(&self.devices));
        writer.finish()
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut reader = Reader::new(META, bytes)?;
        let mut meta = Self::default();
        while let Some(mut section) = reader.section()? {
            let body = section.body.take_rest();
            match section.tag {
                GEOMETRY => {
                    let text = std::str::from_utf8(body);
                    let text = text.map_err(|_| section.body.bad("geometry"))?;
                    for line in text.lines() {
                        let (name, value) =
                            line.split_once('=').ok_or(section.body.bad("geometry"))?;
                        meta.geometry.push((name.to_owned(), value.to_owned()));
                    }
                }
                VCPU => meta.vcpus.push(body.to_vec()),
                PLATFORM => meta.platform = body.to_vec(),
                DEVICES => meta.devices = body.to_vec(),
                _ => section.unknown()?,
            }
        }
        Ok(meta)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_and_no_bit_of_it_may_change() {
        let header = Header {
            stored_pages: 7,
            table_crc: 9,
            ..Header::plan(64 << 20, 9000)
        };
        let page = header.to_page();
        assert_eq!(page.len() as u64, PAGE_BYTES);
        assert_eq!(Header::from_page(&page), Ok(header));
        for bit in 0..page.len() * 8 {
            let mut bad = page.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::from_page(&bad).is_err(), "{bit}");
        }
        for len in 0..page.len() {
            assert!(Header::from_page(&page[..len]).is_err(), "{len}");
        }
        let mut newer = page;
        newer[8] = 5;
        assert_eq!(Header::from_page(&newer), Err(HeaderError::Version(5)));
    }

    #[test]
    fn a_header_that_points_elsewhere_is_damaged_whatever_its_checksum() {
        for wrong in [
            Header {
                ram_bytes: 4097,
                ..Header::plan(64 << 20, 100)
            },
            Header {
                ram_at: 0,
                ..Header::plan(64 << 20, 100)
            },
            Header::plan(64 << 20, META_BYTES_MAX + 1),
            Header::plan(0, 100),
            Header {
                ram_bytes: !4095,
                ..Header::plan(64 << 20, 100)
            },
        ] {
            assert_eq!(
                Header::from_page(&wrong.to_page()),
                Err(HeaderError::Damaged)
            );
        }
    }

    #[test]
    fn states_come_back_in_order() {
        let meta = Meta {
            geometry: vec![("a.b".into(), "1=2".into()), ("c".into(), "".into())],
            vcpus: vec![vec![1; 9], vec![2; 3]],
            platform: vec![3],
            devices: vec![],
        };
        let bytes = meta.to_bytes();
        assert_eq!(Meta::from_bytes(&bytes).unwrap(), meta);
        for len in 0..bytes.len() {
            assert!(Meta::from_bytes(&bytes[..len]).is_err());
        }
    }
}
