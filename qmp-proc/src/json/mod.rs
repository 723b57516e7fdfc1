//! JSON in the dialect of the QEMU machine protocol: bytes → [`Reader`] → [`Value`] → [`Printer`] → bytes.
//!
//! Reading is incremental and needs no recursion: [`lexer`] turns bytes into tokens, [`reader`] counts them against the
//! limits and builds the value with an explicit stack. Printing is incremental too, so that a 64 MiB `id` is echoed from a
//! buffer of a few KiB. [`ser`] and [`de`] connect values with the typed messages of the `ipc` crate.

pub mod de;
pub mod lexer;
pub mod number;
pub mod print;
pub mod reader;
pub mod ser;
pub mod value;

pub use print::Printer;
pub use reader::{Reader, SyntaxError};
pub use value::{Object, Value};

/// Deepest nesting of braces and brackets together.
pub const MAX_NESTING: i64 = 1024;
/// Most tokens in one message.
pub const MAX_TOKENS: usize = 2 << 20;
/// Most bytes in the tokens of one message, each with one byte more for its end.
pub const MAX_TOKEN_BYTES: usize = 64 << 20;
