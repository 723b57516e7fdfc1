//! The serial port's backend: the supervisor accepts, vcpu-proc holds the connected fd.

use super::Vm;
use crate::chardev::{Chardev, Listener, Streams};
use crate::logging;
use crate::sys::Poller;
use ipc::caps::ChardevFd;
use ipc::vcpu::VcpuRequest;
use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

/// The backend.
pub struct Serial {
    listener: Option<Listener>,
    /// The streams of a backend that is connected from the start, until they are handed over.
    fixed: RefCell<Option<Streams>>,
    /// The far side of a pty.
    keep: RefCell<Option<OwnedFd>>,
    connected: Cell<bool>,
    running: Cell<bool>,
}

impl Serial {
    /// On an open character device.
    pub fn new(device: Chardev) -> Self {
        let (listener, fixed) = match device {
            // A ring buffer is given as the socket that feeds it.
            Chardev::Null | Chardev::Ring(_) => (None, None),
            Chardev::Connected(streams) => (None, Some(streams)),
            Chardev::Listening(listener) => (Some(listener), None),
        };
        Self {
            listener,
            fixed: RefCell::new(fixed),
            keep: RefCell::new(None),
            connected: Cell::new(false),
            running: Cell::new(false),
        }
    }

    /// Watches for a client while there is none.
    pub fn watch<T>(&self, poller: &mut Poller<T>, token: T) {
        if let Some(listener) = &self.listener
            && self.running.get()
            && !self.connected.get()
        {
            poller.add(listener.as_fd(), libc::POLLIN, token);
        }
    }

    /// Whether a client is connected.
    pub fn is_connected(&self) -> bool {
        self.connected.get()
    }

    /// vcpu-proc has closed its fds: the next client may come.
    pub fn closed(&self) {
        self.connected.set(false);
    }
}

/// Hands over what is connected from the start, and begins to accept clients.
pub async fn attach(vm: &Vm) -> Result<(), String> {
    let streams = vm.serial.fixed.take();
    vm.serial.running.set(true);
    let Some(Streams { input, output, keep }) = streams else {
        return Ok(());
    };
    vm.serial.keep.replace(keep);
    vm.serial.connected.set(true);
    hand_over(vm, input, output).await
}

/// A client has connected.
pub fn accept(vm: &Rc<Vm>) {
    let Some(client) = vm.serial.listener.as_ref().and_then(Listener::accept) else {
        return;
    };
    vm.serial.connected.set(true);
    let vm = Rc::clone(vm);
    let executor = Rc::clone(&vm);
    executor.executor.spawn(async move {
        if let Err(error) = hand_over(&vm, Some(client), None).await {
            logging::line(error);
            vm.serial.closed();
        }
    });
}

/// Gives vcpu-proc both directions; a single fd serves for both.
async fn hand_over(vm: &Vm, input: Option<OwnedFd>, output: Option<OwnedFd>) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| format!("connecting the serial port: {error}");
    let output = match (&input, output) {
        (Some(input), None) => Some(input.try_clone().map_err(|error| failed(&error))?),
        (_, output) => output,
    };
    let request = VcpuRequest::AttachSerial {
        input: input.map(ChardevFd::new),
        output: output.map(ChardevFd::new),
    };
    vm.vcpu()
        .map_err(|error| failed(&error))?
        .ask(request)
        .await
        .map(drop)
        .map_err(|error| failed(&error))
}
