//! `chardev-add` and `chardev-change`: from what a client asks for to a device in the table.

use super::super::serial;
use super::{
    ChardevNumber, Chardevs, Error, Frontend, Held, MAX_DEVICES, MAX_LABEL_BYTES, MAX_RING_BYTES, Vm, for_frontend,
    open,
};
use crate::chardev::socket::{Plan, udp_device, udp_request};
use crate::chardev::{self, Name, Opened, RawTerminal, SocketFailure, ring};
use crate::config::{self, CharBackend, Families, SocketAddress, SocketRole};
use ipc::chardev::{Address, Backend, ChardevReturn, File, Inet, Pipe, Ringbuf, Socket, Stdio, Udp, Unix};
use ipc::opener::{OpenRequest, TcpOptions};
use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

/// What a device is made from.
enum Wanted {
    /// Something that the supervisor opens by itself.
    File(CharBackend),
    /// Standard input and output; `signals`: ^C keeps its meaning.
    Terminal { signals: bool },
    /// A socket, and whether the command waits for its first client.
    Socket {
        plan: Plan,
        request: Option<OpenRequest>,
        wait: bool,
    },
    /// A socket for datagrams.
    Udp { place: String, request: OpenRequest },
}

/// A label that is taken although its device is not there yet.
struct Reservation<'a> {
    chardevs: &'a Chardevs,
    label: String,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut reserved = self.chardevs.reserved.borrow_mut();
        if let Some(place) = reserved.iter().position(|label| *label == self.label) {
            reserved.swap_remove(place);
        }
    }
}

/// `chardev-add`.
///
/// # Errors
/// [`Error`].
pub async fn add(vm: &Vm, id: String, backend: Backend) -> Result<ChardevReturn, Error> {
    let reservation = vm.chardevs.reserve(&id)?;
    let failed = |problem: String| Error::Add(id.clone(), problem);
    let wanted = wanted(vm, backend).map_err(failed)?;
    let wait = matches!(wanted, Wanted::Socket { wait: true, .. });
    let (held, opened) = make(vm, wanted).await.map_err(failed)?;
    let pty = pty(&opened.name);
    drop(reservation);
    let number = match held {
        Some(held) => vm.chardevs.push(&id, opened.name, Frontend::None, held),
        None => vm.chardevs.keep(&id, opened),
    };
    if wait && !first_client(vm, number).await {
        return Err(failed("it was removed before a client connected".into()));
    }
    Ok(ChardevReturn { pty })
}

/// `chardev-change`: another device takes the place of the one with this label, and its user, if it has one, goes on with
/// that. What cannot be made leaves a device in use as it is.
///
/// # Errors
/// [`Error`].
pub async fn change(vm: &Vm, id: String, backend: Backend) -> Result<ChardevReturn, Error> {
    let turn = vm.chardevs.change.enter().await;
    let frontend = {
        let entries = vm.chardevs.entries.borrow();
        let entry = entries.iter().find(|entry| entry.label == id);
        entry.map(|entry| entry.frontend)
    };
    match frontend {
        None => return Err(Error::Missing(id)),
        Some(Frontend::Monitor(_) | Frontend::Qtest) => return Err(Error::Hotswap),
        Some(Frontend::None) => {
            vm.chardevs.remove(id.clone())?;
            drop(turn);
            return add(vm, id, backend).await;
        }
        // Nobody can remove it now: it is in use.
        Some(Frontend::Serial) => {}
    }
    let wanted = wanted(vm, backend).map_err(Error::Change)?;
    let wait = matches!(wanted, Wanted::Socket { wait: true, .. });
    let (held, opened) = make(vm, wanted).await.map_err(Error::Change)?;
    let Opened { device, name } = opened;
    let pty = pty(&name);
    let (kept, device) = match held {
        // What the serial port gets of the terminal is a copy.
        Some(Held::Terminal(streams, terminal)) => {
            let copy = streams.try_clone().map_err(|error| Error::Change(error.to_string()))?;
            (Held::Terminal(streams, terminal), chardev::Chardev::Connected(copy))
        }
        Some(held) => (held, device),
        None => for_frontend(device).map_err(|errno| Error::Change(errno.desc().to_owned()))?,
    };
    serial::exchange(vm, device).await.map_err(Error::Change)?;
    if let Some(entry) = vm
        .chardevs
        .entries
        .borrow_mut()
        .iter_mut()
        .find(|entry| entry.label == id)
    {
        entry.name = name;
        entry.held = kept;
    }
    drop(turn);
    if wait {
        serial::first_client(vm).await;
    }
    Ok(ChardevReturn { pty })
}

fn pty(name: &Name) -> Option<String> {
    match name {
        Name::Pty(path) => Some(path.display().to_string()),
        Name::Plain(_) | Name::Socket(_) => None,
    }
}

/// Waits for the first client. `false` when the device is removed meanwhile.
async fn first_client(vm: &Vm, number: ChardevNumber) -> bool {
    poll_fn(|_| {
        let entries = vm.chardevs.entries.borrow();
        let entry = entries.iter().find(|entry| entry.number == number);
        match entry.map(|entry| &entry.held) {
            Some(Held::Socket { client: None, .. }) if vm.outcome.get().is_none() => Poll::Pending,
            Some(_) => Poll::Ready(true),
            None => Poll::Ready(false),
        }
    })
    .await
}

/// What is asked for, checked.
fn wanted(vm: &Vm, backend: Backend) -> Result<Wanted, String> {
    Ok(Wanted::File(match backend {
        Backend::Null(_) => CharBackend::Null,
        Backend::Pty(_) => CharBackend::Pty,
        Backend::File(File { input, output, append }) => CharBackend::File {
            path: output.into(),
            input: input.map(Into::into),
            append: append.unwrap_or(false),
        },
        Backend::Pipe(Pipe { device }) => CharBackend::Pipe(device.into()),
        Backend::Ringbuf(Ringbuf { size }) => CharBackend::Ring(match size {
            Some(size) => ring::check_size(u64::try_from(size).unwrap_or(0))?,
            None => ring::DEFAULT_BYTES,
        }),
        Backend::Stdio(Stdio { signal }) => {
            return Ok(Wanted::Terminal {
                signals: signal.unwrap_or(true),
            });
        }
        Backend::Socket(socket) => return wanted_socket(vm, socket),
        Backend::Udp(Udp { remote, local }) => {
            let unsupported = |_| "socket type unsupported for datagram".to_owned();
            let remote = inet(remote).map_err(unsupported)?.map(|(inet, _)| inet)?;
            let local = local.map(|local| inet(local).map_err(unsupported)?.map(|(inet, _)| inet));
            let request = udp_request(&remote, local.transpose()?.as_ref()).map_err(|error| error.to_string())?;
            return Ok(Wanted::Udp {
                place: remote.to_string(),
                request,
            });
        }
    }))
}

fn wanted_socket(vm: &Vm, socket: Socket) -> Result<Wanted, String> {
    let Socket {
        addr,
        server,
        wait,
        nodelay,
        telnet,
        reconnect,
        reconnect_ms,
    } = socket;
    let is_server = server.unwrap_or(true);
    let incompatible = |option: &str, with: &str| Err(format!("'{option}' option is incompatible with {with}"));
    for (option, is_given) in [
        ("reconnect", reconnect.is_some()),
        ("reconnect-ms", reconnect_ms.is_some()),
    ] {
        if is_given && matches!(addr, Address::Fd(_)) {
            return incompatible(option, "'fd' address type");
        }
        if is_given && is_server {
            return incompatible(option, "socket in server listen mode");
        }
    }
    if reconnect.is_some() && reconnect_ms.is_some() {
        return Err("'reconnect' and 'reconnect-ms' are mutually exclusive".into());
    }
    if !is_server && wait.is_some() {
        return incompatible("wait", "socket in client connect mode");
    }
    if telnet == Some(true) {
        return Err("the bytes go over the socket as they are: 'telnet' can only be false".into());
    }
    let ms = reconnect.map(|seconds| seconds.saturating_mul(1000)).or(reconnect_ms);
    let ms = ms.and_then(|ms| u64::try_from(ms).ok()).filter(|ms| *ms > 0);
    let role = if is_server {
        SocketRole::Server { wait: false }
    } else {
        SocketRole::Client {
            // An instant so far away can still be reckoned with.
            reconnect: ms.map(|ms| Duration::from_millis(ms.min(u32::MAX.into()))),
        }
    };
    let mut options = TcpOptions {
        no_delay: nodelay.unwrap_or(false),
        keep_alive: false,
    };
    let wait = is_server && wait.unwrap_or(false);
    let address = match addr {
        Address::Fd(ipc::chardev::Fd { name }) => {
            let fd = vm.fds.borrow_mut().take(&name).map_err(|error| error.to_string())?;
            let plan = Plan::passed(&name, role);
            let request = OpenRequest::Adopt { fd, listen: is_server };
            return Ok(Wanted::Socket {
                plan,
                request: Some(request),
                wait,
            });
        }
        Address::Unix(Unix { path }) => SocketAddress::Unix(path.into()),
        inet_address => {
            let (inet, keep_alive) = inet(inet_address).map_err(|_| "this address is of no use".to_owned())??;
            options.keep_alive = keep_alive;
            SocketAddress::Inet(inet)
        }
    };
    let plan = Plan::new(&config::Socket { address, role, options });
    // One that connects again and again begins when it is in the table.
    let request = match role {
        SocketRole::Client { reconnect: Some(_) } => None,
        _ => Some(plan.request().map_err(|error| error.to_string())?),
    };
    Ok(Wanted::Socket { plan, request, wait })
}

/// An address of TCP or UDP, and whether silent peers are asked. The outer error is an address of another kind.
pub fn inet(address: Address) -> Result<Result<(config::Inet, bool), String>, Address> {
    let Address::Inet(Inet {
        host,
        port,
        numeric,
        to,
        ipv4,
        ipv6,
        keep_alive,
    }) = address
    else {
        return Err(address);
    };
    let number = if port.is_empty() {
        Some(0)
    } else {
        port.parse::<u16>().ok()
    };
    let (Some(port), Some(families)) = (number, Families::new(ipv4, ipv6)) else {
        return Ok(Err(if number.is_none() {
            format!("address resolution failed for {host}:{port}: Servname not supported for ai_socktype")
        } else {
            "Cannot disable IPv4 and IPv6 at same time".into()
        }));
    };
    let inet = config::Inet {
        last_port: to.unwrap_or(port),
        families,
        numeric: numeric.unwrap_or(false),
        ..config::Inet::new(&host, port)
    };
    Ok(Ok((inet, keep_alive.unwrap_or(false))))
}

/// Makes it. What the table would not make of it by itself comes as [`Held`].
async fn make(vm: &Vm, wanted: Wanted) -> Result<(Option<Held>, Opened), String> {
    let text = |error: SocketFailure| error.to_string();
    match wanted {
        Wanted::File(backend) => {
            if let CharBackend::Ring(size) = backend
                && vm.chardevs.ring_bytes() + size > MAX_RING_BYTES
            {
                return Err(format!(
                    "all ringbuf chardevs together have at most {MAX_RING_BYTES} bytes"
                ));
            }
            let opened = chardev::open_file(&backend).map_err(|error| error.to_string())?;
            Ok((None, opened))
        }
        Wanted::Terminal { signals } => terminal(vm, signals),
        Wanted::Socket { plan, request, .. } => {
            if let Some(opened) = plan.dialer() {
                return Ok((None, opened));
            }
            let request = match request {
                Some(request) => request,
                None => plan.request().map_err(text)?,
            };
            let socket = open(vm, request).await.map_err(|error| text(plan.failure(error)))?;
            plan.finish(socket).map(|opened| (None, opened)).map_err(text)
        }
        Wanted::Udp { place, request } => {
            let socket = open(vm, request).await;
            let socket = socket.map_err(|error| text(SocketFailure::new(&place, false, error)))?;
            Ok((None, udp_device(socket)))
        }
    }
}

/// Standard input and output have one user, and a daemon has none.
fn terminal(vm: &Vm, signals: bool) -> Result<(Option<Held>, Opened), String> {
    if vm.config.daemonize {
        return Err("cannot use stdio with -daemonize".into());
    }
    let in_use = vm
        .chardevs
        .entries
        .borrow()
        .iter()
        .any(|entry| matches!(*entry.name, Name::Plain("stdio")));
    if in_use {
        return Err("cannot use stdio by multiple character devices".into());
    }
    let opened = chardev::open_file(&CharBackend::Stdio).map_err(|error| error.to_string())?;
    let Opened {
        device: chardev::Chardev::Connected(streams),
        name,
    } = opened
    else {
        return Err("standard input and output cannot be used".into());
    };
    let held = Held::Terminal(streams, RawTerminal::enter(signals));
    let opened = Opened {
        device: chardev::Chardev::Null,
        name,
    };
    Ok((Some(held), opened))
}

impl Chardevs {
    fn reserve(&self, id: &str) -> Result<Reservation<'_>, Error> {
        if id.is_empty() || id.len() > MAX_LABEL_BYTES {
            return Err(Error::Label);
        }
        let (entries, mut reserved) = (self.entries.borrow(), self.reserved.borrow_mut());
        let is_taken = entries.iter().any(|entry| entry.label == id) || reserved.iter().any(|label| label == id);
        if is_taken {
            return Err(Error::Exists(id.to_owned()));
        }
        if entries.len() + reserved.len() >= MAX_DEVICES {
            let problem = format!("there are {MAX_DEVICES} already: remove some");
            return Err(Error::Add(id.to_owned(), problem));
        }
        reserved.push(id.to_owned());
        Ok(Reservation {
            chardevs: self,
            label: id.to_owned(),
        })
    }
}
