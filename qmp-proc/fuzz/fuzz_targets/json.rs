//! Any bytes: the reader neither panics nor depends on how they are split, and what it reads survives printing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qmp_proc::json::print::to_text;
use qmp_proc::json::{Reader, SyntaxError};

fn read(parts: &[&[u8]]) -> Vec<Result<String, SyntaxError>> {
    let mut reader = Reader::default();
    let mut items = Vec::new();
    for part in parts {
        let mut rest = *part;
        while let Some(item) = reader.next(&mut rest) {
            items.push(item.map(to_text));
        }
    }
    items
}

fuzz_target!(|bytes: &[u8]| {
    let items = read(&[bytes]);
    let split = bytes.first().map_or(0, |byte| usize::from(*byte)).min(bytes.len());
    let (first, second) = bytes.split_at(split);
    assert_eq!(read(&[first, second]), items);
    for text in items.into_iter().flatten() {
        let again = read(&[text.as_bytes(), b"\n"]);
        // Members print in hash order, newest first in a bucket, so one more round may reorder them, but two do not.
        let [Ok(once)] = &again[..] else {
            panic!("{text} read back as {again:?}")
        };
        let twice = read(&[once.as_bytes(), b"\n"]);
        assert!(matches!(&twice[..], [Ok(twice)] if *twice == text || once.len() == text.len()));
    }
});
