//! Opens KVM and checks that it can do what a machine needs.
//!
//! Does not create anything in it.

use kvm_ioctls::{Cap, Kvm};

const PATH: &str = "/dev/kvm";
const API_VERSION: i32 = 12;

/// KVM cannot be used. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The device does not exist.
    #[error("{PATH} does not exist: load kvm_intel or kvm_amd, or enable virtualisation")]
    Missing,
    /// The device is closed to us.
    #[error("no permission to open {PATH}: run as root or join the group kvm")]
    NotPermitted,
    /// Too old or too small.
    #[error("{PATH}: the kernel's KVM lacks {0}")]
    Lacks(&'static str),
    /// A value that this processor or this KVM cannot have in a register.
    #[error("KVM does not take {data:#x} for MSR {index:#x}")]
    RefusedMsr {
        /// Which register.
        index: u32,
        /// Which value.
        data: u64,
    },
    /// The guest uses something that cannot be captured.
    #[error("the guest uses {0}, which this KVM cannot capture")]
    NotCapturable(&'static str),
    /// A call failed.
    #[error("KVM cannot {action}: {source}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: kvm_ioctls::Error,
    },
}

impl KvmError {
    /// Whether it may go better the next time: the host lacks memory or descriptors, or was interrupted.
    pub(crate) fn is_passing(&self) -> bool {
        const PASSING: [i32; 5] = [
            libc::ENOMEM,
            libc::EMFILE,
            libc::ENFILE,
            libc::EINTR,
            libc::EAGAIN,
        ];
        matches!(self, Self::Refused { source, .. } if PASSING.contains(&source.errno()))
    }

    /// For `map_err`.
    pub(crate) fn refused(action: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Refused { action, source }
    }
}

/// Opens `/dev/kvm`.
pub(super) fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|source| match source.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::NotPermitted,
        _ => KvmError::Refused {
            action: "be opened",
            source,
        },
    })?;
    if kvm.get_api_version() != API_VERSION {
        return Err(KvmError::Lacks("API version 12"));
    }
    for (capability, name) in [
        (Cap::UserMemory, "user memory slots"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::ImmediateExit, "immediate_exit"),
        (Cap::VcpuEvents, "vCPU events"),
        (Cap::Xsave, "xsave"),
        (Cap::Xcrs, "xcrs"),
        (Cap::Debugregs, "debug registers"),
        (Cap::MpState, "mp_state"),
    ] {
        if !kvm.check_extension(capability) {
            return Err(KvmError::Lacks(name));
        }
    }
    Ok(kvm)
}
