//! Which frame of which capture comes next: two captures, one time.
//!
//! Invariants: time never goes back; frames of one capture keep their order; at equal times the
//! primary's come first.

use std::str::FromStr;

use crate::capture::{self, Fault, Record, Sorted};
use crate::replay::Replay;
use crate::report::{Report, Traffic};
use crate::{InputError, Settings, Side, mac};

/// Captures whose first guest frames are closer have one clock.
const ONE_CLOCK_NS: u64 = 1_000_000_000;

/// How the captures' clocks relate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Align {
    /// By the clock, if the guests' first frames are less than a second apart; else by these.
    #[default]
    Auto,
    /// The guests' first frames are simultaneous.
    First,
    /// Both captures have the same clock.
    Clock,
}

impl FromStr for Align {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "first" => Ok(Self::First),
            "clock" => Ok(Self::Clock),
            _ => Err("choose auto, first or clock"),
        }
    }
}

/// One capture, read ahead by one frame.
struct Capture<'a> {
    side: Side,
    sorted: Sorted<'a>,
    /// With the time in the primary's clock.
    next: Option<(i128, Record<'a>)>,
    shift_ns: i128,
}

impl<'a> Capture<'a> {
    fn open(side: Side, bytes: &'a [u8]) -> Result<Self, InputError> {
        let reader = capture::read(bytes).map_err(|fault| InputError::Fault(side, fault))?;
        let sorted = Sorted::new(reader);
        let (next, shift_ns) = (None, 0);
        let mut this = Self {
            side,
            sorted,
            next,
            shift_ns,
        };
        this.read()?;
        Ok(this)
    }

    fn read(&mut self) -> Result<(), InputError> {
        let side = self.side;
        let failed = |fault: Fault| InputError::Fault(side, fault);
        let record = self.sorted.next_record().map_err(failed)?;
        self.next = record.map(|record| (i128::from(record.at_ns) + self.shift_ns, record));
        Ok(())
    }

    fn shift(&mut self, ns: i128) {
        self.shift_ns = ns;
        if let Some((at_ns, _)) = &mut self.next {
            *at_ns += ns;
        }
    }
}

fn destination(frame: &[u8]) -> &[u8] {
    &frame[..6]
}

fn source(frame: &[u8]) -> &[u8] {
    &frame[6..12]
}

/// When the guest's first frame was seen; `None` without one.
fn first_of(bytes: &[u8], side: Side, guest_mac: [u8; 6]) -> Result<Option<u64>, InputError> {
    let failed = |fault| InputError::Fault(side, fault);
    let mut sorted = Sorted::new(capture::read(bytes).map_err(failed)?);
    while let Some(record) = sorted.next_record().map_err(failed)? {
        if source(record.frame) == guest_mac {
            return Ok(Some(record.at_ns));
        }
    }
    Ok(None)
}

/// What is added to the secondary's times.
fn shift_ns(align: Align, primary_ns: u64, secondary_ns: u64) -> i128 {
    let apart = i128::from(primary_ns) - i128::from(secondary_ns);
    let one_clock = match align {
        Align::Auto => apart.unsigned_abs() < u128::from(ONE_CLOCK_NS),
        Align::First => false,
        Align::Clock => true,
    };
    if one_clock { 0 } else { apart }
}

/// Replays two captures; `read_to` is told how far each was read, in bytes.
pub(crate) fn replay(
    primary: &[u8],
    secondary: &[u8],
    settings: &Settings,
    read_to: impl Fn(Side, u64),
) -> Result<Report, InputError> {
    let mut captures = [
        Capture::open(Side::Primary, primary)?,
        Capture::open(Side::Secondary, secondary)?,
    ];
    let first_source = captures.iter().find_map(|capture| {
        let (_, record) = capture.next?;
        source(record.frame).first_chunk().copied()
    });
    let guest_mac = settings.guest_mac.or(first_source).unwrap_or_default();
    let first = [
        first_of(primary, Side::Primary, guest_mac)?,
        first_of(secondary, Side::Secondary, guest_mac)?,
    ];
    if first == [None, None] && first_source.is_some() {
        return Err(InputError::NoGuest(guest_mac));
    }
    if let [Some(primary_ns), Some(secondary_ns)] = first {
        captures[1].shift(shift_ns(settings.align, primary_ns, secondary_ns));
    }
    let merge = Merge {
        guest_mac,
        replay: Replay::new(settings.limits(), settings.policy.clone()),
        input: [Traffic::default(); 2],
        foreign: Traffic::default(),
    };
    merge.run(captures, read_to)
}

struct Merge<'a> {
    guest_mac: [u8; 6],
    replay: Replay<'a>,
    input: [Traffic; 2],
    foreign: Traffic,
}

impl<'a> Merge<'a> {
    fn run(
        mut self,
        mut captures: [Capture<'a>; 2],
        read_to: impl Fn(Side, u64),
    ) -> Result<Report, InputError> {
        let start_ns = captures.iter().filter_map(|capture| capture.next);
        let start_ns = start_ns.map(|(at_ns, _)| at_ns).min().unwrap_or(0);
        while let Some(capture) = captures
            .iter_mut()
            .filter(|capture| capture.next.is_some())
            .min_by_key(|capture| capture.next.map(|(at_ns, _)| at_ns))
        {
            let Some((at_ns, record)) = capture.next else {
                break;
            };
            let since_us = ((at_ns - start_ns) / 1000).clamp(0, i128::from(u64::MAX >> 1));
            self.replay.advance(since_us as u64);
            self.take(capture.side, record);
            read_to(capture.side, record.offset);
            capture.read()?;
        }
        let mut report = self.replay.finish();
        report.guest_mac = mac::text(self.guest_mac);
        let shift_ns = captures[1].shift_ns;
        report.clock_shift_ns = shift_ns.clamp(i64::MIN.into(), i64::MAX.into()) as i64;
        [report.primary_input, report.secondary_input] = self.input;
        report.foreign = self.foreign;
        report.disordered = captures.iter().map(|capture| capture.sorted.late()).sum();
        Ok(report)
    }

    fn take(&mut self, side: Side, record: Record<'a>) {
        let to = destination(record.frame);
        let is_input = to == self.guest_mac || to[0] & 1 == 1;
        match (source(record.frame) == self.guest_mac, side) {
            (true, Side::Primary) => self.replay.pvm_sends(record),
            (true, Side::Secondary) => self.replay.svm_sends(record),
            (false, side) if is_input => {
                self.input[usize::from(side == Side::Secondary)].count(&record);
                if side == Side::Primary {
                    self.replay.input(record);
                }
            }
            (false, _) => self.foreign.count(&record),
        }
    }
}
