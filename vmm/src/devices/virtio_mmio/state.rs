//! What travels of a virtio-mmio device.
//!
//! Invariants: fixed little-endian, versioned; queues are captured at a packet boundary.

use colo_fastpath::ring::{QUEUE_SIZE_MAX, QueueState};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK;

use crate::machine::RecordError;
use crate::machine::record::{Kind, Reader, Writer};

const KIND: Kind = Kind {
    name: "device",
    magic: *b"CVDV",
    version: 2,
};
const QUEUES_MAX: u32 = 64;
/// Largest part that a device adds.
const BACKEND_BYTES_MAX: u32 = 1 << 20;

/// The feature bits that belong to the type of a device (virtio 1.3 section 2.2).
pub(super) const DEVICE_FEATURES: u64 = 0xff_ffff;

/// One device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceState {
    /// virtio device type.
    pub device_id: u32,
    /// Status register, without `DEVICE_NEEDS_RESET`.
    pub status: u32,
    /// The device asks for a reset.
    pub needs_reset: bool,
    /// Features the driver has accepted.
    pub driver_features: u64,
    /// `DeviceFeaturesSel`.
    pub device_features_sel: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_sel: u32,
    /// `QueueSel`.
    pub queue_sel: u32,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// Queues in order.
    pub queues: Vec<QueueState>,
    /// What the device itself adds.
    pub backend: Vec<u8>,
}

impl DeviceState {
    /// The record.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.write_record(Vec::new())
    }

    /// The same, in the memory of `memory`.
    pub fn write_record(&self, memory: Vec<u8>) -> Vec<u8> {
        let mut writer = Writer::reuse(KIND, memory);
        writer.u32(self.device_id);
        writer.u32(self.status);
        writer.u8(self.needs_reset.into());
        writer.u64(self.driver_features);
        for register in [
            self.device_features_sel,
            self.driver_features_sel,
            self.queue_sel,
            self.interrupt_status,
            self.config_generation,
            self.queues.len() as u32,
        ] {
            writer.u32(register);
        }
        for queue in &self.queues {
            write_queue(&mut writer, queue);
        }
        writer.u32(self.backend.len() as u32);
        writer.bytes(&self.backend);
        writer.finish()
    }

    /// Reads a record.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut reader = Reader::new(KIND, bytes)?;
        let mut state = Self {
            device_id: reader.u32()?,
            status: reader.u32()?,
            needs_reset: reader.flag("needs_reset")?,
            driver_features: reader.u64()?,
            device_features_sel: reader.u32()?,
            driver_features_sel: reader.u32()?,
            queue_sel: reader.u32()?,
            interrupt_status: reader.u32()?,
            config_generation: reader.u32()?,
            queues: Vec::new(),
            backend: Vec::new(),
        };
        let count = reader.u32()?;
        if count > QUEUES_MAX {
            return Err(reader.bad("number of queues"));
        }
        for _ in 0..count {
            let mut queue = read_queue(&mut reader)?;
            if state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
                queue.device_features = state.driver_features & DEVICE_FEATURES;
            }
            state.queues.push(queue);
        }
        let len = reader.u32()?;
        if len > BACKEND_BYTES_MAX {
            return Err(reader.bad("length of the device's part"));
        }
        state.backend = reader.take(len as usize)?.to_vec();
        reader.finish()?;
        Ok(state)
    }
}

fn write_queue(writer: &mut Writer, queue: &QueueState) {
    writer.u16(queue.size);
    for flag in [queue.ready, queue.event_idx, queue.indirect] {
        writer.u8(flag.into());
    }
    for gpa in [queue.descriptors, queue.avail, queue.used] {
        writer.u64(gpa);
    }
    for index in [queue.next_avail, queue.next_used, queue.called_at] {
        writer.u16(index);
    }
}

fn read_queue(reader: &mut Reader<'_>) -> Result<QueueState, RecordError> {
    let size = reader.u16()?;
    if size > QUEUE_SIZE_MAX {
        return Err(reader.bad("queue size"));
    }
    Ok(QueueState {
        size,
        ready: reader.flag("ready")?,
        event_idx: reader.flag("event_idx")?,
        indirect: reader.flag("indirect")?,
        // Those of the record's head, if the driver has started.
        device_features: 0,
        descriptors: reader.u64()?,
        avail: reader.u64()?,
        used: reader.u64()?,
        next_avail: reader.u16()?,
        next_used: reader.u16()?,
        called_at: reader.u16()?,
    })
}
