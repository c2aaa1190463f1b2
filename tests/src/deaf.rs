//! What a secondary's NIC does with frames for its guest (rule 24).
//!
//! Functions panic with what went wrong, as tests do.

use std::time::Duration;

use colo_lab::pair::Pair;
use colo_lab::topology::{GUEST_MAC, Host};
use serde_json::Value;

use crate::wire::Wire;

const PATIENCE: Duration = Duration::from_secs(30);
/// So many frames are sent, as a switch does that floods.
const FLOODED: u64 = 50;
/// A type that no guest answers.
const TYPE: [u8; 2] = [0x88, 0xb6];

fn count(status: &Value, name: &str) -> u64 {
    let value = &status["nic"][name];
    value
        .as_u64()
        .unwrap_or_else(|| panic!("nic.{name}: {value}"))
}

fn flood(port: &str) {
    let wire = Wire::open(port).expect("open the switch's port");
    let mac = GUEST_MAC
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).expect("a MAC"));
    let mut frame: Vec<u8> = mac.collect();
    frame.extend([2, 0, 0, 0, 0, 9]);
    frame.extend(TYPE);
    frame.resize(60, 0);
    for _ in 0..FLOODED {
        wire.send(&frame).expect("send a frame");
    }
}

/// The switch sends frames for the guest to a secondary over AF_XDP, too: all are dropped before its guest's NIC, and none
/// gets through.
#[track_caller]
pub fn assert_drops_the_guests_frames(pair: &mut Pair, secondary: Host) {
    let before = pair.process(secondary).status().expect("a status");
    assert_eq!(before["role"], "secondary", "{before:#}");
    let send = || flood(secondary.port());
    pair.topology.switch.run(send).expect("enter the switch");
    let dropped = count(&before, "xdp_guest_dropped_frames") + FLOODED;
    let has_met_all = |status: &Value| {
        let met = ["xdp_guest_dropped_frames", "xdp_guest_frames"].map(|name| count(status, name));
        met.iter().sum::<u64>() >= dropped + count(&before, "xdp_guest_frames")
    };
    let process = pair.process(secondary);
    let after = process.wait_status("met by the flood", PATIENCE, has_met_all);
    let after = after.expect("the flood is counted");
    assert!(
        count(&after, "xdp_guest_dropped_frames") >= dropped,
        "{}",
        after["nic"]
    );
    for never in ["xdp_guest_frames", "xdp_guest_unbound_frames"] {
        assert_eq!(count(&after, never), count(&before, never), "{never}");
    }
}
