//! What two machines must have in common to take each other's state (rule 22): names and values.
//!
//! Does not compare; who does says what differs.

use colo_control::{Geometry, NOTHING};

use crate::config::Config;

/// What both hosts of a pair must agree on: that of the machine, and what snapshots need not have. Whoever takes over must
/// judge as the primary did, have room for what it held, and tell the guest the same.
pub fn pair_geometry(config: &Config, shards: usize) -> Geometry {
    let mut pairs = geometry(config, shards);
    let mut name = |name: &str, value: String| pairs.push((name.to_owned(), value));
    let policy = config.compare.fingerprint.clone();
    name(
        "compare.policy",
        policy.unwrap_or_else(|| NOTHING.to_owned()),
    );
    let checksum = config.net.guest_checksum;
    name(
        "net.guest_checksum",
        if checksum { "true" } else { NOTHING }.to_owned(),
    );
    name("host.frame_slots", config.host.frame_slots.to_string());
    let hold_frames = config.replication.as_ref().map(|r| r.hold_frames);
    name(
        "replication.hold_frames",
        hold_frames.map_or_else(|| NOTHING.to_owned(), |n| n.to_string()),
    );
    pairs
}

/// Of a machine with so many packet workers, on this host.
pub fn geometry(config: &Config, shards: usize) -> Vec<(String, String)> {
    let (vm, net) = (&config.vm, &config.net);
    let mac = net.mac.map(|b| format!("{b:02x}")).join(":");
    let pairs = [
        ("vm.ram_mib", vm.ram_mib.to_string()),
        ("vm.vcpus", vm.vcpus.to_string()),
        ("net.mac", mac),
        ("net.mtu", net.mtu.to_string()),
        ("host.shards", shards.to_string()),
        ("host.cpuid", cpuid_digest()),
    ];
    pairs
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

/// A checksum of the CPUID that guests see here, without what differs between CPUs of one host.
fn cpuid_digest() -> String {
    let table = kvm_ioctls::Kvm::new()
        .and_then(|kvm| kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES));
    let Ok(table) = table else {
        return "unknown".to_owned();
    };
    let mut hash = crc32fast::Hasher::new();
    for entry in table
        .as_slice()
        .iter()
        .filter(|e| !matches!(e.function, 0xb | 0x1f))
    {
        let ebx = if entry.function == 1 {
            entry.ebx & 0x00ff_ffff
        } else {
            entry.ebx
        };
        for word in [
            entry.function,
            entry.index,
            entry.eax,
            ebx,
            entry.ecx,
            entry.edx,
        ] {
            hash.update(&word.to_le_bytes());
        }
    }
    format!("{:08x}", hash.finalize())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn rule_22_what_decides_about_frames_is_part_of_a_pairs_geometry() {
        let of = |net: &str, host: &str, pair: &str| {
            let text = format!(
                r#"
                [vm]
                name = "test"
                kernel = "none"
                ram_mib = 8
                [net]
                tap = "none"
                mac = "52:54:00:c0:10:01"
                {net}
                [host]
                {host}
                [replication]
                link_listen = "10.78.0.1:7600"
                link_peer = "10.78.0.2:7600"
                arbiter = "file:generation"
                {pair}
                "#
            );
            let config = Config::parse(Path::new("test.toml"), &text).unwrap();
            pair_geometry(&config, 1)
        };
        let plain = of("", "", "");
        for (other, name) in [
            (of("guest_checksum = true", "", ""), "net.guest_checksum"),
            (of("", "frame_slots = 4096", ""), "host.frame_slots"),
            (of("", "", "hold_frames = 100"), "replication.hold_frames"),
        ] {
            let differ = plain.iter().zip(&other).filter(|(a, b)| a != b);
            let names: Vec<_> = differ.map(|((name, _), _)| name.as_str()).collect();
            assert_eq!(names, [name]);
        }
    }
}
