//! Other people's clients against the sealed process.

mod common;

use common::Process;
use ipc::qmp::{Command, Event, Return, RunState, StatusInfo};
use std::os::unix::net::UnixListener;

/// `BULKHEAD_PYTHON` names a Python that has qemu.qmp (`pip install qemu.qmp`); otherwise the system's is tried.
#[test]
fn qemu_qmp_runs_a_session() {
    let python = std::env::var("BULKHEAD_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let probe = std::process::Command::new(&python)
        .args(["-c", "import qemu.qmp"])
        .output();
    if !probe.is_ok_and(|probe| probe.status.success()) {
        println!("skipped: {python} has no qemu.qmp; make a venv with it and set BULKHEAD_PYTHON");
        return;
    }
    let path = std::env::temp_dir().join(format!("bulkhead-qmp-{}.sock", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qemu_qmp.py");
    let client = std::process::Command::new(&python)
        .args([script.as_ref(), path.as_os_str()])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut process = Process::spare(false);
    let (connection, _) = listener.accept().unwrap();
    process.serve(connection.into(), None);
    let (call, command) = process.call();
    assert_eq!(command, Command::QueryStatus);
    let status = StatusInfo {
        running: true,
        status: RunState::Running,
        helper_restarts: None,
        policy_violations: None,
    };
    process.answer(call, Ok(Return::Status(status)));
    let (call, command) = process.call();
    assert_eq!(command, Command::Stop);
    process.event(Event::Stop);
    process.answer(call, Ok(Return::Empty));
    let output = client.wait_with_output().unwrap();
    let _ = std::fs::remove_file(&path);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).lines().collect::<Vec<_>>(),
        [
            "version 10 ['oob']",
            "status running",
            "error CommandNotFound The command nosuch has not been found",
            "commands True",
            "schema True",
            "stop {}",
            "event STOP",
        ]
    );
    assert!(process.end().success(), "{:?}", process.log_lines());
}
