//! Machines on the real KVM and their capture threads, whose secondaries say nothing, for tests.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use colo_compare::{Limits, Policy};
use colo_fastpath::Mac;
use colo_fastpath::link::PacketLink;
use colo_fastpath::mailbox::Mailbox;
use colo_fastpath::pair::{Lease, OnWorkers, PrimaryRole, PrimaryRoleConfig};

use super::{CaptureEvent, CaptureSettings, CaptureThread};
use crate::checkpoint::ahead::AheadSettings;
use crate::checkpoint::channel::Settings;
use crate::checkpoint::outbound::OutboundSettings;
use crate::checkpoint::stabilise::StabilisePolicy;
use crate::machine::Machine;

/// The guest's address; nothing of these tests looks at it.
const MAC: Mac = [0x52, 0x54, 0, 0xc0, 0x10, 1];

/// A capture thread whose secondary says nothing, and what must live as long.
pub(super) fn thread(
    machine: &Arc<Machine>,
    policy: StabilisePolicy,
) -> (CaptureThread, impl Sized + use<>) {
    let (post, events) = Mailbox::<CaptureEvent>::new().unwrap();
    let settings = CaptureSettings {
        stabilise: policy,
        arena_pages: 8192,
        audit_every: 0,
        ahead: AheadSettings {
            interval: std::time::Duration::from_secs(60),
            mib_per_s: 1,
        },
        outbound: OutboundSettings {
            channel: Settings::default(),
            cache_mib: 0,
            verify_one_in: 0,
            lends: false,
        },
    };
    let mut thread = CaptureThread::new(machine.clone(), settings, post);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let session = thread.open_session(vec![near], 1, [7; 16]).unwrap();
    thread.session = Some(session);
    thread.carry.clear();
    (thread, (events, listener.accept().unwrap()))
}

/// Of a role that nothing hurries.
pub(crate) fn primary_config() -> PrimaryRoleConfig {
    PrimaryRoleConfig {
        limits: Limits::default(),
        policy: Policy::default(),
        gap_limit_us: u64::MAX / 2,
        frame_slots: 1024,
        gaps: Arc::default(),
        lease: Lease::default(),
        answers: Default::default(),
        digest_key: None,
    }
}

/// Puts a machine's workers into the primary's role. Gives what must live as long.
pub(super) fn as_primary(machine: &Machine) -> impl Sized + use<> {
    let (post, mailbox) = Mailbox::new().unwrap();
    let role = primary_config();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut peers = Vec::new();
    for worker in machine.workers() {
        let role = PrimaryRole::new(&role, MAC, post.clone());
        worker.set_role(Box::new(role)).unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        peers.push(listener.accept().unwrap());
        let link = PacketLink::new(stream).unwrap();
        PrimaryRole::on_worker(worker, |role, edge| role.attach(edge, link)).unwrap();
    }
    (mailbox, peers)
}
