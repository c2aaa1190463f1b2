//! The control queue of the network device (virtio 1.3 section 5.1.6.5): how many queue pairs the driver uses.
//!
//! Invariants: served on the vCPU's thread, under the device's lock; a command is read once into host memory; whatever the
//! driver writes, the answer is an acknowledgement, `VIRTIO_NET_ERR` or a [`ControlError`], after a bounded time.
//!
//! Does not know the workers; the device does.

use std::sync::Arc;

use colo_fastpath::counters;
use colo_fastpath::ring::{Chain, GuestRam, QueueState, RingError, Segment, Virtqueue};
use tracing::debug;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

/// Commands that one notification may be for; the queue has fewer entries.
const COMMANDS_MAX: u32 = 1024;
/// Class, command and the number of pairs.
const PAIRS_SET_BYTES: usize = 4;

/// A driver broke the rules of its control queue: the device asks for a reset.
#[derive(Debug, thiserror::Error)]
pub(super) enum ControlError {
    /// The ring.
    #[error("control queue: {0}")]
    Ring(#[from] RingError),
    /// A command with no place for the acknowledgement.
    #[error("control queue: a command without room for its acknowledgement")]
    NoRoom,
    /// A driver that goes on ringing and writing.
    #[error("control queue: more than {COMMANDS_MAX} commands at once")]
    Flood,
}

counters! {
    /// What a network device's control queue has been asked for.
    ControlStats => ControlSnapshot {
        /// Commands that were carried out.
        commands,
        /// Commands that were answered by an error.
        refused,
        /// Times the queue was broken and the device asked for a reset.
        ring_errors,
    }
}

/// The queue, while a driver uses it.
#[derive(Debug)]
pub(super) struct Control {
    queue: Virtqueue,
    ram: Arc<GuestRam>,
    chain: Chain,
}

impl Control {
    /// Takes over a queue where `state` says it is.
    pub(super) fn new(ram: Arc<GuestRam>, state: QueueState) -> Result<Self, ControlError> {
        Ok(Self {
            queue: Virtqueue::new(ram.clone(), state)?,
            ram,
            chain: Chain::default(),
        })
    }

    /// Where the queue stands.
    pub(super) fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Answers all commands that wait. `set_pairs` carries one out, or refuses it. Gives whether the driver wants to be
    /// called.
    pub(super) fn serve(
        &mut self,
        stats: &ControlStats,
        mut set_pairs: impl FnMut(u16) -> bool,
    ) -> Result<bool, ControlError> {
        for _ in 0..COMMANDS_MAX {
            if !self.queue.pop(&mut self.chain)? {
                let call = self.queue.publish()?;
                if !self.queue.enable_notifications()? {
                    return Ok(call);
                }
                continue;
            }
            let done = self.command()?.is_some_and(&mut set_pairs);
            let (counter, answer) = match done {
                true => (&stats.commands, VIRTIO_NET_OK),
                false => (&stats.refused, VIRTIO_NET_ERR),
            };
            counter.add(1);
            // `ack` is the first byte that the device writes.
            let place = self.chain.writable().first().ok_or(ControlError::NoRoom)?;
            let written = self.ram.write(place.gpa, &[answer as u8]);
            written.map_err(RingError::from)?;
            self.queue.complete(self.chain.head(), 1)?;
        }
        Err(ControlError::Flood)
    }

    /// The number of pairs that the command asks for; `None` for other commands.
    fn command(&self) -> Result<Option<u16>, ControlError> {
        let mut bytes = [0; PAIRS_SET_BYTES];
        let readable = self.chain.readable();
        if Chain::bytes_of(readable) != PAIRS_SET_BYTES as u64 {
            debug!("ignored control command of another length");
            return Ok(None);
        }
        let mut at = 0;
        for Segment { gpa, len } in readable {
            let part = &mut bytes[at..at + *len as usize];
            self.ram.read(*gpa, part).map_err(RingError::from)?;
            at += part.len();
        }
        let [class, command, low, high] = bytes;
        let wanted = (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
        let is_known = (u32::from(class), u32::from(command)) == wanted;
        Ok(is_known.then_some(u16::from_le_bytes([low, high])))
    }
}
