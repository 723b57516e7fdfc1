//! A value as the user gave it, and the readings it can have: text, path, switch, number, size.

use super::error::{UsageError, quote};
use crate::objects::spec::is_identifier;
use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;

/// A value and what to call it in an error: a whole option (`-m 512`) or one piece of it (`-drive if=ide`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Given {
    /// The option, spelled as the user did: `-m`, `--m`.
    pub(super) option: String,
    /// The piece of the command line that holds the value, quoted for an error.
    pub(super) shown: String,
    /// The value.
    pub(super) value: OsString,
}

impl Given {
    /// The whole value of an option.
    pub(super) fn whole(option: &str, value: OsString) -> Self {
        let shown = if value.is_empty() {
            "''".to_owned()
        } else {
            quote(&value)
        };
        Self {
            option: option.to_owned(),
            shown,
            value,
        }
    }

    /// The error about this value.
    pub(super) fn refuse(&self, problem: impl Into<String>) -> UsageError {
        UsageError::new(format!("{} {}", self.option, self.shown), problem)
    }

    /// The value as text.
    pub(super) fn text(&self) -> Result<&str, UsageError> {
        let text = self
            .value
            .to_str()
            .ok_or_else(|| self.refuse("this is not UTF-8 text"))?;
        if text.contains('\0') {
            return Err(self.refuse("text cannot hold a NUL byte"));
        }
        Ok(text)
    }

    /// The value as a file name, which need not be UTF-8.
    pub(super) fn path(&self) -> Result<PathBuf, UsageError> {
        checked_path(&self.value).map_err(|problem| self.refuse(problem))
    }

    /// The value as on or off, in any of QEMU's spellings.
    pub(super) fn switch(&self) -> Result<bool, UsageError> {
        switch(&self.value).ok_or_else(|| self.refuse("this is a switch: on or off"))
    }

    /// The value as a whole number in a range; `what` completes "… is a number from 1 to 255".
    pub(super) fn number<T>(&self, what: &str, range: RangeInclusive<T>) -> Result<T, UsageError>
    where
        T: FromStr + PartialOrd + Display,
    {
        self.value
            .to_str()
            .filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))
            .and_then(|text| text.parse().ok())
            .filter(|number| range.contains(number))
            .ok_or_else(|| self.refuse(format!("{what} is a number from {} to {}", range.start(), range.end())))
    }

    /// The value as a size in bytes; a number without a suffix counts MiB. Saturates.
    pub(super) fn size_bytes(&self) -> Result<u64, UsageError> {
        self.value
            .to_str()
            .and_then(size_bytes)
            .ok_or_else(|| self.refuse("a size is a number of MiB or has a suffix K, M, G or T: 512, 512M, 2G"))
    }

    /// The value as an identifier: it begins with a letter and goes on with letters, digits, `-`, `.` and `_`.
    pub(super) fn identifier(&self) -> Result<&str, UsageError> {
        self.value.to_str().filter(|text| is_identifier(text)).ok_or_else(|| {
            self.refuse("an identifier begins with a letter and goes on with letters, digits, '-', '.' and '_'")
        })
    }
}

/// A file name that the system can take.
pub(super) fn checked_path(name: &OsStr) -> Result<PathBuf, &'static str> {
    if name.is_empty() {
        return Err("the file name is empty");
    }
    if name.as_bytes().contains(&0) {
        return Err("a file name cannot hold a NUL byte");
    }
    Ok(PathBuf::from(name))
}

/// QEMU's spellings of on and off.
pub(super) fn switch(value: &OsStr) -> Option<bool> {
    match value.as_bytes() {
        b"on" | b"yes" | b"true" | b"y" => Some(true),
        b"off" | b"no" | b"false" | b"n" => Some(false),
        _ => None,
    }
}

/// `512`, `1.5G`, `64k`; saturates at `u64::MAX`.
pub(super) fn size_bytes(text: &str) -> Option<u64> {
    let digits_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits_end);
    let shift = match suffix {
        "B" | "b" => 0,
        "K" | "k" => 10,
        "" | "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        "P" | "p" => 50,
        "E" | "e" => 60,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if whole.is_empty() || fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    // A number too long for the type is too large in any unit; more than 12 places after the point change no page.
    let whole = whole.parse::<u64>().map_or(u128::from(u64::MAX), u128::from);
    let fraction = &fraction[..fraction.len().min(12)];
    let places = u32::try_from(fraction.len()).ok()?;
    let fraction = u128::from(fraction.parse::<u64>().ok()?);
    let unit = 1u128 << shift;
    let bytes = (whole * unit).saturating_add(fraction * unit / 10u128.pow(places));
    Some(u64::try_from(bytes).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_qemu() {
        for (text, expected) in [
            ("512", Some(512 << 20)),
            ("512M", Some(512 << 20)),
            ("512m", Some(512 << 20)),
            ("2G", Some(2 << 30)),
            ("1.5G", Some(3 << 29)),
            ("0.5", Some(1 << 19)),
            ("131072k", Some(128 << 20)),
            ("1T", Some(1 << 40)),
            ("4096b", Some(4096)),
            ("0", Some(0)),
            ("99999999999999999999999", Some(u64::MAX)),
            ("16E", Some(u64::MAX)),
            ("", None),
            ("G", None),
            ("-1", None),
            ("+1", None),
            ("1.", None),
            (".5", None),
            ("1.2.3", None),
            ("1GB", None),
            ("1 G", None),
            ("²", None),
        ] {
            assert_eq!(size_bytes(text), expected, "{text}");
        }
    }

    #[test]
    fn identifiers_follow_qemu() {
        for (text, ok) in [
            ("a", true),
            ("drive-0.x_y", true),
            ("", false),
            ("0a", false),
            ("_a", false),
            ("a b", false),
        ] {
            assert_eq!(is_identifier(text), ok, "{text}");
        }
    }
}
