//! Four namespaces, as a client, a switch and two hosts that can carry a pair.
//!
//! ```text
//!   client ── switch ─┬─ bridge ─ tap0   host a ──┐
//!   10.77.0.1         │                           │ replication link 10.78.0.1 - 10.78.0.2
//!                     └─ bridge ─ tap0   host b ──┘
//! ```
//!
//! With [`Uplink::Direct`] there is neither bridge nor TAP in the hosts: the guest shares the uplink over AF_XDP.
//!
//! Invariants: all names carry this process's id and a random part; dropping a [`Topology`] removes
//! everything; bridges and TAPs speak neither IPv6 nor spanning tree, so what a capture at the switch shows
//! comes from the client or a guest.
//!
//! Does not start any process but `ip` and `tcpdump`.

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::netns::{NETNS_DIR, NetError, Netns, ip};

/// The client's IPv4 address.
pub const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The client's IPv6 address.
pub const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);
/// The guest's IPv4 address.
pub const GUEST_V4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 10);
/// The guest's IPv6 address.
pub const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x10);
/// The guest's addresses.
pub const GUEST: [IpAddr; 2] = [IpAddr::V4(GUEST_V4), IpAddr::V6(GUEST_V6)];
/// The guest's MAC address.
pub const GUEST_MAC: &str = "52:54:00:c0:10:01";
/// Name of the TAP device in each host.
pub const TAP: &str = "tap0";
/// Name of the interface towards the switch in each host.
pub const UPLINK: &str = "uplink";

const PREFIX: &str = "colo-";
const LINK_V4: [&str; 2] = ["10.78.0.1", "10.78.0.2"];
const LINK_MAC: [&str; 2] = ["02:c0:10:00:00:0a", "02:c0:10:00:00:0b"];
/// A guest's full frame fits into one datagram.
const LINK_MTU: u32 = 2000;
/// Nobody has this address: frames sent to it disappear.
const NOBODY_MAC: &str = "02:c0:10:00:00:ff";

static SERIAL: AtomicU32 = AtomicU32::new(0);

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// Where the primary starts.
    A,
    /// Where the secondary starts.
    B,
}

impl Host {
    fn index(self) -> usize {
        match self {
            Self::A => 0,
            Self::B => 1,
        }
    }

    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// Its address on the replication link.
    pub fn link_address(self) -> &'static str {
        LINK_V4[self.index()]
    }

    /// The switch's port towards it.
    pub fn port(self) -> &'static str {
        ["port-a", "port-b"][self.index()]
    }
}

/// How the guests reach the switch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Uplink {
    /// Through a TAP device in a bridge.
    #[default]
    Bridged,
    /// Over AF_XDP on the interface itself.
    Direct,
}

/// The namespaces of one laboratory. See the module's picture.
#[derive(Debug)]
pub struct Topology {
    /// Where clients run.
    pub client: Netns,
    /// Where captures run.
    pub switch: Netns,
    hosts: [Netns; 2],
}

impl Topology {
    /// Builds everything, after removing what dead runs left.
    pub fn new() -> Result<Self, NetError> {
        Self::with(Uplink::Bridged)
    }

    /// The same, with guests that reach the switch like this.
    pub fn with(uplink: Uplink) -> Result<Self, NetError> {
        Self::with_queues(uplink, 1)
    }

    /// The same; the devices that the guests and the link use have so many queues.
    pub fn with_queues(uplink: Uplink, queues: usize) -> Result<Self, NetError> {
        sweep()?;
        let run = unique_name();
        let make = |part: &str| Netns::create(&format!("{run}-{part}"));
        let client = make("client")?;
        let switch = make("switch")?;
        let hosts = [make("a")?, make("b")?];
        let topology = Self {
            client,
            switch,
            hosts,
        };
        topology.quiet_ipv6()?;
        topology.wire_switch(queues)?;
        for host in [Host::A, Host::B] {
            topology.wire_host(host, uplink, queues)?;
        }
        topology.wire_link(queues)?;
        topology.address_client()?;
        if uplink == Uplink::Direct {
            topology.sum_in_client()?;
        }
        Ok(topology)
    }

    /// The namespace of a host.
    pub fn host(&self, host: Host) -> &Netns {
        &self.hosts[host.index()]
    }

    /// Lets frames with so long a payload through between the client and the guests that share an uplink.
    pub fn set_mtu(&self, mtu: u32) -> Result<(), NetError> {
        for host in [Host::A, Host::B] {
            let line = format!("link set {UPLINK} mtu {mtu}\n");
            self.host(host).batch(&line)?;
        }
        let ports = ["port-client", Host::A.port(), Host::B.port()];
        let lines = ports.map(|port| format!("link set {port} mtu {mtu}\n"));
        self.switch.batch(&lines.concat())?;
        self.client.batch(&format!("link set eth0 mtu {mtu}\n"))
    }

    /// Makes the replication link a black hole in both directions, without a carrier change: both
    /// ends send to an address that nobody has.
    pub fn cut_link(&self) -> Result<(), NetError> {
        self.point_link(Host::A, NOBODY_MAC)?;
        self.point_link(Host::B, NOBODY_MAC)
    }

    /// Undoes [`Self::cut_link`].
    pub fn heal_link(&self) -> Result<(), NetError> {
        self.point_link(Host::A, LINK_MAC[1])?;
        self.point_link(Host::B, LINK_MAC[0])
    }

    /// Takes the carrier from a host's client-side network.
    pub fn cut_uplink(&self, host: Host) -> Result<(), NetError> {
        self.switch
            .batch(&format!("link set {} down\n", host.port()))
    }

    /// Undoes [`Self::cut_uplink`].
    pub fn heal_uplink(&self, host: Host) -> Result<(), NetError> {
        self.switch.batch(&format!("link set {} up\n", host.port()))
    }

    /// Records what a host sends to the switch into a pcap file, from before this returns.
    pub fn capture(&self, host: Host, file: &Path) -> Result<Capture, NetError> {
        Capture::start(&self.switch, host.port(), Direction::In, file)
    }

    fn quiet_ipv6(&self) -> Result<(), NetError> {
        for netns in [&self.switch, &self.hosts[0], &self.hosts[1]] {
            netns.set_sysctl("ipv6/conf/all/disable_ipv6", "1")?;
            netns.set_sysctl("ipv6/conf/default/disable_ipv6", "1")?;
        }
        for (name, value) in [
            ("accept_dad", "0"),
            ("dad_transmits", "0"),
            ("router_solicitations", "0"),
        ] {
            self.client
                .set_sysctl(&format!("ipv6/conf/all/{name}"), value)?;
            self.client
                .set_sysctl(&format!("ipv6/conf/default/{name}"), value)?;
        }
        self.client.set_sysctl("ipv6/conf/default/accept_ra", "0")
    }

    fn wire_switch(&self, queues: usize) -> Result<(), NetError> {
        let mut lines =
            String::from("link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n");
        let peers = [
            ("client", &self.client, "eth0"),
            ("a", &self.hosts[0], UPLINK),
        ];
        let peers = peers.into_iter().chain([("b", &self.hosts[1], UPLINK)]);
        for (port, netns, inner) in peers {
            let far = netns.name();
            let queues = format!("numtxqueues {queues} numrxqueues {queues}");
            lines += &format!(
                "link add port-{port} {queues} type veth peer name {inner} {queues} netns {far}\n"
            );
            lines += &format!("link set port-{port} master br0 up\n");
        }
        lines += "link set br0 up\n";
        self.switch.batch(&lines)
    }

    fn wire_host(&self, host: Host, uplink: Uplink, queues: usize) -> Result<(), NetError> {
        let multi = if queues > 1 { " multi_queue" } else { "" };
        if uplink == Uplink::Direct {
            return self.host(host).batch(&format!("link set {UPLINK} up\n"));
        }
        self.host(host).batch(&format!(
            "link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
             tuntap add dev {TAP} mode tap{multi}\n\
             link set {TAP} master br0 up\n\
             link set {UPLINK} master br0 up\n\
             link set br0 up\n"
        ))
    }

    fn wire_link(&self, queues: usize) -> Result<(), NetError> {
        let [mac_a, mac_b] = LINK_MAC;
        let far = self.host(Host::B).name();
        let side = format!("mtu {LINK_MTU} numtxqueues {queues} numrxqueues {queues}");
        self.host(Host::A).batch(&format!(
            "link add link0 {side} address {mac_a} type veth \
             peer name link0 {side} address {mac_b} netns {far}\n"
        ))?;
        for host in [Host::A, Host::B] {
            let address = host.link_address();
            self.host(host).batch(&format!(
                "address add {address}/30 dev link0\nlink set link0 up\n"
            ))?;
        }
        self.heal_link()
    }

    fn address_client(&self) -> Result<(), NetError> {
        self.client.batch(&format!(
            "link set eth0 addrgenmode none\n\
             address add {CLIENT_V4}/24 dev eth0\n\
             address add {CLIENT_V6}/64 dev eth0 nodad\n\
             link set eth0 up\n"
        ))
    }

    /// Makes the client compute its checksums: veth pairs pass frames without them on, and an XDP program sees
    /// frames as they are.
    fn sum_in_client(&self) -> Result<(), NetError> {
        let mut command = self.client.command("ethtool");
        command.args(["-K", "eth0", "tx", "off"]);
        let output = command
            .output()
            .map_err(|source| NetError::MissingProgram {
                program: "ethtool",
                package: "ethtool",
                source,
            })?;
        if output.status.success() {
            return Ok(());
        }
        Err(NetError::Refused {
            command: "ethtool -K eth0 tx off".to_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    fn point_link(&self, host: Host, mac: &str) -> Result<(), NetError> {
        let peer = host.other().link_address();
        self.host(host).batch(&format!(
            "neigh replace {peer} lladdr {mac} dev link0 nud permanent\n"
        ))
    }
}

/// Which frames a capture keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Those that the interface received.
    In,
    /// Those that left through it.
    Out,
}

/// A running packet capture.
#[derive(Debug)]
pub struct Capture {
    child: Child,
    file: PathBuf,
}

impl Capture {
    /// Starts `tcpdump` on an interface and waits until it listens.
    pub fn start(
        netns: &Netns,
        interface: &str,
        direction: Direction,
        file: &Path,
    ) -> Result<Self, NetError> {
        let direction = if direction == Direction::In {
            "in"
        } else {
            "out"
        };
        let mut child = netns
            .command("tcpdump")
            .args([
                "-i",
                interface,
                "-p",
                "-n",
                "-U",
                "--immediate-mode",
                "-s",
                "0",
                "-Z",
                "root",
            ])
            .args(["-Q", direction, "-w"])
            .arg(file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| NetError::MissingProgram {
                program: "tcpdump",
                package: "tcpdump",
                source,
            })?;
        let stderr = child.stderr.take();
        let capture = Self {
            child,
            file: file.to_owned(),
        };
        let mut said = String::new();
        if let Some(stderr) = stderr {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                if line.contains("listening on") {
                    return Ok(capture);
                }
                said += &line;
                said.push('\n');
            }
        }
        Err(NetError::Refused {
            command: format!("tcpdump -i {interface}"),
            stderr: said,
        })
    }

    /// Ends the capture and gives the file's bytes (pcap format).
    pub fn finish(mut self) -> Result<Vec<u8>, NetError> {
        let pid = i32::try_from(self.child.id()).unwrap_or(0);
        // SAFETY: plain system call; the process is our own child and not yet waited for.
        unsafe { libc::kill(pid, libc::SIGINT) };
        self.child.wait().map_err(|source| NetError::Io {
            what: "wait for tcpdump".to_owned(),
            source,
        })?;
        std::fs::read(&self.file).map_err(|source| NetError::Io {
            what: format!("read {}", self.file.display()),
            source,
        })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// One frame of a capture.
#[derive(Debug, Clone)]
pub struct Captured {
    /// When it was seen, microseconds since 1970.
    pub at_us: u64,
    /// Its bytes, Ethernet header first.
    pub bytes: Vec<u8>,
}

/// Splits a pcap file (microsecond format, this machine's byte order) into frames; a cut-off last
/// record is left out.
pub fn pcap_frames(pcap: &[u8]) -> Vec<Captured> {
    let word = |at: usize| {
        let bytes = pcap.get(at..at + 4)?;
        Some(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    };
    let mut frames = Vec::new();
    let mut at = 24;
    while let (Some(seconds), Some(micros), Some(length)) = (word(at), word(at + 4), word(at + 8)) {
        let start = at + 16;
        let Some(bytes) = pcap.get(start..start + length as usize) else {
            break;
        };
        let at_us = u64::from(seconds) * 1_000_000 + u64::from(micros);
        frames.push(Captured {
            at_us,
            bytes: bytes.to_vec(),
        });
        at = start + length as usize;
    }
    frames
}

/// Removes namespaces of runs whose process is gone. Gives how many.
pub fn sweep() -> Result<usize, NetError> {
    let Ok(entries) = std::fs::read_dir(NETNS_DIR) else {
        return Ok(0);
    };
    let mut removed = 0;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if owner(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // Another run may sweep at the same time; then the name is gone already.
            removed += usize::from(ip(&["netns", "del", &name]).is_ok());
        }
    }
    Ok(removed)
}

/// The process id in a namespace name that this module made.
fn owner(name: &str) -> Option<u32> {
    let (pid, _) = name.strip_prefix(PREFIX)?.split_once('-')?;
    pid.parse().ok()
}

fn unique_name() -> String {
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let clock = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.subsec_nanos());
    let random = (clock ^ serial.wrapping_mul(0x9e37_79b9)) & 0xffff;
    format!("{PREFIX}{}-{random:04x}{serial}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_carry_the_process_id() {
        assert_eq!(
            owner(&format!("{}-client", unique_name())),
            Some(std::process::id())
        );
        assert_eq!(owner("colo-12x-1-a"), None);
        assert_eq!(owner("other-12-1"), None);
    }

    #[test]
    fn a_cut_pcap_gives_its_whole_frames() {
        let mut pcap = vec![0; 24];
        for word in [7u32, 9, 3, 3] {
            pcap.extend(word.to_ne_bytes());
        }
        pcap.extend(*b"abc");
        let whole = pcap.len();
        pcap.extend([1, 0, 0, 0]);
        for end in whole..pcap.len() {
            let frames = pcap_frames(&pcap[..end]);
            assert_eq!(frames.len(), 1);
            assert_eq!(
                (frames[0].at_us, &frames[0].bytes[..]),
                (7_000_009, &b"abc"[..])
            );
        }
        assert!(pcap_frames(&pcap[..whole - 1]).is_empty());
    }
}
