//! A client of the model guest, which checks every byte and number that it sees.

use colo_compare::seq;
use colo_compare::testing::{Segment, checksums_are_right};
use colo_compare::wire::tcp::{RST, SYN};

use super::{payload, side, tcp_of};

/// A client's end of one connection.
#[derive(Debug)]
pub struct Client {
    port: u16,
    isn: u32,
    rcv_nxt: Option<u32>,
    snd_una: u32,
    pub sent: Vec<u8>,
    pub received: Vec<u8>,
    ts_high: u32,
    pub reset: bool,
}

impl Client {
    pub(super) fn new(port: u16) -> Self {
        let isn = u32::MAX - u32::from(port % 7);
        let (sent, received) = (Vec::new(), Vec::new());
        let snd_una = isn;
        Self {
            port,
            isn,
            rcv_nxt: None,
            snd_una,
            sent,
            received,
            ts_high: 0,
            reset: false,
        }
    }

    /// The same as [`Guest::skip`]; nothing is on its way.
    pub(super) fn skip(&mut self, sent: u32, received: u32) {
        let next = self.isn.wrapping_add(1 + self.sent.len() as u32);
        self.isn = next.wrapping_add(sent).wrapping_sub(1);
        self.snd_una = self.isn.wrapping_add(1);
        self.rcv_nxt = self.rcv_nxt.map(|next| next.wrapping_add(received));
        self.sent.clear();
        self.received.clear();
    }

    fn segment(&self, now_us: u64) -> Segment {
        let tsecr = if self.rcv_nxt.is_some() {
            self.ts_high
        } else {
            0
        };
        Segment::new(side(self.port))
            .to_guest()
            .ports(80, self.port)
            .timestamps((now_us / 1000) as u32, tsecr)
    }

    pub(super) fn syn(&self, now_us: u64) -> Vec<u8> {
        self.segment(now_us).flags(SYN).seq(self.isn).bytes()
    }

    fn ack(&self, now_us: u64) -> Vec<u8> {
        let seq = self.isn.wrapping_add(1 + self.sent.len() as u32);
        self.segment(now_us)
            .seq(seq)
            .ack(self.rcv_nxt.unwrap_or(0))
            .bytes()
    }

    /// Before the connection is open the data waits for [`Client::retransmit`].
    pub(super) fn send(&mut self, now_us: u64, data: &[u8]) -> Option<Vec<u8>> {
        let seq = self.isn.wrapping_add(1 + self.sent.len() as u32);
        self.sent.extend_from_slice(data);
        Some(
            self.segment(now_us)
                .seq(seq)
                .ack(self.rcv_nxt?)
                .payload(data)
                .bytes(),
        )
    }

    /// What is not acknowledged, again.
    pub fn retransmit(&self, now_us: u64) -> Option<Vec<u8>> {
        let Some(rcv_nxt) = self.rcv_nxt else {
            return Some(self.syn(now_us));
        };
        let from = self.snd_una.wrapping_sub(self.isn.wrapping_add(1)) as usize;
        let data = self.sent.get(from..).filter(|data| !data.is_empty())?;
        Some(
            self.segment(now_us)
                .seq(self.snd_una)
                .ack(rcv_nxt)
                .payload(data)
                .bytes(),
        )
    }

    pub(super) fn input(&mut self, now_us: u64, bytes: &[u8]) -> Vec<Vec<u8>> {
        assert!(
            checksums_are_right(bytes),
            "a frame for the client has a wrong checksum"
        );
        let tcp = tcp_of(bytes).expect("only TCP here");
        if tcp.has(RST) {
            self.reset = true;
            return Vec::new();
        }
        let (tsval, _) = tcp.timestamps(bytes).expect("the guest sends timestamps");
        if tcp.has(SYN) {
            match self.rcv_nxt {
                None => {
                    self.rcv_nxt = Some(tcp.end());
                    self.ts_high = tsval;
                    self.snd_una = self.isn.wrapping_add(1);
                }
                Some(_) => return vec![self.ack(now_us)],
            }
            return vec![self.ack(now_us)];
        }
        let Some(rcv_nxt) = self.rcv_nxt else {
            return Vec::new();
        };
        if tcp.payload_len == 0 && rcv_nxt.wrapping_sub(tcp.seq).wrapping_add(65_536) > 131_072 {
            // Not acceptable (RFC 9293 section 3.10.7.4): answered, and otherwise ignored.
            return vec![self.ack(now_us)];
        }
        // PAWS (RFC 7323 section 5): an older timestamp loses the segment.
        assert!(
            seq::le(self.ts_high, tsval),
            "port {}: TSval went back (rule 3)",
            self.port
        );
        self.ts_high = tsval;
        let end_sent = self.isn.wrapping_add(1 + self.sent.len() as u32);
        assert!(
            seq::le(tcp.ack, end_sent),
            "acknowledged what was never sent"
        );
        self.snd_una = seq::max(self.snd_una, tcp.ack);
        if seq::lt(rcv_nxt, tcp.payload_seq()) {
            // Something before it was lost.
            return vec![self.ack(now_us)];
        }
        let known = rcv_nxt.wrapping_sub(tcp.payload_seq()) as usize;
        let data = payload(bytes, &tcp);
        let Some(new) = data.get(known..).filter(|new| !new.is_empty()) else {
            return Vec::new();
        };
        self.received.extend_from_slice(new);
        assert!(
            self.sent.starts_with(&self.received),
            "port {}: a wrong byte",
            self.port
        );
        self.rcv_nxt = Some(tcp.end());
        vec![self.ack(now_us)]
    }
}
