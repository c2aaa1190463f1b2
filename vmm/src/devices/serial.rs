//! The serial console: a 16550 whose output goes out line by line.
//!
//! Invariants: output errors never reach the guest.
//!
//! Does not take input and raises no interrupt.

use std::convert::Infallible;
use std::io::{self, LineWriter, Write};

use vm_superio::Trigger;

type Console = LineWriter<Box<dyn Write + Send>>;

/// User-mode guests poll.
#[derive(Debug)]
struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// The console of one machine.
pub(crate) struct Serial(vm_superio::Serial<NoInterrupt, vm_superio::serial::NoEvents, Console>);

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Serial")
    }
}

impl Serial {
    pub(crate) fn new(console: Box<dyn Write + Send>) -> Self {
        Self(vm_superio::Serial::new(
            NoInterrupt,
            LineWriter::new(console),
        ))
    }

    /// Register write, `offset` 0 to 7.
    pub(crate) fn write(&mut self, offset: u8, value: u8) {
        // A console that cannot be written to (closed pipe) is no reason to stop a guest.
        let _ = self.0.write(offset, value);
    }

    /// Register read, `offset` 0 to 7.
    pub(crate) fn read(&mut self, offset: u8) -> u8 {
        self.0.read(offset)
    }

    /// Puts an unfinished line out.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.0.writer_mut().flush()
    }
}
