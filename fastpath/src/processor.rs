//! The processor that a thread runs on: how often others have taken it, and leaving it for another.
//!
//! Invariants: a thread that has left a processor may run where it was allowed to before. A set of processors that is made
//! larger later does not reach it any more, as is so for all who have ever said where they may run.
//!
//! Does not choose where to go: the kernel does, among the others that are allowed.

use std::io;

/// How often others ran while the calling thread wanted to, since it began.
pub fn switches() -> u64 {
    // SAFETY: integers only; all zero is a value of each.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills in the structure, which lives through the call.
    let status = unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    match status {
        0 => u64::try_from(usage.ru_nivcsw).unwrap_or(0),
        _ => 0,
    }
}

/// Moves the calling thread to another of the processors that it may use. `false`: there is no other.
pub fn leave() -> io::Result<bool> {
    let allowed = allowed()?;
    let has_left = go_elsewhere(allowed)?;
    if has_left {
        allow(&allowed)?;
    }
    Ok(has_left)
}

/// Lets the calling thread run on these but for the one that it runs on now, if there are others.
fn go_elsewhere(mut others: libc::cpu_set_t) -> io::Result<bool> {
    // SAFETY: no arguments.
    let here = unsafe { libc::sched_getcpu() };
    let here = usize::try_from(here).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: `here` is a processor of this machine, and the set has room for as many as the kernel told of.
    let count = unsafe {
        libc::CPU_CLR(here, &mut others);
        libc::CPU_COUNT(&others)
    };
    if count == 0 {
        return Ok(false);
    }
    allow(&others)?;
    Ok(true)
}

/// Where the calling thread may run; an error where there are more processors than the set has room for.
pub(crate) fn allowed() -> io::Result<libc::cpu_set_t> {
    // SAFETY: integers only; all zero is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes at most `size_of` bytes of `set`, which lives through the call; thread 0 is the
    // calling one.
    let status = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    outcome(status).map(|()| set)
}

/// Lets the calling thread run on these.
pub(crate) fn allow(set: &libc::cpu_set_t) -> io::Result<()> {
    // SAFETY: the kernel reads `size_of` bytes of `set`, all of them initialised; thread 0 is the calling one.
    let status = unsafe { libc::sched_setaffinity(0, size_of_val(set), set) };
    outcome(status)
}

fn outcome(status: libc::c_int) -> io::Result<()> {
    match status {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(set: &libc::cpu_set_t) -> Vec<usize> {
        let is_member = |&cpu: &usize| {
            // SAFETY: within the set's size.
            unsafe { libc::CPU_ISSET(cpu, set) }
        };
        (0..libc::CPU_SETSIZE as usize).filter(is_member).collect()
    }

    #[test]
    fn who_leaves_may_come_back() {
        std::thread::spawn(|| {
            let before = members(&allowed().unwrap());
            assert_eq!(leave().unwrap(), before.len() > 1);
            assert_eq!(members(&allowed().unwrap()), before);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn who_is_pinned_stays() {
        std::thread::spawn(|| {
            let cpu = members(&allowed().unwrap())[0];
            assert!(core_affinity::set_for_current(core_affinity::CoreId {
                id: cpu
            }));
            assert!(!leave().unwrap());
            assert_eq!(members(&allowed().unwrap()), [cpu]);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn the_processor_left_is_another_one() {
        std::thread::spawn(|| {
            if members(&allowed().unwrap()).len() < 2 {
                println!("SKIPPED: two processors are needed, for one to be left");
                return;
            }
            let cpu = members(&allowed().unwrap())[0];
            // Nobody moves it but itself while no other is allowed.
            let all = allowed().unwrap();
            assert!(core_affinity::set_for_current(core_affinity::CoreId {
                id: cpu
            }));
            // SAFETY: no arguments.
            let here = || unsafe { libc::sched_getcpu() };
            assert_eq!(here(), cpu as i32);
            // It goes by where the thread runs, and that is still this one.
            assert!(go_elsewhere(all).unwrap());
            assert_ne!(here(), cpu as i32);
            assert!(!members(&allowed().unwrap()).contains(&cpu));
        })
        .join()
        .unwrap();
    }
}
