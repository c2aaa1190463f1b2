//! What two machines must have in common to take each other's state (rule 22): names and values.
//!
//! Does not compare; who does says what differs.

use crate::config::Config;

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
