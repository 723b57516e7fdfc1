use super::*;
use proptest::prelude::*;

fn answer(line: &str) -> String {
    match parse(line) {
        Line::Answer(text) => text,
        other => panic!("{line:?}: {other:?}"),
    }
}

fn asks(line: &str) -> HumanCommand {
    match parse(line) {
        Line::Ask(command, _) => command,
        other => panic!("{line:?}: {other:?}"),
    }
}

#[test]
fn blanks_of_any_kind_stand_between_words() {
    for line in ["info status", " info  status ", "info\tstatus"] {
        assert_eq!(asks(line), HumanCommand::Status, "{line:?}");
    }
    assert_eq!(answer(""), "");
    assert_eq!(answer("  "), "");
}

#[test]
fn what_is_not_there_is_unknown() {
    assert_eq!(answer("foo"), "unknown command: 'foo'\r\n");
    assert_eq!(answer("info foo"), "unknown command: 'info foo'\r\n");
    assert_eq!(answer("help nosuch"), "unknown command: 'nosuch'\r\n");
    assert_eq!(answer("quit"), "unknown command: 'quit'\r\n");
}

#[test]
fn misuse_is_said_and_help_pointed_at() {
    for (line, text) in [
        (
            "info status x",
            "status: extraneous characters at the end of line\r\nTry \"help info status\" for more information\r\n",
        ),
        (
            "info registers -z",
            "registers: unsupported option -z\r\nTry \"help info registers\" for more information\r\n",
        ),
        (
            "xp",
            "unexpected end of expression\r\nTry \"help xp\" for more information\r\n",
        ),
        (
            "xp /zz 0",
            "invalid char in format: 'z'\r\nTry \"help xp\" for more information\r\n",
        ),
        (
            "xp /4xb zz",
            "invalid char 'z' in expression\r\nTry \"help xp\" for more information\r\n",
        ),
        (
            "gva2gpa",
            "unexpected end of expression\r\nTry \"help gva2gpa\" for more information\r\n",
        ),
        (
            "gpa2hva zz",
            "invalid char 'z' in expression\r\nTry \"help gpa2hva\" for more information\r\n",
        ),
    ] {
        assert_eq!(answer(line), text, "{line:?}");
    }
}

#[test]
fn every_listed_command_and_item_exists_and_has_help() {
    use super::super::help::{COMMANDS, ITEMS};
    for (names, ..) in COMMANDS {
        for name in names.split('|') {
            assert!(
                !matches!(parse(name), Line::Answer(text) if text.starts_with("unknown")),
                "{name}"
            );
            assert!(answer(&format!("help {name}")).contains(" -- "), "{name}");
        }
    }
    for (name, parameters, _) in ITEMS {
        let line = format!("info {name} {}", if *parameters == "-f" { "-f" } else { "" });
        assert!(!matches!(parse(&line), Line::Answer(_)), "{name}");
        assert!(answer("info").contains(&format!("info {name} ")), "{name}");
    }
}

#[test]
fn expressions_are_sums() {
    for (text, value) in [
        ("0", 0),
        ("16", 16),
        ("0x10", 16),
        ("010", 8),
        ("0+16", 16),
        ("0x20 - 0x10", 16),
        ("-1", u64::MAX),
        ("1 - -1", 2),
        ("0xffffffffffffffff+1", 0),
    ] {
        assert_eq!(sum(text), Ok(value), "{text}");
    }
    for text in [
        "",
        "+",
        "1 +",
        "1 1",
        "0x",
        "08",
        "18446744073709551616",
        "1*2",
        "$pc",
        "é",
    ] {
        assert!(sum(text).is_err(), "{text}");
    }
}

#[test]
fn memory_is_asked_for_as_the_format_says() {
    let memory = |is_virtual, address, length| HumanCommand::Memory {
        is_virtual,
        address,
        length,
    };
    assert_eq!(asks("xp /16xb 0x100"), memory(false, 0x100, 16));
    assert_eq!(asks("xp/4xb 0"), memory(false, 0, 4));
    assert_eq!(asks("x /3dg 8"), memory(true, 8, 24));
    assert_eq!(asks("xp 8"), memory(false, 8, 4));
    assert_eq!(asks("xp /4c 8"), memory(false, 8, 4));
    assert_eq!(answer("xp /0xb 0"), "");
    assert!(answer("xp /4294967295xg 0").starts_with("at most "));
    assert!(answer("xp /99999999999xb 0").starts_with("invalid count"));
    assert!(answer("xp /1i 0").starts_with("instructions cannot be shown"));
}

proptest! {
    /// Any text has a meaning, and an answer is whole lines.
    #[test]
    fn any_line_is_understood_or_refused(line: String) {
        if let Line::Answer(text) = parse(&line) {
            prop_assert!(text.is_empty() || text.ends_with("\r\n"));
        }
    }

    /// Lines that are nearly right.
    #[test]
    fn lines_of_known_words_are_understood_or_refused(
        words in proptest::collection::vec("info|xp?|/[0-9]{0,12}[a-z]{0,3}|gva2gpa|gpa2hva|help|-[a-z]|mtree|registers|block|0x[0-9a-f]{0,20}|[-+0-9]{1,5}|é", 0..6),
        blank in "[ \t/]{1,2}",
    ) {
        let line = words.join(&blank);
        match parse(&line) {
            Line::Answer(text) => prop_assert!(text.is_empty() || text.ends_with("\r\n")),
            Line::Ask(HumanCommand::Memory { length, .. }, layout) => {
                prop_assert!(length as usize <= MAX_READ_BYTES && length > 0);
                let Layout::Memory(layout) = layout else { panic!("{line}") };
                prop_assert_eq!(layout.count * layout.item_bytes, length);
            }
            Line::Ask(..) | Line::Version => {}
        }
    }
}
