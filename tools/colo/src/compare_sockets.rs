//! `colo compare --sockets`: a stand-in for QEMU's colo-compare object.
//!
//! Prints one line, or with `json` one document, when both inputs have ended.

use clap::Args;
use colo_compare::Policy;
use colo_sockets::{Address, Config, DEFAULT_DEADLINE_US, SocketsError, Summary};
use serde_json::{Value, json};

/// The sockets, each `[listen:|connect:]PATH` or `[listen:|connect:]HOST:PORT`. A path where somebody
/// listens is connected to, any other is made and listened on.
#[derive(Debug, Args)]
pub(crate) struct SocketsArgs {
    /// Compare two streams of frames in the place of QEMU's colo-compare object: where the primary
    /// guest's frames come from, where the secondary's come from, where released ones go to; each
    /// [listen:|connect:]PATH or [listen:|connect:]HOST:PORT
    #[arg(
        long,
        num_args = 3,
        action = clap::ArgAction::Set,
        value_names = ["PRIMARY_IN", "SECONDARY_IN", "OUT"]
    )]
    pub(crate) sockets: Option<Vec<Address>>,
    /// Where checkpoints are asked for, and where the word that one was taken comes from (QEMU's
    /// notify_dev); without it what diverged stays held
    #[arg(long, value_name = "SOCKET", requires = "sockets")]
    notify: Option<Address>,
    /// Every message carries a virtio-net header, as with QEMU's vnet_hdr_support
    #[arg(long, requires = "sockets")]
    vnet_hdr: bool,
    /// Let what diverged leave as if a checkpoint had been taken at once: for an observer beside a
    /// running pair, never in the place of a comparator
    #[arg(long, requires = "sockets", conflicts_with = "notify")]
    checkpoint_at_once: bool,
}

/// Runs until both inputs have ended. Gives whether the guests sent the same; `None` when there are
/// no sockets among the arguments.
pub(crate) fn run(
    args: SocketsArgs,
    policy: Policy,
    deadline_ms: Option<u64>,
    json: bool,
) -> Result<Option<bool>, SocketsError> {
    let addresses = args.sockets.map(<[Address; 3]>::try_from);
    let Some(Ok([primary, secondary, out])) = addresses else {
        return Ok(None);
    };
    let summary = colo_sockets::run(Config {
        primary,
        secondary,
        out,
        notify: args.notify,
        vnet_hdr: args.vnet_hdr,
        deadline_us: deadline_ms.map_or(DEFAULT_DEADLINE_US, |ms| ms.saturating_mul(1000)),
        policy,
        checkpoint_at_once: args.checkpoint_at_once,
    })?;
    if json {
        println!("{:#}", document(&summary));
    } else {
        println!("{}", line(&summary));
    }
    Ok(Some(summary.is_same()))
}

fn line(summary: &Summary) -> String {
    format!(
        "{} pairs compared, {} frames released, {} still held; {} checkpoints due, {} taken",
        summary.stats.compared,
        summary.stats.released(),
        summary.held,
        summary.requests,
        summary.checkpoints
    )
}

fn document(summary: &Summary) -> Value {
    let divergence = |divergence: &colo_compare::Divergence| {
        json!({
            "cause": divergence.cause.name(),
            "flow": divergence.flow.map(|flow| flow.to_string()),
            "offset": divergence.offset,
        })
    };
    json!({
        "pairs": summary.stats.compared,
        "released": summary.stats.released(),
        "held": summary.held,
        "dropped": summary.dropped,
        "divergences": summary.divergences.iter().map(divergence).collect::<Vec<_>>(),
        "requests": summary.requests,
        "checkpoints": summary.checkpoints,
        "flows": summary.flows,
    })
}
