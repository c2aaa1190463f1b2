//! System calls that a kernel refuses, as one would that lacks what they ask for.
//!
//! Invariant: what is refused is refused to the thread that asked for it and to what it starts, for good; never to the
//! machine.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

/// From now on the calling thread, and what it starts, gets `errno` for system call `number` where the lower half of its
/// argument `index` (from 0) is `value`.
pub fn refuse_call(
    number: i64,
    index: u8,
    value: u32,
    errno: i32,
) -> Result<(), seccompiler::Error> {
    let (len, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
    let condition = SeccompCondition::new(index, len, equal, value.into())?;
    let rule = SeccompRule::new(vec![condition])?;
    let filter = SeccompFilter::new(
        [(number, vec![rule])].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.cast_unsigned()),
        TargetArch::x86_64,
    )?;
    apply_filter(&BpfProgram::try_from(filter)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn one_argument_is_refused_to_one_thread() {
        std::thread::spawn(|| {
            refuse_call(libc::SYS_socket, 0, libc::AF_INET6 as u32, libc::ENOMEM).unwrap();
            let refused = UdpSocket::bind("[::1]:0").unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::ENOMEM));
            UdpSocket::bind("127.0.0.1:0").unwrap();
        })
        .join()
        .unwrap();
        UdpSocket::bind("[::1]:0").unwrap();
    }
}
