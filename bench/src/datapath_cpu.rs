//! CPU time of a process, thread by thread, in nanoseconds (`/proc/PID/task/TID/schedstat`).
//!
//! Invariants: a thread that came or went between two readings is not in their difference.
//!
//! The kernel brings the time of a thread that runs up to date at its ticks, so a reading is some
//! milliseconds old at most. What interrupts do is charged to whoever they interrupt.

use std::fs;
use std::path::Path;

use crate::place::BenchError;

/// What a thread has used.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ThreadTime {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) cpu_ns: u64,
    /// Times that it went to sleep.
    pub(crate) sleeps: u64,
}

/// All threads of a process at one moment, or what they used between two.
#[derive(Debug, Clone, Default)]
pub(crate) struct CpuTimes(pub(crate) Vec<ThreadTime>);

impl CpuTimes {
    /// Of a process.
    pub(crate) fn read(pid: u32) -> Result<Self, BenchError> {
        let tasks = format!("/proc/{pid}/task");
        let failed = || BenchError::io(format!("read {tasks}"));
        let mut threads = Vec::new();
        for entry in fs::read_dir(&tasks).map_err(failed())? {
            let path = entry.map_err(failed())?.path();
            // A thread may end at any time.
            threads.extend(read_thread(&path));
        }
        if threads.is_empty() {
            return Err(BenchError::Unreadable {
                program: "/proc/PID/task",
                what: "CPU time",
                output: tasks,
            });
        }
        threads.sort_by_key(|thread| thread.id);
        Ok(Self(threads))
    }

    /// What was used since an earlier reading.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let difference = self.0.iter().filter_map(|now| {
            let then = before.0.iter().find(|then| then.id == now.id)?;
            Some(ThreadTime {
                cpu_ns: now.cpu_ns.saturating_sub(then.cpu_ns),
                sleeps: now.sleeps.saturating_sub(then.sleeps),
                ..now.clone()
            })
        });
        Self(difference.collect())
    }

    /// Seconds of all threads.
    pub(crate) fn process_s(&self) -> f64 {
        self.seconds(|_| true)
    }

    /// Seconds of the threads that move packets.
    pub(crate) fn worker_s(&self) -> f64 {
        self.seconds(|thread| thread.name.starts_with("worker"))
    }

    fn seconds(&self, wanted: impl Fn(&ThreadTime) -> bool) -> f64 {
        let wanted = self.0.iter().filter(|thread| wanted(thread));
        wanted.map(|thread| thread.cpu_ns).sum::<u64>() as f64 / 1e9
    }
}

/// CPU time of the calling thread.
pub(crate) fn thread_cpu_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec that lives on this stack.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn read_thread(path: &Path) -> Option<ThreadTime> {
    let read = |file: &str| fs::read_to_string(path.join(file)).ok();
    Some(ThreadTime {
        id: path.file_name()?.to_str()?.parse().ok()?,
        name: read("comm")?.trim().to_owned(),
        cpu_ns: run_ns(&read("schedstat")?)?,
        sleeps: voluntary_switches(&read("status")?)?,
    })
}

/// The first of three fields (`Documentation/scheduler/sched-stats.rst`).
fn run_ns(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().next()?.parse().ok()
}

fn voluntary_switches(status: &str) -> Option<u64> {
    let mut lines = status.lines();
    let value = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
    value.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_time_while_it_computes() {
        let pid = std::process::id();
        let before = CpuTimes::read(pid).unwrap();
        let mut sum = 0_u64;
        let used = loop {
            sum = (0..1_000_000).fold(sum, |sum, n| sum.rotate_left(1) ^ n);
            let used = CpuTimes::read(pid).unwrap().since(&before);
            if used.process_s() > 0.0 {
                break used;
            }
        };
        assert!(!used.0.is_empty(), "{sum}");
    }

    #[test]
    fn a_thread_that_came_later_is_left_out() {
        let thread = |id, name: &str, cpu_ns| ThreadTime {
            id,
            name: name.to_owned(),
            cpu_ns,
            sleeps: 3,
        };
        let before = CpuTimes(vec![thread(1, "worker", 1_000_000_000)]);
        let after = CpuTimes(vec![
            thread(1, "worker", 3_500_000_000),
            thread(2, "vcpu0", 9),
        ]);
        let used = after.since(&before);
        assert_eq!((used.worker_s(), used.process_s()), (2.5, 2.5));
        assert_eq!(used.0[0].sleeps, 0);
    }

    #[test]
    fn fields_are_found() {
        assert_eq!(run_ns("123 45 6\n"), Some(123));
        assert_eq!(run_ns(""), None);
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t150\nnonvoluntary_ctxt_switches:\t545\n";
        assert_eq!(voluntary_switches(status), Some(150));
    }
}
