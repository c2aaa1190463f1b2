//! Guests of a few instructions that write to memory as they are told, for tests of the checkpoint engine.

use std::path::Path;

use colo_fastpath::nic::SocketNic;

use crate::config::Config;
use crate::machine::{Events, Machine, PAGE_TABLES, tests::elf_image};

/// Where the guests read their orders: a sequence number, its echo, address, count, stride, pause.
pub(crate) const ORDERS: u64 = 0x30_0000;
/// Page of the orders; the guest writes the echo there.
pub(crate) const ORDERS_PAGE: u64 = ORDERS / 4096;

/// Not one of the guest's page tables: with AMD-V's nested paging every walk of the guest's tables counts as a write to
/// them (APM volume 2, 15.25.5), whatever the accessed and dirty bits are.
pub(crate) fn is_no_page_table(page: u64) -> bool {
    !PAGE_TABLES.contains(&(page * 4096))
}

/// mov ebx, ORDERS
/// wait: pause; mov rax, [rbx]; cmp rax, [rbx+8]; je wait
/// mov rdi, [rbx+16]; mov rcx, [rbx+24]; mov rsi, [rbx+32]
/// next: inc qword [rdi]; add rdi, rsi; dec rcx; jnz next
/// mov [rbx+8], rax; jmp wait
pub(crate) const ON_ORDER: &[u8] = &[
    0xbb, 0x00, 0x00, 0x30, 0x00, 0xf3, 0x90, 0x48, 0x8b, 0x03, 0x48, 0x3b, 0x43, 0x08, 0x74, 0xf5,
    0x48, 0x8b, 0x7b, 0x10, 0x48, 0x8b, 0x4b, 0x18, 0x48, 0x8b, 0x73, 0x20, 0x48, 0xff, 0x07, 0x48,
    0x01, 0xf7, 0x48, 0xff, 0xc9, 0x75, 0xf5, 0x48, 0x89, 0x43, 0x08, 0xeb, 0xd8,
];

/// mov ebx, ORDERS
/// again: mov rdi, [rbx+16]; mov rcx, [rbx+24]; mov rsi, [rbx+32]
/// next: inc qword [rdi]; inc qword [rdi+4088]; add rdi, rsi
/// mov rdx, [rbx+40]; spin: dec rdx; jns spin
/// dec rcx; jnz next
/// inc qword [rbx+8]; jmp again
pub(crate) const FOR_EVER: &[u8] = &[
    0xbb, 0x00, 0x00, 0x30, 0x00, 0x48, 0x8b, 0x7b, 0x10, 0x48, 0x8b, 0x4b, 0x18, 0x48, 0x8b, 0x73,
    0x20, 0x48, 0xff, 0x07, 0x48, 0xff, 0x87, 0xf8, 0x0f, 0x00, 0x00, 0x48, 0x01, 0xf7, 0x48, 0x8b,
    0x53, 0x28, 0x48, 0xff, 0xca, 0x79, 0xfb, 0x48, 0xff, 0xc9, 0x75, 0xe5, 0x48, 0xff, 0x43, 0x08,
    0xeb, 0xd3,
];

/// A running guest.
pub(crate) struct Guest {
    pub(crate) machine: Machine,
    _events: Events,
}

impl Guest {
    /// Starts `code` with `ram_mib` of RAM; `more` goes into the configuration.
    pub(crate) fn start(code: &[u8], ram_mib: u64, more: &str) -> Self {
        Self::start_on(false, code, ram_mib, more)
    }

    /// The same on `huge` pages, if so many are reserved.
    pub(crate) fn start_on(huge: bool, code: &[u8], ram_mib: u64, more: &str) -> Self {
        let text = format!(
            r#"
            [vm]
            name = "test"
            kernel = "none"
            ram_mib = {ram_mib}
            hugepages = {huge}
            [net]
            tap = "none"
            mac = "52:54:00:c0:10:01"
            [replication]
            link_listen = "127.0.0.1:1"
            link_peer = "127.0.0.1:2"
            arbiter = "file:none"
            {more}
            "#
        );
        let config = Config::parse(Path::new("test.toml"), &text).unwrap();
        let (nic, _wire) = SocketNic::pair(1500).unwrap();
        let console = Box::new(std::io::sink());
        let (machine, events) =
            Machine::create_stopped(&config, vec![Box::new(nic)], console).unwrap();
        machine.load(&elf_image(code)).unwrap();
        Self {
            machine,
            _events: events,
        }
    }

    /// What the guest finds at word `index` of its orders.
    pub(crate) fn set(&self, index: u64, value: u64) {
        let ram = self.machine.ram();
        ram.write(ORDERS + 8 * index, &value.to_le_bytes()).unwrap();
    }

    /// A word of the guest's memory.
    pub(crate) fn word(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.machine.ram().read(gpa, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Orders that writes go to `count` addresses from `gpa` on, `stride` apart.
    pub(crate) fn aim(&self, gpa: u64, count: u64, stride: u64) {
        self.set(2, gpa);
        self.set(3, count);
        self.set(4, stride);
    }

    /// Lets [`ON_ORDER`] write once to each address and waits for that.
    pub(crate) fn write_once(&self, gpa: u64, count: u64, stride: u64) {
        self.aim(gpa, count, stride);
        let order = self.word(ORDERS) + 1;
        self.set(0, order);
        while self.word(ORDERS + 8) != order {
            std::thread::yield_now();
        }
    }
}
