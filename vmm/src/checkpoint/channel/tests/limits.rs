//! What the kernel does not give: memory to lock, zero copy, io_uring itself.

use std::process::Command;

use super::*;

#[test]
fn on_loopback_the_kernel_copies_and_streams_go_over_to_plain_sends() {
    let large = Settings {
        chunk_bytes: CHUNK_BYTES,
        ..settings()
    };
    for streams in [1, 2] {
        let (near, far) = sockets(streams);
        let receiver = peer(far, large, |mut channel| all(&mut channel));
        let mut sender = PageChannel::new(near, large).unwrap();
        sender.begin(1, &[]).unwrap();
        for n in 0..100 {
            let buffer = sender.next_buffer().unwrap();
            buffer.fill(n);
            sender.submit(Kind::Pages, 64, CHUNK_BYTES).unwrap();
        }
        sender.finish().unwrap();
        let counters = sender.counters();
        drop(sender);
        let (seen, error) = receiver.join().unwrap();
        assert!(error.is_none(), "{error:?}");
        for n in 0..100u8 {
            let there = |s: &Seen| matches!(s, Seen::Chunk(Kind::Pages, 1, 64, b) if b.iter().all(|&x| x == n));
            assert!(seen.iter().any(there), "chunk {n}");
        }
        if counters.unregistered_buffers == 0 {
            assert_eq!(counters.zero_copy_off, streams as u64, "{counters:?}");
            assert!(counters.zero_copy_copied >= streams as u64);
            assert!(counters.zero_copy_sends < 100, "{counters:?}");
        }
    }
    let plain = Settings {
        zero_copy: false,
        ..large
    };
    let (near, far) = sockets(1);
    let receiver = peer(far, plain, |mut channel| all(&mut channel));
    let mut sender = PageChannel::new(near, plain).unwrap();
    sender.begin(1, &vec![1; CHUNK_BYTES]).unwrap();
    sender.finish().unwrap();
    assert_eq!(sender.counters().zero_copy_sends, 0);
    drop(sender);
    assert!(receiver.join().unwrap().1.is_none());
}

/// True in a process of its own, which may lock so little; that process runs only the test of this name in this file or
/// beside it, and must pass.
pub(super) fn may_lock_only(bytes: u64, test: &str) -> bool {
    const CHILD: &str = "COLO_TEST_CHANNEL_MEMLOCK";
    if std::env::var_os(CHILD).is_none() {
        let name = format!("checkpoint::channel::tests::{test}");
        let mut child = Command::new(std::env::current_exe().unwrap());
        let output = child
            .args([&name, "--exact", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{output:?}"
        );
        return false;
    }
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    // SAFETY: the kernel reads one `rlimit` that lives on this stack.
    let done = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
    assert_eq!(done, 0);
    // Root may lock what it wants, so be somebody else, with whom no other test shares what may be locked; for all threads, as
    // libc does it.
    let somebody = 0x1000_0000 + std::process::id();
    // SAFETY: a system call on numbers.
    let done = unsafe { libc::setresuid(somebody, somebody, somebody) };
    assert_eq!(done, 0);
    true
}

#[test]
fn too_little_lockable_memory_costs_registration_and_nothing_else() {
    let test = "limits::too_little_lockable_memory_costs_registration_and_nothing_else";
    if !may_lock_only(64 << 10, test) {
        return;
    }
    let (near, far) = sockets(2);
    let sender = peer(far, settings(), |mut channel| {
        send_small(&mut channel, 4);
        channel.counters()
    });
    let mut receiver = PageChannel::new(near, settings()).unwrap();
    let (seen, error) = all(&mut receiver);
    assert!(
        error.is_none() && matches!(seen.last(), Some(Seen::Complete(4, _))),
        "{seen:?}"
    );
    assert_eq!(receiver.counters().unregistered_buffers, 1);
    let counters = sender.join().unwrap();
    assert_eq!(
        (counters.unregistered_buffers, counters.zero_copy_sends),
        (1, 0)
    );
}

/// Makes io_uring_setup fail in this thread from now on.
fn forbid_io_uring(errno: u32) {
    let statement = |code: u32, k: u32, (jt, jf)| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let filter = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, (0, 0)),
        statement(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            libc::SYS_io_uring_setup as u32,
            (0, 1),
        ),
        statement(
            libc::BPF_RET | libc::BPF_K,
            libc::SECCOMP_RET_ERRNO | errno,
            (0, 0),
        ),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW, (0, 0)),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: numbers only.
    let done = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(done, 0);
    // SAFETY: the kernel reads the program, which lives on this stack.
    let done = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    assert_eq!(done, 0);
}

#[test]
fn a_kernel_without_io_uring_is_told_by_name() {
    for (errno, why) in [
        (libc::EPERM, "kernel.io_uring_disabled = "),
        (libc::ENOSYS, "CONFIG_IO_URING"),
    ] {
        let thread = thread::spawn(move || {
            let (near, _far) = sockets(1);
            forbid_io_uring(errno as u32);
            PageChannel::new(near, settings()).unwrap_err().to_string()
        });
        let text = thread.join().unwrap();
        assert!(text.contains(why), "{text}");
    }
}

#[test]
fn settings_that_make_no_sense_are_refused_by_name() {
    let refused = |streams, settings, name: &str| {
        let error = PageChannel::new(sockets(streams).0, settings).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    };
    refused(0, settings(), "streams = 0");
    refused(STREAMS_MAX + 1, settings(), "streams = 17");
    refused(
        1,
        Settings {
            chunk_bytes: 4095,
            ..settings()
        },
        "chunk_bytes = 4095",
    );
    refused(
        1,
        Settings {
            chunk_bytes: 1 << 30,
            ..settings()
        },
        "chunk_bytes",
    );
    refused(
        4,
        Settings {
            send_buffers: 4,
            ..settings()
        },
        "send_buffers = 4",
    );
    refused(
        1,
        Settings {
            timeout: Duration::ZERO,
            ..settings()
        },
        "timeout_ms = 0",
    );
}
