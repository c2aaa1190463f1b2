//! Captures built in memory, for tests.
//!
//! Invariant: what is written here is what the formats' documents say, not what the readers accept.

/// A capture's format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Classic pcap.
    Pcap {
        /// Nanosecond times instead of microseconds.
        nanoseconds: bool,
        /// Byte order.
        big_endian: bool,
    },
    /// pcapng with one interface.
    Pcapng {
        /// The octet of the `if_tsresol` option; `None`: no such option, microseconds.
        resolution: Option<u8>,
        /// Byte order.
        big_endian: bool,
    },
}

/// The formats that differ in how they are read.
pub const FORMATS: [Format; 10] = {
    const fn pcap(nanoseconds: bool, big_endian: bool) -> Format {
        Format::Pcap {
            nanoseconds,
            big_endian,
        }
    }
    const fn pcapng(resolution: Option<u8>, big_endian: bool) -> Format {
        Format::Pcapng {
            resolution,
            big_endian,
        }
    }
    [
        pcap(false, false),
        pcap(false, true),
        pcap(true, false),
        pcap(true, true),
        pcapng(None, false),
        pcapng(None, true),
        pcapng(Some(9), false),
        pcapng(Some(9), true),
        pcapng(Some(0x80 | 20), false),
        pcapng(Some(10), true),
    ]
};

/// Writes numbers in one byte order.
#[derive(Debug)]
pub struct Writer {
    /// What was written.
    pub bytes: Vec<u8>,
    big_endian: bool,
}

impl Writer {
    /// Nothing yet.
    pub fn new(big_endian: bool) -> Self {
        Self {
            bytes: Vec::new(),
            big_endian,
        }
    }

    /// Two bytes.
    pub fn u16(&mut self, n: u16) -> &mut Self {
        let bytes = match self.big_endian {
            true => n.to_be_bytes(),
            false => n.to_le_bytes(),
        };
        self.bytes.extend_from_slice(&bytes);
        self
    }

    /// Four bytes.
    pub fn u32(&mut self, n: u32) -> &mut Self {
        let bytes = match self.big_endian {
            true => n.to_be_bytes(),
            false => n.to_le_bytes(),
        };
        self.bytes.extend_from_slice(&bytes);
        self
    }

    /// The file header of classic pcap.
    pub fn pcap_header(&mut self, nanoseconds: bool, link_type: u32) -> &mut Self {
        let magic = if nanoseconds {
            0xa1b2_3c4d
        } else {
            0xa1b2_c3d4
        };
        self.u32(magic).u16(2).u16(4).u32(0).u32(0);
        self.u32(262_144).u32(link_type)
    }

    /// A record of classic pcap; `original` is the packet's length on the wire.
    pub fn pcap_record(&mut self, time: (u32, u32), original: u32, frame: &[u8]) -> &mut Self {
        self.u32(time.0).u32(time.1);
        self.u32(frame.len() as u32).u32(original);
        self.bytes.extend_from_slice(frame);
        self
    }

    /// A block of pcapng around `body`, padded.
    pub fn block(&mut self, kind: u32, body: &[u8]) -> &mut Self {
        let padded = body.len().next_multiple_of(4);
        let length = 12 + padded as u32;
        self.u32(kind).u32(length);
        self.bytes.extend_from_slice(body);
        self.bytes.resize(self.bytes.len() + padded - body.len(), 0);
        self.u32(length)
    }

    fn body(&self, fill: impl FnOnce(&mut Self)) -> Vec<u8> {
        let mut body = Self::new(self.big_endian);
        fill(&mut body);
        body.bytes
    }

    /// A section header block.
    pub fn section(&mut self) -> &mut Self {
        let body = self.body(|body| {
            body.u32(0x1a2b_3c4d).u16(1).u16(0);
            body.u32(u32::MAX).u32(u32::MAX);
        });
        self.block(0x0a0d_0d0a, &body)
    }

    /// An interface description block.
    pub fn interface(&mut self, link_type: u16, resolution: Option<u8>) -> &mut Self {
        let body = self.body(|body| {
            body.u16(link_type).u16(0).u32(0);
            // A name first, so that options have to be skipped.
            body.u16(2).u16(5);
            body.bytes.extend_from_slice(b"tap0\0\0\0\0");
            if let Some(resolution) = resolution {
                body.u16(9).u16(1);
                body.bytes.extend_from_slice(&[resolution, 0, 0, 0]);
            }
            body.u16(0).u16(0);
        });
        self.block(1, &body)
    }

    /// An enhanced packet block.
    pub fn packet(&mut self, interface: u32, time: u64, original: u32, frame: &[u8]) -> &mut Self {
        let body = self.body(|body| {
            body.u32(interface);
            body.u32((time >> 32) as u32).u32(time as u32);
            body.u32(frame.len() as u32).u32(original);
            body.bytes.extend_from_slice(frame);
        });
        self.block(6, &body)
    }
}

/// A capture of frames with their times in nanoseconds since 1970; coarser formats round down.
pub fn capture(format: Format, frames: &[(u64, Vec<u8>)]) -> Vec<u8> {
    match format {
        Format::Pcap {
            nanoseconds,
            big_endian,
        } => {
            let mut writer = Writer::new(big_endian);
            writer.pcap_header(nanoseconds, 1);
            for (at_ns, frame) in frames {
                let (s, ns) = (at_ns / 1_000_000_000, at_ns % 1_000_000_000);
                let fraction = if nanoseconds { ns } else { ns / 1000 };
                let time = (s as u32, fraction as u32);
                writer.pcap_record(time, frame.len() as u32, frame);
            }
            writer.bytes
        }
        Format::Pcapng {
            resolution,
            big_endian,
        } => {
            let mut writer = Writer::new(big_endian);
            writer.section().interface(1, resolution);
            for (at_ns, frame) in frames {
                let time = units(*at_ns, resolution.unwrap_or(6));
                writer.packet(0, time, frame.len() as u32, frame);
            }
            writer.bytes
        }
    }
}

fn units(at_ns: u64, resolution: u8) -> u64 {
    let at_ns = u128::from(at_ns);
    let exponent = u32::from(resolution & 0x7f);
    let per_second = match resolution & 0x80 {
        0 => 10u128.pow(exponent),
        _ => 1 << exponent,
    };
    (at_ns * per_second / 1_000_000_000) as u64
}
