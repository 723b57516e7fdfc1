//! The command line, in QEMU's syntax: arguments become one validated [`VmConfig`] or one line of error.
//!
//! Everything is parsed here, once; the rest of the supervisor sees no text that still means something. The way of an
//! argument: [`options`] is the table of all options, and finds it by name; [`keyval`] takes a `key=value` list apart
//! against the keys that the option declares; a handler ([`machine`], [`cpu`], [`drive`], [`chardev`]) reads the values
//! ([`given`]) into a [`draft`]; when all is read, the draft checks what needs more than one option and becomes the
//! machine. What Bulkhead would do anyway (`-display none`, `-rtc base=utc`) is accepted by data alone; what it cannot do
//! is an error, never ignored: an operator must be able to trust that a line means what it says.

mod accepted;
mod blockdev;
mod boot;
mod chardev;
mod cpu;
mod device;
mod draft;
mod drive;
mod error;
mod fd;
mod frontends;
mod given;
mod help;
mod hosting;
mod interface;
mod introspect;
mod keyval;
mod machine;
mod object;
mod open_pairs;
mod options;
mod socket;
mod suggest;
#[cfg(test)]
mod tests;
mod vmcoreinfo;

pub use cpu::CPUS;
pub use drive::error_action;
pub use error::UsageError;
pub use introspect::command_line_options;
pub use machine::MACHINES;

use crate::config::VmConfig;
use draft::Draft;
use error::quote;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Invocation {
    /// Run this machine.
    Run(Box<VmConfig>),
    /// `bulkhead doctor`: check the host.
    Doctor,
    /// `bulkhead audit`: hold policies, executables or a running machine against each other, with these arguments.
    Audit(Vec<OsString>),
    /// `bulkhead dump`: have a running machine dumped.
    Dump(Box<crate::dump_command::arguments::Arguments>),
    /// `bulkhead dump --help`.
    DumpHelp,
    /// `--help`.
    Help,
    /// `-version`.
    Version,
    /// `-machine help`.
    ListMachines,
    /// `-accel help`.
    ListAccelerators,
    /// `-cpu help`.
    ListCpus,
    /// `-device help`.
    ListDevices,
    /// The same with `-accel qtest`.
    ListQtestDevices,
    /// `-object help`.
    ListObjects,
    /// `-drive format=help`.
    ListImageFormats,
    /// `-chardev help`.
    ListChardevs,
}

impl Invocation {
    /// What to print to standard output before exiting with 0; `None` for those that do something.
    pub fn text(&self) -> Option<String> {
        match self {
            Self::Run(_) | Self::Doctor | Self::Audit(_) | Self::Dump(_) => None,
            Self::DumpHelp => Some(crate::dump_command::arguments::USAGE.to_owned()),
            Self::Help => Some(help()),
            Self::Version => Some(help::version()),
            Self::ListMachines => Some(help::machines()),
            Self::ListAccelerators => Some(help::accelerators()),
            Self::ListCpus => Some(help::cpus()),
            Self::ListDevices => Some(help::devices()),
            Self::ListQtestDevices => Some(help::qtest_devices()),
            Self::ListObjects => Some(help::objects()),
            Self::ListImageFormats => Some(help::image_formats()),
            Self::ListChardevs => Some(help::chardevs()),
        }
    }
}

/// Parses the arguments after the program's name.
///
/// # Errors
/// The first thing that is wrong, as the one line to print after `bulkhead: `.
pub fn parse(args: impl Iterator<Item = OsString>) -> Result<Invocation, UsageError> {
    let mut args = args.peekable();
    if args.next_if(|first| first == "doctor").is_some() {
        return doctor(args.next());
    }
    if args.next_if(|first| first == "audit").is_some() {
        return Ok(Invocation::Audit(args.collect()));
    }
    if args.next_if(|first| first == "dump").is_some() {
        let parsed = crate::dump_command::arguments::parse(args).map_err(|why| UsageError::new("dump", why))?;
        return Ok(parsed.map_or(Invocation::DumpHelp, |arguments| Invocation::Dump(Box::new(arguments))));
    }
    let mut draft = Draft::default();
    while let Some(arg) = args.next() {
        let spelled = quote(&arg);
        let Some(name) = option_name(&arg) else {
            return Err(bare(&arg));
        };
        let option = options::find(name).ok_or_else(|| unknown(&spelled, name))?;
        let value = if option.takes_value() {
            let example = format!("it takes one: {spelled} {}", option.value);
            args.next()
                .ok_or_else(|| UsageError::new(&spelled, format!("the value is missing; {example}")))?
        } else {
            OsString::new()
        };
        option.apply(&mut draft, &spelled, value)?;
        if let Some(answer) = draft.answer {
            return Ok(answer);
        }
    }
    Ok(Invocation::Run(Box::new(draft.finish()?)))
}

/// `--help`, for people.
pub fn help() -> String {
    help::help()
}

fn doctor(next: Option<OsString>) -> Result<Invocation, UsageError> {
    let Some(next) = next else {
        return Ok(Invocation::Doctor);
    };
    match option_name(&next).and_then(options::find) {
        Some(option) if option.names.contains(&"help") => Ok(Invocation::Help),
        _ => Err(UsageError::new(
            format!("doctor {}", quote(&next)),
            "doctor takes no arguments",
        )),
    }
}

/// The name behind one dash or two; `None` for what is no option. What is not UTF-8 has no name that exists.
fn option_name(arg: &OsStr) -> Option<&str> {
    let name = arg.as_bytes().strip_prefix(b"-")?;
    let name = name.strip_prefix(b"-").unwrap_or(name);
    (!name.is_empty()).then(|| std::str::from_utf8(name).unwrap_or("\u{fffd}"))
}

fn bare(arg: &OsStr) -> UsageError {
    let problem = if suggest::nearest(&arg.to_string_lossy(), ["doctor"]).is_some() {
        "not an option; did you mean 'bulkhead doctor', with nothing else?"
    } else {
        "not an option; a kernel is -kernel FILE, a disk is -drive file=FILE,if=virtio,format=raw"
    };
    UsageError::new(if arg.is_empty() { "''".to_owned() } else { quote(arg) }, problem)
}

fn unknown(spelled: &str, name: &str) -> UsageError {
    if let Some((_, instead)) = options::ELSEWHERE.iter().find(|(names, _)| names.contains(&name)) {
        return UsageError::new(spelled, format!("Bulkhead has no such option: {instead}"));
    }
    if let Some((name, value)) = name.split_once('=').filter(|(name, _)| options::find(name).is_some()) {
        let problem = format!(
            "a value is an argument of its own: -{name} {}",
            quote(OsStr::new(value))
        );
        return UsageError::new(spelled, problem);
    }
    let names = options::OPTIONS.iter().flat_map(|option| option.names.iter().copied());
    let hint = suggest::hint(name, "-", names, || "; --help lists them".to_owned());
    UsageError::new(spelled, format!("there is no such option{hint}"))
}
