//! Applies of what another machine was, on the real KVM.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Instant;

use colo_compare::{Limits, PrimaryPath};
use colo_fastpath::link::PacketLink;
use colo_fastpath::mailbox::Mailbox;
use colo_fastpath::pair::SecondaryRoleConfig;

use super::*;
use crate::checkpoint::ahead::area::Area;
use crate::checkpoint::audit::tests::Records;
use crate::checkpoint::channel::{PageChannel, Settings};
use crate::checkpoint::codec::PageKey;
use crate::checkpoint::pages::PAGE_BYTES;
use crate::checkpoint::stage::accept::ShardState;
use crate::checkpoint::stage::{Over, StageCommand, StageEvent};
use crate::checkpoint::staging::{LiveMemory, Staging};
use crate::machine::VcpuState;
use crate::machine::tests::{COUNT_AND_SLEEP, COUNTER, Lab, running, stopped};

const KEY: [u8; 16] = [5; 16];
const MAC: [u8; 6] = [0x52, 0x54, 0, 0xc0, 0x10, 1];

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

/// Lets the machine of a stage run from what `primary` is now, if that is what `audit` says. Gives what the thread reports,
/// whether it goes on, and the machine.
fn apply(primary: &Lab, audit: Summary) -> (StageEvent, bool, Arc<Machine>) {
    let machine = Arc::new(stopped(COUNT_AND_SLEEP).machine);
    let (ours, _packets) = sockets();
    let (pair_post, _pair_events) = Mailbox::new().unwrap();
    let (limits, mac) = (Limits::default(), MAC);
    let role = SecondaryRole::new(
        &SecondaryRoleConfig { limits, mac },
        PacketLink::new(ours).unwrap(),
        pair_post,
    );
    machine.worker().set_role(Box::new(role)).unwrap();
    let mut page = [0; PAGE_BYTES];
    for number in 0..machine.ram().page_count() {
        primary
            .machine
            .ram()
            .copy_page_out(number, &mut page)
            .unwrap();
        machine.ram().write_page(number, &page).unwrap();
    }
    let (records, mut translations) = (Records::of(&primary.machine), Vec::new());
    PrimaryPath::new(limits).export_client_xlate(&mut translations);
    let accepted = Accepted {
        epoch: 1,
        begun: Instant::now(),
        vcpus: records.states(),
        platform: records.platform,
        devices: records.devices,
        audit: Some(audit),
        shards: vec![ShardState {
            translations,
            pending: Vec::new(),
        }],
    };
    let (near, _far) = sockets();
    let (post, events) = Mailbox::new().unwrap();
    let (orders, commands) = channel();
    let pages = machine.ram().page_count();
    let mut thread = StageThread {
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

impl Records {
    fn states(&self) -> Vec<VcpuState> {
        let states = self
            .vcpus
            .iter()
            .map(|record| VcpuState::from_bytes(record));
        states.collect::<Result<_, _>>().unwrap()
    }

    /// What an audit says of them and of the machine's memory.
    fn audit(&self, machine: &Machine) -> Summary {
        let key = PageKey::new(KEY);
        let image = Image::of(0, &key, machine.ram(), self.all()).unwrap();
        image.summary(&key)
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
    let audit = Records::of(&primary.machine).audit(&primary.machine);
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
fn rule_16_what_the_audit_finds_to_differ_does_not_run() {
    let primary = primary();
    let machine = &primary.machine;
    let mut nudged = Records::of(machine);
    let mut state = nudged.states().remove(0);
    state.nudge_register();
    nudged.vcpus = vec![state.to_bytes()];
    let of_state = nudged.audit(machine);
    let at = COUNTER + 4096 * 3;
    machine.ram().write(at, &[1]).unwrap();
    let of_memory = Records::of(machine).audit(machine);
    machine.ram().write(at, &[0]).unwrap();
    for (audit, what) in [
        (of_state, "vCPU 0: registers".to_owned()),
        (of_memory, format!("guest page {}", at / 4096)),
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
