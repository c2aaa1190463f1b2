//! vCPUs that may run only a share of the time, on the real KVM.

use std::time::Duration;

use super::VmExit;
use super::tests::{COUNT, COUNT_AND_SLEEP, COUNTER, Lab, POWER_OFF, running};

impl Lab {
    /// Waits until the guest was kept standing for so much longer.
    fn wait_stood(&self, time: Duration) {
        let until_us = self.machine.throttled_us() + time.as_micros() as u64;
        while self.machine.throttled_us() < until_us {
            std::thread::yield_now();
        }
    }
}

const A_WHILE: Duration = Duration::from_millis(50);

#[test]
fn a_guest_with_a_share_of_nothing_stands_still_and_goes_on_when_it_is_given_one() {
    for code in [COUNT, COUNT_AND_SLEEP] {
        let lab = running(code);
        lab.wait_until_counter_moves();
        assert_eq!(lab.machine.throttled_us(), 0);
        lab.machine.throttle_vcpus(0).unwrap();
        lab.wait_stood(A_WHILE);
        let stopped = lab.counter(COUNTER);
        lab.wait_stood(A_WHILE);
        assert_eq!(lab.counter(COUNTER), stopped);
        lab.machine.throttle_vcpus(100).unwrap();
        lab.wait_until_counter_moves();
    }
}

#[test]
fn a_guest_without_exits_gets_slices_and_stands_between_them() {
    let lab = running(COUNT);
    lab.wait_until_counter_moves();
    for run_pct in [50, 10, 1] {
        lab.machine.throttle_vcpus(run_pct).unwrap();
        for _ in 0..5 {
            lab.wait_stood(A_WHILE);
            lab.wait_until_counter_moves();
        }
    }
    // Nobody kicked it so often: slices ended by themselves.
    assert!(lab.machine.exits()[0].signal >= 15);
    lab.machine.throttle_vcpus(100).unwrap();
    lab.machine.pause_vcpus().unwrap();
    let stood_us = lab.machine.throttled_us();
    lab.machine.resume_vcpus().unwrap();
    for _ in 0..100 {
        lab.wait_until_counter_moves();
    }
    assert_eq!(
        lab.machine.throttled_us(),
        stood_us,
        "it has all of its time again"
    );
}

#[test]
fn captures_and_orders_go_on_as_usual_while_a_guest_is_slowed_down_or_stands() {
    let lab = running(COUNT_AND_SLEEP);
    lab.wait_until_counter_moves();
    for run_pct in [0, 1, 30] {
        lab.machine.throttle_vcpus(run_pct).unwrap();
        for _ in 0..50 {
            lab.machine.pause_vcpus_for_capture().unwrap();
            let stopped = lab.counter(COUNTER);
            lab.machine.save_vcpus().unwrap();
            lab.machine.save_vcpu_records(&mut Vec::new()).unwrap();
            assert_eq!(lab.counter(COUNTER), stopped);
            lab.machine.resume_vcpus().unwrap();
        }
    }
    lab.machine.throttle_vcpus(0).unwrap();
    lab.wait_stood(A_WHILE);
    // A pause does not end it,
    lab.machine.pause_vcpus().unwrap();
    lab.machine.resume_vcpus().unwrap();
    let stopped = lab.counter(COUNTER);
    lab.wait_stood(A_WHILE);
    assert_eq!(lab.counter(COUNTER), stopped);
    // and what is ordered in a pause counts behind it.
    lab.machine.pause_vcpus().unwrap();
    lab.machine.throttle_vcpus(100).unwrap();
    lab.machine.resume_vcpus().unwrap();
    lab.wait_until_counter_moves();
}

#[test]
fn a_slowed_guest_powers_off_and_a_standing_machine_can_be_dropped() {
    let lab = running(COUNT);
    lab.machine.throttle_vcpus(0).unwrap();
    lab.wait_stood(A_WHILE);
    drop(lab);
    let lab = super::tests::stopped(POWER_OFF);
    lab.machine.throttle_vcpus(1).unwrap();
    lab.machine.resume_vcpus().unwrap();
    assert_eq!(lab.end(), VmExit::PowerOff);
}
