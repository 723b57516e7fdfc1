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
    let again = |text: &str| match &read(&[text.as_bytes(), b"\n"])[..] {
        [Ok(again)] => again.clone(),
        other => panic!("{text} read back as {other:?}"),
    };
    for text in items.into_iter().flatten() {
        // The double -0 prints as the integer -0, which is 0. Members of one hash bucket change places each time.
        let once = again(&text);
        assert_eq!(again(&again(&once)), once);
    }
});
