//! File descriptors that a client passes: which one reaches the supervisor, with which command, and what becomes of the
//! others.

mod common;

use common::{Client, Process, error};
use ipc::qmp::{AddFdInfo, Command, FdsetFdInfo, FdsetInfo, Return};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, OwnedFd};

/// A pipe: the test keeps the read end and sees by it when the last write end is closed.
fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap()
}

fn is_closed(reader: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap();
    fds[0].revents().unwrap().contains(PollFlags::POLLHUP)
}

/// Makes sure that everything sent before has been read.
fn settle(client: &mut Client) {
    client.ask("{'execute': 'query-version'}");
}

fn getfd(name: &str) -> String {
    format!("{{'execute': 'getfd', 'arguments': {{'fdname': '{name}'}}}}")
}

#[test]
fn the_newest_first_fd_goes_with_the_next_command_that_takes_one() {
    let (mut process, mut client) = Process::negotiated();
    let before = process.open_fds();
    let (old, old_writer) = pipe();
    let (first, first_writer) = pipe();
    let (second, second_writer) = pipe();
    client.send_with_fds(" ", &[&old_writer]);
    drop(old_writer);
    settle(&mut client);
    assert!(!is_closed(&old));
    client.send_with_fds(" ", &[&first_writer, &second_writer]);
    drop((first_writer, second_writer));
    settle(&mut client);
    assert!(is_closed(&old), "replaced");
    assert!(is_closed(&second), "spare");
    assert!(!is_closed(&first));

    // A command that takes none, and one that is refused, leave it.
    client.send("{'execute': 'query-status'}");
    let (call, command, fd) = process.call_with_fd();
    assert_eq!((command, fd.is_none()), (Command::QueryStatus, true));
    process.answer(call, Ok(Return::Empty));
    client.line();
    assert_eq!(
        client.ask("{'execute': 'getfd'}"),
        error("GenericError", "Parameter 'fdname' is missing")
    );

    client.send(getfd("a"));
    let (call, command, fd) = process.call_with_fd();
    assert_eq!(command, Command::GetFd { fdname: "a".into() });
    let fd = fd.expect("the client's fd");
    process.answer(call, Ok(Return::Empty));
    assert_eq!(client.line(), r#"{"return": {}}"#);
    assert_eq!(process.open_fds(), before, "qmp-proc keeps no copy");
    assert!(!is_closed(&first));
    drop(fd);
    assert!(is_closed(&first));

    client.send(getfd("b"));
    let (_, _, fd) = process.call_with_fd();
    assert!(fd.is_none(), "it is used up");
}

#[test]
fn an_fd_that_comes_with_the_command_itself_is_its() {
    let (mut process, mut client) = Process::negotiated();
    let (_reader, writer) = pipe();
    client.send_with_fds("{'execute': 'add-fd', 'arguments': {'fdset-id': 3}}", &[&writer]);
    let (call, command, fd) = process.call_with_fd();
    let expected = Command::AddFd {
        fdset_id: Some(3),
        opaque: None,
    };
    assert_eq!((command, fd.is_some()), (expected, true));
    process.answer(call, Ok(Return::AddedFd(AddFdInfo { fdset_id: 3, fd: 12 })));
    assert_eq!(client.line(), r#"{"return": {"fd": 12, "fdset-id": 3}}"#);
}

#[test]
fn sets_are_listed_as_clients_know_them() {
    let (mut process, mut client) = Process::negotiated();
    client.send("{'execute': 'query-fdsets'}");
    let (call, command) = process.call();
    assert_eq!(command, Command::QueryFdsets);
    let member = |fd, opaque: Option<&str>| FdsetFdInfo {
        fd,
        opaque: opaque.map(str::to_owned),
    };
    let set = FdsetInfo {
        fdset_id: 7,
        fds: vec![member(14, Some("r:/x")), member(15, None)],
    };
    process.answer(call, Ok(Return::Fdsets(vec![set])));
    assert_eq!(
        client.line(),
        r#"{"return": [{"fds": [{"fd": 14, "opaque": "r:/x"}, {"fd": 15}], "fdset-id": 7}]}"#
    );
}

#[test]
fn an_fd_that_nobody_took_goes_with_its_connection() {
    let (mut process, mut client) = Process::negotiated();
    let (reader, writer) = pipe();
    client.send_with_fds(" ", &[&writer]);
    drop(writer);
    settle(&mut client);
    assert!(!is_closed(&reader));
    drop(client);
    assert!(process.end().success());
    assert!(is_closed(&reader));
}
