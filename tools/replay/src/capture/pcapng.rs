//! The pcapng format: blocks, of which those that describe interfaces and carry packets matter.
//!
//! Invariants: `at` is the start of a block or the end of the file; the interfaces are those of the
//! current section; a block is looked at only as far as its own length allows.
//!
//! Simple packet blocks are refused, for they carry no time; unknown blocks are skipped.

use super::{Fault, Fields, Problem, Record, check_lengths, check_link};

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
/// Obsolete, but still found in old files.
const PACKET: u32 = 2;
const SIMPLE_PACKET: u32 = 3;
const ENHANCED_PACKET: u32 = 6;

const BYTE_ORDER_MAGIC: [u8; 4] = [0x1a, 0x2b, 0x3c, 0x4d];
/// Type, length, and the length again at the end.
const BLOCK_BYTES_MIN: u32 = 12;
/// A longer block is damage, not a packet with comments.
const BLOCK_BYTES_MAX: u32 = 64 << 20;
const INTERFACES_MAX: usize = 4096;
const VERSION_MAJOR: u16 = 1;

const OPTION_END: u16 = 0;
const OPTION_TSRESOL: u16 = 9;
const OPTION_TSOFFSET: u16 = 14;

#[derive(Debug, Clone, Copy)]
struct Interface {
    link_type: u16,
    /// The octet of the `if_tsresol` option.
    resolution: u8,
    offset_s: i64,
}

impl Interface {
    /// Nanoseconds since 1970; times that no clock has are clamped.
    fn at_ns(&self, high: u32, low: u32) -> u64 {
        let units = u128::from(u64::from(high) << 32 | u64::from(low));
        let exponent = u32::from(self.resolution & 0x7f);
        let ns = match (self.resolution & 0x80 != 0, exponent) {
            (true, exponent) => (units * 1_000_000_000) >> exponent,
            (false, 0..=9) => units * 10u128.pow(9 - exponent),
            // Beyond 10^-38 seconds nothing of 64 bits is left.
            (false, 10..=47) => units / 10u128.pow(exponent - 9),
            (false, _) => 0,
        };
        let ns = i128::try_from(ns).unwrap_or(i128::MAX);
        let ns = ns.saturating_add(i128::from(self.offset_s) * 1_000_000_000);
        ns.clamp(0, i128::from(u64::MAX)) as u64
    }
}

#[derive(Debug, Clone)]
pub(super) struct Pcapng<'a> {
    fields: Fields<'a>,
    interfaces: Vec<Interface>,
    at: usize,
}

/// A block: where it begins, its type, and what is between the lengths.
#[derive(Clone, Copy)]
struct Block<'a> {
    at: usize,
    kind: u32,
    body: &'a [u8],
}

/// A packet's fields, before they are checked.
struct Packet {
    interface: u32,
    high: u32,
    low: u32,
    captured: u32,
    original: u32,
    data_at: usize,
}

impl<'a> Pcapng<'a> {
    /// `bytes` begins with the type of a section header block.
    pub(super) fn new(bytes: &'a [u8]) -> Result<Self, Fault> {
        let mut this = Self {
            fields: Fields {
                bytes,
                big_endian: false,
            },
            interfaces: Vec::new(),
            at: 0,
        };
        let first = this.next_block()?;
        debug_assert!(first.is_some_and(|block| block.kind == SECTION_HEADER));
        Ok(this)
    }

    pub(super) fn next_record(&mut self) -> Result<Option<Record<'a>>, Fault> {
        while let Some(block) = self.next_block()? {
            let packet = match block.kind {
                ENHANCED_PACKET => Some(self.enhanced(&block)?),
                PACKET => Some(self.obsolete(&block)?),
                SIMPLE_PACKET => return Err(fault(block.at, Problem::NoTime)),
                INTERFACE_DESCRIPTION => {
                    self.describe(&block)?;
                    None
                }
                _ => None,
            };
            if let Some(packet) = packet {
                return self.record(&block, &packet).map(Some);
            }
        }
        Ok(None)
    }

    /// Takes the next block; a section header changes byte order and interfaces.
    fn next_block(&mut self) -> Result<Option<Block<'a>>, Fault> {
        let at = self.at;
        if at == self.fields.bytes.len() {
            return Ok(None);
        }
        let head = self.fields.take(at, 8, "a block header")?;
        // The type of a section header reads the same in both byte orders.
        let kind = self.fields.u32(head, 0);
        if kind == SECTION_HEADER {
            let magic = self.fields.take(at + 8, 4, "a section header block")?;
            self.fields.big_endian = match magic {
                magic if magic == BYTE_ORDER_MAGIC => true,
                [0x4d, 0x3c, 0x2b, 0x1a] => false,
                _ => {
                    let value = u64::from(self.fields.u32(magic, 0));
                    let what = "the byte-order magic of a section";
                    return Err(fault(at + 8, Problem::Damaged { what, value }));
                }
            };
        }
        let block = self.block(at, kind, self.fields.u32(head, 4))?;
        if kind == SECTION_HEADER {
            self.begin_section(&block)?;
        }
        Ok(Some(block))
    }

    fn block(&mut self, at: usize, kind: u32, length: u32) -> Result<Block<'a>, Fault> {
        let damaged = |what, value: u32| {
            let value = u64::from(value);
            fault(at, Problem::Damaged { what, value })
        };
        let fits = (BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&length);
        if !fits || !length.is_multiple_of(4) {
            return Err(damaged("the length of a block", length));
        }
        let whole = self.fields.take(at, length as usize, "a block")?;
        let (body, tail) = whole[8..].split_at(whole.len() - 12);
        let again = self.fields.u32(tail, 0);
        if again != length {
            return Err(damaged("the length at the end of a block", again));
        }
        self.at = at + whole.len();
        Ok(Block { at, kind, body })
    }

    fn begin_section(&mut self, block: &Block<'_>) -> Result<(), Fault> {
        // Byte-order magic, version, section length.
        need(block, 16)?;
        let (major, minor) = (
            self.fields.u16(block.body, 4),
            self.fields.u16(block.body, 6),
        );
        if major != VERSION_MAJOR {
            return Err(fault(block.at + 12, Problem::Version { major, minor }));
        }
        self.interfaces.clear();
        Ok(())
    }

    fn describe(&mut self, block: &Block<'_>) -> Result<(), Fault> {
        need(block, 8)?;
        if self.interfaces.len() == INTERFACES_MAX {
            let what = "the number of interfaces";
            let value = INTERFACES_MAX as u64 + 1;
            return Err(fault(block.at, Problem::Damaged { what, value }));
        }
        let mut interface = Interface {
            link_type: self.fields.u16(block.body, 0),
            resolution: 6,
            offset_s: 0,
        };
        let mut options = &block.body[8..];
        while let Some((code, value, rest)) = self.option(options) {
            match (code, value) {
                (OPTION_END, _) => break,
                (OPTION_TSRESOL, [resolution]) => interface.resolution = *resolution,
                (OPTION_TSOFFSET, value) if value.len() == 8 => {
                    let words = (self.fields.u32(value, 0), self.fields.u32(value, 4));
                    let (high, low) = match self.fields.big_endian {
                        true => words,
                        false => (words.1, words.0),
                    };
                    interface.offset_s = (u64::from(high) << 32 | u64::from(low)) as i64;
                }
                _ => {}
            }
            options = rest;
        }
        self.interfaces.push(interface);
        Ok(())
    }

    /// Code, value and what follows of the first option; `None` when there is no whole one.
    fn option<'o>(&self, options: &'o [u8]) -> Option<(u16, &'o [u8], &'o [u8])> {
        if options.len() < 4 {
            return None;
        }
        let code = self.fields.u16(options, 0);
        let len = usize::from(self.fields.u16(options, 2));
        let value = options.get(4..4 + len)?;
        let rest = options.get(4 + len.next_multiple_of(4)..).unwrap_or(&[]);
        Some((code, value, rest))
    }

    fn enhanced(&self, block: &Block<'_>) -> Result<Packet, Fault> {
        need(block, 20)?;
        let [interface, high, low, captured, original] =
            [0, 4, 8, 12, 16].map(|at| self.fields.u32(block.body, at));
        Ok(Packet {
            interface,
            high,
            low,
            captured,
            original,
            data_at: 20,
        })
    }

    fn obsolete(&self, block: &Block<'_>) -> Result<Packet, Fault> {
        need(block, 20)?;
        let [high, low, captured, original] =
            [4, 8, 12, 16].map(|at| self.fields.u32(block.body, at));
        let interface = u32::from(self.fields.u16(block.body, 0));
        Ok(Packet {
            interface,
            high,
            low,
            captured,
            original,
            data_at: 20,
        })
    }

    fn record(&self, block: &Block<'a>, packet: &Packet) -> Result<Record<'a>, Fault> {
        let interface = self.interfaces.get(packet.interface as usize);
        let interface = interface.ok_or_else(|| {
            let interface = packet.interface;
            fault(block.at, Problem::NoInterface { interface })
        })?;
        check_link(block.at, interface.link_type)?;
        check_lengths(block.at, packet.captured, packet.original)?;
        let end = packet.data_at + packet.captured as usize;
        let frame = block.body.get(packet.data_at..end).ok_or_else(|| {
            let what = "the captured length beyond its block";
            let value = u64::from(packet.captured);
            fault(block.at, Problem::Damaged { what, value })
        })?;
        Ok(Record {
            number: 0,
            at_ns: interface.at_ns(packet.high, packet.low),
            offset: block.at as u64,
            frame,
        })
    }
}

fn fault(at: usize, problem: Problem) -> Fault {
    Fault {
        offset: at as u64,
        problem,
    }
}

/// The fixed fields of a block.
fn need(block: &Block<'_>, bytes: usize) -> Result<(), Fault> {
    if block.body.len() >= bytes {
        return Ok(());
    }
    let what = "the length of a block's contents";
    let value = block.body.len() as u64;
    Err(fault(block.at, Problem::Damaged { what, value }))
}
