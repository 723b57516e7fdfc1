//! What a client sees: the protocol's states against the sealed process.

mod common;

use common::{GREETING, Process, error};
use ipc::qmp::{
    Command, DumpFormat, DumpQueryResult, DumpStatus, ErrorClass, Event, QmpError, Return, RunState, ShutdownCause,
    StatusInfo,
};

#[test]
fn greeting_negotiation_command_and_leaving() {
    let (mut process, mut client) = Process::serving(false);
    assert_eq!(client.line(), GREETING);
    assert_eq!(
        client.ask(r#"{"execute": "query-status"}"#),
        error("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
    );
    assert_eq!(client.ask(r#"{"execute": "qmp_capabilities"}"#), r#"{"return": {}}"#);
    client.send(r#"{"execute": "query-status", "id": {"a": [1, "é"]}}"#);
    let (call, command) = process.call();
    assert_eq!(command, Command::QueryStatus);
    let status = StatusInfo {
        running: false,
        status: RunState::GuestPanicked,
    };
    process.answer(call, Ok(Return::Status(status)));
    assert_eq!(
        client.line(),
        r#"{"return": {"status": "guest-panicked", "running": false}, "id": {"a": [1, "\u00E9"]}}"#
    );
    drop(client);
    assert!(process.end().success(), "{:?}", process.log_lines());
}
