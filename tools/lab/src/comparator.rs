//! A comparator behind unix sockets: QEMU's colo-compare object or `colo compare --sockets`, each in a
//! process of its own, with this process at the other ends.
//!
//! Invariants: both get the same sockets and speak the same protocol; the process is gone when the value
//! is dropped; nothing waits for ever.
//!
//! Does not judge what they do.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::process::{Process, ProcessError};

/// The program with QEMU's object.
pub const QEMU: &str = "qemu-system-x86_64";

/// Longest wait for a connection or a message.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a listener is looked at.
const POLL: Duration = Duration::from_millis(5);
/// The sockets, by their part.
const PARTS: [&str; 4] = ["primary", "secondary", "out", "notify"];

/// Whose comparator it is.
#[derive(Debug, Clone, Copy)]
pub enum Kind<'a> {
    /// QEMU's object, with no machine around it.
    Qemu,
    /// Ours, in this binary.
    Colo(&'a Path),
}

/// How it is set up.
#[derive(Debug, Clone)]
pub struct ComparatorOptions {
    /// How late the secondary's frame may be.
    pub timeout_ms: u32,
    /// Messages carry a virtio-net header.
    pub vnet_hdr: bool,
    /// QEMU's limit of its queues of packets, for each connection and side.
    pub max_queue_size: u32,
    /// A command that runs it, such as a profiler with its options.
    pub under: Vec<String>,
    /// Further arguments of the process.
    pub arguments: Vec<String>,
}

impl Default for ComparatorOptions {
    /// No time limit that a test would reach, QEMU's own queues.
    fn default() -> Self {
        Self {
            timeout_ms: 3_600_000,
            vnet_hdr: false,
            max_queue_size: 1024,
            under: Vec::new(),
            arguments: Vec::new(),
        }
    }
}

/// What can go wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum ComparatorError {
    /// The process failed.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A socket failed.
    #[error("comparator's socket {part}: {source}")]
    Socket {
        /// Which one.
        part: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A running comparator.
#[derive(Debug)]
pub struct Comparator {
    /// The process.
    pub process: Process,
    /// Takes the primary guest's frames.
    pub primary: UnixStream,
    /// Takes the secondary guest's frames.
    pub secondary: UnixStream,
    /// Gives the frames that may leave.
    pub out: UnixStream,
    /// Asks for checkpoints and is told of them.
    pub notify: UnixStream,
    vnet_hdr: bool,
}

impl Comparator {
    /// Starts one whose sockets and log are in `dir`.
    pub fn start(
        kind: Kind<'_>,
        options: &ComparatorOptions,
        dir: &Path,
    ) -> Result<Self, ComparatorError> {
        let mut listeners = Vec::new();
        for part in PARTS {
            let bind = UnixListener::bind(dir.join(part)).and_then(|listener| {
                listener.set_nonblocking(true)?;
                Ok(listener)
            });
            listeners.push(bind.map_err(|source| ComparatorError::Socket { part, source })?);
        }
        let (name, mut command) = match kind {
            Kind::Qemu => ("qemu", qemu(options, dir)),
            Kind::Colo(binary) => ("colo-compare", colo(binary, options, dir)),
        };
        command.args(&options.arguments);
        let mut process = Process::spawn(name, under(&options.under, command), dir)?;
        let mut accept = |at: usize| accept(PARTS[at], &listeners[at], &mut process);
        let (primary, secondary) = (accept(0)?, accept(1)?);
        let (out, notify) = (accept(2)?, accept(3)?);
        Ok(Self {
            process,
            primary,
            secondary,
            out,
            notify,
            vnet_hdr: options.vnet_hdr,
        })
    }

    /// The primary guest sends a frame.
    pub fn primary_sends(&mut self, frame: &[u8]) -> io::Result<()> {
        self.primary.write_all(&message(frame, self.vnet_hdr))
    }

    /// The secondary guest sends a frame.
    pub fn secondary_sends(&mut self, frame: &[u8]) -> io::Result<()> {
        self.secondary.write_all(&message(frame, self.vnet_hdr))
    }

    /// The next frame that leaves.
    pub fn released(&mut self) -> io::Result<Vec<u8>> {
        read_message(&mut self.out, self.vnet_hdr)
    }

    /// The next message on the notify socket; it never carries a virtio-net header.
    pub fn notified(&mut self) -> io::Result<String> {
        read_message(&mut self.notify, false)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// How many bytes wait on the notify socket, as far as one look tells.
    pub fn notified_bytes(&self) -> io::Result<usize> {
        let mut bytes = [0; 4096];
        // SAFETY: the descriptor is open and `bytes` is writable for its whole length.
        let n = unsafe {
            libc::recv(
                self.notify.as_raw_fd(),
                bytes.as_mut_ptr().cast(),
                bytes.len(),
                libc::MSG_PEEK | libc::MSG_DONTWAIT,
            )
        };
        match (usize::try_from(n), io::Error::last_os_error()) {
            (Ok(n), _) => Ok(n),
            (Err(_), e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
            (Err(_), e) => Err(e),
        }
    }

    /// Says on the notify socket that a checkpoint was taken.
    pub fn checkpoint_taken(&mut self) -> io::Result<()> {
        // What comes in on this socket has the second length field wherever frames have it.
        let mut bytes = message(b"COLO_CHECKPOINT", false);
        if self.vnet_hdr {
            bytes.splice(4..4, [0; 4]);
        }
        self.notify.write_all(&bytes)
    }
}

fn under(wrapper: &[String], command: Command) -> Command {
    let Some((program, arguments)) = wrapper.split_first() else {
        return command;
    };
    let mut wrapped = Command::new(program);
    wrapped
        .args(arguments)
        .arg(command.get_program())
        .args(command.get_args());
    wrapped
}

fn qemu(options: &ComparatorOptions, dir: &Path) -> Command {
    let mut command = Command::new(QEMU);
    command.args(["-machine", "none", "-nodefaults", "-display", "none"]);
    command.args(["-object", "iothread,id=compare-thread"]);
    for part in PARTS {
        let path = dir.join(part);
        let chardev = format!("socket,id={part},path={}", path.display());
        command.args(["-chardev", &chardev]);
    }
    let ComparatorOptions {
        timeout_ms,
        max_queue_size,
        ..
    } = options;
    let vnet_hdr = if options.vnet_hdr {
        ",vnet_hdr_support=on"
    } else {
        ""
    };
    command.arg("-object").arg(format!(
        "colo-compare,id=compare,primary_in=primary,secondary_in=secondary,outdev=out,\
         notify_dev=notify,iothread=compare-thread,compare_timeout={timeout_ms},\
         expired_scan_cycle={},max_queue_size={max_queue_size}{vnet_hdr}",
        timeout_ms.div_ceil(4)
    ));
    command
}

fn colo(binary: &Path, options: &ComparatorOptions, dir: &Path) -> Command {
    let address = |part: &str| format!("connect:{}", dir.join(part).display());
    let mut command = Command::new(binary);
    command.args(["compare", "--sockets"]);
    command.args([address("primary"), address("secondary"), address("out")]);
    command.args(["--notify", &address("notify")]);
    command.args(["--deadline-ms", &options.timeout_ms.to_string()]);
    if options.vnet_hdr {
        command.arg("--vnet-hdr");
    }
    command
}

fn accept(
    part: &'static str,
    listener: &UnixListener,
    process: &mut Process,
) -> Result<UnixStream, ComparatorError> {
    let socket = |source| ComparatorError::Socket { part, source };
    let begun = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).map_err(socket)?;
                stream.set_read_timeout(Some(PATIENCE)).map_err(socket)?;
                stream.set_write_timeout(Some(PATIENCE)).map_err(socket)?;
                return Ok(stream);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(socket(e)),
        }
        if let Some(status) = process.poll_exit()? {
            return Err(process.ended(status, "connected").into());
        }
        if begun.elapsed() > PATIENCE {
            return Err(socket(io::ErrorKind::TimedOut.into()));
        }
        thread::sleep(POLL);
    }
}

/// Bytes of the virtio-net header that [`message`] adds (virtio 1.3 section 5.1.6, without hash).
const VNET_HEADER: usize = 12;

/// A frame as it is on the wire.
pub fn message(frame: &[u8], vnet_hdr: bool) -> Vec<u8> {
    let header = if vnet_hdr { VNET_HEADER } else { 0 };
    let mut bytes = Vec::with_capacity(8 + header + frame.len());
    bytes.extend_from_slice(&((header + frame.len()) as u32).to_be_bytes());
    if vnet_hdr {
        bytes.extend_from_slice(&(header as u32).to_be_bytes());
        bytes.resize(8 + header, 0);
    }
    bytes.extend_from_slice(frame);
    bytes
}

/// Reads one message and gives its frame.
pub fn read_message(stream: &mut UnixStream, vnet_hdr: bool) -> io::Result<Vec<u8>> {
    let mut number = || {
        let mut bytes = [0; 4];
        stream.read_exact(&mut bytes)?;
        io::Result::Ok(u32::from_be_bytes(bytes) as usize)
    };
    let length = number()?;
    let header = if vnet_hdr { number()? } else { 0 };
    let mut frame = vec![0; length];
    stream.read_exact(&mut frame)?;
    if header > length {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(frame.split_off(header))
}
