//! `colo compare PRIMARY SECONDARY`: what two captures have of two guests.

use std::io::Write as _;
use std::path::PathBuf;

use clap::Args;
use colo_compare::Policy;
use colo_replay::{Align, DEADLINE_MS, Settings};
use tracing::{error, warn};

/// Captures, and how to read them.
#[derive(Debug, Args)]
pub(crate) struct CaptureArgs {
    /// What the primary guest sent (and perhaps received): pcap or pcapng
    #[arg(
        value_name = "PRIMARY",
        requires = "secondary",
        required_unless_present = "sockets"
    )]
    primary: Option<PathBuf>,
    /// What the secondary guest sent
    #[arg(value_name = "SECONDARY", conflicts_with = "sockets")]
    secondary: Option<PathBuf>,
    /// Whose frames are compared [default: who sent the first frame of PRIMARY]
    #[arg(long, value_name = "MAC", conflicts_with = "sockets", value_parser = colo_replay::parse_mac)]
    guest_mac: Option<[u8; 6]>,
    /// How the clocks of the captures relate: clock (they are one), first (the guests' first frames
    /// are simultaneous), auto (clock, if those are less than a second apart)
    #[arg(
        long,
        value_name = "HOW",
        default_value = "auto",
        conflicts_with = "sockets"
    )]
    align: Align,
}

impl CaptureArgs {
    /// Both files, if captures are to be compared.
    pub(crate) fn files(&self) -> Option<[PathBuf; 2]> {
        Some([self.primary.clone()?, self.secondary.clone()?])
    }
}

/// Prints a report. Gives whether the guests sent the same; `None` when the captures cannot tell.
pub(crate) fn run(
    [primary, secondary]: &[PathBuf; 2],
    args: CaptureArgs,
    policy: Policy,
    deadline_ms: Option<u64>,
    json: bool,
) -> Option<bool> {
    let settings = Settings {
        deadline_ms: deadline_ms.unwrap_or(DEADLINE_MS),
        policy,
        guest_mac: args.guest_mac,
        align: args.align,
    };
    let is_guess = settings.guest_mac.is_none();
    let compared = colo_replay::compare(primary, secondary, &settings);
    let report = compared.inspect_err(|e| error!("{e}")).ok()?;
    if report.primary_output() == 0 {
        let file = primary.display();
        warn!(
            "{file}: no frame of {}: nothing was compared",
            report.guest_mac
        );
    }
    if is_guess && report.primary_input.packets > 0 {
        let (file, mac) = (primary.display(), &report.guest_mac);
        warn!(
            "{file}: {mac} sent the first frame and is taken for the guest, but others send to it; \
             if the guest is one of them, give --guest-mac"
        );
    }
    let text = match json {
        true => serde_json::to_string_pretty(&report)
            .map(|text| text + "\n")
            .inspect_err(|e| error!("the report as JSON: {e}"))
            .ok()?,
        false => colo_replay::table(&report),
    };
    // Whoever closes the pipe has seen enough; the exit code still tells.
    std::io::stdout().write_all(text.as_bytes()).ok();
    Some(report.is_same())
}
