//! The JSON reader against facts seen from a live server, and against itself.

use proptest::prelude::*;
use qmp_proc::json::print::to_text;
use qmp_proc::json::reader::MAX_ERRORS_IN_A_ROW;
use qmp_proc::json::{MAX_NESTING, MAX_TOKEN_BYTES, MAX_TOKENS, Object, Reader, Value};

/// Everything that `input` holds: printed values, or error texts.
fn read(input: &[u8]) -> Vec<Result<String, String>> {
    let mut rest = input;
    let mut reader = Reader::default();
    std::iter::from_fn(|| reader.next(&mut rest))
        .map(|item| item.map(to_text).map_err(|error| error.0))
        .collect()
}

fn parse_errors(input: &[u8]) -> Vec<String> {
    read(input)
        .into_iter()
        .map(|item| item.unwrap_err().strip_prefix("JSON parse error, ").unwrap().to_owned())
        .collect()
}

#[test]
fn error_texts() {
    for (input, expected) in [
        (&b"{]"[..], &["expecting value"][..]),
        (b"[}", &["expecting value"]),
        (b"}", &["expecting value"]),
        (b",", &["expecting value"]),
        (b":", &["expecting value"]),
        (b"{,}", &["expecting value"]),
        (b"[1,]", &["expecting value"]),
        (b"{\"a\":}", &["expecting value"]),
        (b"{\"a\" 1}", &["missing : in object pair"]),
        (b"{\"a\":1 \"b\":2}", &["expected separator in dict"]),
        (b"[1 2]", &["expected separator in list"]),
        (b"{1:2}", &["key is not a string in object"]),
        (b"{[1]:2}", &["key is not a string in object"]),
        (b"{\"a\":1,\"a\":2}", &["duplicate key"]),
        (b"{\"a\":1,\"a\":2,}", &["duplicate key"]),
        (b"{\"id\":nul}", &["invalid keyword 'nul'"]),
        (b"nul ", &["invalid keyword 'nul'"]),
        (b"truefalse ", &["invalid keyword 'truefalse'"]),
        (b"NULL ", &["stray 'N'"]),
        (b"01 ", &["stray '01'"]),
        (b"+1 ", &["stray '+'"]),
        (b".5 ", &["stray '.'"]),
        (b"{\"id\":1.}", &["stray '1.}'"]),
        (b"{\"id\":1e}", &["stray '1e}'"]),
        (b"{\"id\":1e+}", &["stray '1e+}'"]),
        (b"-\n", &["stray '-\n'"]),
        (b"--1\n", &["stray '--'"]),
        (b"\"a\\x\"", &["invalid escape sequence in string"]),
        (b"\"a\\u12\"", &["\\u12\" is not a valid Unicode character"]),
        (b"\"\\ud83d\"", &["\\ud83d is not a valid Unicode character"]),
        (b"\"\\ud83d\\u0041\"", &["\\ud83d is not a valid Unicode character"]),
        (b"\"\\ud83d\\u12\"", &["\\ud83d is not a valid Unicode character"]),
        (b"\"\\udc00\"", &["\\udc00 is not a valid Unicode character"]),
        (b"\"\\uffff\"", &["\\uffff is not a valid Unicode character"]),
        (b"\"\xff\"\n", &["stray '\"\u{FFFD}'"]),
        (b"\"\x01\"\n", &["stray '\"\u{1}'"]),
        (b"\"\\\x01\"\n", &["stray '\"\\\u{1}'"]),
        (b"\"abc\ndef\"\n", &["stray '\"abc\n'"]),
        (b"\x00", &["stray ''"]),
        (b"\x0b\n", &["stray '\u{B}'"]),
        (b"\x7f\n", &["stray '\u{7F}'"]),
        (b"\xff", &["stray '\u{FFFD}'"]),
        (b"\xff\xff", &["stray '\u{FFFD}'", "stray '\u{FFFD}'"]),
        (b"tru\xff", &["invalid keyword 'tru'", "stray '\u{FFFD}'"]),
        (b"} }", &["expecting value", "expecting value"]),
        (b"{\"a\":%d}\n", &["stray '%'", "expecting value"]),
        (b"nul{\"a\"}", &["invalid keyword 'nul'", "missing : in object pair"]),
        // Incomplete: nothing yet.
        (b"null", &[]),
        (b"[[]", &[]),
        (b"\"\\", &[]),
    ] {
        assert_eq!(parse_errors(input), expected, "{}", String::from_utf8_lossy(input));
    }
}

/// The cases of a stress test for UTF-8 decoders: boundaries, surrogates, overlong forms, noncharacters.
#[test]
fn modified_utf8() {
    for good in [
        "\u{80}",
        "\u{7FF}",
        "\u{800}",
        "\u{FFFD}",
        "\u{10000}",
        "\u{D7FF}",
        "\u{E000}",
        "\u{FDCF}",
        "\u{10FFFD}",
    ] {
        assert!(read(format!("\"{good}\"").as_bytes())[0].is_ok(), "{good:?}");
    }
    assert_eq!(read(b"\"a\xC0\x80b\""), [Ok("\"a\\u0000b\"".to_owned())]);
    assert_eq!(read(b"'\\u0000'"), [Ok("\"\\u0000\"".to_owned())]);
    for bad in [
        &b"\x80"[..],
        b"\xBF",
        b"\xC0",
        b"\xC3",
        b"\xC3 ",
        b"\xE2\x82",
        b"\xF0\x9F\x98",
        b"\xC0\x81",
        b"\xC1\xBF",
        b"\xE0\x80\x80",
        b"\xE0\x9F\xBF",
        b"\xF0\x8F\xBF\xBF",
        b"\xF5\x80\x80\x80",
        b"\xF8\x88\x80\x80\x80",
        b"\xFC\x84\x80\x80\x80\x80",
        b"\xED\xA0\x80",
        b"\xED\xBF\xBF",
        b"\xED\xA0\xBD\xED\xB8\x80",
        b"\xF4\x90\x80\x80",
        b"\xEF\xBF\xBE",
        b"\xEF\xBF\xBF",
        b"\xEF\xB7\x90",
        b"\xF0\x9F\xBF\xBE",
        b"\xF4\x8F\xBF\xBF",
    ] {
        let input = [b"\"", bad, b"\""].concat();
        assert_eq!(parse_errors(&input), ["invalid UTF-8 sequence in string"], "{bad:02X?}");
    }
}

#[test]
fn dialect() {
    for (input, expected) in [
        ("{}", &["{}"][..]),
        ("{'a':'\\'\"'}{\"b\":'x'}", &["{\"a\": \"'\\\"\"}", "{\"b\": \"x\"}"]),
        ("42\n", &["42"]),
        ("null\ttrue,", &["null", "true"]),
        (" \r\n\t[ 1 , 2 ] ", &["[1, 2]"]),
        (
            "[-0, -0.0, 1.0, 1e2, 18446744073709551615]",
            &["[0, -0, 1, 100, 18446744073709551615]"],
        ),
        (
            "'\\u00e9\\ud83d\\ude00\\/\\b\\f\\n\\r\\t\u{7f}'",
            &["\"\\u00E9\\uD83D\\uDE00/\\b\\f\\n\\r\\t\\u007F\""],
        ),
    ] {
        let values: Vec<_> = read(input.as_bytes()).into_iter().filter_map(Result::ok).collect();
        assert_eq!(values, expected, "{input}");
    }
}

#[test]
fn nesting_is_limited_to_1024() {
    let deep = |depth: usize| [vec![b'['; depth], vec![b']'; depth]].concat();
    let limit = MAX_NESTING as usize;
    assert!(matches!(&read(&deep(limit))[..], [Ok(_)]));
    let too_deep = Err("JSON nesting depth limit exceeded".to_owned());
    assert!(matches!(&read(&deep(limit + 1))[..], [error] if *error == too_deep));
    assert_eq!(
        read(&[deep(100_000), b"{}".to_vec()].concat()),
        [too_deep.clone(), Ok("{}".to_owned())]
    );
    // Also where the rest never comes, the next line is a new start.
    assert_eq!(
        read(&[vec![b'['; 3000], b"\n{}".to_vec()].concat()),
        [too_deep, Ok("{}".to_owned())]
    );
}

#[test]
fn floods_of_errors_are_bounded_on_each_line() {
    let input = [vec![b']'; 1000], b"\n".to_vec(), vec![0xFF; 1000], b" \n{}".to_vec()].concat();
    let items = read(&input);
    assert_eq!(items.len(), 2 * MAX_ERRORS_IN_A_ROW + 1);
    assert_eq!(items.last(), Some(&Ok("{}".to_owned())));
}

/// Dropping and printing recurse at most as deep as values may be.
#[test]
fn the_deepest_value_needs_little_stack() {
    let thread = std::thread::Builder::new().stack_size(1 << 20).spawn(|| {
        let depth = MAX_NESTING as usize / 2;
        let input = [b"{'a':[".repeat(depth), b"]}".repeat(depth)].concat();
        let value = Reader::default().next(&mut &input[..]).unwrap().unwrap();
        assert_eq!(to_text(value.clone()).len(), 9 * depth);
        drop(value);
    });
    thread.unwrap().join().unwrap();
}

#[test]
fn tokens_are_limited_in_number_and_size() {
    let list = |items: usize| [b"[0".to_vec(), b",0".repeat(items - 1), b"]".to_vec()].concat();
    let string = |bytes: usize| [b"\"".to_vec(), vec![b'x'; bytes], b"\"".to_vec()].concat();
    // Brackets, items, commas.
    assert!(read(&list(MAX_TOKENS / 2 - 1))[0].is_ok());
    let too_many = read(&list(MAX_TOKENS / 2 + 1));
    assert_eq!(too_many, [Err("JSON token count limit exceeded".to_owned())]);
    assert!(read(&string(MAX_TOKEN_BYTES - 3))[0].is_ok());
    let too_long = Err("JSON token size limit exceeded".to_owned());
    assert_eq!(read(&string(MAX_TOKEN_BYTES - 2))[0], too_long);
    assert_eq!(read(&string(MAX_TOKEN_BYTES + 5))[0], too_long);
}

#[test]
fn an_object_of_many_members_is_read_in_linear_time_and_its_duplicates_are_found() {
    let mut input = String::from("{");
    for i in 0..200_000 {
        input.push_str(&format!("'k{i}':0,"));
    }
    let good = format!("{input}'end':0}}");
    let bad = format!("{input}'k77':0}}");
    assert!(read(good.as_bytes())[0].is_ok());
    assert_eq!(parse_errors(bad.as_bytes()), ["duplicate key"]);
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::Int),
        (i64::MAX as u64 + 1..).prop_map(Value::Uint),
        // With a fraction, so that they do not read back as integers.
        any::<i32>().prop_map(|n| Value::Double(f64::from(n) + 0.5)),
        any_text().prop_map(Value::String),
    ];
    leaf.prop_recursive(6, 64, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Value::Array),
            prop::collection::btree_map(any_text(), inner, 0..30)
                .prop_map(|members| Value::Object(Object::from_unique(members.into_iter().collect()))),
        ]
    })
}

/// Text without the code points that the dialect refuses.
fn any_text() -> impl Strategy<Value = Box<str>> {
    prop::collection::vec(any::<char>(), 0..12).prop_map(|characters| {
        let valid = |c: &char| !matches!(u32::from(*c), 0xFDD0..=0xFDEF) && u32::from(*c) & 0xFFFE != 0xFFFE;
        characters.into_iter().filter(valid).collect::<String>().into()
    })
}

/// Members in any order, for comparison.
fn sorted(value: Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        Value::Object(object) => {
            let mut members: Vec<_> = object.into_entries();
            members.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(Object::from_unique(
                members.into_iter().map(|(name, value)| (name, sorted(value))).collect(),
            ))
        }
        other => other,
    }
}

proptest! {
    #[test]
    fn a_value_reads_back_as_printed(value in any_value()) {
        let text = to_text(value.clone()) + "\n";
        let back = Reader::default().next(&mut text.as_bytes()).unwrap().unwrap();
        prop_assert_eq!(sorted(back), sorted(value.clone()));
        // And as another implementation understands it.
        let other: serde_json::Value = serde_json::from_str(&text).unwrap();
        let text = other.to_string() + "\n";
        let back = Reader::default().next(&mut text.as_bytes()).unwrap().unwrap();
        prop_assert_eq!(sorted(back), sorted(value));
    }

    #[test]
    fn any_bytes_give_the_same_however_they_are_split(
        input in prop::collection::vec(prop_oneof![
            3 => prop::sample::select(b"{}[]:,'\"\\ \n0129.-eEtrufalsn\xff".to_vec()),
            1 => any::<u8>(),
        ], 0..60),
        split in 0..60usize,
    ) {
        let whole = read(&input);
        let mut reader = Reader::default();
        let mut parts = Vec::new();
        let (first, second) = input.split_at(split.min(input.len()));
        for mut part in std::iter::once(first).chain(second.chunks(1)) {
            while let Some(item) = reader.next(&mut part) {
                parts.push(item.map(to_text).map_err(|error| error.0));
            }
        }
        prop_assert_eq!(parts, whole);
    }
}
