//! The configuration file of `colo vhost`: a NIC for a guest that is behind a socket.
//!
//! Invariants: as those of every configuration; the socket is named.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Check, ConfigError, HostConfig, NetConfig, fields_of, text_of};

/// A whole file: `[net]` with `vhost_user`, and `[host]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhostConfig {
    /// The NIC and the socket.
    pub net: NetConfig,
    /// This host.
    #[serde(default)]
    pub host: HostConfig,
}

impl VhostConfig {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(path, &text_of(path)?)
    }

    /// Checks the text of a file; `path` is for errors and relative paths.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let mut config: Self = fields_of(path, text)?;
        let base = path.parent().unwrap_or(Path::new(""));
        config.host.status = config.host.status.map(|status| base.join(status));
        config.net.vhost_user = config.net.vhost_user.map(|socket| base.join(socket));
        let check = Check { path };
        check.net(&config.net)?;
        let advice = "name the socket that the guest's side connects to";
        let named = config.net.vhost_user.is_some();
        check.that(named, "net.vhost_user", "none", advice)?;
        check.host(&config.host)?;
        let shards = config.host.shards;
        let advice = "a guest behind a socket has one queue pair and one worker; leave it out";
        check.that(shards == 1, "host.shards", shards, advice)?;
        Ok(config)
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.net.vhost_user.clone().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[net]
vhost_user = "guest.sock"
tap = "tap0"
mac = "52:54:00:c0:10:01"
[host]
status = "run.sock"
"#;

    fn parse(text: &str) -> Result<VhostConfig, ConfigError> {
        VhostConfig::parse(Path::new("/etc/colo/port.toml"), text)
    }

    #[test]
    fn paths_are_relative_to_the_file_and_the_socket_is_needed() {
        let config = parse(GOOD).unwrap();
        assert_eq!(config.socket(), Path::new("/etc/colo/guest.sock"));
        assert_eq!(config.host.status, Some("/etc/colo/run.sock".into()));
        for (from, to, expected) in [
            ("vhost_user = \"guest.sock\"", "", "net.vhost_user = none"),
            ("\"tap0\"", "\"\"", "net.tap"),
            (
                "[host]",
                "[host]\nshards = 2",
                "host.shards = 2: a guest behind a socket",
            ),
            ("[host]", "[vm]\nname = \"x\"\n[host]", "unknown field"),
        ] {
            let error = parse(&GOOD.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains("/etc/colo/port.toml"), "{error}");
            assert!(error.contains(expected), "{error}");
        }
    }
}
