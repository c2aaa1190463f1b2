//! Packet captures as bytes: pcap and pcapng, either byte order, any time resolution.
//!
//! Invariants: reading never panics, whatever the bytes are; a frame is a slice of the input and is
//! whole; every fault says at which byte it is and what to do; memory does not grow with the file.
//!
//! Formats: draft-ietf-opsawg-pcap and draft-ietf-opsawg-pcapng. Does not decompress, and does not
//! look into frames.

mod map;
mod pcap;
mod pcapng;
mod sorted;

use std::fmt;

pub use map::{CaptureFile, OpenError};
pub use sorted::{SORT_WINDOW, Sorted};

/// Longest frame: what libpcap itself allows as a snapshot length.
pub const FRAME_MAX: u32 = 262_144;
/// Shortest frame: an Ethernet header.
pub const FRAME_MIN: u32 = 14;

/// LINKTYPE_ETHERNET of the registry of link types.
const LINKTYPE_ETHERNET: u16 = 1;
const PCAPNG_FIRST: [u8; 4] = [0x0a, 0x0d, 0x0d, 0x0a];

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// Its place in the capture, from 1.
    pub number: u64,
    /// When it was seen, in nanoseconds since 1970 by the capturing host's clock.
    pub at_ns: u64,
    /// Where its record begins in the file.
    pub offset: u64,
    /// Its bytes, Ethernet header first.
    pub frame: &'a [u8],
}

/// A capture cannot be read on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset}: {problem}")]
pub struct Fault {
    /// Where the record, block or field that is wrong begins.
    pub offset: u64,
    /// What is wrong, and what to do.
    pub problem: Problem,
}

/// What is wrong with a capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    /// Neither pcap nor pcapng.
    NotACapture {
        /// How it begins; fewer than four bytes when it is shorter.
        first: [u8; 4],
        /// How many of them there are.
        len: u8,
    },
    /// A version of the format that is not known.
    Version {
        /// Major number.
        major: u16,
        /// Minor number.
        minor: u16,
    },
    /// The file ends within something.
    Truncated {
        /// Within what.
        within: &'static str,
        /// Bytes that it needs.
        needs: u64,
        /// Bytes that are left.
        left: u64,
    },
    /// The capture kept only the start of a packet.
    Cut {
        /// Bytes that were kept.
        captured: u32,
        /// Bytes that the packet had.
        original: u32,
    },
    /// Frames of another kind of link.
    NotEthernet {
        /// Number in the registry of link types.
        link_type: u16,
    },
    /// Lengths that cannot be.
    Damaged {
        /// What is wrong.
        what: &'static str,
        /// The number that it has.
        value: u64,
    },
    /// A packet whose interface was not described before.
    NoInterface {
        /// The interface's number.
        interface: u32,
    },
    /// A packet without a time.
    NoTime,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotACapture { first, len } => not_a_capture(f, &first[..usize::from(len.min(4))]),
            Self::Version { major, minor } => {
                write!(f, "version {major}.{minor} of the format is not known; ")?;
                f.write_str("save it again with a current tcpdump or editcap")
            }
            Self::Truncated {
                within,
                needs,
                left,
            } => {
                write!(f, "the file ends within {within}: {needs} bytes needed, ")?;
                write!(
                    f,
                    "{left} left; copy it again, or end the capture in order "
                )?;
                f.write_str("(SIGINT to tcpdump) before reading it")
            }
            Self::Cut { captured, original } => {
                write!(f, "only {captured} of the packet's {original} bytes were ")?;
                f.write_str("captured; capture whole packets (tcpdump -s 0)")
            }
            Self::NotEthernet { link_type } => {
                write!(
                    f,
                    "link type {link_type} is not Ethernet (1); capture on the "
                )?;
                f.write_str("guest's interface (tcpdump -i tap0), not on \"any\"")
            }
            Self::Damaged { what, value } => {
                write!(
                    f,
                    "{what} is {value}, which cannot be: the file is damaged; "
                )?;
                f.write_str("copy it or capture again")
            }
            Self::NoInterface { interface } => {
                write!(
                    f,
                    "interface {interface} is not described before its packet; "
                )?;
                f.write_str("the file is damaged: copy it or capture again")
            }
            Self::NoTime => {
                f.write_str("a simple packet block carries no time; capture with times ")?;
                f.write_str("(tcpdump and dumpcap do by default)")
            }
        }
    }
}

fn not_a_capture(f: &mut fmt::Formatter<'_>, first: &[u8]) -> fmt::Result {
    if first.is_empty() {
        return f.write_str("the file is empty; give a pcap or pcapng file");
    }
    f.write_str("not a capture (it begins with")?;
    first.iter().try_for_each(|byte| write!(f, " {byte:02x}"))?;
    f.write_str("); ")?;
    match first {
        [0x1f, 0x8b, ..] => f.write_str("it looks like gzip: decompress it first"),
        [0x28, 0xb5, 0x2f, 0xfd] => f.write_str("it looks like zstd: decompress it first"),
        _ => f.write_str("give a pcap or pcapng file"),
    }
}

/// The frames of a capture, in the order of the file. Nothing follows a fault.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    format: Option<Format<'a>>,
    number: u64,
}

#[derive(Debug, Clone)]
enum Format<'a> {
    Pcap(pcap::Pcap<'a>),
    Pcapng(pcapng::Pcapng<'a>),
}

/// Looks at how a capture begins.
pub fn read(bytes: &[u8]) -> Result<Reader<'_>, Fault> {
    let format = match bytes.first_chunk::<4>() {
        Some(&PCAPNG_FIRST) => Format::Pcapng(pcapng::Pcapng::new(bytes)?),
        Some(magic) if pcap::knows(*magic) => Format::Pcap(pcap::Pcap::new(bytes)?),
        _ => return Err(unknown(bytes)),
    };
    Ok(Reader {
        format: Some(format),
        number: 0,
    })
}

fn unknown(bytes: &[u8]) -> Fault {
    let len = bytes.len().min(4);
    let mut first = [0; 4];
    first[..len].copy_from_slice(&bytes[..len]);
    let len = len as u8;
    Fault {
        offset: 0,
        problem: Problem::NotACapture { first, len },
    }
}

impl<'a> Iterator for Reader<'a> {
    type Item = Result<Record<'a>, Fault>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = match self.format.as_mut()? {
            Format::Pcap(pcap) => pcap.next_record(),
            Format::Pcapng(pcapng) => pcapng.next_record(),
        };
        if !matches!(next, Ok(Some(_))) {
            self.format = None;
        }
        let record = match next {
            Ok(record) => record?,
            Err(fault) => return Some(Err(fault)),
        };
        self.number += 1;
        let number = self.number;
        Some(Ok(Record { number, ..record }))
    }
}

/// Reads fields in the byte order of a file; positions count from the start of the file.
#[derive(Debug, Clone, Copy)]
struct Fields<'a> {
    bytes: &'a [u8],
    big_endian: bool,
}

impl<'a> Fields<'a> {
    /// The bytes `at..at + len`, or the fault of a file that ends within `within`.
    fn take(&self, at: usize, len: usize, within: &'static str) -> Result<&'a [u8], Fault> {
        let found = at.checked_add(len).and_then(|end| self.bytes.get(at..end));
        found.ok_or(Fault {
            offset: at as u64,
            problem: Problem::Truncated {
                within,
                needs: len as u64,
                left: self.bytes.len().saturating_sub(at) as u64,
            },
        })
    }

    fn u16(&self, part: &[u8], at: usize) -> u16 {
        let bytes = [part[at], part[at + 1]];
        match self.big_endian {
            true => u16::from_be_bytes(bytes),
            false => u16::from_le_bytes(bytes),
        }
    }

    fn u32(&self, part: &[u8], at: usize) -> u32 {
        let bytes = [part[at], part[at + 1], part[at + 2], part[at + 3]];
        match self.big_endian {
            true => u32::from_be_bytes(bytes),
            false => u32::from_le_bytes(bytes),
        }
    }
}

/// Checks the two lengths of a packet.
fn check_lengths(offset: usize, captured: u32, original: u32) -> Result<(), Fault> {
    let damaged = |what, value: u32| {
        let value = u64::from(value);
        Some(Problem::Damaged { what, value })
    };
    let problem = if captured > FRAME_MAX {
        damaged("the captured length of a packet", captured)
    } else if captured < original {
        Some(Problem::Cut { captured, original })
    } else if captured > original {
        damaged("the captured length beyond the packet's", captured)
    } else if captured < FRAME_MIN {
        damaged("the length of an Ethernet frame", captured)
    } else {
        None
    };
    let offset = offset as u64;
    problem.map_or(Ok(()), |problem| Err(Fault { offset, problem }))
}

fn check_link(offset: usize, link_type: u16) -> Result<(), Fault> {
    if link_type == LINKTYPE_ETHERNET {
        return Ok(());
    }
    Err(Fault {
        offset: offset as u64,
        problem: Problem::NotEthernet { link_type },
    })
}

#[cfg(test)]
mod tests;
