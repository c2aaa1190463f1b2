//! The guest's side of the packet path: its memory, its queues, its notifications.

mod area;
mod call;
mod checked;
pub mod driver_mock;
mod error;
mod guard;
mod holes;
mod memory;
mod split;
pub mod spsc;
mod virtqueue;
pub mod xsk;

pub use area::Area;
pub use call::Call;
pub use error::{MemoryError, RingError};
pub use guard::WriteGuard;
pub use memory::{
    GuestBytes, GuestRam, HIGH_RAM_START, LOW_RAM_END, PAGE_BYTES, Pages, RegionSource,
};
pub use virtqueue::{Chain, QUEUE_SIZE_MAX, QueueState, Segment, Virtqueue};
