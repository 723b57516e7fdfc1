//! `key=value,key=value`: QEMU's syntax inside an option, checked against the keys that the option declares.
//!
//! - A comma inside a value is written twice.
//! - The first value may stand without its key, where the option has an implied one.
//! - A switch may stand alone (`server`), or with `no` before it (`nowait`).
//! - A key that comes twice: the last one counts.

use super::Invocation;
use super::error::{UsageError, quote};
use super::given::{Given, switch};
use super::suggest::hint;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// The keys of an option.
pub(super) struct Keys {
    /// The key of a first value that stands alone.
    pub(super) implied: Option<&'static str>,
    /// What the value `help` asks for.
    pub(super) list: Option<fn() -> Invocation>,
    /// All keys, the implied one too.
    pub(super) keys: &'static [Key],
}

/// One key.
pub(super) struct Key {
    /// Its name.
    pub(super) name: &'static str,
    /// Its values.
    pub(super) takes: Takes,
}

/// What values a key has.
pub(super) enum Takes {
    /// Any of this kind; the option's handler reads it.
    Value(Kind),
    /// On or off; the option's handler reads it.
    Switch,
    /// What is so anyway: only these words, and they change nothing. The text says why there are no others.
    Only(&'static [&'static str], &'static str),
}

/// What a value is: for query-command-line-options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Text, a word, a file name.
    Text,
    /// A whole number.
    Number,
    /// A size in bytes.
    Size,
}

/// A key with a value for the handler.
pub(super) const fn value(name: &'static str) -> Key {
    key(name, Takes::Value(Kind::Text))
}

/// A key with a number for the handler.
pub(super) const fn number(name: &'static str) -> Key {
    key(name, Takes::Value(Kind::Number))
}

/// A key with a size for the handler.
pub(super) const fn size(name: &'static str) -> Key {
    key(name, Takes::Value(Kind::Size))
}

const fn key(name: &'static str, takes: Takes) -> Key {
    Key { name, takes }
}

/// A switch for the handler.
pub(super) const fn on_off(name: &'static str) -> Key {
    key(name, Takes::Switch)
}

/// A key that only takes what is so anyway.
pub(super) const fn only(name: &'static str, words: &'static [&'static str], why: &'static str) -> Key {
    key(name, Takes::Only(words, why))
}

/// An option's keys and values, all of them known and the fixed ones checked.
pub(super) struct Pairs {
    /// The whole option.
    pub(super) whole: Given,
    pairs: Vec<(&'static str, Given)>,
}

impl Pairs {
    /// Takes `text`, a part of the value of `whole`, apart.
    pub(super) fn parse(whole: &Given, text: &OsStr, keys: &'static Keys) -> Result<Self, UsageError> {
        let mut pairs = Vec::new();
        let mut rest = text.as_bytes();
        if rest.is_empty() {
            return Err(whole.refuse("a value is missing"));
        }
        while !rest.is_empty() {
            let implied = keys.implied.filter(|_| pairs.is_empty());
            let piece = Piece::cut(rest, implied);
            let shown = quote(OsStr::from_bytes(&rest[..piece.length]));
            rest = &rest[piece.length..];
            rest = rest.strip_prefix(b",").unwrap_or(rest);
            pairs.push(keys.accept(&whole.option, shown, piece)?);
        }
        Ok(Self {
            whole: whole.clone(),
            pairs,
        })
    }

    /// Nothing but what is in `whole` beside them.
    pub(super) fn none(whole: &Given) -> Self {
        Self {
            whole: whole.clone(),
            pairs: Vec::new(),
        }
    }

    /// The value of a key.
    pub(super) fn get(&self, key: &str) -> Option<&Given> {
        self.pairs
            .iter()
            .rev()
            .find(|(name, _)| *name == key)
            .map(|(_, given)| given)
    }

    /// The value of a key that must be there; `how` shows what to write.
    pub(super) fn require(&self, key: &str, how: &str) -> Result<&Given, UsageError> {
        self.get(key)
            .ok_or_else(|| self.whole.refuse(format!("{key} is missing: {how}")))
    }

    /// The value of a key as a file name.
    pub(super) fn path(&self, key: &str) -> Result<Option<PathBuf>, UsageError> {
        self.get(key).map(Given::path).transpose()
    }

    /// The value of a switch.
    pub(super) fn switch(&self, key: &str) -> Result<Option<bool>, UsageError> {
        self.get(key).map(Given::switch).transpose()
    }
}

/// One piece between single commas.
struct Piece<'a> {
    key: PieceKey<'a>,
    value: OsString,
    /// Bytes of the text that it takes.
    length: usize,
}

enum PieceKey<'a> {
    Implied(&'static str),
    Named(&'a [u8]),
    Alone(&'a [u8]),
}

impl<'a> Piece<'a> {
    fn cut(text: &'a [u8], implied: Option<&'static str>) -> Self {
        let key_end = text
            .iter()
            .position(|byte| matches!(byte, b'=' | b','))
            .unwrap_or(text.len());
        let key = &text[..key_end];
        let has_value = text.get(key_end) == Some(&b'=');
        match implied {
            // No key holds a slash: what comes before the `=` belongs to a file name.
            Some(implied) if !has_value || key.contains(&b'/') => {
                let (value, length) = unescape(text);
                Self {
                    key: PieceKey::Implied(implied),
                    value,
                    length,
                }
            }
            _ if has_value => {
                let (value, length) = unescape(&text[key_end + 1..]);
                Self {
                    key: PieceKey::Named(key),
                    value,
                    length: key_end + 1 + length,
                }
            }
            _ => Self {
                key: PieceKey::Alone(key),
                value: OsString::new(),
                length: key_end,
            },
        }
    }
}

/// The value up to the next single comma, and how many bytes of the text it takes.
pub(super) fn unescape(text: &[u8]) -> (OsString, usize) {
    let mut value = Vec::new();
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        if byte == b',' {
            if text.get(at + 1) != Some(&b',') {
                break;
            }
            at += 1;
        }
        value.push(byte);
        at += 1;
    }
    (OsString::from_vec(value), at)
}

impl Keys {
    fn find(&self, name: &[u8]) -> Option<&'static Key> {
        self.keys.iter().find(|key| key.name.as_bytes() == name)
    }

    fn accept(&self, option: &str, shown: String, piece: Piece<'_>) -> Result<(&'static str, Given), UsageError> {
        let mut given = Given {
            option: option.to_owned(),
            shown,
            value: piece.value,
        };
        let (name, is_implied, is_alone) = match piece.key {
            PieceKey::Implied(name) => (name.as_bytes(), true, false),
            PieceKey::Named(name) => (name, false, false),
            PieceKey::Alone(name) => (name, false, true),
        };
        let key = match self.find(name) {
            Some(key) if is_alone => {
                if matches!(key.takes, Takes::Value(_)) {
                    return Err(given.refuse(format!("{0} needs a value: {0}=…", key.name)));
                }
                given.value = "on".into();
                key
            }
            Some(key) => key,
            None => {
                let negated = name
                    .strip_prefix(b"no")
                    .filter(|_| is_alone)
                    .and_then(|name| self.find(name));
                given.value = "off".into();
                negated
                    .filter(|key| !matches!(key.takes, Takes::Value(_)))
                    .ok_or_else(|| given.refuse(self.unknown(name)))?
            }
        };
        match key.takes {
            Takes::Value(_) => {}
            Takes::Switch => {
                given.switch()?;
            }
            Takes::Only(words, why) => {
                if !words.iter().any(|word| same_word(&given.value, word)) {
                    let prefix = if is_implied {
                        String::new()
                    } else {
                        format!("{}=", key.name)
                    };
                    return Err(given.refuse(format!("{why}: only {prefix}{} is possible", words.join("|"))));
                }
            }
        }
        Ok((key.name, given))
    }

    fn unknown(&self, name: &[u8]) -> String {
        let name = quote(OsStr::from_bytes(name));
        let known = self.keys.iter().map(|key| key.name);
        let otherwise = || {
            let for_people = self.keys.iter().filter(|key| !matches!(key.takes, Takes::Only(..)));
            let names: Vec<&str> = for_people.map(|key| key.name).collect();
            let names = if names.is_empty() {
                known.clone().collect()
            } else {
                names
            };
            format!("; the keys are {}", names.join(", "))
        };
        format!("there is no key '{name}'{}", hint(&name, "", known.clone(), otherwise))
    }
}

/// Equal, or the same switch in another spelling.
fn same_word(value: &OsStr, word: &str) -> bool {
    value == word || switch(value).is_some_and(|on| switch(OsStr::new(word)) == Some(on))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    static KEYS: Keys = Keys {
        implied: Some("path"),
        list: None,
        keys: &[
            value("path"),
            value("id"),
            on_off("server"),
            on_off("wait"),
            only("tight", &["on"], "it is tight"),
        ],
    };

    fn parse(text: &[u8]) -> Result<Vec<(&'static str, Vec<u8>)>, String> {
        let whole = Given::whole("-x", OsStr::from_bytes(text).to_owned());
        let pairs = Pairs::parse(&whole, &whole.value, &KEYS).map_err(|error| error.to_string())?;
        Ok(pairs
            .pairs
            .into_iter()
            .map(|(key, given)| (key, given.value.into_vec()))
            .collect())
    }

    #[test]
    fn pieces_are_cut_as_qemu_cuts_them() {
        type Expected = &'static [(&'static str, &'static [u8])];
        let cases: [(&[u8], Expected); 11] = [
            (b"/a", &[("path", b"/a")]),
            (b"/a,,b,id=c", &[("path", b"/a,b"), ("id", b"c")]),
            (b"/a=b,id=c", &[("path", b"/a=b"), ("id", b"c")]),
            (b"path=/a,,", &[("path", b"/a,")]),
            (b"path=/a,", &[("path", b"/a")]),
            (
                b"/a,server,nowait",
                &[("path", b"/a"), ("server", b"on"), ("wait", b"off")],
            ),
            (
                b"/a,server=on,wait=off",
                &[("path", b"/a"), ("server", b"on"), ("wait", b"off")],
            ),
            (b"id=a=b", &[("id", b"a=b")]),
            (b"id=", &[("id", b"")]),
            (b"path=\xff,tight", &[("path", b"\xff"), ("tight", b"on")]),
            (b"/a,tight=yes", &[("path", b"/a"), ("tight", b"yes")]),
        ];
        for (text, expected) in cases {
            let expected: Vec<(&str, Vec<u8>)> = expected.iter().map(|(key, value)| (*key, value.to_vec())).collect();
            assert_eq!(parse(text), Ok(expected), "{}", text.escape_ascii());
        }
    }

    #[test]
    fn what_is_not_declared_is_named() {
        let cases: [(&[u8], &str); 9] = [
            (b"", "-x '': a value is missing"),
            (
                b"/a,sever=on",
                "-x sever=on: there is no key 'sever'; did you mean server?",
            ),
            (
                b"/a,foobar=1",
                "-x foobar=1: there is no key 'foobar'; the keys are path, id, server, wait",
            ),
            (
                b"/a,=1",
                "-x =1: there is no key ''; the keys are path, id, server, wait",
            ),
            (b"/a,id", "-x id: id needs a value: id=…"),
            (
                b"/a,noid",
                "-x noid: there is no key 'noid'; the keys are path, id, server, wait",
            ),
            (b"/a,wait=perhaps", "-x wait=perhaps: this is a switch: on or off"),
            (b"/a,tight=off", "-x tight=off: it is tight: only tight=on is possible"),
            (b"/a,notight", "-x notight: it is tight: only tight=on is possible"),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text).unwrap_err(), expected);
        }
    }

    /// Pairs as they are written: no value without its key, commas doubled.
    fn written(pairs: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut text = Vec::new();
        for (key, value) in pairs {
            if !text.is_empty() {
                text.push(b',');
            }
            text.extend_from_slice(key.as_bytes());
            text.push(b'=');
            for byte in value {
                text.push(*byte);
                if *byte == b',' {
                    text.push(b',');
                }
            }
        }
        text
    }

    fn pair() -> impl Strategy<Value = (&'static str, Vec<u8>)> {
        let switch = || prop::sample::select(vec!["on", "off", "yes", "no", "true", "false", "y", "n"]);
        prop_oneof![
            (
                prop::sample::select(vec!["path", "id"]),
                prop::collection::vec(any::<u8>(), 0..20)
            ),
            (
                prop::sample::select(vec!["server", "wait"]),
                switch().prop_map(|word| word.as_bytes().to_vec())
            ),
            (Just("tight"), Just(b"on".to_vec())),
        ]
    }

    proptest! {
        #[test]
        fn pairs_that_are_written_down_are_read_as_they_were(pairs in prop::collection::vec(pair(), 1..8)) {
            prop_assert_eq!(parse(&written(&pairs)), Ok(pairs));
        }

        /// What is read from any text means the same when it is written down.
        #[test]
        fn whatever_is_accepted_can_be_written_down(text in prop::collection::vec(
            prop_oneof![3 => prop::sample::select(b",=/noservwaitpdg".to_vec()), 1 => any::<u8>()], 0..40,
        )) {
            match parse(&text) {
                Ok(pairs) => prop_assert_eq!(parse(&written(&pairs)), Ok(pairs)),
                Err(error) => prop_assert!(error.starts_with("-x ") && !error.contains(char::is_control), "{:?}", error),
            }
        }

        #[test]
        fn arbitrary_pieces_are_pairs_or_one_line(pieces in prop::collection::vec(
            prop::sample::select(vec![
                "path", "id", "server", "noserver", "wait", "nowait", "tight", "notight", "no", "on", "off", "=", ",", ",,", "/", "é",
            ]),
            0..12,
        )) {
            let text = pieces.concat();
            match parse(text.as_bytes()) {
                Ok(pairs) => {
                    prop_assert!(!pairs.is_empty());
                    prop_assert_eq!(parse(&written(&pairs)), Ok(pairs));
                }
                Err(error) => prop_assert!(!error.contains(char::is_control), "{:?}", error),
            }
        }
    }
}
