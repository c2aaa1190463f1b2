//! Checkpoints: capture and transfer on the primary, stage and apply on the secondary, takeover.
//!
//! Invariant: what is applied is exactly what was captured, and who resumes does so from where it stopped; the *all or
//! nothing* checker stands here.

use super::*;

impl Shell<'_> {
    /// Some steps never end by themselves.
    pub(super) fn gets_stuck(&mut self) -> bool {
        let stuck = self.failure(self.world.plan.stuck_steps);
        if stuck {
            self.trace(|| "is stuck".into());
        }
        stuck
    }

    pub(super) fn sync_round(&mut self, first: bool) {
        if !self.p.runs {
            // The checkpoint thread ends a capture first, also one for a secondary that is lost.
            let event = HostEvent::Command(Command::SyncRound { first });
            let at = self.world.now + 500;
            return self.world.host_event(at, self.host, self.p.inc, event);
        }
        let stuck = self.gets_stuck();
        let p = &mut *self.p;
        let (Role::Primary(side), Some(guest), Some(_)) = (&mut p.role, &mut p.guest, p.link)
        else {
            return;
        };
        if first {
            (side.in_flight, side.carry, guest.dirty) = (0, 0, u64::MAX);
            self.prepare_ahead();
        }
        let p = &mut *self.p;
        let Some(guest) = &mut p.guest else { return };
        if stuck {
            return;
        }
        let set = std::mem::take(&mut guest.dirty);
        let pages = Rc::new(guest.pages(set));
        if !self.send_pages(PageMsg::Live(pages)) {
            // Nothing tells which live pages have come.
            self.world.outcome.syncs_torn += 1;
            return self.pages_gone("torn");
        }
        self.pass("live_sent");
        let took_us = 200 + self.below(20_000);
        let event = HostEvent::RoundSent {
            sent_pages: u64::from(set.count_ones()),
            took_us,
        };
        let at = self.world.now + took_us;
        self.world.host_event(at, self.host, self.p.inc, event);
    }

    pub(super) fn round_sent(&mut self, sent_pages: u64, took_us: u64) {
        let dirty = self.p.guest.as_ref().map_or(0, |g| g.dirty.count_ones());
        self.tell_primary_core(PrimaryEvent::SyncRound {
            sent_pages,
            dirty_pages: u64::from(dirty),
            took_us,
        });
    }

    pub(super) fn receive_live(&mut self, pages: &PageSet) {
        if let Some(side) = self.secondary() {
            side.live.write_pages(pages);
        }
        self.pass("live_received");
    }

    pub(super) fn capture(&mut self, order: CaptureOrder) {
        if self.waits_for_streams(order) {
            return;
        }
        let CaptureOrder {
            epoch,
            first,
            svm_dirty,
            buffer,
        } = order;
        let attached = self.primary().and_then(|side| side.packets);
        let refused = self.failure(self.world.plan.capture_failures);
        let Some(link) = attached.filter(|_| !refused) else {
            return self.capture_failed(epoch);
        };
        self.p.runs = false;
        self.take_guest_output();
        let now = self.local_us();
        let pvm_only = self.mutated(Mutation::PvmDirtyOnly);
        let p = &mut *self.p;
        let (Role::Primary(side), Some(guest)) = (&mut p.role, &mut p.guest) else {
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
        side.path.buffer(buffer);
        side.mirrors = true;
        // Rule 11: the union, and rule 14: what an aborted checkpoint had.
        let svm_dirty = if pvm_only { 0 } else { svm_dirty };
        let written = std::mem::take(&mut guest.dirty);
        let set = written | std::mem::take(&mut side.carry) | svm_dirty;
        side.in_flight = set;
        let (kept, names) = self.cut_ahead(set, written);
        let p = &mut *self.p;
        let (Role::Primary(side), Some(guest)) = (&mut p.role, &mut p.guest) else {
            return;
        };
        let mut record = Vec::new();
        side.path.export_client_xlate(&mut record);
        let pending = side
            .path
            .pending()
            .map(|f| p.frames.bytes(f.token).to_vec())
            .collect();
        let image = Rc::new(Image {
            link,
            epoch,
            pages: guest.pages(kept),
            names,
            state: guest.state.clone(),
            digest: guest.digest(),
            pending,
            record,
        });
        self.pass("cut");
        let slow_us = if self.gets_stuck() { 60_000 } else { 0 };
        let pause = self.below(self.world.plan.pause_us) + self.below(slow_us + 1);
        let at = self.world.now + pause;
        let event = HostEvent::Command(Command::Captured { epoch, image });
        self.world.host_event(at, self.host, self.p.inc, event);
    }

    pub(super) fn capture_failed(&mut self, epoch: u64) {
        let reason = "capture failed".into();
        self.tell_primary_core(PrimaryEvent::CheckpointFailed { epoch, reason });
    }

    pub(super) fn captured(&mut self, epoch: u64, image: Rc<Image>) {
        self.p.runs = true;
        self.pass("captured");
        self.tell_primary_core(PrimaryEvent::Captured { epoch });
        if self.failure(self.world.plan.capture_failures / 2) {
            return self.capture_failed(epoch);
        }
        let of = 1 + self.below(self.world.plan.chunks);
        if self.p.link == Some(image.link)
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
        let stuck = self.gets_stuck();
        if self.p.link.is_none() {
            return;
        }
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
        if stuck {
            return;
        }
        let image = match index == 0 && self.mutated(Mutation::PagesAtSend) {
            true => self.read_again(&image),
            false => image,
        };
        let msg = PageMsg::Chunk {
            index,
            of,
            image: image.clone(),
        };
        if !self.send_pages(msg) {
            return self.capture_failed(epoch);
        }
        let Some(side) = self.primary() else { return };
        if index + 1 < of {
            side.sending = Some((image, index + 1, of));
            self.plan_chunk();
        } else {
            self.count_written_meanwhile(&image);
            self.tell_primary_core(PrimaryEvent::Sent { epoch });
            if self.mutated(Mutation::CommitAtSend) {
                self.commit_path(self.local_us(), epoch);
            }
        }
        self.pass(if index + 1 < of { "chunk_sent" } else { "sent" });
    }

    /// By mistake, the image with its pages as they are now.
    fn read_again(&self, image: &Rc<Image>) -> Rc<Image> {
        let Some(guest) = &self.p.guest else {
            return image.clone();
        };
        let mut late = Image::clone(image);
        late.pages = guest.pages(late.page_set());
        Rc::new(late)
    }

    /// What the guest wrote since it runs again and the image had to keep as it was.
    fn count_written_meanwhile(&mut self, image: &Image) {
        let (Role::Primary(side), Some(guest)) = (&self.p.role, &self.p.guest) else {
            return;
        };
        let written = (guest.dirty | side.carry) & image.page_set();
        self.world.outcome.written_meanwhile += u64::from(written.count_ones());
    }

    pub(super) fn commit(&mut self, now: u64, epoch: u64) {
        self.pass("commit");
        if !self.p.alive {
            return;
        }
        if !self.mutated(Mutation::NeverCommit) && !self.mutated(Mutation::CommitAtSend) {
            self.commit_path(now, epoch);
        }
    }

    fn commit_path(&mut self, now: u64, epoch: u64) {
        let p = &mut *self.p;
        if let Role::Primary(side) = &mut p.role {
            side.in_flight = 0;
            side.late_since_us = now + 10_000;
            self.world.outcome.buffered += u64::from(side.path.is_buffering());
            match side.path.commit(now, &mut p.frames, epoch) {
                Ok(()) => self.world.outcome.commits += 1,
                Err(e) => self.fail("protocol", format!("commit: {e}")),
            }
        }
        self.rest_ahead();
    }

    pub(super) fn receive_chunk(&mut self, index: u64, of: u64, image: Rc<Image>) {
        self.pass("chunk_received");
        let fails = self.failure(self.world.plan.stage_failures);
        // Its first chunk is held up on the way, or what is to be done at its end.
        let held_up = index == 0 && self.gets_stuck();
        let stuck = index + 1 == of && self.gets_stuck();
        let half = self.mutated(Mutation::ApplyHalf);
        if !self.p.alive || held_up {
            return;
        }
        if half && let Some(guest) = &mut self.p.guest {
            guest.mix(&image.pages);
        }
        let Some(side) = self.secondary() else { return };
        let epoch = image.epoch;
        let goes_on = |before: &mut Arriving| before.is_stale || Rc::ptr_eq(&before.image, &image);
        let mut arriving = match side.arriving.take_if(goes_on) {
            Some(before) => before,
            None => Arriving::new(image.clone()),
        };
        if index != arriving.chunks && !arriving.is_stale {
            return; // the rest of a checkpoint whose beginning was thrown away
        }
        if index == 0 {
            side.core.note_begun(epoch);
        }
        arriving.add(index, of, &image);
        if arriving.chunks < of {
            side.arriving = Some(arriving);
            return;
        }
        side.arriving = None;
        if stuck {
            return;
        }
        let record = side.path.check_record(&image.record);
        let is_named = self.accepts_names(&image);
        if fails || record.is_err() || !is_named {
            let reason = "refused".into();
            return self.secondary_core(SecondaryEvent::StageFailed { epoch, reason });
        }
        if let Some(side) = self.secondary() {
            side.staged = Some(arriving);
        }
        self.secondary_core(SecondaryEvent::Staged { epoch });
        self.pass("staged");
    }

    pub(super) fn stop_svm(&mut self, epoch: u64) {
        self.pass("stop_svm_received");
        if self.gets_stuck() {
            return;
        }
        self.p.runs = self.mutated(Mutation::SvmRunsOn);
        self.take_guest_output();
        let Some(guest) = &self.p.guest else { return };
        let (digest, dirty) = (guest.digest(), guest.dirty.to_le_bytes().to_vec());
        let Some(side) = self.secondary() else { return };
        side.path.stop();
        side.stopped = true;
        side.digest_at_stop = Some(digest);
        self.secondary_path_actions();
        self.secondary_core(SecondaryEvent::SvmStopped { epoch, dirty });
    }

    pub(super) fn apply(&mut self, epoch: u64, halt: bool) {
        let now = self.local_us();
        let runs_halted = self.mutated(Mutation::RunHalted);
        let p = &mut *self.p;
        let Role::Secondary(side) = &mut p.role else {
            return;
        };
        let Some(Arriving { image, pages, .. }) = side.staged.take() else {
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
        let guest = p.guest.get_or_insert_with(|| side.live.clone());
        guest.write_pages(&pages);
        (guest.state, guest.dirty) = (image.state.clone(), 0);
        self.apply_named();
        let p = &mut *self.p;
        let (Role::Secondary(side), Some(guest)) = (&mut p.role, &mut p.guest) else {
            return;
        };
        let digest = guest.digest();
        let rests = halt && !runs_halted;
        (p.runs, side.stopped) = (!rests, rests);
        if rests {
            side.path.stop();
        }
        side.digest_at_stop = halt.then_some(digest);
        if image.epoch != epoch || digest != image.digest {
            self.fail(
                "all or nothing",
                format!("epoch {epoch}: not what was captured"),
            );
        }
        if let Err(e) = result {
            return self.fail("protocol", format!("commit on the secondary: {e}"));
        }
        self.streams_proved();
        self.read_behind();
        self.secondary_core(SecondaryEvent::Applied { epoch });
        self.pass("applied");
    }

    pub(super) fn resume_unchanged(&mut self) {
        let digest = self.p.guest.as_ref().map(Guest::digest);
        let Some(side) = self.secondary() else { return };
        side.path.resume_unchanged();
        (side.stopped, side.staged) = (false, None);
        side.forget_arriving();
        let unchanged = side
            .digest_at_stop
            .is_none_or(|before| digest == Some(before));
        side.digest_at_stop = None;
        self.read_behind();
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
        p.run_pct = 100;
        self.world.outcome.takeovers += 1;
        self.world.outcome.takeovers_without_streams += u64::from(p.has_broken_streams());
        p.streams = Streams::default();
        for step in side.proposed_at.into_iter().flatten().flatten() {
            self.world.outcome.takeovers_at[step.index()] += 1;
        }
        self.pass("took_over");
    }
}
