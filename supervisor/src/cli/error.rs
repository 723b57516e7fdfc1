//! The one error of the command line: a line that names the option, its value and the way out.

use std::ffi::OsStr;
use std::fmt;

/// Longest piece of the user's text that an error quotes, in characters.
const QUOTE_CHARS: usize = 120;

/// Why a command line is refused. Displays as one line, `-m 0: the machine needs at least 1 MiB of memory`, whatever
/// the arguments hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageError {
    subject: String,
    problem: String,
}

impl UsageError {
    /// `subject` is what the user wrote, quoted; `problem` says what is wrong with it and what would be right.
    pub(super) fn new(subject: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            subject: subject.into(),
            problem: printable(&problem.into()),
        }
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.problem)
    }
}

impl std::error::Error for UsageError {}

/// Without control characters: a problem may quote what the user wrote.
fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            printable.extend(character.escape_default());
        } else {
            printable.push(character);
        }
    }
    printable
}

/// The user's text for an error message: one line, no control characters, of bounded length.
pub(super) fn quote(text: &OsStr) -> String {
    let text = text.to_string_lossy();
    let mut quoted = String::new();
    for (count, character) in text.chars().enumerate() {
        if count == QUOTE_CHARS {
            quoted.push('…');
            break;
        }
        if character.is_control() {
            quoted.extend(character.escape_default());
        } else {
            quoted.push(character);
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn an_error_stays_one_line_whatever_the_argument_holds() {
        assert_eq!(quote(OsStr::new("a\nb\u{1b}[1m")), "a\\nb\\u{1b}[1m");
        assert_eq!(quote(OsStr::from_bytes(b"a\xffb")), "a\u{fffd}b");
        assert_eq!(quote(OsStr::new(&"x".repeat(500))).chars().count(), QUOTE_CHARS + 1);
    }
}
