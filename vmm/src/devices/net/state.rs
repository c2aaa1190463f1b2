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
    /// Queue pairs that the driver uses.
    pub(super) active_pairs: u16,
}

impl NetState {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut writer = Writer::new(KIND);
        writer.u8(self.link_is_up.into());
        writer.u16(self.active_pairs);
        writer.finish()
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut reader = Reader::new(KIND, bytes)?;
        let state = Self {
            link_is_up: reader.flag("link_is_up")?,
            active_pairs: reader.u16()?,
        };
        reader.finish()?;
        Ok(state)
    }

    /// Whether a device of so many pairs can have this state.
    pub(super) fn check(&self, pairs: u16) -> Result<(), RecordError> {
        if (1..=pairs).contains(&self.active_pairs) {
            return Ok(());
        }
        Err(RecordError::Field {
            what: KIND.name,
            field: "number of active pairs",
        })
    }
}
