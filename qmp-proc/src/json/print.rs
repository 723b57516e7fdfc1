//! Values → text: one line (or indented), ASCII, members in wire order, CRLF at the end.
//!
//! A [`Printer`] owns its value and writes as much as there is room for, so that an answer never exists as text in full.

use super::{Value, number};
use std::io::Write as _;

/// A value that is being printed.
pub struct Printer {
    pretty: bool,
    stack: Vec<Frame>,
    started: Option<Value>,
    /// Open containers.
    depth: usize,
    finished: bool,
}

enum Frame {
    Array {
        items: std::vec::IntoIter<Value>,
        first: bool,
    },
    Object {
        members: std::vec::IntoIter<(Box<str>, Value)>,
        first: bool,
    },
    /// The value of the member whose name has just been written.
    Member(Value),
    /// The rest of a string, from this byte on.
    Text(Box<str>, usize),
}

impl Printer {
    /// Prints `value`; with `pretty` on several lines, indented by 4.
    pub fn new(value: Value, pretty: bool) -> Self {
        Self {
            pretty,
            stack: Vec::new(),
            started: Some(value),
            depth: 0,
            finished: false,
        }
    }

    /// Appends text to `out` until it is `limit` bytes long or a little more, or the value is complete.
    pub fn fill(&mut self, out: &mut Vec<u8>, limit: usize) {
        if let Some(value) = self.started.take() {
            self.open(out, value);
        }
        while out.len() < limit && !self.finished {
            match self.stack.pop() {
                None => {
                    out.extend_from_slice(b"\r\n");
                    self.finished = true;
                }
                Some(Frame::Array { mut items, first }) => match items.next() {
                    Some(item) => {
                        self.separate(out, first);
                        self.stack.push(Frame::Array { items, first: false });
                        self.open(out, item);
                    }
                    None => self.close(out, b']'),
                },
                Some(Frame::Object { mut members, first }) => match members.next() {
                    Some((name, value)) => {
                        self.separate(out, first);
                        self.stack.push(Frame::Object { members, first: false });
                        self.stack.push(Frame::Member(value));
                        self.text(out, name);
                    }
                    None => self.close(out, b'}'),
                },
                Some(Frame::Member(value)) => {
                    out.extend_from_slice(b": ");
                    self.open(out, value);
                }
                Some(Frame::Text(text, at)) => {
                    let at = escape(out, &text, at, limit);
                    if at < text.len() {
                        self.stack.push(Frame::Text(text, at));
                    } else {
                        out.push(b'"');
                    }
                }
            }
        }
    }

    /// Whether everything has been written.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    fn open(&mut self, out: &mut Vec<u8>, value: Value) {
        match value {
            Value::Null => out.extend_from_slice(b"null"),
            Value::Bool(true) => out.extend_from_slice(b"true"),
            Value::Bool(false) => out.extend_from_slice(b"false"),
            // Writing to a Vec cannot fail.
            Value::Int(int) => drop(write!(out, "{int}")),
            Value::Uint(uint) => drop(write!(out, "{uint}")),
            Value::Double(double) => number::print_double(out, double),
            Value::String(text) => self.text(out, text),
            Value::Array(items) => {
                out.push(b'[');
                self.depth += 1;
                self.stack.push(Frame::Array {
                    items: items.into_iter(),
                    first: true,
                });
            }
            Value::Object(object) => {
                out.push(b'{');
                self.depth += 1;
                self.stack.push(Frame::Object {
                    members: object.into_wire_order().into_iter(),
                    first: true,
                });
            }
        }
    }

    fn close(&mut self, out: &mut Vec<u8>, bracket: u8) {
        self.depth -= 1;
        // Also between the brackets of an empty container, as servers have always done.
        if self.pretty {
            self.new_line(out);
        }
        out.push(bracket);
    }

    fn separate(&self, out: &mut Vec<u8>, first: bool) {
        if !first {
            out.push(b',');
        }
        if self.pretty {
            self.new_line(out);
        } else if !first {
            out.push(b' ');
        }
    }

    fn new_line(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"\r\n");
        out.resize(out.len() + 4 * self.depth, b' ');
    }

    fn text(&mut self, out: &mut Vec<u8>, text: Box<str>) {
        out.push(b'"');
        self.stack.push(Frame::Text(text, 0));
    }
}

/// Appends the characters of `text` from byte `at` on, up to the limit; returns where it stopped.
fn escape(out: &mut Vec<u8>, text: &str, mut at: usize, limit: usize) -> usize {
    while at < text.len() && out.len() < limit {
        let rest = &text.as_bytes()[at..];
        let room = limit - out.len();
        let plain = rest
            .iter()
            .take(room)
            .take_while(|byte| matches!(byte, 0x20..0x7F) && !matches!(byte, b'"' | b'\\'))
            .count();
        out.extend_from_slice(&rest[..plain]);
        at += plain;
        if plain == room {
            break;
        }
        let Some(character) = text[at..].chars().next() else {
            break;
        };
        at += character.len_utf8();
        let short = match character {
            '"' => b'"',
            '\\' => b'\\',
            '\u{8}' => b'b',
            '\u{C}' => b'f',
            '\n' => b'n',
            '\r' => b'r',
            '\t' => b't',
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    // Writing to a Vec cannot fail.
                    drop(write!(out, "\\u{unit:04X}"));
                }
                continue;
            }
        };
        out.extend_from_slice(&[b'\\', short]);
    }
    at
}

/// The whole text at once, without the line end. For messages that are known to be small, and for tests.
pub fn to_text(value: Value) -> String {
    let mut out = Vec::new();
    let mut printer = Printer::new(value, false);
    while !printer.is_finished() {
        let limit = out.len() + 4096;
        printer.fill(&mut out, limit);
    }
    out.truncate(out.len() - 2);
    // Only ASCII is ever written.
    String::from_utf8(out).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::Object;

    fn printed(value: &Value, pretty: bool, limit: usize) -> String {
        let (mut out, mut all) = (Vec::new(), Vec::new());
        let mut printer = Printer::new(value.clone(), pretty);
        while !printer.is_finished() {
            printer.fill(&mut out, limit);
            all.append(&mut out);
        }
        String::from_utf8(all).unwrap()
    }

    fn sample() -> Value {
        let list = vec![Value::Int(1), Value::Array(vec![]), Value::Object(Object::new())];
        Value::Object(
            Object::new()
                .with("error", Value::string("é\u{7f}😀\"\\/'\n\u{1}\0"))
                .with("id", Value::Array(list)),
        )
    }

    #[test]
    fn one_line_has_spaces_upper_case_escapes_and_a_crlf() {
        assert_eq!(
            printed(&sample(), false, 1000),
            "{\"id\": [1, [], {}], \"error\": \"\\u00E9\\u007F\\uD83D\\uDE00\\\"\\\\/'\\n\\u0001\\u0000\"}\r\n"
        );
    }

    #[test]
    fn pretty_text_is_indented_by_four_also_inside_empty_containers() {
        let empty = Value::Object(Object::new().with("return", Value::Object(Object::new())));
        assert_eq!(printed(&empty, true, 1000), "{\r\n    \"return\": {\r\n    }\r\n}\r\n");
        let list = Value::Array(vec![Value::Int(1), Value::Int(2)]);
        assert_eq!(printed(&list, true, 1000), "[\r\n    1,\r\n    2\r\n]\r\n");
    }

    #[test]
    fn text_is_the_same_however_little_room_there_is() {
        for pretty in [false, true] {
            let whole = printed(&sample(), pretty, 1000);
            for limit in 1..40 {
                assert_eq!(printed(&sample(), pretty, limit), whole, "limit {limit}");
            }
        }
    }
}
