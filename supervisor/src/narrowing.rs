//! `allow=`: which commands a monitor has, from the command line or from a file.
//!
//! A list holds names of commands and the word `read-only`, which stands for the commands that only look. A name that does
//! not exist is an error: whoever narrows a monitor must be able to trust the list, typing errors included.

use ipc::narrowing::{Allow, command_names, read_only_commands};
use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

/// The preset: only commands that look.
pub const READ_ONLY: &str = "read-only";

/// Larger files are no lists of commands.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// The commands that these words name.
///
/// # Errors
/// The word that names none, and with what problem.
pub fn commands<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Allow, String> {
    let mut names = BTreeSet::new();
    for word in words {
        if word == READ_ONLY {
            names.extend(read_only_commands().map(str::to_owned));
        } else if command_names().any(|name| name == word) {
            names.insert(word.to_owned());
        } else {
            return Err(format!("there is no command '{}'", word.escape_debug()));
        }
    }
    Ok(Allow::Only(names))
}

/// The commands of a file: words between blanks or ends of line; a `#` begins a comment.
///
/// # Errors
/// What is wrong with the file.
pub fn read(path: &Path) -> Result<Allow, String> {
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|error| problem(&error))?;
    let mut limited = file.take(MAX_FILE_BYTES + 1);
    limited.read_to_string(&mut text).map_err(|error| problem(&error))?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("a list of commands has at most {MAX_FILE_BYTES} bytes"));
    }
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    commands(lines.flat_map(str::split_whitespace))
}

fn problem(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => nix::errno::Errno::from_raw(errno).to_string(),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(allow: Result<Allow, String>) -> Vec<String> {
        match allow {
            Ok(Allow::Only(names)) => names.into_iter().collect(),
            other => panic!("{other:?}"),
        }
    }

    fn file(text: &[u8]) -> Result<Allow, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read(file.path())
    }

    #[test]
    fn a_list_is_names_and_the_preset() {
        assert_eq!(names(commands(["stop", "cont", "stop"])), ["cont", "stop"]);
        let read_only = names(commands([READ_ONLY]));
        assert!(read_only.contains(&"query-status".to_owned()));
        assert!(!read_only.contains(&"human-monitor-command".to_owned()));
        let more = names(commands(["stop", READ_ONLY]));
        assert_eq!(more.len(), read_only.len() + 1);
        for (words, problem) in [
            (&["stop", "query-stats-x"][..], "there is no command 'query-stats-x'"),
            (&[""][..], "there is no command ''"),
            (&["st\nop"][..], "there is no command 'st\\nop'"),
        ] {
            assert_eq!(commands(words.iter().copied()), Err(problem.to_owned()));
        }
    }

    #[test]
    fn a_file_has_words_and_comments() {
        let text = b"# for the watcher\n\tquery-status  query-name # both\n\nstop\n";
        assert_eq!(names(file(text)), ["query-name", "query-status", "stop"]);
        assert_eq!(names(file(b"")), Vec::<String>::new());
        assert_eq!(file(b"stop\nstopp\n"), Err("there is no command 'stopp'".into()));
        assert_eq!(file(b"\xff"), Err("stream did not contain valid UTF-8".into()));
        let long = [b'#'; MAX_FILE_BYTES as usize + 1];
        assert_eq!(file(&long), Err("a list of commands has at most 65536 bytes".into()));
        assert!(read(Path::new("/nonexistent/list")).unwrap_err().contains("ENOENT"));
    }
}
