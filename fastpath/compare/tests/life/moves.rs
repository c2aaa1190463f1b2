//! What two guests, a client, a secondary and a shell may do next.

use colo_compare::testing::{Side, digest_key, digested, ip_frame, udp};
use colo_compare::wire::tcp::{ACK, FIN, RST};
use colo_compare::{ANNOUNCEMENT_MAX, Frames};

use super::Life;
use super::connections::{Connection, segment, side};
use super::messages::Message;

impl Life {
    pub(super) fn produce(&mut self) {
        if self.to_pvm.len() < 16 && self.to_svm.len() < 24 {
            let Message { pvm, svm } = self.message();
            self.to_pvm.extend(pvm);
            self.to_svm.extend(svm);
        }
    }

    pub(super) fn pvm_sends(&mut self) {
        if !self.path.room() {
            self.tally.without_room += 1;
            return;
        }
        let Some(bytes) = self.to_pvm.pop_front() else {
            return;
        };
        let token = self.pool.insert(&bytes).unwrap();
        self.call("handle_guest_tx", |path, pool, now_us| {
            path.handle_guest_tx(now_us, pool, token);
        });
        self.recent.push_back(bytes);
        if self.recent.len() > 8 {
            self.recent.pop_front();
        }
    }

    pub(super) fn pvm_repeats(&mut self) {
        let at = self.below(8) as usize;
        if let Some(bytes) = self.recent.get(at).cloned() {
            self.to_pvm.push_front(bytes);
            self.tally.retransmissions += 1;
        }
    }

    /// Bytes that the path asked for, of what it has released meanwhile too.
    pub(super) fn svm_answers(&mut self) -> bool {
        let Some((svm_seq, epoch, bytes)) = self.asked.pop().and_then(|svm_seq| {
            let (epoch, bytes) = self.digested.remove(&svm_seq)?;
            Some((svm_seq, epoch, bytes))
        }) else {
            return false;
        };
        let token = self.pool.insert(&bytes).unwrap();
        self.call("handle_svm_output", |path, pool, now_us| {
            path.handle_svm_output(now_us, pool, epoch, svm_seq, token);
        });
        true
    }

    pub(super) fn svm_sends(&mut self) {
        if self.below(2) == 0 && self.svm_answers() {
            return;
        }
        // Late, and out of order.
        let at = self.below(4) as usize;
        let Some(bytes) = self.to_svm.remove(at) else {
            return;
        };
        let now = self.path.epoch();
        let epoch = match self.below(50) {
            0 => now - 1,
            1 => now + 3,
            _ => now - u64::from(self.in_flight.is_some() && self.below(2) == 0),
        };
        self.tally.early_output += u64::from(self.in_flight.is_some() && epoch == now);
        self.svm_seq += 1;
        let svm_seq = self.svm_seq;
        if self.below(2) == 0
            && let Some((headers, n, digest)) = digested(&bytes, &digest_key())
        {
            let token = self.pool.insert(headers).unwrap();
            self.digested.insert(svm_seq, (epoch, bytes.clone()));
            self.call("handle_svm_digest", |path, pool, now_us| {
                path.handle_svm_digest(now_us, pool, epoch, svm_seq, token, n, digest);
            });
            return;
        }
        let token = self.pool.insert(&bytes).unwrap();
        self.call("handle_svm_output", |path, pool, now_us| {
            path.handle_svm_output(now_us, pool, epoch, svm_seq, token);
        });
    }

    pub(super) fn input(&mut self) {
        let c = self.connection();
        let Connection { isn, sent, offset } = self.connections[c as usize];
        let acked = self.below(u64::from(sent) + 1) as u32;
        let ack = isn.wrapping_add(1 + acked).wrapping_add(offset);
        let client = segment(c).to_guest().seq(c as u32 + 1).ack(ack);
        let bytes = match self.below(20) {
            0 => client.flags(FIN | ACK).bytes(),
            1 => client.flags(RST).bytes(),
            2 => client.sack(&[(ack, ack.wrapping_add(10))]).bytes(),
            3..=5 => udp(side(c), true, 80, 40_000 + c as u16, b"question"),
            6 => vec![0xfe; 20],
            7 => {
                // Too long for the path: quotes what the guest sent.
                let mut message = Vec::from([3, 4, 0, 0, 0, 0, 5, 0]);
                message.extend_from_slice(&segment(c & !1).seq(ack).bytes()[14..42]);
                ip_frame(Side::V4, true, 1, 64, 0, &message)
            }
            8..=11 => client.payload(b"request").bytes(),
            _ => client.bytes(),
        };
        self.client_sends(&bytes);
    }

    pub(super) fn client_sends(&mut self, bytes: &[u8]) {
        if !self.path.nic_room() {
            self.tally.without_nic_room += 1;
            return;
        }
        let token = self.pool.insert(bytes).unwrap();
        let token = self.call("handle_nic", |path, pool, now_us| {
            path.handle_nic(now_us, pool, token)
        });
        if self.below(10) == 0 {
            // The guest's ring is full.
            self.pool.release(token);
            return;
        }
        self.call("handle_delivered", |path, pool, now_us| {
            path.handle_delivered(now_us, pool, token);
        });
    }

    pub(super) fn ack_input(&mut self) {
        let up_to = self.input_seq.saturating_sub(self.below(3));
        self.call("handle_input_ack", |path, pool, now_us| {
            path.handle_input_ack(now_us, pool, up_to);
        });
    }

    pub(super) fn lease(&mut self) {
        let until_us = self.now_us + self.below(20_000);
        self.call("set_lease", |path, pool, now_us| {
            path.set_lease(now_us, pool, until_us);
        });
    }

    pub(super) fn time_passes(&mut self) {
        self.now_us += match self.below(40) {
            0 => 3_000_000,
            1 | 2 => 20_000,
            _ => 1_000,
        };
        self.call("handle_timeout", |path, pool, now_us| {
            path.handle_timeout(now_us, pool);
        });
    }

    pub(super) fn caught_up(&mut self) {
        let epoch = self.path.epoch() - u64::from(self.below(4) == 0);
        self.call("caught_up", |path, _, now_us| path.caught_up(now_us, epoch));
    }

    pub(super) fn checkpoint(&mut self) {
        let Some(epoch) = self.in_flight else {
            if self.is_paired && self.below(2) == 0 {
                let epoch = self.call("cut", |path, _, now_us| path.cut(now_us));
                self.in_flight = Some(epoch.unwrap());
                let pending = self.call("pending", |path, _, _| path.pending().count());
                self.tally.pending += pending as u64;
                self.tally.cuts += 1;
            }
            return;
        };
        self.in_flight = None;
        // The SVM goes on as the PVM is; but some of what it sent is still on its way.
        if self.below(8) > 0 {
            self.to_svm.clear();
            self.to_pvm.clear();
        }
        let ended = if self.below(8) == 0 {
            self.tally.aborts += 1;
            self.call("abort", |path, pool, now_us| {
                path.abort(now_us, pool, epoch)
            })
        } else {
            self.tally.commits += 1;
            self.tally.commits_mute += u64::from(self.is_mute);
            self.call("commit", |path, pool, now_us| {
                path.commit(now_us, pool, epoch)
            })
        };
        ended.unwrap();
    }

    pub(super) fn mute_or_unmute(&mut self) {
        if !self.is_mute {
            self.is_mute = self.below(4) == 0;
            if self.is_mute {
                self.call("mute", |path, _, _| path.mute());
            }
        } else {
            self.call("unmute", |path, pool, now_us| path.unmute(now_us, pool));
            self.is_mute = false;
            self.tally.unmutes += 1;
        }
    }

    pub(super) fn change_roles(&mut self) {
        if !self.is_paired {
            if self.below(4) == 0 {
                self.inherit();
            }
            let epoch = self.call("pair", |path, _, now_us| path.pair(now_us));
            (self.in_flight, self.input_seq) = (Some(epoch.unwrap()), 0);
            self.is_paired = true;
            self.tally.pairs += 1;
        } else if self.below(12) == 0 {
            self.call("go_alone", |path, pool, now_us| path.go_alone(now_us, pool));
            (self.is_paired, self.is_mute, self.in_flight) = (false, false, None);
            self.tally.alone += 1;
        } else if self.below(6) == 0 && self.in_flight.is_none() {
            let epoch = self.call("pair_again", |path, pool, now_us| {
                path.pair_again(now_us, pool)
            });
            (self.in_flight, self.input_seq) = (Some(epoch.unwrap()), 0);
            self.tally.pairs_again += 1;
        }
    }

    pub(super) fn announce(&mut self) {
        self.call("set_guest_mac", |path, _, _| {
            path.set_guest_mac([2, 0, 0, 0, 0, 1]);
            path.announce();
        });
        let mut frame = [0; ANNOUNCEMENT_MAX];
        while let Some(len) = self.call("poll_announcement", |path, _, now_us| {
            path.poll_announcement(now_us, &mut frame)
        }) {
            assert!(len >= 60);
            self.tally.announcements += 1;
        }
    }

    pub(super) fn look(&mut self) {
        self.export.clear();
        let mut export = std::mem::take(&mut self.export);
        self.call("export_client_xlate", |path, _, _| {
            path.export_client_xlate(&mut export);
            assert_eq!(export.len(), path.xlate_record_len());
        });
        self.export = export;
        self.call("next_deadline", |path, _, _| path.next_deadline());
        let token = self.call("poll_deliver", |path, pool, now_us| {
            path.poll_deliver(now_us, pool)
        });
        assert_eq!(token, None);
    }
}
