//! A ring buffer in the supervisor's memory: the newest bytes, up to its size.

use std::collections::VecDeque;

/// Bytes of a ring whose size is not given.
pub const DEFAULT_BYTES: usize = 64 << 10;
/// Bytes of the largest ring.
pub const MAX_BYTES: usize = 16 << 20;

/// A ring buffer.
#[derive(Debug)]
pub struct Ring {
    bytes: VecDeque<u8>,
    size: usize,
}

impl Ring {
    /// An empty one for `size` bytes.
    pub fn new(size: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            size,
        }
    }

    /// How many bytes it can hold.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Adds bytes; the oldest make room.
    pub fn write(&mut self, bytes: &[u8]) {
        let newest = &bytes[bytes.len().saturating_sub(self.size)..];
        let surplus = (self.bytes.len() + newest.len()).saturating_sub(self.size);
        self.bytes.drain(..surplus);
        self.bytes.extend(newest);
    }

    /// Takes the oldest bytes, at most `count`.
    pub fn read(&mut self, count: usize) -> Vec<u8> {
        self.bytes.drain(..count.min(self.bytes.len())).collect()
    }
}

/// Whether a ring may have this size.
///
/// # Errors
/// What is wrong with it.
pub fn check_size(size: u64) -> Result<usize, String> {
    if !size.is_power_of_two() {
        return Err("size of ringbuf chardev must be power of two".into());
    }
    usize::try_from(size)
        .ok()
        .filter(|size| *size <= MAX_BYTES)
        .ok_or_else(|| format!("size of ringbuf chardev must be at most {MAX_BYTES}"))
}

/// Base64 with padding.
pub fn to_base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let at = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for place in 0..4 {
            text.push(if place <= group.len() {
                char::from(ALPHABET[(bits >> (18 - 6 * place) & 63) as usize])
            } else {
                '='
            });
        }
    }
    text
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// The bytes of a Base64 text; line ends in it are skipped, and bits after the last whole byte are dropped.
pub fn from_base64(text: &str) -> Option<Vec<u8>> {
    let text: Vec<u8> = text.bytes().filter(|byte| !matches!(byte, b'\r' | b'\n')).collect();
    let end = text.iter().rposition(|byte| *byte != b'=').map_or(0, |last| last + 1);
    if text.len() - end > 2 {
        return None;
    }
    let (mut bytes, mut bits, mut count) = (Vec::with_capacity(end * 3 / 4), 0u32, 0);
    for byte in &text[..end] {
        let value = ALPHABET.iter().position(|letter| letter == byte)?;
        bits = bits << 6 | value as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_bytes_stay_and_the_oldest_are_read_first() {
        let mut ring = Ring::new(8);
        ring.write(b"0123456789");
        assert_eq!(ring.read(4), b"2345");
        ring.write(b"ab");
        assert_eq!(ring.read(100), b"6789ab");
        ring.write(b"abcdef");
        ring.write(b"ghij");
        assert_eq!(ring.read(100), b"cdefghij");
        assert!(ring.read(1).is_empty());
    }

    #[test]
    fn sizes_are_powers_of_two() {
        assert_eq!(check_size(8), Ok(8));
        for size in [0, 1000, u64::MAX, 1 << 40] {
            assert!(check_size(size).is_err(), "{size}");
        }
    }

    #[test]
    fn base64_reads_back_as_written() {
        for (bytes, text) in [
            (&b""[..], ""),
            (b"f", "Zg=="),
            (b"fo", "Zm8="),
            (b"foo", "Zm9v"),
            (b"foobar", "Zm9vYmFy"),
            (b"\xff\xc3\x83", "/8OD"),
        ] {
            assert_eq!(to_base64(bytes), text);
            assert_eq!(from_base64(text).as_deref(), Some(bytes), "{text}");
        }
        assert_eq!(from_base64("Zm9v\r\nYmFy").as_deref(), Some(&b"foobar"[..]));
        for text in ["!!", "Z=g=", "===", "Zm9v===", "ä"] {
            assert_eq!(from_base64(text), None, "{text}");
        }
    }
}
