//! The io_uring of a channel: made disabled, restricted to what the channel does, then enabled (rule 25).
//!
//! Invariants: once enabled the ring takes the named opcodes on registered files only, and nothing more can be
//! registered; the thread that made it is the only one that enters it.
//!
//! Kernel documentation: io_uring_setup(2), io_uring_register(2) (IORING_REGISTER_RESTRICTIONS).

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};

use super::error::ChannelError;

/// What a channel does.
const OPCODES: [u8; 4] = [
    opcode::Send::CODE,
    opcode::SendMsg::CODE,
    opcode::RecvMsg::CODE,
    opcode::Read::CODE,
];
/// And where the kernel has both.
const ZERO_COPY: [u8; 2] = [opcode::SendZc::CODE, opcode::SendMsgZc::CODE];

/// A ring that is ready.
pub(super) struct Ring {
    io: IoUring,
    /// The kernel knows IORING_OP_SEND_ZC and IORING_OP_SENDMSG_ZC.
    pub(super) zero_copy: bool,
    /// The buffers are registered.
    pub(super) registered: bool,
    /// How often it was entered.
    pub(super) enters: u64,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("zero_copy", &self.zero_copy)
            .field("registered", &self.registered)
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// For so many submissions at a time and completions outstanding, on these files; `buffers` is memory to register,
    /// which must stay mapped as long as the ring lives.
    pub(super) fn new(
        submissions: u32,
        completions: u32,
        files: &[RawFd],
        buffers: libc::iovec,
    ) -> Result<Self, ChannelError> {
        let io = build(submissions, completions)?;
        if !io.params().is_feature_ext_arg() {
            return Err(ChannelError::Kernel("io_uring waits with a timeout"));
        }
        let submitter = io.submitter();
        let failed = |what| move |source| ChannelError::Ring { what, source };
        submitter
            .register_files(files)
            .map_err(failed("register sockets with io_uring"))?;
        let mut probe = Probe::new();
        submitter
            .register_probe(&mut probe)
            .map_err(failed("ask io_uring what it can do"))?;
        if OPCODES.iter().any(|&code| !probe.is_supported(code)) {
            return Err(ChannelError::Kernel("io_uring on sockets"));
        }
        let zero_copy = ZERO_COPY.iter().all(|&code| probe.is_supported(code));
        let registered = register(&io, buffers)?;
        let mut rules: Vec<_> = OPCODES.into_iter().map(Restriction::sqe_op).collect();
        if zero_copy {
            rules.extend(ZERO_COPY.into_iter().map(Restriction::sqe_op));
        }
        let fixed = squeue::Flags::FIXED_FILE.bits();
        rules.push(Restriction::sqe_flags_required(fixed));
        submitter
            .register_restrictions(&mut rules)
            .map_err(failed("restrict io_uring"))?;
        submitter
            .register_enable_rings()
            .map_err(failed("enable io_uring"))?;
        Ok(Self {
            io,
            zero_copy,
            registered,
            enters: 0,
        })
    }

    /// Puts an operation into the submission queue.
    ///
    /// # Safety
    /// The memory that `entry` names must stay mapped, and be touched by nobody else in the ways that the operation
    /// forbids, until its completion has come (for SEND_ZC: its notification).
    pub(super) unsafe fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the caller keeps the memory as it must be.
            if unsafe { self.io.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            // Full: what is in it goes first.
            self.enter(0, Duration::ZERO)?;
        }
    }

    /// Submits, and waits until so many completions are there or the time is over.
    pub(super) fn enter(&mut self, want: usize, timeout: Duration) -> io::Result<()> {
        let time = Timespec::from(timeout);
        let args = SubmitArgs::new().timespec(&time);
        self.enters += 1;
        let entered = match want {
            0 => self.io.submitter().submit(),
            _ => self.io.submitter().submit_with_args(want, &args),
        };
        match entered {
            Ok(_) => Ok(()),
            // Over time, interrupted, or completions must be taken first: the caller looks what is there.
            Err(e) => match e.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(e),
            },
        }
    }

    /// The next completion.
    pub(super) fn completion(&mut self) -> Option<cqueue::Entry> {
        self.io.completion().next()
    }
}

/// The most able ring that this kernel makes; it takes nothing until it is enabled.
fn build(submissions: u32, completions: u32) -> Result<IoUring, ChannelError> {
    // Work of the ring is done when its thread enters (6.1), at its system calls (5.19), or by interrupting it.
    for able in [2, 1, 0] {
        let mut builder = IoUring::builder();
        builder
            .setup_r_disabled()
            .setup_clamp()
            .setup_cqsize(completions);
        if able > 0 {
            builder.setup_submit_all().setup_taskrun_flag();
        }
        match able {
            2 => drop(builder.setup_single_issuer().setup_defer_taskrun()),
            1 => drop(builder.setup_coop_taskrun()),
            _ => {}
        }
        match builder.dontfork().build(submissions) {
            Ok(io) => return Ok(io),
            Err(e) => match e.raw_os_error() {
                Some(libc::EINVAL) if able > 0 => {}
                Some(libc::EINVAL) => return Err(ChannelError::Kernel("restricted io_urings")),
                Some(libc::ENOSYS) => return Err(ChannelError::Kernel("io_uring")),
                Some(libc::EPERM | libc::EACCES) => return Err(not_permitted()),
                _ => {
                    return Err(ChannelError::Ring {
                        what: "set up io_uring",
                        source: e,
                    });
                }
            },
        }
    }
    Err(ChannelError::Kernel("restricted io_urings"))
}

fn not_permitted() -> ChannelError {
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    let disabled = disabled.map_or_else(|_| "?".to_owned(), |text| text.trim().to_owned());
    ChannelError::NotPermitted { disabled }
}

/// Gives whether there was enough lockable memory.
fn register(io: &IoUring, buffers: libc::iovec) -> Result<bool, ChannelError> {
    // SAFETY: the memory stays mapped as long as the ring lives, as the caller of `Ring::new` must see to.
    let done = unsafe { io.submitter().register_buffers(&[buffers]) };
    match done {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOMEM | libc::EPERM)) => {
            tracing::warn!(
                "page channel: {} bytes of buffers can't be locked ({e}), checkpoints are sent with copies; \
                 raise RLIMIT_MEMLOCK (`ulimit -l`, LimitMEMLOCK=)",
                buffers.iov_len
            );
            Ok(false)
        }
        Err(source) => {
            let what = "register buffers with io_uring";
            Err(ChannelError::Ring { what, source })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;

    use io_uring::types::{Fd, Fixed};

    use super::super::memory::Buffer;
    use super::*;

    fn result(ring: &mut Ring, entry: squeue::Entry) -> i32 {
        // SAFETY: the entries of these tests name no memory, or memory that outlives the ring.
        unsafe { ring.push(&entry.user_data(5)) }.unwrap();
        ring.enter(1, Duration::from_secs(10)).unwrap();
        let completion = ring.completion().unwrap();
        assert_eq!(completion.user_data(), 5);
        completion.result()
    }

    #[test]
    fn rule_25_the_ring_takes_the_named_opcodes_on_registered_files_only() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(socket.local_addr().unwrap()).unwrap();
        let (buffers, part) = Buffer::carve(&[4096], 1).unwrap();
        let mut ring = Ring::new(8, 8, &[socket.as_raw_fd()], part).unwrap();
        let (at, fd) = (buffers[0].as_ptr(), socket.as_raw_fd());
        let mut tried = |entry| result(&mut ring, entry);
        assert_eq!(tried(opcode::Send::new(Fixed(0), at, 16).build()), 16);
        let refused = -libc::EACCES;
        assert_eq!(
            tried(opcode::Nop::new().build().flags(squeue::Flags::FIXED_FILE)),
            refused
        );
        let open = opcode::OpenAt::new(Fd(libc::AT_FDCWD), c"/".as_ptr()).build();
        assert_eq!(tried(open), refused);
        assert_eq!(tried(opcode::Write::new(Fixed(0), at, 16).build()), refused);
        let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
        assert_eq!(tried(socket), refused);
        assert_eq!(
            tried(opcode::Send::new(Fd(fd), at, 16).build()),
            refused,
            "not registered"
        );
        let linked = opcode::Send::new(Fixed(0), at, 16)
            .build()
            .flags(squeue::Flags::IO_LINK);
        assert_eq!(tried(linked), refused, "a flag that is not needed");
        let more = ring
            .io
            .submitter()
            .register_files_update(0, &[0])
            .unwrap_err();
        assert_eq!(more.raw_os_error(), Some(libc::EACCES));
    }
}
