//! Opens the link's AF_XDP sockets: their memory, a socket on each queue, and the program that feeds them.
//!
//! Invariants: all ports of a link are opened, or none; no frame is taken from the host before every queue has its socket;
//! memory of the pool that cannot be used is counted, and the port has its own instead.
//!
//! Sends and receives nothing.

use std::collections::VecDeque;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use colo_bpf::{
    Attach, AttachMode, Attached, Groups, LINK_ETHERTYPE, LinkChannel, XdpError, XdpProgram,
};

use super::chunks::{Chunks, PoolMemory};
use super::shared::{self, Loan};
use super::{
    ETHERNET_BYTES, Queue, RING_ENTRIES, SEND_CHUNKS, XdpPort, XdpPortError, interface_of,
};
use crate::link::port::WakeUps;
use crate::link::reliable::RECEIVE_WINDOW;
use crate::ring::xsk::{BindOptions, CopyMode, Interface, Umem, XskError, XskSocket};

/// What the kernel keeps of a chunk for itself.
const HEADROOM_BYTES: usize = 256;
/// Chunks beside those that the receive window can hold: for acknowledgements and what is refused.
const SPARE_CHUNKS: usize = 64;
/// Chunks in the fill rings of all queues together, and of each at least.
pub(super) const FILL_CHUNKS: usize = 512;
pub(super) const FILL_CHUNKS_MIN: usize = 64;
/// The kernel lets go of a queue a little after its last socket was closed.
const BUSY_TRIES: u32 = 50;
const BUSY_PAUSE: Duration = Duration::from_millis(2);

/// What the sockets receive into and send from.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) chunks: Chunks,
    pub(super) sockets: Vec<XskSocket>,
    pub(super) count: usize,
    pub(super) payload_max: usize,
    /// Chunks that the fill ring of each queue should have.
    pub(super) fill_target: usize,
    pub(super) free: Vec<u32>,
    pub(super) sendable: VecDeque<u32>,
    pub(super) loan: Option<Loan>,
}

impl Memory {
    /// Memory of the port's own.
    fn own(interface: &Interface, mtu: usize, queues: &[u32]) -> Result<Self, XdpPortError> {
        let chunk_bytes = if mtu <= payload_max(2048) { 2048 } else { 4096 };
        let fill_target = (FILL_CHUNKS / queues.len().max(1)).max(FILL_CHUNKS_MIN);
        let receiving = RECEIVE_WINDOW + SPARE_CHUNKS + fill_target * queues.len();
        let count = receiving + SEND_CHUNKS;
        let chunks = Chunks::new(count, chunk_bytes)?;
        let sockets = bind_all(&chunks, interface, queues)?;
        Ok(Self {
            chunks,
            sockets,
            count,
            payload_max: payload_max(chunk_bytes),
            fill_target,
            free: (0..receiving as u32).collect(),
            sendable: (receiving as u32..count as u32).collect(),
            loan: None,
        })
    }
}

/// The longest datagram that a chunk holds.
pub(super) fn payload_max(chunk_bytes: usize) -> usize {
    chunk_bytes - HEADROOM_BYTES - ETHERNET_BYTES
}

impl XdpPort {
    /// On the interface that `stream` uses here; where possible in the memory of `pool`.
    pub fn beside(stream: &TcpStream, pool: Option<&PoolMemory>) -> Result<Self, XdpPortError> {
        let name = interface_of(stream)?;
        let mut ports = Self::for_shards(&name, &[pool])?;
        ports.pop().ok_or(XdpPortError::NoEnd(0))
    }

    /// On the interface of this name a port for each shard, where possible in the memory of its pool.
    pub fn for_shards(
        name: &str,
        pools: &[Option<&PoolMemory>],
    ) -> Result<Vec<Self>, XdpPortError> {
        let interface = Interface::find(name)?;
        let (queues, shards) = (interface.rx_queues()?, pools.len());
        if (queues as usize) < shards {
            return Err(XdpPortError::FewQueues {
                interface: name.to_owned(),
                queues,
                shards,
            });
        }
        let share = |shard: usize| (shard as u32..queues).step_by(shards).collect::<Vec<_>>();
        let opened = pools.iter().enumerate();
        let opened = opened.map(|(shard, pool)| Self::bind(&interface, *pool, &share(shard)));
        let mut ports = opened.collect::<Result<Vec<_>, _>>()?;
        let sockets = ports.iter().flat_map(|port| &port.0.sockets);
        let (program, attached) = take_link_frames(&interface, sockets)?;
        let program = Arc::new(program);
        let zero_copy =
            |(memory, _): &(Memory, u64)| memory.sockets.iter().all(XskSocket::is_zero_copy);
        let zero_copy = ports.iter().all(zero_copy);
        let copying = if zero_copy { "zero-copy" } else { "copy" };
        let in_pool = ports.iter().all(|port| port.0.loan.is_some());
        let place = if in_pool { ", in the frame pool" } else { "" };
        let at = attached.mode;
        tracing::info!(
            "packet channel: AF_XDP on {name}: {at} mode, {copying}, {queues} queues{place}"
        );
        let ports = ports.drain(..).map(|(memory, pool_refusals)| {
            Self::on(memory, pool_refusals, program.clone(), &interface)
        });
        ports.collect()
    }

    /// Sockets on these queues, and how often the pool's memory could not be used for them.
    fn bind(
        interface: &Interface,
        pool: Option<&PoolMemory>,
        queues: &[u32],
    ) -> Result<(Memory, u64), XdpPortError> {
        let mtu = interface.mtu()? as usize;
        match pool.map(|pool| shared::open(pool, interface, queues)) {
            Some(Ok(memory)) => Ok((memory, 0)),
            None => Ok((Memory::own(interface, mtu, queues)?, 0)),
            Some(Err(e)) => {
                // What is not the pool's fault fails again.
                let memory = Memory::own(interface, mtu, queues)?;
                let name = interface.name();
                tracing::warn!("packet channel: AF_XDP on {name}: frames will be copied: {e}");
                Ok((memory, 1))
            }
        }
    }

    fn on(
        memory: Memory,
        pool_refusals: u64,
        program: Arc<XdpProgram>,
        interface: &Interface,
    ) -> Result<Self, XdpPortError> {
        let mac = interface.mac()?;
        let mtu = interface.mtu()? as usize;
        let queue = |socket| Queue {
            socket,
            lent: 0,
            spoilt: false,
        };
        let mut port = Self {
            program,
            queues: memory.sockets.into_iter().map(queue).collect(),
            turn: 0,
            fill_target: memory.fill_target,
            chunks: memory.chunks,
            places: vec![(0, 0); memory.count].into_boxed_slice(),
            free: memory.free,
            sendable: memory.sendable,
            loan: memory.loan,
            pool_refusals,
            mac,
            peer: mac,
            mtu: mtu.min(memory.payload_max),
            wake_ups: WakeUps::default(),
            errors: 0,
        };
        port.refill();
        Ok(port)
    }
}

/// A socket on each of these queues, without copies if the driver can.
pub(super) fn bind_all(
    chunks: &Chunks,
    interface: &Interface,
    queues: &[u32],
) -> Result<Vec<XskSocket>, XskError> {
    let umem = chunks.umem()?;
    let bind = |copy_mode| {
        let options = bind_options(copy_mode);
        let each = |queue: &u32| bind_patiently(&umem, interface, *queue, &options);
        queues.iter().map(each).collect()
    };
    match bind(CopyMode::ZeroCopy) {
        // What cannot be locked once more may be there already, for sockets that copy.
        Err(XskError::NoZeroCopy { .. } | XskError::LockedMemory { .. }) => bind(CopyMode::Copy),
        done => done,
    }
}

pub(super) fn bind_options(copy_mode: CopyMode) -> BindOptions {
    BindOptions {
        copy_mode,
        multi_buffer: false,
        fill_entries: RING_ENTRIES,
        completion_entries: RING_ENTRIES,
        rx_entries: RING_ENTRIES,
        tx_entries: RING_ENTRIES,
        ..BindOptions::default()
    }
}

pub(super) fn bind_patiently(
    umem: &Umem,
    interface: &Interface,
    queue: u32,
    options: &BindOptions,
) -> Result<XskSocket, XskError> {
    for _ in 0..BUSY_TRIES {
        match XskSocket::bind(umem, interface, queue, options) {
            Err(XskError::Busy { .. }) => std::thread::sleep(BUSY_PAUSE),
            done => return done,
        }
    }
    XskSocket::bind(umem, interface, queue, options)
}

/// The program that gives the link's frames to the sockets and all else to the host.
fn take_link_frames<'a>(
    interface: &Interface,
    sockets: impl Iterator<Item = &'a XskSocket>,
) -> Result<(XdpProgram, Attached), XdpError> {
    let mut program = XdpProgram::load()?;
    program.set_groups(Groups::Copied)?;
    program.set_link_channel(LinkChannel {
        ethertype: Some(LINK_ETHERTYPE),
        udp_port: None,
    })?;
    for socket in sockets {
        program.set_link_socket(socket.queue(), socket.as_fd())?;
    }
    let attached = program.attach(interface.name(), attach_mode(interface))?;
    Ok((program, attached))
}

/// In the driver, where nobody pays for it. A veth pair with a program in the driver has no segmentation offload any
/// more: TCP beside it, and with it the transfer of checkpoints, falls to a third (`bench/README.md`). Its frames are socket
/// buffers in both modes, so the channel itself loses nothing by the generic one.
fn attach_mode(interface: &Interface) -> Attach {
    match interface.driver().as_deref() {
        Some("veth") => Attach::Only(AttachMode::Generic),
        _ => Attach::Best,
    }
}
