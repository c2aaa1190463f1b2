//! A stand-in for QEMU's colo-compare object: its socket protocol before our comparator.
//!
//! Two streams of frames come in, what the primary and what the secondary guest sent; what may leave of
//! the primary's goes out. The messages are QEMU's: a 4-byte big-endian length, with `vnet_hdr` the
//! 4-byte big-endian length of a virtio-net header, then that header and the frame. `DO_CHECKPOINT` on
//! the notify socket asks for a checkpoint, `COLO_CHECKPOINT` on it says that one was taken. Every
//! socket can be a path or `HOST:PORT`, and either end of it can be ours: see [`Address`].
//!
//! What differs from QEMU's object on purpose, each in `tests/system/qemu.rs`: the comparator compares
//! what QEMU's lets through (IPv6, ARP, VLAN, SYN, FIN, RST), it asks for a checkpoint once and not
//! for every frame, a frame that finds no room waits in its socket instead of being dropped, and
//! what a checkpoint releases leaves in the order in which the guest sent it.
//!
//! Invariants: nothing of a flow that diverged leaves before a checkpoint. Without a notify socket
//! nobody can take one, and it stays held, as it does in QEMU's object when no COLO is set up
//! around it; [`Config::checkpoint_at_once`] says otherwise.
//!
//! Does not take checkpoints, and does not see the guests' input: the rules about what was
//! acknowledged to clients need that, and are the pair's.

mod address;
mod engine;
mod error;
mod hint;
mod input;
mod intake;
mod notify;
mod outlet;
mod ready;
mod slab;

use std::hash::{BuildHasher, RandomState};

use colo_compare::{Divergence, Limits, Policy, PrimaryStats};

pub use address::Address;
use address::Opening;
use engine::{Engine, Sockets};
pub use error::SocketsError;

/// How late the secondary's frame may be unless something else is said.
pub const DEFAULT_DEADLINE_US: u64 = 200_000;

/// What to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the primary guest's frames come from.
    pub primary: Address,
    /// Where the secondary guest's frames come from.
    pub secondary: Address,
    /// Where released frames go to.
    pub out: Address,
    /// Where checkpoints are asked for.
    pub notify: Option<Address>,
    /// Messages carry a virtio-net header, which is passed on and not compared.
    pub vnet_hdr: bool,
    /// How late the secondary's equal frame may be.
    pub deadline_us: u64,
    /// What is done with single flows.
    pub policy: Policy,
    /// Without a notify socket: count each checkpoint that would be due as taken. For an observer
    /// beside a pair that runs; what leaves is then not protected.
    pub checkpoint_at_once: bool,
}

/// How many divergences a [`Summary`] tells about.
pub const DIVERGENCES_KEPT: usize = 1024;

/// What a run did.
#[derive(Debug, Clone)]
pub struct Summary {
    /// The comparator's counters.
    pub stats: PrimaryStats,
    /// Frames of the primary that never left.
    pub held: u64,
    /// Frames of the secondary that stood for nothing that left; the primary's are never dropped.
    pub dropped: u64,
    /// Flows that were known; one that was forgotten and came back counts twice.
    pub flows: u64,
    /// Checkpoints that were asked for.
    pub requests: u64,
    /// The first [`DIVERGENCES_KEPT`] reasons for that.
    pub divergences: Vec<Divergence>,
    /// Checkpoints that were taken.
    pub checkpoints: u64,
}

impl Summary {
    /// Whether the guests sent the same.
    pub fn is_same(&self) -> bool {
        self.requests == 0
    }
}

/// Opens the sockets and compares until both inputs have ended.
pub fn run(config: Config) -> Result<Summary, SocketsError> {
    let limits = limits(config.deadline_us);
    let sockets = open(&config)?;
    let Config {
        vnet_hdr,
        checkpoint_at_once,
        policy,
        ..
    } = config;
    Engine::new(sockets, vnet_hdr, checkpoint_at_once, limits, policy).run()
}

fn open(config: &Config) -> Result<Sockets, SocketsError> {
    let named = [
        ("primary_in", Some(&config.primary)),
        ("secondary_in", Some(&config.secondary)),
        ("out", Some(&config.out)),
        ("notify", config.notify.as_ref()),
    ];
    let mut openings = Vec::new();
    for (part, address) in named {
        if let Some(address) = address {
            openings.push(Opening::bind(part, address)?);
        }
    }
    for opening in &mut openings {
        opening.connect()?;
    }
    let mut sockets = Vec::new();
    for opening in openings {
        sockets.push(opening.accept()?);
    }
    let mut sockets = sockets.into_iter();
    let mut next = || sockets.next();
    match (next(), next(), next()) {
        (Some(primary), Some(secondary), Some(out)) => Ok(Sockets {
            primary,
            secondary,
            out,
            notify: next(),
        }),
        _ => unreachable!("three sockets were opened"),
    }
}

fn limits(deadline_us: u64) -> Limits {
    let defaults = Limits::default();
    Limits {
        max_held_frames: slab::SLOTS,
        // No client is seen to acknowledge anything, so as much history is always kept as there may
        // be: enough for what is under way, little enough to stay in the cache.
        max_svm_frames: 1024,
        max_history_bytes: 16 << 10,
        compare_deadline_us: deadline_us,
        lag_deadline_us: defaults.lag_deadline_us.max(deadline_us),
        extra_deadline_us: defaults.extra_deadline_us.max(deadline_us),
        // The standard library draws its keys at random.
        hash_seed: RandomState::new().hash_one(0),
        ..defaults
    }
}
