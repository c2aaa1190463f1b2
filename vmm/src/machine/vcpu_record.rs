//! The record of a vCPU: sections of fixed little-endian structures, and what differs between two.
//!
//! | section | holds |
//! |---|---|
//! | 1 | `kvm_regs` |
//! | 2 | the part of `kvm_sregs` that `kvm_sregs2` shares, then `flags` and four PDPTRs |
//! | 3 | the xsave area, as long as KVM_CAP_XSAVE2 says |
//! | 4 | `kvm_xcrs` |
//! | 5 | `kvm_debugregs` |
//! | 6 | `kvm_vcpu_events` |
//! | 7 | `kvm_mp_state` |
//! | 8 | MSRs: index (32 bits) and value (64) each |
//! | 9 | TSC: frequency in kHz (32), whether there is an offset (32), offset, value, wall clock in ns (64 each) |
//! | 10 | `kvm_lapic_state`; only with an interrupt controller in the kernel |
//! | 11 | `kvm_nested_state`, as long as it says; only of a guest that is a hypervisor |
//!
//! Invariants: nothing of a record is used before all of it was read and found right; a record fits a
//! vCPU only if every part of it has a place there.
//!
//! Does not write to a vCPU.

use kvm_bindings::{kvm_lapic_state, kvm_msr_entry, kvm_sregs};
use kvm_ioctls::KvmNestedStateBuffer;
use zerocopy::{FromBytes, IntoBytes};

use super::clock::TscState;
use super::record::{Kind, Reader, RecordError, Writer};
use super::vcpu_shape::VcpuShape;
use super::vcpu_state::{VcpuState, sregs1_of, sregs2_of};

const KIND: Kind = Kind {
    name: "vCPU",
    magic: *b"CVCP",
    version: 2,
};
/// The part of `kvm_sregs` before its interrupts.
const SREGS_BYTES: usize = size_of::<kvm_sregs>() - 32;
const MSRS_MAX: usize = 4096;
const MSR_BYTES: usize = 12;
/// Beyond what any processor has today.
const XSAVE_BYTES_MAX: usize = 64 << 10;
/// The register that counts down to the local APIC's next timer interrupt.
const LAPIC_TIMER_COUNT: std::ops::Range<usize> = 0x390..0x394;
/// The header of `kvm_nested_state`.
const NESTED_HEADER_BYTES: usize = 128;

const REGS: u16 = 1;
const SREGS: u16 = 2;
const XSAVE: u16 = 3;
const XCRS: u16 = 4;
const DEBUG: u16 = 5;
const EVENTS: u16 = 6;
const MP_STATE: u16 = 7;
const MSRS: u16 = 8;
const TSC: u16 = 9;
const LAPIC: u16 = 10;
const NESTED: u16 = 11;

/// The sections that every record has.
const NEEDED: [(u16, &str); 9] = [
    (REGS, "the registers"),
    (SREGS, "the system registers"),
    (XSAVE, "xsave"),
    (XCRS, "xcrs"),
    (DEBUG, "the debug registers"),
    (EVENTS, "the events"),
    (MP_STATE, "mp_state"),
    (MSRS, "the MSRs"),
    (TSC, "the TSC"),
];

impl VcpuState {
    /// The record.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.write_record(Vec::with_capacity(8192))
    }

    /// The record, in the memory of `buffer`.
    pub(super) fn write_record(&self, buffer: Vec<u8>) -> Vec<u8> {
        let mut writer = Writer::reuse(KIND, buffer);
        let w = &mut writer;
        w.section(REGS, |w| w.bytes(self.regs.as_bytes()));
        w.section(SREGS, |w| {
            w.bytes(&sregs1_of(&self.sregs).as_bytes()[..SREGS_BYTES]);
            w.u64(self.sregs.flags);
            self.sregs.pdptrs.iter().for_each(|&pdptr| w.u64(pdptr));
        });
        w.section(XSAVE, |w| w.bytes(self.xsave.as_bytes()));
        w.section(XCRS, |w| w.bytes(self.xcrs.as_bytes()));
        w.section(DEBUG, |w| w.bytes(self.debug.as_bytes()));
        w.section(EVENTS, |w| w.bytes(self.events.as_bytes()));
        w.section(MP_STATE, |w| w.bytes(self.mp_state.as_bytes()));
        w.section(MSRS, |w| {
            for msr in &self.msrs {
                w.u32(msr.index);
                w.u64(msr.data);
            }
        });
        w.section(TSC, |w| self.tsc.write(w));
        if let Some(lapic) = &self.lapic {
            w.section(LAPIC, |w| w.bytes(lapic.as_bytes()));
        }
        if let Some(nested) = &self.nested {
            let bytes = nested.as_bytes();
            let len = (nested.size as usize).min(bytes.len());
            w.section(NESTED, |w| w.bytes(&bytes[..len]));
        }
        writer.finish()
    }

    /// Reads a record.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut reader = Reader::new(KIND, bytes)?;
        let mut state = Self::blank();
        let mut seen = 0u32;
        while let Some(mut section) = reader.section()? {
            if !(REGS..=NESTED).contains(&section.tag) {
                section.unknown()?;
                continue;
            }
            if seen & 1 << section.tag != 0 {
                return Err(section.body.bad("section, which is there twice"));
            }
            seen |= 1 << section.tag;
            state.read_section(section.tag, &mut section.body)?;
            section.body.finish()?;
        }
        match NEEDED.iter().find(|(tag, _)| seen & 1 << tag == 0) {
            Some(&(_, section)) => Err(RecordError::Lacks {
                what: KIND.name,
                section,
            }),
            None => Ok(state),
        }
    }

    fn blank() -> Self {
        Self {
            regs: Default::default(),
            sregs: Default::default(),
            xsave: Vec::new(),
            xcrs: Default::default(),
            debug: Default::default(),
            events: Default::default(),
            mp_state: Default::default(),
            msrs: Vec::new(),
            tsc: TscState::default(),
            lapic: None,
            nested: None,
        }
    }

    fn read_section(&mut self, tag: u16, body: &mut Reader<'_>) -> Result<(), RecordError> {
        match tag {
            REGS => self.regs = body.plain()?,
            SREGS => {
                let mut common = [0; size_of::<kvm_sregs>()];
                common[..SREGS_BYTES].copy_from_slice(body.take(SREGS_BYTES)?);
                let common = kvm_sregs::read_from_bytes(&common);
                self.sregs = sregs2_of(&common.map_err(|_| RecordError::Length(KIND.name))?);
                self.sregs.flags = body.u64()?;
                for pdptr in &mut self.sregs.pdptrs {
                    *pdptr = body.u64()?;
                }
            }
            XSAVE => {
                let area = body.take_rest();
                if area.len() > XSAVE_BYTES_MAX || !area.len().is_multiple_of(4) {
                    return Err(body.bad("size of xsave"));
                }
                let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                self.xsave = area.chunks_exact(4).map(word).collect();
            }
            XCRS => self.xcrs = body.plain()?,
            DEBUG => self.debug = body.plain()?,
            EVENTS => self.events = body.plain()?,
            MP_STATE => self.mp_state = body.plain()?,
            MSRS => self.msrs = read_msrs(body)?,
            TSC => self.tsc = TscState::read(body)?,
            LAPIC => self.lapic = Some(Box::new(body.plain::<kvm_lapic_state>()?)),
            _ => self.nested = Some(read_nested(body)?),
        }
        Ok(())
    }

    /// Whether a vCPU of this shape has a place for everything here (rules 13 and 22).
    pub(super) fn check(&self, shape: &VcpuShape) -> Result<(), RecordError> {
        let unfit = |field: &str, theirs: String, ours: String| RecordError::Unfit {
            what: KIND.name,
            field: field.to_owned(),
            theirs,
            ours,
        };
        if self.xsave.len() != shape.xsave_words {
            let (theirs, ours) = (self.xsave.len() * 4, shape.xsave_words * 4);
            return Err(unfit("size of xsave", theirs.to_string(), ours.to_string()));
        }
        let presence = |there: bool| if there { "there" } else { "not there" };
        for (name, theirs, ours) in [
            ("the local APIC", self.lapic.is_some(), shape.lapic),
            // What is not in use is not in the record.
            (
                "nested virtualisation",
                self.nested.is_some(),
                shape.nested && self.nested.is_some(),
            ),
        ] {
            if theirs != ours {
                let (theirs, ours) = (presence(theirs), presence(ours));
                return Err(unfit(name, theirs.to_owned(), ours.to_owned()));
            }
        }
        for msr in &self.msrs {
            let ours = match shape.msrs.feature(msr.index) {
                Some(ours) if ours != msr.data => format!("{ours:#x}"),
                _ if !shape.msrs.contains(msr.index) => "not there".to_owned(),
                _ => continue,
            };
            let (name, theirs) = (format!("MSR {:#x}", msr.index), format!("{:#x}", msr.data));
            return Err(unfit(&name, theirs, ours));
        }
        self.tsc.check(shape.tsc_khz, shape.tsc)
    }

    /// Every part under its name, in a form that is the same for two vCPUs that a guest cannot tell
    /// apart: clocks and what counts with them left out.
    pub fn parts(&self) -> Vec<(String, Vec<u8>)> {
        let mut sregs = sregs1_of(&self.sregs).as_bytes().to_vec();
        sregs.extend_from_slice(self.sregs.flags.as_bytes());
        sregs.extend_from_slice(self.sregs.pdptrs.as_bytes());
        let fixed = [
            ("registers", self.regs.as_bytes().to_vec()),
            ("system registers", sregs),
            ("xsave", self.xsave.as_bytes().to_vec()),
            ("xcrs", self.xcrs.as_bytes().to_vec()),
            ("debug registers", self.debug.as_bytes().to_vec()),
            ("events", self.events.as_bytes().to_vec()),
            ("mp_state", self.mp_state.as_bytes().to_vec()),
        ];
        let mut parts: Vec<_> = fixed
            .into_iter()
            .map(|(name, bytes)| (name.to_owned(), bytes))
            .collect();
        if let Some(lapic) = &self.lapic {
            let mut bytes = lapic.as_bytes().to_vec();
            bytes[LAPIC_TIMER_COUNT].fill(0);
            parts.push(("local APIC".to_owned(), bytes));
        }
        if let Some(nested) = &self.nested {
            parts.push(("nested state".to_owned(), nested.as_bytes().to_vec()));
        }
        let msr =
            |m: &kvm_msr_entry| (format!("MSR {:#x}", m.index), m.data.to_le_bytes().to_vec());
        parts.extend(self.msrs.iter().map(msr));
        parts
    }

    /// The names of the parts that are not the same.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        differing_parts(&self.parts(), &other.parts())
    }
}

/// The names of what is not the same in both, or not in both.
pub(super) fn differing_parts(a: &[(String, Vec<u8>)], b: &[(String, Vec<u8>)]) -> Vec<String> {
    let only = |a: &[(String, Vec<u8>)], b: &[(String, Vec<u8>)]| -> Vec<String> {
        let missing = a.iter().filter(|part| !b.contains(part));
        missing.map(|(name, _)| name.clone()).collect()
    };
    let mut names = only(a, b);
    let others = only(b, a);
    names.extend(
        others
            .into_iter()
            .filter(|n| !a.iter().any(|(name, _)| name == n)),
    );
    names
}

impl TscState {
    fn write(&self, w: &mut Writer) {
        w.u32(self.khz);
        w.u32(self.offset.is_some().into());
        w.u64(self.offset.unwrap_or(0));
        w.u64(self.value);
        w.u64(self.realtime_ns);
    }

    fn read(body: &mut Reader<'_>) -> Result<Self, RecordError> {
        let (khz, has_offset, offset) = (body.u32()?, body.u32()?, body.u64()?);
        if khz == 0 || has_offset > 1 {
            return Err(body.bad("TSC"));
        }
        Ok(Self {
            khz,
            offset: (has_offset == 1).then_some(offset),
            value: body.u64()?,
            realtime_ns: body.u64()?,
        })
    }
}

fn read_msrs(body: &mut Reader<'_>) -> Result<Vec<kvm_msr_entry>, RecordError> {
    let bytes = body.take_rest();
    if bytes.len() > MSRS_MAX * MSR_BYTES || !bytes.len().is_multiple_of(MSR_BYTES) {
        return Err(body.bad("number of MSRs"));
    }
    let entry = |b: &[u8]| kvm_msr_entry {
        index: u32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        data: u64::from_le_bytes([b[4], b[5], b[6], b[7], b[8], b[9], b[10], b[11]]),
        ..Default::default()
    };
    Ok(bytes.chunks_exact(MSR_BYTES).map(entry).collect())
}

fn read_nested(body: &mut Reader<'_>) -> Result<Box<KvmNestedStateBuffer>, RecordError> {
    let bytes = body.take_rest();
    let mut whole = [0; size_of::<KvmNestedStateBuffer>()];
    if !(NESTED_HEADER_BYTES..=whole.len()).contains(&bytes.len()) {
        return Err(body.bad("size of the nested state"));
    }
    whole[..bytes.len()].copy_from_slice(bytes);
    let nested = KvmNestedStateBuffer::read_from_bytes(&whole)
        .map_err(|_| RecordError::Length(KIND.name))?;
    if nested.size as usize != bytes.len() {
        return Err(body.bad("size of the nested state"));
    }
    Ok(Box::new(nested))
}
