//! Whether the values of a file make sense, one by one and together.

use std::ops::RangeInclusive;
use std::path::Path;

use colo_fastpath::nic::XdpNicMode;
use colo_fastpath::shard::SHARDS_MAX;

use super::{ConfigError, HostConfig, NetConfig, VmConfig};

const RAM_MIB_MIN: u64 = 4;
/// What the page tables of a user-mode guest reach.
const RAM_MIB_MAX: u64 = 128 << 10;

/// A file whose values are checked: errors name it.
pub(super) struct Check<'a> {
    pub(super) path: &'a Path,
}

impl Check<'_> {
    pub(super) fn vm(&self, vm: &VmConfig) -> Result<(), ConfigError> {
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

    pub(super) fn net(&self, net: &NetConfig) -> Result<(), ConfigError> {
        let (field, name) = match (&net.tap, &net.interface) {
            (Some(_), None) if net.xdp != XdpNicMode::Auto => {
                let advice = "a TAP device has no such modes; name an interface as net.interface, or leave it out";
                let mode = toml::Value::try_from(net.xdp).map(|mode| mode.to_string());
                return self.that(false, "net.xdp", mode.unwrap_or_default(), advice);
            }
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
    pub(super) fn own_guest(&self, net: &NetConfig) -> Result<(), ConfigError> {
        let socket = net.vhost_user.as_deref().unwrap_or(Path::new(""));
        let advice = "leave it out, or start `colo vhost` with a file without [vm]";
        let none = net.vhost_user.is_none();
        self.that(none, "net.vhost_user", socket.display(), advice)
    }

    pub(super) fn host(&self, host: &HostConfig) -> Result<(), ConfigError> {
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

    /// A number from these.
    pub(super) fn within(
        &self,
        range: RangeInclusive<u64>,
        field: &'static str,
        value: u64,
    ) -> Result<(), ConfigError> {
        let advice = format!("must be from {} to {}", range.start(), range.end());
        self.that(range.contains(&value), field, value, advice)
    }

    pub(super) fn that(
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
