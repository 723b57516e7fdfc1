//! The command line of `bulkhead dump`.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

/// What its usage is.
pub const USAGE: &str = "\
Usage: bulkhead dump SOCKET [OPTION]... FILE

Writes the memory of the machine whose monitor listens at SOCKET (-qmp unix:SOCKET,server=on,wait=off) into FILE, or to
standard output when FILE is -.

  --format FORMAT     elf, kdump-zlib, kdump-raw-zlib, ...: docs/DUMPS.md says which reader takes which
                      (default: kdump-raw-zlib, which all take)
  --live              the guest runs on meanwhile; the dump is memory at one instant
  --exclude KINDS     leaves out pages: a list of free, cache, user, zero
  --force             overwrites FILE if it exists
";

/// Where the dump goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A new file.
    File(PathBuf),
    /// Standard output.
    Output,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Output => f.write_str("standard output"),
        }
    }
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arguments {
    /// The monitor.
    pub socket: PathBuf,
    /// Where to.
    pub target: Target,
    /// As the protocol calls it.
    pub format: Option<String>,
    /// The guest runs on.
    pub live: bool,
    /// Kinds of pages to leave out.
    pub exclude: Vec<String>,
    /// An existing file is overwritten.
    pub force: bool,
}

/// Reads the arguments after `dump`; `None`: they ask for help.
///
/// # Errors
/// What is wrong with them.
pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Option<Arguments>, String> {
    let (mut format, mut live, mut exclude, mut force) = (None, false, Vec::new(), false);
    let mut places = Vec::new();
    let mut arguments = arguments;
    let mut only_places = false;
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy().into_owned();
        if only_places || text == "-" || !text.starts_with('-') {
            places.push(argument);
            continue;
        }
        // One dash or two, as everywhere; the value behind '=' or next.
        let name = text.trim_start_matches('-');
        let (name, inline) = match name.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (name, None),
        };
        let takes_value = matches!(name, "format" | "exclude");
        if inline.is_some() && !takes_value && !text.eq("--") {
            return Err(format!("{text}: unknown option"));
        }
        let mut value = || {
            let next = || arguments.next().map(|next| next.to_string_lossy().into_owned());
            inline
                .clone()
                .or_else(next)
                .ok_or_else(|| format!("{text}: the value is missing"))
        };
        match name {
            "" => only_places = true,
            "help" | "h" => return Ok(None),
            "format" => format = Some(value()?),
            "exclude" => exclude.extend(value()?.split(',').map(str::to_owned)),
            "live" => live = true,
            "force" => force = true,
            _ => return Err(format!("{text}: unknown option; bulkhead dump --help lists them")),
        }
    }
    let [socket, file]: [OsString; 2] = places
        .try_into()
        .map_err(|_| "it takes a monitor's socket and a file: bulkhead dump SOCKET FILE".to_owned())?;
    let target = if file == "-" {
        Target::Output
    } else {
        Target::File(file.into())
    };
    Ok(Some(Arguments {
        socket: socket.into(),
        target,
        format,
        live,
        exclude,
        force,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Option<Arguments>, String> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn options_may_stand_anywhere() {
        let expected = Arguments {
            socket: "qmp".into(),
            target: Target::File("out".into()),
            format: Some("elf".into()),
            live: true,
            exclude: vec!["free".into(), "zero".into()],
            force: false,
        };
        for line in [
            "qmp --format elf --live --exclude free,zero out",
            "-live -format=elf qmp out --exclude=free --exclude zero",
        ] {
            assert_eq!(parsed(line), Ok(Some(expected.clone())), "{line}");
        }
        let stream = parsed("--force qmp -").unwrap().unwrap();
        assert!(stream.force && stream.target == Target::Output && stream.format.is_none());
        let odd = parsed("-- -qmp -out").unwrap().unwrap();
        assert_eq!((odd.socket, odd.target), ("-qmp".into(), Target::File("-out".into())));
        assert_eq!(parsed("--help"), Ok(None));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (line, text) in [
            ("", "it takes a monitor's socket and a file: bulkhead dump SOCKET FILE"),
            (
                "qmp",
                "it takes a monitor's socket and a file: bulkhead dump SOCKET FILE",
            ),
            (
                "a b c",
                "it takes a monitor's socket and a file: bulkhead dump SOCKET FILE",
            ),
            ("qmp out --format", "--format: the value is missing"),
            (
                "qmp out --fromat elf",
                "--fromat: unknown option; bulkhead dump --help lists them",
            ),
            ("qmp out --live=1", "--live=1: unknown option"),
        ] {
            assert_eq!(parsed(line), Err(text.to_owned()), "{line}");
        }
    }
}
