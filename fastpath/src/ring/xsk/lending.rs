//! Which sockets have memory that is registered with the kernel, and which of them lend it to another one.
//!
//! Invariants: a registration counts as long as a socket has it, whoever made it; what lends is bound, is open, and moves
//! bytes as the borrower wants it, because the kernel takes no flags from a borrower (`XDP_SHARED_UMEM`). Only who opens
//! sockets comes here: no packet waits for it.
//!
//! Makes no system calls.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use super::socket::{BindOptions, CopyMode, Rings};

/// How often memory is registered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UmemUse {
    /// Registrations that sockets have now. Each has all its pages pinned, and counted to the locked memory.
    pub registrations: u64,
    /// Their length together.
    pub registered_bytes: u64,
    /// Registrations that were made although other sockets had the same memory, because these did not lend it: they move
    /// bytes in another way, their interface was gone, or the kernel (before Linux 5.10) shares on one queue only.
    pub registered_again: u64,
}

/// What is counted of registrations; sockets of any thread come and go.
#[derive(Debug, Default)]
pub(super) struct Counts {
    registrations: AtomicU64,
    registered_bytes: AtomicU64,
    registered_again: AtomicU64,
}

impl Counts {
    pub(super) fn read(&self) -> UmemUse {
        UmemUse {
            registrations: self.registrations.load(Ordering::Relaxed),
            registered_bytes: self.registered_bytes.load(Ordering::Relaxed),
            registered_again: self.registered_again.load(Ordering::Relaxed),
        }
    }

    pub(super) fn count_again(&self) {
        self.registered_again.fetch_add(1, Ordering::Relaxed);
    }
}

/// One registration, as long as a socket has it.
#[derive(Debug)]
pub(super) struct Registration {
    bytes: u64,
    counts: Arc<Counts>,
}

impl Registration {
    pub(super) fn new(bytes: u64, counts: &Arc<Counts>) -> Arc<Self> {
        counts.registrations.fetch_add(1, Ordering::Relaxed);
        counts.registered_bytes.fetch_add(bytes, Ordering::Relaxed);
        Arc::new(Self {
            bytes,
            counts: counts.clone(),
        })
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let counts = &self.counts;
        counts.registrations.fetch_sub(1, Ordering::Relaxed);
        counts
            .registered_bytes
            .fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A socket and the registration that it has.
#[derive(Debug)]
pub(super) struct Member {
    /// Closed before the registration counts as gone.
    pub(super) fd: OwnedFd,
    pub(super) registration: Arc<Registration>,
}

/// A socket that has registered the memory and is not bound.
#[derive(Debug)]
pub(super) struct Unbound {
    pub(super) member: Member,
    /// Its rings, if it has them: it cannot get others.
    pub(super) rings: Option<Rings>,
}

/// A socket that is bound, as long as it is open.
#[derive(Debug)]
struct Bound {
    member: Weak<Member>,
    interface_index: u32,
    queue: u32,
    options: BindOptions,
}

impl Bound {
    fn is_open(&self) -> bool {
        self.member.strong_count() > 0
    }

    /// Whether a socket with these options can have its memory.
    fn suits(&self, interface_index: u32, wanted: &BindOptions) -> bool {
        let ours = &self.options;
        let copies = ours.copy_mode == CopyMode::Copy;
        let alike = (ours.copy_mode, ours.need_wakeup) == (wanted.copy_mode, wanted.need_wakeup);
        // Where the kernel copies, whoever may use several buffers need not. A driver without copies has its say when the
        // flag is given, which it is not for another interface.
        let in_pieces = match ours.multi_buffer {
            true => copies || (wanted.multi_buffer && interface_index == self.interface_index),
            false => !wanted.multi_buffer,
        };
        alike && in_pieces
    }
}

/// The sockets that have one range of memory.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    /// Registering pins every page, so what has done it is kept when a queue cannot be had.
    registered: Option<Unbound>,
    bound: Vec<Bound>,
}

impl Sockets {
    /// Keeps a socket that is not bound for the next one.
    pub(super) fn keep(&mut self, unbound: Unbound) {
        self.registered = Some(unbound);
    }

    /// The one that was kept, if its rings are as wanted. Another one is closed.
    pub(super) fn take_kept(&mut self, options: &BindOptions) -> Option<Unbound> {
        let suits = |unbound: &Unbound| {
            let rings = unbound.rings.as_ref();
            rings.is_none_or(|rings| rings.are_as(options))
        };
        self.registered.take().filter(suits)
    }

    /// Whether one of them is bound to this queue.
    pub(super) fn have(&self, interface_index: u32, queue: u32) -> bool {
        let place = (interface_index, queue);
        let mut open = self.bound.iter().filter(|bound| bound.is_open());
        open.any(|bound| (bound.interface_index, bound.queue) == place)
    }

    /// Whether any is open and bound.
    pub(super) fn are_in_use(&self) -> bool {
        self.bound.iter().any(Bound::is_open)
    }

    /// Those that may lend their memory to a socket with these options, and whether they use several buffers.
    pub(super) fn lenders(
        &self,
        interface_index: u32,
        options: &BindOptions,
    ) -> impl Iterator<Item = (Arc<Member>, bool)> {
        let suit = move |bound: &&Bound| bound.suits(interface_index, options);
        let lender = |bound: &Bound| Some((bound.member.upgrade()?, bound.options.multi_buffer));
        self.bound.iter().filter(suit).filter_map(lender)
    }

    /// One more is bound; what was kept for it is not needed any more.
    pub(super) fn bound(
        &mut self,
        member: &Arc<Member>,
        interface_index: u32,
        queue: u32,
        options: BindOptions,
    ) {
        self.registered = None;
        self.bound.retain(Bound::is_open);
        self.bound.push(Bound {
            member: Arc::downgrade(member),
            interface_index,
            queue,
            options,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_moves_bytes_as_wanted_lends() {
        let bound = |copy_mode, multi_buffer, need_wakeup| Bound {
            member: Weak::new(),
            interface_index: 1,
            queue: 0,
            options: BindOptions {
                copy_mode,
                multi_buffer,
                need_wakeup,
                ..BindOptions::default()
            },
        };
        let (copy, zero) = (CopyMode::Copy, CopyMode::ZeroCopy);
        // Lender, borrower, whether it lends on its own interface and on another one.
        for (lender, borrower, [here, elsewhere]) in [
            ((copy, true, true), (copy, true, true), [true, true]),
            ((copy, false, true), (copy, false, true), [true, true]),
            ((copy, true, true), (copy, false, true), [true, true]),
            ((copy, false, true), (copy, true, true), [false, false]),
            ((copy, true, true), (copy, true, false), [false, false]),
            ((copy, true, true), (zero, true, true), [false, false]),
            ((zero, true, true), (copy, true, true), [false, false]),
            ((zero, false, true), (zero, false, true), [true, true]),
            // The other driver would not be asked whether it takes several buffers.
            ((zero, true, true), (zero, true, true), [true, false]),
            ((zero, true, true), (zero, false, true), [false, false]),
            ((zero, false, true), (zero, true, true), [false, false]),
        ] {
            let of = |(copy_mode, multi_buffer, need_wakeup)| {
                bound(copy_mode, multi_buffer, need_wakeup)
            };
            let wanted = of(borrower).options;
            for (index, lends) in [(1, here), (2, elsewhere)] {
                let suits = of(lender).suits(index, &wanted);
                assert_eq!(suits, lends, "{lender:?} {borrower:?} {index}");
            }
        }
    }
}
