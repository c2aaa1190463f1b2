//! `colo run`, or `colo primary` with `colo secondary`, in a topology: configuration files, start, kill.
//!
//! Invariants: nothing of a run survives the value; the secondary is started first to listen, and a pair is
//! handed out only when its primary says it is protected.
//!
//! Does not link any of colo's own code: it uses the command as a user would.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::load::{self, ports};
use crate::netns::NetError;
use crate::process::{Process, ProcessError};
use crate::topology::{GUEST_MAC, GUEST_V4, GUEST_V6, Host, TAP, Topology, UPLINK, Uplink};

/// Longest time for a guest to boot and answer.
const BOOT_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time until a pair is protected.
const PAIR_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time until the survivor of a kill says it is alone.
const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(20);
const LINK_PORT: u16 = 7600;
const ETHERNET_MTU: u32 = 1500;
const POLL_PERIOD: Duration = Duration::from_millis(10);

/// What can go wrong when guests are started.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// The network could not be built.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A process did not do what it should.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// A file could not be written.
    #[error("write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// After both lost each other.
    #[error("no host goes on alone after {TAKEOVER_TIMEOUT:?}")]
    NoWinner,
}

/// What the configuration files say.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The `colo` binary.
    pub colo: PathBuf,
    /// Guest memory.
    pub ram_mib: u32,
    /// Whether it is of huge pages, where the host has reserved enough.
    pub huge_pages: bool,
    /// How the worker waits: `adaptive` or another mode of `[host] poll`.
    pub poll: String,
    /// The mode of AF_XDP (`auto`, `driver`, `generic`) on the uplink; without it, a TAP device.
    pub xdp: Option<String>,
    /// Of the guest's network, and of the switch.
    pub mtu: u32,
    /// Workers, and queue pairs of the guest.
    pub shards: usize,
    /// With which bytes compared frames leave: a mode of `[host] tx`.
    pub tx: String,
    /// Whether the worker times its stages.
    pub stages: bool,
    /// Whether the payload of the secondary's output is compared by digests.
    pub digests: bool,
    /// How long output waits for its counterpart.
    pub compare_deadline_ms: u64,
    /// How long an acknowledgement waits for the secondary.
    pub ack_deadline_ms: u64,
    /// Time between periodic checkpoints; 0 for none.
    pub checkpoint_interval_ms: u64,
    /// What may carry packets between the hosts beside TCP: `auto` or another value of `[replication] packets`.
    pub packets: String,
    /// What a host does that lost its peer: `continue` or `block`.
    pub alone: String,
    /// Heartbeats, one every 20 ms, that may be missing before the peer counts as lost.
    pub heartbeat_count: u32,
    /// One in so many checkpoints is audited.
    pub audit_every: u32,
    /// The canary: the primary's comparator says "equal" to everything.
    pub always_equal: bool,
    /// Further lines for the primary's file, such as a `[test]` table.
    pub primary_extra: String,
    /// Further lines for the secondary's file.
    pub secondary_extra: String,
    /// Environment of both processes, by host a and b.
    pub environment: [Vec<(String, String)>; 2],
}

impl Settings {
    /// The usual settings for a `colo` binary.
    pub fn new(colo: impl Into<PathBuf>) -> Self {
        Self {
            colo: colo.into(),
            ram_mib: 128,
            huge_pages: false,
            poll: "adaptive".to_owned(),
            xdp: None,
            mtu: ETHERNET_MTU,
            shards: 1,
            tx: "twin".to_owned(),
            stages: false,
            digests: false,
            compare_deadline_ms: 20,
            ack_deadline_ms: 100,
            checkpoint_interval_ms: 0,
            packets: "auto".to_owned(),
            alone: "continue".to_owned(),
            heartbeat_count: 10,
            audit_every: 0,
            always_equal: false,
            primary_extra: String::new(),
            secondary_extra: String::new(),
            environment: [Vec::new(), Vec::new()],
        }
    }

    /// How the guests reach the switch.
    pub fn uplink(&self) -> Uplink {
        match self.xdp {
            Some(_) => Uplink::Direct,
            None => Uplink::Bridged,
        }
    }

    /// The network that they need.
    pub fn topology(&self) -> Result<Topology, NetError> {
        let topology = Topology::with_queues(self.uplink(), self.shards)?;
        if self.mtu != ETHERNET_MTU {
            topology.set_mtu(self.mtu)?;
        }
        Ok(topology)
    }

    fn nic(&self) -> String {
        match &self.xdp {
            Some(mode) => format!("interface = \"{UPLINK}\"\nxdp = \"{mode}\""),
            None => format!("tap = \"{TAP}\""),
        }
    }

    fn machine(&self, status: &Path) -> String {
        format!(
            "[vm]\nname = \"demo\"\nkernel = \"builtin:demo\"\nram_mib = {}\nhugepages = {}\nvcpus = 1\n\
             cmdline = \"ip={GUEST_V4}/24 ip6={GUEST_V6}/64\"\n\n\
             [net]\n{}\nmac = \"{GUEST_MAC}\"\nmtu = {}\n\n\
             [host]\nshards = {}\npoll = \"{}\"\ntx = \"{}\"\nstages = {}\nstatus = \"{}\"\n",
            self.ram_mib,
            self.huge_pages,
            self.nic(),
            self.mtu,
            self.shards,
            self.poll,
            self.tx,
            self.stages,
            status.display(),
        )
    }

    fn replication(&self, host: Host, dir: &Path) -> String {
        format!(
            "\n[replication]\nlink_listen = \"{}:{LINK_PORT}\"\nlink_peer = \"{}:{LINK_PORT}\"\n\
             arbiter = \"file:{}\"\nheartbeat_ms = 20\nheartbeat_count = {}\n\
             compare_deadline_ms = {}\nack_deadline_ms = {}\ncheckpoint_interval_ms = {}\n\
             alone = \"{}\"\npackets = \"{}\"\n",
            host.link_address(),
            host.other().link_address(),
            dir.join("generation").display(),
            self.heartbeat_count,
            self.compare_deadline_ms,
            self.ack_deadline_ms,
            self.checkpoint_interval_ms,
            self.alone,
            self.packets,
        )
    }

    /// Writes the configuration of a single guest, and gives its path.
    pub fn run_file(&self, dir: &Path) -> Result<PathBuf, PairError> {
        let file = dir.join("run.toml");
        let text = self.machine(&status_socket(Host::A, dir)) + &self.primary_extra;
        write_file(&file, &text)?;
        Ok(file)
    }

    /// The configuration of one host of a pair.
    pub fn pair_file(&self, host: Host, dir: &Path) -> String {
        let mut text = self.machine(&status_socket(host, dir));
        text += &self.replication(host, dir);
        let extra = match host {
            Host::A => &self.primary_extra,
            Host::B => &self.secondary_extra,
        };
        if self.always_equal && host == Host::A {
            text += "\n[test]\nalways_equal = true\n";
        }
        // Writing to a string does not fail.
        write!(text, "\n{extra}").ok();
        if self.audit_every > 0 && !extra.contains("[checkpoint]") {
            text += &format!("\n[checkpoint]\naudit_every = {}\n", self.audit_every);
        }
        if self.digests {
            text += "\n[compare]\nmode = \"digest\"\n";
        }
        text
    }
}

/// One guest under `colo run`, on host a.
#[derive(Debug)]
pub struct Single {
    /// The process.
    pub process: Process,
    /// Where it runs.
    pub topology: Topology,
}

impl Single {
    /// Starts it and waits until its services answer. Files go to `dir`.
    pub fn start(settings: &Settings, dir: &Path) -> Result<Self, PairError> {
        Self::start_in(settings.topology()?, settings, dir, &[])
    }

    /// The same, in a topology that exists and with more arguments behind the configuration.
    pub fn start_in(
        topology: Topology,
        settings: &Settings,
        dir: &Path,
        arguments: &[&str],
    ) -> Result<Self, PairError> {
        let file = settings.run_file(dir)?;
        let socket = status_socket(Host::A, dir);
        let mut command = topology.host(Host::A).command(&settings.colo);
        command.arg("run").arg(&file).args(arguments);
        let process = Process::spawn("run", command, dir)?.with_status(&socket);
        let mut single = Self { process, topology };
        wait_for_services(&single.topology, &mut single.process)?;
        Ok(single)
    }
}

/// Two guests in lockstep: the primary on host a, the secondary on host b.
#[derive(Debug)]
pub struct Pair {
    /// The process on host a.
    pub primary: Process,
    /// The process on host b.
    pub secondary: Process,
    /// Where they run.
    pub topology: Topology,
    settings: Settings,
    dir: PathBuf,
}

impl Pair {
    /// Starts both and waits until the primary's services answer and it says it is protected.
    pub fn start(settings: &Settings, dir: &Path) -> Result<Self, PairError> {
        Self::start_in(settings.topology()?, settings, dir)
    }

    /// The same, in a topology that exists.
    pub fn start_in(
        topology: Topology,
        settings: &Settings,
        dir: &Path,
    ) -> Result<Self, PairError> {
        let mut primary = start_host(&topology, Host::A, settings, dir)?;
        wait_for_services(&topology, &mut primary)?;
        let secondary = start_host(&topology, Host::B, settings, dir)?;
        let settings = settings.clone();
        let dir = dir.to_owned();
        let mut pair = Self {
            primary,
            secondary,
            topology,
            settings,
            dir,
        };
        pair.wait_protected(Host::A)?;
        Ok(pair)
    }

    /// The process of a host.
    pub fn process(&mut self, host: Host) -> &mut Process {
        match host {
            Host::A => &mut self.primary,
            Host::B => &mut self.secondary,
        }
    }

    /// Waits until a host says it is protected, and gives its status.
    pub fn wait_protected(&mut self, host: Host) -> Result<Value, PairError> {
        let protected = |status: &Value| status["protected"] == true;
        let waited = self
            .process(host)
            .wait_status("protected", PAIR_TIMEOUT, protected);
        let other = self.process(host.other());
        // A peer that ended is the better explanation.
        match (waited, other.poll_exit()?) {
            (Ok(status), _) => Ok(status),
            (Err(_), Some(status)) => Err(other.ended(status, "paired").into()),
            (Err(error), None) => Err(error.into()),
        }
    }

    /// Waits until a host says it goes on alone, and gives its status.
    pub fn wait_alone(&mut self, host: Host) -> Result<Value, PairError> {
        let alone = |status: &Value| status["state"] == "alone";
        Ok(self
            .process(host)
            .wait_status("alone", TAKEOVER_TIMEOUT, alone)?)
    }

    /// Waits until one host goes on alone and the process of the other has ended. Gives the host that goes
    /// on, and how the other ended.
    pub fn wait_winner(&mut self) -> Result<(Host, ExitStatus), PairError> {
        let begun = Instant::now();
        let alone = |process: &Process| process.status().is_ok_and(|s| s["state"] == "alone");
        let winner = loop {
            let both = [(Host::A, &self.primary), (Host::B, &self.secondary)];
            if let Some((host, _)) = both.into_iter().find(|(_, process)| alone(process)) {
                break host;
            }
            if begun.elapsed() > TAKEOVER_TIMEOUT {
                return Err(PairError::NoWinner);
            }
            thread::sleep(POLL_PERIOD);
        };
        let other = self.process(winner.other());
        Ok((winner, other.wait_exit(TAKEOVER_TIMEOUT)?))
    }

    /// Starts `colo secondary` (or `colo primary`) again on a host whose process has ended.
    pub fn restart(&mut self, host: Host, role: &str) -> Result<(), PairError> {
        let settings = self.settings.clone();
        let started = start_role(&self.topology, host, role, &settings, &self.dir)?;
        *self.process(host) = started;
        Ok(())
    }
}

fn start_host(
    topology: &Topology,
    host: Host,
    settings: &Settings,
    dir: &Path,
) -> Result<Process, PairError> {
    let role = if host == Host::A {
        "primary"
    } else {
        "secondary"
    };
    start_role(topology, host, role, settings, dir)
}

fn start_role(
    topology: &Topology,
    host: Host,
    role: &str,
    settings: &Settings,
    dir: &Path,
) -> Result<Process, PairError> {
    let letter = if host == Host::A { "a" } else { "b" };
    let file = dir.join(format!("{letter}.toml"));
    write_file(&file, &settings.pair_file(host, dir))?;
    let mut command = topology.host(host).command(&settings.colo);
    command.arg(role).arg(&file);
    let environment = &settings.environment[usize::from(host == Host::B)];
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    let name = format!("{letter}-{role}");
    Ok(Process::spawn(&name, command, dir)?.with_status(&status_socket(host, dir)))
}

/// Where a host's status document is.
pub fn status_socket(host: Host, dir: &Path) -> PathBuf {
    dir.join(if host == Host::A { "a.sock" } else { "b.sock" })
}

fn write_file(path: &Path, text: &str) -> Result<(), PairError> {
    fs::write(path, text).map_err(|source| PairError::Write {
        path: path.to_owned(),
        source,
    })
}

/// Waits until the guest's services answer; an end of the process is the better explanation when they do
/// not.
fn wait_for_services(topology: &Topology, process: &mut Process) -> Result<(), PairError> {
    for port in [ports::HTTP, ports::RESP, ports::ECHO] {
        let target = (GUEST_V4, port).into();
        let waited = load::wait_for_guest(&topology.client, target, BOOT_TIMEOUT, || {
            matches!(process.poll_exit(), Ok(None))
        });
        let Err(error) = waited else { continue };
        return match process.poll_exit()? {
            Some(status) => Err(process.ended(status, "serving").into()),
            None => Err(error.into()),
        };
    }
    Ok(())
}
