//! A guest of a few instructions that writes pages at a given rate, inside this process.

use std::path::Path;
use std::time::{Duration, Instant};

use colo_fastpath::nic::SocketNic;
use colo_vmm::config::Config;
use colo_vmm::machine::{Events, Machine};

use crate::place::BenchError;

/// Where the guest reads its orders: its rounds, the first address, pages, stride, pause, pages written.
const ORDERS: u64 = 0x30_0000;
/// Where the pages begin.
pub(crate) const BASE: u64 = 0x40_0000;

// mov ebx, ORDERS
// again: mov rdi, [rbx+16]; mov rcx, [rbx+24]; mov rsi, [rbx+32]
// next: inc qword [rdi]; inc qword [rdi+4088]; inc qword [rbx+48]; add rdi, rsi
// mov rdx, [rbx+40]; spin: dec rdx; jns spin
// dec rcx; jnz next
// inc qword [rbx+8]; jmp again
const CODE: &[u8] = &[
    0xbb, 0x00, 0x00, 0x30, 0x00, 0x48, 0x8b, 0x7b, 0x10, 0x48, 0x8b, 0x4b, 0x18, 0x48, 0x8b, 0x73,
    0x20, 0x48, 0xff, 0x07, 0x48, 0xff, 0x87, 0xf8, 0x0f, 0x00, 0x00, 0x48, 0xff, 0x43, 0x30, 0x48,
    0x01, 0xf7, 0x48, 0x8b, 0x53, 0x28, 0x48, 0xff, 0xca, 0x79, 0xfb, 0x48, 0xff, 0xc9, 0x75, 0xe1,
    0x48, 0xff, 0x43, 0x08, 0xeb, 0xcf,
];
/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_micros(50);
/// Longer than any round.
const ROUND_MAX: Duration = Duration::from_secs(60);

pub(crate) struct Guest {
    pub(crate) machine: Machine,
    _events: Events,
}

impl Guest {
    /// Starts it with the dirty tracker of this name.
    pub(crate) fn start(ram_mib: u64, dirty: &str) -> Result<Self, BenchError> {
        let text = format!(
            "[vm]\nname = \"bench\"\nkernel = \"none\"\nram_mib = {ram_mib}\n\
             [net]\ntap = \"none\"\nmac = \"52:54:00:c0:10:01\"\n\
             [replication]\nlink_listen = \"127.0.0.1:1\"\nlink_peer = \"127.0.0.1:2\"\narbiter = \"file:none\"\n\
             [checkpoint]\ndirty = \"{dirty}\"\n"
        );
        let config = Config::parse(Path::new("bench.toml"), &text)
            .map_err(|e| failed("be configured", e))?;
        let (nic, _wire) = SocketNic::pair(1500).map_err(|e| failed("have a NIC", e))?;
        let console = Box::new(std::io::sink());
        let (machine, events) = Machine::create_stopped(&config, vec![Box::new(nic)], console)
            .map_err(|e| failed("be made", e))?;
        machine.load(&image()).map_err(|e| failed("be loaded", e))?;
        let guest = Self {
            machine,
            _events: events,
        };
        guest.aim(1, 0)?;
        guest.run()?;
        Ok(guest)
    }

    /// From now on it writes to `pages` pages, one after the other, and counts `pause` between two.
    pub(crate) fn aim(&self, pages: u64, pause: u64) -> Result<(), BenchError> {
        for (index, value) in [(2, BASE), (3, pages), (4, 4096), (5, pause)] {
            self.machine
                .ram()
                .write(ORDERS + 8 * index, &u64::to_le_bytes(value))
                .map_err(|e| failed("be told", e))?;
        }
        Ok(())
    }

    pub(crate) fn run(&self) -> Result<(), BenchError> {
        self.machine.resume_vcpus().map_err(|e| failed("run", e))
    }

    pub(crate) fn pause(&self) -> Result<(), BenchError> {
        self.machine.pause_vcpus().map_err(|e| failed("pause", e))
    }

    /// Waits until it has been through all of its pages so many times.
    pub(crate) fn wait_rounds(&self, rounds: u64) -> Result<(), BenchError> {
        let (begun, until) = (Instant::now(), self.rounds()? + rounds);
        while self.rounds()? < until {
            if begun.elapsed() > ROUND_MAX {
                return Err(failed("go on", "it stands still"));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Waits until it has written so many pages since its start.
    pub(crate) fn wait_written(&self, until: u64) -> Result<(), BenchError> {
        let begun = Instant::now();
        while self.written()? < until {
            if begun.elapsed() > ROUND_MAX {
                return Err(failed("go on", "it stands still"));
            }
            // Whoever yields may share the guest's processor.
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn rounds(&self) -> Result<u64, BenchError> {
        self.word(1)
    }

    /// Pages that it has written since its start: its own measure of what it got done.
    pub(crate) fn written(&self) -> Result<u64, BenchError> {
        self.word(6)
    }

    fn word(&self, index: u64) -> Result<u64, BenchError> {
        let mut bytes = [0; 8];
        let read = self.machine.ram().read(ORDERS + 8 * index, &mut bytes);
        read.map_err(|e| failed("be read", e))?;
        Ok(u64::from_le_bytes(bytes))
    }
}

pub(crate) fn failed(what: &'static str, why: impl ToString) -> BenchError {
    BenchError::Guest {
        what,
        why: why.to_string(),
    }
}

/// The code as an ELF image at 2 MiB.
fn image() -> Vec<u8> {
    const AT: u64 = 2 << 20;
    const HEADERS: u64 = 120;
    let mut image = vec![0; HEADERS as usize];
    image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    let mut put = |at: usize, value: u64, len: usize| {
        image[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
    };
    // The ELF header: ET_EXEC, EM_X86_64, version, entry, one program header behind it.
    for (at, value, len) in [
        (16, 2, 2),
        (18, 62, 2),
        (20, 1, 4),
        (24, AT, 8),
        (32, 64, 8),
    ] {
        put(at, value, len);
    }
    for (at, value) in [(52, 64), (54, 56), (56, 1)] {
        put(at, value, 2);
    }
    // PT_LOAD, read-write-execute: offset, address twice, size in the file and in memory.
    put(64, 1, 4);
    put(68, 7, 4);
    let bytes = CODE.len() as u64;
    for (at, value) in [
        (72, HEADERS),
        (80, AT),
        (88, AT),
        (96, bytes),
        (104, 2 << 20),
    ] {
        put(at, value, 8);
    }
    image.extend_from_slice(CODE);
    image
}
