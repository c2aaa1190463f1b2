//! The configuration file of a virtual machine and its host.
//!
//! Invariants: unknown keys are errors; every error names the file, the field, the value and what to
//! do; paths are relative to the file.
//!
//! Does not touch the host: what exists is found out when it is used.

mod checkpoint;
mod vhost;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use colo_compare::Policy;
use colo_fastpath::Mac;
use colo_fastpath::frame::TxMode;
use colo_fastpath::link::Packets;
use colo_fastpath::nic::XdpNicMode;
use colo_fastpath::pair::FrameParts;
use colo_fastpath::policy::{self, PolicyError};
use colo_fastpath::ring::Pages;
use colo_fastpath::shard::{SHARDS_MAX, crossing_frames};
use colo_fastpath::worker::PollMode;
use serde::{Deserialize, Deserializer};

pub use checkpoint::CheckpointConfig;
pub use vhost::VhostConfig;

/// Prefix of images that are part of the program.
const BUILTIN: &str = "builtin:";
const RAM_MIB_MIN: u64 = 4;
/// What the page tables of a user-mode guest reach.
const RAM_MIB_MAX: u64 = 128 << 10;

/// A configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, an unknown or missing key, or a value of a wrong type.
    #[error("{}: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why, with line and column.
        source: toml::de::Error,
    },
    /// A value that cannot be.
    #[error("{}: {field} = {value}: {advice}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Which field.
        field: &'static str,
        /// What it says.
        value: String,
        /// What to do.
        advice: String,
    },
    /// The policy file cannot be used.
    #[error("{}: compare.policy: {source}", path.display())]
    Policy {
        /// The configuration.
        path: PathBuf,
        /// Which file, and why.
        source: Box<PolicyError>,
    },
    /// The guest image is larger than the RAM it is for.
    #[error("vm.kernel: {} has {bytes} bytes, more than {ram_mib} MiB of RAM", path.display())]
    KernelTooLarge {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// RAM.
        ram_mib: u64,
    },
    /// The guest image cannot be read.
    #[error("vm.kernel: {}: {source}", path.display())]
    Kernel {
        /// The image.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// A whole file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The machine.
    pub vm: VmConfig,
    /// Its network device.
    pub net: NetConfig,
    /// This host.
    #[serde(default)]
    pub host: HostConfig,
    /// The pair; only for `colo primary` and `colo secondary`.
    pub replication: Option<ReplicationConfig>,
    /// How the pair's output is compared.
    #[serde(default)]
    pub compare: CompareConfig,
    /// How checkpoints are taken.
    #[serde(default)]
    pub checkpoint: CheckpointConfig,
    /// Mutations for tests of the tests.
    #[serde(default)]
    pub test: TestConfig,
}

/// What is compared on the primary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CompareMode {
    /// The secondary's bytes.
    #[default]
    Bytes,
    /// Keyed digests of its payload; bytes only where these do not tell enough.
    Digest,
}

/// `[compare]`
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompareConfig {
    /// What the secondary sends of its output; the primary's file decides.
    pub mode: CompareMode,
    /// Rules for single flows: see [`colo_fastpath::policy`].
    pub policy: Option<PathBuf>,
    /// What that file says.
    #[serde(skip)]
    pub rules: Policy,
    /// Names what it says, for the other host: see [`policy::fingerprint`].
    #[serde(skip)]
    pub fingerprint: Option<String>,
}

/// `[test]`: breaks the protection on purpose, so that a test can show that it would notice.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TestConfig {
    /// The comparator finds everything equal.
    pub always_equal: bool,
}

/// `[vm]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// For logs and reports.
    pub name: String,
    /// Guest image: a file, or `builtin:NAME`.
    pub kernel: String,
    /// RAM.
    pub ram_mib: u64,
    /// vCPUs.
    #[serde(default = "one")]
    pub vcpus: u8,
    /// Appended to the guest's command line.
    #[serde(default)]
    pub cmdline: String,
    /// Back RAM with 2 MiB pages if the host has reserved enough.
    #[serde(default)]
    pub hugepages: bool,
}

/// `[net]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// TAP device; made if it does not exist. Either this or `interface`.
    pub tap: Option<String>,
    /// Interface that the guest and this host share over AF_XDP.
    pub interface: Option<String>,
    /// How AF_XDP is used.
    #[serde(default)]
    pub xdp: XdpNicMode,
    /// The guest's address.
    #[serde(deserialize_with = "mac")]
    pub mac: Mac,
    /// Largest payload of a frame.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
    /// Verify the checksums of what the guest receives, and tell it which hold.
    #[serde(default)]
    pub guest_checksum: bool,
    /// The guest is behind this vhost-user socket; only for `colo vhost`.
    pub vhost_user: Option<PathBuf>,
}

/// `[host]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostConfig {
    /// How the worker waits.
    pub poll: PollMode,
    /// Packet workers, each with a queue pair of the guest's.
    pub shards: usize,
    /// The CPUs that the workers are pinned to: one for each, or none. In a file one CPU may be a plain number.
    #[serde(deserialize_with = "cpus")]
    pub cpu: Vec<usize>,
    /// Unix socket for `colo status`.
    pub status: Option<PathBuf>,
    /// Frames that a worker has room for, in flight, held and kept, 2048 bytes each with the usual MTU.
    pub frame_slots: u32,
    /// With which bytes frames leave that were compared where they lay.
    pub tx: TxMode,
    /// Take the times of the stages of the packet path; two reads of the clock a frame.
    pub stages: bool,
}

impl HostConfig {
    /// The CPU that a worker is pinned to.
    pub fn cpu_of(&self, shard: usize) -> Option<usize> {
        self.cpu.get(shard).copied()
    }
}

/// One number, or a list of them.
fn cpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    #[derive(Deserialize)]
    #[serde(
        untagged,
        expecting = "expected the number of a CPU, or a list of them"
    )]
    enum Cpus {
        One(usize),
        Each(Vec<usize>),
    }
    Ok(match Cpus::deserialize(deserializer)? {
        Cpus::One(cpu) => vec![cpu],
        Cpus::Each(cpus) => cpus,
    })
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            poll: PollMode::default(),
            shards: 1,
            cpu: Vec::new(),
            status: None,
            frame_slots: 16_384,
            tx: TxMode::default(),
            stages: false,
        }
    }
}

/// What a primary does without a secondary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Alone {
    /// Go on, unprotected, once the arbiter agrees.
    #[default]
    Continue,
    /// Hold all output until a secondary is there.
    Block,
}

/// How output is protected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Output is compared; checkpoints on divergence.
    #[default]
    Colo,
    /// The secondary's VM stands still; output waits for periodic checkpoints.
    Remus,
}

impl From<Mode> for colo_control::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Colo => Self::Colo,
            Mode::Remus => Self::Remus,
        }
    }
}

/// `[replication]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicationConfig {
    /// Where this host accepts its peer.
    pub link_listen: SocketAddr,
    /// Where the peer accepts.
    pub link_peer: SocketAddr,
    /// `file:PATH`.
    pub arbiter: String,
    /// Interval of heartbeats.
    #[serde(default = "default_heartbeat_ms")]
    pub heartbeat_ms: u64,
    /// Heartbeats missed until the peer counts as lost.
    #[serde(default = "default_heartbeat_count")]
    pub heartbeat_count: u32,
    /// How long output waits for its counterpart.
    #[serde(default = "default_compare_deadline_ms")]
    pub compare_deadline_ms: u64,
    /// How long an acknowledgement waits for the secondary (rule 6).
    #[serde(default = "default_ack_deadline_ms")]
    pub ack_deadline_ms: u64,
    /// Interval of periodic checkpoints; 0: none.
    #[serde(default)]
    pub checkpoint_interval_ms: u64,
    /// How output is protected.
    #[serde(default)]
    pub mode: Mode,
    /// Interval of checkpoints in Remus mode.
    #[serde(default = "default_remus_interval_ms")]
    pub remus_interval_ms: u64,
    /// More checkpoints on divergence than that lead to Remus mode for a while (rule 21); 0: never.
    #[serde(default = "default_storm_checkpoints_per_s")]
    pub storm_checkpoints_per_s: u64,
    /// Over how long that rate is measured.
    #[serde(default = "default_storm_window_ms")]
    pub storm_window_ms: u64,
    /// What a primary does without a secondary.
    #[serde(default)]
    pub alone: Alone,
    /// Frames that may be held, by each shard; 0: as many as the pool has room for.
    #[serde(default)]
    pub hold_frames: u32,
    /// What may carry mirrored input and SVM output beside TCP.
    #[serde(default)]
    pub packets: Packets,
}

const fn one() -> u8 {
    1
}
const fn default_mtu() -> u16 {
    1500
}
const fn default_heartbeat_ms() -> u64 {
    20
}
const fn default_heartbeat_count() -> u32 {
    10
}
const fn default_compare_deadline_ms() -> u64 {
    20
}
const fn default_ack_deadline_ms() -> u64 {
    100
}
const fn default_remus_interval_ms() -> u64 {
    50
}
/// A checkpoint takes a few milliseconds: at such a rate pairs do little else, while below it most output still leaves by
/// comparison at once.
const fn default_storm_checkpoints_per_s() -> u64 {
    400
}
const fn default_storm_window_ms() -> u64 {
    5000
}

/// Where the guest image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// In a file.
    File(PathBuf),
    /// In the program, by this name.
    Builtin(String),
}

impl VmConfig {
    /// The guest image.
    pub fn kernel(&self) -> Kernel {
        match self.kernel.strip_prefix(BUILTIN) {
            Some(name) => Kernel::Builtin(name.to_owned()),
            None => Kernel::File(PathBuf::from(&self.kernel)),
        }
    }

    /// What backs RAM.
    pub fn pages(&self) -> Pages {
        if self.hugepages {
            Pages::HugeIfReserved
        } else {
            Pages::Small
        }
    }

    /// Reads an image file, if it can fit.
    pub fn read_kernel(&self, path: &Path) -> Result<Vec<u8>, ConfigError> {
        let failed = |source| ConfigError::Kernel {
            path: path.to_owned(),
            source,
        };
        let bytes = std::fs::metadata(path).map_err(failed)?.len();
        if bytes > self.ram_mib << 20 {
            let path = path.to_owned();
            return Err(ConfigError::KernelTooLarge {
                path,
                bytes,
                ram_mib: self.ram_mib,
            });
        }
        std::fs::read(path).map_err(failed)
    }
}

impl CompareConfig {
    fn read(&mut self, path: &Path, base: &Path) -> Result<(), ConfigError> {
        if let Some(file) = &mut self.policy {
            *file = base.join(&*file);
            let refused = |source| ConfigError::Policy {
                path: path.to_owned(),
                source: Box::new(source),
            };
            self.rules = policy::read(file).map_err(refused)?;
            self.fingerprint = Some(policy::fingerprint(file).map_err(refused)?);
        }
        Ok(())
    }
}

impl Config {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(path, &text_of(path)?)
    }

    /// Checks the text of a file; `path` is for errors and relative paths.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let mut config: Self = fields_of(path, text)?;
        let base = path.parent().unwrap_or(Path::new(""));
        if let Kernel::File(file) = config.vm.kernel() {
            config.vm.kernel = base.join(file).to_string_lossy().into_owned();
        }
        config.host.status = config.host.status.map(|status| base.join(status));
        config.compare.read(path, base)?;
        let check = Check { path };
        check.vm(&config.vm)?;
        check.net(&config.net)?;
        check.own_guest(&config.net)?;
        check.host(&config.host)?;
        check.checkpoint(&config.checkpoint)?;
        if let Some(replication) = &config.replication {
            check.replication(replication, &config.host)?;
        }
        Ok(config)
    }
}

/// Reads a file.
fn text_of(path: &Path) -> Result<String, ConfigError> {
    let path_is = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    std::fs::read_to_string(path).map_err(path_is)
}

/// What the text of a file says, unchecked.
fn fields_of<T: serde::de::DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|source| ConfigError::Parse {
        path: path.to_owned(),
        source,
    })
}

struct Check<'a> {
    path: &'a Path,
}

impl Check<'_> {
    fn vm(&self, vm: &VmConfig) -> Result<(), ConfigError> {
        self.that(
            !vm.name.is_empty(),
            "vm.name",
            &vm.name,
            "give the machine a name",
        )?;
        self.that(
            !vm.kernel.is_empty(),
            "vm.kernel",
            &vm.kernel,
            "name an image file",
        )?;
        let fits = (RAM_MIB_MIN..=RAM_MIB_MAX).contains(&vm.ram_mib);
        self.that(
            fits,
            "vm.ram_mib",
            vm.ram_mib,
            "choose between 4 and 131072",
        )?;
        let advice = "a user-mode guest has exactly 1 vCPU";
        self.that(vm.vcpus == 1, "vm.vcpus", vm.vcpus, advice)?;
        let plain = vm
            .cmdline
            .bytes()
            .all(|b| b.is_ascii_graphic() || b == b' ');
        self.that(
            plain,
            "vm.cmdline",
            &vm.cmdline,
            "use printable ASCII on one line",
        )
    }

    fn net(&self, net: &NetConfig) -> Result<(), ConfigError> {
        let (field, name) = match (&net.tap, &net.interface) {
            (Some(tap), None) => ("net.tap", tap.as_str()),
            (None, Some(interface)) => ("net.interface", interface.as_str()),
            (Some(_), Some(name)) => {
                let advice = "there is net.tap as well; choose one of them";
                return self.that(false, "net.interface", name, advice);
            }
            (None, None) => {
                let advice = "name a TAP device, or an interface for AF_XDP as net.interface";
                return self.that(false, "net.tap", "none", advice);
            }
        };
        let good = !name.is_empty() && name.len() < 16;
        self.that(
            good,
            field,
            name,
            "an interface name has 1 to 15 characters",
        )?;
        let unicast = net.mac[0] & 1 == 0 && net.mac != [0; 6];
        let advice = "the guest needs a unicast address (even first byte, not all zero)";
        self.that(unicast, "net.mac", format!("{:02x?}", net.mac), advice)?;
        // 1280 is what IPv6 asks for, 68 what IPv4 can live with.
        self.that(
            (68..=9216).contains(&net.mtu),
            "net.mtu",
            net.mtu,
            "choose between 68 and 9216",
        )
    }

    /// The guest is this file's machine.
    fn own_guest(&self, net: &NetConfig) -> Result<(), ConfigError> {
        let socket = net.vhost_user.as_deref().unwrap_or(Path::new(""));
        let advice = "leave it out, or start `colo vhost` with a file without [vm]";
        let none = net.vhost_user.is_none();
        self.that(none, "net.vhost_user", socket.display(), advice)
    }

    fn host(&self, host: &HostConfig) -> Result<(), ConfigError> {
        let cpus = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .max(host_cpus());
        let good = (1..=SHARDS_MAX).contains(&host.shards);
        self.that(good, "host.shards", host.shards, "choose between 1 and 8")?;
        let missing = host.cpu.iter().find(|&&cpu| cpu >= cpus);
        self.that(
            missing.is_none(),
            "host.cpu",
            missing.unwrap_or(&0),
            "this host has no such CPU; they count from 0",
        )?;
        let named = [0, host.shards].contains(&host.cpu.len());
        let advice = "name one CPU for each of host.shards, or none";
        self.that(named, "host.cpu", format!("{:?}", host.cpu), advice)?;
        let good = (64..=1 << 20).contains(&host.frame_slots);
        self.that(
            good,
            "host.frame_slots",
            host.frame_slots,
            "choose between 64 and 1048576",
        )
    }

    fn replication(&self, r: &ReplicationConfig, host: &HostConfig) -> Result<(), ConfigError> {
        let at_least_one = "must be at least 1";
        self.that(
            r.heartbeat_ms > 0,
            "replication.heartbeat_ms",
            r.heartbeat_ms,
            at_least_one,
        )?;
        let count = r.heartbeat_count;
        self.that(
            count > 0,
            "replication.heartbeat_count",
            count,
            at_least_one,
        )?;
        let deadline = r.compare_deadline_ms;
        self.that(
            deadline > 0,
            "replication.compare_deadline_ms",
            deadline,
            at_least_one,
        )?;
        let advice = "must exceed the guest's delayed ACK of 40 ms (rule 6)";
        let deadline = r.ack_deadline_ms;
        self.that(
            deadline > 40,
            "replication.ack_deadline_ms",
            deadline,
            advice,
        )?;
        let (interval, window) = (r.remus_interval_ms, r.storm_window_ms);
        self.that(
            interval > 0,
            "replication.remus_interval_ms",
            interval,
            at_least_one,
        )?;
        self.that(
            window > 0,
            "replication.storm_window_ms",
            window,
            at_least_one,
        )?;
        // What a host listens at is its name at the arbiter (rule 18).
        for (field, address) in [
            ("replication.link_listen", r.link_listen),
            ("replication.link_peer", r.link_peer),
        ] {
            let specified = !address.ip().to_canonical().is_unspecified();
            let advice = "name an address of that host alone, which the other one reaches";
            self.that(specified, field, address, advice)?;
        }
        let other = r.link_listen != r.link_peer;
        let advice = "must be the other host's address, not link_listen";
        self.that(other, "replication.link_peer", r.link_peer, advice)?;
        let file = r
            .arbiter
            .strip_prefix("file:")
            .is_some_and(|path| !path.is_empty());
        let advice = "write \"file:\" and a path that both hosts reach";
        self.that(file, "replication.arbiter", &r.arbiter, advice)?;
        let advice = format!("a pair needs at least {}", FrameParts::SLOTS_MIN);
        let enough = host.frame_slots >= FrameParts::SLOTS_MIN;
        self.that(enough, "host.frame_slots", host.frame_slots, advice)?;
        let most = FrameParts::of(host.frame_slots, crossing_frames(host.shards)).each;
        let fits = r.hold_frames as usize <= most;
        let advice = format!("host.frame_slots leaves room for {most} at most");
        self.that(fits, "replication.hold_frames", r.hold_frames, advice)
    }

    fn that(
        &self,
        good: bool,
        field: &'static str,
        value: impl ToString,
        advice: impl Into<String>,
    ) -> Result<(), ConfigError> {
        if good {
            return Ok(());
        }
        let path = self.path.to_owned();
        Err(ConfigError::Value {
            path,
            field,
            value: value.to_string(),
            advice: advice.into(),
        })
    }
}

/// CPUs of the host, whatever this process may use.
fn host_cpus() -> usize {
    // SAFETY: sysconf takes no pointers.
    let count = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_CONF) };
    usize::try_from(count).unwrap_or(1)
}

fn mac<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Mac, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_mac(&text).ok_or_else(|| {
        serde::de::Error::custom(format!("\"{text}\" is not like \"52:54:00:c0:10:01\""))
    })
}

fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = Mac::default();
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
