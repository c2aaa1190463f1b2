//! The configuration file of a virtual machine and its host.
//!
//! Invariants: unknown keys are errors; every error names the file, the field, the value and what to
//! do; paths are relative to the file.
//!
//! Does not touch the host: what exists is found out when it is used.

mod check;
mod checkpoint;
mod replication;
mod vhost;

use std::path::{Path, PathBuf};

use colo_compare::Policy;
use colo_fastpath::Mac;
use colo_fastpath::frame::TxMode;
use colo_fastpath::nic::XdpNicMode;
use colo_fastpath::policy::{self, PolicyError};
use colo_fastpath::ring::Pages;
use colo_fastpath::worker::PollMode;
use serde::{Deserialize, Deserializer};

use check::Check;
pub use checkpoint::CheckpointConfig;
pub use replication::{Alone, Mode, ReplicationConfig};
pub use vhost::VhostConfig;

/// Prefix of images that are part of the program.
const BUILTIN: &str = "builtin:";

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
    /// Names what it says, for the other host: see [`policy::Named`].
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
    /// How the worker waits. Adaptive by default, however many cores there are: whether one is set apart for a worker
    /// that never sleeps only the administrator knows.
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

const fn one() -> u8 {
    1
}
const fn default_mtu() -> u16 {
    1500
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
            let said = policy::read(file).map_err(refused)?;
            (self.rules, self.fingerprint) = (said.policy, Some(said.fingerprint));
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
        if let Some(replication) = &mut config.replication {
            replication.find_arbiter(base);
        }
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
