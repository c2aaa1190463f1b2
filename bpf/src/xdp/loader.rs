//! Loads the XDP program, tells it what is whose, attaches it.
//!
//! Invariants: maps are written one word or one entry at a time, so a running program sees the old
//! or the new setting and nothing between; dropping an [`XdpProgram`] detaches it.
//!
//! Does not open sockets and does not watch the interface.

use std::ffi::CString;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use aya::maps::{Array, HashMap, MapData, MapError, PerCpuArray, XskMap};
use aya::programs::{ProgramError, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};

use super::counters::{VERDICTS, XdpCounters};
use super::error::XdpError;
use super::link::XdpLink;
use super::settings::{
    AddressOwner, Attach, AttachMode, Attached, Config, Groups, GuestFrames, LinkChannel,
};
use crate::Mac;

/// The compiled program, aligned as the ELF reader wants it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/program.bpf.o"));

const PROGRAM: &str = "colo_xdp";

/// The second EtherType for local experiments (IEEE 802).
const PROBE_ETHERTYPE: u16 = 0x88b6;
/// The action of `linux/bpf.h`.
const XDP_REDIRECT: u32 = 4;

/// A loaded XDP program and its maps.
pub struct XdpProgram {
    /// Dropped first.
    attached: Option<(String, XdpLink)>,
    ebpf: Ebpf,
    config: Array<MapData, [u32; 4]>,
    guest_macs: HashMap<MapData, Mac, u32>,
    addresses: HashMap<MapData, [u8; 16], u32>,
    guest_sockets: XskMap<MapData>,
    link_sockets: XskMap<MapData>,
    counters: PerCpuArray<MapData, u64>,
    settings: Config,
}

impl std::fmt::Debug for XdpProgram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("XdpProgram")
            .field("settings", &self.settings)
            .field("interface", &self.attached.as_ref().map(|(name, _)| name))
            .finish_non_exhaustive()
    }
}

impl XdpProgram {
    /// Loads the program. It drops the guest's frames until told otherwise, and is not attached.
    pub fn load() -> Result<Self, XdpError> {
        let mut ebpf = EbpfLoader::new()
            .load(OBJECT)
            .map_err(|e| XdpError::of("load", &e))?;
        program_of(&mut ebpf)?
            .load()
            .map_err(|e| XdpError::of("load", &e))?;
        Ok(Self {
            config: take(&mut ebpf, "config")?,
            guest_macs: take(&mut ebpf, "guest_macs")?,
            addresses: take(&mut ebpf, "addresses")?,
            guest_sockets: take(&mut ebpf, "guest_sockets")?,
            link_sockets: take(&mut ebpf, "link_sockets")?,
            counters: take(&mut ebpf, "counters")?,
            settings: Config::default(),
            attached: None,
            ebpf,
        })
    }

    /// Attaches it to `interface`. Configure it and bind the sockets first where frames that come
    /// in between matter.
    pub fn attach(&mut self, interface: &str, attach: Attach) -> Result<Attached, XdpError> {
        if let Some((interface, _)) = &self.attached {
            return Err(XdpError::Attached {
                interface: interface.clone(),
            });
        }
        let mode = match attach {
            Attach::Only(mode) => mode,
            Attach::Best => AttachMode::Driver,
        };
        let (mode, fallback_reason) = match self.attach_in(interface, mode) {
            Ok(()) => (mode, None),
            Err(XdpError::NoDriverMode { source, .. }) if attach == Attach::Best => {
                self.attach_in(interface, AttachMode::Generic)?;
                (AttachMode::Generic, Some(source.to_string()))
            }
            Err(e) => return Err(e),
        };
        Ok(Attached {
            mode,
            fallback_reason,
        })
    }

    fn attach_in(&mut self, interface: &str, mode: AttachMode) -> Result<(), XdpError> {
        let index = index_of(interface).ok_or_else(|| XdpError::NoInterface {
            interface: interface.to_owned(),
        })?;
        let in_driver = mode == AttachMode::Driver;
        let program = program_of(&mut self.ebpf)?;
        let fd = program.fd().map_err(|e| XdpError::of("attach", &e))?;
        let link = XdpLink::attach(fd.as_fd(), index, mode)
            .map_err(|e| XdpError::of_attach(interface, in_driver, &e))?;
        self.attached = Some((interface.to_owned(), link));
        Ok(())
    }

    /// Takes it off its interface, if it is on one.
    pub fn detach(&mut self) {
        self.attached = None;
    }

    /// The interface it is attached to.
    pub fn interface(&self) -> Option<&str> {
        self.attached.as_ref().map(|(name, _)| name.as_str())
    }

    /// Decides over the guest's frames, for those that arrive from now on.
    pub fn set_guest_frames(&mut self, guest_frames: GuestFrames) -> Result<(), XdpError> {
        self.configure(Config {
            guest_frames,
            ..self.settings
        })
    }

    /// Decides over broadcast and multicast.
    pub fn set_groups(&mut self, groups: Groups) -> Result<(), XdpError> {
        self.configure(Config {
            groups,
            ..self.settings
        })
    }

    /// Says how the link's frames are known; the default is that there are none.
    pub fn set_link_channel(&mut self, link: LinkChannel) -> Result<(), XdpError> {
        self.configure(Config {
            link,
            ..self.settings
        })
    }

    /// What [`XdpProgram::set_guest_frames`] was told last.
    pub fn guest_frames(&self) -> GuestFrames {
        self.settings.guest_frames
    }

    fn configure(&mut self, settings: Config) -> Result<(), XdpError> {
        self.config
            .set(0, settings.words(), 0)
            .map_err(|e| XdpError::of("configure", &e))?;
        self.settings = settings;
        Ok(())
    }

    /// Adds an address of the guest's NIC (unicast).
    pub fn add_guest_mac(&mut self, mac: Mac) -> Result<(), XdpError> {
        self.guest_macs
            .insert(mac, 1, 0)
            .map_err(|e| table_error(e, "one more MAC of the guest", 64))
    }

    /// Takes an address of the guest's NIC away again. One that is not there is no error.
    pub fn remove_guest_mac(&mut self, mac: Mac) -> Result<(), XdpError> {
        absent_is_fine(self.guest_macs.remove(&mac))
    }

    /// Says whose an IP address is, which decides where ARP requests and neighbour solicitations
    /// for it go.
    pub fn set_address(&mut self, address: IpAddr, owner: AddressOwner) -> Result<(), XdpError> {
        self.addresses
            .insert(key_of(address), owner.word(), 0)
            .map_err(|e| table_error(e, "one more IP address", 1024))
    }

    /// Forgets an IP address. One that is not there is no error.
    pub fn remove_address(&mut self, address: IpAddr) -> Result<(), XdpError> {
        absent_is_fine(self.addresses.remove(&key_of(address)))
    }

    /// The guest's frames that come by receive queue `queue` go to this AF_XDP socket, which must
    /// be bound to that queue. A socket that is closed leaves by itself.
    pub fn set_guest_socket(&mut self, queue: u32, xsk: BorrowedFd<'_>) -> Result<(), XdpError> {
        self.guest_sockets
            .set(queue, xsk.as_raw_fd(), 0)
            .map_err(|e| socket_error(e, queue))
    }

    /// The link's frames that come by receive queue `queue` go to this AF_XDP socket.
    pub fn set_link_socket(&mut self, queue: u32, xsk: BorrowedFd<'_>) -> Result<(), XdpError> {
        self.link_sockets
            .set(queue, xsk.as_raw_fd(), 0)
            .map_err(|e| socket_error(e, queue))
    }

    /// The guest's frames of this queue are dropped from now on.
    pub fn remove_guest_socket(&mut self, queue: u32) -> Result<(), XdpError> {
        absent_is_fine(self.guest_sockets.unset(queue))
    }

    /// The link's frames of this queue are dropped from now on.
    pub fn remove_link_socket(&mut self, queue: u32) -> Result<(), XdpError> {
        absent_is_fine(self.link_sockets.unset(queue))
    }

    /// Frames by verdict, all CPUs together.
    pub fn counters(&self) -> Result<XdpCounters, XdpError> {
        let mut verdicts = [0; VERDICTS];
        for (index, sum) in (0..).zip(&mut verdicts) {
            let values = self
                .counters
                .get(&index, 0)
                .map_err(|e| XdpError::of("read the counters of", &e))?;
            *sum = values.iter().sum();
        }
        Ok(XdpCounters::from_verdicts(verdicts))
    }

    /// Whether the program would hand a unicast frame to the guest's socket if it came to `mac` by
    /// this queue of this interface, as it is set now. Counts like a frame.
    pub fn takes_from(
        &mut self,
        interface_index: u32,
        queue: u32,
        mac: Mac,
    ) -> Result<bool, XdpError> {
        let mut frame = [0; 64];
        frame[..6].copy_from_slice(&mac);
        frame[12..14].copy_from_slice(&PROBE_ETHERTYPE.to_be_bytes());
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
        let words = [0, frame.len() as u32, 0, interface_index, queue, 0];
        let mut context = [0; 24];
        for (to, word) in context.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        Ok(self.run_on(&frame, Some(&context))? == XDP_REDIRECT)
    }

    /// Runs the program on `frame` without any NIC and gives its action (`XDP_PASS` is 2,
    /// `XDP_DROP` 1, `XDP_REDIRECT` 4). `context` is a `struct xdp_md`, for what the frame alone
    /// does not say. For tests.
    pub fn run_on(&mut self, frame: &[u8], context: Option<&[u8]>) -> Result<u32, XdpError> {
        let options = TestRunOptions {
            data_in: Some(frame),
            ctx_in: context,
            ..TestRunOptions::default()
        };
        let result = program_of(&mut self.ebpf)?
            .test_run(options)
            .map_err(|e| XdpError::of("run", &e))?;
        Ok(result.return_value)
    }
}

fn program_of(ebpf: &mut Ebpf) -> Result<&mut Xdp, XdpError> {
    let missing = || ProgramError::UnexpectedProgramType;
    ebpf.program_mut(PROGRAM)
        .ok_or_else(missing)
        .and_then(TryInto::try_into)
        .map_err(|e| XdpError::of("find", &e))
}

fn take<T: TryFrom<aya::maps::Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<T, XdpError> {
    ebpf.take_map(name)
        .ok_or(MapError::ElementNotFound)
        .and_then(T::try_from)
        .map_err(|e| XdpError::of("find a map of", &e))
}

fn index_of(interface: &str) -> Option<u32> {
    let name = CString::new(interface).ok()?;
    // SAFETY: `name` is a C string that lives through the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => None,
        index => Some(index),
    }
}

/// IPv4 is mapped into IPv6, as the program does it.
fn key_of(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn absent_is_fine(result: Result<(), MapError>) -> Result<(), XdpError> {
    match result {
        Ok(()) | Err(MapError::KeyNotFound | MapError::OutOfBounds { .. }) => Ok(()),
        Err(MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        Err(e) => Err(XdpError::of("configure", &e)),
    }
}

fn table_error(error: MapError, what: &str, limit: u32) -> XdpError {
    match &error {
        MapError::SyscallError(e) if e.io_error.raw_os_error() == Some(libc::E2BIG) => {
            XdpError::Full {
                what: what.to_owned(),
                limit,
            }
        }
        _ => XdpError::of("configure", &error),
    }
}

fn socket_error(error: MapError, queue: u32) -> XdpError {
    match &error {
        MapError::OutOfBounds { max_entries, .. } => XdpError::Full {
            what: format!("a socket of queue {queue}"),
            limit: *max_entries,
        },
        MapError::SyscallError(e) => match e.io_error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOTSOCK | libc::EBADF) => XdpError::NotAnXsk { queue },
            _ => XdpError::of("configure", &error),
        },
        _ => XdpError::of("configure", &error),
    }
}
