//! `bulkhead dump SOCKET FILE`: has a running machine write its memory into a file, and shows how far it is.
//!
//! A client like any other: it connects to the monitor's socket, opens the file itself and passes it (the machine may run as
//! somebody else, in another directory), asks for a detached dump, and then asks how it goes. What it needs of QMP any server
//! has that knows `getfd` and `dump-guest-memory`.
//!
//! [`arguments`] its command line; [`session`] the connection; [`progress`] what is shown; [`advice`] the command that opens
//! what came out.

mod advice;
pub mod arguments;
mod progress;
mod session;

use arguments::{Arguments, Target};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use progress::{Progress, Shown};
use serde_json::{Value, json};
use session::{Session, SessionError, Waited};
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// How often the server is asked how far it is.
const INTERVAL: Duration = Duration::from_millis(250);
/// Name that the file has at the server while it is passed.
const FD_NAME: &str = "bulkhead-dump";
/// As shells count: 128 and the signal.
const INTERRUPTED: u8 = 130;
/// What is written unless something else is asked for, the first that the server has: smaller than memory, and open to every
/// reader. A pipe cannot take the plain one.
const FILE_FORMATS: [&str; 3] = ["kdump-raw-zlib", "kdump-zlib", "elf"];
const STREAM_FORMATS: [&str; 2] = ["kdump-zlib", "elf"];

/// Why there is no dump.
#[derive(Debug, thiserror::Error)]
enum DumpError {
    #[error("{0}")]
    Session(#[from] SessionError),
    #[error("{0}: {why}", why = describe(.1))]
    File(String, std::io::Error),
    #[error("{0} exists; --force overwrites it")]
    Exists(String),
    #[error("the machine writes no {format}; it writes: {known}")]
    Format { format: String, known: String },
    #[error("{0}")]
    Failed(String),
    #[error("{0}: {1}")]
    System(&'static str, nix::errno::Errno),
}

/// The system's words without Rust's number behind them.
fn describe(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error ").next().unwrap_or_default().to_owned()
}

/// How it ended.
enum End {
    Written { memory_bytes: u64 },
    Interrupted,
}

/// Carries it out.
pub fn run(arguments: &Arguments) -> ExitCode {
    match write(arguments) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("bulkhead dump: {error}");
            ExitCode::FAILURE
        }
    }
}

fn write(arguments: &Arguments) -> Result<ExitCode, DumpError> {
    let signals = interrupts().map_err(|errno| DumpError::System("signalfd", errno))?;
    let mut session = Session::connect(&arguments.socket)?;
    let format = choose_format(&mut session, arguments)?;
    let (output, made) = open(arguments)?;
    let result = dump(&mut session, arguments, &format, output, &signals);
    let name = arguments.target.to_string();
    match result {
        Ok((End::Written { memory_bytes }, took)) => {
            let bytes = made.and_then(|path| fs::metadata(path).ok()).map(|status| {
                use std::os::unix::fs::MetadataExt;
                // Of a sparse file what it takes up.
                status.len().min(status.blocks() * 512)
            });
            eprintln!("{}", progress::summary(&name, bytes, memory_bytes, took));
            if made.is_some() {
                eprint!("{}", advice::text(&format, &name));
            }
            Ok(ExitCode::SUCCESS)
        }
        Ok((End::Interrupted, _)) => {
            eprintln!(
                "bulkhead dump: interrupted. The machine goes on writing {name}, which is complete when query-dump says so."
            );
            Ok(ExitCode::from(INTERRUPTED))
        }
        Err(error) => {
            if let Some(path) = made {
                // Half a dump would be taken for a whole one.
                let _ = fs::remove_file(path);
            }
            Err(error)
        }
    }
}

fn interrupts() -> Result<SignalFd, nix::errno::Errno> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGINT);
    set.add(Signal::SIGTERM);
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

fn choose_format(session: &mut Session, arguments: &Arguments) -> Result<String, DumpError> {
    let said = session.execute("query-dump-guest-memory-capability", json!({}))?;
    let known: Vec<&str> = said["formats"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let preferred: &[&str] = match arguments.target {
        Target::File(_) => &FILE_FORMATS,
        Target::Output => &STREAM_FORMATS,
    };
    let chosen = match &arguments.format {
        Some(format) => known.iter().find(|known| *known == format),
        None => preferred.iter().find(|format| known.contains(format)),
    };
    chosen
        .map(|format| (*format).to_owned())
        .ok_or_else(|| DumpError::Format {
            format: arguments.format.clone().unwrap_or_else(|| preferred.join(" or ")),
            known: known.join(", "),
        })
}

/// The output, and the path of the file that was made for it.
fn open(arguments: &Arguments) -> Result<(OwnedFd, Option<&Path>), DumpError> {
    let failed = |error| DumpError::File(arguments.target.to_string(), error);
    let Target::File(path) = &arguments.target else {
        let output = std::io::stdout().as_fd().try_clone_to_owned();
        return Ok((output.map_err(failed)?, None));
    };
    let mut options = File::options();
    // Read as well: that is how QEMU looks at what it is given. For the owner alone: it holds the guest's secrets.
    options.read(true).write(true).mode(0o600);
    if arguments.force {
        options.create(true).truncate(true);
    } else {
        options.create_new(true);
    }
    match options.open(path) {
        Ok(file) => {
            // Of a device or a FIFO only the name is ours to use.
            let is_file = file.metadata().is_ok_and(|status| status.is_file());
            Ok((file.into(), is_file.then_some(path.as_path())))
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            Err(DumpError::Exists(arguments.target.to_string()))
        }
        Err(error) => Err(failed(error)),
    }
}

/// From the request to its end; how long it took.
fn dump(
    session: &mut Session,
    arguments: &Arguments,
    format: &str,
    output: OwnedFd,
    signals: &SignalFd,
) -> Result<(End, Duration), DumpError> {
    session.pass("getfd", json!({"fdname": FD_NAME}), output)?;
    let mut request = json!({
        "paging": false, "protocol": format!("fd:{FD_NAME}"), "format": format, "detach": true,
    });
    if arguments.live {
        request["live"] = json!(true);
    }
    if !arguments.exclude.is_empty() {
        request["exclude"] = json!(arguments.exclude);
    }
    let mut progress = Progress::begin(Shown::on_standard_error());
    if let Err(error) = session.execute("dump-guest-memory", request) {
        // Otherwise it is used up.
        let _ = session.execute("closefd", json!({"fdname": FD_NAME}));
        return Err(error.into());
    }
    loop {
        let report = session.execute("query-dump", json!({}))?;
        let number = |field: &str| report[field].as_u64().unwrap_or_default();
        let (completed, total) = (number("completed"), number("total"));
        match report["status"].as_str() {
            Some("completed") => {
                let took = progress.end();
                return Ok((End::Written { memory_bytes: total }, took));
            }
            Some("failed") => {
                progress.end();
                let why = session
                    .failure()
                    .unwrap_or_else(|| "the dump failed; the machine does not say why".into());
                return Err(DumpError::Failed(why));
            }
            _ => progress.show(completed, total),
        }
        if let Waited::Interrupted = session.wait(INTERVAL, signals)? {
            return Ok((End::Interrupted, progress.end()));
        }
    }
}
