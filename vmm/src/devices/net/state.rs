//! What travels of a network device besides its registers and queues.
//!
//! Invariants: fixed little-endian, versioned.

use crate::machine::RecordError;
use crate::machine::record::{Kind, Reader, Writer};

const KIND: Kind = Kind {
    name: "network device",
    magic: *b"CVNT",
    version: 1,
};

/// One network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NetState {
    /// Whether the guest is shown a link.
    pub(super) link_is_up: bool,
}

impl NetState {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut writer = Writer::new(KIND);
        writer.u8(self.link_is_up.into());
        writer.finish()
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut reader = Reader::new(KIND, bytes)?;
        let link_is_up = reader.flag("link_is_up")?;
        reader.finish()?;
        Ok(Self { link_is_up })
    }
}
