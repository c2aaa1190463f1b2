//! A network interface: its index, queues, MTU, address and link, asked afresh each time.
//!
//! Invariants: a name is looked up in the network namespace of the calling thread.
//!
//! Does not change anything.

use std::ffi::{CStr, CString};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use colo_bpf::Mac;

/// `ETHTOOL_GDRVINFO` of `linux/ethtool.h`
const ETHTOOL_GDRVINFO: u32 = 0x3;
/// `ETHTOOL_GCHANNELS` of `linux/ethtool.h`
const ETHTOOL_GCHANNELS: u32 = 0x3c;
/// `ETHTOOL_GFLAGS` and one of the flags
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETH_FLAG_RXVLAN: u32 = 1 << 8;

/// A network interface could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// No such interface.
    #[error("interface \"{0}\" does not exist; `ip link` lists those that do")]
    Missing(String),
    /// Not an Ethernet device.
    #[error("\"{0}\" is not an Ethernet interface; name another one")]
    NotEthernet(String),
    /// Any other refusal.
    #[error("cannot read the {what} of \"{interface}\": {source}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// Whose.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// A network interface that existed when it was looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    name: String,
    index: u32,
}

impl Interface {
    /// Looks an interface up by name.
    pub fn find(name: &str) -> Result<Self, InterfaceError> {
        let missing = || InterfaceError::Missing(name.to_owned());
        let c_name = CString::new(name).map_err(|_| missing())?;
        // SAFETY: `c_name` is a C string that lives through the call.
        match unsafe { libc::if_nametoindex(c_name.as_ptr()) } {
            // It asks by a socket, which may not be had: that says nothing of the interface.
            0 => match io::Error::last_os_error() {
                e if matches!(
                    e.raw_os_error(),
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS)
                ) =>
                {
                    Err(InterfaceError::Refused {
                        what: "index",
                        interface: name.to_owned(),
                        source: e,
                    })
                }
                _ => Err(missing()),
            },
            index => Ok(Self {
                name: name.to_owned(),
                index,
            }),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its index. One that is made again under the same name has another.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// How many receive queues it has now.
    pub fn rx_queues(&self) -> Result<u32, InterfaceError> {
        let mut channels = Channels {
            command: ETHTOOL_GCHANNELS,
            ..Channels::default()
        };
        let mut request = self.request();
        request.ifr_ifru.ifru_data = (&raw mut channels).cast();
        match interface_ioctl(libc::SIOCETHTOOL as libc::c_ulong, &mut request) {
            Ok(()) => Ok((channels.rx + channels.combined).max(1)),
            // Drivers with one queue often do not answer.
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(self.rx_queues_in_sysfs()),
            Err(e) => Err(self.refused("queues", e)),
        }
    }

    /// The name of its driver; none where that does not tell.
    pub fn driver(&self) -> Option<String> {
        let mut info = DriverInfo {
            command: ETHTOOL_GDRVINFO,
            driver: [0; 32],
            rest: [0; 160],
        };
        let mut request = self.request();
        request.ifr_ifru.ifru_data = (&raw mut info).cast();
        interface_ioctl(libc::SIOCETHTOOL as libc::c_ulong, &mut request).ok()?;
        let name = info.driver.split(|&byte| byte == 0).next()?;
        String::from_utf8(name.to_vec()).ok()
    }

    /// Whether VLAN tags are taken out of received frames, and an XDP program does not see them.
    pub fn strips_tags(&self) -> Result<bool, InterfaceError> {
        let mut flags = [ETHTOOL_GFLAGS, 0_u32]; // struct ethtool_value
        let mut request = self.request();
        request.ifr_ifru.ifru_data = flags.as_mut_ptr().cast();
        interface_ioctl(libc::SIOCETHTOOL as libc::c_ulong, &mut request)
            .map_err(|e| self.refused("offloads", e))?;
        Ok(flags[1] & ETH_FLAG_RXVLAN != 0)
    }

    /// Counts what the kernel shows as files; 1 where that is another namespace's view.
    fn rx_queues_in_sysfs(&self) -> u32 {
        let directory = Path::new("/sys/class/net").join(&self.name);
        let index = std::fs::read_to_string(directory.join("ifindex")).unwrap_or_default();
        if index.trim() != self.index.to_string() {
            return 1;
        }
        let Ok(entries) = std::fs::read_dir(directory.join("queues")) else {
            return 1;
        };
        let queues = entries
            .filter_map(Result::ok)
            .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"rx-"))
            .count();
        u32::try_from(queues).unwrap_or(1).max(1)
    }

    /// Largest payload behind its Ethernet header.
    pub fn mtu(&self) -> Result<u32, InterfaceError> {
        let mut request = self.request();
        interface_ioctl(libc::SIOCGIFMTU, &mut request).map_err(|e| self.refused("MTU", e))?;
        // SAFETY: SIOCGIFMTU has just filled this member of the union.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        Ok(u32::try_from(mtu).unwrap_or(0))
    }

    /// Its Ethernet address.
    pub fn mac(&self) -> Result<Mac, InterfaceError> {
        let mut request = self.request();
        interface_ioctl(libc::SIOCGIFHWADDR, &mut request)
            .map_err(|e| self.refused("address", e))?;
        // SAFETY: SIOCGIFHWADDR has just filled this member of the union.
        let address = unsafe { request.ifr_ifru.ifru_hwaddr };
        if address.sa_family != libc::ARPHRD_ETHER {
            return Err(InterfaceError::NotEthernet(self.name.clone()));
        }
        let mut mac = Mac::default();
        for (to, from) in mac.iter_mut().zip(address.sa_data) {
            *to = from as u8;
        }
        Ok(mac)
    }

    /// Whether it is up and has a carrier.
    pub fn has_link(&self) -> Result<bool, InterfaceError> {
        let mut request = self.request();
        interface_ioctl(libc::SIOCGIFFLAGS, &mut request).map_err(|e| self.refused("link", e))?;
        // SAFETY: SIOCGIFFLAGS has just filled this member of the union.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = libc::IFF_UP | libc::IFF_RUNNING;
        Ok(flags & wanted == wanted)
    }

    /// Its IP addresses.
    pub fn addresses(&self) -> Result<Vec<IpAddr>, InterfaceError> {
        let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
        // SAFETY: the call writes one pointer, to a list that is ours until it is freed below.
        if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
            return Err(self.refused("addresses", io::Error::last_os_error()));
        }
        let mut addresses = Vec::new();
        let mut next = first;
        // SAFETY: `next` is null or an entry of the list, which is not freed before the loop ends.
        while let Some(entry) = unsafe { next.as_ref() } {
            // SAFETY: each entry has a name, a C string that lives as long as the list.
            let name = unsafe { CStr::from_ptr(entry.ifa_name) };
            if name.to_bytes() == self.name.as_bytes() {
                addresses.extend(ip_of(entry.ifa_addr));
            }
            next = entry.ifa_next;
        }
        // SAFETY: the list that getifaddrs has made, and nothing refers to it any more.
        unsafe { libc::freeifaddrs(first) };
        Ok(addresses)
    }

    fn refused(&self, what: &'static str, source: io::Error) -> InterfaceError {
        if source.raw_os_error() == Some(libc::ENODEV) {
            return InterfaceError::Missing(self.name.clone());
        }
        InterfaceError::Refused {
            what,
            interface: self.name.clone(),
            source,
        }
    }

    fn request(&self) -> libc::ifreq {
        // SAFETY: ifreq is plain data for which all zeroes is valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(self.name.bytes()) {
            *to = from as libc::c_char;
        }
        request
    }
}

/// The IP address in an entry of the list; other families have none.
pub(crate) fn ip_of(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: null, or a socket address that lives as long as the list that the caller holds.
    let family = unsafe { address.as_ref() }?.sa_family;
    match libc::c_int::from(family) {
        libc::AF_INET => {
            // SAFETY: of this family, it is a sockaddr_in.
            let address = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
            Some(IpAddr::from(address.sin_addr.s_addr.to_ne_bytes()))
        }
        libc::AF_INET6 => {
            // SAFETY: of this family, it is a sockaddr_in6.
            let address = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
            Some(IpAddr::from(address.sin6_addr.s6_addr))
        }
        _ => None,
    }
}

/// `struct ethtool_channels`
#[repr(C)]
#[derive(Default)]
struct Channels {
    command: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// `struct ethtool_drvinfo`
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    /// What follows is of no interest here.
    rest: [u8; 160],
}

fn interface_ioctl(command: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: plain system call that gives a new descriptor or -1.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made by the kernel and nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: every command used here takes an ifreq, which is exclusively borrowed for the call;
    // where it points to something else, its caller keeps that alive.
    if unsafe { libc::ioctl(fd.as_raw_fd(), command, &raw mut *request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
