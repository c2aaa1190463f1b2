//! States of vCPUs and platforms, on the real KVM, with values that no guest of ours sets.

use kvm_bindings::{KVM_VCPUEVENT_VALID_PAYLOAD, kvm_msr_entry, kvm_pit_config, kvm_xcr};
use kvm_ioctls::VcpuFd;
use std::sync::Arc;

use colo_fastpath::ring::{GuestRam, Pages};

use super::clock::Passed;
use super::cpuid;
use super::platform_state::{PlatformShape, PlatformState};
use super::record::{RecordError, seal};
use super::rehearsal::Rehearsal;
use super::vcpu_ioctl::{get_xsave2, set_xsave};
use super::vcpu_record::differing_parts;
use super::vcpu_shape::{VcpuShape, read_msr, write_msr};
use super::vcpu_state::{TscTarget, VcpuState};
use super::vm::Vm;
use crate::checkpoint::dirty::DirtyMechanism;

struct Bare {
    // Before the machine that it is in.
    fd: VcpuFd,
    shape: VcpuShape,
    vm: Vm,
}

fn bare(irqchip: bool) -> Bare {
    let ram = Arc::new(GuestRam::new(4 << 20, Pages::Small).unwrap());
    let vm = Vm::new(ram, None).unwrap();
    if irqchip {
        vm.fd().create_irq_chip().unwrap();
        vm.fd().create_pit2(kvm_pit_config::default()).unwrap();
    }
    let fd = vm.create_vcpu(0).unwrap();
    fd.set_cpuid2(&cpuid::table_for(vm.kvm(), 0).unwrap())
        .unwrap();
    let shape = VcpuShape::probe(vm.kvm(), vm.fd(), &fd).unwrap();
    Bare { fd, shape, vm }
}

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_SYSENTER_EIP: u32 = 0x176;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
const MSR_PAT: u32 = 0x277;
/// Where XMM registers, the header's XSTATE_BV and the upper halves of YMM registers are, in words.
const XMM: usize = 160 / 4;
const XSTATE_BV: usize = 512 / 4;
const YMM: usize = 576 / 4;

/// Puts something into every part of a vCPU.
fn make_unusual(bare: &Bare) {
    let fd = &bare.fd;
    let mut sregs = fd.get_sregs().unwrap();
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8005_0033, 0x5000, 0x40620, 0xd01);
    (sregs.cr2, sregs.cr8) = (0xdead_b000, 5);
    (sregs.cs.l, sregs.cs.db) = (1, 0);
    (sregs.fs.base, sregs.gs.base) = (0x1111_2222, 0x3333_4444);
    (sregs.idt.base, sregs.idt.limit) = (0x7000, 0x123);
    fd.set_sregs(&sregs).unwrap();
    let mut regs = fd.get_regs().unwrap();
    (regs.rax, regs.r15, regs.rip, regs.rflags) = (1 << 63, 0x1515, 0x20_0000, 0x3002);
    fd.set_regs(&regs).unwrap();
    let mut xcrs = fd.get_xcrs().unwrap();
    xcrs.nr_xcrs = 1;
    xcrs.xcrs[0] = kvm_xcr {
        xcr: 0,
        value: 7,
        ..Default::default()
    };
    fd.set_xcrs(&xcrs).unwrap();
    let mut xsave = vec![0; bare.shape.xsave_words];
    get_xsave2(fd, &mut xsave).unwrap();
    xsave[XSTATE_BV] |= 7;
    for i in 0..64 {
        xsave[XMM + i] = 0x1000_0000 + i as u32;
        xsave[YMM + i] = 0x2000_0000 + i as u32;
    }
    set_xsave(fd, &xsave).unwrap();
    let mut debug = fd.get_debug_regs().unwrap();
    debug.db = [0x1000, 0x2000, 0x3000, 0x4000];
    (debug.dr6, debug.dr7) = (0xffff_4ff1, 0x0000_0455);
    fd.set_debug_regs(&debug).unwrap();
    for (index, data) in [
        (MSR_STAR, 0x23_0008_0000_0000),
        (MSR_LSTAR, 0xffff_8000_1234_5678),
        (MSR_SYSENTER_EIP, 0xffff_ffff_8111_0000),
        (MSR_KERNEL_GS_BASE, 0xffff_9000_0000_1000),
        (MSR_PAT, 0x0007_0406_0007_0401),
    ] {
        write_msr(fd, index, data).unwrap();
    }
    let mut events = fd.get_vcpu_events().unwrap();
    assert!(
        events.flags & KVM_VCPUEVENT_VALID_PAYLOAD != 0,
        "all events are asked for"
    );
    (events.exception.pending, events.exception.nr) = (1, 14);
    (events.exception.has_error_code, events.exception.error_code) = (1, 6);
    (events.exception_has_payload, events.exception_payload) = (1, 0xfeed_f000);
    (events.nmi.pending, events.nmi.masked) = (1, 1);
    fd.set_vcpu_events(&events).unwrap();
    if bare.shape.lapic {
        let mut lapic = fd.get_lapic().unwrap();
        // Spurious vector register, and the timer's entry: enabled, one vector each.
        (lapic.regs[0xf0], lapic.regs[0xf1]) = (0x7f, 1);
        lapic.regs[0x320] = 0x31;
        fd.set_lapic(&lapic).unwrap();
    }
}

fn unusual(irqchip: bool) -> (Bare, VcpuState) {
    let bare = bare(irqchip);
    make_unusual(&bare);
    let state = VcpuState::read(&bare.fd, &bare.shape).unwrap();
    (bare, state)
}

#[test]
fn every_part_of_a_vcpu_comes_back_in_another() {
    for irqchip in [false, true] {
        let (_first, state) = unusual(irqchip);
        assert_eq!(state.lapic.is_some(), irqchip);
        let second = bare(irqchip);
        let fresh = VcpuState::read(&second.fd, &second.shape).unwrap();
        let different = fresh.differences(&state);
        for part in [
            "registers",
            "system registers",
            "xsave",
            "xcrs",
            "debug registers",
            "events",
            "MSR 0xc0000102",
            "MSR 0x277",
        ] {
            assert!(different.iter().any(|d| d == part), "{part} is not unusual");
        }
        assert_eq!(different.contains(&"local APIC".to_owned()), irqchip);

        let record = state.to_bytes();
        let read = VcpuState::from_bytes(&record).unwrap();
        assert_eq!(read.to_bytes(), record);
        read.check(&second.shape).unwrap();
        read.write(&second.fd, &second.shape, TscTarget::Leave)
            .unwrap();
        let back = VcpuState::read(&second.fd, &second.shape).unwrap();
        assert_eq!(back.differences(&state), Vec::<String>::new());
        assert_eq!(
            (back.xsave[XMM + 63], back.xsave[YMM + 63]),
            (0x1000_003f, 0x2000_003f)
        );
        assert_eq!(back.debug.db, [0x1000, 0x2000, 0x3000, 0x4000]);
        assert_eq!(back.events.exception_payload, 0xfeed_f000);
    }
}

#[test]
fn a_state_is_read_again_and_again_into_the_same_memory() {
    let (bare, first) = unusual(true);
    let mut state = VcpuState::empty(&bare.shape);
    let mut batch = bare.shape.msrs.batch().unwrap();
    let mut record = Vec::with_capacity(16 << 10);
    let (memory, xsave, msrs) = (record.as_ptr(), state.xsave.as_ptr(), state.msrs.as_ptr());
    for _ in 0..3 {
        state.read_from(&bare.fd, &bare.shape, &mut batch).unwrap();
        record = state.write_record(record);
        let read = VcpuState::from_bytes(&record).unwrap();
        assert_eq!(read.differences(&first), Vec::<String>::new());
    }
    assert_eq!(
        (record.as_ptr(), state.xsave.as_ptr(), state.msrs.as_ptr()),
        (memory, xsave, msrs)
    );
}

#[test]
fn rule_13_a_record_that_is_cut_or_damaged_anywhere_is_refused() {
    let (_bare, state) = unusual(true);
    let record = state.to_bytes();
    for len in 0..record.len() {
        assert!(VcpuState::from_bytes(&record[..len]).is_err(), "{len}");
    }
    for at in 0..record.len() {
        let mut bad = record.clone();
        bad[at] ^= 1 << (at % 8);
        assert!(VcpuState::from_bytes(&bad).is_err(), "{at}");
    }
    // Whole, but with nonsense in it: still no panic, and never accepted by a missing part.
    for at in 16..record.len() {
        let mut odd = record.clone();
        odd[at] ^= 0x81;
        seal(&mut odd);
        let _ = VcpuState::from_bytes(&odd);
    }
    let mut newer = record;
    newer[4] = 9;
    let refused = VcpuState::from_bytes(&newer).unwrap_err();
    assert!(
        matches!(refused, RecordError::Version { found: 9, .. }),
        "{refused}"
    );
}

#[test]
fn rule_13_what_kvm_refuses_is_refused_before_it_touches_the_vcpu() {
    let (bare, good) = unusual(false);
    let stage = Rehearsal::new(bare.vm.kvm(), 1, false).unwrap();
    stage.try_state(0, &good, &bare.shape).unwrap();
    let bad = |change: &dyn Fn(&mut VcpuState)| {
        let mut state = good.clone();
        change(&mut state);
        let refused = stage.try_state(0, &state, &bare.shape).unwrap_err();
        refused.to_string()
    };
    // Long mode without paging; XCR0 without x87; an address that is not canonical; a reserved bit.
    assert!(bad(&|s| s.sregs.cr0 = 0x11).contains("system registers"));
    assert!(bad(&|s| s.xcrs.xcrs[0].value = 2).contains("xcrs"));
    let lstar = |s: &mut VcpuState| {
        let msr = s.msrs.iter_mut().find(|m| m.index == MSR_LSTAR).unwrap();
        msr.data = 1 << 62;
    };
    assert!(bad(&lstar).contains("MSR 0xc0000082"), "{}", bad(&lstar));
    assert!(bad(&|s| s.debug.dr7 = 1 << 40).contains("debug registers"));
    assert!(bad(&|s| s.events.flags = 1 << 20).contains("events"));
    assert!(bad(&|s| s.mp_state.mp_state = 77).contains("mp_state"));
    let now = VcpuState::read(&bare.fd, &bare.shape).unwrap();
    assert_eq!(now.differences(&good), Vec::<String>::new());
}

#[test]
fn rule_22_a_record_for_another_machine_is_refused_by_name() {
    let (bare, good) = unusual(false);
    let refused = |change: &dyn Fn(&mut VcpuState)| {
        let mut state = good.clone();
        change(&mut state);
        state.check(&bare.shape).unwrap_err().to_string()
    };
    assert!(refused(&|s| s.lapic = Some(Box::default())).contains("local APIC is there"));
    assert!(refused(&|s| s.xsave.push(0)).contains("size of xsave"));
    assert!(refused(&|s| s.tsc.khz *= 2).contains("TSC frequency"));
    let unknown = kvm_msr_entry {
        index: 0x1234_5678,
        ..Default::default()
    };
    assert!(refused(&|s| s.msrs.push(unknown)).contains("MSR 0x12345678"));
    let feature = good
        .msrs
        .iter()
        .find(|m| bare.shape.msrs.feature(m.index).is_some());
    let index = feature.unwrap().index;
    let other = |s: &mut VcpuState| {
        s.msrs
            .iter_mut()
            .filter(|m| m.index == index)
            .for_each(|m| m.data ^= 1);
    };
    assert!(refused(&other).contains(&format!("MSR {index:#x}")));
}

#[test]
fn a_missing_or_repeated_section_is_named() {
    let (_bare, state) = unusual(false);
    let record = state.to_bytes();
    let regs = 16 + 8 + size_of::<kvm_bindings::kvm_regs>();
    let mut without = record.clone();
    without.drain(16..regs);
    seal(&mut without);
    let refused = VcpuState::from_bytes(&without).unwrap_err().to_string();
    assert!(refused.contains("lacks the registers"), "{refused}");
    let mut twice = record.clone();
    twice.extend_from_slice(&record[16..regs]);
    seal(&mut twice);
    let refused = VcpuState::from_bytes(&twice).unwrap_err().to_string();
    assert!(refused.contains("twice"), "{refused}");
}

#[test]
fn rule_16_the_guests_tsc_is_not_behind_the_captured_one() {
    let (first, state) = unusual(false);
    let second = bare(false);
    let offset = state.tsc.offset.unwrap_or(0);
    state
        .write(
            &second.fd,
            &second.shape,
            match second.shape.tsc {
                super::clock::TscControl::Offset => TscTarget::Offset(offset),
                _ => TscTarget::Leave,
            },
        )
        .unwrap();
    let there = read_msr(&second.fd, super::vcpu_shape::MSR_IA32_TSC).unwrap();
    assert!(there >= state.tsc.value, "{there} < {}", state.tsc.value);
    drop(first);
}

fn platform(irqchip: bool) -> (Bare, PlatformShape) {
    let bare = bare(irqchip);
    let shape = PlatformShape::probe(bare.vm.fd());
    assert_eq!(shape.irqchip, irqchip);
    (bare, shape)
}

#[test]
fn interrupt_controllers_and_timer_come_back_in_another_machine() {
    let (first, shape) = platform(true);
    let mut chip = kvm_bindings::kvm_irqchip {
        chip_id: kvm_bindings::KVM_IRQCHIP_PIC_MASTER,
        ..Default::default()
    };
    first.vm.fd().get_irqchip(&mut chip).unwrap();
    chip.chip.pic.imr = 0xa5;
    chip.chip.pic.irq_base = 0x20;
    first.vm.fd().set_irqchip(&chip).unwrap();
    let mut pit = first.vm.fd().get_pit2().unwrap();
    (pit.channels[2].count, pit.channels[2].mode) = (0x1234, 3);
    first.vm.fd().set_pit2(&pit).unwrap();
    let state = PlatformState::read(first.vm.fd(), shape).unwrap();

    let (second, shape) = platform(true);
    let fresh = PlatformState::read(second.vm.fd(), shape).unwrap();
    assert_eq!(
        differing_parts(&fresh.parts(), &state.parts()),
        ["interrupt controllers", "PIT"]
    );
    let record = state.write_record(Vec::new());
    let read = PlatformState::from_bytes(&record).unwrap();
    read.check(shape).unwrap();
    read.write(second.vm.fd(), shape, Passed::default())
        .unwrap();
    let back = PlatformState::read(second.vm.fd(), shape).unwrap();
    assert_eq!(back.parts(), state.parts());

    let (_third, without) = platform(false);
    let refused = read.check(without).unwrap_err().to_string();
    assert!(
        refused.contains("interrupt controller is there"),
        "{refused}"
    );
    for len in 0..record.len() {
        assert!(PlatformState::from_bytes(&record[..len]).is_err());
    }
}

#[test]
fn rule_16_kvmclock_goes_forward_by_what_has_passed_and_never_back() {
    let (bare, shape) = platform(false);
    let clock = || bare.vm.fd().get_clock().unwrap().clock;
    let mut state = PlatformState::read(bare.vm.fd(), shape).unwrap();
    let captured_ns = clock();
    // Captured five seconds ago.
    state.shift_realtime(-5_000_000_000);
    state.write(bare.vm.fd(), shape, Passed::default()).unwrap();
    let now_ns = clock();
    assert!(
        now_ns >= captured_ns + 5_000_000_000,
        "{captured_ns} {now_ns}"
    );
    // Captured just now, by a clock that is behind: this machine has shown more.
    state.shift_realtime(5_000_000_000);
    state.write(bare.vm.fd(), shape, Passed::default()).unwrap();
    assert!(clock() >= now_ns);
    // A bound holds whatever the wall clocks say.
    let (other, shape) = platform(false);
    state.shift_realtime(-3_600_000_000_000);
    let passed = Passed {
        at_most: Some(std::time::Duration::from_millis(1)),
        ..Passed::default()
    };
    state.write(other.vm.fd(), shape, passed).unwrap();
    let there_ns = other.vm.fd().get_clock().unwrap().clock;
    assert!(there_ns < captured_ns + 60_000_000_000, "{there_ns}");
}

#[test]
fn invariant_8_a_machine_that_is_not_replicated_has_no_dirty_rings() {
    // So much that a replicated one would have them.
    let ram = Arc::new(GuestRam::new(4 << 30, Pages::Small).unwrap());
    let vm = Vm::new(ram, None).unwrap();
    assert_ne!(vm.dirty().snapshot().mechanism, DirtyMechanism::Ring);
}
