//! The human monitor's `qemu-io [-d] DEVICE "COMMAND"`: a small part of the tool of that name, for disks of a running
//! machine.

use ipc::graph::{Breakpoint, ManualIo};
use ipc::human::{HumanCommand, IoCommand};

/// Most that one command reads or writes, bytes.
const MAX_BYTES: u64 = 2 << 30;
/// What is written without `-P`.
const PATTERN: u8 = 0xcd;

/// What follows the command's name.
///
/// # Errors
/// One line that says what is wrong.
pub fn parse(rest: &str) -> Result<HumanCommand, String> {
    let (mut target, mut rest) = word(rest)?;
    let is_qdev = target == "-d";
    if is_qdev {
        (target, rest) = word(rest)?;
    }
    let (line, rest) = word(rest)?;
    if target.is_empty() || line.is_empty() {
        return Err("qemu-io: a device and a command are needed".into());
    }
    if !rest.trim().is_empty() {
        return Err("qemu-io: extraneous characters at the end of line".into());
    }
    Ok(HumanCommand::QemuIo {
        target,
        is_qdev,
        command: command(&line)?,
    })
}

/// The first word, or what is between double quotes, where a backslash takes the meaning from what follows it.
fn word(text: &str) -> Result<(String, &str), String> {
    let text = text.trim_start();
    let Some(quoted) = text.strip_prefix('"') else {
        let (word, rest) = text.split_at(text.find(char::is_whitespace).unwrap_or(text.len()));
        return Ok((word.to_owned(), rest));
    };
    let mut word = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Ok((word, &quoted[at + 1..])),
            '\\' => word.extend(characters.next().map(|(_, character)| character)),
            other => word.push(other),
        }
    }
    Err("qemu-io: the quotation does not end".into())
}

/// A line of the tool's own language.
fn command(line: &str) -> Result<IoCommand, String> {
    let mut words = line.split_whitespace();
    let name = words.next().unwrap_or_default();
    let words: Vec<&str> = words.collect();
    let plain = |io| {
        expect(name, &words, 0)?;
        Ok(io)
    };
    match name {
        "read" | "r" | "aio_read" => {
            let options = Options::parse(name, &words, "qvC")?;
            let (offset, bytes) = options.range(name)?;
            let pattern = options.pattern;
            let io = ManualIo::Read { offset, bytes, pattern };
            Ok(options.command(io, name))
        }
        "write" | "w" | "aio_write" => {
            let options = Options::parse(name, &words, "qfzuC")?;
            let (offset, bytes) = options.range(name)?;
            let has = |flag| options.flags.contains(flag);
            let io = match (has('z'), options.pattern) {
                (true, Some(_)) => return Err(format!("{name}: -z and -P cannot be specified at the same time")),
                (true, None) => ManualIo::Zero {
                    offset,
                    bytes,
                    may_unmap: has('u'),
                },
                (false, _) if has('u') => return Err(format!("{name}: -u requires -z to be specified")),
                (false, pattern) => ManualIo::Write {
                    offset,
                    bytes,
                    pattern: pattern.unwrap_or(PATTERN),
                    durable: has('f'),
                },
            };
            Ok(options.command(io, name))
        }
        "discard" | "d" => {
            let options = Options::parse(name, &words, "qC")?;
            let (offset, bytes) = options.range(name)?;
            Ok(options.command(ManualIo::Discard { offset, bytes }, name))
        }
        "flush" | "f" => plain(IoCommand::Io {
            io: ManualIo::Flush,
            quiet: true,
            background: false,
        }),
        "aio_flush" => plain(IoCommand::WaitForAll),
        "length" | "l" => plain(IoCommand::Length),
        "break" => {
            let [event, tag] = expect(name, &words, 2)? else {
                return Err(String::new());
            };
            Ok(IoCommand::Breakpoint(Breakpoint::Set {
                event: (*event).to_owned(),
                tag: (*tag).to_owned(),
            }))
        }
        "resume" | "remove_break" | "wait_break" => {
            let tag = expect(name, &words, 1)?.concat();
            Ok(IoCommand::Breakpoint(match name {
                "resume" => Breakpoint::Resume { tag },
                "remove_break" => Breakpoint::Remove { tag },
                _ => Breakpoint::Wait { tag },
            }))
        }
        _ => Err(format!("command \"{name}\" not found")),
    }
}

fn expect<'a, 'b>(name: &str, words: &'a [&'b str], count: usize) -> Result<&'a [&'b str], String> {
    if words.len() == count {
        return Ok(words);
    }
    Err(format!(
        "bad argument count {} to {name}, expected {count} arguments",
        words.len()
    ))
}

#[derive(Default)]
struct Options<'a> {
    flags: String,
    pattern: Option<u8>,
    rest: Vec<&'a str>,
}

impl<'a> Options<'a> {
    /// `allowed` are the flags without a value; `-P` has one, after a space or not.
    fn parse(name: &str, words: &[&'a str], allowed: &str) -> Result<Self, String> {
        let mut options = Self::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let Some(flags) = word.strip_prefix('-') else {
                options.rest.push(word);
                continue;
            };
            let mut flags = flags.chars();
            while let Some(flag) = flags.next() {
                match flag {
                    'P' => {
                        let attached = flags.as_str();
                        let value = match attached {
                            "" => words.next().copied().unwrap_or_default(),
                            attached => attached,
                        };
                        let pattern = number(value).ok().and_then(|value| u8::try_from(value).ok());
                        options.pattern = Some(pattern.ok_or_else(|| format!("{value} is not a valid pattern byte"))?);
                        break;
                    }
                    flag if allowed.contains(flag) => options.flags.push(flag),
                    other => return Err(format!("{name}: invalid option -- '{other}'")),
                }
            }
        }
        Ok(options)
    }

    fn range(&self, name: &str) -> Result<(u64, u64), String> {
        let [offset, length] = self.rest[..] else {
            let count = self.rest.len();
            return Err(format!("bad argument count {count} to {name}, expected 2 arguments"));
        };
        let offset = number(offset).map_err(|()| format!("non-numeric offset argument -- {offset}"))?;
        let bytes = number(length).map_err(|()| format!("non-numeric length argument -- {length}"))?;
        if bytes > MAX_BYTES || offset.checked_add(bytes).is_none() {
            return Err(format!("length cannot exceed {MAX_BYTES}, given {length}"));
        }
        Ok((offset, bytes))
    }

    fn command(&self, io: ManualIo, name: &str) -> IoCommand {
        IoCommand::Io {
            io,
            quiet: self.flags.contains('q'),
            background: name.starts_with("aio_"),
        }
    }
}

/// Decimal or hexadecimal (0x), with a suffix from k to E for powers of 1024.
fn number(text: &str) -> Result<u64, ()> {
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let suffix = digits.char_indices().next_back().and_then(|(at, last)| {
        let power = "bkmgtpe".find(last.to_ascii_lowercase())?;
        // b and e are digits as well.
        (radix == 10 || !last.is_ascii_hexdigit()).then_some((at, power as u32))
    });
    let (digits, power) = match suffix {
        Some((at, power)) => (&digits[..at], power),
        None => (digits, 0),
    };
    if digits.is_empty() || digits.starts_with(['+', '-']) {
        return Err(());
    }
    let number = u64::from_str_radix(digits, radix).map_err(|_| ())?;
    number.checked_mul(1 << (10 * power)).ok_or(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Result<IoCommand, String> {
        match parse(&format!("drive0 \"{line}\""))? {
            HumanCommand::QemuIo { command, .. } => Ok(command),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn reads_and_writes_with_their_options() {
        let io = |io, quiet, background| Ok(IoCommand::Io { io, quiet, background });
        let read = |offset, bytes, pattern| ManualIo::Read { offset, bytes, pattern };
        let write = |offset, bytes, pattern, durable| ManualIo::Write {
            offset,
            bytes,
            pattern,
            durable,
        };
        assert_eq!(of("read 0 64k"), io(read(0, 65536, None), false, false));
        assert_eq!(
            of("aio_read -qP 0x11 1M 512"),
            io(read(1 << 20, 512, Some(0x11)), true, true)
        );
        assert_eq!(of("write -P5 0x200 0x200"), io(write(512, 512, 5, false), false, false));
        assert_eq!(of("aio_write -f 0 1b"), io(write(0, 1, 0xcd, true), false, true));
        let zero = ManualIo::Zero {
            offset: 0,
            bytes: 1 << 30,
            may_unmap: true,
        };
        assert_eq!(of("write -zu 0 1G"), io(zero, false, false));
        let discard = ManualIo::Discard { offset: 7, bytes: 9 };
        assert_eq!(of("discard 7 9"), io(discard, false, false));
        assert_eq!(of("flush"), io(ManualIo::Flush, true, false));
        assert_eq!(of("aio_flush"), Ok(IoCommand::WaitForAll));
    }

    #[test]
    fn breakpoints_have_a_tag() {
        let tag = || "A".to_owned();
        let event = "write_aio".to_owned();
        for (line, expected) in [
            ("break write_aio A", Breakpoint::Set { event, tag: tag() }),
            ("resume A", Breakpoint::Resume { tag: tag() }),
            ("remove_break A", Breakpoint::Remove { tag: tag() }),
            ("wait_break A", Breakpoint::Wait { tag: tag() }),
        ] {
            assert_eq!(of(line), Ok(IoCommand::Breakpoint(expected)));
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (line, problem) in [
            ("raed 0 1", "command \"raed\" not found"),
            ("read 0", "bad argument count 1 to read, expected 2 arguments"),
            ("read x 1", "non-numeric offset argument -- x"),
            ("read 0 1x", "non-numeric length argument -- 1x"),
            ("read 0 3G", "length cannot exceed 2147483648, given 3G"),
            ("write -x 0 1", "write: invalid option -- 'x'"),
            ("write -P 300 0 1", "300 is not a valid pattern byte"),
            ("write -u 0 1", "write: -u requires -z to be specified"),
            (
                "write -z -P 1 0 1",
                "write: -z and -P cannot be specified at the same time",
            ),
            ("break A", "bad argument count 1 to break, expected 2 arguments"),
        ] {
            assert_eq!(of(line).unwrap_err(), problem, "{line}");
        }
        assert_eq!(
            parse(" drive0 \"read").unwrap_err(),
            "qemu-io: the quotation does not end"
        );
        assert!(parse(" drive0").is_err() && parse("").is_err());
    }

    #[test]
    fn a_device_is_an_id_or_a_path() {
        let Ok(HumanCommand::QemuIo { target, is_qdev, .. }) = parse("-d /machine/x \"flush\"") else {
            panic!("refused")
        };
        assert_eq!((target.as_str(), is_qdev), ("/machine/x", true));
        let Ok(HumanCommand::QemuIo { target, is_qdev, .. }) = parse(" \"a \\\"b\" flush") else {
            panic!("refused")
        };
        assert_eq!((target.as_str(), is_qdev), ("a \"b", false));
    }
}
