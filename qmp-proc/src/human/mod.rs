//! The human monitor: human-monitor-command takes a line as people type it and returns the text that they would see.
//!
//! The line is a client's text, so it is read here and nowhere else: [`parse`] makes it a typed command, or an answer when
//! there is nothing to ask. [`text`] writes the supervisor's typed answer in the layout that programs which read such text
//! know. [`help`] is the list of what there is. A command that is not in it is unknown, as in any such monitor.

pub mod help;
pub mod parse;
pub mod qemu_io;
pub mod text;

use ipc::human::HumanCommand;

/// What a line means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// Nothing is to be asked: this is the text.
    Answer(String),
    /// The version of this server.
    Version,
    /// The supervisor is asked; its answer is shown like this.
    Ask(HumanCommand, Layout),
}

/// How an answer is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// There is one way only.
    Plain,
    /// Memory.
    Memory(MemoryLayout),
}

/// `/16xb`: how memory is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLayout {
    /// Address of the first item.
    pub address: u64,
    /// How many items.
    pub count: u32,
    /// How an item is written.
    pub style: Style,
    /// Bytes of an item: 1, 2, 4 or 8.
    pub item_bytes: u32,
}

/// How an item is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// `x`.
    Hexadecimal,
    /// `o`.
    Octal,
    /// `d`.
    Signed,
    /// `u`.
    Unsigned,
    /// `c`.
    Character,
}

/// Lines of the human monitor end like this.
const END: &str = "\r\n";
