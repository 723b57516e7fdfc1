//! Log lines on standard error: `bulkhead: VM: role[pid]: text`.
//!
//! A helper's text is untrusted: it is one line, bounded, with control characters made visible.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fmt::Display;
use std::os::fd::AsFd;
use std::sync::OnceLock;

struct Prefix {
    vm_name: Option<String>,
    pid: u32,
}

static PREFIX: OnceLock<Prefix> = OnceLock::new();

/// Sets the VM's name for all later lines. Call it in the process that stays (the pid is read once, here).
pub fn init(vm_name: Option<&str>) {
    let _ = PREFIX.set(Prefix {
        vm_name: vm_name.map(str::to_owned),
        pid: std::process::id(),
    });
}

/// A line about the supervisor's own doing.
pub fn line(text: impl Display) {
    write(&format!(
        "bulkhead[{}]: {text}",
        PREFIX.get().map_or(0, |prefix| prefix.pid)
    ));
}

/// A line about a helper.
pub fn helper(role: impl Display, pid: i32, text: impl Display) {
    write(&format!("{role}[{pid}]: {text}"));
}

/// What a helper wrote, made safe to print.
pub fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .trim_end()
        .chars()
        .flat_map(|c| {
            if c.is_control() {
                c.escape_default().collect()
            } else {
                vec![c]
            }
        })
        .collect()
}

/// A helper's text of any length, made safe to print and not longer than a line.
pub fn brief(text: &str) -> String {
    let end = text.floor_char_boundary(text.len().min(ipc::helper::MAX_LOG_LINE_BYTES));
    printable(&text.as_bytes()[..end])
}

/// Writes to standard output what a command prints there for QEMU's sake. Nobody has to read it: what does not fit is lost,
/// so that nobody can hold up this process by not reading.
pub fn print(text: &str) {
    use std::io::Write;
    let output = std::io::stdout();
    let mut fds = [PollFd::new(output.as_fd(), PollFlags::POLLOUT)];
    // A pipe that takes anything takes this much.
    if text.len() <= libc::PIPE_BUF && poll(&mut fds, PollTimeout::ZERO) == Ok(1) {
        let mut output = output.lock();
        let _ = output.write_all(text.as_bytes()).and_then(|()| output.flush());
    }
}

fn write(text: &str) {
    use std::io::Write;
    let name = PREFIX.get().and_then(|prefix| prefix.vm_name.as_deref()).unwrap_or("");
    let separator = if name.is_empty() { "" } else { ": " };
    let mut line = format!("{name}{separator}{text}");
    line.truncate(line.floor_char_boundary(line.len().min(libc::PIPE_BUF - 1)));
    line.push('\n');
    let output = std::io::stderr();
    let mut fds = [PollFd::new(output.as_fd(), PollFlags::POLLOUT)];
    // Whoever reads the log and has stopped reading it stops no machine: a helper could fill it. A pipe that takes anything
    // takes a line of this length. One write, so that lines of several VMs on one terminal stay whole.
    if poll(&mut fds, PollTimeout::ZERO) == Ok(1) {
        let _ = output.lock().write_all(line.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable(b"a\x1b[31mb\nc\xff\n"), "a\\u{1b}[31mb\\nc\u{fffd}");
    }
}
