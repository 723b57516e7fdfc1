//! COM1, and the lines on it.

use crate::cpu::{in8, out8};
use crate::spin::Spin;
use core::fmt::Write;

const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const DATA_READY: u8 = 0x01;
const TRANSMITTER_EMPTY: u8 = 0x20;
/// Bytes that may follow each other when the transmitter was empty.
const FIFO_BYTES: usize = 16;

static BUSY: Spin<()> = Spin::new(());

/// 115200 8n1, FIFOs on, no interrupts.
pub fn init() {
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
        out8(COM1 + register, value);
    }
}

/// The next byte that came in.
pub fn receive() -> Option<u8> {
    (in8(LINE_STATUS) & DATA_READY != 0).then(|| in8(COM1))
}

/// Sends bytes as they are.
pub fn send(bytes: &[u8]) {
    for piece in bytes.chunks(FIFO_BYTES) {
        while in8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
            core::hint::spin_loop();
        }
        for byte in piece {
            out8(COM1, *byte);
        }
    }
}

/// A line in the making; sent at once, so that lines of several processors do not mix.
struct Line {
    bytes: [u8; 1024],
    length: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        // Too long lines are cut.
        let length = text.len().min(self.bytes.len() - 1 - self.length);
        self.bytes[self.length..self.length + length].copy_from_slice(&text.as_bytes()[..length]);
        self.length += length;
        Ok(())
    }
}

impl Line {
    fn new(text: core::fmt::Arguments<'_>) -> Self {
        let mut line = Self {
            bytes: [0; 1024],
            length: 0,
        };
        let _ = line.write_fmt(text);
        line.bytes[line.length] = b'\n';
        line
    }

    fn send(&self) {
        send(&self.bytes[..=self.length]);
    }
}

/// What [`println!`] calls.
pub fn line(text: core::fmt::Arguments<'_>) {
    let line = Line::new(text);
    BUSY.with(|()| line.send());
}

/// A line even from within another, which stays unfinished: this processor may have been interrupted in the middle of it.
pub fn last_line(text: core::fmt::Arguments<'_>) {
    Line::new(text).send();
}

/// Prints one report line, with the prefix that hosts look for.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => {
        $crate::serial::line(format_args!("BHG: {}", format_args!($($argument)*)))
    };
}
