//! A virtio-mmio register window, version 2 (virtio 1.3, section 4.2.2).
//!
//! Each access costs an exit: used at start only, the doorbell apart.

/// Why a device cannot be used.
#[derive(Debug)]
pub enum DeviceError {
    /// No virtio-mmio version 2 network device answers at the address.
    NotNetwork,
    /// The device lacks this feature.
    Lacks(&'static str),
    /// The device refuses the chosen features.
    Refused,
    /// The device has no queue of this number.
    NoQueue(u32),
    /// The device does not let so many of its queue pairs be used.
    Pairs(usize),
}

impl core::fmt::Display for DeviceError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::NotNetwork => write!(f, "no virtio-mmio network device at the given address"),
            Self::Lacks(feature) => write!(f, "the network device does not offer {feature}"),
            Self::Refused => write!(f, "the network device refuses the features chosen"),
            Self::Pairs(pairs) => {
                write!(f, "the network device refuses to use {pairs} queue pairs")
            }
            Self::NoQueue(queue) => write!(f, "the network device has no queue {queue}"),
        }
    }
}

/// Registers, by offset.
#[derive(Clone, Copy)]
#[repr(usize)]
pub enum Register {
    Magic = 0x000,
    Version = 0x004,
    DeviceId = 0x008,
    DeviceFeatures = 0x010,
    DeviceFeaturesSel = 0x014,
    DriverFeatures = 0x020,
    DriverFeaturesSel = 0x024,
    QueueSel = 0x030,
    QueueNumMax = 0x034,
    QueueNum = 0x038,
    QueueReady = 0x044,
    QueueNotify = 0x050,
    InterruptStatus = 0x060,
    InterruptAck = 0x064,
    Status = 0x070,
    QueueDescLow = 0x080,
    QueueDescHigh = 0x084,
    QueueDriverLow = 0x090,
    QueueDriverHigh = 0x094,
    QueueDeviceLow = 0x0a0,
    QueueDeviceHigh = 0x0a4,
}

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const NETWORK: u32 = 1;
const CONFIG: usize = 0x100;

/// Status: the guest has noticed the device.
pub const STATUS_ACKNOWLEDGE: u32 = 1;
/// Status: the guest has a driver.
pub const STATUS_DRIVER: u32 = 2;
/// Status: the driver is ready.
pub const STATUS_DRIVER_OK: u32 = 4;
/// Status: the features are chosen.
pub const STATUS_FEATURES_OK: u32 = 8;

/// A window that belongs to a network device.
pub struct Window {
    base: usize,
}

impl Window {
    /// Checks that a network device answers at `base`.
    ///
    /// # Safety
    /// `base` is the address of a register window from the VMM's command line, used by nobody else.
    pub unsafe fn new(base: usize) -> Result<Self, DeviceError> {
        let window = Self { base };
        let identity =
            [Register::Magic, Register::Version, Register::DeviceId].map(|r| window.read(r));
        if identity != [MAGIC, VERSION, NETWORK] {
            return Err(DeviceError::NotNetwork);
        }
        Ok(window)
    }

    pub fn read(&self, register: Register) -> u32 {
        // SAFETY: the register lies within the window, whose owner vouched for it; the platform
        // maps it.
        unsafe { ((self.base + register as usize) as *const u32).read_volatile() }
    }

    pub fn write(&self, register: Register, value: u32) {
        // SAFETY: as in `read`; the device touches memory only as the queues allow.
        unsafe { ((self.base + register as usize) as *mut u32).write_volatile(value) }
    }

    /// A byte of the device's configuration.
    pub fn config8(&self, at: usize) -> u8 {
        // SAFETY: as in `read`; callers stay within the network configuration.
        unsafe { ((self.base + CONFIG + at) as *const u8).read_volatile() }
    }

    pub fn write_address(&self, low: Register, high: Register, address: usize) {
        self.write(low, address as u32);
        self.write(high, (address as u64 >> 32) as u32);
    }

    /// Begins anew with the device. Gives the features that it offers.
    pub fn reset(&self) -> u64 {
        self.write(Register::Status, 0);
        self.write(Register::Status, STATUS_ACKNOWLEDGE | STATUS_DRIVER);
        self.write(Register::DeviceFeaturesSel, 0);
        let low = self.read(Register::DeviceFeatures);
        self.write(Register::DeviceFeaturesSel, 1);
        u64::from(low) | (u64::from(self.read(Register::DeviceFeatures)) << 32)
    }

    /// Chooses exactly `wanted` of what the device offers; `optional` ones if they are there.
    pub fn negotiate(
        &self,
        offered: u64,
        wanted: &[(u32, &'static str)],
        optional: &[u32],
    ) -> Result<u64, DeviceError> {
        let mut chosen = 0;
        for (bit, name) in wanted {
            if offered & (1 << bit) == 0 {
                return Err(DeviceError::Lacks(name));
            }
            chosen |= 1 << bit;
        }
        chosen |= optional.iter().map(|bit| offered & (1 << bit)).sum::<u64>();
        self.write(Register::DriverFeaturesSel, 0);
        self.write(Register::DriverFeatures, chosen as u32);
        self.write(Register::DriverFeaturesSel, 1);
        self.write(Register::DriverFeatures, (chosen >> 32) as u32);
        let status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK;
        self.write(Register::Status, status);
        if self.read(Register::Status) & STATUS_FEATURES_OK == 0 {
            return Err(DeviceError::Refused);
        }
        Ok(chosen)
    }

    /// Tells the device that everything is set up.
    pub fn start(&self) {
        let status = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK;
        self.write(Register::Status, status);
    }
}
