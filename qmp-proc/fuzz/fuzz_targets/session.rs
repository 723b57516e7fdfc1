//! Any bytes from a client: every message gets one answer, every call is a well-formed command, waiting is bounded.
#![no_main]

use ipc::qmp::{Event, MonitorSetup, QmpError, Return, TimedEvent};
use libfuzzer_sys::fuzz_target;
use qmp_proc::json::Reader;
use qmp_proc::json::print::to_text;
use qmp_proc::session::{MAX_QUEUED_REQUESTS, Session};

fuzz_target!(|bytes: &[u8]| {
    let mut session = Session::new(MonitorSetup {
        pretty: false,
        package: String::new(),
        allow: ipc::narrowing::Allow::All,
    });
    let greeting = session.next_output().map(to_text).unwrap();
    assert!(greeting.starts_with("{\"QMP\""));
    // Half of the runs begin after a negotiation.
    let negotiated: &[u8] = match bytes.first() {
        Some(0..64) => b"{'execute':'qmp_capabilities'}",
        Some(64..128) => b"{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}",
        _ => b"",
    };
    let mut reader = Reader::default();
    let (mut asked, mut answered, mut events) = (0, 0, 0);
    let mut open = Vec::new();
    for mut rest in [negotiated, bytes] {
        loop {
            while session.wants_input() {
                let Some(message) = reader.next(&mut rest) else { break };
                asked += 1;
                session.input(message);
                if let Some(call) = session.next_call() {
                    open.push(call.call);
                }
                assert!(open.len() <= 1 + MAX_QUEUED_REQUESTS);
            }
            while let Some(message) = session.next_output() {
                let text = to_text(message);
                if text.contains("\"event\"") && text.starts_with("{\"timestamp\"") {
                    events += 1;
                } else {
                    assert!(text.contains("\"return\": ") || text.contains("\"error\": "), "{text}");
                    answered += 1;
                }
            }
            let Some(call) = open.pop() else { break };
            let event = TimedEvent {
                seconds: 0,
                microseconds: 0,
                event: Event::Stop,
            };
            session.event(&event).unwrap();
            let result = if call % 2 == 0 {
                Ok(Return::Empty)
            } else {
                Err(QmpError::generic("no"))
            };
            session.returned(call, result).unwrap();
            if let Some(call) = session.next_call() {
                open.push(call.call);
            }
        }
    }
    assert!(session.is_idle());
    assert_eq!(asked, answered);
    assert!(events <= asked);
});
