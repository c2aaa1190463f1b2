//! A host's NIC through AF_XDP: the guest's frames come and go past the kernel's stack, all others
//! stay with the host.
//!
//! Invariants: every receive queue has a socket, and a probe has shown that the program leads the
//! guest's frames to it (rule 24); the kernel receives only into slots lent from the pool, never
//! into guest RAM (rule 15); what is sent may lie anywhere in the area. A NIC that loses its link,
//! its queues or itself is counted, watched and used again when it is back: meanwhile what is sent
//! is lost, as on a wire.
//!
//! Frames are seen as they lie in memory. A driver that takes VLAN tags out of them is named at the
//! start; who sends over a virtual link (veth, bridge) must compute its checksums itself
//! (`ethtool -K NAME tx off`), because nobody completes them on the way.
//!
//! With several shards each has an end of the NIC ([`XdpNic::open_shards`]): shard i the queues q with
//! q % shards == i, all behind one program. The first end watches the interface, the others follow.
//!
//! All frames of an end leave by its first queue, so that a flow stays in order. The first start pins the area,
//! guest RAM included, which takes as long as touching all of it; all ends share that registration. Does not
//! configure addresses or queues, and does not steer flows.

mod abilities;
mod common;
mod copies;
mod cut;
mod error;
mod link;
mod membership;
mod news;
mod open;
mod queue;
mod recover;
mod stats;
mod strays;
mod watch;

use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use colo_bpf::{AddressOwner, AttachMode, Groups, Mac, XdpProgram};
use colo_compare::{Frames, Token};
use serde::{Deserialize, Serialize};

use super::timer::Timer;
use super::{Filter, LinkFrame, LinkShare, Nic, Sent, poll_for};
use crate::clock::now_us;
use crate::frame::{FramePool, slot_bytes_for};
use crate::ring::xsk::{CopyMode, Descriptor, Interface, Umem};

use common::{Attachment, Common};
use copies::Copies;
use link::LinkUse;
use queue::{PIECES_MAX, Queue, Use};
use recover::RETRY_US;
use watch::Watch;

pub use abilities::XdpAbilities;
pub use error::XdpNicError;
pub use stats::{XdpNicSnapshot, XdpNicStats};

/// Who sleeps with frames in the kernel's hands looks after them again after this time. Nobody waits
/// for them before: half of the guest's ring is never kept, and slots are many. A short time costs
/// a wake-up for nearly every sleep.
const REAP_US: u64 = 5000;
/// One in so many of the frames of a batch may be a copy of what a group is sent.
const COPIES_SHARE: usize = 4;

/// Which way of AF_XDP is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum XdpNicMode {
    /// The best that the driver has.
    #[default]
    Auto,
    /// The NIC itself reads and writes the frames.
    ZeroCopy,
    /// The program runs in the driver, the kernel copies.
    Driver,
    /// The program runs behind the driver, the kernel copies: works everywhere.
    Generic,
}

impl XdpNicMode {
    const ALL: [Self; 3] = [Self::ZeroCopy, Self::Driver, Self::Generic];

    fn candidates(self) -> impl Iterator<Item = Self> {
        Self::ALL
            .into_iter()
            .filter(move |&mode| self == Self::Auto || self == mode)
    }

    fn attach(self) -> AttachMode {
        match self {
            Self::Generic => AttachMode::Generic,
            _ => AttachMode::Driver,
        }
    }

    fn copy(self) -> CopyMode {
        match self {
            Self::ZeroCopy => CopyMode::ZeroCopy,
            _ => CopyMode::Copy,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::ZeroCopy => "driver, zero-copy",
            Self::Driver => "driver, copy",
            Self::Generic => "generic, copy",
        }
    }
}

/// How a NIC is used.
#[derive(Clone, Debug)]
pub struct XdpNicConfig {
    /// Its name.
    pub interface: String,
    /// Which way.
    pub mode: XdpNicMode,
    /// Largest payload of the guest's frames.
    pub mtu: u16,
    /// The filter at the start.
    pub filter: Filter,
    /// The guest's addresses, for which the NIC receives even while they are dropped.
    pub macs: Vec<Mac>,
    /// Who gets broadcast and multicast. ARP and neighbour solicitations for the host's addresses
    /// always reach the host. [`Groups::Copied`] is for both, [`Groups::Guest`] is faster.
    pub groups: Groups,
    /// The guest's IP addresses, where they are known.
    pub addresses: Vec<IpAddr>,
    /// What is asked of kernel and driver at most.
    pub abilities: XdpAbilities,
}

impl XdpNicConfig {
    /// A NIC that a guest shares with the host, in the best mode. Both get broadcast and multicast.
    pub fn new(interface: &str, mac: Mac, mtu: u16, filter: Filter) -> Self {
        Self {
            interface: interface.to_owned(),
            mode: XdpNicMode::Auto,
            mtu,
            filter,
            macs: vec![mac],
            groups: Groups::Copied,
            addresses: Vec::new(),
            abilities: XdpAbilities::default(),
        }
    }
}

/// What is shared with the kernel. Per queue the kernel needs about 136 bytes for each chunk of the
/// registered memory, one more or less, so a queue that is not sent from does without the guest's RAM.
#[derive(Debug)]
struct Memory {
    /// The area up to the end of all slots: for the first queue of each end.
    whole: Umem,
    /// The slots alone, and where they start: for the other queues, which only receive, and for the link's sockets.
    slots: Option<Umem>,
    slots_at: u64,
}

/// A NIC over AF_XDP. It carries frames after [`Nic::start`].
#[derive(Debug)]
pub struct XdpNic {
    config: XdpNicConfig,
    common: Arc<Common>,
    /// Which end of the NIC this is.
    shard: u32,
    /// What its sockets are bound under.
    attachment: Option<Attachment>,
    /// Changes of what is common that it has heeded.
    heeded: u64,
    /// What the guest hears, as this end knows.
    filter: Filter,
    interface: Interface,
    memory: Option<Memory>,
    queues: Vec<Queue>,
    uses: Box<[Use]>,
    /// Slots that a NIC that writes by itself may still reach.
    parked: Vec<Use>,
    /// What is in use; `Auto` before the start.
    mode: XdpNicMode,
    /// What is in use, of what was asked.
    abilities: XdpAbilities,
    has_link: bool,
    /// When to try again, while there are no queues.
    retry_at_us: Option<u64>,
    /// Why the last attempt failed.
    failure: Option<String>,
    /// The queue that is looked at first.
    turn: usize,
    host_addresses: Vec<IpAddr>,
    /// With [`Groups::Copied`].
    copies: Option<Copies>,
    /// While the link's packet channel uses it, too.
    link: Option<LinkUse>,
    watch: Option<Watch>,
    timer: Timer,
    stats: Arc<XdpNicStats>,
}

impl XdpNic {
    /// Looks at the interface and loads the program. Nothing is attached or bound yet.
    pub fn open(config: XdpNicConfig) -> Result<Self, XdpNicError> {
        let common = Self::look_at(&config, 1)?;
        Self::end(config, Arc::new(common), 0)
    }

    /// The same with an end for each of so many shards. The first is to be started first.
    pub fn open_shards(config: XdpNicConfig, shards: usize) -> Result<Vec<Self>, XdpNicError> {
        let shards = shards.max(1) as u32;
        let common = Arc::new(Self::look_at(&config, shards)?);
        let end = |shard| Self::end(config.clone(), common.clone(), shard);
        (0..shards).map(end).collect()
    }

    /// Looks whether the interface will do, and loads the program.
    fn look_at(config: &XdpNicConfig, shards: u32) -> Result<Common, XdpNicError> {
        let interface = Interface::find(&config.interface)?;
        interface.mac()?;
        let mtu = interface.mtu()?;
        if mtu < u32::from(config.mtu) {
            return Err(XdpNicError::Mtu {
                interface: config.interface.clone(),
                mtu,
                wanted: config.mtu,
            });
        }
        enough_queues(&config.interface, interface.rx_queues()?, shards)?;
        let mut program = XdpProgram::load()?;
        program.set_groups(config.groups)?;
        for mac in &config.macs {
            program.add_guest_mac(*mac)?;
        }
        for address in &config.addresses {
            program.set_address(*address, AddressOwner::Guest)?;
        }
        let (name, macs) = (&config.interface, config.macs.clone());
        Common::new(name, program, macs, config.filter, shards).map_err(|source| {
            XdpNicError::Watch {
                interface: name.clone(),
                source,
            }
        })
    }

    fn end(config: XdpNicConfig, common: Arc<Common>, shard: u32) -> Result<Self, XdpNicError> {
        let timer = Timer::new().map_err(|source| XdpNicError::Watch {
            interface: config.interface.clone(),
            source,
        })?;
        Ok(Self {
            interface: Interface::find(&config.interface)?,
            common,
            shard,
            attachment: None,
            heeded: 0,
            filter: config.filter,
            memory: None,
            queues: Vec::new(),
            uses: Box::default(),
            parked: Vec::new(),
            mode: XdpNicMode::Auto,
            abilities: config.abilities,
            has_link: true,
            retry_at_us: None,
            failure: None,
            turn: 0,
            host_addresses: Vec::new(),
            copies: None,
            link: None,
            watch: None,
            timer,
            stats: Arc::default(),
            config,
        })
    }

    /// What it counts, readable by others.
    pub fn stats(&self) -> Arc<XdpNicStats> {
        self.stats.clone()
    }

    /// The mode that is in use; `Auto` before the start.
    pub fn mode(&self) -> XdpNicMode {
        self.mode
    }

    fn apply_filter(&mut self, filter: Filter) -> Result<(), XdpNicError> {
        self.common.set_filter(filter)?;
        self.heed_filter();
        Ok(())
    }

    /// What came before the guest was to hear anything is not for it.
    fn heed_filter(&mut self) {
        let filter = self.common.filter();
        if let (Filter::DropAll, Some(copies)) = (self.filter, &mut self.copies) {
            copies.discard();
        }
        self.filter = filter;
    }

    fn set_host_addresses(&mut self, addresses: &[IpAddr]) -> Result<(), XdpNicError> {
        let program = &mut self.common.control().program;
        for old in &self.host_addresses {
            if !addresses.contains(old) && !self.config.addresses.contains(old) {
                program.remove_address(*old)?;
            }
        }
        for address in addresses {
            if !self.config.addresses.contains(address) {
                program.set_address(*address, AddressOwner::Host)?;
            }
        }
        self.host_addresses = addresses.to_vec();
        Ok(())
    }

    fn address_error(&self, source: io::Error) -> XdpNicError {
        XdpNicError::Address {
            interface: self.config.interface.clone(),
            source,
        }
    }

    fn receive_all(&mut self, frames: &mut FramePool, out: &mut VecDeque<Token>, max: usize) {
        if self.common.is_closed() {
            return self.throw_away(frames);
        }
        let mut left = max;
        if let Some(copies) = &mut self.copies {
            let before = out.len();
            match self.filter {
                // Rule 24: the guest hears nothing yet.
                Filter::DropAll => copies.discard(),
                // Groups come by the queues like all else.
                Filter::Open => {}
                Filter::Guest(_) => copies.receive(Some(frames), out, left.div_ceil(COPIES_SHARE)),
            }
            left -= out.len() - before;
        }
        // Each is the first by turns, so that a full one does not keep the others waiting.
        let queues = self.queues.len().max(1);
        self.turn = (self.turn + 1) % queues;
        let (before, from) = self.queues.split_at_mut(self.turn);
        for queue in from.iter_mut().chain(before) {
            left -= queue.receive_replaced(frames, &mut self.uses, out, left, &self.stats);
            if left == 0 {
                return;
            }
        }
    }

    /// Gives up what has come so far: it came before the guest was to hear anything (rule 24).
    fn throw_away(&mut self, frames: &mut FramePool) {
        if let Some(copies) = &mut self.copies {
            copies.discard();
        }
        let mut early = VecDeque::new();
        for queue in &mut self.queues {
            queue.receive(frames, &mut self.uses, &mut early, usize::MAX, &self.stats);
        }
        for token in early {
            frames.release(token);
        }
    }
}

fn enough_queues(interface: &str, queues: u32, shards: u32) -> Result<(), XdpNicError> {
    if queues < shards {
        return Err(XdpNicError::FewQueues {
            interface: interface.to_owned(),
            queues,
            shards,
        });
    }
    Ok(())
}

impl Nic for XdpNic {
    fn name(&self) -> &str {
        &self.config.interface
    }

    fn describe(&self) -> String {
        let queues = self.queues.len();
        let plural = if queues == 1 { "" } else { "s" };
        let pieces = if self.abilities.multi_buffer {
            ""
        } else {
            ", frames in one piece"
        };
        let lost = match (self.retry_at_us, &self.failure) {
            (Some(_), Some(why)) => format!(", lost ({why})"),
            (Some(_), None) => ", lost".to_owned(),
            (None, _) if !self.has_link => ", no link".to_owned(),
            (None, _) => String::new(),
        };
        let mode = self.mode.name();
        let link = self.link.as_ref().map_or("", |_| ", link packets too");
        format!("af_xdp, {mode}, {queues} queue{plural}{pieces}{link}{lost}")
    }

    fn start(&mut self, frames: &mut FramePool) -> io::Result<()> {
        self.bring_up(frames).map_err(io::Error::other)
    }

    fn receive(
        &mut self,
        frames: &mut FramePool,
        out: &mut VecDeque<Token>,
        max: usize,
    ) -> io::Result<()> {
        self.receive_all(frames, out, max);
        Ok(())
    }

    fn send(&mut self, frames: &mut FramePool, token: Token) -> Sent {
        if !self.has_link || self.queues.is_empty() {
            self.stats.tx_without_link.add(1);
            frames.release(token);
            return Sent::Refused(io::Error::from_raw_os_error(libc::ENETDOWN));
        }
        let mut list = [Descriptor {
            offset: 0,
            len: 0,
            more: false,
        }; PIECES_MAX];
        let Some((slot, count)) = self.describe_frame(frames, &token, &mut list) else {
            self.stats.tx_too_long.add(1);
            frames.release(token);
            return Sent::Refused(io::Error::from_raw_os_error(libc::EMSGSIZE));
        };
        match self.queues[0].send(frames, &mut self.uses, slot, token, &list[..count]) {
            Ok(()) => Sent::Done,
            Err(token) => Sent::Full(token),
        }
    }

    fn flush(&mut self, frames: &mut FramePool) -> io::Result<()> {
        if self.common.changes() != self.heeded {
            self.heed(frames);
        }
        if self.common.is_closed() {
            self.throw_away(frames);
        }
        if let Some(seen) = self.watch.as_ref().and_then(Watch::changed) {
            self.look(frames, &seen);
        }
        if self.retry_at_us.is_some_and(|at| now_us() >= at) {
            self.come_back(frames);
        }
        self.end_share_that_is_over(frames);
        let spare = self.spare();
        let mut outcome = Ok(());
        for queue in &mut self.queues {
            let pushed = queue.push_out(frames, &mut self.uses, self.has_link, &self.stats);
            let refilled = queue.refill(frames, &mut self.uses, spare);
            outcome = outcome.and(pushed).and(refilled);
        }
        outcome
    }

    fn poll_fds(&self, wants_frames: bool, wants_room: bool, fds: &mut Vec<libc::pollfd>) {
        for (n, queue) in self.queues.iter().enumerate() {
            // All frames leave by the first.
            let wants_room = wants_room && n == 0 && self.has_link;
            fds.extend(poll_for(queue.socket.poll_fd(), wants_frames, wants_room));
        }
        fds.extend(self.link_poll_fds());
        if let Some(copies) = &self.copies {
            fds.extend(poll_for(copies.poll_fd(), wants_frames, false));
        }
        if self.common.shards() > 1 {
            fds.extend(poll_for(self.common.poll_fd(self.shard), true, false));
        }
        if let Some(watch) = &self.watch {
            fds.extend(poll_for(watch.poll_fd(), true, false));
        }
        let in_flight = self.queues.iter().any(|queue| queue.in_flight() > 0);
        let wait_us = match self.retry_at_us {
            Some(_) => Some(RETRY_US),
            None if in_flight && self.has_link => Some(REAP_US),
            None => None,
        };
        if let Some(wait_us) = wait_us
            && self.timer.arm(wait_us).is_ok()
        {
            fds.extend(poll_for(self.timer.poll_fd(), true, false));
        }
    }

    fn mtu(&self) -> u16 {
        self.config.mtu
    }

    /// A slot takes the largest chunk: the kernel's share grows with the number of chunks.
    fn slot_bytes(&self) -> usize {
        slot_bytes_for(self.config.mtu).max(4096)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = self.stats.snapshot().entries();
        if let Some(copies) = &self.copies {
            all.push(("group_copies_too_long", copies.too_long()));
        }
        all.push(("xsk_link_rx_dropped", self.link_drops()));
        // All ends together; the first one tells.
        if self.shard == 0
            && let Ok(program) = self.common.control().program.counters()
        {
            all.extend([
                ("xdp_host_frames", program.host_frames),
                ("xdp_host_neighbour_frames", program.host_neighbour_frames),
                ("xdp_host_group_frames", program.host_group_frames),
                ("xdp_short_frames", program.short_frames),
                ("xdp_guest_frames", program.guest_frames),
                ("xdp_guest_group_frames", program.guest_group_frames),
                ("xdp_guest_dropped_frames", program.guest_dropped_frames),
                ("xdp_guest_unbound_frames", program.guest_unbound_frames),
                ("xdp_link_frames", program.link_frames),
                ("xdp_link_unbound_frames", program.link_unbound_frames),
            ]);
        }
        if self.shard == 0
            && let Some(memory) = &self.memory
        {
            let of_area = memory.whole.usage();
            all.extend([
                ("umem_registrations", of_area.registrations),
                ("umem_registered_bytes", of_area.registered_bytes),
                ("umem_registered_again", of_area.registered_again),
            ]);
        }
        let mut sum = [0; 5];
        for queue in &self.queues {
            let kernel = queue.socket.statistics().unwrap_or_default();
            let counted = [
                kernel.rx_dropped,
                kernel.rx_ring_full,
                kernel.fill_ring_empty,
                kernel.rx_invalid,
                kernel.tx_invalid,
            ];
            for (sum, n) in sum.iter_mut().zip(counted) {
                *sum += n;
            }
        }
        all.extend(
            [
                "xsk_rx_dropped",
                "xsk_rx_ring_full",
                "xsk_fill_ring_empty",
                "xsk_rx_invalid",
                "xsk_tx_invalid",
            ]
            .into_iter()
            .zip(sum),
        );
        all
    }

    fn set_filter(&mut self, filter: Filter) -> io::Result<()> {
        self.apply_filter(filter).map_err(io::Error::other)
    }

    fn has_link(&self) -> bool {
        let is_bound = self.shard == 0 || self.attachment.is_some();
        self.has_link && self.retry_at_us.is_none() && is_bound
    }

    fn share_link(
        &mut self,
        frames: &mut FramePool,
        interface: &str,
    ) -> Option<io::Result<LinkShare>> {
        let is_here = interface == self.config.interface;
        is_here.then(|| self.share(frames).map_err(io::Error::other))
    }

    fn receive_link(&mut self, frames: &mut FramePool, out: &mut VecDeque<LinkFrame>, max: usize) {
        self.receive_link_frames(frames, out, max);
    }

    fn take_link_slots(&mut self, frames: &mut FramePool, slots: &mut Vec<u32>) {
        self.take_link_slots_back(frames, slots);
    }

    fn recall(&mut self, frames: &mut FramePool) {
        self.watch = None;
        self.close_queues(frames);
    }
}

#[cfg(test)]
mod tests;
