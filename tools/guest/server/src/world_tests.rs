//! A world for tests: a clock that stands still until it is moved, and an entropy source that
//! counts.

use super::{Platform, World};
use std::cell::Cell;
use std::rc::Rc;

/// Time and entropy under the test's control.
#[derive(Clone, Default)]
pub(crate) struct Fake {
    pub wall_ns: Rc<Cell<u64>>,
    entropy: Rc<Cell<u64>>,
}

impl Platform for Fake {
    fn wall_ns(&self) -> u64 {
        self.wall_ns.get()
    }

    fn entropy(&self) -> u64 {
        self.entropy.set(self.entropy.get() + 1);
        self.entropy.get()
    }
}

/// A world with 64 KiB of store and 4 MiB of buffers.
pub(crate) fn world() -> (World, Fake) {
    let fake = Fake::default();
    fake.wall_ns.set(1_700_000_000_000_000_000);
    (
        World::new(Box::new(fake.clone()), 64 * 1024, 4 << 20, 1 << 20),
        fake,
    )
}
