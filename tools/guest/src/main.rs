//! The demo guest: a network server on a bare virtual CPU in user mode.
//!
//! It starts as ARCHITECTURE.md ("Guest platform") says, finds its network device on the command
//! line, polls its rings, and sleeps through an I/O port when it has been idle for a while. All
//! services are in `colo-guest-server`.
//!
//! Invariants: one thread, no interrupts; every fault and panic ends in a message on the serial
//! port and a halt.
//!
//! Does not use any instruction that needs more than CPL 3 with IOPL 3.
#![no_std]
#![no_main]

extern crate alloc;

mod boot;
mod clock;
mod console;
mod cpu;
mod heap;
mod mem;
mod net;
mod options;
mod receiver;
mod sender;
mod virtio_mmio;
mod virtqueue;

use alloc::boxed::Box;
use clock::Clock;
use colo_guest_server::{FrameDevice, Limits, Need, Patience, Server};
use console::{Console, say};
use core::panic::PanicInfo;
use options::Options;

/// Most time between two looks at the rings when there is nothing to wait for.
const SLEEP_FOR_EVER: u32 = 0;
/// Most time between two looks at the link while there is work; an idle guest is woken when it changes.
const LINK_LOOK_US: i64 = 100_000;

/// Where the VMM enters, through `cpu::_start`.
extern "C" fn start(start_info: u64) -> ! {
    // SAFETY: the VMM passes the address of its start info, which nobody writes while the guest
    // runs; this is the first and only call.
    let boot = match unsafe { boot::read(start_info) } {
        Ok(boot) => boot,
        Err(error) => fail(&error),
    };
    let mut heap_bytes = 0;
    for range in boot.heap() {
        let bytes = range.len();
        // SAFETY: the range is usable RAM by the memory map, lies beyond the image and the start
        // info, and is claimed only here; the ranges of the map do not overlap.
        if unsafe { heap::claim(range) } {
            heap_bytes += bytes;
        }
    }
    if heap_bytes == 0 {
        fail(&"the memory map leaves no room for the heap");
    }
    let options = match Options::parse(boot.command_line) {
        Ok(options) => options,
        Err(error) => fail(&error),
    };
    run(&options, heap_bytes)
}

fn run(options: &Options, heap_bytes: usize) -> ! {
    let clock = Clock::new(options.tsc_khz, options.wall_ns);
    let mut device = match net::NetDevice::new(options.device_base, options.pairs) {
        Ok(device) => device,
        Err(error) => fail(&error),
    };
    let addresses = options.addresses(device.mac());
    let limits = Limits::for_heap(heap_bytes);
    let mut server = Server::new(
        &mut device,
        &addresses,
        limits,
        Box::new(clock),
        clock.now_us(),
    );
    match addresses.networks.first() {
        Some(network) => say(format_args!("colo-guest ready ip={}\n", network.address())),
        None => say(format_args!("colo-guest ready\n")),
    }
    if device.pairs() > 1 {
        say(format_args!("colo-guest queue pairs {}\n", device.pairs()));
    }
    server.set_link(device.link_is_up());
    let mut patience = Patience::new(options.spin_us);
    let mut busy_us = clock.now_us();
    let mut looked_us = busy_us;
    // Whether a sleep has ended since, for which the link may have been the reason.
    let mut owes_look = false;
    loop {
        let now_us = clock.now_us();
        if now_us - looked_us >= LINK_LOOK_US {
            look_at_link(&mut server, &mut device);
            looked_us = now_us;
            owes_look = false;
        }
        if server.turn(&mut device, now_us) {
            busy_us = now_us;
        } else if now_us - busy_us < patience.spin_us() {
            core::hint::spin_loop();
        } else {
            let until_us = if owes_look {
                looked_us + LINK_LOOK_US
            } else {
                i64::MAX
            };
            sleep(&mut server, &mut device, &clock, until_us);
            owes_look = true;
            busy_us = clock.now_us();
            patience.slept(busy_us - now_us);
        }
    }
}

fn look_at_link(server: &mut Server, device: &mut net::NetDevice) {
    if let Some(is_up) = device.link_change() {
        say(format_args!(
            "colo-guest link {}\n",
            if is_up { "up" } else { "down" }
        ));
        server.set_link(is_up);
    }
}

/// Sleeps until the device has news, a timer of the server is due, or it is `until_us`.
fn sleep(server: &mut Server, device: &mut net::NetDevice, clock: &Clock, until_us: i64) {
    device.flush();
    let quiet = match server.need(device) {
        Need::Nothing => false,
        Need::Frames => device.arm_receive(),
        Need::Room => device.arm_transmit(),
    };
    if !quiet {
        return;
    }
    let wake_us = server.wake_us().min(until_us);
    let sleep_us = if wake_us == i64::MAX {
        SLEEP_FOR_EVER
    } else {
        let left_us = wake_us.saturating_sub(clock.now_us());
        if left_us <= 0 {
            return;
        }
        u32::try_from(left_us).unwrap_or(u32::MAX)
    };
    cpu::sleep(sleep_us);
}

/// Reports an error that leaves nothing to do, and powers off.
fn fail(error: &dyn core::fmt::Display) -> ! {
    say(format_args!("colo-guest: {error}\n"));
    cpu::power_off()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    use core::fmt::Write;
    // The port may be in the middle of a line; a console that fails cannot be reported.
    let _ = writeln!(Console, "\ncolo-guest: {info}");
    cpu::halt()
}
