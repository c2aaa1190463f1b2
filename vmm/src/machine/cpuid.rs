//! The CPUID that a vCPU shows: all that KVM supports on this host.
//!
//! Does not mask anything for mixed hosts.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;

use super::kvm::KvmError;

/// The table of vCPU `index`.
pub(super) fn table_for(kvm: &Kvm, index: u8) -> Result<CpuId, KvmError> {
    let mut table = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::refused("list the supported CPUID"))?;
    for entry in table.as_mut_slice() {
        match entry.function {
            // Initial APIC id.
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(index) << 24,
            0xb | 0x1f => entry.edx = u32::from(index),
            _ => {}
        }
    }
    Ok(table)
}
