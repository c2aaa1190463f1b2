//! Checkpoints: capture and transfer on the primary, stage and apply on the secondary, takeover.
//!
//! Invariant: what is applied is exactly what was captured, and who resumes does so from where it stopped; the *all or
//! nothing* checker stands here.

use super::*;

impl Shell<'_> {
    pub(super) fn capture(&mut self, epoch: u64, first: bool) {
        let attached = self.primary().is_some_and(|side| side.packets.is_some());
        let refused = !attached || self.failure(self.world.plan.capture_failures);
        if refused {
            let reason = "capture failed".into();
            self.tell_primary_core(PrimaryEvent::CheckpointFailed { epoch, reason });
            return;
        }
        self.p.runs = false;
        self.take_guest_output();
        let now = self.local_us();
        let p = &mut *self.p;
        let (Role::Primary(side), Some(guest)) = (&mut p.role, &p.guest) else {
            return;
        };
        let cut = match first {
            true => side.path.pair_again(now, &mut p.frames),
            false => side.path.cut(now),
        };
        if cut != Ok(epoch) {
            let text = format!("the core cuts epoch {epoch}, the path says {cut:?}");
            return self.fail("protocol", text);
        }
        side.mirrors = true;
        let mut record = Vec::new();
        side.path.export_client_xlate(&mut record);
        let pending = side
            .path
            .pending()
            .map(|f| p.frames.bytes(f.token).to_vec())
            .collect();
        let guest = guest.clone();
        let digest = guest.digest();
        let image = Rc::new(Image {
            epoch,
            guest,
            digest,
            pending,
            record,
        });
        self.pass("cut");
        let pause = self.below(self.world.plan.pause_us);
        let at = self.world.now + pause;
        let event = HostEvent::Command(Command::Captured { epoch, image });
        self.world.host_event(at, self.host, self.p.inc, event);
    }

    pub(super) fn captured(&mut self, epoch: u64, image: Rc<Image>) {
        self.p.runs = true;
        self.pass("captured");
        self.tell_primary_core(PrimaryEvent::Captured { epoch });
        let of = 1 + self.below(self.world.plan.chunks);
        if self.p.link.is_some()
            && let Some(side) = self.primary()
            && side.path.mode() != Mode::Alone
        {
            side.sending = Some((image, 0, of));
            self.plan_chunk();
        }
    }

    pub(super) fn plan_chunk(&mut self) {
        let at = self.world.now + self.below(800);
        self.world
            .host_event(at, self.host, self.p.inc, HostEvent::SendChunk);
    }

    pub(super) fn send_chunk(&mut self) {
        let fails = self.failure(self.world.plan.capture_failures / 4);
        let Some(link) = self.p.link else { return };
        let Some(side) = self.primary() else { return };
        let Some((image, index, of)) = side.sending.take() else {
            return;
        };
        let epoch = image.epoch;
        if fails {
            let reason = "transfer failed".into();
            self.tell_primary_core(PrimaryEvent::CheckpointFailed { epoch, reason });
            return;
        }
        let msg = LinkMsg::Chunk {
            index,
            of,
            image: image.clone(),
        };
        if index + 1 < of {
            side.sending = Some((image, index + 1, of));
            self.plan_chunk();
        } else {
            self.tell_primary_core(PrimaryEvent::Sent { epoch });
        }
        self.world.link_send(link, self.host, Channel::Pages, msg);
        self.pass(if index + 1 < of { "chunk_sent" } else { "sent" });
    }

    pub(super) fn commit(&mut self, now: u64, epoch: u64) {
        self.pass("commit");
        if !self.p.alive {
            return;
        }
        if self.mutated(Mutation::NeverCommit) {
            return;
        }
        let p = &mut *self.p;
        if let Role::Primary(side) = &mut p.role {
            match side.path.commit(now, &mut p.frames, epoch) {
                Ok(()) => self.world.outcome.commits += 1,
                Err(e) => self.fail("protocol", format!("commit: {e}")),
            }
        }
    }

    pub(super) fn receive_chunk(&mut self, index: u64, of: u64, image: Rc<Image>) {
        self.pass("chunk_received");
        let fails = self.failure(self.world.plan.stage_failures);
        let half = self.mutated(Mutation::ApplyHalf);
        if !self.p.alive {
            return;
        }
        if half && let Some(guest) = &mut self.p.guest {
            guest.mix(&image.guest);
        }
        let Some(side) = self.secondary() else { return };
        let epoch = image.epoch;
        let expected = match &side.arriving {
            Some((before, n)) if Rc::ptr_eq(before, &image) => *n,
            _ => 0,
        };
        if index != expected {
            return; // the rest of a checkpoint whose beginning was thrown away
        }
        side.arriving = Some((image.clone(), index + 1));
        if index + 1 < of {
            return;
        }
        side.arriving = None;
        let record = side.path.check_record(&image.record);
        if fails || record.is_err() {
            let reason = "refused".into();
            return self.secondary_core(SecondaryEvent::StageFailed { epoch, reason });
        }
        side.staged = Some(image);
        self.secondary_core(SecondaryEvent::Staged { epoch });
        self.pass("staged");
    }

    pub(super) fn stop_svm(&mut self, epoch: u64) {
        self.pass("stop_svm_received");
        self.p.runs = false;
        self.take_guest_output();
        let Some(guest) = &self.p.guest else { return };
        let digest = guest.digest();
        let Some(side) = self.secondary() else { return };
        side.path.stop();
        side.stopped = true;
        side.digest_at_stop = Some(digest);
        self.secondary_path_actions();
        self.secondary_core(SecondaryEvent::SvmStopped {
            epoch,
            dirty: Vec::new(),
        });
    }

    pub(super) fn apply(&mut self, epoch: u64) {
        let now = self.local_us();
        let p = &mut *self.p;
        let Role::Secondary(side) = &mut p.role else {
            return;
        };
        let Some(image) = side.staged.take() else {
            return self.fail(
                "all or nothing",
                format!("epoch {epoch} is applied without a stage"),
            );
        };
        let pending = image
            .pending
            .iter()
            .filter_map(|f| p.frames.insert(f))
            .collect::<Vec<_>>();
        let result = side
            .path
            .commit(now, &mut p.frames, image.epoch, pending, &image.record);
        p.guest = Some(image.guest.clone());
        p.runs = true;
        (side.stopped, side.digest_at_stop) = (false, None);
        let digest = p.guest.as_ref().map(Guest::digest);
        if image.epoch != epoch || digest != Some(image.digest) {
            self.fail(
                "all or nothing",
                format!("epoch {epoch}: not what was captured"),
            );
        }
        if let Err(e) = result {
            return self.fail("protocol", format!("commit on the secondary: {e}"));
        }
        self.secondary_core(SecondaryEvent::Applied { epoch });
        self.pass("applied");
    }

    pub(super) fn resume_unchanged(&mut self) {
        let digest = self.p.guest.as_ref().map(Guest::digest);
        let Some(side) = self.secondary() else { return };
        side.path.resume_unchanged();
        (side.stopped, side.staged, side.arriving) = (false, None, None);
        let unchanged = side
            .digest_at_stop
            .is_none_or(|before| digest == Some(before));
        side.digest_at_stop = None;
        self.p.runs = true;
        if !unchanged {
            self.fail(
                "all or nothing",
                "the SVM goes on from another state than it stopped in".into(),
            );
        }
    }

    pub(super) fn take_over(&mut self, generation: u64) {
        let now = self.local_us();
        let p = &mut *self.p;
        let side = match std::mem::replace(&mut p.role, Role::None) {
            Role::Secondary(side) => side,
            other => {
                p.role = other;
                return;
            }
        };
        if let Some(link) = side.link {
            self.world.close(link, self.host, true);
        }
        let mut path = side.path.take_over(now, &mut p.frames);
        path.set_digest_key(self.world.plan.digest_key());
        let record = Record {
            generation,
            holder: NAMES[self.host].into(),
            standing: Standing::Alone,
        };
        let primary = PrimarySide::new(&self.world.plan, self.host, path, record);
        p.role = Role::Primary(Box::new(primary));
        p.link = None;
        self.world.outcome.takeovers += 1;
        self.pass("took_over");
    }
}
