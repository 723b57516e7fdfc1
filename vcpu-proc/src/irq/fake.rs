//! KVM's eventfd interfaces as far as tests look at them: what is connected, and what would be delivered.

use super::{EventBackend, IrqManager, MsiMessage};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard};
use vmm_sys_util::eventfd::EventFd;

/// Records connections. Eventfds must be non-blocking.
#[derive(Default)]
pub struct FakeKvm {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    routes: BTreeMap<u32, MsiMessage>,
    route_updates: usize,
    irqfds: Vec<(EventFd, u32)>,
    ioeventfds: Vec<(EventFd, u64)>,
    refuse_ioeventfds: bool,
}

struct Handle(Arc<FakeKvm>);

impl FakeKvm {
    /// A message address that the fake refuses, as KVM refuses some.
    pub const REFUSED_ADDRESS: u64 = 0xbad_0000_0000;

    /// A manager on a new fake.
    pub fn manager() -> (IrqManager, Arc<Self>) {
        let fake = Arc::new(Self::default());
        (IrqManager::with_backend(Box::new(Handle(fake.clone()))), fake)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The table of messages.
    pub fn routes(&self) -> BTreeMap<u32, MsiMessage> {
        self.state().routes.clone()
    }

    /// How often the table was replaced.
    pub fn route_updates(&self) -> usize {
        self.state().route_updates
    }

    /// How many eventfds are connected to interrupts.
    pub fn irqfds(&self) -> usize {
        self.state().irqfds.len()
    }

    /// The connected addresses, ascending.
    pub fn ioeventfds(&self) -> Vec<u64> {
        let mut addresses: Vec<u64> = self.state().ioeventfds.iter().map(|(_, address)| *address).collect();
        addresses.sort_unstable();
        addresses
    }

    /// Plays a kernel that has no ioeventfds left.
    pub fn refuse_ioeventfds(&self) {
        self.state().refuse_ioeventfds = true;
    }

    /// Plays a guest write: signals the eventfd at `address`; `false` when the write would exit instead.
    pub fn guest_write(&self, address: u64) -> bool {
        let state = self.state();
        let Some((event, _)) = state.ioeventfds.iter().find(|(_, at)| *at == address) else {
            return false;
        };
        event.write(1).unwrap();
        true
    }

    /// The messages injected since the last call, in ascending order of their data.
    pub fn take_delivered(&self) -> Vec<MsiMessage> {
        let state = self.state();
        let mut messages: Vec<MsiMessage> = state
            .irqfds
            .iter()
            .filter(|(event, _)| event.read().is_ok())
            .map(|(_, gsi)| state.routes[gsi])
            .collect();
        messages.sort_unstable_by_key(|message| message.data);
        messages
    }
}

/// Whether both are one eventfd: KVM sees through duplicates of an fd, so the fake must too.
fn same(a: &EventFd, b: &EventFd) -> bool {
    let read = |event: &EventFd| {
        std::fs::read_to_string(format!("/proc/self/fdinfo/{}", event.as_raw_fd()))
            .unwrap()
            .lines()
            .find_map(|line| line.strip_prefix("eventfd-id:").map(|id| id.trim().to_owned()))
    };
    read(a) == read(b)
}

impl EventBackend for Handle {
    fn set_routes(&self, messages: &BTreeMap<u32, MsiMessage>) -> io::Result<()> {
        let mut state = self.0.state();
        state.route_updates += 1;
        if messages
            .values()
            .any(|message| message.address == FakeKvm::REFUSED_ADDRESS)
        {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        state.routes = messages.clone();
        Ok(())
    }
    fn connect_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        let mut state = self.0.state();
        if state.irqfds.iter().any(|(other, _)| same(other, event)) {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        state.irqfds.push((event.try_clone()?, gsi));
        Ok(())
    }
    fn disconnect_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        let mut state = self.0.state();
        let before = state.irqfds.len();
        state.irqfds.retain(|(other, at)| !(*at == gsi && same(other, event)));
        (state.irqfds.len() < before)
            .then_some(())
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
    }
    fn connect_ioeventfd(&self, event: &EventFd, address: u64) -> io::Result<()> {
        let mut state = self.0.state();
        if state.refuse_ioeventfds {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        if state.ioeventfds.iter().any(|(_, at)| *at == address) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        state.ioeventfds.push((event.try_clone()?, address));
        Ok(())
    }
    fn disconnect_ioeventfd(&self, event: &EventFd, address: u64) -> io::Result<()> {
        let mut state = self.0.state();
        let before = state.ioeventfds.len();
        state
            .ioeventfds
            .retain(|(other, at)| !(*at == address && same(other, event)));
        (state.ioeventfds.len() < before)
            .then_some(())
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }
}
