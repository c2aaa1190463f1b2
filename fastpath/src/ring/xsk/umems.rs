//! The UMEMs of one [`Area`]: whoever opens sockets on the same part of it, NIC or link, on whatever thread, shares one.
//!
//! Invariants: a part is found as long as anybody has it; of what nobody has any more, nothing stays registered.
//!
//! Does not choose the parts.

use std::ptr::NonNull;
use std::sync::{Arc, Weak};

use super::error::XskError;
use super::lending::Counts;
use super::umem::{Memory, Umem, UmemSettings};
use crate::lock::Lock;
use crate::ring::Area;

/// What is registered of an area, or was.
#[derive(Debug, Default)]
pub(in crate::ring) struct Umems {
    parts: Lock<Vec<Part>>,
    counts: Arc<Counts>,
}

#[derive(Debug)]
struct Part {
    at: usize,
    memory: Weak<Memory>,
}

impl Umem {
    /// The UMEM of `bytes` of an area from `at` on, and at least that; registers them if nobody has one. Everybody who asks
    /// for the same shares it.
    ///
    /// # Safety
    ///
    /// There is no reference to bytes that the kernel may write: the chunks that are handed to
    /// [`XskSocket::fill`](super::XskSocket::fill) until they come back.
    pub unsafe fn in_area(
        area: &Arc<Area>,
        at: usize,
        bytes: u64,
        settings: UmemSettings,
    ) -> Result<Self, XskError> {
        let umems = area.umems();
        // Who asks while another registers would register the same.
        let mut parts = umems.parts.lock();
        parts.retain(|part| part.memory.strong_count() > 0);
        let mut same = parts.iter().filter(|part| part.at == at);
        let known = same.find_map(|part| {
            let memory = part.memory.upgrade()?;
            memory.covers(bytes, settings).then_some(memory)
        });
        if let Some(memory) = known {
            return Ok(Self::of(memory));
        }
        let first = area.base().wrapping_add(at);
        let base = NonNull::new(first).unwrap_or(NonNull::dangling());
        let (owner, counts) = (Box::new(area.clone()), umems.counts.clone());
        // SAFETY: the area keeps everything mapped as long as it lives, and it is the owner; the kernel refuses what is not
        // mapped. The rest is the caller's promise.
        let umem = unsafe { Self::register_counted(base, bytes, settings, owner, counts) }?;
        parts.push(Part {
            at,
            memory: Arc::downgrade(umem.memory()),
        });
        Ok(umem)
    }
}
