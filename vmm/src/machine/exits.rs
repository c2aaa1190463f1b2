//! What the outside of a vCPU answers: ports, register windows, and the end of a guest.
//!
//! Invariants: an access to nowhere reads all ones, is counted and does not hurt the guest; device
//! registers are behind a lock that the packet path never takes.
//!
//! Does not run vCPUs and does not sleep.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use colo_fastpath::counters;
use kvm_ioctls::VcpuExit;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::serial::Serial;
use crate::devices::virtio_mmio::{VirtioMmio, WINDOW_BYTES};

/// 16550 serial console, eight ports.
const SERIAL: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;
/// A 32-bit write sleeps.
const SLEEP: u16 = 0x600;
/// A write powers the machine off.
const POWER_OFF: u16 = 0x604;

/// How a vCPU came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmExit {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest cannot go on.
    Fault {
        /// What happened.
        what: String,
        /// Where; none if KVM does not tell.
        rip: Option<u64>,
    },
    /// The thread was told to end.
    Stopped,
}

impl std::fmt::Display for VmExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PowerOff => write!(f, "the guest powered off"),
            Self::Fault {
                what,
                rip: Some(rip),
            } => write!(f, "guest fault at {rip:#x}: {what}"),
            Self::Fault { what, rip: None } => write!(f, "guest fault: {what}"),
            Self::Stopped => write!(f, "stopped"),
        }
    }
}

counters! {
    /// Why vCPUs left the guest.
    ExitStats => ExitSnapshot {
        /// Returns from `KVM_RUN` to user space, all kinds.
        total,
        /// Serial console accesses.
        serial,
        /// Sleeps by the sleep port.
        sleep,
        /// Device register reads.
        mmio_read,
        /// Device register writes.
        mmio_write,
        /// Accesses to guest physical addresses where nothing is.
        mmio_nowhere,
        /// Accesses to ports where nothing is.
        pio_nowhere,
        /// Interruptions by signals.
        signal,
        /// Stops because the dirty ring was full.
        dirty_ring_full,
        /// Times the thread moved to another processor because it had to wait for this one.
        moves,
    }
}

/// What to do after an exit.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    Run,
    /// Until a device interrupt, for at most this many microseconds (0: no limit).
    Sleep(u32),
    End(VmExit),
}

/// The outside of a machine, shared by its vCPUs.
#[derive(Debug)]
pub(super) struct Platform {
    windows: Vec<(u64, Arc<Mutex<VirtioMmio>>)>,
    serial: Mutex<Serial>,
    /// Written by devices; read by a vCPU that sleeps.
    pub(super) interrupt: EventFd,
}

impl Platform {
    /// A platform with these register windows (base address, device).
    pub(super) fn new(
        windows: Vec<(u64, Arc<Mutex<VirtioMmio>>)>,
        console: Box<dyn Write + Send>,
        interrupt: EventFd,
    ) -> Self {
        Self {
            windows,
            serial: Mutex::new(Serial::new(console)),
            interrupt,
        }
    }

    /// Answers one exit.
    pub(super) fn handle(&self, exit: VcpuExit<'_>, stats: &ExitStats) -> Next {
        match exit {
            VcpuExit::IoOut(port, data) => return self.port_out(port, data, stats),
            VcpuExit::IoIn(port, data) => self.port_in(port, data, stats),
            VcpuExit::MmioRead(gpa, data) => self.mmio_read(gpa, data, stats),
            VcpuExit::MmioWrite(gpa, data) => self.mmio_write(gpa, data, stats),
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
            VcpuExit::Hlt => return fault("hlt with no interrupt to come"),
            VcpuExit::Shutdown => return fault("triple fault"),
            VcpuExit::InternalError => return fault("KVM cannot emulate an instruction"),
            VcpuExit::FailEntry(reason, cpu) => {
                return fault(&format!(
                    "no entry into the guest: reason {reason:#x}, CPU {cpu}"
                ));
            }
            other => return fault(&format!("unexpected exit {other:?}")),
        }
        Next::Run
    }

    fn port_out(&self, port: u16, data: &[u8], stats: &ExitStats) -> Next {
        match (port, data) {
            (port, &[byte]) if SERIAL.contains(&port) => {
                stats.serial.add(1);
                lock(&self.serial).write((port - SERIAL.start()) as u8, byte);
            }
            (SLEEP, &[a, b, c, d]) => {
                stats.sleep.add(1);
                return Next::Sleep(u32::from_le_bytes([a, b, c, d]));
            }
            (POWER_OFF, &[_]) => return Next::End(VmExit::PowerOff),
            _ => stats.pio_nowhere.add(1),
        }
        Next::Run
    }

    fn port_in(&self, port: u16, data: &mut [u8], stats: &ExitStats) {
        match data {
            [byte] if SERIAL.contains(&port) => {
                stats.serial.add(1);
                *byte = lock(&self.serial).read((port - SERIAL.start()) as u8);
            }
            _ => {
                stats.pio_nowhere.add(1);
                data.fill(0xff);
            }
        }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8], stats: &ExitStats) {
        match self.window(gpa, data.len()) {
            Some((offset, device)) => {
                stats.mmio_read.add(1);
                lock(device).read(offset, data);
            }
            None => {
                stats.mmio_nowhere.add(1);
                data.fill(0xff);
            }
        }
    }

    fn mmio_write(&self, gpa: u64, data: &[u8], stats: &ExitStats) {
        match self.window(gpa, data.len()) {
            Some((offset, device)) => {
                stats.mmio_write.add(1);
                lock(device).write(offset, data);
            }
            None => stats.mmio_nowhere.add(1),
        }
    }

    fn window(&self, gpa: u64, len: usize) -> Option<(u64, &Mutex<VirtioMmio>)> {
        self.windows.iter().find_map(|(base, device)| {
            let offset = gpa.checked_sub(*base)?;
            (offset + len as u64 <= WINDOW_BYTES).then_some((offset, &**device))
        })
    }

    /// Puts the console's last, unfinished line out.
    pub(super) fn flush_console(&self) -> io::Result<()> {
        lock(&self.serial).flush()
    }
}

/// A panic elsewhere does not make device registers unusable.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn fault(what: &str) -> Next {
    // The caller knows the instruction pointer.
    Next::End(VmExit::Fault {
        what: what.to_owned(),
        rip: None,
    })
}
