//! A guest whose RAM is of huge pages, as KVM's own statistics have its mappings: large until the guest writes there.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use colo_lab::testpmd::HugePages;

use super::*;
use crate::checkpoint::guests::{Guest, ON_ORDER};

const RAM_MIB: u64 = 64;
const HUGE_BYTES: u64 = 2 << 20;
/// Behind the orders.
const BASE: u64 = 2 * HUGE_BYTES;
/// Huge pages that the guest touches.
const TOUCHED: u64 = 24;
/// The huge pages of the guest's page tables and of its orders: written to whatever the test does.
const OF_ITS_OWN: u64 = 2;

// _IO(KVMIO, 0xce)
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;

/// A number of the machine's statistics (`Documentation/virt/kvm/api.rst`, section 4.132).
fn statistic(guest: &Guest, name: &str) -> u64 {
    let vm = guest.machine.vm().dirty().fd.as_raw_fd();
    // SAFETY: the request takes no argument and gives a new descriptor.
    let fd = unsafe { libc::ioctl(vm, KVM_GET_STATS_FD, 0) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    let mut bytes = vec![0; 1 << 16];
    let length = file.read_at(&mut bytes, 0).unwrap();
    bytes.truncate(length);
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let [name_bytes, count, descriptors, data] = [4, 8, 16, 20].map(word);
    for descriptor in (0..count).map(|n| descriptors + n * (16 + name_bytes)) {
        let text = &bytes[descriptor + 16..descriptor + 16 + name_bytes];
        if text.split(|byte| *byte == 0).next() == Some(name.as_bytes()) {
            let at = data + word(descriptor + 8);
            return u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        }
    }
    panic!("KVM does not count {name}");
}

/// With two-dimensional paging KVM splits large mappings when logging begins, unless it is told not to; this tells it, for as
/// long as the test lasts. Other ways of paging know no such thing.
struct NotSplitEagerly(Option<String>);

impl NotSplitEagerly {
    const PARAMETER: &str = "/sys/module/kvm/parameters/eager_page_split";

    fn set() -> Self {
        let tdp_mmu = fs::read_to_string("/sys/module/kvm/parameters/tdp_mmu");
        let splits = tdp_mmu.is_ok_and(|is_used| is_used.trim() == "Y");
        let before = splits.then(|| fs::read_to_string(Self::PARAMETER).unwrap());
        if before.is_some() {
            fs::write(Self::PARAMETER, "N").unwrap();
        }
        Self(before)
    }
}

impl Drop for NotSplitEagerly {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = fs::write(Self::PARAMETER, before.trim());
        }
    }
}

#[test]
fn mappings_of_huge_pages_stay_large_until_the_guest_writes_there() {
    let _not_split = NotSplitEagerly::set();
    for dirty in ["bitmap", "ring"] {
        let _reserved = HugePages::reserve(RAM_MIB as usize).unwrap();
        let lines = format!("[checkpoint]\ndirty = \"{dirty}\"");
        let guest = Guest::start_on(true, ON_ORDER, RAM_MIB, &lines);
        let machine = &guest.machine;
        assert!(machine.ram().is_huge());
        machine.resume_vcpus().unwrap();
        let large = || statistic(&guest, "pages_2m");
        guest.write_once(BASE, TOUCHED, HUGE_BYTES);
        let before = large();
        assert!(before >= TOUCHED, "{dirty}: {before}");

        machine.set_dirty_logging(true).unwrap();
        let logged = large();
        println!("{dirty}: {before} large mappings, {logged} when logging begins");
        assert!(
            logged + OF_ITS_OWN >= before,
            "{dirty}: {logged} of {before}"
        );
        // The second time its pages are small already.
        for _ in 0..2 {
            guest.write_once(BASE, 5, HUGE_BYTES);
            let mut set = PageBitmap::new(machine.ram().page_count());
            machine.take_dirty(&mut set).unwrap();
            let written = large();
            let range = before - 5 - OF_ITS_OWN..=before - 5;
            assert!(range.contains(&written), "{dirty}: {written} of {before}");
        }
        // Without a secondary they are what they were, as soon as they are used.
        machine.set_dirty_logging(false).unwrap();
        guest.write_once(BASE, TOUCHED, HUGE_BYTES);
        assert!(large() >= TOUCHED, "{dirty}: {} of {before}", large());
    }
}
