//! MSI-X (PCI 3.0 §6.8.2): the vector table, and which eventfd raises which vector.
//!
//! A *source* is an eventfd that somebody signals to interrupt the guest: a virtqueue's call eventfd, signalled by
//! block-proc, or our own for configuration changes. The driver assigns each source a vector, perhaps one vector to
//! several. While the vector can be delivered, the source is an irqfd of the vector's GSI and KVM does the rest. While
//! it is masked, the irqfd is disconnected: signals wait in the eventfd, which makes the eventfd the pending bit.
//! Connecting an irqfd delivers what waits, and that is the "send when unmasked" of the specification.
//!
//! So no interrupt costs a call into this process, and masking costs one KVM call per source. The guest decides how
//! often it masks; it pays with its own vCPU's time.

use crate::irq::{IrqManager, MsiMessage};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of a table entry: address, upper address, data, vector control.
pub const ENTRY_BYTES: usize = 16;
/// Offset of the vector control in an entry.
const VECTOR_CONTROL: usize = 12;
/// Vector control: this vector is masked.
const VECTOR_MASKED: u8 = 1;

/// Message control, after the capability's ID and next pointer.
pub const CONTROL_OFFSET: usize = 2;
/// Message control: MSI-X is in use.
const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

/// Virtio's and our mark of a source without a vector.
pub const NO_VECTOR: u16 = 0xffff;

/// The body of the MSI-X capability and its write mask, for a table of `vectors` entries in `bar`.
pub fn capability(vectors: u16, bar: u8, table_offset: u32, pba_offset: u32) -> ([u8; 10], [u8; 10]) {
    let mut body = [0; 10];
    body[0..2].copy_from_slice(&(vectors - 1).to_le_bytes());
    body[2..6].copy_from_slice(&(table_offset | u32::from(bar)).to_le_bytes());
    body[6..10].copy_from_slice(&(pba_offset | u32::from(bar)).to_le_bytes());
    let mut writable = [0; 10];
    writable[0..2].copy_from_slice(&(CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes());
    (body, writable)
}

struct Source {
    event: EventFd,
    /// What the driver assigned.
    vector: Option<u16>,
    /// The vector that the irqfd is connected to at present.
    connected: Option<u16>,
}

/// The MSI-X half of a function.
pub struct Msix {
    irq: IrqManager,
    /// GSI of vector 0; the others follow.
    first_gsi: u32,
    table: Vec<[u8; ENTRY_BYTES]>,
    enabled: bool,
    function_masked: bool,
    sources: Vec<Source>,
    /// Whether a failure was logged: a guest may be able to cause them, but not to fill a log.
    complained: bool,
}

/// A table as after power-on: zeros, all vectors masked.
const POWER_ON_ENTRY: [u8; ENTRY_BYTES] = {
    let mut entry = [0; ENTRY_BYTES];
    entry[VECTOR_CONTROL] = VECTOR_MASKED;
    entry
};

impl Msix {
    /// A table of `vectors` entries.
    ///
    /// # Errors
    /// When KVM has no routes left.
    pub fn new(irq: &IrqManager, vectors: u16) -> io::Result<Self> {
        Ok(Self {
            irq: irq.clone(),
            first_gsi: irq.allocate_msi(vectors)?,
            table: vec![POWER_ON_ENTRY; usize::from(vectors)],
            enabled: false,
            function_masked: false,
            sources: Vec::new(),
            complained: false,
        })
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.table.len()).unwrap_or(u16::MAX)
    }

    /// Adds an eventfd, without a vector as yet. Returns its number.
    pub fn add_source(&mut self, event: EventFd) -> usize {
        self.sources.push(Source {
            event,
            vector: None,
            connected: None,
        });
        self.sources.len() - 1
    }

    /// Assigns a vector to a source. Numbers outside the table mean none.
    pub fn set_vector(&mut self, source: usize, vector: u16) {
        let vector = (vector < self.vectors()).then_some(vector);
        if let Some(source) = self.sources.get_mut(source) {
            source.vector = vector;
        }
        self.refresh_source(source);
    }

    /// Takes the message control register as the guest left it.
    pub fn set_control(&mut self, control: u16) {
        let enabled = control & CONTROL_ENABLE != 0;
        let function_masked = control & CONTROL_FUNCTION_MASK != 0;
        if (self.enabled, self.function_masked) != (enabled, function_masked) {
            self.enabled = enabled;
            self.function_masked = function_masked;
            (0..self.sources.len()).for_each(|source| self.refresh_source(source));
        }
    }

    /// Reads the vector table. Bytes past its end are zero.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset + index;
            *byte = self
                .table
                .get(at / ENTRY_BYTES)
                .map_or(0, |entry| entry[at % ENTRY_BYTES]);
        }
    }

    /// Writes the vector table.
    pub fn write_table(&mut self, offset: usize, data: &[u8]) {
        for (index, &new) in data.iter().enumerate() {
            let at = offset + index;
            if let Some(entry) = self.table.get_mut(at / ENTRY_BYTES) {
                entry[at % ENTRY_BYTES] = match at % ENTRY_BYTES {
                    VECTOR_CONTROL => new & VECTOR_MASKED,
                    byte if byte > VECTOR_CONTROL => 0,
                    _ => new,
                };
            }
        }
        let Some(last) = (offset + data.len()).checked_sub(1) else {
            return;
        };
        let touched = offset / ENTRY_BYTES..=last / ENTRY_BYTES;
        for source in 0..self.sources.len() {
            if self.sources[source]
                .vector
                .is_some_and(|vector| touched.contains(&usize::from(vector)))
            {
                self.refresh_source(source);
            }
        }
    }

    /// Reads the pending bit array: a bit is set while a source of a masked vector has a signal waiting.
    pub fn read_pba(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        for source in &self.sources {
            let Some(vector) = source.vector else { continue };
            let byte = usize::from(vector / 8).checked_sub(offset);
            if let Some(byte) = byte.and_then(|byte| data.get_mut(byte))
                && source.connected.is_none()
                && is_signalled(&source.event)
            {
                *byte |= 1 << (vector % 8);
            }
        }
    }

    /// As after power-on; nothing is connected any more, and no source has a vector.
    pub fn reset(&mut self) {
        self.table.fill(POWER_ON_ENTRY);
        self.enabled = false;
        self.function_masked = false;
        self.clear_vectors();
    }

    /// Takes all sources' vectors away, as a reset of the virtio device does.
    pub fn clear_vectors(&mut self) {
        (0..self.sources.len()).for_each(|source| self.set_vector(source, NO_VECTOR));
    }

    fn deliverable(&self, vector: u16) -> Option<MsiMessage> {
        let entry = self.table.get(usize::from(vector))?;
        let masked = entry[VECTOR_CONTROL] & VECTOR_MASKED != 0;
        if !self.enabled || self.function_masked || masked {
            return None;
        }
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, ..] = *entry;
        Some(MsiMessage {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
        })
    }

    /// Connects or disconnects a source's irqfd, as its vector's state asks.
    fn refresh_source(&mut self, index: usize) {
        let Some(Source { vector, connected, .. }) = self.sources.get(index) else {
            return;
        };
        let wanted = vector.and_then(|vector| Some((vector, self.deliverable(vector)?)));
        let former = *connected;
        let mut result = Ok(());
        if let Some(former) = former
            && wanted.is_none_or(|(vector, _)| vector != former)
        {
            result = self.irq.disconnect_irqfd(&self.sources[index].event, self.gsi(former));
            self.sources[index].connected = None;
        }
        if let Some((vector, message)) = wanted {
            result = result.and(self.connect(index, vector, message));
        }
        if let Err(error) = result
            && !self.complained
        {
            self.complained = true;
            complain(&error);
        }
    }

    /// Routes first, connects then: the signals that wait are delivered at once and must find the new message.
    fn connect(&mut self, index: usize, vector: u16, message: MsiMessage) -> io::Result<()> {
        let gsi = self.gsi(vector);
        let source = &mut self.sources[index];
        let result = self.irq.set_route(gsi, message);
        if result.is_err() && source.connected.is_some() {
            // The former message must not be delivered any more either.
            source.connected = None;
            return self.irq.disconnect_irqfd(&source.event, gsi);
        }
        result?;
        if source.connected.is_none() {
            self.irq.connect_irqfd(&source.event, gsi)?;
            source.connected = Some(vector);
        }
        Ok(())
    }

    fn gsi(&self, vector: u16) -> u32 {
        self.first_gsi + u32::from(vector)
    }
}

#[cfg(not(test))]
fn complain(error: &io::Error) {
    ipc::helper::log(&format!("an interrupt vector is out of order: {error}"));
}

/// A test has no log socket, and the socket's number is somebody else's fd.
#[cfg(test)]
fn complain(error: &io::Error) {
    eprintln!("an interrupt vector is out of order: {error}");
}

/// Whether the eventfd's counter is above zero; does not change it.
fn is_signalled(event: &EventFd) -> bool {
    // SAFETY: the eventfd outlives this borrow.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::fake::FakeKvm;
    use std::sync::Arc;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const ENABLED: u16 = CONTROL_ENABLE;

    fn event() -> EventFd {
        EventFd::new(EFD_NONBLOCK).unwrap()
    }

    /// A table of three vectors with two sources.
    fn msix() -> (Msix, Arc<FakeKvm>, [EventFd; 2]) {
        let (irq, kvm) = FakeKvm::manager();
        let mut msix = Msix::new(&irq, 3).unwrap();
        let events = [event(), event()];
        for event in &events {
            msix.add_source(event.try_clone().unwrap());
        }
        (msix, kvm, events)
    }

    /// Programs a vector the way Linux does, and unmasks it.
    fn program(msix: &mut Msix, vector: usize, message: MsiMessage) {
        msix.write_table(vector * ENTRY_BYTES, &message.address.to_le_bytes()[..4]);
        msix.write_table(vector * ENTRY_BYTES + 4, &message.address.to_le_bytes()[4..]);
        msix.write_table(vector * ENTRY_BYTES + 8, &message.data.to_le_bytes());
        mask(msix, vector, false);
    }

    fn mask(msix: &mut Msix, vector: usize, masked: bool) {
        msix.write_table(vector * ENTRY_BYTES + VECTOR_CONTROL, &u32::from(masked).to_le_bytes());
    }

    fn pending(msix: &Msix) -> u64 {
        let mut data = [0xff; 8];
        msix.read_pba(0, &mut data);
        u64::from_le_bytes(data)
    }

    fn message(data: u32) -> MsiMessage {
        MsiMessage {
            address: 0xfee0_0000,
            data,
        }
    }

    #[test]
    fn an_unmasked_vector_delivers_without_further_calls() {
        let (mut msix, kvm, [first, second]) = msix();
        msix.set_vector(0, 1);
        msix.set_vector(1, 2);
        program(&mut msix, 1, message(0x41));
        program(&mut msix, 2, message(0x42));
        assert_eq!(kvm.irqfds(), 0, "MSI-X is not enabled yet");
        msix.set_control(ENABLED);
        let updates = kvm.route_updates();
        first.write(1).unwrap();
        second.write(1).unwrap();
        assert_eq!(kvm.take_delivered(), [message(0x41), message(0x42)]);
        assert_eq!(kvm.route_updates(), updates);
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn a_masked_vector_is_pending_and_delivers_once_unmasked() {
        let (mut msix, kvm, [first, _]) = msix();
        msix.set_control(ENABLED);
        msix.set_vector(0, 2);
        program(&mut msix, 2, message(0x50));
        mask(&mut msix, 2, true);
        first.write(1).unwrap();
        first.write(1).unwrap();
        assert_eq!(kvm.take_delivered(), []);
        assert_eq!(pending(&msix), 1 << 2);
        mask(&mut msix, 2, false);
        assert_eq!(kvm.take_delivered(), [message(0x50)]);
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn the_function_mask_masks_all_vectors() {
        let (mut msix, kvm, [first, _]) = msix();
        msix.set_vector(0, 0);
        program(&mut msix, 0, message(1));
        msix.set_control(ENABLED | CONTROL_FUNCTION_MASK);
        first.write(1).unwrap();
        assert_eq!(kvm.take_delivered(), []);
        assert_eq!(pending(&msix), 1);
        msix.set_control(ENABLED);
        assert_eq!(kvm.take_delivered(), [message(1)]);
    }

    #[test]
    fn sources_may_share_a_vector() {
        let (mut msix, kvm, [first, second]) = msix();
        msix.set_control(ENABLED);
        msix.set_vector(0, 1);
        msix.set_vector(1, 1);
        program(&mut msix, 1, message(9));
        first.write(1).unwrap();
        assert_eq!(kvm.take_delivered(), [message(9)]);
        second.write(1).unwrap();
        assert_eq!(kvm.take_delivered(), [message(9)]);
        assert_eq!(kvm.routes().len(), 1);
    }

    #[test]
    fn a_moved_interrupt_follows_without_loss() {
        let (mut msix, kvm, [first, _]) = msix();
        msix.set_control(ENABLED);
        msix.set_vector(0, 1);
        program(&mut msix, 1, message(1));
        // A change of affinity: mask, change, unmask. Then another vector altogether.
        mask(&mut msix, 1, true);
        first.write(1).unwrap();
        program(&mut msix, 1, message(2));
        assert_eq!(kvm.take_delivered(), [message(2)]);
        program(&mut msix, 2, message(3));
        msix.set_vector(0, 2);
        first.write(1).unwrap();
        assert_eq!(kvm.take_delivered(), [message(3)]);
        msix.set_vector(0, NO_VECTOR);
        assert_eq!(kvm.irqfds(), 0);
    }

    #[test]
    fn a_message_that_kvm_refuses_is_not_delivered() {
        let (mut msix, kvm, [first, _]) = msix();
        msix.set_control(ENABLED);
        msix.set_vector(0, 0);
        program(&mut msix, 0, message(1));
        // Without masking, which the specification leaves undefined.
        let high = FakeKvm::REFUSED_ADDRESS.to_le_bytes();
        msix.write_table(0, &high);
        first.write(1).unwrap();
        assert_eq!(kvm.irqfds(), 0);
        program(&mut msix, 0, message(2));
        assert_eq!(kvm.take_delivered(), [message(2)]);
    }

    #[test]
    fn reset_disconnects_and_masks_everything() {
        let (mut msix, kvm, _events) = msix();
        msix.set_control(ENABLED);
        msix.set_vector(0, 0);
        program(&mut msix, 0, message(1));
        msix.reset();
        assert_eq!(kvm.irqfds(), 0);
        let mut entry = [0; 16];
        msix.read_table(0, &mut entry);
        assert_eq!(entry, POWER_ON_ENTRY);
    }

    #[test]
    fn unaligned_and_distant_accesses_are_harmless() {
        let (mut msix, _kvm, _events) = msix();
        msix.write_table(3 * ENTRY_BYTES - 4, &[0xff; 8]);
        let mut data = [0xee; 8];
        msix.read_table(3 * ENTRY_BYTES - 4, &mut data);
        assert_eq!(data, [1, 0, 0, 0, 0, 0, 0, 0]);
        msix.write_table(0xfff, &[0xff; 8]);
        msix.write_table(7, &[]);
        let mut far = [0xee; 4];
        msix.read_pba(0xff0, &mut far);
        assert_eq!(far, [0; 4]);
    }
}
