//! The name of a host at the arbiter: where it listens, and which machine it is (rule 18).
//!
//! Invariant: a host has the same name after every start; two hosts have different ones, also where tunnels let both
//! listen at the same address.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

/// Written once, when the system was installed (man 5 machine-id).
const MACHINE_ID: &str = "/etc/machine-id";
/// Enough to tell two machines apart, not enough to make the identity known.
const DIGITS: usize = 8;

/// The name of the host that listens at this address.
pub(super) fn of_host(listen: SocketAddr) -> String {
    with_machine(listen, Path::new(MACHINE_ID))
}

fn with_machine(listen: SocketAddr, file: &Path) -> String {
    match machine(file) {
        Some(id) => format!("{listen} on machine {id}"),
        None => {
            tracing::info!(
                "{} tells no machine: two hosts that listen at {listen} have the same name",
                file.display()
            );
            listen.to_string()
        }
    }
}

fn machine(file: &Path) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let id = text.trim().get(..DIGITS)?;
    let is_id = id.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_id.then(|| id.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_that_listen_at_one_address_are_told_apart_by_their_machines() {
        let dir = tempfile::tempdir().unwrap();
        let listen: SocketAddr = "127.0.0.1:7600".parse().unwrap();
        let name = |id: &str| {
            let file = dir.path().join("machine-id");
            fs::write(&file, id).unwrap();
            with_machine(listen, &file)
        };
        let one = name("0123456789abcdef0123456789abcdef\n");
        assert_eq!(one, "127.0.0.1:7600 on machine 01234567");
        assert_ne!(one, name("1123456789abcdef0123456789abcdef\n"));
        // What a fresh image has instead, and nothing at all.
        assert_eq!(name("uninitialized\n"), "127.0.0.1:7600");
        assert_eq!(name(""), "127.0.0.1:7600");
        let missing = with_machine(listen, &dir.path().join("nothing"));
        assert_eq!(missing, "127.0.0.1:7600");
    }
}
