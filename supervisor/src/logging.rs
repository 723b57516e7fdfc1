//! Log lines on standard error: `VM: role[pid]: text`, or the same as fields: a JSON object on a line, or an entry of
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

/// As much of a VM's name as a JSON line shows, bytes: escaped, it leaves room for the message.
const MAX_JSON_NAME_BYTES: usize = 255;

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

/// How much a line matters, as syslog numbers it.
#[derive(Clone, Copy)]
enum Priority {
    Critical = 2,
    Warning = 4,
    Information = 6,
}

/// A line before it has a form.
struct Record<'a> {
    priority: Priority,
    role: &'a str,
    pid: i64,
    text: &'a str,
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
    own(Priority::Information, text);
}

/// The supervisor's last line.
pub fn critical(text: impl Display) {
    own(Priority::Critical, text);
}

/// A line about a helper.
pub fn helper(role: impl Display, pid: i32, text: impl Display) {
    about(Priority::Information, role, pid, text);
}

/// A line about what a helper should not have done.
pub fn warning(role: impl Display, pid: i32, text: impl Display) {
    about(Priority::Warning, role, pid, text);
}

fn own(priority: Priority, text: impl Display) {
    write(&Record {
        priority,
        role: "bulkhead",
        pid: PREFIX.get().map_or(0, |prefix| prefix.pid.into()),
        text: &text.to_string(),
    });
}

fn about(priority: Priority, role: impl Display, pid: i32, text: impl Display) {
    write(&Record {
        priority,
        role: &role.to_string(),
        pid: pid.into(),
        text: &text.to_string(),
    });
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

fn write(record: &Record) {
    use std::io::Write;
    let name = PREFIX.get().and_then(|prefix| prefix.vm_name.as_deref()).unwrap_or("");
    let mut line = match PREFIX.get().map(|prefix| &prefix.output) {
        None | Some(Output::Text) => {
            let separator = if name.is_empty() { "" } else { ": " };
            format!("{name}{separator}{}[{}]: {}", record.role, record.pid, record.text)
        }
        Some(Output::Json) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            json(name, record, now.as_secs_f64(), libc::PIPE_BUF - 1)
        }
        Some(Output::Journal(socket)) => {
            // Nobody waits for a journal either.
            let _ = nix::unistd::write(socket, &entry(name, record));
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
        let _ = output.lock().write_all(line.as_bytes());
    }
}

/// One object, not longer than `limit` bytes: a message that does not fit is cut before it is encoded.
fn json(name: &str, record: &Record, seconds: f64, limit: usize) -> String {
    let name = &name[..name.floor_char_boundary(MAX_JSON_NAME_BYTES)];
    let object = |message: &str| {
        serde_json::json!({
            "time": seconds,
            "priority": record.priority as u8,
            "role": record.role,
            "pid": record.pid,
            "vm": name,
            "message": message,
        })
        .to_string()
    };
    let line = object(record.text);
    match line.len().checked_sub(limit) {
        None | Some(0) => line,
        // A byte of the message is at least a byte of the line.
        Some(over) => object(&record.text[..record.text.floor_char_boundary(record.text.len().saturating_sub(over))]),
    }
}

/// An entry of the journal. A value ends with its line, so none may have a second one.
fn entry(name: &str, record: &Record) -> Vec<u8> {
    let one_line = |text: &str| text.replace('\n', " ");
    let fields = [
        ("MESSAGE", one_line(record.text)),
        ("PRIORITY", (record.priority as u8).to_string()),
        ("SYSLOG_IDENTIFIER", "bulkhead".into()),
        ("BULKHEAD_VM", one_line(name)),
        ("BULKHEAD_ROLE", one_line(record.role)),
        ("BULKHEAD_PID", record.pid.to_string()),
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

    fn record(text: &str) -> Record<'_> {
        Record {
            priority: Priority::Warning,
            role: "block-proc",
            pid: 7,
            text,
        }
    }

    #[test]
    fn a_long_line_of_json_is_still_one_object() {
        let limit = libc::PIPE_BUF - 1;
        for name in ["vm\"1", &"\u{1}".repeat(5000)] {
            for text in [
                "a \"b\" \\ \u{1}\u{e4}",
                &"\u{1}".repeat(5000),
                &"\u{e4}".repeat(5000),
                &"x".repeat(3900),
            ] {
                let line = json(name, &record(text), 1.5, limit);
                assert!(line.len() <= limit, "{}", line.len());
                let value: serde_json::Value = serde_json::from_str(&line).unwrap();
                assert_eq!(
                    (&value["role"], &value["pid"], &value["priority"], &value["time"]),
                    (&"block-proc".into(), &7.into(), &4.into(), &1.5.into())
                );
                assert!(name.starts_with(value["vm"].as_str().unwrap()));
                assert!(text.starts_with(value["message"].as_str().unwrap()));
            }
        }
        let whole: serde_json::Value = serde_json::from_str(&json("vm", &record("a\n\"b"), 1.5, limit)).unwrap();
        assert_eq!(whole["message"], "a\n\"b");
    }

    #[test]
    fn a_helper_cannot_add_fields_to_an_entry() {
        let text = String::from_utf8(entry("vm", &record("x\nPRIORITY=0"))).unwrap();
        assert_eq!(
            text,
            "MESSAGE=x PRIORITY=0\nPRIORITY=4\nSYSLOG_IDENTIFIER=bulkhead\nBULKHEAD_VM=vm\nBULKHEAD_ROLE=block-proc\nBULKHEAD_PID=7\n"
        );
    }
}
