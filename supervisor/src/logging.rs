//! Log lines on standard error: `bulkhead: VM: role[pid]: text`, or the same as fields: a JSON object on a line, or an entry of
//! systemd's journal.
//!
//! A helper's text is untrusted: it is one line, bounded, with control characters made visible.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fmt::Display;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

struct Prefix {
    vm_name: Option<String>,
    pid: u32,
    output: Output,
}

/// `--log-format`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// One object on a line.
    Json,
    /// To the journal's socket at this path, by its own protocol.
    Journal(PathBuf),
}

enum Output {
    Text,
    Json,
    Journal(UnixDatagram),
}

static PREFIX: OnceLock<Prefix> = OnceLock::new();

/// Sets the VM's name for all later lines. Call it in the process that stays (the pid is read once, here).
///
/// # Errors
/// When the journal is not where it should be.
pub fn init(vm_name: Option<&str>, format: &Format) -> std::io::Result<()> {
    let output = match format {
        Format::Text => Output::Text,
        Format::Json => Output::Json,
        Format::Journal(path) => {
            let socket = UnixDatagram::unbound()?;
            socket.connect(path)?;
            socket.set_nonblocking(true)?;
            Output::Journal(socket)
        }
    };
    let _ = PREFIX.set(Prefix {
        vm_name: vm_name.map(str::to_owned),
        pid: std::process::id(),
        output,
    });
    Ok(())
}

/// A line about the supervisor's own doing.
pub fn line(text: impl Display) {
    write(
        "bulkhead",
        PREFIX.get().map_or(0, |prefix| prefix.pid as i32),
        &text.to_string(),
    );
}

/// A line about a helper.
pub fn helper(role: impl Display, pid: i32, text: impl Display) {
    write(&role.to_string(), pid, &text.to_string());
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

fn write(role: &str, pid: i32, text: &str) {
    let name = PREFIX.get().and_then(|prefix| prefix.vm_name.as_deref()).unwrap_or("");
    let mut line = match PREFIX.get().map(|prefix| &prefix.output) {
        None | Some(Output::Text) => {
            let separator = if name.is_empty() { "" } else { ": " };
            format!("{name}{separator}{role}[{pid}]: {text}")
        }
        Some(Output::Json) => json(name, role, pid, text, libc::PIPE_BUF - 1),
        Some(Output::Journal(socket)) => {
            // Nobody waits for a journal either.
            let _ = nix::unistd::write(socket, &entry(name, role, pid, text));
            return;
        }
    };
    line.truncate(line.floor_char_boundary(line.len().min(libc::PIPE_BUF - 1)));
    line.push('\n');
    let output = std::io::stderr();
    let mut fds = [PollFd::new(output.as_fd(), PollFlags::POLLOUT)];
    // Whoever reads the log and has stopped reading it stops no machine: a helper could fill it. A pipe that takes anything
    // takes a line of this length. One write, so that lines of several VMs on one terminal stay whole.
    if poll(&mut fds, PollTimeout::ZERO) == Ok(1) {
        use std::io::Write;
        let _ = output.lock().write_all(line.as_bytes());
    }
}

/// One object, not longer than `most`: the message is what is cut.
fn json(name: &str, role: &str, pid: i32, text: &str, most: usize) -> String {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut line = format!("{{\"time\":{}.{:06},\"vm\":", time.as_secs(), time.subsec_micros());
    append_quoted(&mut line, name, usize::MAX);
    line.push_str(",\"role\":");
    append_quoted(&mut line, role, usize::MAX);
    line.push_str(&format!(",\"pid\":{pid},\"message\":"));
    append_quoted(&mut line, text, most.saturating_sub(1));
    line.push('}');
    line
}

/// Appends a JSON string; stops before `line` is longer than `most`.
fn append_quoted(line: &mut String, text: &str, most: usize) {
    line.push('"');
    for c in text.chars() {
        let escaped = match c {
            '"' => "\\\"".to_owned(),
            '\\' => "\\\\".to_owned(),
            c if c.is_control() => format!("\\u{:04x}", u32::from(c)),
            c => c.to_string(),
        };
        if line.len() + escaped.len() >= most {
            break;
        }
        line.push_str(&escaped);
    }
    line.push('"');
}

/// An entry of the journal. A value ends with its line, so none may have a second one.
fn entry(name: &str, role: &str, pid: i32, text: &str) -> Vec<u8> {
    let one_line = |text: &str| text.replace('\n', " ");
    let fields = [
        ("MESSAGE", one_line(text)),
        ("PRIORITY", "6".into()),
        ("SYSLOG_IDENTIFIER", "bulkhead".into()),
        ("BULKHEAD_VM", one_line(name)),
        ("BULKHEAD_ROLE", one_line(role)),
        ("BULKHEAD_PID", pid.to_string()),
    ];
    let lines = fields.iter().map(|(field, value)| format!("{field}={value}\n"));
    lines.collect::<String>().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable(b"a\x1b[31mb\nc\xff\n"), "a\\u{1b}[31mb\\nc\u{fffd}");
    }

    #[test]
    fn a_line_of_json_is_whole_however_long_its_message() {
        for (text, most) in [("a \"b\" \\ \u{1}\u{e4}", 4095), (&"\"".repeat(9000), 4095)] {
            let line = json("vm\"1", "block-proc", 7, text, most);
            assert!(line.len() <= most, "{}", line.len());
            let value: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert_eq!((value["vm"].as_str(), value["pid"].as_i64()), (Some("vm\"1"), Some(7)));
            assert!(text.starts_with(value["message"].as_str().unwrap()));
            assert!(value["message"].as_str().unwrap().len() > 5);
        }
    }

    #[test]
    fn a_helper_cannot_add_fields_to_an_entry() {
        let text = String::from_utf8(entry("vm", "qmp-proc", 7, "x\nPRIORITY=0")).unwrap();
        assert_eq!(
            text,
            "MESSAGE=x PRIORITY=0\nPRIORITY=6\nSYSLOG_IDENTIFIER=bulkhead\nBULKHEAD_VM=vm\nBULKHEAD_ROLE=qmp-proc\nBULKHEAD_PID=7\n"
        );
    }
}
