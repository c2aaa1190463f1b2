//! The record that travels with each checkpoint (rule 1): client-facing translations and the
//! guest's addresses, little-endian, versioned.
//!
//! Layout: `u16` version, `u16` number of addresses, `u32` number of translations, `u8` 1 when a
//! MAC address is known, 6 bytes of it, then addresses of 17 bytes, then translations of 84 bytes.
//! Invariant: reading never panics, whatever the bytes are, and takes all of them or fails.

use alloc::vec::Vec;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::announce::{Addresses, MAX_ADDRESSES};
use crate::flow::{FlowKey, Protocol};
use crate::xlate::{ClientTable, Entry, Handshake, Offsets};

const VERSION: u16 = 1;
const FIXED_BYTES: usize = 15;
const ADDRESS_BYTES: usize = 17;
const TRANSLATION_BYTES: usize = 84;

/// Longest record with that many translations.
pub(crate) const fn max_len(translations: usize) -> usize {
    FIXED_BYTES + MAX_ADDRESSES * ADDRESS_BYTES + translations * TRANSLATION_BYTES
}

/// Why a checkpoint's translation record was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Another version.
    #[error("translation record: version {found}, this build reads {VERSION}; run one version")]
    Version {
        /// The version in the record.
        found: u16,
    },
    /// Too short, too long, or a field has a value that it cannot have.
    #[error("translation record: malformed at byte {at}; the checkpoint is to be refused")]
    Malformed {
        /// Where reading stopped.
        at: usize,
    },
    /// More entries than this host allows.
    #[error("translation record: {found} entries, this host allows {limit}; use the same limits")]
    TooMany {
        /// Entries in the record.
        found: usize,
        /// The limit here.
        limit: usize,
    },
}

/// Appends the record; takes memory only when `out` has no room for [`len`] bytes.
pub(crate) fn write(table: &ClientTable, addresses: &Addresses, out: &mut Vec<u8>) {
    out.reserve(len(table, addresses));
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(addresses.ips().count() as u16).to_le_bytes());
    out.extend_from_slice(&(table.len() as u32).to_le_bytes());
    out.push(u8::from(addresses.mac().is_some()));
    out.extend_from_slice(&addresses.mac().unwrap_or_default());
    addresses.ips().for_each(|ip| write_ip(ip, out));
    for (key, entry) in table.entries() {
        write_entry(key, entry, out);
    }
}

fn write_ip(ip: IpAddr, out: &mut Vec<u8>) {
    match ip {
        IpAddr::V4(ip) => {
            out.push(4);
            out.extend_from_slice(&ip.octets());
            out.extend_from_slice(&[0; 12]);
        }
        IpAddr::V6(ip) => {
            out.push(6);
            out.extend_from_slice(&ip.octets());
        }
    }
}

fn write_entry(key: &FlowKey, entry: &Entry, out: &mut Vec<u8>) {
    let start = out.len();
    write_ip(key.guest(), out);
    write_ip(key.peer(), out);
    for n in [
        key.guest_port(),
        key.peer_port(),
        key.vlan()[0],
        key.vlan()[1],
    ] {
        out.extend_from_slice(&n.to_le_bytes());
    }
    let handshake = entry.handshake();
    let guest_ts = handshake.and_then(|h| h.guest_ts);
    let peer_isn = handshake.and_then(|h| h.peer_isn);
    let known = [
        entry.ts_high().is_some(),
        entry.guest_isn().is_some(),
        handshake.is_some(),
        guest_ts.is_some(),
        peer_isn.is_some(),
    ];
    out.push(
        known
            .iter()
            .enumerate()
            .fold(0, |bits, (n, known)| bits | u8::from(*known) << n),
    );
    let (guest_closed, peer_closed) = entry.closed();
    out.push(u8::from(guest_closed) | u8::from(peer_closed) << 1);
    let numbers = [
        entry.offsets().seq,
        entry.offsets().ts,
        entry.ts_high().unwrap_or(0),
        entry.guest_isn().unwrap_or(0),
        guest_ts.unwrap_or(0),
        peer_isn.unwrap_or(0),
    ];
    for n in numbers {
        out.extend_from_slice(&n.to_le_bytes());
    }
    out.resize(start + TRANSLATION_BYTES, 0);
}

/// How many bytes [`write`] appends.
pub(crate) fn len(table: &ClientTable, addresses: &Addresses) -> usize {
    FIXED_BYTES + addresses.ips().count() * ADDRESS_BYTES + table.len() * TRANSLATION_BYTES
}

/// Replaces table and addresses by those of a record, or leaves both as they are. Entries count
/// as used at `now_us`.
pub(crate) fn read(
    bytes: &[u8],
    now_us: u64,
    table: &mut ClientTable,
    addresses: &mut Addresses,
) -> Result<(), RecordError> {
    check(bytes, table.limit())?;
    table.clear();
    *addresses = parse(bytes, table.limit(), |reader| {
        let (key, entry) = reader.entry(now_us)?;
        table.insert(key, entry);
        Ok(())
    })?;
    Ok(())
}

/// Whether [`read`] takes a record into a table with that limit.
pub(crate) fn check(bytes: &[u8], limit: usize) -> Result<(), RecordError> {
    parse(bytes, limit, |reader| reader.entry(0).map(drop)).map(drop)
}

/// Walks through a record; `entry` reads one translation.
fn parse<'a>(
    bytes: &'a [u8],
    limit: usize,
    mut entry: impl FnMut(&mut Reader<'a>) -> Result<(), RecordError>,
) -> Result<Addresses, RecordError> {
    let mut reader = Reader { bytes, at: 0 };
    let found = reader.u16()?;
    if found != VERSION {
        return Err(RecordError::Version { found });
    }
    let ips = usize::from(reader.u16()?);
    let entries = reader.u32()? as usize;
    if ips > MAX_ADDRESSES {
        return Err(RecordError::TooMany {
            found: ips,
            limit: MAX_ADDRESSES,
        });
    }
    if entries > limit {
        return Err(RecordError::TooMany {
            found: entries,
            limit,
        });
    }
    let mut addresses = Addresses::default();
    let has_mac = reader.u8()? != 0;
    let mac = reader.array::<6>()?;
    if has_mac {
        addresses.set_mac(mac);
    }
    for _ in 0..ips {
        addresses.add(reader.ip()?);
    }
    for _ in 0..entries {
        entry(&mut reader)?;
    }
    if reader.at != bytes.len() {
        return Err(RecordError::Malformed { at: reader.at });
    }
    Ok(addresses)
}

/// A record with its translations in an order that hangs on nothing but themselves: two tables that hold
/// the same give the same bytes.
pub fn canonical_xlate_record(record: &[u8]) -> Result<Vec<u8>, RecordError> {
    let mut entries = Vec::new();
    let mut at = record.len();
    parse(record, usize::MAX, |reader| {
        at = at.min(reader.at);
        let bytes = &record[reader.at..];
        reader.entry(0)?;
        entries.push(&bytes[..TRANSLATION_BYTES]);
        Ok(())
    })?;
    entries.sort_unstable();
    let mut canonical = record[..at].to_vec();
    entries
        .iter()
        .for_each(|entry| canonical.extend_from_slice(entry));
    Ok(canonical)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], RecordError> {
        let malformed = RecordError::Malformed { at: self.at };
        let bytes = self.bytes.get(self.at..self.at + N).ok_or(malformed)?;
        self.at += N;
        bytes.try_into().map_err(|_| malformed)
    }

    fn u8(&mut self) -> Result<u8, RecordError> {
        Ok(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, RecordError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, RecordError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn ip(&mut self) -> Result<IpAddr, RecordError> {
        let at = self.at;
        let family = self.u8()?;
        let octets = self.array::<16>()?;
        match family {
            4 => Ok(IpAddr::V4(Ipv4Addr::new(
                octets[0], octets[1], octets[2], octets[3],
            ))),
            6 => Ok(IpAddr::V6(Ipv6Addr::from(octets))),
            _ => Err(RecordError::Malformed { at }),
        }
    }

    fn entry(&mut self, now_us: u64) -> Result<(FlowKey, Entry), RecordError> {
        let end = self.at + TRANSLATION_BYTES;
        let (guest, peer) = (self.ip()?, self.ip()?);
        let (guest_port, peer_port) = (self.u16()?, self.u16()?);
        let vlan = [self.u16()?, self.u16()?];
        let key = FlowKey::new(Protocol::Tcp, vlan, guest, peer).with_ports(guest_port, peer_port);
        let known = self.u8()?;
        let closed = self.u8()?;
        let offsets = Offsets {
            seq: self.u32()?,
            ts: self.u32()?,
        };
        let (ts_high, isn) = (self.u32()?, self.u32()?);
        let (guest_ts, peer_isn) = (self.u32()?, self.u32()?);
        let when = |bit: u8, n: u32| (known >> bit & 1 == 1).then_some(n);
        let handshake = when(2, isn).map(|guest_isn| Handshake {
            guest_isn,
            guest_ts: when(3, guest_ts),
            peer_isn: when(4, peer_isn),
        });
        while self.at < end {
            self.u8()?;
        }
        let entry = match handshake {
            Some(handshake) => Entry::opening(handshake),
            None => Entry::new(offsets).with_guest_isn(when(1, isn)),
        };
        let entry = entry.with_ts_high(when(0, ts_high));
        let entry = entry.with_closed(closed & 1 != 0, closed & 2 != 0);
        Ok((key, entry.used_at(now_us)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> (ClientTable, Addresses) {
        let mut table = ClientTable::new(10, 0);
        let (guest, peer) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let key = FlowKey::new(Protocol::Tcp, [5, 0], guest, peer).with_ports(80, 4000);
        let offsets = Offsets {
            seq: 7,
            ts: u32::MAX,
        };
        let entry = Entry::new(offsets).with_guest_isn(Some(9));
        let entry = entry.with_ts_high(Some(3)).with_closed(false, true);
        table.insert(key, entry);
        let handshake = Handshake {
            guest_isn: 1,
            guest_ts: None,
            peer_isn: Some(8),
        };
        table.insert(key.with_ports(81, 4000), Entry::opening(handshake));
        let mut addresses = Addresses::default();
        addresses.set_mac([2, 0, 0, 0, 0, 1]);
        addresses.add("10.0.0.1".parse().unwrap());
        addresses.add("fd00::1".parse().unwrap());
        (table, addresses)
    }

    #[test]
    fn what_is_written_is_read() {
        let (table, addresses) = sample();
        let mut bytes = Vec::new();
        write(&table, &addresses, &mut bytes);
        assert_eq!(bytes.len(), len(&table, &addresses));
        let (mut read_table, mut read_addresses) = (ClientTable::new(10, 0), Addresses::default());
        read(&bytes, 0, &mut read_table, &mut read_addresses).unwrap();
        assert!(table.entries().eq(read_table.entries()));
        assert_eq!(addresses, read_addresses);
        assert_eq!(
            check(&bytes, 1),
            Err(RecordError::TooMany { found: 2, limit: 1 })
        );
        bytes[0] = 9;
        assert_eq!(
            read(&bytes, 0, &mut read_table, &mut read_addresses),
            Err(RecordError::Version { found: 9 })
        );
        assert!(
            table.entries().eq(read_table.entries()),
            "refused as a whole"
        );
    }

    #[test]
    fn tables_that_hold_the_same_have_one_canonical_record_and_others_another() {
        let (table, addresses) = sample();
        let record = |table: &ClientTable, addresses: &Addresses| {
            let mut bytes = Vec::new();
            write(table, addresses, &mut bytes);
            bytes
        };
        let bytes = record(&table, &addresses);
        let canonical = canonical_xlate_record(&bytes).unwrap();
        let (head, entries) = bytes.split_at(bytes.len() - 2 * TRANSLATION_BYTES);
        let (first, second) = entries.split_at(TRANSLATION_BYTES);
        let swapped = [head, second, first].concat();
        assert_ne!(swapped, bytes);
        assert_eq!(canonical_xlate_record(&swapped).unwrap(), canonical);
        let same = |at: usize| {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            canonical_xlate_record(&bytes).is_ok_and(|other| other == canonical)
        };
        assert!((0..bytes.len()).all(|at| !same(at)));
        let none = record(&ClientTable::new(10, 0), &addresses);
        assert_eq!(canonical_xlate_record(&none).unwrap(), none);
        assert!(canonical_xlate_record(&bytes[1..]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read(cut in 0usize..400, at in 0usize..200, byte: u8) {
            let (table, addresses) = sample();
            let mut bytes = Vec::new();
            write(&table, &addresses, &mut bytes);
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(cut);
            let _ = (check(&bytes, 10), canonical_xlate_record(&bytes));
        }
    }
}
