//! A virtio device as a PCI function, and its interface for the control loop.

use super::layout::{self, Capabilities};
use super::notify::Kicks;
use super::transport::{Effect, Transport};
use crate::irq::IrqManager;
use crate::pci::PciFunction;
use crate::pci::bar::{Bar, BarAllocator, BarWidth, DecodedBar, WindowFull, Windows};
use crate::pci::config::{ConfigSpace, FunctionIdentity};
use crate::pci::msix::{self, Msix};
use ipc::vcpu::VcpuEvent;
use ipc::virtio::{DeviceIdentity, DeviceIndex, DeviceKind, MAX_QUEUE_SIZE, MAX_QUEUES, MIN_QUEUE_SIZE, QueueFds};
use std::io;
use std::ops::Range;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_RNG};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// PCI vendor of all virtio devices.
const VENDOR: u16 = 0x1af4;
/// PCI device ID of virtio device 0 without legacy interface (virtio 1.2 §4.1.2).
const DEVICE_BASE: u16 = 0x1040;
/// Not transitional: revision 1 or more.
const REVISION: u8 = 1;
/// As QEMU has it; modern drivers do not look.
const SUBSYSTEM: u16 = 0x1100;

/// ISR status: the configuration changed.
const ISR_CONFIG: u8 = 1 << 1;

/// The source number of the configuration interrupt in MSI-X; queue n is source n + 1.
const CONFIG_SOURCE: usize = 0;

/// Something the supervisor asked for cannot be.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Outside 1 to [`MAX_QUEUES`].
    #[error("a virtio device with {0} queues is not possible")]
    Queues(u16),
    /// Not a power of two from [`MIN_QUEUE_SIZE`] to [`MAX_QUEUE_SIZE`].
    #[error("virtqueues of {0} descriptors are not possible")]
    QueueSize(u16),
    /// More eventfds than queues.
    #[error("the device has {queues} queues, eventfds came for {fds}")]
    SurplusQueues {
        /// Queues of the device.
        queues: usize,
        /// Eventfds so far.
        fds: usize,
    },
    /// The device configuration does not fit into its page.
    #[error("a device configuration of {0} bytes is too large")]
    Config(usize),
    /// KVM has no more room, or the process no more fds.
    #[error("virtio device: {0}")]
    System(#[from] io::Error),
}

/// Where the device's events go: to the outbox, without blocking.
pub type EventSink = Box<dyn Fn(VcpuEvent) + Send>;

/// A virtio device of bus 0.
pub struct VirtioPci {
    device: DeviceIndex,
    queues: u16,
    config: ConfigSpace,
    capabilities: Capabilities,
    bar: Bar,
    windows: Option<Windows>,
    msix: Msix,
    kicks: Kicks,
    transport: Transport,
    isr: u8,
    /// Signals the configuration interrupt; also MSI-X source [`CONFIG_SOURCE`].
    config_event: EventFd,
    device_config: Vec<u8>,
    events: EventSink,
}

impl VirtioPci {
    /// A device that offers nothing yet: how many queues, and how large each may be.
    ///
    /// # Errors
    /// When the number of queues is impossible, or KVM or the process has no more room.
    pub fn new(
        device: DeviceIndex,
        kind: DeviceKind,
        (queues, queue_size): (u16, u16),
        irq: &IrqManager,
        events: EventSink,
    ) -> Result<Self, DeviceError> {
        if queues == 0 || queues > MAX_QUEUES {
            return Err(DeviceError::Queues(queues));
        }
        if !queue_size.is_power_of_two() || !(MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&queue_size) {
            return Err(DeviceError::QueueSize(queue_size));
        }
        let vectors = queues + 1;
        let mut config = ConfigSpace::new(identity(kind));
        let capabilities = layout::add_capabilities(&mut config, vectors);
        let config_event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let mut msix = Msix::new(irq, vectors)?;
        msix.add_source(config_event.try_clone()?);
        Ok(Self {
            device,
            queues,
            config,
            capabilities,
            bar: Bar {
                index: layout::BAR_INDEX,
                bytes: layout::BAR_BYTES,
                width: BarWidth::Bits64,
            },
            windows: None,
            msix,
            kicks: Kicks::new(irq),
            transport: Transport::new(queues, queue_size, vectors),
            isr: 0,
            config_event,
            device_config: Vec::new(),
            events,
        })
    }

    /// Takes the eventfds of the next queues.
    ///
    /// # Errors
    /// When there are more than queues.
    pub fn add_queues(&mut self, fds: Vec<QueueFds>) -> Result<(), DeviceError> {
        let total = self.kicks.len() + fds.len();
        if total > usize::from(self.queues) {
            return Err(DeviceError::SurplusQueues {
                queues: usize::from(self.queues),
                fds: total,
            });
        }
        for QueueFds { kick, call } in fds {
            self.kicks.push(eventfd(kick.into_fd()));
            self.msix.add_source(eventfd(call.into_fd()));
        }
        Ok(())
    }

    /// Whether every queue has its eventfds.
    pub fn is_complete(&self) -> bool {
        self.kicks.len() == usize::from(self.queues)
    }

    /// Sets what the device offers. A driver that runs the device is told of the change.
    ///
    /// # Errors
    /// When the configuration is larger than its page.
    pub fn configure(&mut self, identity: DeviceIdentity) -> Result<(), DeviceError> {
        if identity.config.len() as u64 > length(&layout::DEVICE) {
            return Err(DeviceError::Config(identity.config.len()));
        }
        self.transport.offer(identity.features);
        if self.device_config != identity.config {
            self.device_config = identity.config;
            self.transport.bump_generation();
            self.interrupt_config();
        }
        Ok(())
    }

    /// The device has taken its queues, or could not.
    pub fn activated(&mut self, ok: bool) {
        let effect = self.transport.activated(ok);
        self.apply(effect);
    }

    /// The device has let go of its queues: the driver may see status 0.
    pub fn reset_done(&mut self) {
        let effect = self.transport.reset_done();
        self.apply(effect);
    }

    /// The device found its driver's rings broken.
    pub fn broken(&mut self) {
        let effect = self.transport.broken();
        self.apply(effect);
    }

    fn apply(&mut self, effect: Option<Effect>) {
        match effect {
            None => {}
            Some(Effect::Activate(activation)) => {
                self.place_kicks();
                (self.events)(VcpuEvent::ActivateDevice {
                    device: self.device,
                    activation,
                });
            }
            Some(Effect::RequestReset) => {
                self.place_kicks();
                (self.events)(VcpuEvent::ResetDevice { device: self.device });
            }
            Some(Effect::Reset) => self.clear(),
            Some(Effect::NeedsReset) => self.interrupt_config(),
            Some(Effect::QueueVector(queue)) => {
                let vector = self.transport.queue_vector(queue);
                self.msix.set_vector(usize::from(queue) + 1, vector);
            }
            Some(Effect::ConfigVector) => self.msix.set_vector(CONFIG_SOURCE, self.transport.config_vector()),
        }
    }

    /// What belongs to the virtio device and not to the PCI function, as after power-on.
    fn clear(&mut self) {
        self.isr = 0;
        self.msix.clear_vectors();
        // A change that the former driver was not told of is no news to the next.
        let _ = self.config_event.read();
        self.place_kicks();
    }

    /// Interrupts for a change of the configuration or of the device's health, if a driver runs the device.
    fn interrupt_config(&mut self) {
        if self.transport.is_running() {
            self.isr |= ISR_CONFIG;
            // Fails only when the counter is full, and then the interrupt is pending anyway.
            let _ = self.config_event.write(1);
        }
    }

    /// Where the BAR answers now.
    fn decoded(&self) -> Option<DecodedBar> {
        self.bar.decoded(&self.config, self.windows.as_ref()?)
    }

    fn place_kicks(&mut self) {
        let bar = self.decoded().filter(|_| self.transport.is_running());
        let transport = &self.transport;
        self.kicks.place(|queue| {
            let register = layout::NOTIFY.start + layout::NOTIFY_MULTIPLIER * queue as u64;
            bar.filter(|_| transport.is_enabled(queue))
                .map(|bar| bar.base + register)
        });
    }

    fn region_read(&mut self, offset: u64, data: &mut [u8]) {
        let inside = |range: &Range<u64>| range.contains(&offset).then(|| offset - range.start);
        let index = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        if let Some(offset) = inside(&layout::COMMON) {
            self.transport.read(offset, data);
        } else if let Some(0) = inside(&layout::ISR) {
            if let Some(first) = data.first_mut() {
                // Reading acknowledges (§4.1.4.5).
                *first = std::mem::take(&mut self.isr);
            }
        } else if let Some(offset) = inside(&layout::DEVICE) {
            let bytes = self.device_config.iter().skip(index(offset));
            data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        } else if let Some(offset) = inside(&layout::MSIX_TABLE) {
            self.msix.read_table(index(offset), data);
        } else if let Some(offset) = inside(&layout::MSIX_PBA) {
            self.msix.read_pba(index(offset), data);
        }
    }

    fn region_write(&mut self, offset: u64, data: &[u8]) {
        let inside = |range: &Range<u64>| range.contains(&offset).then(|| offset - range.start);
        let index = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(offset) = inside(&layout::COMMON) {
            let effect = self.transport.write(offset, data);
            self.apply(effect);
        } else if let Some(offset) = inside(&layout::NOTIFY) {
            self.kicks.kick(index(offset / layout::NOTIFY_MULTIPLIER));
        } else if let Some(offset) = inside(&layout::MSIX_TABLE) {
            self.msix.write_table(index(offset), data);
        }
        // The device configuration is read-only: no feature whose driver writes it is offered. So are ISR and PBA.
    }

    /// Whether an access touches the window of virtio_pci_cfg_cap; if so, which piece of the BAR it stands for.
    fn pci_cfg_target(&self, offset: usize, data: &[u8]) -> Option<(u64, usize)> {
        let window = self.capabilities.pci_cfg_data();
        let touches = offset < window.end && window.start < offset + data.len();
        touches
            .then(|| self.capabilities.pci_cfg_target(&self.config))
            .flatten()
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&mut self, offset: usize, data: &mut [u8]) {
        if let Some((target, length)) = self.pci_cfg_target(offset, data) {
            let mut piece = [0; 4];
            self.region_read(target, &mut piece[..length]);
            self.config
                .write(self.capabilities.pci_cfg_data().start, &piece[..length]);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        if let Some((target, length)) = self.pci_cfg_target(offset, data) {
            let mut piece = [0; 4];
            self.config.read(self.capabilities.pci_cfg_data().start, &mut piece);
            self.region_write(target, &piece[..length]);
        }
        let control = self.config.u16_at(self.capabilities.msix + msix::CONTROL_OFFSET);
        self.msix.set_control(control);
        self.place_kicks();
    }

    fn assign_bars(&mut self, allocator: &mut BarAllocator) -> Result<(), WindowFull> {
        let address = allocator.allocate(self.bar.bytes)?;
        self.bar.define(&mut self.config, address);
        self.windows = Some(allocator.windows().clone());
        Ok(())
    }

    fn decoded_bars(&self, decoded: &mut Vec<DecodedBar>) {
        decoded.extend(self.decoded());
    }

    fn bar_read(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        self.region_read(offset, data);
    }

    fn bar_write(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        self.region_write(offset, data);
    }

    /// A handshake that is under way is dropped: at a reset of the machine the supervisor resets block-proc itself.
    fn reset(&mut self) {
        self.config.reset();
        self.transport.reset();
        self.msix.reset();
        self.clear();
    }
}

fn identity(kind: DeviceKind) -> FunctionIdentity {
    let (id, class) = match kind {
        // SCSI storage controller, as QEMU says.
        DeviceKind::Block => (VIRTIO_ID_BLOCK, [0x01, 0x00, 0x00]),
        // Unassigned class.
        DeviceKind::Rng => (VIRTIO_ID_RNG, [0x00, 0xff, 0x00]),
    };
    FunctionIdentity {
        vendor: VENDOR,
        device: DEVICE_BASE + u16::try_from(id).expect("virtio device IDs are small"),
        revision: REVISION,
        class,
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    }
}

fn length(range: &Range<u64>) -> u64 {
    range.end - range.start
}

/// What kvm-ioctls takes, from the capability that a message brought.
fn eventfd(fd: OwnedFd) -> EventFd {
    // SAFETY: the fd is owned and given up here. Should it not be an eventfd, KVM says so when it is connected.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}

#[cfg(test)]
mod tests;
