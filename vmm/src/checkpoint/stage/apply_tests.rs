//! Applies of what another machine was, on the real KVM.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use colo_compare::{Limits, PrimaryPath};
use colo_fastpath::link::PacketLink;
use colo_fastpath::mailbox::Mailbox;
use colo_fastpath::pair::SecondaryRoleConfig;

use super::*;
use crate::checkpoint::ahead::area::Area;
use crate::checkpoint::audit::tests::Records;
use crate::checkpoint::capture::lab::primary_config;
use crate::checkpoint::channel::{PageChannel, Settings};
use crate::checkpoint::codec::PageKey;
use crate::checkpoint::pages::PAGE_BYTES;
use crate::checkpoint::pending;
use crate::checkpoint::stage::accept::ShardState;
use crate::checkpoint::stage::{Over, StageCommand, StageEvent};
use crate::checkpoint::staging::{LiveMemory, Staging};
use crate::checkpoint::states::{State, StateKind};
use crate::machine::VcpuState;
use crate::machine::tests::{COUNT_AND_SLEEP, COUNTER, Lab, running, stopped};

const KEY: [u8; 16] = [5; 16];
const MAC: [u8; 6] = [0x52, 0x54, 0, 0xc0, 0x10, 1];

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

/// A machine that has never run, in the secondary's role, and what must live as long.
fn secondary() -> (Arc<Machine>, impl Sized) {
    let machine = Arc::new(stopped(COUNT_AND_SLEEP).machine);
    let (ours, packets) = sockets();
    let (pair_post, pair_events) = Mailbox::new().unwrap();
    let (limits, mac) = (Limits::default(), MAC);
    let role = SecondaryRole::new(
        &SecondaryRoleConfig { limits, mac },
        PacketLink::new(ours).unwrap(),
        pair_post,
    );
    machine.worker().set_role(Box::new(role)).unwrap();
    (machine, (packets, pair_events))
}

/// Its stage, with all that is told to it and that it tells.
fn stage(machine: &Arc<Machine>) -> (StageThread, Mailbox<StageEvent>, Sender<StageCommand>) {
    let (near, _far) = sockets();
    let (post, events) = Mailbox::new().unwrap();
    let (orders, commands) = channel();
    let pages = machine.ram().page_count();
    let thread = StageThread {
        staging: Staging::new(pages, 1),
        area: Area::new(pages, 0),
        memory: LiveMemory::new(pages),
        machine: machine.clone(),
        post,
        channel: PageChannel::new(vec![near], Settings::default()).unwrap(),
        commands,
        ordered: None,
        listed: None,
        key: Some(PageKey::new(KEY)),
        key_bytes: Some(KEY),
        open: None,
        begun: Arc::default(),
        live: false,
    };
    (thread, events, orders)
}

/// Of a shard that has none.
fn translations() -> Vec<u8> {
    let mut record = Vec::new();
    PrimaryPath::new(Limits::default()).export_client_xlate(&mut record);
    record
}

/// Lets the machine of a stage run from what `primary` is now, if that is what `audit` says. Gives what the thread reports,
/// whether it goes on, and the machine.
fn apply(primary: &Lab, audit: Summary) -> (StageEvent, bool, Arc<Machine>) {
    apply_with(primary, audit, packets(MAC, b"held"))
}

/// The same with another packet side.
fn apply_with(
    primary: &Lab,
    audit: Summary,
    shard: ShardState,
) -> (StageEvent, bool, Arc<Machine>) {
    let (machine, _kept) = secondary();
    let mut page = [0; PAGE_BYTES];
    for number in 0..machine.ram().page_count() {
        primary
            .machine
            .ram()
            .copy_page_out(number, &mut page)
            .unwrap();
        machine.ram().write_page(number, &page).unwrap();
    }
    let records = Records::of(&primary.machine);
    let accepted = Accepted {
        epoch: 1,
        begun: Instant::now(),
        vcpus: records.states(),
        platform: records.platform,
        devices: records.devices,
        audit: Some(audit),
        shards: vec![shard],
    };
    let (mut thread, events, orders) = stage(&machine);
    // As before it was said to be staged.
    machine.set_dirty_logging(true).unwrap();
    orders.send(StageCommand::Apply { halt: false }).unwrap();
    let goes_on = match thread.decided(accepted, 0) {
        Ok(()) => true,
        Err(Over::Quietly) => false,
        Err(Over::Link(reason) | Over::Streams(reason)) => panic!("{reason}"),
    };
    (events.try_next().unwrap(), goes_on, machine)
}

/// The packet side of the one shard of a primary whose guest has this address and sent one frame that is still undecided.
fn packets(mac: [u8; 6], frame: &[u8]) -> ShardState {
    let (mut path, mut translations) = (PrimaryPath::new(Limits::default()), Vec::new());
    path.set_guest_mac(mac);
    path.export_client_xlate(&mut translations);
    ShardState {
        translations,
        pending: vec![frame.to_vec()],
    }
}

impl Records {
    fn states(&self) -> Vec<VcpuState> {
        let states = self
            .vcpus
            .iter()
            .map(|record| VcpuState::from_bytes(record));
        states.collect::<Result<_, _>>().unwrap()
    }

    /// What an audit says of them, of the machine's memory and of its packet side.
    fn audit(&self, machine: &Machine, shard: &ShardState) -> Summary {
        let key = PageKey::new(KEY);
        let image = Image::of(0, &key, machine.ram(), self.all()).unwrap();
        let shard = PacketRecords {
            translations: &shard.translations,
            pending: &pending::write_record(&shard.pending, Vec::new()),
        };
        image.with_packets(&key, &[shard]).unwrap().summary(&key)
    }
}

fn counter(machine: &Machine) -> u64 {
    let mut bytes = [0; 8];
    machine.ram().read(COUNTER, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// A guest that has run and stands still.
fn primary() -> Lab {
    let lab = running(COUNT_AND_SLEEP);
    lab.wait_until_counter_moves();
    lab.machine.pause_vcpus().unwrap();
    lab
}

#[test]
fn rule_16_what_the_audit_finds_to_be_the_same_runs() {
    let primary = primary();
    let audit = Records::of(&primary.machine).audit(&primary.machine, &packets(MAC, b"held"));
    let (event, goes_on, machine) = apply(&primary, audit);
    assert!(
        goes_on && matches!(event, StageEvent::Applied { epoch: 1, .. }),
        "{event:?}"
    );
    while counter(&machine) == primary.counter(COUNTER) {
        std::thread::yield_now();
    }
}

#[test]
fn rule_12_who_takes_over_from_an_applied_state_has_its_pending_output() {
    let primary = primary();
    let shard = ShardState {
        pending: vec![vec![7; 60], vec![8; 60]],
        ..packets(MAC, b"")
    };
    let audit = Records::of(&primary.machine).audit(&primary.machine, &shard);
    let (event, goes_on, machine) = apply_with(&primary, audit, shard);
    assert!(goes_on, "{event:?}");
    let config = primary_config();
    let (post, _events) = Mailbox::new().unwrap();
    let unsent = SecondaryRole::on_worker(machine.worker(), move |role, edge| {
        let role = role.take_over(edge, &config, post)?;
        Some(role.report().stats.released_alone)
    });
    assert_eq!(unsent.flatten(), Some(2));
}

#[test]
fn rule_16_what_the_audit_finds_to_differ_does_not_run() {
    let primary = primary();
    let machine = &primary.machine;
    let mut nudged = Records::of(machine);
    let mut state = nudged.states().remove(0);
    state.nudge_register();
    nudged.vcpus = vec![state.to_bytes()];
    let (shard, records) = (packets(MAC, b"held"), Records::of(machine));
    let of_state = nudged.audit(machine, &shard);
    let of_translations = records.audit(machine, &packets([2; 6], b"held"));
    let of_pending = records.audit(machine, &packets(MAC, b"helD"));
    let at = COUNTER + 4096 * 3;
    machine.ram().write(at, &[1]).unwrap();
    let of_memory = records.audit(machine, &shard);
    machine.ram().write(at, &[0]).unwrap();
    for (audit, what) in [
        (of_state, "vCPU 0: registers".to_owned()),
        (of_memory, format!("guest page {}", at / 4096)),
        (of_translations, "shard 0: translations".to_owned()),
        (of_pending, "shard 0: pending output".to_owned()),
    ] {
        let (event, goes_on, applied) = apply(&primary, audit);
        let StageEvent::ApplyFailed { reason } = event else {
            panic!("{event:?}");
        };
        let different = StageError::Different(String::new()).to_string();
        assert!(
            reason.starts_with(&different) && reason.contains(&what),
            "{reason}"
        );
        assert!(!goes_on);
        // It stands where the primary stood: no vCPU was told to run.
        applied.pause_vcpus().unwrap();
        assert_eq!(counter(&applied), primary.counter(COUNTER));
        let parts = |machine| Records::of(machine).states()[0].parts();
        assert!(parts(&applied) == parts(machine));
    }
}

#[test]
fn rule_13_whatever_is_wrong_with_a_state_is_refused_before_the_commit_point() {
    let primary = primary();
    let records = Records::of(&primary.machine);
    let (machine, _kept) = secondary();
    let (mut thread, _events, _orders) = stage(&machine);
    let good = [
        State::new(StateKind::Vcpu, 0, records.vcpus[0].clone()),
        State::new(StateKind::Devices, 0, records.devices.clone()),
        State::new(StateKind::Translations, 0, translations()),
        State::new(
            StateKind::Pending,
            0,
            pending::write_record(&[vec![7; 60]], Vec::new()),
        ),
        State::new(StateKind::Platform, 0, records.platform.clone()),
    ];
    let mut accept = |states: &[State]| -> Result<(), StageError> {
        thread.staging.clear();
        for state in states {
            for (head, body) in state.parts(1 << 20) {
                thread.staging.add_state(&[&head[..], body].concat())?;
            }
        }
        thread.accept(1, Instant::now()).map(drop)
    };
    accept(&good).unwrap();
    for (n, state) in good.iter().enumerate() {
        let mut missing = good.to_vec();
        missing.remove(n);
        assert!(accept(&missing).is_err(), "without {}", state.kind);
        let mut more = good.to_vec();
        more.push(State {
            index: 1,
            ..state.clone()
        });
        assert!(accept(&more).is_err(), "two of {}", state.kind);
        let mut cut = good.to_vec();
        cut[n].bytes.pop();
        assert!(accept(&cut).is_err(), "{} is cut", state.kind);
    }
    let with = |n: usize, state: State| {
        let mut states = good.to_vec();
        states[n] = state;
        states
    };
    // Whole, but KVM would refuse it, or the packet side.
    let mut spoilt = records.states().remove(0);
    spoilt.spoil();
    let spoilt = State::new(StateKind::Vcpu, 0, spoilt.to_bytes());
    assert!(accept(&with(0, spoilt)).is_err());
    let long = pending::write_record(&[vec![7; 60_000]], Vec::new());
    let long = State::new(StateKind::Pending, 0, long);
    assert!(accept(&with(3, long)).is_err());
    let mut later = good.to_vec();
    later.push(State {
        kind: 77,
        index: 0,
        bytes: vec![1],
    });
    assert!(matches!(accept(&later), Err(StageError::UnknownKind(77))));
    accept(&good).unwrap();
}
