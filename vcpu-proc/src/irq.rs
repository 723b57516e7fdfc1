//! Interrupt routing, and the eventfds that KVM serves without us.
//!
//! A completion travels from block-proc to the guest without a line of code in this process: block-proc writes an
//! eventfd, KVM looks up the route of the global system interrupt (GSI) that the eventfd is connected to and injects
//! the message. A kick travels the other way: KVM signals an eventfd when the guest writes an address. This module is
//! the only one that sets those connections up; whoever owns a register that decides about them (MSI-X, BARs, the
//! virtio transport) calls it when, and only when, the guest changes that register.
//!
//! KVM_SET_GSI_ROUTING replaces the whole table, so somebody must own the whole table: that is [`IrqManager`]. The pins
//! of the PICs and the IOAPIC, which KVM_CREATE_IRQCHIP sets up by default, are therefore given again in each update
//! (see "KVM_SET_GSI_ROUTING" and "KVM_IRQFD" in the kernel's Documentation/virt/kvm/api.rst).

use crate::layout::{FIRST_MSI_GSI, IOAPIC_PINS};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// Pins of one 8259.
const PIC_PINS: u32 = 8;
/// Entries of KVM's table (KVM_MAX_IRQ_ROUTES is 4096) less those of the two PICs and the IOAPIC.
const MAX_MSI_ROUTES: u32 = 4096 - 2 * PIC_PINS - IOAPIC_PINS;

/// A message-signalled interrupt: a write of `data` to `address`, as the guest programs it. Both are the guest's and
/// mean nothing to the host: KVM takes destination and vector from them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where the message is written.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// What the kernel does for us; a trait so that tests need no KVM.
pub trait EventBackend: Send + Sync {
    /// Replaces the routing table: the pins of PICs and IOAPIC, and these messages by GSI.
    ///
    /// # Errors
    /// When the kernel refuses the table; the former one stays in force.
    fn set_routes(&self, messages: &BTreeMap<u32, MsiMessage>) -> io::Result<()>;
    /// From now on a signal of `event` raises `gsi`. A signal that is waiting in the eventfd raises it at once.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn connect_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()>;
    /// Ends that. Signals stay in the eventfd's counter.
    ///
    /// # Errors
    /// When there is no such connection.
    fn disconnect_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()>;
    /// From now on a write of any length to `address` signals `event`.
    ///
    /// # Errors
    /// When the kernel refuses, for example because another eventfd is there.
    fn connect_ioeventfd(&self, event: &EventFd, address: u64) -> io::Result<()>;
    /// Ends that.
    ///
    /// # Errors
    /// When there is no such connection.
    fn disconnect_ioeventfd(&self, event: &EventFd, address: u64) -> io::Result<()>;
}

/// The owner of the routing table and of all eventfd connections of one VM. Clones share it.
#[derive(Clone)]
pub struct IrqManager {
    shared: Arc<Shared>,
}

struct Shared {
    backend: Box<dyn EventBackend>,
    routes: Mutex<Routes>,
}

struct Routes {
    /// The table as the kernel has it.
    messages: BTreeMap<u32, MsiMessage>,
    next_gsi: u32,
}

impl IrqManager {
    /// For a VM that has its in-kernel interrupt controllers already.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self::with_backend(Box::new(KvmBackend(vm)))
    }

    /// Over anything that behaves like KVM.
    pub fn with_backend(backend: Box<dyn EventBackend>) -> Self {
        Self {
            shared: Arc::new(Shared {
                backend,
                routes: Mutex::new(Routes {
                    messages: BTreeMap::new(),
                    next_gsi: FIRST_MSI_GSI,
                }),
            }),
        }
    }

    /// Reserves `count` consecutive GSIs for messages and returns the first. They are never given back: devices live
    /// as long as the process.
    ///
    /// # Errors
    /// When KVM's table could not hold them all.
    pub fn allocate_msi(&self, count: u16) -> io::Result<u32> {
        let mut routes = self.shared.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let first = routes.next_gsi;
        let next = first + u32::from(count);
        if next > FIRST_MSI_GSI + MAX_MSI_ROUTES {
            return Err(io::Error::other(format!(
                "{count} more interrupt vectors do not fit into KVM's routing table"
            )));
        }
        routes.next_gsi = next;
        Ok(first)
    }

    /// Makes `gsi` mean `message`. Nothing happens when it does so already.
    ///
    /// # Errors
    /// When KVM refuses the message (it checks destinations when x2APIC IDs are on); then the former one stays.
    pub fn set_route(&self, gsi: u32, message: MsiMessage) -> io::Result<()> {
        // The lock is held over the call so that the kernel sees tables in the order in which they were made.
        let mut routes = self.shared.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let former = routes.messages.insert(gsi, message);
        if former == Some(message) {
            return Ok(());
        }
        let result = self.shared.backend.set_routes(&routes.messages);
        if result.is_err() {
            // One message that KVM dislikes must not spoil later updates of the others.
            match former {
                Some(former) => routes.messages.insert(gsi, former),
                None => routes.messages.remove(&gsi),
            };
        }
        result
    }

    /// Connects an eventfd to an interrupt: a pin of the IOAPIC (below 24) or an allocated GSI with a route.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn connect_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        self.shared.backend.connect_irqfd(event, gsi)
    }

    /// Undoes [`Self::connect_irqfd`].
    ///
    /// # Errors
    /// When there is no such connection.
    pub fn disconnect_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        self.shared.backend.disconnect_irqfd(event, gsi)
    }

    /// Has KVM signal `event` at guest writes to `address`.
    ///
    /// # Errors
    /// When KVM refuses; the write then exits to us and must be handled there.
    pub fn connect_ioeventfd(&self, event: &EventFd, address: u64) -> io::Result<()> {
        self.shared.backend.connect_ioeventfd(event, address)
    }

    /// Undoes [`Self::connect_ioeventfd`].
    ///
    /// # Errors
    /// When there is no such connection.
    pub fn disconnect_ioeventfd(&self, event: &EventFd, address: u64) -> io::Result<()> {
        self.shared.backend.disconnect_ioeventfd(event, address)
    }
}

/// The real thing.
struct KvmBackend(Arc<VmFd>);

impl EventBackend for KvmBackend {
    fn set_routes(&self, messages: &BTreeMap<u32, MsiMessage>) -> io::Result<()> {
        let entries: Vec<_> = legacy_routes()
            .chain(messages.iter().map(|(&gsi, &message)| msi_route(gsi, message)))
            .collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.0.set_gsi_routing(&table).map_err(os_error)
    }
    fn connect_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        self.0.register_irqfd(event, gsi).map_err(os_error)
    }
    fn disconnect_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        self.0.unregister_irqfd(event, gsi).map_err(os_error)
    }
    fn connect_ioeventfd(&self, event: &EventFd, address: u64) -> io::Result<()> {
        self.0
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(os_error)
    }
    fn disconnect_ioeventfd(&self, event: &EventFd, address: u64) -> io::Result<()> {
        self.0
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(os_error)
    }
}

fn os_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// The pins as KVM itself routes them: GSI n is IOAPIC pin n, and below 16 a pin of one of the PICs too.
fn legacy_routes() -> impl Iterator<Item = kvm_irq_routing_entry> {
    let pics = (0..2 * PIC_PINS).map(|gsi| {
        let irqchip = if gsi < PIC_PINS {
            KVM_IRQCHIP_PIC_MASTER
        } else {
            KVM_IRQCHIP_PIC_SLAVE
        };
        pin_route(gsi, irqchip, gsi % PIC_PINS)
    });
    pics.chain((0..IOAPIC_PINS).map(|gsi| pin_route(gsi, KVM_IRQCHIP_IOAPIC, gsi)))
}

fn pin_route(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

fn msi_route(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    let [b0, b1, b2, b3, b4, b5, b6, b7] = message.address.to_le_bytes();
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: u32::from_le_bytes([b0, b1, b2, b3]),
        address_hi: u32::from_le_bytes([b4, b5, b6, b7]),
        data: message.data,
        ..Default::default()
    };
    entry
}

#[cfg(test)]
pub mod fake;

#[cfg(test)]
mod tests {
    use super::fake::FakeKvm;
    use super::*;

    const HERE: MsiMessage = MsiMessage {
        address: 0xfee0_0000,
        data: 0x41,
    };

    #[test]
    fn gsis_are_handed_out_above_the_ioapic_until_the_table_is_full() {
        let (irq, _kvm) = FakeKvm::manager();
        assert_eq!(irq.allocate_msi(3).unwrap(), 24);
        assert_eq!(irq.allocate_msi(33).unwrap(), 27);
        assert!(irq.allocate_msi(u16::MAX).is_err());
        assert_eq!(irq.allocate_msi(1).unwrap(), 60);
    }

    #[test]
    fn only_a_changed_route_costs_a_system_call() {
        let (irq, kvm) = FakeKvm::manager();
        let gsi = irq.allocate_msi(1).unwrap();
        irq.set_route(gsi, HERE).unwrap();
        irq.set_route(gsi, HERE).unwrap();
        assert_eq!(kvm.route_updates(), 1);
    }

    #[test]
    fn a_refused_route_leaves_the_others_alone() {
        let (irq, kvm) = FakeKvm::manager();
        let gsi = irq.allocate_msi(2).unwrap();
        irq.set_route(gsi, HERE).unwrap();
        let refused = MsiMessage {
            address: FakeKvm::REFUSED_ADDRESS,
            ..HERE
        };
        assert!(irq.set_route(gsi, refused).is_err());
        assert!(irq.set_route(gsi + 1, refused).is_err());
        let elsewhere = MsiMessage { data: 0x51, ..HERE };
        irq.set_route(gsi + 1, elsewhere).unwrap();
        assert_eq!(kvm.routes(), [(gsi, HERE), (gsi + 1, elsewhere)].into());
    }

    #[test]
    fn kvm_takes_the_whole_table() {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            eprintln!("skipped: no /dev/kvm");
            return;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        vm.create_irq_chip().unwrap();
        let irq = IrqManager::new(vm);
        let last = irq.allocate_msi(u16::try_from(MAX_MSI_ROUTES).unwrap()).unwrap() + MAX_MSI_ROUTES - 1;
        irq.set_route(last, HERE).unwrap();
        let event = EventFd::new(0).unwrap();
        irq.connect_irqfd(&event, last).unwrap();
        assert!(
            irq.connect_irqfd(&event, last).is_err(),
            "KVM allows one connection of an eventfd"
        );
        irq.disconnect_irqfd(&event, last).unwrap();
        irq.connect_irqfd(&event, 4).unwrap();
        irq.connect_ioeventfd(&event, 0xc000_3000).unwrap();
        irq.disconnect_ioeventfd(&event, 0xc000_3000).unwrap();
    }
}
