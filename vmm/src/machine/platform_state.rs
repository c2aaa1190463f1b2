//! What belongs to the machine as a whole: kvmclock, and the interrupt controllers and the timer that
//! may be in the kernel.
//!
//! | section | holds |
//! |---|---|
//! | 1 | `kvm_clock_data`, and the wall clock when it was read (ns since 1970, 64 bits) |
//! | 2 | three `kvm_irqchip`: both PICs and the IOAPIC; only where they are in the kernel |
//! | 3 | `kvm_pit_state2`; only where it is in the kernel |
//!
//! Invariants: kvmclock goes forward at a restore, by the time that has passed, and never back (rule
//! 16); a record fits only a machine with the same parts in the kernel.
//!
//! Does not know the local APICs; each is part of its vCPU.

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::{Cap, VmFd};
use zerocopy::IntoBytes;

use super::clock::{Passed, realtime_ns};
use super::kvm::KvmError;
use super::record::{Kind, Reader, RecordError, Writer};

const KIND: Kind = Kind {
    name: "platform",
    magic: *b"CPLT",
    version: 1,
};
const CLOCK: u16 = 1;
const IRQCHIPS: u16 = 2;
const PIT: u16 = 3;

const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// What of a machine is in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PlatformShape {
    pub(super) irqchip: bool,
    pit: bool,
    /// KVM_SET_CLOCK takes the wall clock, and advances by what passes until it runs.
    clock_realtime: bool,
}

impl PlatformShape {
    /// Looks what there is.
    pub(super) fn probe(vm: &VmFd) -> Self {
        let mut chip = kvm_irqchip::default();
        let flags = vm.check_extension_int(Cap::AdjustClock);
        Self {
            irqchip: vm.get_irqchip(&mut chip).is_ok(),
            pit: vm.get_pit2().is_ok(),
            clock_realtime: flags > 0 && flags as u32 & KVM_CLOCK_REALTIME != 0,
        }
    }
}

/// The state of what is in the kernel once a machine.
#[derive(Clone)]
pub(super) struct PlatformState {
    clock: kvm_clock_data,
    realtime_ns: u64,
    chips: Option<[kvm_irqchip; 3]>,
    pit: Option<kvm_pit_state2>,
}

impl PlatformState {
    /// Reads it. All vCPUs stand still.
    pub(super) fn read(vm: &VmFd, shape: PlatformShape) -> Result<Self, KvmError> {
        let chips = shape.irqchip.then(|| read_chips(vm)).transpose()?;
        let pit = shape
            .pit
            .then(|| vm.get_pit2().map_err(KvmError::refused("read the PIT")))
            .transpose()?;
        let before_ns = realtime_ns();
        let clock = vm
            .get_clock()
            .map_err(KvmError::refused("read the kvmclock"))?;
        Ok(Self {
            // KVM's own pair of readings, where it gives one, belongs together exactly.
            realtime_ns: match clock.flags & KVM_CLOCK_REALTIME {
                0 => before_ns,
                _ => clock.realtime,
            },
            clock,
            chips,
            pit,
        })
    }

    /// Writes it; so much has passed since it was read. All vCPUs stand still.
    pub(super) fn write(
        &self,
        vm: &VmFd,
        shape: PlatformShape,
        passed: Passed,
    ) -> Result<(), KvmError> {
        for chip in self.chips.iter().flatten() {
            vm.set_irqchip(chip)
                .map_err(KvmError::refused("write the interrupt controllers"))?;
        }
        if let Some(pit) = &self.pit {
            vm.set_pit2(pit)
                .map_err(KvmError::refused("write the PIT"))?;
        }
        let wanted_ns = self.clock_after(passed.since_ns(self.realtime_ns));
        let present = vm
            .get_clock()
            .map_err(KvmError::refused("read the kvmclock"))?;
        if wanted_ns <= present.clock {
            return Ok(());
        }
        let mut clock = kvm_clock_data {
            clock: wanted_ns,
            ..Default::default()
        };
        if shape.clock_realtime {
            (clock.flags, clock.realtime) = (KVM_CLOCK_REALTIME, realtime_ns());
        }
        vm.set_clock(&clock)
            .map_err(KvmError::refused("write the kvmclock"))
    }

    /// What kvmclock shows after so many nanoseconds. The record may say anything.
    fn clock_after(&self, ns: u64) -> u64 {
        self.clock.clock.saturating_add(ns)
    }

    /// The record, in the memory of `buffer`.
    pub(super) fn write_record(&self, buffer: Vec<u8>) -> Vec<u8> {
        let mut writer = Writer::reuse(KIND, buffer);
        writer.section(CLOCK, |w| {
            w.bytes(self.clock.as_bytes());
            w.u64(self.realtime_ns);
        });
        if let Some(chips) = &self.chips {
            writer.section(IRQCHIPS, |w| {
                chips.iter().for_each(|chip| w.bytes(chip.as_bytes()));
            });
        }
        if let Some(pit) = &self.pit {
            writer.section(PIT, |w| w.bytes(pit.as_bytes()));
        }
        writer.finish()
    }

    /// Reads a record.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut reader = Reader::new(KIND, bytes)?;
        let (mut clock, mut chips, mut pit) = (None, None, None);
        while let Some(mut section) = reader.section()? {
            let body = &mut section.body;
            let twice = match section.tag {
                CLOCK => clock.replace((body.plain()?, body.u64()?)).is_some(),
                IRQCHIPS => chips
                    .replace([body.plain()?, body.plain()?, body.plain()?])
                    .is_some(),
                PIT => pit.replace(body.plain()?).is_some(),
                _ => {
                    section.unknown()?;
                    continue;
                }
            };
            if twice {
                return Err(section.body.bad("section, which is there twice"));
            }
            section.body.finish()?;
        }
        let (clock, realtime_ns) = clock.ok_or(RecordError::Lacks {
            what: KIND.name,
            section: "the kvmclock",
        })?;
        Ok(Self {
            clock,
            realtime_ns,
            chips,
            pit,
        })
    }

    /// Whether a machine of this shape has the same parts (rule 22).
    pub(super) fn check(&self, shape: PlatformShape) -> Result<(), RecordError> {
        for (field, theirs, ours) in [
            (
                "the kernel's interrupt controller",
                self.chips.is_some(),
                shape.irqchip,
            ),
            ("the kernel's PIT", self.pit.is_some(), shape.pit),
        ] {
            if theirs != ours {
                let presence = |there: bool| if there { "there" } else { "not there" };
                return Err(RecordError::Unfit {
                    what: KIND.name,
                    field: field.to_owned(),
                    theirs: presence(theirs).to_owned(),
                    ours: presence(ours).to_owned(),
                });
            }
        }
        Ok(())
    }

    /// The kvmclock.
    #[cfg(test)]
    pub(super) fn clock_ns(&self) -> u64 {
        self.clock.clock
    }

    /// Moves the reading's wall clock, as if another host's had been read.
    #[cfg(test)]
    pub(super) fn shift_realtime(&mut self, by_ns: i64) {
        self.realtime_ns = self.realtime_ns.saturating_add_signed(by_ns);
    }

    /// Every part under its name, clocks left out.
    pub(super) fn parts(&self) -> Vec<(String, Vec<u8>)> {
        let mut parts = Vec::new();
        if let Some(chips) = &self.chips {
            let bytes = chips.iter().flat_map(|chip| chip.as_bytes().to_vec());
            parts.push(("interrupt controllers".to_owned(), bytes.collect()));
        }
        if let Some(mut pit) = self.pit {
            // When a count was loaded is told in this host's time.
            pit.channels.iter_mut().for_each(|c| c.count_load_time = 0);
            parts.push(("PIT".to_owned(), pit.as_bytes().to_vec()));
        }
        parts
    }
}

fn read_chips(vm: &VmFd) -> Result<[kvm_irqchip; 3], KvmError> {
    let mut chips = CHIPS.map(|chip_id| kvm_irqchip {
        chip_id,
        ..Default::default()
    });
    for chip in &mut chips {
        vm.get_irqchip(chip)
            .map_err(KvmError::refused("read the interrupt controllers"))?;
    }
    Ok(chips)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_at_its_end_does_not_go_round() {
        let mut state = PlatformState {
            clock: kvm_clock_data::default(),
            realtime_ns: 0,
            chips: None,
            pit: None,
        };
        state.clock.clock = u64::MAX - 1;
        assert_eq!(state.clock_after(5), u64::MAX);
    }
}
