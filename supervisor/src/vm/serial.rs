//! The serial port's backend: the supervisor accepts, vcpu-proc holds the connected fd.

use super::Vm;
use super::chardevs::dial;
use crate::chardev::{Chardev, Source, Streams};
use crate::logging;
use crate::sys::Poller;
use ipc::caps::ChardevFd;
use ipc::vcpu::VcpuRequest;
use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

/// The backend.
pub struct Serial {
    /// Where clients, or connections, come from.
    source: Source,
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
        let (source, fixed) = match device {
            // A ring buffer is given as the socket that feeds it.
            Chardev::Null | Chardev::Ring(_) => (Source::Spent, None),
            Chardev::Connected(streams) => (Source::Spent, Some(streams)),
            Chardev::Listening(listener) => (Source::Listening(listener), None),
            Chardev::Dialing(dialer) => (Source::Dialing(dialer), None),
        };
        Self {
            source,
            fixed: RefCell::new(fixed),
            keep: RefCell::new(None),
            connected: Cell::new(false),
            running: Cell::new(false),
        }
    }

    /// Watches for a client while there is none.
    pub fn watch<T>(&self, poller: &mut Poller<T>, token: T) {
        if let Source::Listening(listener) = &self.source
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
        self.source.closed();
    }

    /// When it is to connect.
    pub fn due(&self) -> Option<Instant> {
        self.source.due().filter(|_| self.running.get())
    }
}

/// Hands over what is connected from the start, and begins to accept clients.
pub async fn attach(vm: &Vm) -> Result<(), String> {
    let streams = vm.serial.fixed.take();
    vm.serial.running.set(true);
    let Some(mut streams) = streams else {
        return Ok(());
    };
    vm.serial.keep.replace(streams.keep.take());
    vm.serial.connected.set(true);
    hand_over(vm, streams).await
}

/// A client has connected.
pub fn accept(vm: &Rc<Vm>) {
    if let Source::Listening(listener) = &vm.serial.source
        && let Some(client) = listener.accept()
    {
        connected(vm, client);
    }
}

fn connected(vm: &Rc<Vm>, client: OwnedFd) {
    vm.serial.connected.set(true);
    let vm = Rc::clone(vm);
    let executor = Rc::clone(&vm);
    executor.executor.spawn(async move {
        if let Err(error) = hand_over(&vm, Streams::both_ways(client)).await {
            logging::line(error);
            vm.serial.closed();
        }
    });
}

/// Connects, if it is time to.
pub fn connect(vm: &Rc<Vm>, now: Instant) {
    if !vm.serial.running.get() {
        return;
    }
    let Source::Dialing(dialer) = &vm.serial.source else {
        return;
    };
    if dialer.take_due(now) {
        let vm = Rc::clone(vm);
        let executor = Rc::clone(&vm);
        executor.executor.spawn(async move {
            if let Source::Dialing(dialer) = &vm.serial.source
                && let Some(connection) = dial(&vm, &vm.config.serial_label, dialer).await
            {
                connected(&vm, connection);
            }
        });
    }
}

/// Gives vcpu-proc both directions; a single fd serves for both.
async fn hand_over(vm: &Vm, streams: Streams) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| format!("connecting the serial port: {error}");
    let Streams {
        input,
        output,
        datagrams,
        ..
    } = streams;
    let output = match (&input, output) {
        (Some(input), None) => Some(input.try_clone().map_err(|error| failed(&error))?),
        (_, output) => output,
    };
    let request = VcpuRequest::AttachSerial {
        input: input.map(ChardevFd::new),
        output: output.map(ChardevFd::new),
        datagrams,
    };
    vm.vcpu()
        .map_err(|error| failed(&error))?
        .ask(request)
        .await
        .map(drop)
        .map_err(|error| failed(&error))
}
