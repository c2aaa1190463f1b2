//! The vCPU calls of the KVM API that kvm-ioctls has no safe wrapper for.
//!
//! Invariants: every buffer is as long as KVM was asked for; nothing is kept after a call.
//!
//! Does not interpret what it moves.

use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_SREGS2, KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_enable_cap, kvm_sregs2, kvm_xsave,
};
use kvm_ioctls::{Cap, Error, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// What every KVM has, and what all have without features that a process must ask for.
const XSAVE_BYTES_MIN: usize = size_of::<kvm_xsave>();

/// Bytes of a vCPU's xsave area, and whether it is read by KVM_GET_XSAVE2.
pub(super) fn xsave_bytes(vm: &VmFd) -> (usize, bool) {
    match usize::try_from(vm.check_extension_int(Cap::Xsave2)) {
        Ok(bytes) if bytes >= XSAVE_BYTES_MIN => (bytes, true),
        _ => (XSAVE_BYTES_MIN, false),
    }
}

/// Whether the system registers come with PDPTRs.
pub(super) fn has_sregs2(vm: &VmFd) -> bool {
    vm.check_extension_raw(KVM_CAP_SREGS2.into()) > 0
}

/// Makes KVM show, in the vCPU events, the payload of a pending exception apart from the registers
/// that it goes to, and a pending triple fault. A KVM that cannot keeps them where they were.
pub(super) fn enable_all_events(vm: &VmFd) {
    for cap in [KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT] {
        let mut enable = kvm_enable_cap {
            cap,
            ..Default::default()
        };
        enable.args[0] = 1;
        let _ = vm.enable_cap(&enable);
    }
}

pub(super) fn get_sregs2(fd: &VcpuFd) -> Result<kvm_sregs2, Error> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: KVM writes one kvm_sregs2, which this stack owns.
    check(unsafe { ioctl_with_mut_ref(fd, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

pub(super) fn set_sregs2(fd: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), Error> {
    // SAFETY: KVM reads one kvm_sregs2, borrowed for the call.
    check(unsafe { ioctl_with_ref(fd, KVM_SET_SREGS2(), sregs) })
}

/// Fills `area`, which has [`xsave_bytes`] of this vCPU's machine.
pub(super) fn get_xsave2(fd: &VcpuFd, area: &mut [u32]) -> Result<(), Error> {
    debug_assert!(size_of_val(area) >= XSAVE_BYTES_MIN);
    // SAFETY: KVM writes as many bytes as KVM_CAP_XSAVE2 says, which is the length that `area` was
    // made with; nobody else has it.
    check(unsafe { ioctl_with_mut_ptr(fd, KVM_GET_XSAVE2(), area.as_mut_ptr()) })
}

/// Writes `area`, which has [`xsave_bytes`] of this vCPU's machine.
pub(super) fn set_xsave(fd: &VcpuFd, area: &[u32]) -> Result<(), Error> {
    debug_assert!(size_of_val(area) >= XSAVE_BYTES_MIN);
    // SAFETY: KVM reads at most as many bytes as KVM_CAP_XSAVE2 says, which is the length that `area`
    // was made with.
    check(unsafe { ioctl_with_ptr(fd, KVM_SET_XSAVE(), area.as_ptr()) })
}

/// What is added to the host's TSC to make the guest's. Fails where KVM does not tell.
pub(super) fn get_tsc_offset(fd: &VcpuFd) -> Result<u64, Error> {
    let mut offset = 0u64;
    let attribute = tsc_offset_at(&raw mut offset);
    // SAFETY: KVM writes eight bytes to the address in the attribute, which is `offset` on this stack.
    check(unsafe { ioctl_with_ref(fd, KVM_GET_DEVICE_ATTR(), &attribute) })?;
    Ok(offset)
}

pub(super) fn set_tsc_offset(fd: &VcpuFd, mut offset: u64) -> Result<(), Error> {
    let attribute = tsc_offset_at(&raw mut offset);
    // SAFETY: KVM reads eight bytes at the address in the attribute, which is `offset` on this stack.
    check(unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attribute) })
}

fn tsc_offset_at(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: offset.expose_provenance() as u64,
    }
}

/// The host's time stamp counter.
pub(super) fn host_tsc() -> u64 {
    // SAFETY: every processor that KVM runs on has it, and it touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn check(answer: libc::c_int) -> Result<(), Error> {
    match answer {
        0.. => Ok(()),
        _ => Err(Error::last()),
    }
}
