//! A stand-in in a thread, with the test at the other end of its sockets.

#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "what fails in a helper fails its test; not every test uses all"
)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::Duration;

use colo_compare::Policy;
use colo_sockets::{Address, Config, SocketsError, Summary};
use tempfile::TempDir;

/// Longest wait for what must come.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a test chooses.
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    pub notify: bool,
    pub vnet_hdr: bool,
    pub at_once: bool,
    pub deadline_us: u64,
}

impl Choice {
    /// Deadlines that never come, and a notify socket.
    pub const PATIENT: Self = Self {
        notify: true,
        vnet_hdr: false,
        at_once: false,
        deadline_us: 3_600_000_000,
    };
}

/// The stand-in and the other ends.
pub struct Rig {
    pub primary: Option<UnixStream>,
    pub secondary: Option<UnixStream>,
    pub out: UnixStream,
    pub notify: Option<UnixStream>,
    thread: JoinHandle<Result<Summary, SocketsError>>,
    vnet_hdr: bool,
    _dir: TempDir,
}

impl Rig {
    pub fn start(choice: Choice) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listen = |name: &str| {
            let path = dir.path().join(name);
            let address: Address = format!("connect:{}", path.display()).parse().unwrap();
            (UnixListener::bind(path).unwrap(), address)
        };
        let (primary_listener, primary) = listen("primary");
        let (secondary_listener, secondary) = listen("secondary");
        let (out_listener, out) = listen("out");
        let (notify_listener, notify) = listen("notify");
        let config = Config {
            primary,
            secondary,
            out,
            notify: choice.notify.then_some(notify),
            vnet_hdr: choice.vnet_hdr,
            deadline_us: choice.deadline_us,
            policy: Policy::default(),
            checkpoint_at_once: choice.at_once,
        };
        let thread = std::thread::spawn(move || colo_sockets::run(config));
        let accept = |listener: UnixListener| {
            let (stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            stream
        };
        Self {
            primary: Some(accept(primary_listener)),
            secondary: Some(accept(secondary_listener)),
            out: accept(out_listener),
            notify: choice.notify.then(|| accept(notify_listener)),
            thread,
            vnet_hdr: choice.vnet_hdr,
            _dir: dir,
        }
    }

    pub fn primary_sends(&mut self, frame: &[u8]) {
        let message = message(frame, self.vnet_hdr.then_some(12));
        self.primary.as_mut().unwrap().write_all(&message).unwrap();
    }

    pub fn secondary_sends(&mut self, frame: &[u8]) {
        let message = message(frame, self.vnet_hdr.then_some(12));
        let secondary = self.secondary.as_mut().unwrap();
        secondary.write_all(&message).unwrap();
    }

    pub fn both_send(&mut self, frame: &[u8]) {
        self.primary_sends(frame);
        self.secondary_sends(frame);
    }

    /// The next frame that leaves.
    pub fn released(&mut self) -> Vec<u8> {
        read_message(&mut self.out, self.vnet_hdr).expect("a frame")
    }

    /// The next message on the notify socket.
    pub fn notified(&mut self) -> String {
        let message = read_message(self.notify.as_mut().unwrap(), false);
        String::from_utf8(message.expect("a message")).unwrap()
    }

    pub fn notify(&mut self, text: &str) {
        let message = message(text.as_bytes(), self.vnet_hdr.then_some(0));
        self.notify.as_mut().unwrap().write_all(&message).unwrap();
    }

    /// Closes the inputs and gives what was still written, and the outcome.
    pub fn finish(mut self) -> (Vec<Vec<u8>>, Result<Summary, SocketsError>) {
        self.primary = None;
        self.secondary = None;
        let mut rest = Vec::new();
        while let Some(frame) = read_message(&mut self.out, self.vnet_hdr) {
            rest.push(frame);
        }
        (rest, self.thread.join().unwrap())
    }

    /// Waits for the end that came by itself.
    pub fn outcome(self) -> Result<Summary, SocketsError> {
        self.thread.join().unwrap()
    }
}

/// A message as it is on the wire; with a virtio-net header of so many bytes.
pub fn message(frame: &[u8], vnet_hdr: Option<usize>) -> Vec<u8> {
    let header = vnet_hdr.unwrap_or(0);
    let mut bytes = ((header + frame.len()) as u32).to_be_bytes().to_vec();
    if vnet_hdr.is_some() {
        bytes.extend_from_slice(&(header as u32).to_be_bytes());
        bytes.extend_from_slice(&vec![0x5a; header]);
    }
    bytes.extend_from_slice(frame);
    bytes
}

/// Reads a message; `None` at the end of the stream.
fn read_message(stream: &mut UnixStream, vnet_hdr: bool) -> Option<Vec<u8>> {
    let mut length = [0; 4];
    match stream.read(&mut length[..1]).unwrap() {
        0 => return None,
        _ => stream.read_exact(&mut length[1..]).unwrap(),
    }
    let mut header = 0;
    if vnet_hdr {
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes).unwrap();
        header = u32::from_be_bytes(bytes) as usize;
    }
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    stream.read_exact(&mut frame).unwrap();
    assert_eq!(frame[..header], vec![0x5a; header], "its virtio-net header");
    Some(frame.split_off(header))
}
