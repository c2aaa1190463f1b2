//! A QEMU process that is told what to do over QMP, its machine protocol.
//!
//! Invariants: one command at a time; events that come in between are kept with QEMU's own time stamps; no answer is
//! waited for longer than a limit; the process is gone when the value is dropped.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use colo_lab::comparator::QEMU;
use colo_lab::netns::Netns;
use colo_lab::process::Process;
use serde_json::{Value, json};

use crate::place::BenchError;

/// Longest wait for the socket, an answer or an event.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);

/// What QEMU told unasked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) name: String,
    /// Since 1970, by QEMU's clock.
    pub(crate) at_us: u64,
    pub(crate) status: Option<String>,
}

/// A running machine.
#[derive(Debug)]
pub(crate) struct QemuMachine {
    process: Process,
    stream: BufReader<UnixStream>,
    events: Vec<Event>,
}

impl QemuMachine {
    /// A PC without devices or disks, by software emulation, with this kernel image; with `arguments` of its own.
    pub(crate) fn start(
        name: &str,
        netns: &Netns,
        dir: &Path,
        kernel: &Path,
        ram_mib: u32,
        arguments: &[&str],
    ) -> Result<Self, BenchError> {
        let socket = dir.join(format!("{name}.qmp"));
        let mut command = netns.command(QEMU);
        command
            .args([
                "-machine",
                "pc",
                "-accel",
                "tcg",
                "-nodefaults",
                "-display",
                "none",
            ])
            .args(["-m", &ram_mib.to_string(), "-kernel"])
            .arg(kernel)
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args(arguments);
        let mut process = Process::spawn(name, command, dir)?;
        let stream = connect(&socket, &mut process)?;
        let mut machine = Self {
            process,
            stream: BufReader::new(stream),
            events: Vec::new(),
        };
        // The greeting comes first.
        machine.read()?;
        machine.command("qmp_capabilities", &json!({}))?;
        Ok(machine)
    }

    /// Gives what the command returns.
    pub(crate) fn command(&mut self, name: &str, arguments: &Value) -> Result<Value, BenchError> {
        let request = json!({ "execute": name, "arguments": arguments });
        let written = writeln!(self.stream.get_mut(), "{request}");
        written.map_err(BenchError::io(format!("order QEMU to {name}")))?;
        let asked = Instant::now();
        while asked.elapsed() < PATIENCE {
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                return Err(BenchError::Failed(format!("QEMU refused {name}: {error}")));
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
        }
        Err(BenchError::Failed(format!("QEMU did not answer {name}")))
    }

    /// Waits for the next event that fits, among those that were not waited for yet.
    pub(crate) fn wait_event(
        &mut self,
        what: &str,
        fits: impl Fn(&Event) -> bool,
    ) -> Result<Event, BenchError> {
        let begun = Instant::now();
        loop {
            if let Some(index) = self.events.iter().position(&fits) {
                let event = self.events[index].clone();
                self.events.drain(..=index);
                return Ok(event);
            }
            if begun.elapsed() > PATIENCE {
                return Err(BenchError::Failed(format!("QEMU told no {what}")));
            }
            self.read()?;
        }
    }

    /// One message; events are kept.
    fn read(&mut self) -> Result<Value, BenchError> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line);
        let bytes = read.map_err(BenchError::io("read what QEMU says"))?;
        if bytes == 0 {
            let status = self.process.wait_exit(PATIENCE)?;
            return Err(self.process.ended(status, "through with its work").into());
        }
        let message: Value = serde_json::from_str(&line).map_err(|_| BenchError::Unreadable {
            program: "QEMU",
            what: "message of its protocol",
            output: line,
        })?;
        self.events.extend(event(&message));
        Ok(message)
    }
}

fn connect(socket: &Path, process: &mut Process) -> Result<UnixStream, BenchError> {
    let begun = Instant::now();
    loop {
        if let Ok(stream) = UnixStream::connect(socket) {
            let limited = stream.set_read_timeout(Some(PATIENCE));
            limited.map_err(BenchError::io("limit the wait for QEMU"))?;
            return Ok(stream);
        }
        if let Some(status) = process.poll_exit()? {
            return Err(process.ended(status, "reachable").into());
        }
        if begun.elapsed() > PATIENCE {
            return Err(BenchError::Failed("QEMU opens no socket".to_owned()));
        }
        std::thread::sleep(POLL);
    }
}

fn event(message: &Value) -> Option<Event> {
    let time = &message["timestamp"];
    Some(Event {
        name: message["event"].as_str()?.to_owned(),
        at_us: time["seconds"].as_u64()? * 1_000_000 + time["microseconds"].as_u64()?,
        status: message["data"]["status"].as_str().map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_a_time_and_answers_are_none() {
        let message = json!({"event": "MIGRATION", "data": {"status": "completed"},
            "timestamp": {"seconds": 2, "microseconds": 5}});
        let expected = Event {
            name: "MIGRATION".to_owned(),
            at_us: 2_000_005,
            status: Some("completed".to_owned()),
        };
        assert_eq!(event(&message), Some(expected));
        assert_eq!(event(&json!({"return": {}})), None);
    }
}
