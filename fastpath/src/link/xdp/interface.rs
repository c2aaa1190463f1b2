//! Which interface has an address of this host.

use std::ffi::CStr;
use std::io;
use std::net::{IpAddr, TcpStream};

use super::XdpPortError;
use crate::ring::xsk::ip_of;

/// The name of the interface that has this end's address of `stream`.
pub fn interface_of(stream: &TcpStream) -> Result<String, XdpPortError> {
    let local = stream.local_addr()?.ip();
    interface_with(local)?.ok_or(XdpPortError::NoInterface(local))
}

/// The name of the interface with this address, in the network namespace of the calling thread.
fn interface_with(address: IpAddr) -> io::Result<Option<String>> {
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the call writes one pointer, to a list that is ours until it is freed below.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = None;
    let mut next = first;
    // SAFETY: `next` is null or an entry of the list, which is not freed before the loop has ended.
    while let Some(entry) = unsafe { next.as_ref() } {
        if ip_of(entry.ifa_addr) == Some(address) {
            // SAFETY: each entry has a name, a C string that lives as long as the list.
            let name = unsafe { CStr::from_ptr(entry.ifa_name) };
            found = Some(name.to_string_lossy().into_owned());
            break;
        }
        next = entry.ifa_next;
    }
    // SAFETY: the list that getifaddrs has made, and nothing refers to it any more.
    unsafe { libc::freeifaddrs(first) };
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_found_and_a_foreign_address_is_not() {
        let of = |text: &str| interface_with(text.parse().unwrap()).unwrap();
        assert_eq!(of("127.0.0.1").as_deref(), Some("lo"));
        assert_eq!(of("203.0.113.77"), None);
    }
}
