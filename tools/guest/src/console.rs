//! The serial port, output only. Each byte costs an exit: be brief.

use crate::cpu;
use core::fmt::{self, Write};

const DATA_PORT: u16 = 0x3f8;

/// The 16550 at 0x3f8, which never blocks on this platform.
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: the port is the serial port of the platform; writing to its data register
            // touches no memory.
            unsafe { cpu::out8(DATA_PORT, byte) };
        }
        Ok(())
    }
}

/// Writes to the serial port.
pub fn say(text: fmt::Arguments<'_>) {
    // `Console` never fails.
    let _ = Console.write_fmt(text);
}
