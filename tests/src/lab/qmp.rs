//! A QMP client, as small as tests need it.

use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a command may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// A negotiated connection.
pub struct Qmp {
    stream: UnixStream,
    buffer: Vec<u8>,
    events: VecDeque<Value>,
    /// What the server said first.
    pub greeting: Value,
    /// Shows the conversation on standard output.
    pub echo: bool,
}

impl Qmp {
    /// Reads the greeting and negotiates.
    pub fn new(stream: UnixStream, echo: bool) -> Result<Self, String> {
        let mut qmp = Self {
            stream,
            buffer: Vec::new(),
            events: VecDeque::new(),
            greeting: Value::Null,
            echo,
        };
        qmp.greeting = qmp.message(DEADLINE)?;
        if qmp.greeting["QMP"]["version"].is_null() {
            return Err(format!("no greeting: {}", qmp.greeting));
        }
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command: its `return`, or its `error` as text.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value, String> {
        let mut request = json!({ "execute": name });
        if arguments.as_object().is_some_and(|arguments| !arguments.is_empty()) {
            request["arguments"] = arguments;
        }
        self.show("->", &request);
        self.stream
            .write_all(format!("{request}\n").as_bytes())
            .map_err(|error| format!("{name}: {error}"))?;
        loop {
            let message = self.message(DEADLINE).map_err(|error| format!("{name}: {error}"))?;
            if let Some(value) = message.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = message.get("error") {
                return Err(error.to_string());
            }
            self.keep(message);
        }
    }

    fn keep(&mut self, event: Value) {
        crate::schema::judge_event(&self.greeting, &event);
        self.events.push_back(event);
    }

    /// Waits for an event; earlier ones with other names are dropped.
    pub fn event(&mut self, name: &str, deadline: Duration) -> Result<Value, String> {
        let begun = Instant::now();
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => {
                    let event = self
                        .message(deadline.saturating_sub(begun.elapsed()))
                        .map_err(|error| format!("waiting for {name}: {error}"))?;
                    crate::schema::judge_event(&self.greeting, &event);
                    event
                }
            };
            if event["event"] == name {
                return Ok(event);
            }
        }
    }

    /// The events that have arrived and were not asked for.
    pub fn events(&mut self) -> Vec<Value> {
        while let Ok(event) = self.message(Duration::from_millis(1)) {
            self.keep(event);
        }
        self.events.drain(..).collect()
    }

    fn message(&mut self, deadline: Duration) -> Result<Value, String> {
        let begun = Instant::now();
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                let message = serde_json::from_slice(&line)
                    .map_err(|error| format!("{error} in {}", String::from_utf8_lossy(&line)))?;
                self.show("<-", &message);
                return Ok(message);
            }
            let left = deadline.saturating_sub(begun.elapsed()).max(Duration::from_millis(1));
            self.stream
                .set_read_timeout(Some(left))
                .map_err(|error| error.to_string())?;
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => return Err("the monitor closed the connection".into()),
                Ok(length) => self.buffer.extend_from_slice(&piece[..length]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock && begun.elapsed() < deadline => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err("no message in time".into()),
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    fn show(&self, direction: &str, message: &Value) {
        if self.echo {
            println!("  {direction} {message}");
        }
    }
}
