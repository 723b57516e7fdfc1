//! What `query-qmp-schema` says, as a judge of everything else that a server says: an implementation of its own, which
//! shares no code with the server's checks.

use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

/// The classes that an error may have.
pub const ERROR_CLASSES: [&str; 5] = [
    "GenericError",
    "CommandNotFound",
    "DeviceNotActive",
    "DeviceNotFound",
    "KVMMissingCap",
];

/// A schema: its entries by name.
pub struct Schema {
    entries: BTreeMap<String, Value>,
}

/// A command of the schema: its name, and the names of its arguments' and its result's types.
#[derive(Debug, Clone)]
pub struct Command {
    /// Its name.
    pub name: String,
    /// The type of its arguments.
    pub arguments: String,
    /// The type of its result.
    pub returns: String,
}

fn text<'a>(entry: &'a Value, name: &str) -> &'a str {
    entry[name].as_str().unwrap_or_default()
}

fn items<'a>(entry: &'a Value, name: &str) -> &'a [Value] {
    entry[name].as_array().map_or(&[], Vec::as_slice)
}

impl Schema {
    /// Takes a result of query-qmp-schema.
    ///
    /// # Errors
    /// When it is no list, or two entries have one name.
    pub fn new(entries: &Value) -> Result<Self, String> {
        let list = entries.as_array().ok_or("the schema is no list")?;
        let mut map = BTreeMap::new();
        for entry in list {
            let name = text(entry, "name").to_owned();
            if map.insert(name.clone(), entry.clone()).is_some() {
                return Err(format!("two entries are called '{name}'"));
            }
        }
        Ok(Self { entries: map })
    }

    /// What is wrong with the schema as a whole: references that lead nowhere, entries that nothing leads to.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut reached = BTreeSet::new();
        let mut open: Vec<&str> = Vec::new();
        for (name, entry) in &self.entries {
            if ["command", "event"].contains(&text(entry, "meta-type")) {
                open.push(name);
            }
        }
        while let Some(name) = open.pop() {
            if !reached.insert(name) {
                continue;
            }
            match self.entries.get(name) {
                None => faults.push(format!("type '{name}' does not exist")),
                Some(entry) => open.extend(references(entry)),
            }
        }
        let orphans = self.entries.keys().filter(|name| !reached.contains(name.as_str()));
        faults.extend(orphans.map(|name| format!("nothing leads to '{name}'")));
        faults
    }

    /// All commands.
    pub fn commands(&self) -> Vec<Command> {
        let commands = self
            .entries
            .values()
            .filter(|entry| text(entry, "meta-type") == "command");
        commands
            .map(|entry| Command {
                name: text(entry, "name").to_owned(),
                arguments: text(entry, "arg-type").to_owned(),
                returns: text(entry, "ret-type").to_owned(),
            })
            .collect()
    }

    /// The members of an object type, variants aside: name, type and whether it may be absent.
    pub fn members(&self, ty: &str) -> Vec<(String, String, bool)> {
        let member = |member: &Value| {
            (
                text(member, "name").to_owned(),
                text(member, "type").to_owned(),
                member.get("default").is_some(),
            )
        };
        items(&self.entries[ty], "members").iter().map(member).collect()
    }

    /// Whether a value is of a type: all mandatory members are there, and none that is not declared.
    ///
    /// # Errors
    /// Where it is not, and why.
    pub fn validate(&self, ty: &str, value: &Value) -> Result<(), String> {
        self.check(ty, value, "value")
    }

    fn check(&self, ty: &str, value: &Value, path: &str) -> Result<(), String> {
        let entry = self
            .entries
            .get(ty)
            .ok_or_else(|| format!("{path}: type '{ty}' does not exist"))?;
        let fits = match (text(entry, "meta-type"), value) {
            ("builtin", value) => json_type(text(entry, "json-type"), value),
            ("enum", Value::String(word)) => {
                let known = items(entry, "members")
                    .iter()
                    .any(|member| text(member, "name") == word);
                if !known {
                    return Err(format!("{path}: '{word}' is no word of enum '{ty}'"));
                }
                true
            }
            ("array", Value::Array(list)) => {
                for (index, item) in list.iter().enumerate() {
                    self.check(text(entry, "element-type"), item, &format!("{path}[{index}]"))?;
                }
                true
            }
            ("object", Value::Object(object)) => return self.check_object(entry, object, path),
            ("alternate", value) => items(entry, "members")
                .iter()
                .any(|branch| self.check(text(branch, "type"), value, path).is_ok()),
            _ => false,
        };
        if fits {
            Ok(())
        } else {
            Err(format!("{path}: {value} is not of type '{ty}'"))
        }
    }

    fn check_object(&self, entry: &Value, object: &Map<String, Value>, path: &str) -> Result<(), String> {
        let mut known = BTreeSet::new();
        let variant = items(entry, "variants")
            .iter()
            .find(|variant| object.get(text(entry, "tag")) == Some(&variant["case"]))
            .and_then(|variant| self.entries.get(text(variant, "type")));
        for member in [Some(entry), variant]
            .into_iter()
            .flatten()
            .flat_map(|of| items(of, "members"))
        {
            let name = text(member, "name");
            known.insert(name);
            match object.get(name) {
                Some(value) => self.check(text(member, "type"), value, &format!("{path}.{name}"))?,
                None if member.get("default").is_some() => {}
                None => return Err(format!("{path}: member '{name}' is missing")),
            }
        }
        match object.keys().find(|name| !known.contains(name.as_str())) {
            Some(name) => Err(format!("{path}: member '{name}' is not declared")),
            None => Ok(()),
        }
    }

    /// A value of a type: with all optional members when `full`, with none otherwise.
    ///
    /// # Panics
    /// When the schema is not closed.
    pub fn sample(&self, ty: &str, full: bool) -> Value {
        let entry = &self.entries[ty];
        match text(entry, "meta-type") {
            "enum" => items(entry, "members")[0]["name"].clone(),
            "array" => json!([self.sample(text(entry, "element-type"), full)]),
            "alternate" => {
                // An object's form may contain the alternate itself.
                let branches = items(entry, "members");
                let is_plain = |branch: &&Value| text(&self.entries[text(branch, "type")], "meta-type") != "object";
                let plain = branches.iter().find(is_plain).unwrap_or(&branches[0]);
                self.sample(text(plain, "type"), full)
            }
            "object" => {
                let mut object = Map::new();
                let mut add = |of: &Value| {
                    for member in items(of, "members") {
                        if full || member.get("default").is_none() {
                            object.insert(text(member, "name").into(), self.sample(text(member, "type"), full));
                        }
                    }
                };
                add(entry);
                let case = items(entry, "members")
                    .iter()
                    .find(|member| member["name"] == entry["tag"])
                    .map(|tag| self.sample(text(tag, "type"), full));
                let variant = items(entry, "variants")
                    .iter()
                    .find(|variant| Some(&variant["case"]) == case.as_ref());
                if let Some(variant) = variant {
                    add(&self.entries[text(variant, "type")]);
                }
                Value::Object(object)
            }
            _ => match text(entry, "json-type") {
                "string" | "value" => json!("x"),
                "int" => json!(1),
                "number" => json!(1.5),
                "boolean" => json!(true),
                _ => Value::Null,
            },
        }
    }

    /// Checks an event as it came.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check_event(&self, message: &Value) -> Result<(), String> {
        let name = text(message, "event");
        let entry = self
            .entries
            .get(name)
            .filter(|entry| text(entry, "meta-type") == "event")
            .ok_or_else(|| format!("there is no event '{name}'"))?;
        let nothing = json!({});
        let data = message.get("data").unwrap_or(&nothing);
        self.check(text(entry, "arg-type"), data, name)?;
        let stamp = &message["timestamp"];
        if !(stamp["seconds"].is_i64() && stamp["microseconds"].is_i64()) {
            return Err(format!("{name}: the time is {stamp}"));
        }
        let members = message.as_object().into_iter().flat_map(Map::keys);
        let strange: Vec<_> = members
            .filter(|key| !["event", "data", "timestamp"].contains(&key.as_str()))
            .collect();
        if strange.is_empty() {
            Ok(())
        } else {
            Err(format!("{name}: members {strange:?}"))
        }
    }
}

/// The names of the types that an entry refers to.
fn references(entry: &Value) -> Vec<&str> {
    let own = ["arg-type", "ret-type", "element-type"]
        .iter()
        .map(|name| text(entry, name));
    let listed = ["members", "variants"]
        .iter()
        .flat_map(|list| items(entry, list))
        .map(|item| text(item, "type"));
    own.chain(listed).filter(|name| !name.is_empty()).collect()
}

/// Whether a value has a JSON type, as the protocol calls it.
fn json_type(name: &str, value: &Value) -> bool {
    match name {
        "string" => value.is_string(),
        "int" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "value" => true,
        _ => false,
    }
}

/// This build's own schema.
static OWN: LazyLock<Schema> = LazyLock::new(|| {
    let schema = qmp_proc::schema::introspect::schema(&ipc::narrowing::Allow::All);
    let text = qmp_proc::json::print::to_text(schema);
    let schema = serde_json::from_str(&text).expect("JSON");
    Schema::new(&schema).expect("a schema")
});

/// Checks an event that a client of Bulkhead has received; whatever test it came in.
///
/// # Panics
/// When it is not of the declared form.
pub fn judge_event(greeting: &Value, message: &Value) {
    let package = greeting["QMP"]["version"]["package"].as_str().unwrap_or_default();
    if package.starts_with("Bulkhead")
        && let Err(error) = OWN.check_event(message)
    {
        panic!("an event that the schema does not declare: {error}: {message}");
    }
}
