//! The model guest: a TCP echo server whose sequence numbers and timestamps are its own.

use std::collections::BTreeMap;

use colo_compare::testing::{Segment, checksums_are_right};
use colo_compare::wire::tcp::{ACK, RST, SYN};
use colo_compare::{Direction, seq};

use super::{payload, port_of, side, tcp_of};

#[derive(Debug, Clone)]
struct Server {
    isn: u32,
    snd_una: u32,
    rcv_nxt: u32,
    /// Everything sent after the SYN-ACK.
    sent: Vec<u8>,
    ts_offset: u32,
    ts_recent: u32,
}

impl Server {
    fn snd_nxt(&self) -> u32 {
        self.isn.wrapping_add(1 + self.sent.len() as u32)
    }
}

/// The guest.
#[derive(Debug, Clone)]
pub struct Guest {
    servers: BTreeMap<u16, Server>,
    pub next_isn: u32,
}

impl Guest {
    /// The stream goes on by that many bytes, and so does the peer's, as if they had been sent and acknowledged.
    pub(super) fn skip(&mut self, sent: u32, received: u32) {
        for server in self.servers.values_mut() {
            server.isn = server.snd_nxt().wrapping_add(sent).wrapping_sub(1);
            server.snd_una = server.isn.wrapping_add(1);
            server.rcv_nxt = server.rcv_nxt.wrapping_add(received);
            server.sent.clear();
        }
    }

    pub fn new(next_isn: u32) -> Self {
        Self {
            servers: BTreeMap::new(),
            next_isn,
        }
    }

    fn ts(now_us: u64, offset: u32) -> u32 {
        ((now_us / 1000) as u32).wrapping_add(offset)
    }

    fn segment(port: u16, server: &Server, now_us: u64) -> Segment {
        let tsval = Self::ts(now_us, server.ts_offset);
        Segment::new(side(port))
            .ports(80, port)
            .timestamps(tsval, server.ts_recent)
    }

    /// Everything that is not acknowledged, again.
    pub fn retransmit(&self, now_us: u64) -> Vec<Vec<u8>> {
        let unacked = |(port, server): (&u16, &Server)| {
            let from = server.snd_una.wrapping_sub(server.isn.wrapping_add(1)) as usize;
            let data = server.sent.get(from..).filter(|data| !data.is_empty())?;
            let segment = Self::segment(*port, server, now_us);
            Some(
                segment
                    .seq(server.snd_una)
                    .ack(server.rcv_nxt)
                    .payload(data)
                    .bytes(),
            )
        };
        self.servers.iter().filter_map(unacked).collect()
    }

    pub fn input(&mut self, now_us: u64, bytes: &[u8]) -> Vec<Vec<u8>> {
        assert!(
            checksums_are_right(bytes),
            "a frame for the guest has a wrong checksum"
        );
        let tcp = tcp_of(bytes).expect("only TCP here");
        let port = port_of(bytes, Direction::ToGuest);
        let (tsval, tsecr) = tcp.timestamps(bytes).expect("clients send timestamps");
        if tcp.has(SYN) {
            let known = self
                .servers
                .get(&port)
                .is_some_and(|s| s.rcv_nxt == tcp.end());
            if !known {
                let isn = self.next_isn;
                self.next_isn = isn.wrapping_mul(2_654_435_761).wrapping_add(12_345);
                let (rcv_nxt, ts_offset) = (tcp.end(), isn.rotate_left(9));
                let (snd_una, sent, ts_recent) = (isn, Vec::new(), tsval);
                let server = Server {
                    isn,
                    snd_una,
                    rcv_nxt,
                    sent,
                    ts_offset,
                    ts_recent,
                };
                self.servers.insert(port, server);
            }
            let server = &self.servers[&port];
            let segment = Self::segment(port, server, now_us).flags(SYN | ACK);
            return vec![segment.seq(server.isn).ack(server.rcv_nxt).bytes()];
        }
        let Some(server) = self.servers.get_mut(&port) else {
            let segment = Segment::new(side(port))
                .ports(80, port)
                .timestamps(0, tsval);
            return vec![segment.seq(tcp.ack).flags(RST).bytes()];
        };
        let acked_is_sent = seq::lt(server.isn, tcp.ack) && seq::le(tcp.ack, server.snd_nxt());
        assert!(
            acked_is_sent,
            "port {port}: the guest was told that it sent {}",
            tcp.ack
        );
        let own_ts = Self::ts(now_us, server.ts_offset);
        // A peer that echoes times from the future was not translated (rule 3). The slack that a
        // takeover adds makes echoes look old; the two guests' skew at the handshake, a bit new.
        assert!(
            seq::le(tsecr, own_ts.wrapping_add(100)),
            "port {port}: TSecr from the future"
        );
        server.snd_una = seq::max(server.snd_una, tcp.ack);
        if tcp.payload_len == 0 {
            return Vec::new();
        }
        if tcp.seq == server.rcv_nxt {
            server.rcv_nxt = tcp.end();
            server.ts_recent = tsval;
            let from = server.snd_nxt();
            let data = payload(bytes, &tcp);
            server.sent.extend_from_slice(&data);
            let segment = Self::segment(port, server, now_us);
            return vec![segment.seq(from).ack(server.rcv_nxt).payload(&data).bytes()];
        }
        let segment = Self::segment(port, server, now_us);
        vec![segment.seq(server.snd_nxt()).ack(server.rcv_nxt).bytes()]
    }
}
