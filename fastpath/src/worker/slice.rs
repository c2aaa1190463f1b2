//! A short time slice for a thread that others wait for.
//!
//! A worker has little to do each time and much depends on when it does it: where it shares a processor with a vCPU
//! that runs for long, it is to run as soon as it is woken. Linux lets a thread say so without any privilege (6.12 and
//! later; earlier ones ignore it): the slice is part of the attributes of the usual policy.
//!
//! Invariants: policy and priority stay what they are.
//!
//! Does not give the thread a larger share of the processor.

use std::io;

/// The shortest that Linux grants.
const SLICE_NS: u64 = 100_000;

/// Asks for the calling thread. An error says that this kernel does not know of attributes.
pub(super) fn ask_for_short() -> io::Result<()> {
    let mut attributes = read()?;
    if attributes.sched_policy == libc::SCHED_OTHER as u32 {
        attributes.sched_runtime = SLICE_NS;
        write(&mut attributes)?;
    }
    Ok(())
}

fn read() -> io::Result<libc::sched_attr> {
    let size = size_of::<libc::sched_attr>();
    // SAFETY: integers only; all zero is a value of each.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes at most `size` bytes of `attributes`, which lives through the call; thread 0 is the
    // calling one.
    let status = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    outcome(status).map(|()| attributes)
}

fn write(attributes: &mut libc::sched_attr) -> io::Result<()> {
    attributes.size = size_of::<libc::sched_attr>() as u32;
    // SAFETY: the kernel reads as many bytes of `attributes` as its `size` says, all of them initialised, and writes
    // that one field if it knows fewer.
    let status = unsafe {
        libc::syscall(
            libc::SYS_sched_setattr,
            0,
            std::ptr::from_mut(attributes),
            0,
        )
    };
    outcome(status)
}

fn outcome(status: libc::c_long) -> io::Result<()> {
    match status {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_and_priority_stay() {
        std::thread::spawn(|| {
            let before = read().unwrap();
            ask_for_short().unwrap();
            let after = read().unwrap();
            assert_eq!(after.sched_policy, before.sched_policy);
            assert_eq!(after.sched_nice, before.sched_nice);
        })
        .join()
        .unwrap();
    }
}
