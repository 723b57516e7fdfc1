//! The command line is a list of tests: `test=NAME [key=value …] [test=NAME …]`. A key belongs to the test before it.
//! After the last one the machine is powered off.
//!
//! Every test ends with `BHG: ok NAME …` or `BHG: FAIL NAME …`; the last line is `BHG: done failures=N`.

use crate::failure::Failure;
use crate::{cases, println, start_info};

/// The words that belong to one test.
#[derive(Clone, Copy)]
pub struct Arguments<'a> {
    words: &'a str,
}

impl<'a> Arguments<'a> {
    /// A value as text.
    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.words
            .split_ascii_whitespace()
            .find_map(|word| word.split_once('=').filter(|(name, _)| *name == key))
            .map(|(_, value)| value)
    }

    /// A value as a number, decimal or 0x.
    pub fn number(&self, key: &str, otherwise: u64) -> Result<u64, Failure> {
        let Some(text) = self.text(key) else {
            return Ok(otherwise);
        };
        let number = match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        number.map_err(|_| crate::failure::failure("argument is not a number"))
    }
}

/// Runs what the command line says.
pub fn run() {
    let mut buffer = [0; 4096];
    let length = start_info::command_line(&mut buffer);
    let line = core::str::from_utf8(&buffer[..length]).unwrap_or("");
    let mut failures = 0;
    let mut rest = line;
    while let Some(start) = rest.find("test=") {
        let after = &rest[start + 5..];
        let end = after.find("test=").unwrap_or(after.len());
        let name = after.split_ascii_whitespace().next().unwrap_or("");
        let arguments = Arguments { words: &after[..end] };
        rest = &after[end..];
        match cases::run(name, arguments) {
            Ok(()) => println!("ok {name}"),
            Err(error) => {
                failures += 1;
                println!("FAIL {name} {error}");
            }
        }
    }
    println!("done failures={failures}");
}
