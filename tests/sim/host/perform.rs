//! Doing what the cores say, and feeding the guest.
//!
//! Invariant: nothing is done that no core asked for, save by a mutation.

use super::*;

impl Shell<'_> {
    pub(super) fn pump(&mut self) {
        self.core_timeout();
        self.path_timeout();
        for round in 0.. {
            if round > MOST_ROUNDS {
                self.fail("liveness", "the paths do not come to rest".into());
                break;
            }
            let mut busy = self.core_actions();
            busy |= self.take_guest_output() > 0;
            busy |= self.give_guest_input() > 0;
            busy |= self.primary_path_actions();
            busy |= self.secondary_path_actions();
            if !busy || !self.p.alive {
                break;
            }
        }
        if self.p.alive {
            self.announce();
        }
    }

    pub(super) fn core_timeout(&mut self) {
        let now = self.local_us();
        match &mut self.p.role {
            Role::Primary(side) if side.core.next_deadline().is_some_and(|at| at <= now) => {
                side.core.handle_timeout(now);
            }
            Role::Secondary(side) if side.core.next_deadline().is_some_and(|at| at <= now) => {
                side.core.handle_timeout(now);
            }
            _ => {}
        }
    }

    pub(super) fn path_timeout(&mut self) {
        let now = self.local_us();
        let p = &mut *self.p;
        if let Role::Primary(side) = &mut p.role
            && side.path.next_deadline().is_some_and(|at| at <= now)
        {
            side.path.handle_timeout(now, &mut p.frames);
        }
    }

    pub(super) fn core_actions(&mut self) -> bool {
        let mut busy = false;
        while self.p.alive {
            let action = match &mut self.p.role {
                Role::Primary(side) => side.core.poll_action(),
                Role::Secondary(side) => side.core.poll_action(),
                Role::None => None,
            };
            let Some(action) = action else { break };
            busy = true;
            self.act(action);
        }
        busy
    }

    pub(super) fn act(&mut self, action: Action) {
        if !matches!(action, Action::Send(_) | Action::Lease { .. }) {
            self.trace(|| format!("must {action:?}"));
        }
        match action {
            Action::Send(msg) => self.send_control(&msg),
            Action::Arbiter(cas) => self.ask(cas),
            Action::StartSync => {
                if let Some(link) = self.p.link {
                    self.tell_worker(Command::Attach(link), 200);
                }
                self.tell_worker(Command::SyncRound { first: true }, 200);
            }
            Action::SyncRound => self.tell_worker(Command::SyncRound { first: false }, 200),
            Action::Capture {
                epoch,
                first,
                svm_dirty,
                buffer,
            } => {
                let mut bytes = [0; PAGES / 8];
                bytes[..svm_dirty.len()].copy_from_slice(&svm_dirty);
                let svm_dirty = u64::from_le_bytes(bytes);
                let order = CaptureOrder {
                    epoch,
                    first,
                    svm_dirty,
                    buffer,
                };
                self.tell_worker(Command::Capture(order), 300);
            }
            Action::Throttle { run_pct } => self.p.run_pct = u64::from(run_pct),
            Action::Tell(notice) => self.tell(&notice),
            Action::Discard { .. } => {
                if let Some(side) = self.secondary() {
                    side.staged = None;
                }
                self.read_behind();
            }
            Action::Commit { epoch } => self.tell_worker(Command::Commit { epoch }, 200),
            Action::Abort { epoch } => match self.p.role {
                Role::Primary(_) => self.tell_worker(Command::Abort { epoch }, 200),
                _ => self.resume_unchanged(),
            },
            Action::Detach => self.tell_worker(Command::Detach, 200),
            Action::GoAlone => self.tell_worker(Command::GoAlone, 200),
            Action::Mute(mute) => {
                let gaps = self.primary().map_or(0, |side| side.gaps_told);
                self.tell_worker(Command::Mute(mute, gaps), 200);
            }
            Action::Lease { until_us } => self.tell_worker(Command::Lease(until_us), 200),
            Action::CloseLink { .. } => self.close_link(),
            Action::StopSvm { epoch } => self.stop_svm(epoch),
            Action::Apply { epoch, halt } => {
                let most_us = self.world.plan.pause_us;
                self.tell_worker(Command::Apply { epoch, halt }, most_us);
            }
            Action::TakeOver { generation } => self.take_over(generation),
            Action::Stop(outcome) => {
                self.close_link();
                self.p.die();
                self.world.ended(self.host, &outcome);
            }
        }
    }

    fn tell(&mut self, notice: &Notice) {
        self.world.outcome.notice(notice);
        if let Notice::StepTimedOut {
            step: Step::Send | Step::Begin | Step::Commit,
            ..
        } = notice
        {
            self.shut_streams();
        }
    }

    pub(super) fn ask(&mut self, cas: Cas) {
        let (host, inc) = (self.host, self.p.inc);
        if let Cas::Swap {
            standing, holder, ..
        } = &cas
        {
            let is_primary = matches!(self.p.role, Role::Primary(_));
            let unasked = match is_primary {
                true => self.mutated(Mutation::GoAloneUnasked) && *standing == Standing::Alone,
                false => self.mutated(Mutation::TakeOverUnasked),
            };
            let primary_step = self.world.hosts[1 - host].step;
            if let Some(side) = self.secondary() {
                let steps = [primary_step, side.core.step()];
                side.proposed_at.get_or_insert(steps);
            }
            self.pass(if is_primary {
                "paired_asked"
            } else {
                "take_over_asked"
            });
            if !is_primary && self.mutated(Mutation::GiveUp) {
                let record = self.world.record.clone();
                return self.world.reply(host, inc, 10, Reply::Lost(record));
            }
            if unasked {
                let (holder, standing) = (holder.clone(), *standing);
                let record = Record {
                    generation: 1_000_000,
                    holder,
                    standing,
                };
                return self.world.reply(host, inc, 10, Reply::Won(record));
            }
        }
        self.world.ask(host, inc, cas);
    }

    pub(super) fn primary_path_actions(&mut self) -> bool {
        let mut busy = false;
        while self.p.alive {
            let Some(action) = self.primary().and_then(|side| side.path.poll_action()) else {
                break;
            };
            busy = true;
            match action {
                PathAction::Release {
                    token,
                    right,
                    held_us,
                } => {
                    self.answered(right, held_us);
                    let frame = self.p.frames.take(token);
                    self.world
                        .trace(|| format!("out {right:?} {}", show(&frame)));
                    self.world.outcome.matches += u64::from(right == colo_compare::Right::Match);
                    self.world.nic_frame(self.host, &frame);
                    self.pass("released");
                }
                PathAction::Mirror {
                    epoch,
                    input_seq,
                    token,
                } => {
                    let frame = self.p.frames.take(token);
                    if self.primary().is_some_and(|side| side.mirrors) {
                        let msg = LinkMsg::Input {
                            epoch,
                            seq: input_seq,
                            frame,
                        };
                        self.send(Channel::Packets, msg);
                    }
                    self.pass("mirrored");
                    if self.mutated(Mutation::AckUnkept) {
                        let now = self.local_us();
                        let p = &mut *self.p;
                        if let Role::Primary(side) = &mut p.role {
                            side.path.handle_input_ack(now, &mut p.frames, input_seq);
                        }
                    }
                }
                PathAction::SvmReleased { svm_seq } => {
                    self.send(Channel::Packets, LinkMsg::Released { seq: svm_seq });
                }
                PathAction::Fetch { svm_seq } => {
                    self.world.outcome.fetched += 1;
                    self.send(Channel::Packets, LinkMsg::Fetch { seq: svm_seq });
                }
                PathAction::PendingReleased { epoch } => {
                    self.send(Channel::Packets, LinkMsg::PendingReleased { epoch });
                }
                PathAction::Checkpoint(divergence) => {
                    self.waited_in_vain(divergence.cause);
                    self.trace(|| format!("wants a checkpoint: {divergence:?}"));
                    self.tell_primary_core(PrimaryEvent::CheckpointWanted);
                }
            }
        }
        busy
    }

    /// Rule 16: checkpoints are no lag, nor what the SVM had not caught up with before.
    fn answered(&mut self, right: colo_compare::Right, held_us: u64) {
        let now = self.local_us();
        if let Some(side) = self.primary()
            && right == colo_compare::Right::Match
            && let Some(could_us) = now.checked_sub(side.late_since_us)
        {
            side.answers.0 += 1;
            side.answers.1 += held_us.min(could_us);
        }
    }

    fn waited_in_vain(&mut self, cause: colo_compare::Cause) {
        let limits = self.world.plan.limits;
        let late_us = match cause {
            colo_compare::Cause::Deadline => limits.compare_deadline_us,
            colo_compare::Cause::Lag => limits.lag_deadline_us,
            _ => return,
        };
        if let Some(side) = self.primary() {
            side.answers.0 += 1;
            side.answers.1 += late_us;
        }
    }

    pub(super) fn secondary_path_actions(&mut self) -> bool {
        let mut busy = false;
        while self.p.alive {
            let p = &mut *self.p;
            let Role::Secondary(side) = &mut p.role else {
                break;
            };
            let Some(action) = side.path.poll_action() else {
                break;
            };
            busy = true;
            let msg = match action {
                SecondaryAction::AckInput { up_to } => LinkMsg::InputAck { up_to },
                SecondaryAction::SendOutput { epoch, svm_seq } => {
                    let Some(token) = side.path.output(svm_seq) else {
                        continue;
                    };
                    let frame = p.frames.bytes(token).to_vec();
                    LinkMsg::Output {
                        epoch,
                        seq: svm_seq,
                        frame,
                    }
                }
                SecondaryAction::SendDigest {
                    epoch,
                    svm_seq,
                    header_len,
                    payload_len,
                    digest,
                } => {
                    let Some(token) = side.path.output(svm_seq) else {
                        continue;
                    };
                    let headers = p.frames.bytes(token)[..usize::from(header_len)].to_vec();
                    self.world.outcome.digests += 1;
                    LinkMsg::Digest {
                        epoch,
                        seq: svm_seq,
                        headers,
                        payload_len,
                        digest,
                    }
                }
                SecondaryAction::CaughtUp { epoch } => LinkMsg::CaughtUp { epoch },
                SecondaryAction::RequestCheckpoint(_) => LinkMsg::CheckpointWanted,
            };
            let point = matches!(msg, LinkMsg::Output { .. } | LinkMsg::Digest { .. });
            self.send(Channel::Packets, msg);
            if point {
                self.pass("output_sent");
            }
        }
        busy
    }

    /// Announcements of a takeover.
    pub(super) fn announce(&mut self) {
        let now = self.local_us();
        let mut frame = [0; ANNOUNCEMENT_MAX];
        while let Some(len) = self
            .primary()
            .and_then(|side| side.path.poll_announcement(now, &mut frame))
        {
            self.world.nic_frame(self.host, &frame[..len]);
        }
    }

    pub(super) fn wake_guest(&mut self) {
        self.p.wake_planned = false;
        if !self.p.runs || self.p.run_pct == 0 {
            return;
        }
        if self.secondary().is_some_and(|side| side.core.is_halted()) {
            self.fail("protocol", "an SVM that is to stand still runs".into());
        }
        let now = self.world.now;
        let chance = &mut self.world.hosts[self.host].chance;
        if let Some(guest) = &mut self.p.guest {
            guest.wake(now, chance);
            if let Some(text) = guest.complaint().cloned() {
                self.fail("output commit", format!("the guest sees: {text}"));
            }
        }
    }

    pub(super) fn take_guest_output(&mut self) -> usize {
        let now = self.local_us();
        let ignore_room = self.mutated(Mutation::IgnoreRoom);
        let p = &mut *self.p;
        let Some(guest) = &mut p.guest else { return 0 };
        let mut n = 0;
        while !guest.state.sent.is_empty() {
            let room = match &p.role {
                Role::Primary(side) => side.path.room() || ignore_room,
                Role::Secondary(side) => side.path.room() && !side.stopped,
                Role::None => false,
            };
            if !room {
                break;
            }
            let Some(frame) = guest.state.sent.pop_front() else {
                break;
            };
            let Some(token) = p.frames.insert(&frame) else {
                break;
            };
            n += 1;
            self.world
                .trace(|| format!("{} tx {}", NAMES[self.host], show(&frame)));
            match &mut p.role {
                Role::Primary(side) => side.path.handle_guest_tx(now, &mut p.frames, token),
                Role::Secondary(side) => side.path.handle_guest_tx(now, &mut p.frames, token),
                Role::None => {}
            }
        }
        n
    }

    pub(super) fn give_guest_input(&mut self) -> usize {
        let now = self.local_us();
        let p = &mut *self.p;
        let Some(guest) = &mut p.guest else { return 0 };
        let mut n = 0;
        match &mut p.role {
            // A captured guest's ring must not change under the capture.
            Role::Primary(side) if p.runs => {
                while guest.has_room() && side.path.nic_room() {
                    let token = match side.path.poll_deliver(now, &mut p.frames) {
                        Some(token) => token,
                        None => {
                            let Some(frame) = side.nic.pop_front() else {
                                break;
                            };
                            let Some(token) = p.frames.insert(&frame) else {
                                break;
                            };
                            side.path.handle_nic(now, &mut p.frames, token)
                        }
                    };
                    guest.deliver(p.frames.bytes(&token).to_vec());
                    side.path.handle_delivered(now, &mut p.frames, token);
                    n += 1;
                }
            }
            Role::Secondary(side) if !side.stopped => {
                while guest.has_room() {
                    let Some(token) = side.path.poll_deliver(now, &mut p.frames) else {
                        break;
                    };
                    let frame = p.frames.take(token);
                    guest.deliver(frame);
                    n += 1;
                }
            }
            _ => {}
        }
        n
    }
}
