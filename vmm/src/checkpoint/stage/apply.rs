//! The secondary's way forward from the commit point: pages written, state loaded, the audit made, the SVM let go.
//!
//! Invariants: it begins only with what was accepted, and ends with the machine that the primary captured; an error leaves
//! a machine that nobody may run (rule 13); an image that the audit finds different is not run (rule 16).

use colo_fastpath::pair::{OnWorkers, PacketSide, SecondaryRole};
use colo_fastpath::worker::Edge;

use super::accept::Accepted;
use super::cost::Laps;
use super::{ApplyCost, ApplyParts, StageError, StageThread};
use crate::checkpoint::audit::{Image, PacketRecords, StateRecords, Summary};
use crate::checkpoint::pages::PageBitmap;
use crate::checkpoint::pending;
use crate::machine::{ClockJump, Machine};
use crate::testpoint::{Point, reached};

/// Differences that an audit names.
const DIFFERENCES_MAX: usize = 8;

impl StageThread {
    /// All of guest memory, in digests, before the worker may write to it.
    fn memory_image(&self) -> Result<Image, StageError> {
        let key = self.key.as_ref().ok_or(StageError::NoKey)?;
        Ok(Image::of_memory(0, key, self.machine.ram())?)
    }

    /// The machine's states added to what its memory is.
    fn machine_image(&self, memory: Image) -> Result<Image, StageError> {
        let key = self.key.as_ref().ok_or(StageError::NoKey)?;
        let machine = &self.machine;
        let (mut vcpus, mut platform) = (Vec::new(), Vec::new());
        machine.save_vcpu_records(&mut vcpus)?;
        machine.save_platform(&mut platform)?;
        let devices = machine.save_devices()?;
        machine.resume_workers()?;
        let records = StateRecords {
            vcpus: &vcpus,
            platform: &platform,
            devices: &devices,
        };
        Ok(memory.with_states(key, records)?)
    }

    /// Whether the machine, and the packet sides of its shards, are what the primary captured (rule 16).
    fn audit(
        &self,
        captured: &Summary,
        machine: Image,
        shards: Vec<Option<PacketSide>>,
    ) -> Result<(), StageError> {
        let key = self.key.as_ref().ok_or(StageError::NoKey)?;
        let shards: Vec<_> = shards
            .into_iter()
            .flatten()
            .map(|side| {
                let pending = pending::write_record(&side.pending, Vec::new());
                (side.translations, pending)
            })
            .collect();
        let records = shards.iter().map(|(translations, pending)| PacketRecords {
            translations,
            pending,
        });
        let image = machine.with_packets(key, &records.collect::<Vec<_>>())?;
        let differences = image.compare(key, captured, DIFFERENCES_MAX);
        if differences.is_empty() {
            return Ok(());
        }
        let named: Vec<_> = differences.iter().map(ToString::to_string).collect();
        Err(StageError::Different(named.join("; ")))
    }

    /// Makes the machine what was captured, and lets it run, or stand still there (`halt`).
    pub(super) fn apply(
        &mut self,
        accepted: Accepted,
        halt: bool,
    ) -> Result<ApplyCost, StageError> {
        reached(Point::CommitSent);
        let mut laps = Laps::start();
        let machine = &self.machine;
        self.live = true;
        // The worker looks at the rings even while its role stands still; half-written ones make no sense.
        machine.release_queues()?;
        self.staging.write_pages(machine.ram())?;
        self.area.write_named(machine.ram())?;
        reached(Point::PagesWritten);
        // What the apply wrote is what the primary has, so the SVM's dirty set starts empty here; whatever is written from
        // now on is not, and belongs to it.
        let mut forget = PageBitmap::new(machine.ram().page_count());
        machine.take_dirty(&mut forget)?;
        let write_us = laps.next_us();
        let memory = accepted.audit.as_ref().map(|_| self.memory_image());
        let memory = memory.transpose()?;
        let digest_us = laps.next_us();
        let jump = ClockJump::SinceCapture {
            begun: accepted.begun,
        };
        machine.restore_vcpus(&accepted.vcpus, jump)?;
        machine.restore_platform(&accepted.platform, jump)?;
        machine.restore_devices(&accepted.devices)?;
        let mut load_us = laps.next_us();
        let image = memory
            .map(|memory| self.machine_image(memory))
            .transpose()?;
        let mut audit_us = image.as_ref().map_or(0, |_| digest_us + laps.next_us());
        let (epoch, show) = (accepted.epoch, image.is_some());
        let shards = on_each(machine, accepted.shards, move |role, edge, shard| {
            role.commit(edge, epoch, &shard.pending, &shard.translations, show)
        })?;
        load_us += laps.next_us();
        if let (Some(captured), Some(image)) = (&accepted.audit, image) {
            self.audit(captured, image, shards)?;
            audit_us += laps.next_us();
        }
        reached(Point::Applied);
        let all = vec![(); machine.workers().len()];
        on_each(machine, all, move |role, _, ()| {
            match halt {
                true => role.halt(),
                false => role.start(),
            }
            Ok(())
        })?;
        if !halt {
            machine.resume_vcpus()?;
        }
        let resume_us = laps.next_us();
        let parts = ApplyParts {
            stage_us: 0,
            apply_us: laps.all_us(),
            write_us,
            load_us,
            audit_us,
            resume_us,
            pages: (self.staging.page_count() + self.area.named().len()) as u64,
        };
        Ok(ApplyCost {
            parts,
            area: self.area.counters(),
            channel: self.channel.counters(),
            staged: self.staging.counters(),
        })
    }
}

/// Runs `task` on the roles of all shards; the first refusal counts.
pub(super) fn on_each<I: Send + 'static, R: Send + 'static>(
    machine: &Machine,
    items: Vec<I>,
    task: impl Fn(&mut SecondaryRole, &mut Edge, I) -> Result<R, String> + Clone + Send + 'static,
) -> Result<Vec<R>, StageError> {
    let results = SecondaryRole::on_each(machine.workers(), items, task).ok_or(StageError::Role)?;
    let all: Result<Vec<R>, String> = results.into_iter().collect();
    all.map_err(StageError::Translations)
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
