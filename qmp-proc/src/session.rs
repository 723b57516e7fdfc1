//! The protocol's states: greeting, negotiation, commands one after another, events. Values in, values and calls out.

use crate::human::{self, Layout, Line};
use crate::json::{Object, SyntaxError, Value, ser};
use crate::schema::types::{CommandType, Local, Run};
use crate::schema::{self, check, introspect};
use ipc::narrowing::not_found;
use ipc::qmp::{Command, ErrorClass, MonitorSetup, QmpCall, QmpError, Return, TimedEvent};
use std::collections::VecDeque;

/// The version whose semantics this server has: major, minor, micro.
pub const REPORTED_VERSION: [i64; 3] = [10, 0, 0];
/// Requests that may wait behind the one being executed, once `oob` is negotiated.
pub const MAX_QUEUED_REQUESTS: usize = 8;
/// With this many messages waiting for the client, nothing is read from it.
pub const PAUSE_READING_OUTPUT: usize = 16;
/// With this many messages waiting for the client, it is dropped: it does not read its events.
pub const MAX_QUEUED_OUTPUT: usize = 4096;

/// Why a session cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The client does not read.
    #[error("the client does not read: {MAX_QUEUED_OUTPUT} messages wait for it")]
    SlowClient,
    /// The supervisor answered a call that is not open.
    #[error("answer to call {0}, which is not open")]
    UnknownCall(u64),
    /// A message has no JSON form.
    #[error("message without a JSON form: {0}")]
    Message(#[from] ser::Mismatch),
}

/// A request that waits: what was read, or what is wrong with it. In both cases its answer keeps its place.
type Input = Result<Value, SyntaxError>;

/// One client's session.
pub struct Session {
    setup: MonitorSetup,
    negotiated: bool,
    oob: bool,
    waiting: VecDeque<Input>,
    /// The call that the supervisor works on, and its request's id.
    running: Option<(u64, Option<Value>)>,
    /// How the answer to a human monitor's command is shown.
    layout: Layout,
    call: Option<QmpCall>,
    next_call: u64,
    output: VecDeque<Value>,
}

impl Session {
    /// A session whose greeting is the first output.
    pub fn new(setup: MonitorSetup) -> Self {
        let greeting = Object::new()
            .with("version", version(&setup))
            .with("capabilities", Value::Array(vec![Value::string("oob")]));
        let greeting = Value::Object(Object::new().with("QMP", Value::Object(greeting)));
        Self {
            setup,
            negotiated: false,
            oob: false,
            waiting: VecDeque::new(),
            running: None,
            layout: Layout::Plain,
            call: None,
            next_call: 1,
            output: VecDeque::from([greeting]),
        }
    }

    /// How the monitor was set up.
    pub fn setup(&self) -> &MonitorSetup {
        &self.setup
    }

    /// Whether the client's next message may be read.
    pub fn wants_input(&self) -> bool {
        let room = if self.oob {
            self.waiting.len() < MAX_QUEUED_REQUESTS
        } else {
            self.is_idle()
        };
        room && self.output.len() < PAUSE_READING_OUTPUT
    }

    /// Whether no request is being executed or waits.
    pub fn is_idle(&self) -> bool {
        self.running.is_none() && self.waiting.is_empty()
    }

    /// Whether requests wait behind the one that is being executed.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Takes the client's next message.
    pub fn input(&mut self, input: Input) {
        if let Ok(Value::Object(request)) = &input
            && request.get("exec-oob").is_some()
            && request.get("execute").is_none()
        {
            // Out of band: answered at once, before requests that wait.
            let request = request.clone();
            self.request(request);
            return;
        }
        self.waiting.push_back(input);
        self.advance();
    }

    /// The next call for the supervisor.
    pub fn next_call(&mut self) -> Option<QmpCall> {
        self.call.take()
    }

    /// The next message for the client.
    pub fn next_output(&mut self) -> Option<Value> {
        self.output.pop_front()
    }

    /// Takes the supervisor's answer.
    ///
    /// # Errors
    /// [`SessionError::UnknownCall`], [`SessionError::Message`].
    pub fn returned(&mut self, call: u64, result: Result<Return, QmpError>) -> Result<(), SessionError> {
        let Some((_, id)) = self.running.take_if(|(running, _)| *running == call) else {
            return Err(SessionError::UnknownCall(call));
        };
        match result {
            Ok(Return::Human(answer)) => self.reply(id, Value::String(human::text::write(&answer, self.layout).into())),
            Ok(data) => self.reply(id, content(ser::to_value(&data)?)),
            Err(error) => self.fail(id, &error),
        }
        self.advance();
        Ok(())
    }

    /// Takes an event. Before the negotiation it is dropped.
    ///
    /// # Errors
    /// [`SessionError::SlowClient`], [`SessionError::Message`].
    pub fn event(&mut self, event: &TimedEvent) -> Result<(), SessionError> {
        if !self.negotiated {
            return Ok(());
        }
        if self.output.len() >= MAX_QUEUED_OUTPUT {
            return Err(SessionError::SlowClient);
        }
        let timestamp = Object::new()
            .with("seconds", Value::Int(event.seconds))
            .with("microseconds", Value::Int(event.microseconds));
        let mut message = Object::new().with("timestamp", Value::Object(timestamp));
        match ser::to_value(&event.event)? {
            Value::Object(tagged) => {
                for (name, data) in tagged.into_entries() {
                    message.push("event", Value::String(name));
                    message.push("data", data);
                }
            }
            name => message.push("event", name),
        }
        self.output.push_back(Value::Object(message));
        Ok(())
    }

    /// Executes waiting requests up to one that the supervisor must carry out.
    fn advance(&mut self) {
        while self.running.is_none() {
            match self.waiting.pop_front() {
                None => break,
                Some(Ok(Value::Object(request))) => self.request(request),
                Some(Ok(_)) => self.fail(None, &QmpError::generic("QMP input must be a JSON object")),
                Some(Err(error)) => self.fail(None, &QmpError::generic(error.0)),
            }
        }
    }

    fn request(&mut self, mut request: Object) {
        let id = request.remove("id");
        match self.execute(request) {
            Ok(Some(data)) => self.reply(id, data),
            Ok(None) => {
                if let Some(call) = &self.call {
                    self.running = Some((call.call, id));
                }
            }
            Err(error) => self.fail(id, &error),
        }
    }

    /// Executes a request; `None` when it has become a call.
    fn execute(&mut self, mut request: Object) -> Result<Option<Value>, QmpError> {
        let (name, oob) = command_name(&request, self.oob)?;
        let command = self.find(&name)?;
        if oob && !command.allow_oob {
            return Err(QmpError::generic(format!("The command {name} does not support OOB")));
        }
        let arguments = match request.remove("arguments") {
            Some(Value::Object(arguments)) => arguments,
            _ => Object::new(),
        };
        match command.run {
            Run::Here(local) => {
                let arguments = check::arguments(command, arguments)?;
                self.run_here(local, &arguments).map(Some)
            }
            Run::Human => {
                let arguments = check::arguments(command, arguments)?;
                Ok(self.run_human(&arguments))
            }
            Run::Supervisor => {
                let command = schema::decode(command, arguments)?;
                self.start(command);
                Ok(None)
            }
        }
    }

    fn find(&self, name: &str) -> Result<&'static CommandType, QmpError> {
        let command = schema::find(name).filter(|command| self.setup.allow.permits(command.name));
        if !self.negotiated {
            let capabilities = command.filter(|command| command.run == Run::Here(Local::Capabilities));
            return capabilities.ok_or_else(|| QmpError {
                class: ErrorClass::CommandNotFound,
                desc: "Expecting capabilities negotiation with 'qmp_capabilities'".to_owned(),
            });
        }
        command.ok_or_else(|| not_found(name))
    }

    fn start(&mut self, command: Command) {
        let call = self.next_call;
        self.next_call += 1;
        self.call = Some(QmpCall {
            call,
            command,
            fd: None,
        });
    }

    /// Reads a line of the human monitor; `None` when it has become a call.
    fn run_human(&mut self, arguments: &Object) -> Option<Value> {
        let line = match arguments.get("command-line") {
            Some(Value::String(line)) => human::parse::parse(line),
            _ => Line::Answer(String::new()),
        };
        let cpu_index = match arguments.get("cpu-index") {
            Some(Value::Int(index)) => Some(*index),
            _ => None,
        };
        match line {
            Line::Answer(text) => Some(Value::String(text.into())),
            Line::Version => {
                let [major, minor, micro] = REPORTED_VERSION;
                let package = &self.setup.package;
                Some(Value::string(format!("{major}.{minor}.{micro}{package}\r\n")))
            }
            Line::Ask(command, layout) => {
                self.layout = layout;
                self.start(Command::HumanMonitorCommand { command, cpu_index });
                None
            }
        }
    }

    fn run_here(&mut self, command: Local, arguments: &Object) -> Result<Value, QmpError> {
        match command {
            Local::Capabilities => {
                if self.negotiated {
                    return Err(QmpError {
                        class: ErrorClass::CommandNotFound,
                        desc: "Capabilities negotiation is already complete, command ignored".to_owned(),
                    });
                }
                // The only capability is oob, so any that passed the check is that one.
                self.oob = matches!(arguments.get("enable"), Some(Value::Array(enable)) if !enable.is_empty());
                self.negotiated = true;
                Ok(Value::Object(Object::new()))
            }
            Local::Version => Ok(version(&self.setup)),
            Local::Commands => {
                let names = schema::commands::COMMANDS
                    .iter()
                    .filter(|command| self.setup.allow.permits(command.name))
                    .map(|command| Value::Object(Object::new().with("name", Value::string(command.name))));
                Ok(Value::Array(names.collect()))
            }
            Local::Schema => Ok(introspect::schema(&self.setup.allow)),
        }
    }

    fn reply(&mut self, id: Option<Value>, data: Value) {
        self.answer(Object::new().with("return", data), id);
    }

    fn fail(&mut self, id: Option<Value>, error: &QmpError) {
        let class = ser::to_value(&error.class).unwrap_or_else(|_| Value::string("GenericError"));
        let error = Object::new()
            .with("class", class)
            .with("desc", Value::string(error.desc.as_str()));
        self.answer(Object::new().with("error", Value::Object(error)), id);
    }

    fn answer(&mut self, mut message: Object, id: Option<Value>) {
        if let Some(id) = id {
            message.push("id", id);
        }
        self.output.push_back(Value::Object(message));
    }
}

/// What a server reports as its version.
fn version(setup: &MonitorSetup) -> Value {
    let [major, minor, micro] = REPORTED_VERSION;
    let numbers = Object::new()
        .with("major", Value::Int(major))
        .with("minor", Value::Int(minor))
        .with("micro", Value::Int(micro));
    Value::Object(
        Object::new()
            .with("qemu", Value::Object(numbers))
            .with("package", Value::string(setup.package.as_str())),
    )
}

/// The content of a tagged `Return`; a variant without content is `{}`.
fn content(tagged: Value) -> Value {
    match tagged {
        Value::Object(object) => object
            .into_entries()
            .pop()
            .map_or_else(|| Value::Object(Object::new()), |(_, content)| content),
        _ => Value::Object(Object::new()),
    }
}

/// Checks a request's own members, in wire order; returns the command's name and whether it is out of band.
fn command_name(request: &Object, oob: bool) -> Result<(String, bool), QmpError> {
    let mut found: Option<(&str, &str)> = None;
    for (name, value) in request.wire_order() {
        let fault = match (name, value) {
            ("exec-oob", _) if !oob => "is unexpected",
            ("execute" | "exec-oob", Value::String(command)) => match found {
                Some((other, _)) => {
                    return Err(QmpError::generic(format!(
                        "QMP input member '{name}' clashes with '{other}'"
                    )));
                }
                None => {
                    found = Some((name, command));
                    continue;
                }
            },
            ("execute" | "exec-oob", _) => "must be a string",
            ("arguments", Value::Object(_)) => continue,
            ("arguments", _) => "must be an object",
            _ => "is unexpected",
        };
        return Err(QmpError::generic(format!("QMP input member '{name}' {fault}")));
    }
    match found {
        Some((name, command)) => Ok((command.to_owned(), name == "exec-oob")),
        None => Err(QmpError::generic("QMP input lacks member 'execute'")),
    }
}
