//! The guest of `qemu-migration`: a multiboot image of some sixty bytes that writes one word to each of so many pages,
//! over and over.
//!
//! Invariants: it writes no other page; what it writes is never all zeroes, so that QEMU sends each page as it is.

/// The first page that it writes; the image and QEMU's own tables are below.
pub(crate) const FIRST_BYTE: u32 = 4 << 20;
const LOAD_ADDRESS: u32 = 1 << 20;
/// Multiboot specification 0.6.96, section 3.1.1.
const MAGIC: u32 = 0x1bad_b002;
/// Bit 16: the addresses in the header count, for the image is no ELF file.
const FLAGS: u32 = 1 << 16;
const HEADER_BYTES: u32 = 32;

/// The image for so many pages. It is entered in 32-bit protected mode with flat segments, paging off, interrupts off.
pub(crate) fn image(pages: u32) -> Vec<u8> {
    let mut code: Vec<u8> = vec![0x31, 0xdb]; // xor ebx, ebx
    let pass = code.len();
    code.extend([0x83, 0xcb, 0x01]); // or ebx, 1: never zero
    code.push(0xbf); // mov edi, FIRST_BYTE
    code.extend(FIRST_BYTE.to_le_bytes());
    code.push(0xb9); // mov ecx, pages
    code.extend(pages.to_le_bytes());
    let page = code.len();
    code.extend([0x89, 0x1f]); // mov [edi], ebx
    code.extend([0x81, 0xc7]); // add edi, 4096
    code.extend(4096_u32.to_le_bytes());
    code.push(0x49); // dec ecx
    code.push(0x75); // jnz page
    code.push(back(code.len(), page));
    code.extend([0x83, 0xc3, 0x02]); // add ebx, 2
    code.push(0xeb); // jmp pass
    code.push(back(code.len(), pass));
    let end = LOAD_ADDRESS + HEADER_BYTES + code.len() as u32;
    let header = [
        MAGIC,
        FLAGS,
        0_u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS),
        LOAD_ADDRESS,
        LOAD_ADDRESS,
        end,
        end,
        LOAD_ADDRESS + HEADER_BYTES,
    ];
    let mut image: Vec<u8> = header.into_iter().flat_map(u32::to_le_bytes).collect();
    image.extend(code);
    image
}

/// Memory that it needs.
pub(crate) fn ram_mib(pages: u32) -> u32 {
    64 + pages.div_ceil(256)
}

/// The operand, at `at`, of a short jump back to `target`; it counts from behind the operand.
fn back(at: usize, target: usize) -> u8 {
    (target as isize - (at as isize + 1)) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_sums_to_zero_and_jumps_lead_to_instructions() {
        let image = image(0x1234);
        let word =
            |index: usize| u32::from_le_bytes(image[4 * index..4 * index + 4].try_into().unwrap());
        assert_eq!(word(0).wrapping_add(word(1)).wrapping_add(word(2)), 0);
        assert_eq!(word(5) - word(3), image.len() as u32);
        let code = &image[HEADER_BYTES as usize..];
        assert_eq!(code[11..15], 0x1234_u32.to_le_bytes());
        // Where the two jumps lead: to the write, and to the begin of a pass.
        let target = |at: usize| (at as isize + 1 + code[at] as i8 as isize) as usize;
        let inner = code.iter().position(|&byte| byte == 0x75).unwrap() + 1;
        assert_eq!(code[target(inner)..target(inner) + 2], [0x89, 0x1f]);
        assert_eq!(code[target(code.len() - 1)..][..2], [0x83, 0xcb]);
    }
}
