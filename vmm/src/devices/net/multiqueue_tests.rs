//! Several queue pairs and their control queue, as a driver sees them, good and bad.

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::Duration;

use colo_fastpath::net_offer::NetOffer;
use colo_fastpath::nic::{Nic, SocketNic};
use colo_fastpath::ring::driver_mock::DriverMock;
use colo_fastpath::ring::{Call, GuestRam, Pages, Segment};
use colo_fastpath::worker::{PollMode, PortWiring, WorkerConfig, WorkerHandle, spawn};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::control::{Control, ControlError, ControlStats};
use super::*;
use crate::devices::virtio_mmio::{DeviceState, VirtioMmio};
use crate::machine::record::seal;

const PAIRS: usize = 3;
/// The control queue, behind all pairs.
const CONTROL: u32 = 6;
const BUFFER: u64 = 0x8_0000;
const COMMAND: u64 = 0x9_0000;
const ACK: u64 = 0x9_1000;
/// `VIRTIO_NET_F_CTRL_VQ` and `VIRTIO_NET_F_MQ`
const CTRL_VQ: u32 = 1 << 17;
const MQ: u32 = 1 << 22;

struct Bench {
    ram: Arc<GuestRam>,
    device: VirtioMmio,
    wires: Vec<UnixDatagram>,
    workers: Vec<WorkerHandle>,
    stats: Arc<ControlStats>,
    /// Two for each pair, then the control queue.
    queues: Vec<DriverMock>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.workers.iter().for_each(WorkerHandle::stop);
    }
}

fn queue_base(number: usize) -> u64 {
    0x1_0000 + 0x1_0000 * number as u64
}

fn bench() -> Bench {
    let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let call = Arc::new(Call::new(line));
    let (mut wires, mut workers, mut kicks) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..PAIRS {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let (nic, wire) = SocketNic::pair(1500).unwrap();
        let patience = Some(Duration::from_secs(20));
        wire.set_read_timeout(patience).unwrap();
        let wiring = PortWiring {
            ram: ram.clone(),
            call: call.clone(),
            kick: kick.try_clone().unwrap(),
        };
        let config = WorkerConfig {
            name: format!("net{pair}"),
            poll: PollMode::Interrupt,
            cpu: None,
            frame_slots: 64,
            tx: Default::default(),
            stages: false,
        };
        let nic: Box<dyn Nic> = Box::new(nic);
        workers.push(spawn(config, nic, wiring).unwrap());
        wires.push(wire);
        kicks.push(kick);
    }
    let offer = NetOffer::new([2, 0, 0, 0, 0, 1], 1500);
    let net = Net::new(offer, ram.clone(), call.clone(), workers.clone());
    let stats = net.control_stats();
    let device = VirtioMmio::new(Box::new(net), call, kicks);
    Bench {
        queues: mocks(&ram),
        ram,
        device,
        wires,
        workers,
        stats,
    }
}

fn mocks(ram: &Arc<GuestRam>) -> Vec<DriverMock> {
    let mock = |number| DriverMock::new(ram.clone(), queue_base(number), 64, true);
    (0..=2 * PAIRS).map(mock).collect()
}

impl Bench {
    fn write(&mut self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Up to `FEATURES_OK`; gives whether the device took the features.
    fn negotiate(&mut self, features: u32) -> bool {
        self.write(0x70, 0);
        self.write(0x70, 3);
        for (select, bits) in [(1, 1), (0, 1 << 29 | 1 << 28 | 1 << 5 | features)] {
            self.write(0x24, select);
            self.write(0x20, bits);
        }
        self.write(0x70, 11);
        self.read(0x70) & 8 != 0
    }

    /// Starts the device with these features and queues.
    fn start(&mut self, features: u32, numbers: &[u32]) {
        self.ram.write(0x1_0000, &[0; 0x7_0000]).unwrap();
        self.queues = mocks(&self.ram);
        assert!(self.negotiate(features));
        for &number in numbers {
            let queue = self.queues[number as usize].queue_state();
            self.write(0x30, number);
            self.write(0x38, queue.size.into());
            for (low, gpa) in [
                (0x80, queue.descriptors),
                (0x90, queue.avail),
                (0xa0, queue.used),
            ] {
                self.write(low, gpa as u32);
                self.write(low + 4, 0);
            }
            self.write(0x44, 1);
        }
        self.write(0x70, 15);
    }

    fn start_all(&mut self) {
        self.start(CTRL_VQ | MQ, &[0, 1, 2, 3, 4, 5, CONTROL]);
        assert_eq!(self.read(0x70), 15);
    }

    /// Sends a command and gives the acknowledgement.
    fn command(&mut self, bytes: &[u8]) -> u8 {
        self.ram.write(COMMAND, bytes).unwrap();
        self.ram.write(ACK, &[0xaa]).unwrap();
        // Header and data may lie apart.
        let (head, data) = bytes.split_at(2.min(bytes.len()));
        let mut readable = vec![Segment {
            gpa: COMMAND,
            len: head.len() as u32,
        }];
        if !data.is_empty() {
            readable.push(Segment {
                gpa: COMMAND + 2,
                len: data.len() as u32,
            });
        }
        let control = &mut self.queues[CONTROL as usize];
        control
            .offer(&readable, &[Segment { gpa: ACK, len: 1 }])
            .unwrap()
            .unwrap();
        self.write(0x50, CONTROL);
        let used = self.queues[CONTROL as usize].take_used().unwrap();
        assert_eq!(used.unwrap().written, 1);
        let mut ack = [0];
        self.ram.read(ACK, &mut ack).unwrap();
        ack[0]
    }

    fn set_pairs(&mut self, pairs: u16) -> u8 {
        let [low, high] = pairs.to_le_bytes();
        self.command(&[4, 0, low, high])
    }

    /// A frame leaves by this pair's worker.
    fn send(&mut self, pair: usize) {
        let frame = [pair as u8; 60];
        self.ram.write(BUFFER, &[0; 12]).unwrap();
        self.ram.write(BUFFER + 12, &frame).unwrap();
        let buffer = Segment {
            gpa: BUFFER,
            len: 72,
        };
        let queue = &mut self.queues[2 * pair + 1];
        queue.offer(&[buffer], &[]).unwrap().unwrap();
        self.write(0x50, 2 * pair as u32 + 1);
        let mut received = [0; 100];
        assert_eq!(self.wires[pair].recv(&mut received).unwrap(), 60);
        assert_eq!(received[..60], frame);
    }

    fn saved(&self) -> DeviceState {
        let pairs = self.workers.iter().map(|worker| worker.quiesce().unwrap());
        let live: Vec<_> = pairs
            .flat_map(|pair| pair.map_or([None; 2], |pair| pair.map(Some)))
            .collect();
        self.device.save(&live)
    }
}

#[test]
fn several_pairs_are_offered_with_a_control_queue_behind_them() {
    let mut bench = bench();
    bench.write(0x14, 0);
    assert_eq!(bench.read(0x10) & (MQ | CTRL_VQ), MQ | CTRL_VQ);
    let mut pairs = [0; 2];
    bench.device.read(0x108, &mut pairs);
    assert_eq!(u16::from_le_bytes(pairs), 3);
    for (queue, size) in [(0, 256), (CONTROL, 256), (CONTROL + 1, 0)] {
        bench.write(0x30, queue);
        assert_eq!(bench.read(0x34), size);
    }
    assert!(!bench.negotiate(MQ), "it needs a control queue");
    assert!(!bench.negotiate(CTRL_VQ));
    assert!(bench.negotiate(MQ | CTRL_VQ));
    assert!(bench.negotiate(0));
}

#[test]
fn a_driver_that_knows_one_pair_needs_no_other_queue() {
    let mut bench = bench();
    bench.start(0, &[0, 1]);
    assert_eq!(bench.read(0x70), 15);
    bench.send(0);
    bench.write(0x50, CONTROL);
    bench.write(0x50, 3);
    bench.send(0);
    assert_eq!(bench.saved().queues[2].size, 256);
}

#[test]
fn a_driver_chooses_how_many_pairs_it_uses() {
    let mut bench = bench();
    bench.start_all();
    for pairs in [3, 1, 2] {
        assert_eq!(bench.set_pairs(pairs), 0);
    }
    assert_eq!(bench.stats.snapshot().commands, 3);
    for pair in [0, 1, 2, 1] {
        bench.send(pair);
    }
    for bad in [0, 4, 0x8000, 0xffff] {
        assert_eq!(bench.set_pairs(bad), 1, "{bad}");
    }
    let many = [4; 300];
    let others: [&[u8]; 8] = [
        &[9, 0, 2, 0],
        &[0, 0, 1],
        &[4, 1, 2, 0],
        &[4, 0],
        &[4],
        &[4, 0, 2],
        &[4, 0, 2, 0, 0],
        &many,
    ];
    for command in others {
        assert_eq!(bench.command(command), 1, "{command:?}");
    }
    let counted = bench.stats.snapshot();
    assert_eq!((counted.refused, counted.ring_errors), (12, 0));
    assert_eq!(bench.read(0x70), 15, "nothing of it hurts");
    bench.send(2);
}

#[test]
fn pairs_that_are_not_set_up_are_not_used() {
    let mut bench = bench();
    bench.start(CTRL_VQ | MQ, &[0, 1, 2, 3, 4, CONTROL]);
    assert_eq!(bench.read(0x70), 15);
    assert_eq!([2, 3].map(|pairs| bench.set_pairs(pairs)), [0, 1]);
    bench.send(1);
    for without in [vec![0, 1, 2, 3, 4, 5], vec![1, 2, 3, 4, 5, CONTROL]] {
        bench.start(CTRL_VQ | MQ, &without);
        assert_eq!(bench.read(0x70), 15 | 64, "{without:?}");
    }
}

#[test]
fn a_hostile_control_queue_costs_a_reset_and_nothing_else() {
    let mut bench = bench();
    for round in 0..7 {
        bench.start_all();
        let good = Segment {
            gpa: COMMAND,
            len: 4,
        };
        let ack = Segment { gpa: ACK, len: 1 };
        let outside = Segment {
            gpa: 1 << 40,
            len: 4,
        };
        bench.ram.write(COMMAND, &[4, 0, 2, 0]).unwrap();
        let control = &mut bench.queues[CONTROL as usize];
        match round {
            0 => control.set_avail_idx(5000).unwrap(),
            1 => control.offer_head(99).unwrap(),
            2 => {
                control.offer(&[good], &[]).unwrap();
            }
            3 => {
                control.offer(&[outside], &[ack]).unwrap();
            }
            4 => {
                control.offer(&[good], &[outside]).unwrap();
            }
            5 => {
                // A chain that is its own successor.
                control.write_descriptor(3, good, 1, 3).unwrap();
                control.offer_head(3).unwrap();
            }
            _ => {
                // Readable behind writable.
                control.write_descriptor(3, ack, 3, 4).unwrap();
                control.write_descriptor(4, good, 0, 0).unwrap();
                control.offer_head(3).unwrap();
            }
        }
        bench.write(0x50, CONTROL);
        assert_eq!(bench.stats.snapshot().ring_errors, round + 1, "{round}");
        assert_eq!(bench.read(0x70), 15 | 64);
        bench.write(0x50, CONTROL);
        assert_eq!(bench.stats.snapshot().ring_errors, round + 1);
        bench.write(0x70, 0);
        assert_eq!(bench.read(0x70), 0);
    }
    bench.start_all();
    assert_eq!(bench.set_pairs(3), 0);
    bench.send(2);
}

#[test]
fn a_flood_of_commands_ends() {
    let ram = Arc::new(GuestRam::new(1 << 20, Pages::Small).unwrap());
    let mut driver = DriverMock::new(ram.clone(), 0x1_0000, 4, true);
    let mut control = Control::new(ram.clone(), driver.queue_state()).unwrap();
    let stats = ControlStats::default();
    ram.write(COMMAND, &[4, 0, 1, 0]).unwrap();
    let command = Segment {
        gpa: COMMAND,
        len: 4,
    };
    let ack = Segment { gpa: ACK, len: 1 };
    let head = driver.offer(&[command], &[ack]).unwrap().unwrap();
    // A driver on another vCPU that writes faster than the device answers.
    let served = control.serve(&stats, |_| driver.offer_head(head).is_ok());
    assert!(matches!(served, Err(ControlError::Flood)), "{served:?}");
    assert!(stats.snapshot().commands <= 1024);
}

#[test]
fn pairs_and_control_queue_travel() {
    let mut first = bench();
    first.start_all();
    assert_eq!(first.set_pairs(2), 0);
    for pair in [0, 1, 1, 2] {
        first.send(pair);
    }
    let state = first.saved();
    let used: Vec<_> = state.queues.iter().map(|queue| queue.next_used).collect();
    assert_eq!(used, [0, 1, 0, 2, 0, 1, 1]);
    let record = state.to_bytes();

    let mut second = bench();
    for worker in &second.workers {
        worker.quiesce().unwrap();
    }
    let mut all = vec![0; 1 << 20];
    first.ram.read(0, &mut all).unwrap();
    second.ram.write(0, &all).unwrap();
    second
        .device
        .restore(&DeviceState::from_bytes(&record).unwrap())
        .unwrap();
    assert_eq!(second.saved(), state);
    for worker in &second.workers {
        worker.resume().unwrap();
    }
    second.queues = std::mem::take(&mut first.queues);
    for queue in &mut second.queues {
        queue.move_to(second.ram.clone());
    }
    for pair in 0..PAIRS {
        second.send(pair);
    }
    assert_eq!(second.set_pairs(3), 0);
    second.write(0x70, 0);
    second.start_all();
    assert_eq!(
        second.saved().backend,
        bench().saved().backend,
        "a reset uses one pair"
    );

    // What another shape of device has saved.
    let mut fewer = state.clone();
    fewer.queues.truncate(2);
    let with_pairs = |pairs: u8| {
        let mut other = state.clone();
        other.backend[17..19].copy_from_slice(&[pairs, 0]);
        seal(&mut other.backend);
        other
    };
    let (none, more) = (with_pairs(0), with_pairs(4));
    let mut half = state.clone();
    half.driver_features &= !u64::from(MQ);
    for (bad, reason) in [
        (fewer, "number of queues"),
        (none, "number of active pairs"),
        (more, "number of active pairs"),
        (half, "driver_features"),
    ] {
        let refusal = second.device.check(&bad).unwrap_err().to_string();
        assert!(refusal.contains(reason), "{refusal}");
    }
}
