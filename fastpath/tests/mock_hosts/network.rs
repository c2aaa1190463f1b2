//! Two network namespaces with one cable between them, an interface `a0` in each.
//!
//! Invariants: a namespace lives as long as its thread, or what was opened in it; neither host says anything by itself, nor
//! looks for the other's address.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

/// Room for the link's headers around a whole frame of the guest's.
const MTU: u32 = 2000;
const INTERFACE: &str = "a0";

type Job = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace of its own.
pub struct Namespace {
    jobs: Sender<Job>,
}

impl Namespace {
    fn new() -> Self {
        let (jobs, theirs) = channel::<Job>();
        thread::spawn(move || {
            // SAFETY: unshare changes only the calling thread, which nothing else shares.
            let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(unshared, 0, "needs root");
            theirs.into_iter().for_each(|job| job());
        });
        Self { jobs }
    }

    /// Two that are connected: their hosts are 10.9.0.1 and 10.9.0.2.
    pub fn pair() -> [Self; 2] {
        let pair = [Self::new(), Self::new()];
        let [near, far] = &pair;
        // SAFETY: no preconditions.
        let tid = far.run(|| unsafe { libc::gettid() });
        near.run(move || {
            let end = |n: u8| format!("address {} mtu {MTU}", mac(n));
            let peer = format!("peer name {INTERFACE} {} netns {tid}", end(2));
            ip(&format!("link add {INTERFACE} {} type veth {peer}", end(1)));
        });
        for (side, n) in pair.iter().zip(1..) {
            side.run(move || {
                ip(&format!("link set {INTERFACE} addrgenmode none"));
                ip(&format!("link set {INTERFACE} up"));
                ip(&format!("addr add 10.9.0.{n}/24 dev {INTERFACE}"));
                let (other, at) = (3 - n, mac(3 - n));
                ip(&format!(
                    "neigh add 10.9.0.{other} lladdr {at} nud permanent dev {INTERFACE}"
                ));
            });
        }
        pair
    }

    /// What `job` gives in there, once it is done.
    pub fn begin<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Receiver<T> {
        let (done, is_done) = channel();
        let job = move || {
            let _ = done.send(job());
        };
        self.jobs.send(Box::new(job)).unwrap();
        is_done
    }

    /// The same, waited for.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        self.begin(job).recv().unwrap()
    }

    /// The interface in there.
    pub fn interface(&self) -> &'static str {
        INTERFACE
    }

    /// Somebody else on the cable at this end.
    pub fn station(&self) -> Station {
        self.run(Station::new)
    }
}

fn mac(n: u8) -> String {
    format!("02:00:00:00:01:{n:02x}")
}

fn ip(line: &str) {
    let status = Command::new("ip").args(line.split(' ')).status();
    assert!(status.unwrap().success(), "ip {line}");
}

/// Says whole frames.
pub struct Station(OwnedFd);

impl Station {
    fn new() -> Self {
        let name = std::ffi::CString::new(INTERFACE).unwrap();
        // SAFETY: reads a string that lives through the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        assert_ne!(index, 0, "{}", io::Error::last_os_error());
        // SAFETY: plain system call that gives a new descriptor or -1. Without a protocol it hears nothing.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        // SAFETY: `fd` was just made by the kernel and nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: sockaddr_ll is plain data for which all zeroes is valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as libc::sa_family_t;
        address.sll_ifindex = index as libc::c_int;
        let bytes = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the kernel reads one sockaddr_ll that lives on this stack.
        let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), bytes) };
        assert_eq!(bound, 0, "{}", io::Error::last_os_error());
        Self(fd)
    }

    /// One frame.
    pub fn say(&self, frame: &[u8]) {
        // SAFETY: the kernel reads the frame, which lives through the call.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(sent, frame.len() as isize, "{}", io::Error::last_os_error());
    }
}
