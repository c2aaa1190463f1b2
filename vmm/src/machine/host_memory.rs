//! Whether this host has the memory that a guest is to get.
//!
//! Does not set any aside: who takes it meanwhile has it.

use colo_fastpath::ring::Pages;

use super::build::MachineError;

const MEMINFO: &str = "/proc/meminfo";

/// A guest that does not fit is refused here; later the kernel would kill something.
pub(super) fn check(wanted_mib: u64, pages: Pages) -> Result<(), MachineError> {
    let text = std::fs::read_to_string(MEMINFO).unwrap_or_default();
    match free_mib(&text, pages) {
        Some(free_mib) if free_mib < wanted_mib => Err(MachineError::NoMemory {
            wanted_mib,
            free_mib,
        }),
        _ => Ok(()),
    }
}

/// What there is for one guest, as the kernel says. Huge pages are set aside, and are not among what is available; where they
/// do not suffice the guest gets small ones.
fn free_mib(meminfo: &str, pages: Pages) -> Option<u64> {
    let number = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        let value = line.trim_start_matches(':').trim();
        value.trim_end_matches("kB").trim().parse::<u64>().ok()
    };
    let available = number("MemAvailable")? / 1024;
    let huge = || {
        let free = number("HugePages_Free")?;
        let free = free.saturating_sub(number("HugePages_Rsvd")?);
        Some(free * number("Hugepagesize")? / 1024)
    };
    Some(match pages {
        Pages::Small => available,
        Pages::HugeIfReserved => available.max(huge().unwrap_or(0)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str = "\
MemTotal:       24000000 kB
MemFree:          100000 kB
MemAvailable:    1048576 kB
HugePages_Total:    4096
HugePages_Free:     3072
HugePages_Rsvd:     1024
HugePages_Surp:        0
Hugepagesize:       2048 kB
";

    #[test]
    fn reserved_huge_pages_count_for_who_is_to_have_them() {
        assert_eq!(free_mib(MEMINFO, Pages::Small), Some(1024));
        assert_eq!(free_mib(MEMINFO, Pages::HugeIfReserved), Some(4096));
        let few = MEMINFO.replace("3072", "1030");
        assert_eq!(free_mib(&few, Pages::HugeIfReserved), Some(1024));
        let none = MEMINFO.replace("HugePages_Free", "Other");
        assert_eq!(free_mib(&none, Pages::HugeIfReserved), Some(1024));
        // Who cannot be asked refuses nothing.
        assert_eq!(free_mib("", Pages::Small), None);
    }

    #[test]
    fn a_guest_larger_than_the_host_is_refused_by_name() {
        let refused = check(1 << 40, Pages::HugeIfReserved)
            .unwrap_err()
            .to_string();
        assert!(
            refused.starts_with("vm.ram_mib = 1099511627776: only "),
            "{refused}"
        );
        check(4, Pages::Small).unwrap();
    }
}
