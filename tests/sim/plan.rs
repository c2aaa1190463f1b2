//! What happens in a run, drawn from the seed before it begins.
//!
//! Invariant: after [`Plan::calm_us`] nothing more goes wrong.

use colo_compare::{DigestKey, Limits, testing};
use colo_control::{Mode, Pace, Protection, StepLimits, Storm, Timing};

use crate::client::Plan as ClientPlan;
use crate::link::{Channel, LinkPlan};
use crate::prng::Prng;
use crate::world::StreamFault;

/// A mistake in the shell or in a core, to see that a checker finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    None,
    /// The comparator answers "equal" always.
    AlwaysEqual,
    /// The secondary takes over without asking.
    TakeOverUnasked,
    /// The primary goes alone without asking.
    GoAloneUnasked,
    /// A process that stood still goes on as if nothing had happened.
    IgnoreClockGap,
    /// Pages are applied as they come instead of staged.
    ApplyHalf,
    /// Input counts as acknowledged when it is mirrored.
    AckUnkept,
    /// More is read from the guest than may be held.
    IgnoreRoom,
    /// Commits are not told to the packet path.
    NeverCommit,
    /// The secondary ends where it should take over.
    GiveUp,
    /// A capture takes only the pages that the PVM dirtied (against rule 11).
    PvmDirtyOnly,
    /// The pages of an aborted checkpoint are forgotten (against rule 14).
    DropCarry,
    /// Steps may take for ever.
    EndlessSteps,
    /// An SVM that is to stand still runs.
    RunHalted,
    /// What was written again after it went ahead counts as there (against rule 13).
    StaleAhead,
    /// What was staged of a checkpoint outlives the page streams that it came over (against rule 13).
    KeepHalfStage,
    /// Pages are read when they are sent, not while the guest stands still for the capture (against rule 11).
    PagesAtSend,
    /// The SVM tells what it has dirtied, and runs on (against rule 11).
    SvmRunsOn,
    /// A checkpoint counts as committed when it was sent (against rule 13).
    CommitAtSend,
}

/// Whom a fault hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Primary,
    Secondary,
}

/// When a fault strikes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum When {
    At(u64),
    /// When the target passes the named point for the n-th time (from 1).
    Passing(&'static str, u64),
}

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The process dies; its kernel closes its sockets.
    Kill,
    /// The host dies: silence.
    PowerOff,
    /// Nothing leaves it over the link any more, and after so long its host dies.
    FallSilent(u64),
    /// It stands still for so long.
    Pause(u64),
    /// Nothing arrives at the target over the link for so long (`u64::MAX`: for ever).
    Deafen(u64),
    /// The link is cut both ways for so long.
    Cut(u64),
    /// The target's connections are reset.
    Reset,
    /// The arbiter does not answer for so long.
    ArbiterOutage(u64),
    /// The guest loses power or the operator stops it.
    ShutDown,
    /// The page streams of its link break; all else goes on.
    Streams(StreamFault),
}

/// A fault with its place and time.
#[derive(Debug, Clone)]
pub struct Strike {
    pub when: When,
    pub target: Target,
    pub fault: Fault,
}

/// Points that a process passes, where strikes can hit.
pub const POINTS: &[(Target, &str)] = &[
    (Target::Primary, "streams_broken"),
    (Target::Primary, "streams_reopened"),
    (Target::Secondary, "dialled"),
    (Target::Secondary, "streams_back"),
    (Target::Primary, "live_sent"),
    (Target::Primary, "stop_svm_sent"),
    (Target::Primary, "svm_stopped_received"),
    (Target::Primary, "cut"),
    (Target::Primary, "captured"),
    (Target::Primary, "chunk_sent"),
    (Target::Primary, "sent"),
    (Target::Primary, "ahead_sent"),
    (Target::Primary, "committed_received"),
    (Target::Primary, "aborted_sent"),
    (Target::Primary, "aborted_received"),
    (Target::Primary, "commit"),
    (Target::Primary, "released"),
    (Target::Primary, "paired_asked"),
    (Target::Primary, "paired_sent"),
    (Target::Primary, "mirrored"),
    (Target::Secondary, "live_received"),
    (Target::Secondary, "stop_svm_received"),
    (Target::Secondary, "svm_stopped_sent"),
    (Target::Secondary, "chunk_received"),
    (Target::Secondary, "staged"),
    (Target::Secondary, "ahead_received"),
    (Target::Secondary, "committed_sent"),
    (Target::Secondary, "aborted_sent"),
    (Target::Secondary, "aborted_received"),
    (Target::Secondary, "applied"),
    (Target::Secondary, "output_sent"),
    (Target::Secondary, "take_over_asked"),
    (Target::Secondary, "took_over"),
];

/// The first of these are passed while page streams are opened anew.
const STREAMS_ANEW: usize = 4;

/// How the clients' network behaves, per mille and microseconds.
#[derive(Debug, Clone)]
pub struct NetPlan {
    pub loss: u64,
    pub duplicate: u64,
    pub reorder: u64,
    pub delay_us: u64,
    pub jitter_us: u64,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Plan {
    pub mutation: Mutation,
    pub limits: Limits,
    pub timing: Timing,
    pub protection: Protection,
    pub net: NetPlan,
    pub link: LinkPlan,
    pub clients: Vec<ClientPlan>,
    pub datagram_clients: u64,
    pub datagrams: u64,
    pub divergent: u64,
    pub strikes: Vec<Strike>,
    /// Ended hosts come back as secondaries.
    pub respawn: bool,
    /// The policy `alone = "block"`.
    pub block_alone: bool,
    /// Faults that would kill the only copy strike too.
    pub merciless: bool,
    /// Captures and stages that fail, per mille.
    pub capture_failures: u64,
    pub stage_failures: u64,
    /// Steps that do not end by themselves, per mille.
    pub stuck_steps: u64,
    /// Requests to the arbiter whose answer is lost, per mille.
    pub lost_answers: u64,
    /// Chunks of a checkpoint, at most.
    pub chunks: u64,
    /// Between two looks at the dirty log for pages to send ahead; 0: none are.
    pub ahead_us: u64,
    /// How fast these go, and in chunks of how much.
    pub ahead_mib_per_s: u32,
    pub ahead_chunk_bytes: usize,
    /// Times of a capture and of an apply, at most.
    pub pause_us: u64,
    /// How long a page channel may stand still.
    pub stall_us: u64,
    /// Guests run so long after they could, at most, by host.
    pub guest_delay_us: [u64; 2],
    /// So many times longer on the secondary.
    pub slow_svm: u64,
    /// The secondary's output travels as digests.
    pub digests: bool,
    pub calm_us: u64,
}

impl Plan {
    /// What the pair digests with, if it does.
    pub fn digest_key(&self) -> Option<DigestKey> {
        self.digests.then(testing::digest_key)
    }

    /// The plan of a seed.
    pub fn draw(chance: &mut Prng, mutation: Mutation) -> Self {
        let calm_us = 2_000_000;
        let mut timing = timing(chance);
        if mutation == Mutation::EndlessSteps {
            timing.steps = ENDLESS;
        }
        let mut strikes = strikes(chance, &timing, calm_us);
        stream_strikes(chance, &timing, calm_us, &mut strikes);
        let mut limits = limits(chance);
        limits.canary_equal = mutation == Mutation::AlwaysEqual;
        if mutation == Mutation::IgnoreRoom {
            limits.max_held_frames = 6;
        }
        let divergent = [0, 100, 300, 600][chance.below(4) as usize];
        let rough = chance.chance(500);
        let block_alone = chance.chance(150);
        Self {
            mutation,
            limits,
            timing,
            protection: protection(chance),
            net: NetPlan {
                loss: if rough { chance.below(30) } else { 0 },
                duplicate: if rough { chance.below(30) } else { 0 },
                reorder: if rough { chance.below(50) } else { 0 },
                delay_us: chance.range(20, 500),
                jitter_us: chance.below(300),
            },
            link: link(chance, &timing),
            clients: (0..chance.range(1, 6))
                .map(|_| client(chance, divergent))
                .collect(),
            datagram_clients: chance.below(3),
            datagrams: chance.range(5, 40),
            divergent,
            strikes,
            respawn: block_alone || chance.chance(700),
            block_alone,
            merciless: chance.chance(100),
            capture_failures: if chance.chance(200) { 150 } else { 0 },
            stage_failures: if chance.chance(200) { 150 } else { 0 },
            stuck_steps: if chance.chance(250) { 100 } else { 0 },
            lost_answers: if chance.chance(300) { 300 } else { 0 },
            chunks: chance.range(1, 12),
            ahead_us: if chance.chance(800) {
                chance.range(1_000, 30_000)
            } else {
                0
            },
            ahead_mib_per_s: chance.range(1, 64) as u32,
            ahead_chunk_bytes: chance.range(8_000, 70_000) as usize,
            pause_us: chance.range(100, 5_000),
            stall_us: chance.range(10_000, 150_000),
            guest_delay_us: std::array::from_fn(|_| chance.range(20, 800)),
            slow_svm: if chance.chance(200) {
                chance.range(3, 40)
            } else {
                1
            },
            digests: chance.chance(500),
            calm_us,
        }
    }
}

/// More than each step takes by itself on the slowest link.
const STEPS: StepLimits = StepLimits {
    stop_us: 80_000,
    capture_us: 30_000,
    send_us: 60_000,
    begin_us: 60_000,
    commit_us: 60_000,
    abort_us: 45_000,
    sync_us: 150_000,
    stage_us: 110_000,
    apply_us: 400_000,
};

const ENDLESS: StepLimits = StepLimits {
    stop_us: NEVER_US,
    capture_us: NEVER_US,
    send_us: NEVER_US,
    begin_us: NEVER_US,
    commit_us: NEVER_US,
    abort_us: NEVER_US,
    sync_us: NEVER_US,
    stage_us: NEVER_US,
    apply_us: NEVER_US,
};
const NEVER_US: u64 = 1 << 40;

fn protection(chance: &mut Prng) -> Protection {
    let remus = chance.chance(250);
    let stormy = chance.chance(400);
    Protection {
        mode: if remus { Mode::Remus } else { Mode::Colo },
        remus_interval_us: chance.range(8_000, 60_000),
        storm: Storm {
            share_pct: if stormy { chance.range(5, 60) as u8 } else { 0 },
            window_us: chance.range(20_000, 300_000),
            interval_min_us: 2_000,
            interval_max_us: chance.range(5_000, 80_000),
            retry_us: chance.range(20_000, 200_000),
            retry_max_us: 800_000,
        },
        pace: Pace {
            ready_pages: chance.range(4, 40),
            rest_us: chance.below(20_000),
            slow_us: chance.range(10_000, 80_000),
            relief_us: 50_000,
            rejoin_us: 20_000,
            rejoin_max_us: 100_000,
            lag_us: chance.range(200, 2_000),
            lag_look_us: chance.range(500, 10_000),
            lag_rest_us: 50_000,
        },
    }
}

fn timing(chance: &mut Prng) -> Timing {
    Timing {
        heartbeat_us: chance.range(4_000, 15_000),
        heartbeat_count: chance.range(3, 6) as u32,
        checkpoint_interval_us: if chance.chance(300) {
            chance.range(20_000, 300_000)
        } else {
            0
        },
        step_timeout_us: 400_000,
        steps: STEPS,
        arbiter_retry_us: 5_000,
    }
}

/// Now and then so slow that everything overtakes everything; a round trip stays within the lease.
fn link(chance: &mut Prng, timing: &Timing) -> LinkPlan {
    let most = if chance.chance(250) {
        timing.lease_us() / 5
    } else {
        300
    };
    let mut plan = LinkPlan {
        delay_us: std::array::from_fn(|_| chance.range(10, most)),
        jitter_us: std::array::from_fn(|_| chance.below(most)),
    };
    if chance.chance(300) {
        // Streams are opened anew more slowly than a capture may take.
        plan.delay_us[Channel::Dial as usize] = chance.below(50_000);
    }
    plan
}

fn limits(chance: &mut Prng) -> Limits {
    let tight = chance.chance(200);
    let default = Limits::default();
    if !tight {
        return default;
    }
    Limits {
        max_flows: chance.range(6, 40) as usize,
        max_held_frames: chance.range(8, 64) as usize,
        max_svm_frames: chance.range(8, 64) as usize,
        max_history_bytes: chance.range(1_000, 8_000) as usize,
        max_unacked_inputs: chance.range(8, 64),
        max_input_frames: chance.range(16, 128) as usize,
        max_stored_output: chance.range(16, 128) as usize,
        ..default
    }
}

fn client(chance: &mut Prng, divergent: u64) -> ClientPlan {
    ClientPlan {
        connections: chance.range(1, 6),
        requests: chance.range(3, 40),
        depth: chance.range(1, 4) as usize,
        think_us: [3_000, 20_000, 60_000, 150_000][chance.below(4) as usize],
        divergent,
        uploads: [100, 150, 600][chance.below(3) as usize],
        resets: [0, 0, 500][chance.below(3) as usize],
        same_ports: [0, 0, 800][chance.below(3) as usize],
        outbound: [0, 0, 300][chance.below(3) as usize],
        largest: [40, 1_500, 12_000][chance.below(3) as usize],
    }
}

fn strikes(chance: &mut Prng, timing: &Timing, calm_us: u64) -> Vec<Strike> {
    let count = [0, 1, 1, 2, 2, 3, 4, 6][chance.below(8) as usize];
    let mut strikes = Vec::new();
    for _ in 0..count {
        let fault = fault(chance, timing);
        let strike = if chance.chance(400) {
            let (target, point) = POINTS[chance.below(POINTS.len() as u64) as usize];
            let nth = match point {
                "released" | "mirrored" | "output_sent" => chance.range(1, 120),
                "chunk_sent" | "chunk_received" | "ahead_sent" | "ahead_received" => {
                    chance.range(1, 30)
                }
                _ => chance.range(1, 8),
            };
            Strike {
                when: When::Passing(point, nth),
                target,
                fault,
            }
        } else {
            let target = if chance.chance(700) {
                Target::Primary
            } else {
                Target::Secondary
            };
            let at = chance.range(20_000, calm_us - 300_000);
            Strike {
                when: When::At(at),
                target,
                fault,
            }
        };
        strikes.push(strike);
    }
    if chance.chance(30) {
        let when = When::At(chance.range(calm_us / 2, calm_us));
        strikes.push(Strike {
            when,
            target: Target::Primary,
            fault: Fault::ShutDown,
        });
    }
    strikes
}

/// Points at which page streams are used, or others are made.
const STREAM_POINTS: &[&str] = &[
    "live_sent",
    "live_received",
    "streams_broken",
    "streams_reopened",
    "dialled",
    "streams_back",
    "stop_svm_sent",
    "svm_stopped_sent",
    "svm_stopped_received",
    "cut",
    "captured",
    "chunk_sent",
    "chunk_received",
    "sent",
    "staged",
    "ahead_sent",
    "ahead_received",
    "committed_sent",
    "committed_received",
    "aborted_sent",
    "aborted_received",
    "applied",
    "commit",
    "take_over_asked",
];

/// Adds broken page streams.
fn stream_strikes(chance: &mut Prng, timing: &Timing, calm_us: u64, strikes: &mut Vec<Strike>) {
    let count = [0, 0, 0, 1, 2, 6][chance.below(6) as usize];
    for _ in 0..count {
        let fault = match chance.below(5) {
            0 | 1 => StreamFault::End {
                lossy: chance.chance(500),
            },
            2 | 3 => StreamFault::Damage,
            _ => StreamFault::Stall(chance.range(1_000, 200_000)),
        };
        let when = match chance.chance(700) {
            true => {
                let point = STREAM_POINTS[chance.below(STREAM_POINTS.len() as u64) as usize];
                When::Passing(point, chance.range(1, 8))
            }
            false => When::At(chance.range(5_000, calm_us - 300_000)),
        };
        let target = match chance.chance(300) {
            true => Target::Primary,
            false => Target::Secondary,
        };
        strikes.push(Strike {
            when,
            target,
            fault: Fault::Streams(fault),
        });
        // And something else while they are opened anew.
        if chance.chance(250) {
            let points = &POINTS[..STREAMS_ANEW];
            let (target, point) = points[chance.below(points.len() as u64) as usize];
            strikes.push(Strike {
                when: When::Passing(point, chance.range(1, 3)),
                target,
                fault: self::fault(chance, timing),
            });
        }
    }
}

fn fault(chance: &mut Prng, timing: &Timing) -> Fault {
    let detection = timing.detection_us();
    let span = |chance: &mut Prng| match chance.below(4) {
        0 => chance.below(detection / 3),
        1 => chance.range(detection / 2, detection * 2),
        2 => chance.range(detection, detection * 5),
        _ => 200_000,
    };
    match chance.below(14) {
        0..=2 => Fault::Kill,
        11..=13 => Fault::FallSilent(chance.below(detection)),
        3 | 4 => Fault::PowerOff,
        5 => Fault::Pause(span(chance)),
        6 => Fault::Pause(span(chance)),
        7 => Fault::Deafen(span(chance)),
        8 => Fault::Cut(if chance.chance(400) {
            u64::MAX
        } else {
            span(chance)
        }),
        9 => Fault::Reset,
        _ => Fault::ArbiterOutage(chance.range(5_000, 300_000)),
    }
}
