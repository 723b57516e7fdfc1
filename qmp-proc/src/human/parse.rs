//! A line → what it means. Nothing in a line is taken for more than text, a number or one of the known words.

use super::help::{help, items, misused, unknown};
use super::{END, Layout, Line, MemoryLayout, Style, qemu_io};
use ipc::dump::MAX_READ_BYTES;
use ipc::human::{HumanCommand, WhichCpus};

/// The address that is not told.
const NO_HOST_ADDRESSES: &str = "Host addresses are not told: guest memory is mapped by sandboxed processes only, \
                                 each at its own random address. Use xp or pmemsave";

/// What a line means.
pub fn parse(line: &str) -> Line {
    let line = line.trim();
    let end = line.find(|c: char| c.is_whitespace() || c == '/').unwrap_or(line.len());
    let (name, rest) = line.split_at(end);
    let words: Vec<_> = rest.split_whitespace().collect();
    let result = match name {
        "" if rest.is_empty() => Ok(Line::Answer(String::new())),
        "help" | "?" => Ok(Line::Answer(help(&words))),
        "info" => info(&words),
        "x" => memory(rest, true).map_err(|problem| misused("x", &problem)),
        "xp" => memory(rest, false).map_err(|problem| misused("xp", &problem)),
        "qemu-io" => qemu_io::parse(rest)
            .map(|command| Line::Ask(command, Layout::Plain))
            .map_err(|problem| misused("qemu-io", &problem)),
        "gva2gpa" => address(rest)
            .map(|address| Line::Ask(HumanCommand::Translate { address }, Layout::Plain))
            .map_err(|problem| misused("gva2gpa", &problem)),
        "gpa2hva" => address(rest)
            .map(|_| Line::Answer(format!("{NO_HOST_ADDRESSES}{END}")))
            .map_err(|problem| misused("gpa2hva", &problem)),
        _ => Err(unknown(name)),
    };
    result.unwrap_or_else(Line::Answer)
}

fn info(words: &[&str]) -> Result<Line, String> {
    let Some((item, words)) = words.split_first() else {
        return Ok(Line::Answer(items()));
    };
    let command = match *item {
        "status" => HumanCommand::Status,
        "name" => HumanCommand::Name,
        "uuid" => HumanCommand::Uuid,
        "kvm" => HumanCommand::Kvm,
        "cpus" => HumanCommand::Cpus,
        "version" => {
            no_more(item, words)?;
            return Ok(Line::Version);
        }
        "block" => return block(words),
        "mtree" => return memory_tree(words),
        "registers" => return registers(words),
        _ => return Err(unknown(&format!("info {item}"))),
    };
    no_more(item, words)?;
    Ok(Line::Ask(command, Layout::Plain))
}

fn no_more(item: &str, words: &[&str]) -> Result<(), String> {
    if words.is_empty() {
        return Ok(());
    }
    let problem = format!("{item}: extraneous characters at the end of line");
    Err(misused(&format!("info {item}"), &problem))
}

fn option(item: &str, word: &str) -> String {
    misused(&format!("info {item}"), &format!("{item}: unsupported option {word}"))
}

fn block(words: &[&str]) -> Result<Line, String> {
    let device = match words.split_first() {
        None => None,
        Some((word, _)) if word.starts_with('-') => return Err(option("block", word)),
        Some((word, rest)) => {
            no_more("block", rest)?;
            Some((*word).to_owned())
        }
    };
    Ok(Line::Ask(HumanCommand::Block { device }, Layout::Plain))
}

fn memory_tree(words: &[&str]) -> Result<Line, String> {
    match words {
        [] => Err(misused("info mtree", "mtree: there is no tree, only the flat view: -f")),
        ["-f", rest @ ..] => {
            no_more("mtree", rest)?;
            Ok(Line::Ask(HumanCommand::MemoryTree, Layout::Plain))
        }
        [word, ..] => Err(option("mtree", word)),
    }
}

fn registers(words: &[&str]) -> Result<Line, String> {
    let which = match words {
        [] => WhichCpus::Current,
        ["-a", rest @ ..] => {
            no_more("registers", rest)?;
            WhichCpus::All
        }
        [word, ..] if word.starts_with('-') => return Err(option("registers", word)),
        [word, rest @ ..] => {
            no_more("registers", rest)?;
            let number = sum(word).map_err(|problem| misused("info registers", &problem))?;
            WhichCpus::Number(number.cast_signed())
        }
    };
    Ok(Line::Ask(HumanCommand::Registers(which), Layout::Plain))
}

/// `/16xb 0x1000`.
fn memory(rest: &str, is_virtual: bool) -> Result<Line, String> {
    let rest = rest.trim_start();
    let (format, expression) = match rest.strip_prefix('/') {
        None => ("", rest),
        Some(rest) => rest.split_at(rest.find(char::is_whitespace).unwrap_or(rest.len())),
    };
    let digits = format.find(|c: char| !c.is_ascii_digit()).unwrap_or(format.len());
    let (digits, letters) = format.split_at(digits);
    let count = if digits.is_empty() {
        1
    } else {
        digits.parse().map_err(|_| format!("invalid count: '{digits}'"))?
    };
    let (mut style, mut item_bytes) = (Style::Hexadecimal, 4);
    for letter in letters.chars() {
        match letter {
            'x' => style = Style::Hexadecimal,
            'o' => style = Style::Octal,
            'd' => style = Style::Signed,
            'u' => style = Style::Unsigned,
            'c' => style = Style::Character,
            'b' => item_bytes = 1,
            'h' => item_bytes = 2,
            'w' => item_bytes = 4,
            'g' | 'L' => item_bytes = 8,
            'i' => return Err("instructions cannot be shown: there is no disassembler here".into()),
            other => return Err(format!("invalid char in format: '{other}'")),
        }
    }
    if style == Style::Character {
        item_bytes = 1;
    }
    let address = address(expression)?;
    let length = u32::checked_mul(count, item_bytes)
        .filter(|length| *length as usize <= MAX_READ_BYTES)
        .ok_or_else(|| format!("at most {MAX_READ_BYTES} bytes can be shown at a time"))?;
    let layout = MemoryLayout {
        address,
        count,
        style,
        item_bytes,
    };
    if length == 0 {
        return Ok(Line::Answer(String::new()));
    }
    let command = HumanCommand::Memory {
        is_virtual,
        address,
        length,
    };
    Ok(Line::Ask(command, Layout::Memory(layout)))
}

/// The one expression that is left on the line.
fn address(text: &str) -> Result<u64, String> {
    sum(text.trim())
}

/// Numbers (decimal, 0x, octal with a leading 0) with `+` and `-` before and between them, modulo 2⁶⁴.
fn sum(text: &str) -> Result<u64, String> {
    let (mut total, mut sign, mut wants_number) = (0_u64, 1_u64, true);
    let mut rest = text;
    loop {
        rest = rest.trim_start();
        let Some(first) = rest.chars().next() else { break };
        match first {
            '+' | '-' => {
                if !wants_number {
                    sign = 1;
                }
                if first == '-' {
                    sign = sign.wrapping_neg();
                }
                wants_number = true;
                rest = &rest[1..];
            }
            '0'..='9' if wants_number => {
                let end = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
                let (number, after) = rest.split_at(end);
                total = total.wrapping_add(sign.wrapping_mul(number_of(number)?));
                wants_number = false;
                rest = after;
            }
            other => return Err(format!("invalid char '{other}' in expression")),
        }
    }
    if wants_number {
        return Err("unexpected end of expression".into());
    }
    Ok(total)
}

fn number_of(text: &str) -> Result<u64, String> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if text.len() > 1 && text.starts_with('0') => (&text[1..], 8),
        None => (text, 10),
    };
    if let Some(wrong) = digits.chars().find(|c| !c.is_digit(radix)) {
        return Err(format!("invalid char '{wrong}' in expression"));
    }
    u64::from_str_radix(digits, radix).map_err(|_| "number too large".into())
}

#[cfg(test)]
#[path = "parse_test.rs"]
mod tests;
