//! Images that boot and images that must not.

use colo_fastpath::ring::Pages;

use super::*;
use crate::machine::tests::elf_image;

fn ram() -> GuestRam {
    GuestRam::new(8 << 20, Pages::Small).unwrap()
}

fn refused(image: &[u8]) -> String {
    load(&ram(), image, "").unwrap_err().to_string()
}

fn patched(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = elf_image(&[0x90; 64]);
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

#[test]
fn a_good_image_is_loaded_with_its_start_info() {
    let ram = ram();
    let entry = load(&ram, &elf_image(b"code"), "a=b c").unwrap();
    assert_eq!(
        (entry.rip, entry.rsp, entry.rdi),
        (2 << 20, 8 << 20, START_INFO)
    );
    let mut code = [0; 4];
    ram.read(2 << 20, &mut code).unwrap();
    assert_eq!(&code, b"code");
    let mut info = [0; 56];
    ram.read(entry.rdi, &mut info).unwrap();
    assert_eq!(info[..8], [0x78, 0xc5, 0x6e, 0x33, 1, 0, 0, 0]);
    let cmdline = u64::from_le_bytes(info[24..32].try_into().unwrap());
    let mut text = [0xff; 6];
    ram.read(cmdline, &mut text).unwrap();
    assert_eq!(&text, b"a=b c\0");
}

#[test]
fn bad_images_are_named() {
    assert!(refused(b"").contains("not an ELF"));
    assert!(refused(b"#!/bin/sh\necho hello to all of you out there\n").contains("not an ELF"));
    assert!(refused(&elf_image(b"x")[..100]).contains("ELF"));
    assert!(refused(&patched(4, &[1])).contains("ELF"), "32-bit");
    assert!(refused(&patched(18, &[40])).contains("another processor"));
    assert!(refused(&patched(16, &[3])).contains("relocatable or dynamic"));
    assert!(refused(&patched(24, &0x50_0000_u64.to_le_bytes())).contains("entry point 0x500000"));
    for (at, value) in [
        (88, 0x1000_u64),
        (88, 8 << 20),
        (88, u64::MAX),
        (104, u64::MAX),
    ] {
        let text = refused(&patched(at, &value.to_le_bytes()));
        assert!(text.contains("must lie in 0x100000..0x7c0000"), "{text}");
    }
    assert!(refused(&patched(64, &[4])).contains("no loadable segment"));
    assert!(refused(&patched(64, &[3])).contains("dynamically linked"));
    let file_beyond_end = patched(72, &u64::MAX.to_le_bytes());
    assert!(refused(&file_beyond_end).contains("ELF"));
}

#[test]
fn long_command_lines_and_small_machines_are_refused() {
    let image = elf_image(b"x");
    assert!(matches!(
        load(&ram(), &image, &"x".repeat(4096)),
        Err(BootError::CommandLine(4096))
    ));
    let small = GuestRam::new(2 << 20, Pages::Small).unwrap();
    assert!(matches!(
        load(&small, &image, ""),
        Err(BootError::RamTooSmall)
    ));
}
