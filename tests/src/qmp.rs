//! A small QMP client: one command at a time, events kept in order.

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The arguments that a query cannot do without.
pub fn query_arguments(query: &str) -> Value {
    match query {
        "query-cpu-model-expansion" => json!({"type": "full", "model": {"name": "host"}}),
        _ => json!({}),
    }
}

/// A negotiated session.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
    /// The greeting.
    pub greeting: Value,
}

impl Qmp {
    /// Connects, reads the greeting and negotiates.
    ///
    /// # Errors
    /// When nobody listens or the server ends the connection.
    pub fn connect(path: &Path) -> std::io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(crate::machine::PATIENCE))?;
        let mut qmp = Self {
            reader: BufReader::new(stream),
            events: VecDeque::new(),
            greeting: Value::Null,
        };
        qmp.greeting = qmp.read()?;
        qmp.send(&json!({"execute": "qmp_capabilities"}))?;
        while qmp.read()?.get("return").is_none() {}
        Ok(qmp)
    }

    /// Carries out a command without arguments.
    pub fn run(&mut self, command: &str) -> Value {
        self.execute(command, json!({}))
    }

    /// Asks a query, with [`query_arguments`].
    pub fn query(&mut self, query: &str) -> Value {
        self.execute(query, query_arguments(query))
    }

    /// Carries out a command and returns what it returned.
    ///
    /// # Panics
    /// When it fails.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        self.try_execute(command, arguments)
            .unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// Carries out a command: its return value or its error.
    ///
    /// # Errors
    /// The error object.
    ///
    /// # Panics
    /// When the connection ends.
    pub fn try_execute(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        self.send(&json!({"execute": command, "arguments": arguments}))
            .expect("sending");
        loop {
            let mut message = self
                .read()
                .unwrap_or_else(|error| panic!("no answer to {command}: {error}"));
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            } else {
                return Err(message["error"].take());
            }
        }
    }

    /// The words in which a command is refused.
    ///
    /// # Panics
    /// When it is not.
    pub fn refusal(&mut self, command: &str, arguments: Value) -> String {
        let error = self.try_execute(command, arguments).expect_err("refused");
        error["desc"].as_str().expect("an error has words").to_owned()
    }

    /// What clients see of the block graph, but for what grows: how much room files take.
    ///
    /// # Panics
    /// When it cannot be asked for.
    pub fn graph(&mut self) -> Value {
        let mut seen = json!([
            self.run("query-block"),
            self.execute("query-named-block-nodes", json!({"flat": true}))
        ]);
        settle(&mut seen);
        seen
    }

    /// Sends a request as it is and returns the whole reply, whichever it is.
    ///
    /// # Panics
    /// When the connection ends.
    pub fn request(&mut self, request: &Value) -> Value {
        self.send(request).expect("sending");
        loop {
            let message = self
                .read()
                .unwrap_or_else(|error| panic!("no answer to {request}: {error}"));
            if message.get("event").is_none() {
                return message;
            }
            self.events.push_back(message);
        }
    }

    /// The next message that is no event.
    ///
    /// # Panics
    /// When the connection ends.
    pub fn reply(&mut self) -> Value {
        loop {
            let message = self.read().expect("a reply");
            if message.get("event").is_none() {
                return message;
            }
            self.events.push_back(message);
        }
    }

    /// The events that have arrived by now, those before this call's own round trip included.
    pub fn events(&mut self) -> Vec<Value> {
        self.run("query-version");
        self.events.drain(..).collect()
    }

    /// The next event.
    ///
    /// # Panics
    /// When none comes.
    pub fn event(&mut self) -> Value {
        if let Some(event) = self.events.pop_front() {
            return event;
        }
        let message = self.read().expect("an event");
        assert!(message.get("event").is_some(), "{message} is no event");
        message
    }

    /// Skips events until one of this name comes; returns its data.
    pub fn wait_event(&mut self, name: &str) -> Value {
        loop {
            let mut event = self.event();
            if event["event"] == name {
                return event["data"].take();
            }
        }
    }

    /// Whether the server has closed the connection, after what was still to be read.
    pub fn is_closed(&mut self) -> bool {
        loop {
            match self.read() {
                Ok(message) if message.get("event").is_some() => self.events.push_back(message),
                Ok(_) => return false,
                Err(error) => {
                    return error.kind() == std::io::ErrorKind::UnexpectedEof
                        || error.kind() == std::io::ErrorKind::ConnectionReset;
                }
            }
        }
    }

    /// Sends a message as it is.
    ///
    /// # Errors
    /// When the connection is closed.
    pub fn send(&mut self, message: &Value) -> std::io::Result<()> {
        self.reader.get_mut().write_all(format!("{message}\n").as_bytes())
    }

    /// Passes file descriptors along with a blank, which the protocol ignores: a later command takes the first of them.
    ///
    /// # Panics
    /// When the connection is closed.
    pub fn pass(&mut self, fds: &[BorrowedFd<'_>]) {
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let socket = self.reader.get_ref().as_raw_fd();
        let control = [ControlMessage::ScmRights(&raw)];
        sendmsg::<()>(socket, &[IoSlice::new(b" ")], &control, MsgFlags::empty(), None).expect("passing fds");
    }

    pub(crate) fn read(&mut self) -> std::io::Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let message: Value = serde_json::from_str(&line).map_err(std::io::Error::other)?;
        if message.get("event").is_some() {
            crate::schema::judge_event(&self.greeting, &message);
        }
        Ok(message)
    }
}

fn settle(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.remove("actual-size");
            if matches!(members.get("format").and_then(Value::as_str), Some("file" | "blkdebug")) {
                members.remove("virtual-size");
            }
            members.values_mut().for_each(settle);
        }
        Value::Array(items) => items.iter_mut().for_each(settle),
        _ => {}
    }
}
