//! What kernel and driver can do with one frame.
//!
//! Invariants: what is in use is never more than what the configuration asks for.
//!
//! Does not find out: who binds the sockets does.

use super::XdpNicMode;

/// What kernel and driver can do with one frame; by default, what is hoped for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XdpAbilities {
    /// A frame may be in several buffers (`XDP_USE_SG`, Linux 6.6). Without, what is in several is copied.
    pub multi_buffer: bool,
    /// One buffer to send may cross a border of 4096 bytes. A NIC that reads by itself does not see pages that
    /// follow each other here as such, so with zero copy none may.
    pub crosses_pages: bool,
}

impl Default for XdpAbilities {
    fn default() -> Self {
        Self {
            multi_buffer: true,
            crosses_pages: true,
        }
    }
}

impl XdpAbilities {
    /// What is left of them in `mode`.
    pub(super) fn in_mode(self, mode: XdpNicMode) -> Self {
        Self {
            crosses_pages: self.crosses_pages && mode != XdpNicMode::ZeroCopy,
            ..self
        }
    }
}
