//! Machines on the real KVM, with guests of a few instructions.

use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Mutex};

use colo_fastpath::nic::SocketNic;
use colo_fastpath::ring::{GuestRam, Pages};

use super::*;
use crate::checkpoint::pages::PageBitmap;
use crate::config::Config;

/// Puts code at 2 MiB, with 2 MiB of memory behind it, into an ELF image.
pub(crate) fn elf_image(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 120];
    image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    image[16] = 2; // ET_EXEC
    image[18] = 62; // EM_X86_64
    image[20] = 1;
    let mut put = |at: usize, value: u64, len: usize| {
        image[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
    };
    put(24, 2 << 20, 8); // entry
    put(32, 64, 8); // program headers
    put(52, 64, 2);
    put(54, 56, 2);
    put(56, 1, 2);
    put(64, 1, 4); // PT_LOAD
    put(68, 7, 4);
    put(72, 120, 8); // offset
    put(80, 2 << 20, 8);
    put(88, 2 << 20, 8);
    put(96, code.len() as u64, 8);
    put(104, 2 << 20, 8); // memory size
    image.extend_from_slice(code);
    image
}

#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

pub(crate) struct Lab {
    pub(crate) machine: Machine,
    pub(crate) events: Events,
    console: Console,
    wire: UnixDatagram,
}

pub(crate) fn config() -> Config {
    let text = r#"
        [vm]
        name = "test"
        kernel = "none"
        ram_mib = 8
        [net]
        tap = "none"
        mac = "52:54:00:c0:10:01"
    "#;
    Config::parse(Path::new("test.toml"), text).unwrap()
}

pub(crate) fn lab() -> Lab {
    let ram = GuestRam::new(8 << 20, Pages::Small).unwrap();
    lab_around(Arc::new(ram))
}

pub(crate) fn lab_around(ram: Arc<GuestRam>) -> Lab {
    let (nic, wire) = SocketNic::pair(1500).unwrap();
    let console = Console::default();
    let (machine, events) = Machine::create_around(
        ram,
        &config(),
        vec![Box::new(nic)],
        Box::new(console.clone()),
    )
    .unwrap();
    Lab {
        machine,
        events,
        console,
        wire,
    }
}

pub(crate) fn running(code: &[u8]) -> Lab {
    let lab = stopped(code);
    lab.machine.resume_vcpus().unwrap();
    lab
}

pub(crate) fn stopped(code: &[u8]) -> Lab {
    let lab = lab();
    lab.machine.load(&elf_image(code)).unwrap();
    lab
}

impl Lab {
    pub(super) fn end(&self) -> VmExit {
        self.events.wait().unwrap().exit
    }

    pub(crate) fn counter(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.machine.ram().read(gpa, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    pub(crate) fn wait_until_counter_moves(&self) -> u64 {
        let before = self.counter(COUNTER);
        loop {
            let now = self.counter(COUNTER);
            if now != before {
                return now;
            }
            std::thread::yield_now();
        }
    }
}

/// Where the counting guests count.
pub(crate) const COUNTER: u64 = 0x30_0000;

pub(crate) const POWER_OFF: &[u8] = &[0x66, 0xba, 0x04, 0x06, 0xee]; // mov dx, 0x604; out dx, al

/// loop: inc qword [0x300000]; mov eax, 100; mov edx, 0x600; out dx, eax; jmp loop
pub(crate) const COUNT_AND_SLEEP: &[u8] = &[
    0x48, 0xff, 0x04, 0x25, 0x00, 0x00, 0x30, 0x00, 0xb8, 0x64, 0x00, 0x00, 0x00, 0xba, 0x00, 0x06,
    0x00, 0x00, 0xef, 0xeb, 0xeb,
];

/// loop: inc qword [0x300000]; jmp loop
pub(super) const COUNT: &[u8] = &[0x48, 0xff, 0x04, 0x25, 0x00, 0x00, 0x30, 0x00, 0xeb, 0xf6];

/// xor eax, eax; mov edx, 0x600; out dx, eax; then power off
const SLEEP_WITHOUT_LIMIT: &[u8] = &[
    0x31, 0xc0, 0xba, 0x00, 0x06, 0x00, 0x00, 0xef, 0x66, 0xba, 0x04, 0x06, 0xee,
];

#[test]
fn a_guest_prints_and_powers_off() {
    let mut code = Vec::new();
    for byte in *b"hi\n!" {
        code.extend_from_slice(&[0xb0, byte, 0x66, 0xba, 0xf8, 0x03, 0xee]);
    }
    code.extend_from_slice(POWER_OFF);
    let lab = running(&code);
    assert_eq!(lab.end(), VmExit::PowerOff);
    assert_eq!(*lab.console.0.lock().unwrap(), b"hi\n!");
    assert_eq!(lab.machine.exits()[0].serial, 4);
    lab.machine.resume_vcpus().unwrap();
    lab.machine.pause_vcpus().unwrap();
    assert!(lab.events.next().is_none(), "an ended guest stays ended");
}

/// KVM runs on AMD-V itself, which does not say where a triple fault was.
fn is_amd_v() -> bool {
    Path::new("/sys/module/kvm_amd").exists()
}

#[test]
fn faults_are_reported_with_their_place() {
    // nop; ud2, hlt, mov al, [very high]
    let wild: &[u8] = &[0x90, 0xa0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff];
    for code in [&[0x90, 0x0f, 0x0b][..], &[0x90, 0xf4], wild] {
        let lab = running(code);
        match lab.end() {
            VmExit::Fault { what, rip } => {
                assert!(what.contains("triple fault"), "{what}");
                let is_there = |rip| (2 << 20..(2 << 20) + 8).contains(&rip);
                assert!(rip.map_or(is_amd_v(), is_there), "{rip:x?}");
            }
            other => panic!("{other:?}"),
        }
    }
    // syscall
    let lab = running(&[0x0f, 0x05]);
    assert!(lab.end().to_string().contains("triple fault"));
}

#[test]
fn nowhere_reads_all_ones_and_does_not_hurt() {
    // mov eax, [0xd0100000]; mov [0x300000], eax; mov [0xd0100000], eax;
    // mov dx, 0x99; in al, dx; mov [0x300004], al; out dx, al; power off
    let mut code = vec![
        0xb9, 0x00, 0x00, 0x10, 0xd0, 0x8b, 0x01, 0x89, 0x04, 0x25, 0x00, 0x00, 0x30, 0x00, 0x89,
        0x01, 0x66, 0xba, 0x99, 0x00, 0x31, 0xc0, 0xec, 0x88, 0x04, 0x25, 0x04, 0x00, 0x30, 0x00,
        0xee,
    ];
    code.extend_from_slice(POWER_OFF);
    let lab = running(&code);
    assert_eq!(lab.end(), VmExit::PowerOff);
    assert_eq!(lab.counter(COUNTER), 0xff_ffff_ffff);
    let exits = lab.machine.exits()[0];
    assert_eq!((exits.mmio_nowhere, exits.pio_nowhere), (2, 2));
}

#[test]
fn device_registers_answer() {
    // mov ecx, 0xd0000000; mov eax, [rcx]; mov [0x300000], eax; mov eax, [rcx+8];
    // mov [0x300004], eax; power off
    let mut code = vec![
        0xb9, 0x00, 0x00, 0x00, 0xd0, 0x8b, 0x01, 0x89, 0x04, 0x25, 0x00, 0x00, 0x30, 0x00, 0x8b,
        0x41, 0x08, 0x89, 0x04, 0x25, 0x04, 0x00, 0x30, 0x00,
    ];
    code.extend_from_slice(POWER_OFF);
    let lab = running(&code);
    assert_eq!(lab.end(), VmExit::PowerOff);
    assert_eq!(
        lab.counter(COUNTER),
        1 << 32 | u64::from(u32::from_le_bytes(*b"virt"))
    );
}

#[test]
fn a_doorbell_reaches_the_worker_without_an_exit() {
    // mov ecx, 0xd0000050; mov dword [rcx], 0; power off
    let mut code = vec![
        0xb9, 0x50, 0x00, 0x00, 0xd0, 0xc7, 0x01, 0x00, 0x00, 0x00, 0x00,
    ];
    code.extend_from_slice(POWER_OFF);
    let lab = running(&code);
    assert_eq!(lab.end(), VmExit::PowerOff);
    while lab.machine.worker().stats().guest_kicks == 0 {
        std::thread::yield_now();
    }
    assert_eq!(lab.machine.exits()[0].mmio_write, 0);
}

#[test]
fn pause_works_while_running_and_while_asleep() {
    for code in [COUNT, COUNT_AND_SLEEP] {
        let lab = running(code);
        for _ in 0..50 {
            lab.wait_until_counter_moves();
            lab.machine.pause_vcpus().unwrap();
            let stopped = lab.counter(COUNTER);
            lab.machine.save_vcpus().unwrap();
            assert_eq!(lab.counter(COUNTER), stopped);
            lab.machine.resume_vcpus().unwrap();
        }
    }
    let lab = running(SLEEP_WITHOUT_LIMIT);
    while lab.machine.exits()[0].sleep == 0 {
        std::thread::yield_now();
    }
    lab.machine.pause_vcpus().unwrap();
    lab.machine.resume_vcpus().unwrap();
    assert_eq!(lab.end(), VmExit::PowerOff, "a kick ends the sleep early");
}

#[test]
fn pauses_do_not_get_lost_in_a_storm() {
    let lab = running(COUNT_AND_SLEEP);
    for _ in 0..2000 {
        lab.machine.pause_vcpus().unwrap();
        lab.machine.resume_vcpus().unwrap();
    }
    lab.wait_until_counter_moves();
}

fn copy_into(from: &Lab, to: &Lab) {
    let states = from.machine.save_vcpus().unwrap();
    let records: Vec<_> = states.iter().map(VcpuState::to_bytes).collect();
    let devices = from.machine.save_devices().unwrap();
    let mut page = [0; 4096];
    for number in 0..from.machine.ram().page_count() {
        from.machine.ram().copy_page_out(number, &mut page).unwrap();
        to.machine.ram().write_page(number, &page).unwrap();
    }
    let states: Vec<_> = records
        .iter()
        .map(|record| VcpuState::from_bytes(record).unwrap())
        .collect();
    to.machine.check_vcpus(&states).unwrap();
    to.machine
        .restore_vcpus(
            &states,
            ClockJump::SinceCapture {
                begun: std::time::Instant::now(),
            },
        )
        .unwrap();
    to.machine.check_devices(&devices).unwrap();
    to.machine.restore_devices(&devices).unwrap();
}

#[test]
fn a_copied_machine_goes_on_exactly_where_it_was() {
    let first = running(COUNT_AND_SLEEP);
    let second = lab();
    for _ in 0..5 {
        first.wait_until_counter_moves();
        first.machine.pause_vcpus().unwrap();
        second.machine.pause_vcpus().unwrap();
        copy_into(&first, &second);
        let counter = first.counter(COUNTER);
        assert_eq!(second.counter(COUNTER), counter);
        let (a, b) = (
            first.machine.save_vcpus().unwrap(),
            second.machine.save_vcpus().unwrap(),
        );
        assert_eq!(a[0].regs, b[0].regs);
        assert_eq!(a[0].sregs, b[0].sregs);
        second.machine.resume_vcpus().unwrap();
        assert!(second.wait_until_counter_moves() > counter);
        first.machine.worker().resume().unwrap();
        first.machine.resume_vcpus().unwrap();
    }
}

#[test]
fn vector_registers_travel() {
    // mov eax, 7; vmovd xmm5, eax; vbroadcastss ymm5, xmm5 would need AVX2 on the host; movd does:
    // mov eax, 0x1234567; movd xmm5, eax; loop: inc qword [0x300000]; movd [0x300008], xmm5; jmp
    let code = [
        0xb8, 0x67, 0x45, 0x23, 0x01, 0x66, 0x0f, 0x6e, 0xe8, 0x48, 0xff, 0x04, 0x25, 0x00, 0x00,
        0x30, 0x00, 0x66, 0x0f, 0x7e, 0x2c, 0x25, 0x08, 0x00, 0x30, 0x00, 0xeb, 0xed,
    ];
    let first = running(&code);
    let second = lab();
    first.wait_until_counter_moves();
    first.machine.pause_vcpus().unwrap();
    copy_into(&first, &second);
    second.machine.ram().write(COUNTER + 8, &[0; 8]).unwrap();
    second.machine.resume_vcpus().unwrap();
    second.wait_until_counter_moves();
    second.wait_until_counter_moves();
    assert_eq!(second.counter(COUNTER + 8), 0x0123_4567);
}

#[test]
fn an_ended_machine_runs_again_after_a_restore() {
    let first = running(COUNT);
    let second = running(POWER_OFF);
    assert_eq!(second.end(), VmExit::PowerOff);
    first.wait_until_counter_moves();
    first.machine.pause_vcpus().unwrap();
    copy_into(&first, &second);
    second.machine.resume_vcpus().unwrap();
    second.wait_until_counter_moves();
}

#[test]
fn the_dirty_log_has_what_guest_and_host_wrote() {
    let lab = running(COUNT);
    let mut bitmap = PageBitmap::new(lab.machine.ram().page_count());
    let has = |bitmap: &PageBitmap, gpa: u64| {
        let page = gpa / 4096;
        bitmap.word(page as usize / 64) & 1 << (page % 64) != 0
    };
    lab.wait_until_counter_moves();
    assert!(
        lab.machine.take_dirty(&mut bitmap).is_err(),
        "logging is off"
    );
    lab.machine.set_dirty_logging(true).unwrap();
    lab.wait_until_counter_moves();
    lab.machine.ram().write(0x50_0000, &[1]).unwrap();
    lab.machine.pause_vcpus().unwrap();
    lab.machine.take_dirty(&mut bitmap).unwrap();
    assert!(has(&bitmap, COUNTER) && has(&bitmap, 0x50_0000));
    assert!(!has(&bitmap, 0x40_0000));

    bitmap.clear();
    lab.machine.take_dirty(&mut bitmap).unwrap();
    assert_eq!(bitmap.count(), 0, "a paused machine dirties nothing");
    lab.machine.resume_vcpus().unwrap();
    lab.wait_until_counter_moves();
    lab.machine.take_dirty(&mut bitmap).unwrap();
    assert!(has(&bitmap, COUNTER));
    lab.machine.set_dirty_logging(false).unwrap();
    lab.wait_until_counter_moves();
}

#[test]
fn records_are_checked() {
    let lab = running(COUNT);
    lab.machine.pause_vcpus().unwrap();
    let state = lab.machine.save_vcpus().unwrap().remove(0);
    let record = state.to_bytes();
    assert_eq!(VcpuState::from_bytes(&record).unwrap(), state);
    for len in [0, 3, 4, 11, 12, 100, record.len() - 1] {
        assert!(VcpuState::from_bytes(&record[..len]).is_err());
    }
    let mut longer = record.clone();
    longer.push(0);
    assert!(VcpuState::from_bytes(&longer).is_err());
    let mut newer = record.clone();
    newer[4] = 9;
    assert!(
        VcpuState::from_bytes(&newer)
            .unwrap_err()
            .to_string()
            .contains("version 9")
    );
    let devices = lab.machine.save_devices().unwrap();
    assert!(lab.machine.check_devices(&record).is_err());
    assert!(
        lab.machine
            .check_devices(&devices[..devices.len() - 1])
            .is_err()
    );
    let mut other = devices.clone();
    other[16] = 2;
    record::seal(&mut other);
    assert!(
        lab.machine
            .check_devices(&other)
            .unwrap_err()
            .to_string()
            .contains("device_id")
    );
    assert!(matches!(
        lab.machine.restore_vcpus(
            &[],
            ClockJump::SinceCapture {
                begun: std::time::Instant::now()
            }
        ),
        Err(MachineError::Shape { .. })
    ));
}

#[test]
fn a_wall_clock_can_be_computed_from_the_command_line() {
    // rdtsc; mov [0x300000], eax; mov [0x300004], edx; power off
    let mut code = vec![
        0x0f, 0x31, 0x89, 0x04, 0x25, 0x00, 0x00, 0x30, 0x00, 0x89, 0x14, 0x25, 0x04, 0x00, 0x30,
        0x00,
    ];
    code.extend_from_slice(POWER_OFF);
    let lab = running(&code);
    assert_eq!(lab.end(), VmExit::PowerOff);
    let mut text = vec![0; 512];
    lab.machine.ram().read(0x8000, &mut text).unwrap();
    let text = String::from_utf8_lossy(&text).into_owned();
    let number = |name: &str| -> u128 {
        let rest = text.split(name).nth(1).unwrap();
        rest.split([' ', '\0']).next().unwrap().parse().unwrap()
    };
    let wall_ns =
        number("wall_ns=") + u128::from(lab.counter(COUNTER)) * 1_000_000 / number("tsc_khz=");
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let difference_s = (now.as_nanos() as i128 - wall_ns as i128) / 1_000_000_000;
    assert!((-60..600).contains(&difference_s), "{difference_s} s off");
    drop(lab.wire);
}
