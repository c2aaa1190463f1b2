//! Classic BPF programs over Ethernet frames.
//!
//! Invariants: jumps are computed from the final layout, never counted by hand across programs.
//!
//! Does not attach anything.

use libc::sock_filter;

/// An Ethernet address.
pub type Mac = [u8; 6];

const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const LOAD_HALF: u16 = (libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// Bytes of an accepted frame that the kernel keeps: all.
const WHOLE: u32 = u32::MAX;

const BROADCAST: Mac = [0xff; 6];

/// Lets nothing through.
pub fn drop_all() -> Vec<sock_filter> {
    vec![statement(RETURN, 0)]
}

/// Lets through what a guest with these addresses needs: its own frames, broadcast, and IPv4 and
/// IPv6 multicast (01:00:5e, 33:33).
pub fn for_guest(macs: &[Mac]) -> Vec<sock_filter> {
    let mut program = Vec::new();
    for mac in macs.iter().chain([&BROADCAST]) {
        push_exact(&mut program, mac);
    }
    push_prefix(&mut program, LOAD_HALF, 0xffff, 0x3333);
    push_prefix(&mut program, LOAD_WORD, 0xffff_ff00, 0x0100_5e00);
    program.push(statement(RETURN, 0));
    program
}

/// Accepts when all six bytes of the destination match, else goes on behind itself.
fn push_exact(program: &mut Vec<sock_filter>, mac: &Mac) {
    let high = u32::from_be_bytes([mac[0], mac[1], mac[2], mac[3]]);
    let low = u32::from(u16::from_be_bytes([mac[4], mac[5]]));
    program.push(statement(LOAD_WORD, 0));
    program.push(jump(JUMP_EQUAL, high, 0, 3));
    program.push(statement(LOAD_HALF, 4));
    program.push(jump(JUMP_EQUAL, low, 0, 1));
    program.push(statement(RETURN, WHOLE));
}

/// Accepts when the masked first bytes match, else goes on behind itself.
fn push_prefix(program: &mut Vec<sock_filter>, load: u16, mask: u32, value: u32) {
    program.push(statement(load, 0));
    program.push(statement(AND, mask));
    program.push(jump(JUMP_EQUAL, value, 0, 1));
    program.push(statement(RETURN, WHOLE));
}

const fn statement(code: u16, k: u32) -> sock_filter {
    jump(code, k, 0, 0)
}

const fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}
