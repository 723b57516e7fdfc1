//! Messages that are almost requests: mutations of what the schema allows.

use crate::schema::Schema;
use serde_json::json;

/// Pieces that mean something to a parser, or nearly.
const PIECES: &[&[u8]] = &[
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\"",
    b"'",
    b"\\",
    b"\\u0000",
    b"\\ud83d",
    b"\\u00e9",
    b"null",
    b"true",
    b"nul",
    b"-",
    b"-0",
    b"1e999",
    b"9223372036854775808",
    b"18446744073709551616",
    b"0.1",
    b"01",
    b"\xFF",
    b"\xC0\x80",
    b"\x00",
    b"\x01",
    b"\r\n",
    b"\"execute\"",
    b"\"exec-oob\"",
    b"\"arguments\"",
    b"\"id\"",
    b"{}",
    b"[[[[[[[[[[",
    b"%d",
    b"\xF0\x9F\x98\x80",
];

/// A generator of messages. The same seed gives the same messages.
pub struct Fuzz {
    state: u64,
    seeds: Vec<Vec<u8>>,
}

impl Fuzz {
    /// Begins with the requests for these commands, with few and with many arguments.
    pub fn new(seed: u64, schema: &Schema, mut wanted: impl FnMut(&str) -> bool) -> Self {
        let commands = schema.commands().into_iter().filter(|command| wanted(&command.name));
        let seeds = commands.flat_map(|command| {
            [false, true].map(|full| {
                let arguments = schema.sample(&command.arguments, full);
                json!({"execute": command.name, "arguments": arguments, "id": 7})
                    .to_string()
                    .into_bytes()
            })
        });
        Self {
            state: seed,
            seeds: seeds.collect(),
        }
    }

    /// The next message, with an end of line.
    pub fn message(&mut self) -> Vec<u8> {
        let mut message = self.any_seed();
        for _ in 0..self.below(4) {
            self.mutate(&mut message);
        }
        message.push(b'\n');
        message
    }

    fn mutate(&mut self, message: &mut Vec<u8>) {
        let at = self.below(message.len() + 1);
        let end = at + self.below(message.len() - at + 1).min(16);
        match self.below(6) {
            0 => message.insert(at, self.below(256) as u8),
            1 => drop(message.drain(at..end)),
            2 => {
                let piece = PIECES[self.below(PIECES.len())];
                message.splice(at..at, piece.iter().copied());
            }
            3 => {
                let piece = PIECES[self.below(PIECES.len())];
                message.splice(at..end, piece.iter().copied());
            }
            4 => {
                let copy = message[at..end].to_vec();
                message.splice(at..at, copy);
            }
            // The head of one and the tail of another.
            _ => {
                let other = self.any_seed();
                let from = self.below(other.len());
                message.truncate(at);
                message.extend_from_slice(&other[from..]);
            }
        }
    }

    fn any_seed(&mut self) -> Vec<u8> {
        let index = self.below(self.seeds.len());
        self.seeds[index].clone()
    }

    /// A number below `end` (xorshift64*, which is enough here).
    fn below(&mut self, end: usize) -> usize {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        (self.state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % end
    }
}
