//! Which flow a frame belongs to, as a number: the queue pair that it leaves by follows from that.
//!
//! Invariant: all frames of a connection that leave this guest have the same number, and connections that differ in
//! one port only are spread evenly, because clients take their ports one after the other.
//!
//! Does not check a frame: what is no TCP or UDP over IP goes by what addresses it has.

/// A number that all frames of a flow have, from addresses and ports.
pub fn flow_number(frame: &[u8]) -> usize {
    let (protocol, addresses, ports) = match frame.get(12..14) {
        Some([0x08, 0x00]) => (23, 26..34, 34..38),
        Some([0x86, 0xdd]) => (20, 22..54, 54..58),
        _ => return 0,
    };
    let has_ports = matches!(frame.get(protocol), Some(6 | 17));
    let ports = frame.get(ports).filter(|_| has_ports).unwrap_or_default();
    let addresses = frame.get(addresses).unwrap_or_default();
    // FNV-1a alone hardly lets the last byte into the upper bits.
    let mix = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    let hash = addresses.iter().chain(ports).fold(0x811c_9dc5, mix);
    (finish(hash) >> 16) as usize
}

/// The finaliser of MurmurHash3: every input bit reaches every output bit.
const fn finish(mut hash: u32) -> u32 {
    hash ^= hash >> 16;
    hash = hash.wrapping_mul(0x85eb_ca6b);
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(0xc2b2_ae35);
    hash ^ hash >> 16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The start of a TCP segment from the guest to a client's port.
    fn segment(v6: bool, port: u16) -> Vec<u8> {
        let (length, ether_type, protocol, ports) = match v6 {
            false => (54, [0x08, 0x00], 23, 34),
            true => (74, [0x86, 0xdd], 20, 54),
        };
        let mut frame = vec![0; length];
        frame[12..14].copy_from_slice(&ether_type);
        frame[protocol] = 6;
        frame[ports..ports + 2].copy_from_slice(&80u16.to_be_bytes());
        frame[ports + 2..ports + 4].copy_from_slice(&port.to_be_bytes());
        frame
    }

    #[test]
    fn sixteen_connections_from_neighbouring_ports_use_both_queues() {
        for v6 in [false, true] {
            for step in [1, 2] {
                for first in (32_768..60_000).step_by(7) {
                    let ports = (0..16).map(|n| first + n * step);
                    let number = |port| flow_number(&segment(v6, port)) % 2;
                    let by_the_second: usize = ports.map(number).sum();
                    let is_spread = (1..=15).contains(&by_the_second);
                    assert!(
                        is_spread,
                        "ports from {first} by {step}: {by_the_second} of 16"
                    );
                }
            }
        }
    }

    #[test]
    fn what_has_no_ports_goes_by_its_addresses_or_first() {
        let mut echo = segment(false, 1);
        echo[23] = 1;
        let same = echo.clone();
        echo[36] ^= 1;
        assert_eq!(flow_number(&echo), flow_number(&same));
        echo[30] ^= 1;
        assert_ne!(flow_number(&echo), flow_number(&same));
        assert_eq!(flow_number(&[0; 60]), 0);
        assert_eq!(flow_number(&echo[..13]), 0);
    }
}
