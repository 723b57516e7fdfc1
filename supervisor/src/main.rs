//! `bulkhead`: the supervisor of one virtual machine.
//!
//! It holds the fd table (guest RAM's memfd, which it never maps, eventfds, disk fds, listening sockets), the run state
//! and all decisions. It never sees a client's text, never reads an image and never maps guest RAM. Every helper has one
//! channel, to here:
//!
//! ```text
//!                      ┌────────────┐ start (role, fds)  ┌──────────┐
//!   clients, terminal  │ supervisor │───────────────────▶│ launcher │ clone3, empty root, ids,
//!   ──────────────────▶│ (bulkhead) │◀───────────────────│          │ no capabilities, stage 1, exec
//!     accept, open     └─────┬──────┘ pidfd, how it ended└──────────┘
//!            ┌───────────────┼───────────────┬────────────────┐
//!       ┌────┴─────┐   ┌─────┴──────┐   ┌────┴─────┐    ┌─────┴────┐
//!       │vcpu-proc │   │ block-proc │   │ qmp-proc │…   │dump-proc │
//!       └──────────┘   └────────────┘   └──────────┘    └──────────┘
//! ```
//!
//! Beside the launcher there is the [`opener`], forked from the supervisor as well: it makes the sockets that commands ask
//! for, which the sealed supervisor cannot. It is there where a monitor has `chardev-add` or a device connects again.
//!
//! Where there is something to remove at the end, or metrics are asked for, the [`hosting::warden`] does that.
//!
//! What the end of a process means: the supervisor's or the launcher's ends all; after the opener's no more sockets are made; vcpu-proc's ends the
//! guest, and the machine stays to be looked into; after block-proc's another one takes its place; qmp-proc's closes its client's connection; dump-proc's fails its
//! dump.
//!
//! Where to look: [`cli`] and [`config`] the command line; [`vm`] the machine; [`graph`] its block nodes; [`objects`] and
//! [`device_types`] what it can be given, [`frontend`] the devices without a guest; [`launcher`] how helpers are started; [`opener`] how sockets are made;
//! [`sandbox`] how they are verified and how the supervisor confines itself; [`helper`] how they are talked to; [`violations`]
//! what they tried against their policies, [`counters`] what has become of them.
//!
//! `bulkhead doctor` and `bulkhead dump` are other programs under the same name: [`doctor`], [`dump_command`].

mod backing;
mod chardev;
mod child;
mod cli;
mod config;
mod counters;
mod credit;
mod device_types;
mod doctor;
mod dump_command;
mod executor;
mod frontend;
mod graph;
mod helper;
mod host;
mod hosting;
mod jobs;
mod launcher;
mod logging;
mod narrowing;
mod objects;
mod opener;
mod ram;
mod sandbox;
mod sys;
mod violations;
mod vm;

use chardev::RawTerminal;
use cli::Invocation;
use config::{CharBackend, VmConfig};
use std::process::ExitCode;
use vm::{Outcome, StartError, Vm};

fn main() -> ExitCode {
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Invocation::Run(config)) => run(*config),
        Ok(Invocation::Doctor) => doctor::run(&mut std::io::stdout()),
        Ok(Invocation::Audit(arguments)) => fail(&audit(&arguments)),
        Ok(Invocation::Dump(arguments)) => dump_command::run(&arguments),
        Ok(other) => {
            print!("{}", other.text().unwrap_or_default());
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error),
    }
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("bulkhead: {error}");
    ExitCode::FAILURE
}

/// Becomes the audit, which is a program of its own: what it needs is linked into no process of a machine. Returns only when it
/// cannot be executed.
fn audit(arguments: &[std::ffi::OsString]) -> String {
    use std::os::unix::process::CommandExt;
    let program = std::env::current_exe()
        .unwrap_or_default()
        .with_file_name("bulkhead-audit");
    let error = std::process::Command::new(&program).args(arguments).exec();
    format!("{}: {error}", program.display())
}

fn run(config: VmConfig) -> ExitCode {
    host::raise_file_limit();
    let log_format = config.log_format.clone();
    match start(config) {
        Ok(outcome) => sys::exit_now(outcome == Outcome::Failed),
        Err(error) => {
            if log_format != logging::Format::Text {
                logging::critical(&error);
            }
            // Who reads objects gets nothing else; who has sent the log away is still told.
            match log_format {
                logging::Format::Json => ExitCode::FAILURE,
                _ => fail(&error),
            }
        }
    }
}

fn start(config: VmConfig) -> Result<Outcome, StartError> {
    let other = |what: &str, error: &dyn std::fmt::Display| StartError::Other(format!("{what}: {error}"));
    let daemon = config
        .daemonize
        .then(host::Daemon::start)
        .transpose()
        .map_err(|errno| other("-daemonize", &errno))?;
    logging::init(config.name.as_deref(), &config.log_format).map_err(|error| other("--log-format", &error))?;
    std::panic::set_hook(Box::new(|info| {
        // The standard path asks for more than the sealed filter allows, and would end without a word.
        logging::critical(logging::printable(format!("panic: {info}").as_bytes()));
        sys::exit_now(true);
    }));
    let signals = host::block_signals().map_err(|errno| other("signalfd", &errno))?;
    let pidfile = config.pidfile.clone();
    let policy_mode = config.policy_mode;
    let serial_on_terminal = config.serial == Some(CharBackend::Stdio);
    let ready = Box::new(move || {
        if let Some(daemon) = daemon {
            daemon.ready();
        }
    });
    let resources = vm::prepare(config, signals, ready)?;
    host::close_inherited();
    let _pidfile = match &pidfile {
        Some(path) => {
            Some(host::PidFile::write(path).map_err(|error| other(&format!("-pidfile {}", path.display()), &error))?)
        }
        None => None,
    };
    let _terminal = if serial_on_terminal {
        RawTerminal::enter(true)
    } else {
        None
    };
    sandbox::own::seal(policy_mode).map_err(|error| other("sealing the supervisor", &error))?;
    Vm::run(resources)
}
