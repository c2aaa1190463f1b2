//! vCPUs that never run, in a machine without memory: what KVM refuses is refused here first (rule 13).
//!
//! Invariants: they are made as those of the machine are; what depends on guest memory is left out.
//!
//! Does not run anything.

use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::cpuid;
use super::kvm::KvmError;
use super::vcpu_ioctl::enable_all_events;
use super::vcpu_shape::VcpuShape;
use super::vcpu_state::VcpuState;

/// Stand-ins for the vCPUs of a machine.
#[derive(Debug)]
pub(super) struct Rehearsal {
    // Before the machine that they are in.
    vcpus: Vec<VcpuFd>,
    _vm: VmFd,
}

impl Rehearsal {
    pub(super) fn new(kvm: &Kvm, count: usize, irqchip: bool) -> Result<Self, KvmError> {
        let refused = || KvmError::refused("create a machine to try states in");
        let vm = kvm.create_vm().map_err(refused())?;
        enable_all_events(&vm);
        if irqchip {
            vm.create_irq_chip().map_err(refused())?;
        }
        let vcpu = |index: usize| {
            let fd = vm.create_vcpu(index as u64).map_err(refused())?;
            fd.set_cpuid2(&cpuid::table_for(kvm, index as u8)?)
                .map_err(KvmError::refused("set CPUID"))?;
            Ok(fd)
        };
        let vcpus = (0..count).map(vcpu).collect::<Result<_, KvmError>>()?;
        Ok(Self { vcpus, _vm: vm })
    }

    /// Whether KVM takes this state of vCPU `index`.
    pub(super) fn try_state(
        &self,
        index: usize,
        state: &VcpuState,
        shape: &VcpuShape,
    ) -> Result<(), KvmError> {
        state.rehearse(&self.vcpus[index], shape)
    }
}
