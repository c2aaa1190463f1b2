//! What the parts of the checkpoint engine have counted for the present peer, for the status.
//!
//! Counts are as of the checkpoint that was sent, or applied, last.

use serde::Serialize;

use crate::checkpoint::channel;
use crate::checkpoint::codec::cache::CacheCounters;
use crate::checkpoint::outbound::Sent;
use crate::checkpoint::stabilise::StabiliseSnapshot;
use crate::checkpoint::stage::ApplyCost;

/// The counters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct EngineCounters {
    /// The page channel.
    pub page_channel: channel::Counters,
    /// What keeps captured pages; of a primary.
    pub stabilise: StabiliseSnapshot,
    /// The cache of committed pages; of a primary.
    pub page_cache: CacheCounters,
}

impl From<&Sent> for EngineCounters {
    fn from(sent: &Sent) -> Self {
        Self {
            page_channel: sent.channel,
            stabilise: sent.stabilise,
            page_cache: sent.cache,
        }
    }
}

impl From<&ApplyCost> for EngineCounters {
    fn from(cost: &ApplyCost) -> Self {
        Self {
            page_channel: cost.channel,
            ..Self::default()
        }
    }
}
