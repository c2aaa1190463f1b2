//! KVM's dirty bitmap of one slot.
//!
//! Invariant: a bit is cleared, and its page protected, only after it was read; what is written in between keeps the page
//! in what was read.

use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_DIRTY_LOG_INITIALLY_SET, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
};
use kvm_ioctls::VmFd;

use super::Slot;
use crate::checkpoint::pages::{PageBitmap, set_words};
use crate::machine::KvmError;

/// Pages cleared with one call: at about 30 ns each, a vCPU that faults meanwhile waits 0.1 ms.
const CLEAR_PAGES_MAX: u64 = 4096;
/// The range of one call; its bits are copied in even where they are 0.
const CLEAR_WORDS_MAX: usize = 4096;

// _IOW(KVMIO, 0x42, struct kvm_dirty_log)
const KVM_GET_DIRTY_LOG: libc::c_ulong = 0x4010_ae42;
// _IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = 0xc018_aec0;

#[derive(Debug)]
pub(super) struct Bitmap {
    slot: Slot,
    /// Flags of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`; 0: reading clears.
    manual: u32,
    scratch: Box<[u64]>,
}

impl Bitmap {
    pub(super) fn new(slot: Slot, manual: u32) -> Self {
        Self {
            slot,
            manual,
            scratch: vec![0; slot.pages.div_ceil(64)].into_boxed_slice(),
        }
    }

    /// Logging has just been switched on. The bits are all set where KVM has protected nothing yet; then this does, range
    /// by range, while the guest runs.
    pub(super) fn start(&mut self, fd: &VmFd) -> Result<(), KvmError> {
        if self.manual & KVM_DIRTY_LOG_INITIALLY_SET == 0 {
            return Ok(());
        }
        self.scratch.fill(u64::MAX);
        self.clear(fd)
    }

    /// Adds the pages written to `set`; gives how many they are.
    pub(super) fn take(&mut self, fd: &VmFd, set: &mut PageBitmap) -> Result<u64, KvmError> {
        self.read(fd)?;
        let mut pages = 0;
        let first = self.slot.first_page / 64;
        for (at, word) in set_words(&self.scratch) {
            set.add(first + at, word);
            pages += u64::from(word.count_ones());
        }
        if self.manual != 0 && pages > 0 {
            self.clear(fd)?;
        }
        Ok(pages)
    }

    fn read(&mut self, fd: &VmFd) -> Result<(), KvmError> {
        let log = kvm_dirty_log {
            slot: self.slot.number,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 {
                dirty_bitmap: self.scratch.as_mut_ptr().cast(),
            },
        };
        call(fd, KVM_GET_DIRTY_LOG, (&raw const log).cast())
            .map_err(KvmError::refused("read the dirty log"))
    }

    /// Clears what `scratch` says.
    fn clear(&self, fd: &VmFd) -> Result<(), KvmError> {
        let words = &self.scratch;
        let mut first = 0;
        while let Some((skip, _)) = set_words(&words[first..]).next() {
            first += skip;
            let last = range_end(&words[first..]) + first;
            self.clear_words(fd, first, last)?;
            first = last;
        }
        Ok(())
    }

    fn clear_words(&self, fd: &VmFd, first: usize, end: usize) -> Result<(), KvmError> {
        let pages = (end * 64).min(self.slot.pages) - first * 64;
        let request = kvm_clear_dirty_log {
            slot: self.slot.number,
            num_pages: pages as u32,
            first_page: first as u64 * 64,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: self.scratch[first..end].as_ptr().cast_mut().cast(),
            },
        };
        call(fd, KVM_CLEAR_DIRTY_LOG, (&raw const request).cast())
            .map_err(KvmError::refused("clear a range of the dirty log"))
    }
}

/// How many words one call clears, from a first one that is not 0.
fn range_end(words: &[u64]) -> usize {
    let (mut pages, mut end) = (0, 1);
    for (at, word) in words.iter().take(CLEAR_WORDS_MAX).enumerate() {
        pages += u64::from(word.count_ones());
        if *word != 0 {
            end = at + 1;
        }
        if pages >= CLEAR_PAGES_MAX {
            break;
        }
    }
    end
}

fn call(
    fd: &VmFd,
    request: libc::c_ulong,
    argument: *const libc::c_void,
) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: both requests take a structure that lives on the caller's stack, with a bitmap of at least as many bits as
    // the slot has pages (reading) or the structure says (clearing), both alive during the call.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_behind_a_set_word_and_hold_so_many_pages() {
        assert_eq!(range_end(&[1]), 1);
        assert_eq!(range_end(&[1, 0, 0]), 1);
        assert_eq!(range_end(&[1, 0, 1, 0]), 3);
        assert_eq!(range_end(&[u64::MAX; 100]), 64);
        let mut far = vec![0; CLEAR_WORDS_MAX + 1];
        (far[0], far[CLEAR_WORDS_MAX]) = (1, 1);
        assert_eq!(range_end(&far), 1);
    }
}
