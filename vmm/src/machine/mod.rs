//! The machine: KVM, memory slot, vCPU threads, boot, and what they make together.

mod boot;
mod build;
mod clock;
mod cpuid;
mod duty;
mod exits;
mod host_memory;
mod kvm;
mod platform_state;
pub(crate) mod record;
mod rehearsal;
mod states;
mod urgent;
mod vcpu;
mod vcpu_ioctl;
mod vcpu_record;
mod vcpu_shape;
mod vcpu_state;
mod view;
mod vm;
mod waits;
mod workers;

#[cfg(test)]
pub(crate) use boot::PAGE_TABLES;
pub use boot::{BootError, STACK_BYTES};
pub use build::{Event, Events, Machine, MachineError};
pub use exits::{ExitSnapshot, VmExit};
pub use kvm::KvmError;
pub use record::RecordError;
pub use states::{ClockJump, platform_parts};
pub use urgent::Urgency;
pub(crate) use vcpu::VCPU_RECORD_BYTES;
pub use vcpu::{VcpuError, VcpuHandle};
pub use vcpu_state::VcpuState;
pub use view::GuestView;
pub use vm::Vm;

#[cfg(test)]
mod duty_tests;
#[cfg(test)]
mod state_tests;
#[cfg(test)]
pub(crate) mod tests;
