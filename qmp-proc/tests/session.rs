//! What a client sees: the protocol's states against the sealed process.

mod common;

use common::{Client, GREETING, Process, error};
use ipc::narrowing::Allow;
use ipc::qmp::{
    Command, CpuInfoFast, CpuInstanceProperties, DumpFormat, DumpQueryResult, DumpStatus, ErrorClass, Event, NameInfo,
    QmpError, Return, RunState, ShutdownCause, StatusInfo,
};
use std::io::{Read, Write};
use std::net::Shutdown;

const CAPABILITIES: &str = r#"{"execute": "qmp_capabilities"}"#;
const WITH_OOB: &str = r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}"#;
const DONE: &str = r#"{"return": {}}"#;
const STOP_EVENT: &str = r#"{"timestamp": {"seconds": 1700000000, "microseconds": 42}, "event": "STOP"}"#;

#[test]
fn greeting_negotiation_command_and_leaving() {
    let (mut process, mut client) = Process::serving(false);
    assert_eq!(client.line(), GREETING);
    assert_eq!(
        client.ask(r#"{"execute": "query-status"}"#),
        error(
            "CommandNotFound",
            "Expecting capabilities negotiation with 'qmp_capabilities'"
        )
    );
    assert_eq!(client.ask(CAPABILITIES), DONE);
    client.send(r#"{"execute": "query-status", "id": {"a": [1, "é"]}}"#);
    let (call, command) = process.call();
    assert_eq!(command, Command::QueryStatus);
    let status = StatusInfo {
        running: false,
        status: RunState::GuestPanicked,
        helper_restarts: None,
        policy_violations: None,
    };
    process.answer(call, Ok(Return::Status(status)));
    assert_eq!(
        client.line(),
        r#"{"return": {"status": "guest-panicked", "running": false}, "id": {"a": [1, "\u00E9"]}}"#
    );
    drop(client);
    assert!(process.end().success(), "{:?}", process.log_lines());
}

/// Requests and answers as a live server gave them.
#[test]
fn texts_before_and_after_the_negotiation() {
    let before: &[(&str, &str, &str)] = &[
        (
            "{'exec-oob': 'stop'}",
            "GenericError",
            "QMP input member 'exec-oob' is unexpected",
        ),
        ("{'a':1}", "GenericError", "QMP input member 'a' is unexpected"),
        ("{]", "GenericError", "JSON parse error, expecting value"),
        ("\u{1}\n", "GenericError", "JSON parse error, stray '\\u0001'"),
        (
            "{'execute': 'nosuch'}",
            "CommandNotFound",
            "Expecting capabilities negotiation with 'qmp_capabilities'",
        ),
        (
            "{'execute': 'qmp_capabilities', 'arguments': {'enable': ['foo']}}",
            "GenericError",
            "Parameter 'null' does not accept value 'foo'",
        ),
        (
            "{'execute': 'qmp_capabilities', 'arguments': {'enable': [1]}}",
            "GenericError",
            "Invalid parameter type for 'enable[0]', expected: string",
        ),
        (
            "{'execute': 'qmp_capabilities', 'arguments': {'enable': 'oob'}}",
            "GenericError",
            "Invalid parameter type for 'enable', expected: array",
        ),
        (
            "{'execute': 'qmp_capabilities', 'arguments': {'enable': ['oob'], 'x': 1}}",
            "GenericError",
            "Parameter 'x' is unexpected",
        ),
        (
            "{'execute': 'query-status'}",
            "CommandNotFound",
            "Expecting capabilities negotiation with 'qmp_capabilities'",
        ),
    ];
    let after: &[(&str, &str, &str)] = &[
        ("42\n", "GenericError", "QMP input must be a JSON object"),
        ("null\n", "GenericError", "QMP input must be a JSON object"),
        ("'s'", "GenericError", "QMP input must be a JSON object"),
        ("[]", "GenericError", "QMP input must be a JSON object"),
        ("{}", "GenericError", "QMP input lacks member 'execute'"),
        (
            "{'execute': 1}",
            "GenericError",
            "QMP input member 'execute' must be a string",
        ),
        (
            "{'execute': 'stop', 'arguments': null}",
            "GenericError",
            "QMP input member 'arguments' must be an object",
        ),
        (
            "{'execute': 'nosuch', 'arguments': []}",
            "GenericError",
            "QMP input member 'arguments' must be an object",
        ),
        (
            "{'execute': 'stop', 'foo': 1}",
            "GenericError",
            "QMP input member 'foo' is unexpected",
        ),
        (
            "{'execute': 'stop', 'exec-oob': 'stop'}",
            "GenericError",
            "QMP input member 'exec-oob' is unexpected",
        ),
        (
            "{'exec-oob': 'stop'}",
            "GenericError",
            "QMP input member 'exec-oob' is unexpected",
        ),
        (
            "{'execute': 'stop', 'arguments': {'x': 1}}",
            "GenericError",
            "Parameter 'x' is unexpected",
        ),
        (
            "{'execute': 'nosuch'}",
            "CommandNotFound",
            "The command nosuch has not been found",
        ),
        (
            "{'execute': 'query-events'}",
            "CommandNotFound",
            "The command query-events has not been found",
        ),
        (
            "{'execute': 'qmp_capabilities'}",
            "CommandNotFound",
            "Capabilities negotiation is already complete, command ignored",
        ),
    ];
    let (_process, mut client) = Process::serving(false);
    assert_eq!(client.line(), GREETING);
    for (request, class, desc) in before {
        assert_eq!(client.ask(request), error(class, desc), "{request}");
    }
    assert_eq!(client.ask(CAPABILITIES), DONE);
    for (request, class, desc) in after {
        assert_eq!(client.ask(request), error(class, desc), "{request}");
    }
}

/// The recorded pairs of dump-guest-memory that are decided before the supervisor hears of it.
#[test]
fn arguments_are_checked_before_anything_happens() {
    let (mut process, mut client) = Process::negotiated();
    for (arguments, desc) in [
        ("{}", "Parameter 'paging' is missing"),
        ("{'paging': false}", "Parameter 'protocol' is missing"),
        ("{'protocol': 'file:d'}", "Parameter 'paging' is missing"),
        (
            "{'paging': 'false', 'protocol': 'file:d'}",
            "Invalid parameter type for 'paging', expected: boolean",
        ),
        (
            "{'paging': 0, 'protocol': 'file:d'}",
            "Invalid parameter type for 'paging', expected: boolean",
        ),
        (
            "{'paging': false, 'protocol': 1}",
            "Invalid parameter type for 'protocol', expected: string",
        ),
        (
            "{'paging': false, 'protocol': 'file:d', 'x': 1}",
            "Parameter 'x' is unexpected",
        ),
        (
            "{'paging': false, 'protocol': 'file:d', 'begin': '0', 'length': 4096}",
            "Invalid parameter type for 'begin', expected: integer",
        ),
        (
            "{'paging': false, 'protocol': 'file:d', 'begin': 9223372036854775808, 'length': 4096}",
            "Invalid parameter type for 'begin', expected: integer",
        ),
        (
            "{'paging': false, 'protocol': 'file:d', 'begin': 0, 'length': 4096.0}",
            "Invalid parameter type for 'length', expected: integer",
        ),
        (
            "{'paging': false, 'protocol': 'file:d', 'begin': 0, 'length': 1e3}",
            "Invalid parameter type for 'length', expected: integer",
        ),
        (
            "{'paging': false, 'protocol': 'file:d', 'format': 'bogus'}",
            "Parameter 'format' does not accept value 'bogus'",
        ),
    ] {
        let request = format!("{{'execute': 'dump-guest-memory', 'arguments': {arguments}}}");
        assert_eq!(client.ask(&request), error("GenericError", desc), "{request}");
    }
    client.send(
        "{'execute': 'dump-guest-memory', 'arguments':
          {'length': -1, 'begin': 0, 'paging': false, 'protocol': 'file:d', 'format': 'elf', 'detach': true}}",
    );
    let expected = Command::DumpGuestMemory {
        paging: false,
        protocol: "file:d".to_owned(),
        detach: Some(true),
        begin: Some(0),
        length: Some(-1),
        format: Some(DumpFormat::Elf),
        compression: None,
        exclude: None,
        live: None,
    };
    assert_eq!(process.call().1, expected);
}

#[test]
fn ids_come_back_as_they_were_given() {
    let (_process, mut client) = Process::negotiated();
    for (id, back) in [
        ("null", "null"),
        ("'x'", "\"x\""),
        ("[1, [], {}]", "[1, [], {}]"),
        ("12345678901234567890", "12345678901234567890"),
        ("123456789012345678901234567890", "1.2345678901234568e+29"),
        ("1.0", "1"),
        ("-0", "0"),
        (
            "{'aa': 1, 'aq': {'b': 'é😀'}}",
            "{\"aq\": {\"b\": \"\\u00E9\\uD83D\\uDE00\"}, \"aa\": 1}",
        ),
    ] {
        assert_eq!(
            client.ask(format!("{{'id': {id}}}")),
            format!(
                r#"{{"id": {back}, "error": {{"class": "GenericError", "desc": "QMP input lacks member 'execute'"}}}}"#
            )
        );
        let name = client.ask(format!("{{'execute': 'query-version', 'id': {id}}}"));
        assert!(name.ends_with(&format!(", \"id\": {back}}}")), "{name}");
    }
}

#[test]
fn local_queries_are_answered_without_the_supervisor() {
    let (_process, mut client) = Process::negotiated();
    assert_eq!(
        client.ask("{'execute': 'query-version'}"),
        r#"{"return": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": "Bulkhead test"}}"#
    );
    let commands = client.ask("{'execute': 'query-commands'}");
    for name in ["qmp_capabilities", "quit", "dump-guest-memory", "query-cpus-fast"] {
        assert!(commands.contains(&format!("{{\"name\": \"{name}\"}}")), "{commands}");
    }
    let schema: serde_json::Value = serde_json::from_str(&client.ask("{'execute': 'query-qmp-schema'}")).unwrap();
    assert!(schema["return"].as_array().unwrap().len() > 40);
}

#[test]
fn a_narrow_monitor_has_no_other_commands() {
    let allow = ["query-commands", "query-status", "query-qmp-schema"].map(str::to_owned);
    let mut process = Process::narrow_spare(false, Allow::Only(allow.into()));
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    process.serve(theirs.into(), None);
    let mut client = Client::new(ours, &process);
    client.line();
    assert_eq!(client.ask(r#"{"execute": "qmp_capabilities"}"#), r#"{"return": {}}"#);
    for name in ["quit", "query-name", "query-version", "dump-guest-memory"] {
        assert_eq!(
            client.ask(format!("{{'execute': '{name}'}}")),
            error("CommandNotFound", &format!("The command {name} has not been found"))
        );
    }
    assert_eq!(
        client.ask("{'execute': 'query-commands'}"),
        r#"{"return": [{"name": "qmp_capabilities"}, {"name": "query-commands"}, {"name": "query-qmp-schema"}, {"name": "query-status"}]}"#
    );
    client.send("{'execute': 'query-status'}");
    assert_eq!(process.call().1, Command::QueryStatus);
}

#[test]
fn without_oob_one_command_at_a_time_and_answers_in_order() {
    let (mut process, mut client) = Process::negotiated();
    client.send("{'execute': 'stop', 'id': 1}{'execute': 'nosuch', 'id': 2}{]{'execute': 'cont', 'id': 3}");
    let (call, command) = process.call();
    assert_eq!(command, Command::Stop);
    client.assert_silent();
    process.answer(call, Ok(Return::Empty));
    let (call, command) = process.call();
    assert_eq!(command, Command::Cont);
    let failure = QmpError {
        class: ErrorClass::DeviceNotActive,
        desc: "no \"such\" device".to_owned(),
    };
    process.answer(call, Err(failure));
    assert_eq!(client.line(), r#"{"return": {}, "id": 1}"#);
    assert!(
        client
            .line()
            .starts_with(r#"{"id": 2, "error": {"class": "CommandNotFound""#)
    );
    assert_eq!(
        client.line(),
        error("GenericError", "JSON parse error, expecting value")
    );
    assert_eq!(
        client.line(),
        r#"{"id": 3, "error": {"class": "DeviceNotActive", "desc": "no \"such\" device"}}"#
    );
}

#[test]
fn with_oob_requests_wait_in_order_and_out_of_band_ones_do_not() {
    let (mut process, mut client) = Process::serving(false);
    client.line();
    assert_eq!(client.ask(WITH_OOB), DONE);
    client.send("{'execute': 'stop'}");
    let (call, _) = process.call();
    client.send("{'execute': 'query-version', 'id': 'waits'}");
    for (request, answer) in [
        (
            "{'exec-oob': 'stop', 'id': 1}",
            r#"{"id": 1, "error": {"class": "GenericError", "desc": "The command stop does not support OOB"}}"#
                .to_owned(),
        ),
        (
            "{'exec-oob': 'nosuch'}",
            error("CommandNotFound", "The command nosuch has not been found"),
        ),
        (
            "{'exec-oob': 1}",
            error("GenericError", "QMP input member 'exec-oob' must be a string"),
        ),
    ] {
        assert_eq!(client.ask(request), answer);
    }
    process.answer(call, Ok(Return::Empty));
    assert_eq!(client.line(), DONE);
    assert!(client.line().contains("waits"));
    assert_eq!(
        client.ask("{'execute': 'stop', 'exec-oob': 'stop'}"),
        error("GenericError", "QMP input member 'execute' clashes with 'exec-oob'")
    );
}

#[test]
fn with_oob_eight_requests_wait_and_the_next_is_not_read() {
    let (mut process, mut client) = Process::serving(false);
    client.line();
    assert_eq!(client.ask(WITH_OOB), DONE);
    client.send("{'execute': 'stop'}".repeat(9));
    client.send("{'exec-oob': 'stop', 'id': 'behind'}");
    let (mut call, _) = process.call();
    client.assert_silent();
    // Read as soon as the queue has room: after the first answer.
    process.answer(call, Ok(Return::Empty));
    assert_eq!(client.line(), DONE);
    let behind = client.line();
    assert!(behind.contains("behind"), "{behind}");
    for _ in 0..8 {
        call = process.call().0;
        process.answer(call, Ok(Return::Empty));
        assert_eq!(client.line(), DONE);
    }
}

#[test]
fn events_come_after_negotiation_and_before_the_answer_that_they_precede() {
    let (mut process, mut client) = Process::serving(false);
    assert_eq!(client.line(), GREETING);
    process.event(Event::Resume);
    client.assert_silent();
    assert_eq!(client.ask(CAPABILITIES), DONE);
    client.send("{'execute': 'stop'}");
    let (call, _) = process.call();
    process.event(Event::Stop);
    process.answer(call, Ok(Return::Empty));
    assert_eq!(client.line(), STOP_EVENT);
    assert_eq!(client.line(), DONE);
    process.event(Event::Shutdown {
        guest: false,
        reason: ShutdownCause::HostQmpQuit,
    });
    process.event(Event::DumpCompleted {
        result: DumpQueryResult {
            status: DumpStatus::Failed,
            completed: 0,
            total: 5,
        },
        error: Some("full".to_owned()),
    });
    let stamp = r#""timestamp": {"seconds": 1700000000, "microseconds": 42}"#;
    assert_eq!(
        client.line(),
        format!(r#"{{{stamp}, "event": "SHUTDOWN", "data": {{"guest": false, "reason": "host-qmp-quit"}}}}"#)
    );
    assert_eq!(
        client.line(),
        format!(
            r#"{{{stamp}, "event": "DUMP_COMPLETED", "data": {{"result": {{"total": 5, "status": "failed", "completed": 0}}, "error": "full"}}}}"#
        )
    );
}

#[test]
fn absent_members_are_absent_and_names_are_those_of_the_protocol() {
    let (mut process, mut client) = Process::negotiated();
    client.send("{'execute': 'query-name'}{'execute': 'query-cpus-fast'}");
    let (call, _) = process.call();
    process.answer(call, Ok(Return::Name(NameInfo { name: None })));
    assert_eq!(client.line(), DONE);
    let (call, _) = process.call();
    let cpu = CpuInfoFast {
        cpu_index: 0,
        qom_path: "/machine/unattached/device[0]".to_owned(),
        thread_id: 7,
        props: CpuInstanceProperties {
            socket_id: 0,
            core_id: 0,
            thread_id: 0,
        },
        target: "x86_64".to_owned(),
    };
    process.answer(call, Ok(Return::Cpus(vec![cpu])));
    let answer: serde_json::Value = serde_json::from_str(&client.line()).unwrap();
    assert_eq!(answer["return"][0]["qom-path"], "/machine/unattached/device[0]");
    assert_eq!(answer["return"][0]["props"]["socket-id"], 0);
}

#[test]
fn pretty_output_is_indented() {
    let (_process, mut client) = Process::serving(true);
    client.send(CAPABILITIES);
    let mut text = String::new();
    while !text.ends_with("    \"return\": {\n    }\n}\n") {
        text += &client.line();
        text.push('\n');
    }
    assert!(
        text.starts_with("{\n    \"QMP\": {\n        \"version\": {\n            \"qemu\": {\n"),
        "{text}"
    );
}

#[test]
fn quit_answers_then_closes() {
    let (mut process, mut client) = Process::negotiated();
    client.send("{'execute': 'quit', 'id': 'bye'}");
    let (call, command) = process.call();
    assert_eq!(command, Command::Quit);
    process.answer(call, Ok(Return::Empty));
    let (other, _) = ipc::channel::pair().unwrap();
    process.channel = ipc::Channel::new(other);
    assert_eq!(client.rest(), [r#"{"return": {}, "id": "bye"}"#]);
    assert!(process.end().success(), "{:?}", process.log_lines());
}

#[test]
fn a_client_that_sends_and_closes_has_its_commands_carried_out() {
    for half in [true, false] {
        let (mut process, mut client) = Process::serving(false);
        client.send(format!("{CAPABILITIES}{{'execute': 'stop'}}{{'execute': 'quit'}}"));
        let mut reading = if half {
            client.stream.shutdown(Shutdown::Write).unwrap();
            Some(client)
        } else {
            drop(client);
            None
        };
        for expected in [Command::Stop, Command::Quit] {
            let (call, command) = process.call();
            assert_eq!(command, expected);
            process.answer(call, Ok(Return::Empty));
        }
        if let Some(client) = &mut reading {
            assert_eq!(client.rest()[1..], [DONE, DONE, DONE]);
        }
        assert!(process.end().success(), "{:?}", process.log_lines());
    }
}

#[test]
fn a_client_that_leaves_during_a_command_is_not_waited_for() {
    let (mut process, mut client) = Process::negotiated();
    client.send("{'execute': 'stop'}");
    process.call();
    drop(client);
    assert!(process.end().success());
}

#[test]
fn a_spare_ends_with_its_channel() {
    let mut process = Process::spare(false);
    let (other, _) = ipc::channel::pair().unwrap();
    process.channel = ipc::Channel::new(other);
    assert!(process.end().success());
}

#[test]
fn a_stdio_monitor_is_a_pair_of_pipes() {
    let mut process = Process::spare(false);
    let (input, mut to_process) = std::io::pipe().unwrap();
    let (mut from_process, output) = std::io::pipe().unwrap();
    process.serve(input.into(), Some(output.into()));
    // Much more than a pipe holds: written piece by piece as it is read.
    let id = "x".repeat(300_000);
    let request = format!("{CAPABILITIES}{{'execute': 'query-version', 'id': '{id}'}}");
    let writer = std::thread::spawn(move || to_process.write_all(request.as_bytes()).map(|()| drop(to_process)));
    let mut text = String::new();
    from_process.read_to_string(&mut text).unwrap();
    writer.join().unwrap().unwrap();
    let lines: Vec<_> = text.split_terminator("\r\n").collect();
    assert_eq!((lines.len(), lines[0], lines[1]), (3, GREETING, DONE));
    assert!(lines[2].contains(&id));
    assert!(process.end().success(), "{:?}", process.log_lines());
}

#[test]
fn two_messages_in_one_write_and_one_message_in_many() {
    let (_process, mut client) = Process::negotiated();
    for byte in b"{'execute':'query-version'}" {
        client.send([*byte]);
    }
    assert!(client.line().contains("Bulkhead test"));
    client.send("{'execute':'query-version'}{'execute':'query-version'}");
    assert_eq!(client.line(), client.line());
}

/// The kernel resumes an interrupted poll by restart_syscall, which the policy must allow.
#[test]
fn a_stopped_and_continued_process_goes_on() {
    use nix::sys::signal::{Signal, kill};
    use nix::sys::wait::{WaitPidFlag, waitpid};
    let (process, mut client) = Process::negotiated();
    let pid = nix::unistd::Pid::from_raw(process.child.id() as i32);
    for _ in 0..5 {
        kill(pid, Signal::SIGSTOP).unwrap();
        waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
        kill(pid, Signal::SIGCONT).unwrap();
        assert!(client.ask("{'execute': 'query-version'}").contains("Bulkhead test"));
    }
}
