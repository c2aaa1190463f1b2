//! Snapshots of machines on the real KVM.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use colo_fastpath::ring::{GuestRam, HIGH_RAM_START, LOW_RAM_END, Pages};

use super::*;
use crate::checkpoint::guests::{ON_ORDER, ORDERS};
use crate::checkpoint::pages::PageBitmap;
use crate::machine::tests::{
    COUNT_AND_SLEEP, COUNTER, Lab, config, elf_image, lab_around, running,
};

fn snapshot_of(lab: &Lab) -> (tempfile::TempDir, PathBuf, SnapshotReport) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.snap");
    let report = take(&lab.machine, &config(), &path).unwrap();
    (dir, path, report)
}

fn counting() -> Lab {
    let lab = running(COUNT_AND_SLEEP);
    lab.wait_until_counter_moves();
    lab
}

fn restored(path: &Path) -> Lab {
    let snapshot = Snapshot::open(path).unwrap();
    snapshot.check_geometry(&config(), 1).unwrap();
    let lab = lab_around(snapshot.ram().unwrap());
    snapshot.apply(&lab.machine).unwrap();
    lab
}

fn refused(path: &Path) -> String {
    Snapshot::open(path).unwrap_err().to_string()
}

#[test]
fn a_machine_goes_on_where_its_snapshot_was_taken_as_often_as_one_likes() {
    let lab = counting();
    let before = lab.counter(COUNTER);
    let (dir, path, report) = snapshot_of(&lab);
    lab.wait_until_counter_moves();
    assert!(report.pause_us <= report.total_us && report.stored_pages < report.pages / 2);
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(
        metadata.blocks() * 512 < metadata.len() / 2,
        "pages of zeroes take no room"
    );
    let file = std::fs::read(&path).unwrap();
    let mut taken_at = None;
    for _ in 0..2 {
        let again = restored(&path);
        let counter = again.counter(COUNTER);
        assert!(counter >= before && *taken_at.get_or_insert(counter) == counter);
        again.machine.resume_vcpus().unwrap();
        assert!(again.wait_until_counter_moves() > counter);
        // What is running can be taken again.
        let (_dir, second, _) = snapshot_of(&again);
        assert!(restored(&second).counter(COUNTER) > counter);
    }
    assert!(std::fs::read(&path).unwrap() == file, "never written");
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "{names:?}");
}

#[test]
fn a_whole_file_is_verified_and_a_damaged_page_named() {
    let (_dir, path, report) = snapshot_of(&counting());
    let snapshot = Snapshot::open(&path).unwrap();
    snapshot.verify().unwrap();
    assert_eq!(snapshot.pages(), (report.pages, report.stored_pages));
    let ram_at = std::fs::metadata(&path).unwrap().len() - (8 << 20);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    // In the page of the counter, then in one of zeroes.
    for page in [COUNTER / 4096, 1500] {
        let at = ram_at + page * 4096 + 77;
        let byte = std::fs::read(&path).unwrap()[at as usize];
        file.write_all_at(&[byte ^ 1], at).unwrap();
        let bad = snapshot.verify().unwrap_err().to_string();
        assert!(
            bad.contains(&format!("guest page {page} is damaged")),
            "{bad}"
        );
        file.write_all_at(&[byte], at).unwrap();
    }
    snapshot.verify().unwrap();
}

#[test]
fn what_is_cut_or_damaged_before_the_pages_is_refused_at_once() {
    let (_dir, path, _) = snapshot_of(&counting());
    let good = std::fs::read(&path).unwrap();
    let front = good.len() - (8 << 20);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let used = |at: &usize| good[*at] != 0 || at.is_multiple_of(509);
    let meta_end = 4096 + u64::from_le_bytes(good[24..32].try_into().unwrap()) as usize;
    let table = u64::from_le_bytes(good[32..40].try_into().unwrap()) as usize;
    let table_end = table + (8 << 20) / 4096 * 8;
    assert!(table_end <= front);
    for at in (0..meta_end).chain(table..table_end).filter(used) {
        file.write_all_at(&[good[at] ^ 0x10], at as u64).unwrap();
        assert!(Snapshot::open(&path).is_err(), "byte {at}");
        file.write_all_at(&[good[at]], at as u64).unwrap();
    }
    drop(Snapshot::open(&path).unwrap());
    for len in [good.len() - 1, front, table, 5000, 4096, 100, 0] {
        file.set_len(len as u64).unwrap();
        let reason = refused(&path);
        assert!(
            ["cut off", "damaged", "not a snapshot"]
                .iter()
                .any(|word| reason.contains(word)),
            "{len}: {reason}"
        );
    }
    std::fs::write(&path, [b'x'; 10_000]).unwrap();
    assert!(refused(&path).contains("not a snapshot"));
    std::fs::remove_file(&path).unwrap();
    assert!(refused(&path).contains("No such file"));
}

#[test]
fn a_file_that_is_changed_under_its_machine_is_told_and_one_that_is_replaced_is_not() {
    let (dir, path, _) = snapshot_of(&counting());
    let good = std::fs::read(&path).unwrap();
    let opened = || Snapshot::open(&path).unwrap().into_watch();
    let watch = opened();
    let other = dir.path().join("other");
    std::fs::write(&other, &good).unwrap();
    std::fs::rename(&other, &path).unwrap();
    std::fs::read(&path).unwrap();
    watch.check().unwrap();

    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let changes: [&dyn Fn(); 3] = [
        &|| file.write_all_at(&good[5000..5001], 5000).unwrap(),
        &|| file.set_len(good.len() as u64 + 4096).unwrap(),
        &|| file.set_len(good.len() as u64 - 4096).unwrap(),
    ];
    for change in changes {
        let watch = opened();
        watch.check().unwrap();
        change();
        let mut poll = libc::pollfd {
            fd: watch.poll_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one descriptor, valid during the call.
        assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 0) }, 1);
        let told = watch.check().unwrap_err().to_string();
        assert!(told.contains("vm.snap: changed while"), "{told}");
    }
}

/// Says that this process is the one that is to lose a page.
const LOSES_A_PAGE: &str = "COLO_TEST_LOSES_A_PAGE";

#[test]
fn a_page_that_is_gone_ends_the_process_with_words() {
    if std::env::var_os(LOSES_A_PAGE).is_some() {
        lose_a_page();
    }
    let name = "snapshot::tests::a_page_that_is_gone_ends_the_process_with_words";
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", name, "--nocapture"]);
    let output = child.env(LOSES_A_PAGE, "1").output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{:?}: {told}", output.status);
    assert!(
        told.contains("vm.snap: a page of it cannot be read"),
        "{told}"
    );
}

/// Reads what was cut off a snapshot.
fn lose_a_page() {
    let (_dir, path, _) = snapshot_of(&counting());
    let ram = Snapshot::open(&path).unwrap().ram().unwrap();
    std::fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    let mut byte = [0];
    ram.read(COUNTER, &mut byte).unwrap();
}

#[test]
fn rule_22_another_machine_is_refused_by_name() {
    let (_dir, path, _) = snapshot_of(&counting());
    let snapshot = Snapshot::open(&path).unwrap();
    let differs = |change: &dyn Fn(&mut crate::config::Config), shards| {
        let mut other = config();
        change(&mut other);
        let refused = snapshot.check_geometry(&other, shards).unwrap_err();
        refused.to_string()
    };
    assert!(differs(&|c| c.vm.ram_mib = 16, 1).contains("vm.ram_mib is 8 in the snapshot and 16"));
    assert!(differs(&|c| c.vm.vcpus = 2, 1).contains("vm.vcpus is 1"));
    assert!(differs(&|c| c.net.mac[5] = 9, 1).contains("net.mac is 52:54:00:c0:10:01"));
    assert!(differs(&|c| c.net.mtu = 9000, 1).contains("net.mtu is 1500"));
    assert!(differs(&|_| (), 4).contains("host.shards is 1"));
}

#[test]
fn a_second_snapshot_replaces_the_first_and_a_failed_one_does_not() {
    let lab = counting();
    let (dir, path, _) = snapshot_of(&lab);
    let first = restored(&path).counter(COUNTER);
    lab.wait_until_counter_moves();
    take(&lab.machine, &config(), &path).unwrap();
    assert!(restored(&path).counter(COUNTER) > first);
    let nowhere = dir.path().join("none/vm.snap");
    let refused = take(&lab.machine, &config(), &nowhere).unwrap_err();
    assert!(refused.to_string().contains("none/vm.snap"), "{refused}");
    lab.wait_until_counter_moves();
}

/// A file system of a few pages.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=32k", "colo-test"])
            .arg(dir.path())
            .status();
        assert!(mounted.unwrap().success());
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_told_and_the_guest_runs_on() {
    let lab = counting();
    let disk = SmallDisk::new();
    let path = disk.0.path().join("vm.snap");
    let refused = take(&lab.machine, &config(), &path).unwrap_err();
    assert!(matches!(refused, SnapshotError::DiskFull(_)), "{refused}");
    lab.wait_until_counter_moves();
    lab.machine.worker().execute(|_, _| ()).unwrap();
    let left: Vec<_> = std::fs::read_dir(disk.0.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Has [`ON_ORDER`] add 1 to each of two words, and waits for that.
fn add_to(lab: &Lab, [first, second]: [u64; 2]) {
    let ram = lab.machine.ram();
    for (word, value) in [(2, first), (3, 2), (4, second - first)] {
        ram.write(ORDERS + 8 * word, &u64::to_le_bytes(value))
            .unwrap();
    }
    let order = lab.counter(ORDERS) + 1;
    ram.write(ORDERS, &order.to_le_bytes()).unwrap();
    while lab.counter(ORDERS + 8) != order {
        std::thread::yield_now();
    }
}

/// The pages of RAM that take memory.
fn taken_pages(ram: &GuestRam) -> usize {
    let mut taken = PageBitmap::new(ram.page_count());
    ram.find_data(taken.words_mut()).unwrap();
    taken.count()
}

#[test]
fn memory_above_the_register_windows_is_in_a_snapshot_at_no_cost_for_what_was_never_touched() {
    const HIGH_BYTES: u64 = 8 << 20;
    let ram = GuestRam::new(LOW_RAM_END + HIGH_BYTES, Pages::Small).unwrap();
    let lab = lab_around(Arc::new(ram));
    lab.machine.load(&elf_image(ON_ORDER)).unwrap();
    lab.machine.resume_vcpus().unwrap();
    let ends = [
        [0x40_0000, LOW_RAM_END - 8],
        [HIGH_RAM_START, HIGH_RAM_START + HIGH_BYTES - 8],
    ];
    ends.iter().for_each(|words| add_to(&lab, *words));
    add_to(&lab, ends[1]);
    let before = taken_pages(lab.machine.ram());
    let (_dir, path, report) = snapshot_of(&lab);
    assert_eq!(taken_pages(lab.machine.ram()), before);
    assert!(report.stored_pages as usize <= before);
    drop(lab);

    let again = restored(&path);
    assert_eq!(ends[0].map(|word| again.counter(word)), [1, 1]);
    assert_eq!(ends[1].map(|word| again.counter(word)), [2, 2]);
    again.machine.resume_vcpus().unwrap();
    ends.iter().for_each(|words| add_to(&again, *words));
    assert_eq!(ends[0].map(|word| again.counter(word)), [2, 2]);
    assert_eq!(ends[1].map(|word| again.counter(word)), [3, 3]);
}
