//! The io_uring of a channel: made disabled, restricted to what the channel does, then enabled (rule 25).
//!
//! Invariants: once enabled the ring takes the named opcodes on registered files only, and nothing more can be
//! registered but memory, in the places that its table has (for landings, which come and go); the thread that made it is
//! the only one that enters it.
//!
//! Kernel documentation: io_uring_setup(2), io_uring_register(2) (IORING_REGISTER_RESTRICTIONS).

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};

use super::error::ChannelError;
use super::pinned::{SEND_SLOT, SLOTS};

/// What a channel does.
const OPCODES: [u8; 4] = [
    opcode::Send::CODE,
    opcode::SendMsg::CODE,
    opcode::RecvMsg::CODE,
    opcode::Read::CODE,
];
/// Puts memory into the table of registered buffers, or takes it out; from <linux/io_uring.h>.
const IORING_REGISTER_BUFFERS_UPDATE: u8 = 16;
/// And where the kernel has both.
const ZERO_COPY: [u8; 2] = [opcode::SendZc::CODE, opcode::SendMsgZc::CODE];

/// A ring that is ready.
pub(super) struct Ring {
    io: IoUring,
    /// The kernel knows IORING_OP_SEND_ZC and IORING_OP_SENDMSG_ZC.
    pub(super) zero_copy: bool,
    /// The buffers are registered.
    pub(super) registered: bool,
    /// Memory can be registered and let go at any time.
    pub(super) has_table: bool,
    /// So it can, and the kernel knows IORING_OP_READV_FIXED.
    pub(super) reads_fixed: bool,
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
        let has_table = submitter.register_buffers_sparse(SLOTS).is_ok();
        let reads_fixed = has_table && probe.is_supported(opcode::ReadvFixed::CODE);
        let registered = register(&io, buffers, has_table)?;
        let mut rules: Vec<_> = OPCODES.into_iter().map(Restriction::sqe_op).collect();
        if zero_copy {
            rules.extend(ZERO_COPY.into_iter().map(Restriction::sqe_op));
        }
        if reads_fixed {
            rules.push(Restriction::sqe_op(opcode::ReadvFixed::CODE));
        }
        if has_table {
            rules.push(Restriction::register_op(IORING_REGISTER_BUFFERS_UPDATE));
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
            has_table,
            reads_fixed,
            enters: 0,
        })
    }

    /// Registers memory in a place of the table, instead of what was there. The kernel pins it: operations on it reach what
    /// was mapped there now, whatever is later.
    pub(super) fn pin(&self, slot: u16, part: libc::iovec) -> io::Result<()> {
        // SAFETY: what is pinned stays there for the kernel, mapped or not; only operations write to it, and who pushes one
        // answers for its memory.
        unsafe { update(&self.io, slot, part) }
    }

    /// Lets the memory in a place of the table go, once no operation has it.
    pub(super) fn unpin(&self, slot: u16) -> io::Result<()> {
        let nothing = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        self.pin(slot, nothing)
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

/// # Safety
/// As [`io_uring::Submitter::register_buffers`].
unsafe fn update(io: &IoUring, slot: u16, part: libc::iovec) -> io::Result<()> {
    let submitter = io.submitter();
    // SAFETY: as the caller says.
    unsafe { submitter.register_buffers_update(slot.into(), &[part], None) }
}

/// Gives whether there was enough lockable memory; `has_table` that there is a table with places.
fn register(io: &IoUring, buffers: libc::iovec, has_table: bool) -> Result<bool, ChannelError> {
    // SAFETY: the memory stays mapped as long as the ring lives, as the caller of `Ring::new` must see to.
    let done = unsafe {
        match has_table {
            true => update(io, SEND_SLOT, buffers),
            false => io.submitter().register_buffers(&[buffers]),
        }
    };
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
        let to = |iov_len| libc::iovec {
            iov_base: at.cast_mut().cast(),
            iov_len,
        };
        let (to, beyond) = (to(16), to(8192));
        let unfixed = opcode::Readv::new(Fixed(0), &raw const to, 1).build();
        assert_eq!(tried(unfixed), refused);
        if ring.reads_fixed {
            let fixed = |to: &libc::iovec| {
                opcode::ReadvFixed::new(Fixed(0), &raw const *to, 1, SEND_SLOT).build()
            };
            assert_eq!(result(&mut ring, fixed(&to)), 16, "what was sent to itself");
            let unknown = -libc::EFAULT;
            assert_eq!(result(&mut ring, fixed(&beyond)), unknown);
            ring.unpin(SEND_SLOT).unwrap();
            assert_eq!(result(&mut ring, fixed(&to)), unknown);
            let elsewhere = ring.pin(SLOTS as u16, part).unwrap_err();
            assert_eq!(
                elsewhere.raw_os_error(),
                Some(libc::EINVAL),
                "no such place"
            );
        }
        let none = ring.io.submitter().unregister_buffers().unwrap_err();
        assert_eq!(none.raw_os_error(), Some(libc::EACCES));
        let more = ring
            .io
            .submitter()
            .register_files_update(0, &[0])
            .unwrap_err();
        assert_eq!(more.raw_os_error(), Some(libc::EACCES));
    }
}
