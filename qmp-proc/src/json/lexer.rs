//! Bytes → tokens.
//!
//! A token ends at its last byte where that can be known (strings, punctuation), otherwise at the byte after it. After a
//! byte that no token can have, input is dropped up to the next structural character, control character other than tab,
//! or FE/FF byte, none of which can stand inside a token.

use super::{MAX_TOKEN_BYTES, Value, number};

/// Longest piece of client text that an error quotes, bytes.
const MAX_QUOTED_BYTES: usize = 200;
/// The token buffer grows by at most this much at a time, so that a 64 MiB string does not take twice its size.
const MAX_GROWTH_BYTES: usize = 4 << 20;

/// One token.
#[derive(Debug, PartialEq)]
pub enum Token {
    /// `{`
    OpenBrace,
    /// `}`
    CloseBrace,
    /// `[`
    OpenBracket,
    /// `]`
    CloseBracket,
    /// `:`
    Colon,
    /// `,`
    Comma,
    /// A number, `true`, `false`, `null` or a string; or what is wrong with it, which is an error only where a value may
    /// stand.
    Value(Result<Value, String>),
}

/// What the lexer found.
#[derive(Debug, PartialEq)]
pub enum Lexed {
    /// A token and its length in bytes.
    Token(Token, usize),
    /// Bytes that begin no token, as text.
    Stray(String),
    /// A token longer than a whole message may be.
    TooLong,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Start,
    Recovery,
    Keyword,
    Sign,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
    Text(u8),
    Escape(u8),
}

/// What a byte does.
enum Next {
    /// It belongs to the token, which goes on.
    More(State),
    /// It belongs to nothing.
    Skip(State),
    /// It is the token's last byte.
    Last,
    /// The token ended before it.
    Ended,
    /// Recovery ends before it.
    Resume,
    /// No token has it here.
    Stray,
}

/// The lexer's state between two bytes.
#[derive(Debug)]
pub struct Lexer {
    state: State,
    text: Vec<u8>,
}

impl Default for Lexer {
    fn default() -> Self {
        Self {
            state: State::Start,
            text: Vec::new(),
        }
    }
}

impl Lexer {
    /// Reads from the front of `input` up to the end of a token or error; `None` when all of `input` is read.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Lexed> {
        loop {
            if let State::Text(quote) = self.state {
                let plain = input.iter().take_while(|byte| is_plain(**byte, quote)).count();
                let room = MAX_TOKEN_BYTES + 1 - self.text.len();
                let (run, rest) = input.split_at(plain.min(room));
                self.append(run);
                *input = rest;
                if self.text.len() > MAX_TOKEN_BYTES {
                    return Some(self.give_up());
                }
            }
            let (&byte, rest) = input.split_first()?;
            match step(self.state, byte) {
                Next::More(state) => {
                    *input = rest;
                    self.append(&[byte]);
                    self.state = state;
                    if self.text.len() > MAX_TOKEN_BYTES {
                        return Some(self.give_up());
                    }
                }
                Next::Skip(state) => {
                    *input = rest;
                    self.state = state;
                }
                Next::Last => {
                    *input = rest;
                    self.append(&[byte]);
                    return Some(self.finish());
                }
                Next::Ended => return Some(self.finish()),
                Next::Resume => self.state = State::Start,
                Next::Stray => {
                    *input = rest;
                    self.append(&[byte]);
                    self.state = State::Recovery;
                    let text = quoted(&self.text);
                    self.clear();
                    return Some(Lexed::Stray(text));
                }
            }
        }
    }

    fn append(&mut self, bytes: &[u8]) {
        let free = self.text.capacity() - self.text.len();
        if free < bytes.len() {
            let growth = self.text.capacity().clamp(64, MAX_GROWTH_BYTES).max(bytes.len());
            self.text.reserve_exact(growth);
        }
        self.text.extend_from_slice(bytes);
    }

    fn clear(&mut self) {
        self.text.clear();
        self.text.shrink_to(4096);
    }

    fn give_up(&mut self) -> Lexed {
        self.state = State::Start;
        self.clear();
        Lexed::TooLong
    }

    fn finish(&mut self) -> Lexed {
        let length = self.text.len();
        let state = std::mem::replace(&mut self.state, State::Start);
        let token = match state {
            State::Text(_) => Token::Value(self.take_string()),
            State::Keyword => Token::Value(match &self.text[..] {
                b"null" => Ok(Value::Null),
                b"true" => Ok(Value::Bool(true)),
                b"false" => Ok(Value::Bool(false)),
                other => Err(format!("invalid keyword '{}'", quoted(other))),
            }),
            State::Zero | State::Digits => Token::Value(Ok(number::integer(ascii(&self.text)))),
            State::Fraction | State::ExponentDigits => Token::Value(Ok(number::double(ascii(&self.text)))),
            _ => match self.text.first() {
                Some(b'{') => Token::OpenBrace,
                Some(b'}') => Token::CloseBrace,
                Some(b'[') => Token::OpenBracket,
                Some(b']') => Token::CloseBracket,
                Some(b':') => Token::Colon,
                _ => Token::Comma,
            },
        };
        self.clear();
        Lexed::Token(token, length)
    }

    /// Takes the string out of the token buffer: a copy of a short one, the buffer itself of a long one.
    fn take_string(&mut self) -> Result<Value, String> {
        let end = unescape(&mut self.text)?;
        let decoded = if end > 4096 {
            let mut text = std::mem::take(&mut self.text);
            text.truncate(end);
            String::from_utf8(text)
        } else {
            String::from_utf8(self.text[..end].to_vec())
        };
        decoded
            .map(|text| Value::String(text.into_boxed_str()))
            .map_err(|_| INVALID_UTF8.to_owned())
    }
}

const INVALID_UTF8: &str = "invalid UTF-8 sequence in string";

/// A byte that stands for itself inside a string.
fn is_plain(byte: u8, quote: u8) -> bool {
    matches!(byte, 0x20..=0xFD) && byte != quote && byte != b'\\'
}

fn step(state: State, byte: u8) -> Next {
    use State::*;
    match state {
        Start => match byte {
            b' ' | b'\t' | b'\r' | b'\n' => Next::Skip(Start),
            b'"' | b'\'' => Next::More(Text(byte)),
            b'{' | b'}' | b'[' | b']' | b':' | b',' => Next::Last,
            b'a'..=b'z' => Next::More(Keyword),
            b'-' => Next::More(Sign),
            b'0' => Next::More(Zero),
            b'1'..=b'9' => Next::More(Digits),
            _ => Next::Stray,
        },
        Recovery => match byte {
            b'{' | b'}' | b'[' | b']' | b':' | b',' | 0xFE | 0xFF => Next::Resume,
            b'\t' => Next::Skip(Recovery),
            0..0x20 => Next::Resume,
            _ => Next::Skip(Recovery),
        },
        Keyword => match byte {
            b'a'..=b'z' => Next::More(Keyword),
            _ => Next::Ended,
        },
        Sign => match byte {
            b'0' => Next::More(Zero),
            b'1'..=b'9' => Next::More(Digits),
            _ => Next::Stray,
        },
        Zero => match byte {
            b'0'..=b'9' => Next::Stray,
            b'.' => Next::More(Point),
            b'e' | b'E' => Next::More(Exponent),
            _ => Next::Ended,
        },
        Digits => match byte {
            b'0'..=b'9' => Next::More(Digits),
            b'.' => Next::More(Point),
            b'e' | b'E' => Next::More(Exponent),
            _ => Next::Ended,
        },
        Point => match byte {
            b'0'..=b'9' => Next::More(Fraction),
            _ => Next::Stray,
        },
        Fraction => match byte {
            b'0'..=b'9' => Next::More(Fraction),
            b'e' | b'E' => Next::More(Exponent),
            _ => Next::Ended,
        },
        Exponent => match byte {
            b'+' | b'-' => Next::More(ExponentSign),
            b'0'..=b'9' => Next::More(ExponentDigits),
            _ => Next::Stray,
        },
        ExponentSign => match byte {
            b'0'..=b'9' => Next::More(ExponentDigits),
            _ => Next::Stray,
        },
        ExponentDigits => match byte {
            b'0'..=b'9' => Next::More(ExponentDigits),
            _ => Next::Ended,
        },
        Text(quote) => match byte {
            b'\\' => Next::More(Escape(quote)),
            _ if byte == quote => Next::Last,
            0x20..=0xFD => Next::More(Text(quote)),
            _ => Next::Stray,
        },
        Escape(quote) => match byte {
            0x20..=0xFD => Next::More(Text(quote)),
            _ => Next::Stray,
        },
    }
}

fn ascii(text: &[u8]) -> &str {
    // Number tokens hold digits, signs, points and exponents only.
    std::str::from_utf8(text).unwrap_or("")
}

/// Client text for an error message: up to its first NUL, of bounded length, valid.
fn quoted(text: &[u8]) -> String {
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    String::from_utf8_lossy(&text[..end.min(MAX_QUOTED_BYTES)]).into_owned()
}

/// Decodes a quoted string in place (no escape is shorter than what it stands for) and returns the decoded length.
fn unescape(text: &mut [u8]) -> Result<usize, String> {
    let end = text.len() - 1;
    let (mut from, mut to) = (1, 0);
    while from < end {
        let byte = text[from];
        if byte == b'\\' {
            let start = from;
            // The lexer never ends a string inside an escape.
            let escape = text[from + 1];
            from += 2;
            let plain = match escape {
                b'"' | b'\'' | b'\\' | b'/' => escape,
                b'b' => 0x08,
                b'f' => 0x0C,
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                b'u' => {
                    let code = unicode_escape(text, &mut from).filter(|code| !is_noncharacter(*code));
                    let Some(character) = code.and_then(char::from_u32) else {
                        let quote = &text[start..text.len().min(start + 6)];
                        return Err(format!("{} is not a valid Unicode character", quoted(quote)));
                    };
                    to += character.encode_utf8(&mut text[to..]).len();
                    continue;
                }
                _ => return Err("invalid escape sequence in string".to_owned()),
            };
            text[to] = plain;
            to += 1;
        } else if byte < 0x80 {
            text[to] = byte;
            (from, to) = (from + 1, to + 1);
        } else {
            let (code, length) = multibyte(&text[from..end]).ok_or(INVALID_UTF8)?;
            from += length;
            to += code.encode_utf8(&mut text[to..]).len();
        }
    }
    Ok(to)
}

/// Reads the four digits at `at` and, after a leading surrogate, the trailing one with its `\u`. Moves `at` behind what it
/// used.
fn unicode_escape(text: &[u8], at: &mut usize) -> Option<u32> {
    let code = four_digits(text, *at)?;
    *at += 4;
    if (0xD800..0xDC00).contains(&code) && text.get(*at..*at + 2) == Some(b"\\u") {
        let trailing = four_digits(text, *at + 2).filter(|code| (0xDC00..0xE000).contains(code))?;
        *at += 6;
        return Some(0x10000 + ((code & 0x3FF) << 10) + (trailing & 0x3FF));
    }
    Some(code)
}

fn four_digits(text: &[u8], at: usize) -> Option<u32> {
    text.get(at..at + 4)?
        .iter()
        .try_fold(0, |code, digit| Some(code << 4 | char::from(*digit).to_digit(16)?))
}

/// Decodes the character at the front of `bytes`, which is not ASCII: UTF-8, and C0 80 for U+0000.
fn multibyte(bytes: &[u8]) -> Option<(char, usize)> {
    if bytes.starts_with(&[0xC0, 0x80]) {
        return Some(('\0', 2));
    }
    let length = match bytes[0] {
        0xC2..=0xDF => 2,
        0xE0..=0xEF => 3,
        0xF0..=0xF4 => 4,
        _ => return None,
    };
    let character = std::str::from_utf8(bytes.get(..length)?).ok()?.chars().next()?;
    (!is_noncharacter(character.into())).then_some((character, length))
}

/// Code points that Unicode sets aside for never being characters.
fn is_noncharacter(code: u32) -> bool {
    (0xFDD0..=0xFDEF).contains(&code) || code & 0xFFFE == 0xFFFE
}
