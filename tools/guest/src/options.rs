//! The command line.
//!
//! `virtio_mmio.device=SIZE@ADDRESS:IRQ` `tsc_khz=N` `wall_ns=N` come from the VMM;
//! `pairs=N` (queue pairs used at most), `ip=ADDRESS/PREFIX` `ip6=ADDRESS/PREFIX` `gw=ADDRESS` `gw6=ADDRESS` `spin_us=N` (longest
//! polling before sleep) from the configuration. Other words are ignored, as Linux does.

use alloc::vec::Vec;
use colo_guest_server::{Addresses, link_local};
use core::fmt;
use core::str::FromStr;
use smoltcp::wire::{IpCidr, Ipv4Address, Ipv4Cidr, Ipv6Address, Ipv6Cidr};

/// Two guests, two workers and a client often share two processors: sleep soon.
const SPIN_US: i64 = 20;
/// Each pair takes 1 MiB of buffers.
const PAIRS_MAX: usize = 8;
const PREFIX_IPV4: u8 = 24;
const PREFIX_IPV6: u8 = 64;
const TSC_KHZ_MIN: u64 = 1000;

/// A word that cannot be understood, or is missing.
#[derive(Debug)]
pub enum OptionError {
    /// The value of this option is bad.
    Bad(&'static str),
    /// This option is needed.
    Missing(&'static str),
}

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bad(name) => write!(f, "command line: bad value of {name}="),
            Self::Missing(name) => write!(f, "command line: {name}= is missing"),
        }
    }
}

/// The parsed command line.
#[derive(Default)]
pub struct Options {
    /// Guest physical address of the network device's register window.
    pub device_base: usize,
    /// Ticks of the time stamp counter in a millisecond.
    pub tsc_khz: u64,
    /// Wall clock at tick 0, ns since 1970.
    pub wall_ns: u64,
    /// Longest polling before sleep.
    pub spin_us: i64,
    /// Queue pairs used at most.
    pub pairs: usize,
    networks: Vec<IpCidr>,
    gateway_ipv4: Option<Ipv4Address>,
    gateway_ipv6: Option<Ipv6Address>,
}

impl Options {
    /// Parses the command line.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let mut options = Self {
            spin_us: SPIN_US,
            pairs: PAIRS_MAX,
            ..Self::default()
        };
        for word in text.split_ascii_whitespace() {
            if let Some((name, value)) = word.split_once('=') {
                options.set(name, value)?;
            }
        }
        if options.device_base == 0 {
            return Err(OptionError::Missing("virtio_mmio.device"));
        }
        if options.tsc_khz == 0 {
            return Err(OptionError::Missing("tsc_khz"));
        }
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), OptionError> {
        match name {
            // The first device is the network.
            "virtio_mmio.device" if self.device_base == 0 => {
                self.device_base =
                    device_base(value).ok_or(OptionError::Bad("virtio_mmio.device"))?;
            }
            "tsc_khz" => {
                let tsc_khz = value.parse().ok().filter(|khz| *khz >= TSC_KHZ_MIN);
                self.tsc_khz = tsc_khz.ok_or(OptionError::Bad("tsc_khz"))?;
            }
            "wall_ns" => self.wall_ns = number(value, "wall_ns")?,
            "pairs" => self.pairs = number(value, "pairs")?,
            "spin_us" => self.spin_us = number(value, "spin_us")?,
            "ip" => {
                let (address, prefix) = network(value, PREFIX_IPV4, 32, "ip")?;
                self.networks
                    .push(IpCidr::Ipv4(Ipv4Cidr::new(address, prefix)));
            }
            "ip6" => {
                let (address, prefix) = network(value, PREFIX_IPV6, 128, "ip6")?;
                self.networks
                    .push(IpCidr::Ipv6(Ipv6Cidr::new(address, prefix)));
            }
            "gw" => self.gateway_ipv4 = Some(number(value, "gw")?),
            "gw6" => self.gateway_ipv6 = Some(number(value, "gw6")?),
            _ => {}
        }
        Ok(())
    }

    /// All addresses, with the link-local one of `mac`.
    pub fn addresses(&self, mac: [u8; 6]) -> Addresses {
        let mut networks = self.networks.clone();
        networks.retain(|network| network.address().is_unicast());
        networks.truncate(3);
        networks.push(IpCidr::Ipv6(Ipv6Cidr::new(link_local(mac), PREFIX_IPV6)));
        Addresses {
            mac,
            networks,
            gateway_ipv4: self.gateway_ipv4,
            gateway_ipv6: self.gateway_ipv6,
        }
    }
}

fn number<T: FromStr>(value: &str, name: &'static str) -> Result<T, OptionError> {
    value.parse().map_err(|_| OptionError::Bad(name))
}

/// `ADDRESS/PREFIX`, or `ADDRESS` alone.
fn network<T: FromStr>(
    value: &str,
    default_prefix: u8,
    max_prefix: u8,
    name: &'static str,
) -> Result<(T, u8), OptionError> {
    let (address, prefix) = match value.split_once('/') {
        Some((address, prefix)) => (address, number(prefix, name)?),
        None => (value, default_prefix),
    };
    if prefix > max_prefix {
        return Err(OptionError::Bad(name));
    }
    Ok((number(address, name)?, prefix))
}

/// The address of `512@0xd0000000:5`.
fn device_base(value: &str) -> Option<usize> {
    let (_, place) = value.split_once('@')?;
    let address = place.split(':').next()?;
    match address.strip_prefix("0x") {
        Some(digits) => usize::from_str_radix(digits, 16).ok(),
        None => address.parse().ok(),
    }
}
