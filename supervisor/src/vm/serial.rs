//! The serial port's backend: the supervisor accepts and has connections made, vcpu-proc holds the connected fd.

use super::Vm;
use super::chardevs::dial;
use crate::chardev::{Chardev, Source, Streams};
use crate::logging;
use crate::sys::Poller;
use ipc::caps::ChardevFd;
use ipc::vcpu::VcpuRequest;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::task::Poll;
use std::time::Instant;

/// The backend.
pub struct Serial {
    /// Where clients, or connections, come from.
    source: RefCell<Rc<Source>>,
    /// The streams of a backend that is connected from the start, until they are handed over.
    fixed: RefCell<Option<Streams>>,
    /// The far side of a pty.
    keep: RefCell<Option<OwnedFd>>,
    connected: Cell<bool>,
    running: Cell<bool>,
    /// How often the backend was exchanged: a connection of an earlier one comes to nothing.
    generation: Cell<u64>,
}

/// Where connections come from, and the one that is there from the start.
fn take_apart(device: Chardev) -> (Source, Option<Streams>) {
    match device {
        // A ring buffer is given as the socket that feeds it.
        Chardev::Null | Chardev::Ring(_) => (Source::Spent, None),
        Chardev::Connected(streams) => (Source::Spent, Some(streams)),
        Chardev::Listening(listener) => (Source::Listening(listener), None),
        Chardev::Dialing(dialer) => (Source::Dialing(dialer), None),
    }
}

impl Serial {
    /// On an open character device.
    pub fn new(device: Chardev) -> Self {
        let (source, fixed) = take_apart(device);
        Self {
            source: RefCell::new(Rc::new(source)),
            fixed: RefCell::new(fixed),
            keep: RefCell::new(None),
            connected: Cell::new(false),
            running: Cell::new(false),
            generation: Cell::new(0),
        }
    }

    fn source(&self) -> Rc<Source> {
        Rc::clone(&self.source.borrow())
    }

    /// Watches for a client while there is none.
    pub fn watch<T>(&self, poller: &mut Poller<T>, token: T) {
        if let Source::Listening(listener) = &**self.source.borrow()
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
        self.source().closed();
    }

    /// When it is to connect.
    pub fn due(&self) -> Option<Instant> {
        self.source().due().filter(|_| self.running.get())
    }
}

/// Hands over what is connected from the start, and begins to accept clients.
pub async fn attach(vm: &Vm) -> Result<(), String> {
    let streams = vm.serial.fixed.take();
    vm.serial.running.set(true);
    match streams {
        Some(streams) => hand_over_fixed(vm, streams).await,
        None => Ok(()),
    }
}

async fn hand_over_fixed(vm: &Vm, mut streams: Streams) -> Result<(), String> {
    vm.serial.keep.replace(streams.keep.take());
    vm.serial.connected.set(true);
    hand_over(vm, streams).await
}

/// Puts another device in the place of the backend. What the guest has written and the former peer has not taken is lost.
pub async fn exchange(vm: &Vm, device: Chardev) -> Result<(), String> {
    let (source, fixed) = take_apart(device);
    // No more clients of the former one; those on their way find that they are late.
    drop(vm.serial.source.replace(Rc::new(Source::Spent)));
    vm.serial.generation.set(vm.serial.generation.get() + 1);
    if !vm.serial.running.get() {
        // Without a guest nobody speaks.
        vm.serial.source.replace(Rc::new(source));
        vm.serial.fixed.replace(fixed);
        return Ok(());
    }
    // When this is answered, nothing more will be heard of the former peer.
    hand_over(vm, Streams::default()).await?;
    vm.serial.connected.set(false);
    drop(vm.serial.keep.take());
    vm.serial.source.replace(Rc::new(source));
    match fixed {
        Some(streams) => hand_over_fixed(vm, streams).await,
        None => Ok(()),
    }
}

/// Waits until a client is connected, or the machine ends.
pub async fn first_client(vm: &Vm) {
    poll_fn(|_| {
        if vm.serial.is_connected() || vm.outcome.get().is_some() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

/// A client has connected.
pub fn accept(vm: &Rc<Vm>) {
    if let Source::Listening(listener) = &*vm.serial.source()
        && let Some(client) = listener.accept()
    {
        connected(vm, client);
    }
}

fn connected(vm: &Rc<Vm>, client: OwnedFd) {
    vm.serial.connected.set(true);
    let generation = vm.serial.generation.get();
    let vm = Rc::clone(vm);
    let executor = Rc::clone(&vm);
    executor.executor.spawn(async move {
        if vm.serial.generation.get() == generation
            && let Err(error) = hand_over(&vm, Streams::both_ways(client)).await
        {
            logging::line(error);
            vm.serial.closed();
        }
    });
}

/// Connects, if it is time to.
pub fn connect(vm: &Rc<Vm>, now: Instant) {
    let source = vm.serial.source();
    let is_due = matches!(&*source, Source::Dialing(dialer) if vm.serial.running.get() && dialer.take_due(now));
    if !is_due {
        return;
    }
    let generation = vm.serial.generation.get();
    let vm = Rc::clone(vm);
    let executor = Rc::clone(&vm);
    executor.executor.spawn(async move {
        if let Source::Dialing(dialer) = &*source
            && let Some(connection) = dial(&vm, &vm.config.serial_label, dialer).await
            && vm.serial.generation.get() == generation
        {
            connected(&vm, connection);
        }
    });
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
