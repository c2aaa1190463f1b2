//! Audit (rule 16): is the image that the secondary applied the one that the primary captured?
//!
//! What is compared: all of RAM, every part of each vCPU and of what is in KVM once a machine, the devices with their
//! queues, and of each shard the translations and the pending output. What is not: clocks.
//!
//! Both sides digest these while their guest stands still. The
//! secondary compares its own [`Image`] with the primary's [`Summary`]; where a chunk of RAM differs, marks of
//! its pages name those.
//!
//! RAM is a tree: the digests of 256 pages (1 MiB) are a page themselves, whose digest stands for the
//! chunk. A page's mark is a quarter of its digest: enough to find it in a chunk that is known to differ. A
//! summary has 16 bytes and the marks, another 1024, for each MiB.
//!
//! Invariants: chunks alone decide whether memory is the same; states are compared in a form without clocks,
//! which differ between hosts; what is compared has a name; a summary of another shape is a difference, never
//! an agreement.
//!
//! Does not stop a guest, and does not say what to do about a difference.

use colo_compare::canonical_xlate_record;
use colo_fastpath::ring::{GuestRam, MemoryError};

use super::codec::digest::DIGEST_BYTES;
use super::codec::{Page, PageDigest, PageKey};
use super::pages::{PAGE_BYTES, PageBitmap};
use crate::machine::record::{Kind, Reader, Writer};
use crate::machine::{RecordError, VcpuState, platform_parts};

/// Pages whose digests fill a page.
pub const CHUNK_PAGES: usize = PAGE_BYTES / DIGEST_BYTES;

const KIND: Kind = Kind {
    name: "audit",
    magic: *b"CAUD",
    version: 1,
};
const HEAD: u16 = 1;
const CHUNKS: u16 = 2;
const STATES: u16 = 3;
/// A secondary that does not know it names chunks.
const MARKS: u16 = 4;
/// A secondary that does not know it does not look at the packet side.
const PACKETS: u16 = 5;
const NAME_BYTES_MAX: usize = 256;

/// The state records of a machine, as in a checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct StateRecords<'a> {
    /// In order.
    pub vcpus: &'a [Vec<u8>],
    /// What is in KVM once a machine.
    pub platform: &'a [u8],
    /// All devices.
    pub devices: &'a [u8],
}

/// The packet side of one shard, as in a checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct PacketRecords<'a> {
    /// The client-facing translations, in any order.
    pub translations: &'a [u8],
    /// The pending output.
    pub pending: &'a [u8],
}

/// What is compared under a name.
type Named = (String, PageDigest);

/// The digests of a machine that stands still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    epoch: u64,
    pages: Vec<PageDigest>,
    states: Vec<Named>,
    packets: Vec<Named>,
}

/// What of an [`Image`] travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// The epoch that the capture ended.
    pub epoch: u64,
    page_count: u64,
    chunks: Vec<PageDigest>,
    /// Of all pages; a primary of the version before sends none.
    marks: Vec<u32>,
    states: Vec<Named>,
    /// A primary of the version before sends none.
    packets: Vec<Named>,
}

/// Something that is not the same on both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Difference {
    /// The images are of different epochs or sizes: nothing can be said.
    Shape {
        /// Epoch and pages of the primary.
        primary: (u64, u64),
        /// Epoch and pages of the secondary.
        secondary: (u64, u64),
    },
    /// A chunk of [`CHUNK_PAGES`] pages, of which nothing says more.
    Chunk(usize),
    /// A page, by its number.
    Page(u64),
    /// A part of a state, by its name.
    State(String),
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shape { primary, secondary } => write!(
                f,
                "epoch and pages are {primary:?} on the primary, {secondary:?} on the secondary"
            ),
            Self::Chunk(chunk) => {
                let first = chunk * CHUNK_PAGES;
                write!(
                    f,
                    "among the guest pages {first} to {}",
                    first + CHUNK_PAGES - 1
                )
            }
            Self::Page(page) => write!(f, "guest page {page} (address {:#x})", page * 4096),
            Self::State(name) => write!(f, "{name}"),
        }
    }
}

/// An image could not be digested.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// Guest memory could not be read.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
    /// A state record could not be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Translations could not be read.
    #[error(transparent)]
    Translations(#[from] colo_compare::RecordError),
}

impl Image {
    /// Digests all of `ram` and `states`; the guest stands still meanwhile.
    pub fn of(
        epoch: u64,
        key: &PageKey,
        ram: &GuestRam,
        states: StateRecords<'_>,
    ) -> Result<Self, AuditError> {
        Self::of_memory(epoch, key, ram)?.with_states(key, states)
    }

    /// Digests all of `ram`; [`Self::with_states`] adds the states.
    pub fn of_memory(epoch: u64, key: &PageKey, ram: &GuestRam) -> Result<Self, AuditError> {
        let mut page: Page = [0; PAGE_BYTES];
        let zeros = key.of(&page);
        // To read a page that nobody has touched would make one.
        let mut data = PageBitmap::new(ram.page_count());
        ram.find_data(data.words_mut())?;
        let digest = |number: usize| match data.word(number / 64) >> (number % 64) & 1 {
            0 => Ok(zeros),
            _ => key.of_copy(&mut page, |page| ram.copy_page_out(number, page)),
        };
        let pages = (0..ram.page_count())
            .map(digest)
            .collect::<Result<_, _>>()?;
        Ok(Self {
            epoch,
            pages,
            states: Vec::new(),
            packets: Vec::new(),
        })
    }

    /// The same with the states of the machine.
    pub fn with_states(self, key: &PageKey, states: StateRecords<'_>) -> Result<Self, AuditError> {
        let states = digest_states(key, states)?;
        Ok(Self { states, ..self })
    }

    /// The same with the packet sides of all shards.
    pub fn with_packets(
        self,
        key: &PageKey,
        shards: &[PacketRecords<'_>],
    ) -> Result<Self, AuditError> {
        let mut packets = Vec::new();
        for (index, shard) in shards.iter().enumerate() {
            let translations = digest_bytes(key, &canonical_xlate_record(shard.translations)?);
            packets.push((format!("shard {index}: translations"), translations));
            let pending = digest_bytes(key, shard.pending);
            packets.push((format!("shard {index}: pending output"), pending));
        }
        Ok(Self { packets, ..self })
    }

    /// What travels.
    pub fn summary(&self, key: &PageKey) -> Summary {
        let chunk = |pages: &[PageDigest]| key.of(&page_of(pages));
        Summary {
            epoch: self.epoch,
            page_count: self.pages.len() as u64,
            chunks: self.pages.chunks(CHUNK_PAGES).map(chunk).collect(),
            marks: self.pages.iter().map(mark).collect(),
            states: self.states.clone(),
            packets: self.packets.clone(),
        }
    }

    /// What differs from the other side's summary, at most `limit` of them. `self` is the secondary's.
    pub fn compare(&self, key: &PageKey, primary: &Summary, limit: usize) -> Vec<Difference> {
        let ours = self.summary(key);
        let shape = |s: &Summary| (s.epoch, s.page_count);
        if shape(primary) != shape(&ours) || primary.chunks.len() != ours.chunks.len() {
            return vec![Difference::Shape {
                primary: shape(primary),
                secondary: shape(&ours),
            }];
        }
        let chunks = primary.chunks.iter().zip(&ours.chunks).enumerate();
        let chunks = chunks.filter(|(_, (a, b))| a != b);
        let states = differing_names(&primary.states, &ours.states);
        let packets = match primary.packets.is_empty() {
            true => Vec::new(),
            false => differing_names(&primary.packets, &ours.packets),
        };
        let all = states.into_iter().chain(packets).map(Difference::State);
        let in_memory =
            chunks.flat_map(|(chunk, _)| differing_pages(chunk, &primary.marks, &ours.marks));
        all.chain(in_memory).take(limit).collect()
    }
}

impl Summary {
    /// The record.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut writer = Writer::new(KIND);
        writer.section(HEAD, |w| {
            w.u64(self.epoch);
            w.u64(self.page_count);
        });
        writer.section(CHUNKS, |w| {
            self.chunks.iter().for_each(|c| w.bytes(&c.to_bytes()));
        });
        writer.skippable_section(MARKS, |w| {
            self.marks.iter().for_each(|&mark| w.u32(mark));
        });
        writer.section(STATES, |w| write_named(&self.states, w));
        writer.skippable_section(PACKETS, |w| write_named(&self.packets, w));
        writer.finish()
    }

    /// Reads a record.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut reader = Reader::new(KIND, bytes)?;
        let mut head = None;
        let (mut chunks, mut marks) = (Vec::new(), Vec::new());
        let (mut states, mut packets) = (Vec::new(), Vec::new());
        while let Some(mut section) = reader.section()? {
            let body = &mut section.body;
            match section.tag {
                HEAD => head = Some((body.u64()?, body.u64()?)),
                CHUNKS => {
                    while !body.is_empty() {
                        chunks.push(read_digest(body)?);
                    }
                }
                MARKS => {
                    while !body.is_empty() {
                        marks.push(body.u32()?);
                    }
                }
                STATES => states = read_named(body)?,
                PACKETS => packets = read_named(body)?,
                _ => section.unknown()?,
            }
        }
        let (epoch, page_count) = head.ok_or(RecordError::Lacks {
            what: KIND.name,
            section: "its head",
        })?;
        Ok(Self {
            epoch,
            page_count,
            chunks,
            marks,
            states,
            packets,
        })
    }
}

fn write_named(all: &[Named], w: &mut Writer) {
    for (name, digest) in all {
        let name = &name.as_bytes()[..name.len().min(NAME_BYTES_MAX)];
        w.u16(name.len() as u16);
        w.bytes(name);
        w.bytes(&digest.to_bytes());
    }
}

fn read_named(body: &mut Reader<'_>) -> Result<Vec<Named>, RecordError> {
    let mut all = Vec::new();
    while !body.is_empty() {
        let len = usize::from(body.u16()?);
        let name = std::str::from_utf8(body.take(len)?).map(str::to_owned);
        let name = name.map_err(|_| body.bad("name of a state"))?;
        all.push((name, read_digest(body)?));
    }
    Ok(all)
}

fn read_digest(body: &mut Reader<'_>) -> Result<PageDigest, RecordError> {
    Ok(PageDigest::from_bytes(body.plain()?))
}

/// What finds a page in a chunk that differs.
fn mark(digest: &PageDigest) -> u32 {
    let [a, b, c, d, ..] = digest.to_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// The pages of a chunk that differ, by their marks; the chunk if these say nothing.
fn differing_pages(chunk: usize, primary: &[u32], ours: &[u32]) -> Vec<Difference> {
    let first = chunk * CHUNK_PAGES;
    let pages = primary.iter().zip(ours).enumerate();
    let pages = pages.skip(first).take(CHUNK_PAGES);
    let differing = pages.filter(|(_, (a, b))| a != b);
    let named: Vec<_> = differing
        .map(|(page, _)| Difference::Page(page as u64))
        .collect();
    match named.is_empty() {
        true => vec![Difference::Chunk(chunk)],
        false => named,
    }
}

/// Digests as a page; the rest of it is zeroes.
fn page_of(digests: &[PageDigest]) -> Page {
    let mut page = [0; PAGE_BYTES];
    for (place, digest) in page.chunks_exact_mut(DIGEST_BYTES).zip(digests) {
        place.copy_from_slice(&digest.to_bytes());
    }
    page
}

fn digest_states(key: &PageKey, records: StateRecords<'_>) -> Result<Vec<Named>, RecordError> {
    let mut states = Vec::new();
    for (index, record) in records.vcpus.iter().enumerate() {
        for (name, bytes) in VcpuState::from_bytes(record)?.parts() {
            states.push((format!("vCPU {index}: {name}"), digest_bytes(key, &bytes)));
        }
    }
    for (name, bytes) in platform_parts(records.platform)? {
        states.push((format!("platform: {name}"), digest_bytes(key, &bytes)));
    }
    let devices = digest_bytes(key, records.devices);
    states.push(("devices".to_owned(), devices));
    Ok(states)
}

/// The digest of bytes of any length: each page of them carries the digest of those before it.
fn digest_bytes(key: &PageKey, bytes: &[u8]) -> PageDigest {
    let mut page = [0; PAGE_BYTES];
    page[..8].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    let mut digest = key.of(&page);
    for piece in bytes.chunks(PAGE_BYTES - DIGEST_BYTES) {
        page.fill(0);
        page[..DIGEST_BYTES].copy_from_slice(&digest.to_bytes());
        page[DIGEST_BYTES..DIGEST_BYTES + piece.len()].copy_from_slice(piece);
        digest = key.of(&page);
    }
    digest
}

/// Names of what is not the same in both lists, or not in both.
fn differing_names(a: &[Named], b: &[Named]) -> Vec<String> {
    let lacks = |list: &[Named], part: &Named| !list.contains(part);
    let mut names: Vec<_> = a.iter().filter(|part| lacks(b, part)).collect();
    let others = b.iter().filter(|part| lacks(a, part));
    names.extend(others.filter(|(name, _)| !a.iter().any(|(n, _)| n == name)));
    names.into_iter().map(|(name, _)| name.clone()).collect()
}

#[cfg(test)]
#[path = "audit_tests.rs"]
pub(crate) mod tests;
