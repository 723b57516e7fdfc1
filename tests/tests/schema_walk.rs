//! The schema of a running server against what that server does: every command is called with what the schema allows and
//! with what it forbids, and every reply is held against the type that the schema promises.

use bulkhead_tests::machine::Machine;
use bulkhead_tests::qmp::Qmp;
use bulkhead_tests::schema::{Command, ERROR_CLASSES, Schema};
use bulkhead_tests::{guest, need_kvm};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::os::fd::AsFd;

/// A machine with something to tell in every query: two vCPUs, a disk, a set of descriptors, a dump.
fn machine() -> (Machine, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    std::fs::File::create(directory.path().join("disk"))
        .and_then(|file| file.set_len(1 << 20))
        .unwrap();
    let arguments = format!(
        "-m 64 -smp 2 -S -kernel {} -drive file={{dir}}/disk,if=virtio,format=raw",
        guest::image().display()
    );
    let mut machine = Machine::start_in(directory, &arguments);
    let mut qmp = machine.qmp();
    let dump = json!({"paging": false, "protocol": format!("file:{}", machine.path("d").display())});
    qmp.execute("dump-guest-memory", dump);
    qmp.pass(&[std::fs::File::open("/dev/null").unwrap().as_fd()]);
    qmp.execute("add-fd", json!({"fdset-id": 3, "opaque": "null"}));
    (machine, qmp)
}

fn schema(qmp: &mut Qmp) -> Schema {
    Schema::new(&qmp.run("query-qmp-schema")).unwrap()
}

fn call(qmp: &mut Qmp, command: &Command, arguments: Option<Value>) -> Value {
    let mut request = json!({"execute": command.name});
    if let Some(arguments) = arguments {
        request["arguments"] = arguments;
    }
    qmp.request(&request)
}

/// The description of an error reply, which has exactly a class and a description.
#[track_caller]
fn description(reply: &Value) -> String {
    let error = reply["error"]
        .as_object()
        .unwrap_or_else(|| panic!("no error: {reply}"));
    assert_eq!(error.len(), 2, "{reply}");
    assert!(ERROR_CLASSES.contains(&error["class"].as_str().unwrap()), "{reply}");
    error["desc"].as_str().unwrap().to_owned()
}

/// Arguments of every JSON type.
fn of_every_type() -> [Value; 7] {
    [
        Value::Null,
        json!(true),
        json!(1),
        json!(1.5),
        json!("no such word"),
        json!([]),
        json!({}),
    ]
}

#[test]
fn the_schema_is_closed_and_names_the_commands() {
    need_kvm!();
    let (_machine, mut qmp) = machine();
    let schema = schema(&mut qmp);
    assert_eq!(schema.faults(), Vec::<String>::new());
    let described: BTreeSet<_> = schema.commands().into_iter().map(|command| command.name).collect();
    let commands = qmp.run("query-commands");
    let listed: BTreeSet<_> = commands
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(described, listed);
}

#[test]
fn every_query_answers_with_what_the_schema_promises() {
    need_kvm!();
    let (_machine, mut qmp) = machine();
    let schema = schema(&mut qmp);
    let queries = schema
        .commands()
        .into_iter()
        .filter(|command| command.name.starts_with("query-"));
    let mut answered = 0;
    for query in queries {
        let members = schema.members(&query.arguments);
        let needs_arguments = members.iter().any(|(_, _, optional)| !optional);
        // Without arguments, with the mandatory ones, with each optional one, with all.
        let least = schema.sample(&query.arguments, false);
        let full = schema.sample(&query.arguments, true);
        let mut forms = vec![None, Some(least.clone()), Some(full.clone())];
        for (name, _, _) in members.iter().filter(|(_, _, optional)| *optional) {
            let mut one = least.clone();
            one[name] = full[name].clone();
            forms.push(Some(one));
        }
        for arguments in forms {
            let shown = arguments.clone();
            let reply = call(&mut qmp, &query, arguments);
            match reply.get("return") {
                Some(value) => {
                    answered += 1;
                    assert_eq!(reply.as_object().unwrap().len(), 1, "{reply}");
                    schema
                        .validate(&query.returns, value)
                        .unwrap_or_else(|error| panic!("{}: {error}", query.name));
                }
                // A sample's words name nothing that exists.
                None => {
                    let text = description(&reply);
                    let made_up = shown.as_ref().is_some_and(|arguments| *arguments != json!({}));
                    assert!(made_up || needs_arguments, "{}: {text}", query.name);
                }
            }
        }
    }
    assert!(answered > 50, "{answered} answers");
}

/// Nothing of this has an effect: arguments are checked before a command begins.
#[test]
fn what_the_schema_forbids_is_refused_by_every_command() {
    need_kvm!();
    let (_machine, mut qmp) = machine();
    let schema = schema(&mut qmp);
    let before = qmp.run("query-status");
    qmp.events();
    let mut refused = 0;
    for command in schema.commands() {
        let least = schema.sample(&command.arguments, false);
        let mut unknown = least.clone();
        unknown["no-such-member"] = json!(1);
        let text = description(&call(&mut qmp, &command, Some(unknown)));
        assert_eq!(text, "Parameter 'no-such-member' is unexpected", "{}", command.name);
        refused += 1;
        for (name, ty, optional) in schema.members(&command.arguments) {
            if !optional {
                let mut without = least.clone();
                without.as_object_mut().unwrap().remove(&name);
                let text = description(&call(&mut qmp, &command, Some(without)));
                assert_eq!(text, format!("Parameter '{name}' is missing"), "{}", command.name);
                refused += 1;
            }
            for value in of_every_type() {
                // A list or an object may lack something inside; that is the type's own matter.
                let has_form = schema.sample(&ty, true);
                let same_form = std::mem::discriminant(&value) == std::mem::discriminant(&has_form);
                if schema.validate(&ty, &value).is_ok() || same_form && (value.is_array() || value.is_object()) {
                    continue;
                }
                let mut wrong = least.clone();
                wrong[&name] = value.clone();
                let text = description(&call(&mut qmp, &command, Some(wrong)));
                let expected = [
                    format!("Invalid parameter type for '{name}', expected: "),
                    format!("Parameter '{name}' does not accept value '"),
                ];
                assert!(
                    expected.iter().any(|expected| text.starts_with(expected)),
                    "{} {name} {value}: {text}",
                    command.name
                );
                refused += 1;
            }
        }
        for arguments in of_every_type().into_iter().filter(|value| !value.is_object()) {
            let text = description(&call(&mut qmp, &command, Some(arguments)));
            assert_eq!(
                text, "QMP input member 'arguments' must be an object",
                "{}",
                command.name
            );
            refused += 1;
        }
    }
    assert_eq!(qmp.run("query-status"), before);
    assert_eq!(qmp.events(), Vec::<Value>::new());
    println!("{refused} requests refused");
    assert!(refused > 250, "{refused}");
}

/// The judge itself: it must not wave things through.
#[test]
fn a_wrong_reply_would_be_noticed() {
    let entries = json!([
        {"name": "query-x", "meta-type": "command", "arg-type": "0", "ret-type": "[1]"},
        {"name": "0", "meta-type": "object", "members": []},
        {"name": "1", "meta-type": "object", "tag": "kind", "variants": [{"case": "a", "type": "3"}], "members": [
            {"name": "kind", "type": "2"}, {"name": "size", "type": "int", "default": null}]},
        {"name": "2", "meta-type": "enum", "members": [{"name": "a"}, {"name": "b"}], "values": ["a", "b"]},
        {"name": "3", "meta-type": "object", "members": [{"name": "text", "type": "str"}]},
        {"name": "[1]", "meta-type": "array", "element-type": "1"},
        {"name": "int", "meta-type": "builtin", "json-type": "int"},
        {"name": "str", "meta-type": "builtin", "json-type": "string"},
    ]);
    let schema = Schema::new(&entries).unwrap();
    assert_eq!(schema.faults(), Vec::<String>::new());
    for good in [
        json!([]),
        json!([{"kind": "b"}]),
        json!([{"kind": "a", "text": "x", "size": 1}]),
    ] {
        assert_eq!(schema.validate("[1]", &good), Ok(()), "{good}");
    }
    for (bad, text) in [
        (json!({}), "value: {} is not of type '[1]'"),
        (json!([{}]), "value[0]: member 'kind' is missing"),
        (json!([{"kind": "c"}]), "value[0].kind: 'c' is no word of enum '2'"),
        (json!([{"kind": "a"}]), "value[0]: member 'text' is missing"),
        (
            json!([{"kind": "b", "text": "x"}]),
            "value[0]: member 'text' is not declared",
        ),
        (
            json!([{"kind": "b", "size": 1.5}]),
            "value[0].size: 1.5 is not of type 'int'",
        ),
        (
            json!([{"kind": "b", "size": null}]),
            "value[0].size: null is not of type 'int'",
        ),
    ] {
        assert_eq!(schema.validate("[1]", &bad), Err(text.to_owned()), "{bad}");
    }
    let mut broken = entries.as_array().unwrap().clone();
    broken.push(json!({"name": "4", "meta-type": "array", "element-type": "5"}));
    broken.retain(|entry| entry["name"] != "int");
    let faults = Schema::new(&Value::Array(broken.clone())).unwrap().faults();
    assert_eq!(faults, ["type 'int' does not exist", "nothing leads to '4'"]);
    broken.push(json!({"name": "4", "meta-type": "object", "members": []}));
    assert!(Schema::new(&Value::Array(broken)).is_err());
    let event = json!([{"name": "E", "meta-type": "event", "arg-type": "0"}, {"name": "0", "meta-type": "object", "members": []}]);
    let schema = Schema::new(&event).unwrap();
    let stamp = json!({"seconds": 1, "microseconds": 2});
    assert!(schema.check_event(&json!({"event": "E", "timestamp": stamp})).is_ok());
    for bad in [
        json!({"event": "F", "timestamp": stamp}),
        json!({"event": "E"}),
        json!({"event": "E", "timestamp": stamp, "data": {"x": 1}}),
        json!({"event": "E", "timestamp": stamp, "more": 1}),
    ] {
        assert!(schema.check_event(&bad).is_err(), "{bad}");
    }
}
