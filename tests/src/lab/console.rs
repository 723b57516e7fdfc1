//! The guest's serial console: what it printed, and typing into it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A connected console. A thread reads all the time, so that a guest is never held up.
pub struct Console {
    stream: UnixStream,
    shared: Arc<(Mutex<Text>, Condvar)>,
}

#[derive(Default)]
struct Text {
    all: String,
    /// Everything before this was matched by an `expect`.
    seen: usize,
    ended: bool,
}

impl Console {
    /// Takes a connection to a serial port. With `echo` everything is shown on standard output as well, behind a bar.
    pub fn new(stream: UnixStream, echo: bool) -> Self {
        let shared: Arc<(Mutex<Text>, Condvar)> = Arc::default();
        let (writer, mut reader) = (shared.clone(), stream.try_clone().expect("dup"));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            let mut screen = Screen::default();
            loop {
                let length = reader.read(&mut buffer).unwrap_or(0);
                let new = String::from_utf8_lossy(&buffer[..length]);
                if echo {
                    screen.show(&new);
                }
                let mut text = writer.0.lock().unwrap_or_else(PoisonError::into_inner);
                text.all.push_str(&new);
                text.ended |= length == 0;
                writer.1.notify_all();
                if length == 0 {
                    return;
                }
            }
        });
        Self { stream, shared }
    }

    /// Waits for a text after the one found last; gives everything from there through the text.
    pub fn expect(&self, wanted: &str, deadline: Duration) -> Result<String, String> {
        let begun = Instant::now();
        let mut text = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(position) = text.all[text.seen..].find(wanted) {
                let end = text.seen + position + wanted.len();
                let found = text.all[text.seen..end].to_owned();
                text.seen = end;
                return Ok(found);
            }
            let left = deadline.saturating_sub(begun.elapsed());
            if text.ended || left.is_zero() {
                let why = if text.ended { "ended" } else { "is silent" };
                return Err(format!(
                    "the console {why} before {wanted:?}:\n{}",
                    last_lines(&text.all)
                ));
            }
            text = self
                .shared
                .1
                .wait_timeout(text, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Types.
    pub fn send(&self, line: &str) -> Result<(), String> {
        let mut stream = &self.stream;
        stream
            .write_all(line.as_bytes())
            .map_err(|error| format!("typing: {error}"))
    }

    /// Everything so far.
    pub fn transcript(&self) -> String {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner).all.clone()
    }
}

/// Standard output with each line of the console behind a bar, and without what a shell asks of a terminal.
#[derive(Default)]
struct Screen {
    inside_line: bool,
    inside_escape: bool,
}

impl Screen {
    fn show(&mut self, new: &str) {
        let mut shown = String::new();
        for character in new.chars() {
            match character {
                '\r' => {}
                '\x1b' => self.inside_escape = true,
                _ if self.inside_escape => self.inside_escape = !character.is_ascii_alphabetic(),
                _ => {
                    if !std::mem::replace(&mut self.inside_line, character != '\n') {
                        shown.push_str("  | ");
                    }
                    shown.push(character);
                }
            }
        }
        print!("{shown}");
        let _ = std::io::stdout().flush();
    }
}

/// The end of a long text, for reports.
pub(super) fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
