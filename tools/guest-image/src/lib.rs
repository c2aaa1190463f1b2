//! The demo guest (`tools/guest`) as bytes: a static ELF64 that the VMM loads as a user-mode guest.
//!
//! `build.rs` builds it with the same cargo and compiler as this crate, always in release mode.

/// The image: ELF64, linked at 2 MiB, entry as ARCHITECTURE.md ("Guest platform") says.
pub static ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/colo-guest.elf"));

#[cfg(test)]
mod tests {
    use super::ELF;

    fn u16_at(at: usize) -> u16 {
        u16::from_le_bytes([ELF[at], ELF[at + 1]])
    }

    fn u64_at(at: usize) -> u64 {
        u64::from_le_bytes(ELF[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_image_is_a_static_elf_at_2_mib() {
        const ET_EXEC: u16 = 2;
        const EM_X86_64: u16 = 62;
        assert_eq!(ELF[..5], *b"\x7fELF\x02");
        assert_eq!((u16_at(16), u16_at(18)), (ET_EXEC, EM_X86_64));
        assert!(u64_at(24) >= 2 << 20, "entry at {:#x}", u64_at(24));
        let (headers_at, count) = (u64_at(32) as usize, usize::from(u16_at(56)));
        for i in 0..count {
            const PT_LOAD: u32 = 1;
            let at = headers_at + i * 56;
            let kind = u32::from_le_bytes(ELF[at..at + 4].try_into().unwrap());
            assert_eq!(
                kind, PT_LOAD,
                "only loadable segments: no interpreter, nothing dynamic"
            );
            assert!(
                u64_at(at + 24) >= 2 << 20,
                "segment at {:#x}",
                u64_at(at + 24)
            );
        }
    }
}
