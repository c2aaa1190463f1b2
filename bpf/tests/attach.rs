//! The XDP program on interfaces, in network namespaces of their own, and what it says when it
//! cannot go there.

#![allow(clippy::unwrap_used, reason = "what fails in a helper fails its test")]

use std::process::Command;

use colo_bpf::{Attach, AttachMode, GuestFrames, XdpError, XdpProgram};

/// Runs in a thread whose network namespace dies with it, with the veth pair `x0` and `x1`.
fn with_veth(test: impl FnOnce() + Send + 'static) {
    std::thread::spawn(move || {
        // SAFETY: unshare changes only the calling thread, which nothing else shares.
        let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(unshared, 0, "needs root");
        ip("link add x0 type veth peer name x1");
        ip("link set x0 up");
        ip("link set x1 up");
        test();
    })
    .join()
    .unwrap();
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The mode that the kernel reports for the interface; empty when it has no program.
fn mode_of(interface: &str) -> &'static str {
    let shown = ip(&format!("link show dev {interface}"));
    ["xdpgeneric", "xdpdrv", "xdpoffload", "xdp"]
        .into_iter()
        .find(|mode| shown.contains(&format!(" {mode} ")))
        .unwrap_or("")
}

#[test]
fn it_is_attached_where_asked_and_detached_when_dropped() {
    with_veth(|| {
        for (attach, mode, shown) in [
            (Attach::Best, AttachMode::Driver, "xdp"),
            (Attach::Only(AttachMode::Driver), AttachMode::Driver, "xdp"),
            (
                Attach::Only(AttachMode::Generic),
                AttachMode::Generic,
                "xdpgeneric",
            ),
        ] {
            let mut program = XdpProgram::load().unwrap();
            let attached = program.attach("x0", attach).unwrap();
            assert_eq!(attached.mode, mode);
            assert_eq!(attached.fallback_reason, None);
            assert_eq!(program.interface(), Some("x0"));
            assert_eq!(mode_of("x0"), shown);
            let again = program.attach("x1", attach).unwrap_err();
            assert!(again.to_string().contains("\"x0\""), "{again}");
            drop(program);
            assert_eq!(mode_of("x0"), "");
        }
    });
}

#[test]
fn it_can_move_and_keeps_what_it_was_told() {
    with_veth(|| {
        let mut program = XdpProgram::load().unwrap();
        program.set_guest_frames(GuestFrames::Accept).unwrap();
        program.detach();
        program.attach("x0", Attach::Best).unwrap();
        program.detach();
        assert_eq!((program.interface(), mode_of("x0")), (None, ""));
        program.attach("x1", Attach::Best).unwrap();
        assert_eq!(mode_of("x1"), "xdp");
        // An interface that disappears takes the program with it.
        ip("link del x0");
        program.detach();
        ip("link add x0 type veth peer name x1");
        program.attach("x1", Attach::Best).unwrap();
        assert_eq!(mode_of("x1"), "xdp");
        assert_eq!(program.guest_frames(), GuestFrames::Accept);
    });
}

#[test]
fn jumbo_frames_do_not_keep_it_off() {
    with_veth(|| {
        ip("link set x0 mtu 9000");
        ip("link set x1 mtu 9000");
        let mut program = XdpProgram::load().unwrap();
        let attached = program.attach("x0", Attach::Best).unwrap();
        assert_eq!(attached.mode, AttachMode::Driver);
    });
}

#[test]
fn a_driver_without_xdp_gets_the_generic_form_and_the_reason_is_kept() {
    with_veth(|| {
        let mut program = XdpProgram::load().unwrap();
        let attached = program.attach("lo", Attach::Best).unwrap();
        assert_eq!(attached.mode, AttachMode::Generic);
        assert!(attached.fallback_reason.is_some());
        assert_eq!(mode_of("lo"), "xdpgeneric");
        program.detach();
        let refused = program
            .attach("lo", Attach::Only(AttachMode::Driver))
            .unwrap_err();
        assert!(
            matches!(&refused, XdpError::NoDriverMode { interface, .. } if interface == "lo"),
            "{refused}"
        );
        assert_eq!(mode_of("lo"), "");
    });
}

#[test]
fn errors_name_the_interface() {
    with_veth(|| {
        let mut program = XdpProgram::load().unwrap();
        for name in ["nowhere", "", "a name that is far too long", "a\0b"] {
            let missing = program.attach(name, Attach::Best).unwrap_err();
            assert!(
                matches!(&missing, XdpError::NoInterface { interface } if interface == name),
                "{missing}"
            );
        }
        let mut first = XdpProgram::load().unwrap();
        for (mode, attach) in [
            (AttachMode::Driver, Attach::Best),
            (AttachMode::Driver, Attach::Only(AttachMode::Generic)),
            (AttachMode::Generic, Attach::Best),
        ] {
            first.attach("x0", Attach::Only(mode)).unwrap();
            let occupied = program.attach("x0", attach).unwrap_err();
            assert!(
                matches!(&occupied, XdpError::Occupied { interface } if interface == "x0"),
                "{occupied}"
            );
            first.detach();
        }
        program.attach("x0", Attach::Best).unwrap();
    });
}

/// `struct __user_cap_header_struct` and twice `struct __user_cap_data_struct`, version 3.
fn give_up_capabilities() {
    let header = [0x2008_0522_u32, 0];
    let none = [0_u32; 6];
    // SAFETY: both arrays have the sizes of version 3, and the kernel only reads them; the call
    // changes only this thread, which ends with the test.
    let answer = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    assert_eq!(answer, 0);
}

#[test]
fn without_permission_it_says_so() {
    // What the loader finds out about the kernel it finds out once, so first with permission.
    XdpProgram::load().unwrap();
    std::thread::spawn(move || {
        give_up_capabilities();
        let refused = XdpProgram::load().unwrap_err();
        assert!(
            matches!(refused, XdpError::NotPermitted { .. }),
            "{refused}"
        );
        assert!(refused.to_string().contains("CAP_BPF"), "{refused}");
    })
    .join()
    .unwrap();
}
