//! What the guests say: each message as the PVM sends it, and as the SVM does.

use colo_compare::testing::{Segment, Side, echo, fragment, ip_frame, udp};
use colo_compare::wire::tcp::{ACK, FIN, RST, SYN};

use super::Life;
use super::connections::{Connection, IGNORED_PORT, guest_port, segment, side};

/// How the SVM's version of a message relates to the PVM's; the first byte of a payload names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Equal = 1,
    /// In two segments where the PVM sends one.
    Split,
    /// In one segment where the PVM sends two.
    Joined,
    /// Sent twice.
    Repeated,
    /// Other bytes, where a policy leaves them out.
    Ignored,
    /// Fragments, cut alike and not.
    CutAlike,
    CutOtherwise,
    /// It must not leave by a match.
    Differs,
}

pub const WAYS: usize = 9;

/// A message as each guest sends it.
pub struct Message {
    pub pvm: Vec<Vec<u8>>,
    pub svm: Vec<Vec<u8>>,
}

impl Message {
    fn same(frame: Vec<u8>) -> Self {
        Self {
            pvm: vec![frame.clone()],
            svm: vec![frame],
        }
    }

    fn pair(pvm: Vec<u8>, svm: Vec<u8>) -> Self {
        Self {
            pvm: vec![pvm],
            svm: vec![svm],
        }
    }
}

impl Life {
    pub(super) fn message(&mut self) -> Message {
        let c = self.connection();
        let port = 40_000 + c as u16;
        self.messages = self.messages.wrapping_add(1);
        let n = self.messages.to_be_bytes();
        match self.below(40) {
            0 | 1 => self.opening(c),
            2..=22 => self.stream(c),
            23 => {
                let fin = self.next(c, 1).flags(FIN | ACK);
                Message::same(fin.bytes())
            }
            24 => {
                let reset = self.next(c, 0).flags(RST | ACK).bytes();
                match self.below(3) {
                    0 => Message::same(reset),
                    1 => Message {
                        svm: Vec::new(),
                        ..Message::same(reset)
                    },
                    _ => Message::pair(reset, self.next(c, 0).payload(&[9; 4]).bytes()),
                }
            }
            25..=28 => Message::same(udp(side(c), false, 80, port, &n)),
            29 => {
                let [a, b] = [&n[..], &[9, 9, 9]].map(|p| udp(side(c), false, 80, port, p));
                Message::pair(a, b)
            }
            30..=32 => self.fragments(side(c)),
            33 => arp(),
            34 => {
                // Each guest picks its own port.
                let [a, b] = [5000, 6000].map(|p| udp(side(c), false, p + c as u16, 53, b"?"));
                Message::pair(a, b)
            }
            35 => Message {
                svm: Vec::new(),
                ..Message::same(vec![0xff; 12])
            },
            36 => {
                let [a, b] = [64, 63].map(|ttl| ip_frame(side(c), false, 132, ttl, 0, &n));
                Message::pair(a, b)
            }
            37 => Message::same(echo(side(c), false, port, &n)),
            _ => Message {
                svm: Vec::new(),
                ..Message::same(self.next(c, 0).bytes())
            },
        }
    }

    /// The connection's next segment, which takes `len` numbers.
    fn next(&mut self, c: u64, len: u32) -> Segment {
        let connection = &mut self.connections[c as usize];
        let seq = connection.isn.wrapping_add(1 + connection.sent);
        connection.sent += len;
        segment(c).seq(seq)
    }

    /// A new connection between the same ports, which the guest accepts.
    fn opening(&mut self, c: u64) -> Message {
        let connection = &mut self.connections[c as usize];
        let isn = connection.isn.wrapping_add(1_000_003);
        *connection = Connection {
            isn,
            ..Connection::default()
        };
        let syn_ack = segment(c).flags(SYN | ACK).seq(isn);
        let mss: &[u8] = if self.below(5) == 0 {
            &[2, 4, 5, 0xb4]
        } else {
            &[]
        };
        let other = syn_ack.clone().seq(isn.wrapping_add(77)).option(mss);
        let syn = segment(c).to_guest().flags(SYN).seq(isn ^ 0x5555);
        self.client_sends(&syn.bytes());
        Message::pair(syn_ack.bytes(), other.bytes())
    }

    fn stream(&mut self, c: u64) -> Message {
        let way = if self.has_policy && guest_port(c) == IGNORED_PORT {
            Way::Ignored
        } else {
            let ways = [Way::Equal, Way::Split, Way::Joined, Way::Repeated];
            let at = self.below(24) as usize;
            ways.get(at % 8).copied().unwrap_or(match at {
                23 => Way::Differs,
                _ => Way::Equal,
            })
        };
        let n = self.messages as u8;
        let payload = [way as u8, c as u8, n, 4, 5, 6, 7, 8, 9, 10];
        let first = self.next(c, 10);
        let whole = first.clone().payload(&payload).bytes();
        let seq = self.connections[c as usize].isn.wrapping_add(1);
        let seq = seq.wrapping_add(self.connections[c as usize].sent);
        let pvm = vec![whole.clone()];
        let svm = match way {
            Way::Split => {
                let rest = segment(c).seq(seq.wrapping_sub(6));
                let rest = rest.payload(&payload[4..]).bytes();
                vec![first.payload(&payload[..4]).bytes(), rest]
            }
            Way::Joined => {
                let rest = self.next(c, 10).payload(&payload).bytes();
                let both = first.payload(&payload.repeat(2)).bytes();
                return Message {
                    pvm: vec![whole, rest],
                    svm: vec![both],
                };
            }
            Way::Repeated => vec![whole.clone(), whole],
            Way::Ignored => vec![first.payload(&[n; 10]).bytes()],
            Way::Differs => match self.below(4) {
                0 => vec![first.payload(&payload[..9]).flags(ACK | FIN).bytes()],
                1 => vec![first.payload(&payload).ttl(63).bytes()],
                2 => Vec::new(),
                _ => vec![first.payload(&[n; 10]).bytes()],
            },
            _ => vec![whole],
        };
        Message { pvm, svm }
    }

    fn fragments(&mut self, side: Side) -> Message {
        let is_cut_otherwise = self.below(2) == 0;
        let id = self.messages << 1 | u16::from(is_cut_otherwise);
        let [high, low] = self.messages.to_be_bytes();
        let bytes: Vec<u8> = [0, 7, 0, 7, 0, 60, high, low]
            .into_iter()
            .chain(8..60)
            .collect();
        let cut = |id: u16, cuts: &[usize]| {
            let ends = cuts.iter().skip(1).copied().chain([8]);
            let pieces = cuts.iter().copied().zip(ends);
            let piece = |(from, end): (usize, usize)| {
                let end = (end * 8).min(bytes.len());
                fragment(side, id, &bytes, from * 8, end)
            };
            pieces.map(piece).collect()
        };
        let other: &[usize] = if is_cut_otherwise {
            &[0, 2, 5]
        } else {
            &[0, 3]
        };
        Message {
            pvm: cut(id, &[0, 3]),
            svm: cut(id ^ 0x100, other),
        }
    }
}

fn arp() -> Message {
    let mut frame = vec![0xff; 12];
    frame.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.resize(60, 1);
    Message {
        pvm: Vec::new(),
        svm: vec![frame],
    }
}
