//! Audits of machines on the real KVM.

use colo_compare::{Limits, PrimaryPath};

use super::*;
use crate::machine::tests::{COUNT_AND_SLEEP, COUNTER, Lab, running};
use crate::machine::{ClockJump, Machine};

const EPOCH: u64 = 7;

fn key() -> PageKey {
    PageKey::new([5; 16])
}

pub(crate) struct Records {
    pub(crate) vcpus: Vec<Vec<u8>>,
    pub(crate) platform: Vec<u8>,
    pub(crate) devices: Vec<u8>,
}

impl Records {
    /// Of a machine that stands still.
    pub(crate) fn of(machine: &Machine) -> Self {
        let (mut vcpus, mut platform) = (Vec::new(), Vec::new());
        let devices = machine.save_devices().unwrap();
        machine.save_vcpu_records(&mut vcpus).unwrap();
        machine.save_platform(&mut platform).unwrap();
        Self {
            vcpus,
            platform,
            devices,
        }
    }

    pub(crate) fn all(&self) -> StateRecords<'_> {
        StateRecords {
            vcpus: &self.vcpus,
            platform: &self.platform,
            devices: &self.devices,
        }
    }
}

fn stopped() -> Lab {
    let lab = running(COUNT_AND_SLEEP);
    lab.wait_until_counter_moves();
    lab.machine.pause_vcpus().unwrap();
    lab
}

fn image(lab: &Lab) -> Image {
    let records = Records::of(&lab.machine);
    Image::of(EPOCH, &key(), lab.machine.ram(), records.all()).unwrap()
}

/// Makes `to` what `from` is.
fn copy(from: &Lab, to: &Lab) {
    let records = Records::of(&from.machine);
    let mut page = [0; PAGE_BYTES];
    for number in 0..from.machine.ram().page_count() {
        from.machine.ram().copy_page_out(number, &mut page).unwrap();
        to.machine.ram().write_page(number, &page).unwrap();
    }
    let states: Vec<_> = records
        .vcpus
        .iter()
        .map(|record| VcpuState::from_bytes(record).unwrap())
        .collect();
    let (machine, jump) = (
        &to.machine,
        ClockJump::SinceCapture {
            begun: std::time::Instant::now(),
        },
    );
    machine.restore_vcpus(&states, jump).unwrap();
    machine.restore_platform(&records.platform, jump).unwrap();
    machine.restore_devices(&records.devices).unwrap();
}

#[test]
fn rule_16_what_was_applied_is_what_was_captured() {
    let (primary, secondary) = (stopped(), stopped());
    let summary = image(&primary).summary(&key());
    assert!(!image(&secondary).compare(&key(), &summary, 100).is_empty());
    copy(&primary, &secondary);
    assert_eq!(image(&secondary).compare(&key(), &summary, 100), []);
    // Again, with a guest that has run on.
    primary.machine.worker().resume().unwrap();
    primary.machine.resume_vcpus().unwrap();
    primary.wait_until_counter_moves();
    primary.machine.pause_vcpus().unwrap();
    let summary = image(&primary).summary(&key());
    assert!(!image(&secondary).compare(&key(), &summary, 100).is_empty());
    copy(&primary, &secondary);
    assert_eq!(image(&secondary).compare(&key(), &summary, 100), []);
}

#[test]
fn one_changed_byte_names_its_page() {
    let lab = stopped();
    let primary = image(&lab);
    let mut summary = Summary::from_bytes(&primary.summary(&key()).to_bytes()).unwrap();
    let at = COUNTER + 4096 * 3 + 17;
    lab.machine.ram().write(at, &[1]).unwrap();
    let secondary = image(&lab);
    let differences = secondary.compare(&key(), &summary, 100);
    assert_eq!(differences, [Difference::Page(at / 4096)]);
    assert_eq!(
        differences[0].to_string(),
        "guest page 771 (address 0x303000)"
    );
    // As many as are asked for.
    for page in [0, 300, 600, 900] {
        lab.machine.ram().write(page * 4096, &[9]).unwrap();
    }
    let more = image(&lab);
    assert_eq!(more.compare(&key(), &summary, 2).len(), 2);
    let pages = [0, 300, 600, at / 4096, 900].map(Difference::Page);
    assert_eq!(more.compare(&key(), &summary, 100), pages);
    // Rule 22: without marks, or with ones that agree, the chunk is named all the same.
    let chunk = [Difference::Chunk((at / 4096) as usize / CHUNK_PAGES)];
    summary.marks = secondary.summary(&key()).marks;
    assert_eq!(secondary.compare(&key(), &summary, 100), chunk);
    summary.marks.clear();
    assert_eq!(secondary.compare(&key(), &summary, 100), chunk);
}

#[test]
fn one_changed_register_names_its_field() {
    let lab = stopped();
    let records = Records::of(&lab.machine);
    let ram = lab.machine.ram();
    let of = |records: &Records| Image::of(EPOCH, &key(), ram, records.all()).unwrap();
    let summary = of(&records).summary(&key());
    let state = VcpuState::from_bytes(&records.vcpus[0]).unwrap();
    let changed = |change: &dyn Fn(&mut VcpuState)| {
        let mut state = state.clone();
        change(&mut state);
        let records = Records {
            vcpus: vec![state.to_bytes()],
            platform: records.platform.clone(),
            devices: records.devices.clone(),
        };
        of(&records).compare(&key(), &summary, 100)
    };
    let named = |name: &str| [Difference::State(name.to_owned())];
    assert_eq!(changed(&|_| ()), []);
    assert_eq!(changed(&|s| s.nudge_register()), named("vCPU 0: registers"));
    assert_eq!(changed(&|s| s.nudge_msr(0x277)), named("vCPU 0: MSR 0x277"));
    assert_eq!(changed(&|s| s.nudge_clock()), [], "clocks differ always");
    let mut devices = records.devices.clone();
    devices[20] ^= 1;
    let other = Records { devices, ..records };
    assert_eq!(of(&other).compare(&key(), &summary, 9), named("devices"));
}

#[test]
fn images_of_other_epochs_sizes_or_records_never_agree() {
    let lab = stopped();
    let ours = image(&lab);
    let mut summary = ours.summary(&key());
    summary.epoch += 1;
    let odd = ours.compare(&key(), &summary, 9);
    assert!(matches!(odd[..], [Difference::Shape { .. }]), "{odd:?}");
    let mut summary = ours.summary(&key());
    summary.chunks.pop();
    let odd = ours.compare(&key(), &summary, 9);
    assert!(matches!(odd[..], [Difference::Shape { .. }]), "{odd:?}");
    let mut summary = ours.summary(&key());
    let (name, _) = summary.states.pop().unwrap();
    assert_eq!(ours.compare(&key(), &summary, 9), [Difference::State(name)]);
    // Rule 22: a primary of the version before says nothing of the packet side.
    let mut translations = Vec::new();
    PrimaryPath::new(Limits::default()).export_client_xlate(&mut translations);
    let shard = PacketRecords {
        translations: &translations,
        pending: b"any",
    };
    let with_packets = ours.clone().with_packets(&key(), &[shard]).unwrap();
    let summary = ours.summary(&key());
    assert_eq!(with_packets.compare(&key(), &summary, 9), []);
    let summary = with_packets.summary(&key());
    let lacking = ["translations", "pending output"].map(|part| format!("shard 0: {part}"));
    assert_eq!(
        ours.compare(&key(), &summary, 9),
        lacking.map(Difference::State)
    );
    let ours = with_packets;
    let bytes = ours.summary(&key()).to_bytes();
    assert_eq!(Summary::from_bytes(&bytes).unwrap(), ours.summary(&key()));
    for len in 0..bytes.len() {
        assert!(Summary::from_bytes(&bytes[..len]).is_err(), "{len}");
    }
}
