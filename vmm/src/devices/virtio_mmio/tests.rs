//! The register window, with a backend that only notes what it is told.

use std::sync::{Arc, Mutex};

use colo_fastpath::ring::{Call, QueueState};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::machine::RecordError;

#[derive(Debug, Default)]
struct Notes {
    live: Option<Vec<QueueState>>,
}

#[derive(Clone, Debug, Default)]
struct Fake(Arc<Mutex<Notes>>);

impl Backend for Fake {
    fn device_id(&self) -> u32 {
        1
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn queue_sizes_max(&self) -> &'static [u16] {
        &[256, 64]
    }
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = b"config".get(offset + i).copied().unwrap_or(0);
        }
    }
    fn accepts(&self, features: u64) -> bool {
        features & 1 << 6 == 0
    }
    fn activate(&mut self, queues: &[QueueState]) -> Result<(), BackendError> {
        if !queues.iter().all(|queue| queue.ready) {
            return Err(BackendError::NotReady);
        }
        self.0.lock().unwrap().live = Some(queues.to_vec());
        Ok(())
    }
    fn deactivate(&mut self) -> Result<(), BackendError> {
        self.0.lock().unwrap().live = None;
        Ok(())
    }
    fn save(&self) -> Vec<u8> {
        b"saved".to_vec()
    }
    fn check(&self, saved: &[u8]) -> Result<(), RecordError> {
        let field = "backend";
        let what = "fake";
        (saved == b"saved")
            .then_some(())
            .ok_or(RecordError::Field { what, field })
    }
    fn restore(
        &mut self,
        queues: Option<&[QueueState]>,
        _saved: &[u8],
    ) -> Result<(), BackendError> {
        self.0.lock().unwrap().live = queues.map(<[_]>::to_vec);
        Ok(())
    }
}

struct Bench {
    device: VirtioMmio,
    backend: Fake,
    call: Arc<Call>,
    kick: EventFd,
}

fn bench() -> Bench {
    let backend = Fake::default();
    let call = Arc::new(Call::new(EventFd::new(EFD_NONBLOCK).unwrap()));
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    let device = VirtioMmio::new(
        Box::new(backend.clone()),
        call.clone(),
        vec![kick.try_clone().unwrap()],
    );
    Bench {
        device,
        backend,
        call,
        kick,
    }
}

impl Bench {
    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    fn negotiate(&mut self) {
        self.write(0x70, 1);
        self.write(0x70, 3);
        self.write(0x24, 1);
        self.write(0x20, 1); // VERSION_1
        self.write(0x24, 0);
        self.write(0x20, 1 << 29 | 1 << 28 | 1 << 5); // EVENT_IDX, INDIRECT_DESC, the device's own
        self.write(0x70, 11);
    }

    fn set_up_queues(&mut self) {
        for queue in 0..2 {
            self.write(0x30, queue);
            self.write(0x38, 32);
            for (low, address) in [(0x80, 0x1_0000_1000_u64), (0x90, 0x2000), (0xa0, 0x3000)] {
                self.write(low, address as u32);
                self.write(low + 4, (address >> 32) as u32);
            }
            self.write(0x44, 1);
        }
    }

    fn live(&self) -> Option<Vec<QueueState>> {
        self.backend.0.lock().unwrap().live.clone()
    }
}

#[test]
fn a_driver_finds_and_starts_its_device() {
    let mut bench = bench();
    assert_eq!(bench.read(0x00), u32::from_le_bytes(*b"virt"));
    assert_eq!((bench.read(0x04), bench.read(0x08)), (2, 1));
    bench.write(0x14, 1);
    assert_eq!(bench.read(0x10), 1, "VERSION_1");
    bench.write(0x14, 0);
    assert_eq!(bench.read(0x10), 1 << 29 | 1 << 28 | 1 << 5);
    bench.negotiate();
    assert_eq!(bench.read(0x70), 11);
    bench.write(0x30, 1);
    assert_eq!(bench.read(0x34), 64);
    bench.write(0x30, 2);
    assert_eq!(bench.read(0x34), 0, "no such queue");
    bench.set_up_queues();
    assert_eq!(bench.read(0x44), 1);
    assert!(bench.live().is_none());
    bench.write(0x70, 15);
    let queues = bench.live().unwrap();
    let expected = QueueState {
        size: 32,
        ready: true,
        event_idx: true,
        indirect: true,
        device_features: 1 << 5,
        descriptors: 0x1_0000_1000,
        avail: 0x2000,
        used: 0x3000,
        ..QueueState::default()
    };
    assert_eq!(queues, [expected; 2]);

    bench.write(0x38, 64);
    assert_eq!(
        bench.device.save(&[]).queues[1].size,
        32,
        "live queues do not change"
    );
    bench.write(0x70, 0);
    assert!(bench.live().is_none());
    assert_eq!((bench.read(0x70), bench.read(0x44)), (0, 0));
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    for (select, bits) in [(0, 1 << 7), (1, 1 << 1)] {
        let mut bench = bench();
        bench.write(0x70, 3);
        bench.write(0x24, 1);
        bench.write(0x20, 1);
        bench.write(0x24, select);
        bench.write(0x20, bits | select);
        bench.write(0x70, 11);
        assert_eq!(bench.read(0x70), 3);
    }
    let mut bench = bench();
    bench.write(0x70, 11);
    assert_eq!(bench.read(0x70), 3, "VERSION_1 is not optional");
}

#[test]
fn a_start_without_queues_asks_for_a_reset() {
    let mut bench = bench();
    bench.negotiate();
    bench.write(0x70, 15);
    assert!(bench.live().is_none());
    assert_eq!(bench.read(0x70), 15 | 64);
    assert_eq!(bench.read(0x60), 2, "configuration change");
    bench.write(0x64, 2);
    assert_eq!(bench.read(0x60), 0);
    bench.write(0x70, 0);
    assert_eq!(bench.read(0x70), 0);
}

#[test]
fn odd_accesses_do_nothing() {
    let mut bench = bench();
    let mut data = [0xaa; 8];
    bench.device.read(0x00, &mut data);
    assert_eq!(data, [0; 8]);
    bench.device.read(0x104, &mut data);
    assert_eq!(&data, b"ig\0\0\0\0\0\0");
    bench.device.read(0x1fc, &mut data);
    assert_eq!(data, [0; 8]);
    for offset in 0..WINDOW_BYTES {
        for len in [1, 2, 4, 8] {
            if offset != 0x70 {
                bench.device.write(offset, &[0xff; 8][..len]);
            }
            bench.device.read(offset, &mut data[..len]);
        }
    }
    assert!(bench.live().is_none());
}

#[test]
fn a_doorbell_that_exits_is_passed_on() {
    let mut bench = bench();
    bench.write(NOTIFY_OFFSET, 0);
    assert_eq!(bench.kick.read().unwrap(), 1);
}

#[test]
fn a_device_moves_as_a_record() {
    let mut first = bench();
    first.negotiate();
    first.set_up_queues();
    first.write(0x70, 15);
    first.call.used_buffers([true, false]).unwrap();
    let mut live = first.live().unwrap();
    live[0].next_avail = 77;
    live[1].called_at = 0xfffe;
    let live_queues = live.iter().copied().map(Some).collect::<Vec<_>>();
    let record = first.device.save(&live_queues).to_bytes();
    let state = DeviceState::from_bytes(&record).unwrap();

    let mut second = bench();
    second.device.restore(&state).unwrap();
    assert_eq!(second.live().unwrap(), live);
    assert_eq!((second.read(0x70), second.read(0x60)), (15, 1));
    assert_eq!(
        second.kick.read().unwrap(),
        1,
        "the backend looks at its queues"
    );
    assert_eq!(second.device.save(&live_queues), state);

    for len in 0..record.len() {
        assert!(DeviceState::from_bytes(&record[..len]).is_err());
    }
    let mut flags = record.clone();
    flags[24] = 2;
    crate::machine::record::seal(&mut flags);
    assert!(
        DeviceState::from_bytes(&flags)
            .unwrap_err()
            .to_string()
            .contains("needs_reset")
    );
    let other = DeviceState {
        queues: vec![live[0]],
        ..state.clone()
    };
    assert!(second.device.restore(&other).is_err());
    let other = DeviceState {
        backend: Vec::new(),
        ..state.clone()
    };
    assert!(second.device.check(&other).is_err());
    let mut old = record.clone();
    old[4] = 1;
    let refusal = DeviceState::from_bytes(&old).unwrap_err().to_string();
    assert!(refusal.contains("device record of version 1"), "{refusal}");
    let other = DeviceState {
        driver_features: 1 << 60,
        ..state
    };
    assert!(second.device.check(&other).is_err());
}
