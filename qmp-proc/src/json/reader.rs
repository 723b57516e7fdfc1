//! Tokens → values, with the limits and the recovery after errors.
//!
//! A message ends when its braces and brackets are balanced, or no longer can be. An error in its structure is reported
//! there, the first one found; a byte that begins no token, or a limit, ends the message at once. What remains of a message
//! over a limit is dropped up to its balance or the end of the line. Nothing recurses: open containers are on an explicit
//! stack.

use super::lexer::{Lexed, Lexer, Token};
use super::{MAX_NESTING, MAX_TOKEN_BYTES, MAX_TOKENS, Object, Value};
use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

/// How many errors are reported between two line ends or good messages. A stream of closing brackets, or of FF bytes, is
/// one error a byte; beyond this number they are dropped silently.
pub const MAX_ERRORS_IN_A_ROW: usize = 16;

/// From this many members on, an object that is being read has an index of its names.
const INDEX_FROM: usize = 16;

/// What is wrong with a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SyntaxError(pub String);

/// Reads messages from a stream of bytes.
#[derive(Debug, Default)]
pub struct Reader {
    lexer: Lexer,
    braces: i64,
    brackets: i64,
    tokens: usize,
    token_bytes: usize,
    builder: Builder,
    /// The message is over a limit, which has been reported.
    dropping: bool,
    errors_in_a_row: usize,
}

impl Reader {
    /// Reads from the front of `input` up to the end of a message; `None` when all of `input` is read.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, SyntaxError>> {
        loop {
            let before = *input;
            let lexed = self.lexer.next(input);
            if before[..before.len() - input.len()].contains(&b'\n') {
                self.errors_in_a_row = 0;
                if self.dropping {
                    self.reset();
                }
            }
            let result = match lexed? {
                Lexed::Token(token, bytes) => match self.token(token, bytes) {
                    Some(result) => result,
                    None => continue,
                },
                Lexed::Stray(text) => {
                    self.reset();
                    Err(parse_error(&format!("stray '{text}'")))
                }
                Lexed::TooLong if self.dropping => continue,
                Lexed::TooLong => self.over_limit("token size"),
            };
            if result.is_ok() {
                self.errors_in_a_row = 0;
                return Some(result);
            }
            self.errors_in_a_row += 1;
            if self.errors_in_a_row <= MAX_ERRORS_IN_A_ROW {
                return Some(result);
            }
        }
    }

    /// Takes a token; returns the message that it ends.
    fn token(&mut self, token: Token, bytes: usize) -> Option<Result<Value, SyntaxError>> {
        match token {
            Token::OpenBrace => self.braces += 1,
            Token::CloseBrace => self.braces -= 1,
            Token::OpenBracket => self.brackets += 1,
            Token::CloseBracket => self.brackets -= 1,
            _ => {}
        }
        let is_open = (self.braces > 0 || self.brackets > 0) && self.braces >= 0 && self.brackets >= 0;
        if self.dropping {
            if !is_open {
                self.reset();
            }
            return None;
        }
        if self.token_bytes + bytes + 1 > MAX_TOKEN_BYTES {
            return Some(self.over_limit("token size"));
        }
        if self.tokens + 1 > MAX_TOKENS {
            return Some(self.over_limit("token count"));
        }
        if self.braces + self.brackets > MAX_NESTING {
            return Some(self.over_limit("nesting depth"));
        }
        self.tokens += 1;
        self.token_bytes += bytes;
        self.builder.token(token);
        if is_open {
            return None;
        }
        let result = self.builder.finish();
        self.reset();
        Some(result)
    }

    fn over_limit(&mut self, what: &str) -> Result<Value, SyntaxError> {
        self.builder.reset();
        self.dropping = true;
        Err(SyntaxError(format!("JSON {what} limit exceeded")))
    }

    fn reset(&mut self) {
        self.braces = 0;
        self.brackets = 0;
        self.tokens = 0;
        self.token_bytes = 0;
        self.dropping = false;
        self.builder.reset();
    }
}

fn parse_error(what: &str) -> SyntaxError {
    SyntaxError(format!("JSON parse error, {what}"))
}

/// What may come next.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
enum Expect {
    /// A value.
    #[default]
    Value,
    /// A value or the end of the array that has just begun.
    FirstItem,
    /// A name or the end of the object that has just begun.
    FirstName,
    /// A name.
    Name,
    /// The colon after a name.
    Colon,
    /// A comma or the end of the innermost container.
    Separator,
}

/// An open container.
#[derive(Debug)]
enum Open {
    Array(Vec<Value>),
    Object(OpenObject),
}

#[derive(Debug, Default)]
struct OpenObject {
    entries: Vec<(Box<str>, Value)>,
    /// The name whose value comes next.
    name: Option<Box<str>>,
    /// Hashes of the names, once there are many.
    index: HashSet<u64, PlainHash>,
}

impl OpenObject {
    /// Whether there is a member of this name already; remembers the name for the next question.
    fn is_duplicate(&mut self, name: &str, keys: &RandomState) -> bool {
        let listed = |entries: &[(Box<str>, Value)]| entries.iter().any(|(other, _)| **other == *name);
        if self.entries.len() < INDEX_FROM {
            return listed(&self.entries);
        }
        if self.index.is_empty() {
            self.index
                .extend(self.entries.iter().map(|(name, _)| keys.hash_one(&**name)));
        }
        // Two names of one hash are practically unknown, so the scan is rare.
        !self.index.insert(keys.hash_one(name)) && listed(&self.entries)
    }
}

/// The index's keys are hashes already.
#[derive(Debug, Default, Clone)]
struct PlainHash;
#[derive(Default)]
struct PlainHasher(u64);
impl BuildHasher for PlainHash {
    type Hasher = PlainHasher;
    fn build_hasher(&self) -> PlainHasher {
        PlainHasher(0)
    }
}
impl std::hash::Hasher for PlainHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0 << 8 | u64::from(*byte);
        }
    }
    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

/// Builds one value from tokens.
#[derive(Debug, Default)]
struct Builder {
    stack: Vec<Open>,
    expect: Expect,
    done: Option<Value>,
    error: Option<String>,
    /// Secret keys against names chosen to collide. Made with the reader, before sealing: the keys come from the kernel.
    keys: RandomState,
}

impl Builder {
    fn token(&mut self, token: Token) {
        if self.error.is_some() {
            return;
        }
        if let Err(what) = self.accept(token) {
            // Only the count of braces matters from here on.
            self.stack.clear();
            self.error = Some(what);
        }
    }

    fn finish(&mut self) -> Result<Value, SyntaxError> {
        match (self.error.take(), self.done.take()) {
            (None, Some(value)) => Ok(value),
            (error, _) => Err(parse_error(error.as_deref().unwrap_or("premature EOI"))),
        }
    }

    fn reset(&mut self) {
        self.stack.clear();
        self.expect = Expect::Value;
        self.done = None;
        self.error = None;
    }

    fn accept(&mut self, token: Token) -> Result<(), String> {
        let in_array = matches!(self.stack.last(), Some(Open::Array(_)));
        match (self.expect, token) {
            (Expect::Separator, Token::Comma) => {
                self.expect = if in_array { Expect::Value } else { Expect::Name };
            }
            (Expect::Separator, Token::CloseBracket) if in_array => return self.close(),
            (Expect::Separator, Token::CloseBrace) if !in_array => return self.close(),
            (Expect::Separator, _) => {
                let container = if in_array { "list" } else { "dict" };
                return Err(format!("expected separator in {container}"));
            }
            (Expect::Colon, Token::Colon) => self.expect = Expect::Value,
            (Expect::Colon, _) => return Err("missing : in object pair".to_owned()),
            (Expect::FirstItem, Token::CloseBracket) | (Expect::FirstName, Token::CloseBrace) => return self.close(),
            (_, Token::OpenBrace) => {
                self.stack.push(Open::Object(OpenObject::default()));
                self.expect = Expect::FirstName;
            }
            (_, Token::OpenBracket) => {
                self.stack.push(Open::Array(Vec::new()));
                self.expect = Expect::FirstItem;
            }
            (_, Token::Value(value)) => return self.value(value?),
            _ => return Err("expecting value".to_owned()),
        }
        Ok(())
    }

    /// The innermost container is complete.
    fn close(&mut self) -> Result<(), String> {
        let value = match self.stack.pop() {
            Some(Open::Array(mut items)) => {
                items.shrink_to_fit();
                Value::Array(items)
            }
            Some(Open::Object(mut object)) => {
                object.entries.shrink_to_fit();
                Value::Object(Object::from_unique(object.entries))
            }
            None => return Err("expecting value".to_owned()),
        };
        self.value(value)
    }

    /// A value is complete: it goes into the innermost container.
    fn value(&mut self, value: Value) -> Result<(), String> {
        match self.stack.last_mut() {
            None => {
                self.done = Some(value);
                return Ok(());
            }
            Some(Open::Array(items)) => items.push(value),
            Some(Open::Object(object)) => match object.name.take() {
                None => {
                    let Value::String(name) = value else {
                        return Err("key is not a string in object".to_owned());
                    };
                    object.name = Some(name);
                    self.expect = Expect::Colon;
                    return Ok(());
                }
                Some(name) => {
                    if object.is_duplicate(&name, &self.keys) {
                        return Err("duplicate key".to_owned());
                    }
                    object.entries.push((name, value));
                }
            },
        }
        self.expect = Expect::Separator;
        Ok(())
    }
}
