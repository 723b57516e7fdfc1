//! The opener process: it takes requests for sockets and hands the sockets over. A loop around [`super::sockets`].

use super::sockets::{self, Connecting, Progress};
use crate::launcher::sys;
use crate::sandbox::own;
use ipc::opener::{FromOpener, OpenError, OpenStep, ToOpener};
use ipc::{Channel, IpcError, RequestId};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, setrlimit};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Instant;

/// The opener's word that it is sealed.
pub const READY: u8 = b'S';
/// Connections under way at a time.
const MAX_CONNECTING: usize = 64;
/// Descriptors: the standard three, the channel, connections under way, and those of one request.
const MAX_FILES: u64 = 96;

type Requests = Channel<FromOpener, ToOpener>;

/// Runs in the forked process and never returns.
pub fn main(channel: OwnedFd, mode: policies::Mode) -> ! {
    let status = match confine(channel, mode) {
        Ok(requests) => {
            serve(requests);
            0
        }
        Err((what, error)) => {
            // The supervisor sees the channel close; this line says why.
            let mut line = [0u8; 200];
            let mut rest = &mut line[..];
            let _ = writeln!(rest, "bulkhead: the opener cannot start: {what}: {error}");
            let length = 200 - rest.len();
            let _ = nix::unistd::write(std::io::stderr(), &line[..length]);
            1
        }
    };
    // SAFETY: ends the process without running the supervisor's exit handlers.
    unsafe { libc::_exit(status) }
}

fn confine(channel: OwnedFd, mode: policies::Mode) -> Result<Requests, (&'static str, String)> {
    fn at<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> (&'static str, String) {
        move |error| (what, error.to_string())
    }
    // Away from the terminal's process group: ^C is the supervisor's business.
    nix::unistd::setsid().map_err(at("setsid"))?;
    nix::sys::prctl::set_name(c"opener").map_err(at("PR_SET_NAME"))?;
    sys::die_with_parent().map_err(at("PR_SET_PDEATHSIG"))?;
    nix::sys::prctl::set_dumpable(false).map_err(at("PR_SET_DUMPABLE"))?;
    // Everything but the channel goes: the launcher's, what the command line names, what was inherited.
    let number = channel.as_raw_fd() as u32;
    if number > 3 {
        sys::close_range(3, number - 1).map_err(at("close_range"))?;
    }
    sys::close_range(number + 1, u32::MAX).map_err(at("close_range"))?;
    for (resource, limit) in [
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_FSIZE, 0),
        (Resource::RLIMIT_NOFILE, MAX_FILES),
    ] {
        setrlimit(resource, limit, limit).map_err(at("setrlimit"))?;
    }
    fcntl(&channel, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(at("channel"))?;
    let requests = Channel::new(channel);
    sys::detach_standard_files().map_err(at("/dev/null"))?;
    own::seal_opener(mode).map_err(at("sealing"))?;
    sys::send(requests.as_fd(), &[READY], None).map_err(at("channel"))?;
    Ok(requests)
}

/// Ends when the supervisor hangs up, or sends what is no request.
fn serve(mut requests: Requests) {
    let mut under_way: Vec<(RequestId, Connecting)> = Vec::new();
    loop {
        let Ok(ready) = wait(&requests, &under_way) else {
            return;
        };
        let now = Instant::now();
        let mut still = Vec::new();
        for (place, (id, connecting)) in under_way.into_iter().enumerate() {
            let progress = if ready.get(place + 1) == Some(&true) {
                connecting.ready()
            } else if connecting.deadline <= now {
                Err(connecting.timed_out())
            } else {
                Ok(Progress::Connecting(connecting))
            };
            if !go_on(&mut requests, &mut still, id, progress) {
                return;
            }
        }
        under_way = still;
        if ready.first() == Some(&true) && !take_requests(&mut requests, &mut under_way) {
            return;
        }
    }
}

/// Waits; says of the channel and of every connection whether it is ready.
fn wait(requests: &Requests, under_way: &[(RequestId, Connecting)]) -> Result<Vec<bool>, Errno> {
    let writable = if requests.wants_write() {
        PollFlags::POLLOUT
    } else {
        PollFlags::empty()
    };
    let mut fds = vec![PollFd::new(requests.as_fd(), PollFlags::POLLIN | writable)];
    let connections = under_way.iter();
    fds.extend(connections.map(|(_, connecting)| PollFd::new(connecting.as_fd(), PollFlags::POLLOUT)));
    let next = under_way.iter().map(|(_, connecting)| connecting.deadline).min();
    let left = next.map(|next| next.saturating_duration_since(Instant::now()));
    let timeout = left.map_or(PollTimeout::NONE, |left| {
        // Rounded up, so that the deadline has passed when the wait is over.
        PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
    });
    match poll(&mut fds, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno),
    }
    Ok(fds.iter().map(|fd| fd.any().unwrap_or(false)).collect())
}

/// Reads the requests that have arrived. `false` at the end.
fn take_requests(requests: &mut Requests, under_way: &mut Vec<(RequestId, Connecting)>) -> bool {
    match requests.flush() {
        Ok(()) | Err(IpcError::WouldBlock) => {}
        Err(_) => return false,
    }
    loop {
        let request = match requests.recv() {
            Ok(request) => request,
            Err(IpcError::WouldBlock) => return true,
            Err(_) => return false,
        };
        let progress = sockets::begin(request.body).and_then(|progress| match progress {
            Progress::Connecting(_) if under_way.len() >= MAX_CONNECTING => Err(OpenError {
                step: OpenStep::Opener,
                errno: Errno::EAGAIN as i32,
            }),
            progress => Ok(progress),
        });
        if !go_on(requests, under_way, request.id, progress) {
            return false;
        }
    }
}

/// Answers, or keeps what is still under way. `false` when the supervisor is gone.
fn go_on(
    requests: &mut Requests,
    under_way: &mut Vec<(RequestId, Connecting)>,
    id: RequestId,
    progress: Result<Progress, OpenError>,
) -> bool {
    let result = match progress {
        Ok(Progress::Connecting(connecting)) => {
            under_way.push((id, connecting));
            return true;
        }
        Ok(Progress::Open(opened)) => Ok(opened),
        Err(error) => Err(error),
    };
    requests.send(FromOpener { id, result }).is_ok()
}
