//! A share of one processor for some threads of a process, as a busy host gives them.
//!
//! Invariant: whatever becomes of the test, the threads run without a limit afterwards and the group is gone.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use colo_lab::process::Process;

/// Where the kernel shares out processors by threads.
const GROUPS: &str = "/sys/fs/cgroup/cpu";
/// A group has its share in each such while.
const PERIOD_US: u64 = 10_000;

/// The vCPUs of a process, limited as long as this lives.
#[derive(Debug)]
pub struct VcpuQuota(PathBuf);

impl VcpuQuota {
    /// So many percent of one processor for all vCPUs of a process together. `None`, and a word about it, where this cannot be
    /// had (cgroup v1).
    pub fn new(process: &Process, percent: u64) -> Option<Self> {
        let quota = Self(Path::new(GROUPS).join(format!("colo-test-{}", process.pid())));
        match quota.begin(process, percent) {
            Ok(()) => Some(quota),
            Err(e) => {
                println!("SKIPPED: no share of a processor for single threads: {e}");
                None
            }
        }
    }

    fn begin(&self, process: &Process, percent: u64) -> io::Result<()> {
        fs::create_dir(&self.0)?;
        self.write("cpu.cfs_period_us", PERIOD_US)?;
        self.write("cpu.cfs_quota_us", PERIOD_US * percent / 100)?;
        let mut found = 0;
        for thread in fs::read_dir(format!("/proc/{}/task", process.pid()))? {
            let path = thread?.path();
            let id = path
                .file_name()
                .and_then(|name| name.to_str()?.parse().ok());
            if fs::read_to_string(path.join("comm"))?.starts_with("vcpu") {
                self.write("tasks", id.unwrap_or_default())?;
                found += 1;
            }
        }
        assert!(found > 0, "no vCPU in {}", process.name());
        Ok(())
    }

    fn write(&self, file: &str, value: u64) -> io::Result<()> {
        fs::write(self.0.join(file), value.to_string())
    }
}

impl Drop for VcpuQuota {
    fn drop(&mut self) {
        let threads = fs::read_to_string(self.0.join("tasks")).unwrap_or_default();
        for thread in threads.lines() {
            // One that has ended is in no group.
            let _ = fs::write(Path::new(GROUPS).join("tasks"), thread);
        }
        let _ = fs::remove_dir(&self.0);
    }
}
