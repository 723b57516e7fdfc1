//! The warden process: waits for scrapes and for the supervisor's end, then clears up.

use super::{Charge, SocketFile, identity};
use crate::hosting::cgroup::{Cgroups, Made};
use crate::hosting::metrics::{self, Meter, NEWS_BYTES, News};
use crate::launcher::sys;
use crate::sandbox::own;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{SockFlag, accept4};
use nix::sys::stat::fstatat;
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// The warden's word that it is sealed.
pub const READY: u8 = b'W';
/// Connections at a time; who comes then waits.
const MAX_CLIENTS: usize = 8;
/// How long one may take to ask and to read the answer.
const CLIENT_TIME: Duration = Duration::from_secs(5);
/// More than a scraper's request has.
const REQUEST_BYTES: usize = 4096;
/// How long processes of the machine may take to be gone.
const CLEARING_TIME: Duration = Duration::from_secs(60);
/// How long it is waited before a group that still has processes is tried again.
const AGAIN_MS: u16 = 5;

struct Client {
    fd: OwnedFd,
    since: Instant,
    asked: Vec<u8>,
    /// What is still to be written.
    answer: Option<Vec<u8>>,
}

struct Warden {
    channel: OwnedFd,
    listener: Option<OwnedFd>,
    name: String,
    meters: Vec<Meter>,
    news: News,
    since: Instant,
    clients: Vec<Client>,
}

/// Runs in the forked process and never returns.
pub fn main(channel: OwnedFd, charge: Charge) -> ! {
    let Charge {
        name,
        listener,
        sockets,
        cgroups,
        mode,
    } = charge;
    let Cgroups { made, meters, .. } = cgroups;
    let status = match confine(&channel, listener.as_ref(), &sockets, &made, &meters, mode) {
        Ok(()) => {
            let warden = Warden {
                channel,
                listener,
                name,
                meters,
                news: News::default(),
                since: Instant::now(),
                clients: Vec::new(),
            };
            warden.serve();
            clear(&sockets, made);
            0
        }
        Err((what, error)) => {
            // The supervisor sees the channel close; this line says why.
            let mut line = [0u8; 200];
            let mut rest = &mut line[..];
            let _ = writeln!(rest, "bulkhead: the warden cannot start: {what}: {error}");
            let length = 200 - rest.len();
            let _ = nix::unistd::write(std::io::stderr(), &line[..length]);
            1
        }
    };
    // SAFETY: ends the process without running the supervisor's exit handlers.
    unsafe { libc::_exit(status) }
}

fn confine(
    channel: &OwnedFd,
    listener: Option<&OwnedFd>,
    sockets: &[SocketFile],
    made: &[Made],
    meters: &[Meter],
    mode: policies::Mode,
) -> Result<(), (&'static str, String)> {
    fn at<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> (&'static str, String) {
        move |error| (what, error.to_string())
    }
    // Away from the terminal's process group: ^C is the supervisor's business. There is no death signal: it outlives.
    nix::unistd::setsid().map_err(at("setsid"))?;
    nix::sys::prctl::set_name(c"warden").map_err(at("PR_SET_NAME"))?;
    nix::sys::prctl::set_dumpable(false).map_err(at("PR_SET_DUMPABLE"))?;
    nix::unistd::chdir(c"/").map_err(at("chdir"))?;
    let directories = sockets.iter().map(|socket| &socket.directory);
    let directories: Vec<_> = directories.chain(made.iter().map(|made| &made.parent)).collect();
    let files = meters.iter().map(|meter| &meter.file);
    let kept = directories
        .iter()
        .copied()
        .chain(files)
        .chain(listener)
        .chain([channel]);
    let mut kept: Vec<u32> = kept.map(|fd| fd.as_raw_fd() as u32).collect();
    kept.sort_unstable();
    let mut next = 3;
    for fd in kept {
        if fd > next {
            sys::close_range(next, fd - 1).map_err(at("close_range"))?;
        }
        next = next.max(fd + 1);
    }
    sys::close_range(next, u32::MAX).map_err(at("close_range"))?;
    // What is open, and the clients.
    let files = u64::from(next) + MAX_CLIENTS as u64 + 1;
    for (resource, limit) in [
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_FSIZE, 0),
        (Resource::RLIMIT_NOFILE, files.max(64)),
    ] {
        setrlimit(resource, limit, limit).map_err(at("setrlimit"))?;
    }
    sys::detach_standard_files().map_err(at("/dev/null"))?;
    own::seal_warden(mode, &directories).map_err(at("sealing"))?;
    sys::send(channel.as_fd(), &[READY], None).map_err(at("channel"))?;
    Ok(())
}

impl Warden {
    /// Until the supervisor is gone.
    fn serve(mut self) {
        loop {
            let mut fds = vec![PollFd::new(self.channel.as_fd(), PollFlags::POLLIN)];
            for client in &self.clients {
                let wanted = if client.answer.is_some() {
                    PollFlags::POLLOUT
                } else {
                    PollFlags::POLLIN
                };
                fds.push(PollFd::new(client.fd.as_fd(), wanted));
            }
            let accepts = self.clients.len() < MAX_CLIENTS;
            let listener = self.listener.as_ref().filter(|_| accepts);
            fds.extend(listener.map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN)));
            let oldest = self.clients.iter().map(|client| client.since + CLIENT_TIME).min();
            let left = oldest.map(|end| end.saturating_duration_since(Instant::now()));
            let timeout = left.map_or(PollTimeout::NONE, |left| {
                PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
            });
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
            if ready[0] && !self.hear() {
                return;
            }
            let clients = std::mem::take(&mut self.clients);
            let count = clients.len();
            for (mut client, ready) in clients.into_iter().zip(&ready[1..]) {
                let goes_on = if *ready {
                    self.go_on(&mut client)
                } else {
                    client.since.elapsed() < CLIENT_TIME
                };
                if goes_on {
                    self.clients.push(client);
                }
            }
            if ready.get(1 + count) == Some(&true) {
                self.accept();
            }
        }
    }

    /// Takes one packet of the supervisor's; `false` when it is gone or says what it cannot.
    fn hear(&mut self) -> bool {
        let mut packet = [0; NEWS_BYTES];
        match sys::receive(self.channel.as_fd(), &mut packet, &mut [None, None]) {
            Ok(NEWS_BYTES) => {
                self.news = News::decode(&packet);
                true
            }
            Err(Errno::EINTR | Errno::EAGAIN) => true,
            _ => false,
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let Ok(fd) = accept4(listener.as_raw_fd(), flags) else {
            return;
        };
        self.clients.push(Client {
            // SAFETY: it was just made, for nobody else.
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
            since: Instant::now(),
            asked: Vec::new(),
            answer: None,
        });
    }

    /// Reads or writes what there is; `false` when the client is done or no use.
    fn go_on(&self, client: &mut Client) -> bool {
        let Some(answer) = &mut client.answer else {
            let mut bytes = [0; REQUEST_BYTES];
            match nix::unistd::read(&client.fd, &mut bytes) {
                Ok(0) => return false,
                Ok(length) => client.asked.extend_from_slice(&bytes[..length]),
                Err(Errno::EAGAIN | Errno::EINTR) => return true,
                Err(_) => return false,
            }
            if ends(&client.asked) {
                let page = || metrics::page(&self.name, self.since.elapsed(), &self.news, &self.meters);
                client.answer = Some(answer(&client.asked, page));
            }
            return client.asked.len() <= REQUEST_BYTES;
        };
        match nix::unistd::write(&client.fd, answer) {
            Ok(length) => {
                answer.drain(..length);
                !answer.is_empty()
            }
            Err(Errno::EAGAIN | Errno::EINTR) => true,
            Err(_) => false,
        }
    }
}

/// Whether the head of a request is whole.
fn ends(asked: &[u8]) -> bool {
    asked.windows(4).any(|bytes| bytes == b"\r\n\r\n") || asked.windows(2).any(|bytes| bytes == b"\n\n")
}

/// The answer to a request, of which the first words count.
fn answer(asked: &[u8], page: impl FnOnce() -> String) -> Vec<u8> {
    let mut words = asked.split(|byte| b" \r\n".contains(byte));
    let (status, body) = match (words.next(), words.next()) {
        (Some(b"GET"), Some(b"/metrics" | b"/")) => ("200 OK", page()),
        (Some(b"GET"), _) => ("404 Not Found", "there is /metrics\n".to_owned()),
        _ => ("405 Method Not Allowed", "there is GET\n".to_owned()),
    };
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let length = body.len();
    format!("HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}")
        .into_bytes()
}

/// Removes socket files that are still the machine's, and its groups as soon as nobody is in them.
fn clear(sockets: &[SocketFile], mut made: Vec<Made>) {
    for socket in sockets {
        let name = socket.name.as_os_str();
        let found = fstatat(&socket.directory, name, AtFlags::AT_SYMLINK_NOFOLLOW);
        if found.is_ok_and(|found| identity(&found) == socket.identity) {
            let _ = unlinkat(&socket.directory, name, UnlinkatFlags::NoRemoveDir);
        }
    }
    let start = Instant::now();
    loop {
        made.retain(|made| {
            matches!(
                unlinkat(&made.parent, made.name.as_str(), UnlinkatFlags::RemoveDir),
                Err(Errno::EBUSY | Errno::ENOTEMPTY | Errno::EINTR)
            )
        });
        if made.is_empty() || start.elapsed() > CLEARING_TIME {
            return;
        }
        let _ = poll(&mut [], PollTimeout::from(AGAIN_MS));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_is_all_that_is_looked_at() {
        let of = |asked: &[u8]| String::from_utf8(answer(asked, || "page\n".into())).unwrap();
        assert!(of(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").starts_with("HTTP/1.0 200 OK\r\n"));
        assert!(of(b"GET /metrics HTTP/1.1\r\n\r\n").ends_with("Content-Length: 5\r\nConnection: close\r\n\r\npage\n"));
        assert!(of(b"GET /etc/passwd HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 404 "));
        assert!(of(b"POST /metrics HTTP/1.0\r\n\r\n").starts_with("HTTP/1.0 405 "));
        assert!(of(b"\r\n\r\n").starts_with("HTTP/1.0 405 "));
        assert!(of(&[0xff; 300]).starts_with("HTTP/1.0 405 "));
        assert!(ends(b"GET / HTTP/1.0\n\n") && !ends(b"GET / HTTP/1.0\r\n"));
    }
}
