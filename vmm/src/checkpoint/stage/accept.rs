//! The secondary's side of the commit point: is what has come a checkpoint that can be applied?
//!
//! Invariants: everything that can be refused is parsed and checked here, before anything is applied (rule 13); nothing here
//! changes what the guest can see.
//!
//! Does not apply.

use std::time::Instant;

use super::apply::on_each;
use super::{StageError, StageThread};
use crate::checkpoint::audit::Summary;
use crate::checkpoint::pending;
use crate::checkpoint::staging::StagingError;
use crate::checkpoint::states::{StateKind, of_kind};
use crate::machine::record::RecordError;
use crate::machine::{MachineError, VcpuState};

/// A checkpoint that was accepted: everything that can be refused has been parsed.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) epoch: u64,
    /// When it began to come in: the capture was before that.
    pub(super) begun: Instant,
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) platform: Vec<u8>,
    pub(super) devices: Vec<u8>,
    /// What the primary captured, in digests.
    pub(super) audit: Option<Summary>,
    /// What each shard gets.
    pub(super) shards: Vec<ShardState>,
}

/// The packet side of a checkpoint, of one shard.
#[derive(Debug, Clone)]
pub(super) struct ShardState {
    pub(super) translations: Vec<u8>,
    pub(super) pending: Vec<Vec<u8>>,
}

impl StageThread {
    /// Has the writes of a machine that has never run logged, for KVM may refuse that, and from the commit point on there is no
    /// way back. What is logged until the first checkpoint is applied is forgotten then.
    pub(super) fn log_writes(&self) -> Result<(), StageError> {
        if self.live || self.machine.logs_dirty_pages() {
            return Ok(());
        }
        Ok(self.machine.set_dirty_logging(true)?)
    }

    /// Parses and checks everything that can be refused (rule 13).
    pub(super) fn accept(&mut self, epoch: u64, begun: Instant) -> Result<Accepted, StageError> {
        if let Some(&number) = self
            .area
            .named()
            .iter()
            .find(|&&n| self.staging.has(n.into()))
        {
            let number = number.into();
            return Err(StagingError::Twice { number }.into());
        }
        let states = self.staging.take_states()?;
        let known = [
            StateKind::Vcpu,
            StateKind::Devices,
            StateKind::Translations,
            StateKind::Pending,
            StateKind::Platform,
            StateKind::Audit,
        ];
        if let Some(odd) = states
            .iter()
            .find(|s| !known.iter().any(|&k| k as u16 == s.kind))
        {
            return Err(StageError::UnknownKind(odd.kind));
        }
        let exactly = |what, kind, expected: usize| {
            let records: Vec<_> = of_kind(&states, kind).collect();
            match records.len() {
                found if found == expected => Ok(records),
                found => Err(StageError::Count {
                    what,
                    found,
                    expected,
                }),
            }
        };
        let vcpus = exactly("vCPU", StateKind::Vcpu, self.machine.vcpu_count())?;
        let vcpus = vcpus
            .into_iter()
            .map(VcpuState::from_bytes)
            .collect::<Result<Vec<_>, _>>();
        let vcpus = vcpus.map_err(MachineError::from)?;
        self.machine.check_vcpus(&vcpus)?;
        let platform = exactly("platform", StateKind::Platform, 1)?[0].to_vec();
        self.machine.check_platform(&platform)?;
        let devices = exactly("device", StateKind::Devices, 1)?[0].to_vec();
        self.machine.check_devices(&devices)?;
        let shards = self.machine.workers().len();
        let translations = exactly("translation", StateKind::Translations, shards)?;
        let pending = exactly("pending output", StateKind::Pending, shards)?;
        let shards = translations
            .into_iter()
            .zip(pending)
            .map(|(translations, pending)| {
                Ok(ShardState {
                    translations: translations.to_vec(),
                    pending: pending::from_bytes(pending)?,
                })
            })
            .collect::<Result<Vec<_>, RecordError>>()
            .map_err(MachineError::from)?;
        on_each(&self.machine, shards.clone(), |role, edge, shard| {
            role.check(edge, &shard.pending, &shard.translations)
        })?;
        let audit = of_kind(&states, StateKind::Audit).next();
        let audit = audit.map(Summary::from_bytes).transpose();
        Ok(Accepted {
            audit: audit.map_err(MachineError::from)?,
            epoch,
            begun,
            vcpus,
            platform,
            devices,
            shards,
        })
    }
}
