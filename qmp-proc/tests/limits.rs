//! Hostile clients: what they cost is bounded and is their own connection's.

mod common;

use common::{Client, Process, error};
use ipc::qmp::Event;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use qmp_proc::json::{MAX_NESTING, MAX_TOKEN_BYTES, MAX_TOKENS};
use qmp_proc::memory::{LIMIT_BYTES, OUT_OF_MEMORY_STATUS};
use std::io::{IoSlice, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// Sends from another thread, because the answers may fill the socket first.
fn send_while_reading(client: &Client, bytes: Vec<u8>) -> std::thread::JoinHandle<()> {
    let mut stream = client.stream.try_clone().unwrap();
    std::thread::spawn(move || {
        // The process may end the connection before it has taken everything.
        let _ = stream.write_all(&bytes);
    })
}

fn with_id(id: &[u8]) -> Vec<u8> {
    [b"{'id':", id, b",'execute':'query-version'}"].concat()
}

#[test]
fn idle_and_waiting_processes_are_small() {
    let spare = Process::spare(false);
    let (_process, mut client) = Process::negotiated();
    client.ask("{'execute': 'query-version'}");
    let (pss, rss) = (spare.kib("smaps_rollup", "Pss:"), spare.kib("status", "VmRSS:"));
    println!("idle spare: PSS {pss} KiB, RSS {rss} KiB");
    // Of the reserve, nothing is touched. The bound has room for the code pages of a debug build.
    assert!(rss < 6 << 10, "{rss} KiB");
}

#[test]
fn the_largest_legal_messages_are_answered() {
    let (process, mut client) = Process::negotiated();
    let string = [&b"'"[..], &vec![b'x'; MAX_TOKEN_BYTES - 100], b"'"].concat();
    let escaped = [&b"'"[..], &vec![0x7F; 3 << 20], b"'"].concat();
    let numbers = [&b"[0"[..], &b",0".repeat(MAX_TOKENS / 2 - 10), b"]"].concat();
    let strings = [&b"['a'"[..], &b",'a'".repeat(MAX_TOKENS / 2 - 10), b"]"].concat();
    let lists = [&b"[[0]"[..], &b",[0]".repeat(MAX_TOKENS / 4 - 10), b"]"].concat();
    let objects = [&b"[{'':0}"[..], &b",{'':0}".repeat(MAX_TOKENS / 6 - 10), b"]"].concat();
    let depth = MAX_NESTING as usize - 1;
    let nested = [b"[".repeat(depth), b"]".repeat(depth)].concat();
    for (name, id) in [
        ("string", string),
        ("escaped", escaped),
        ("numbers", numbers),
        ("strings", strings),
        ("lists", lists),
        ("objects", objects),
        ("nested", nested),
    ] {
        let started = Instant::now();
        let id_bytes = id.len();
        let sender = send_while_reading(&client, with_id(&id));
        let answer = client.line();
        sender.join().unwrap();
        assert!(
            answer.starts_with(r#"{"return": {"qemu""#),
            "{name}: {}",
            &answer[..100]
        );
        assert!(answer.len() > id_bytes, "{name}");
        println!(
            "{name}: {id_bytes} bytes, {:?}, peak {} KiB",
            started.elapsed(),
            process.kib("status", "VmHWM:")
        );
    }
    assert!(process.kib("status", "VmHWM:") < (LIMIT_BYTES >> 10) as u64);
}

#[test]
fn messages_over_the_limits_are_refused_and_the_session_goes_on() {
    let (_process, mut client) = Process::negotiated();
    let depth = MAX_NESTING as usize + 1;
    for (bytes, what) in [
        (
            [b"['".to_vec(), vec![b'x'; MAX_TOKEN_BYTES + (1 << 20)]].concat(),
            "token size",
        ),
        ([b"[0".to_vec(), b",0".repeat(MAX_TOKENS)].concat(), "token count"),
        (b"[".repeat(depth), "nesting depth"),
        (b"{'a':".repeat(depth), "nesting depth"),
    ] {
        let sender = send_while_reading(&client, [&bytes, &b"\n"[..]].concat());
        assert_eq!(
            client.line(),
            error("GenericError", &format!("JSON {what} limit exceeded"))
        );
        sender.join().unwrap();
        // Whatever the remainder was taken for, it ends here.
        client.send("\u{1}\n{'execute': 'query-version', 'id': 'again'}");
        let mut errors = 0;
        while !client.line().ends_with(r#""id": "again"}"#) {
            errors += 1;
        }
        assert!(errors <= 17, "{what}: {errors} errors");
    }
}

#[test]
fn exhausted_memory_ends_the_connection_and_nothing_else() {
    let (mut process, mut client) = Process::negotiated();
    drop(client);
    assert!(process.end().success());
    (process, client) = Process::serving(false);
    client.line();
    client.ask(r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}"#);
    client.send("{'execute': 'stop'}");
    process.call();
    // Eight requests may wait, and each may be large.
    let large = with_id(&[&b"'"[..], &vec![b'x'; 60 << 20], b"'"].concat());
    let sender = send_while_reading(&client, large.repeat(8));
    assert_eq!(client.rest(), Vec::<String>::new());
    sender.join().unwrap();
    assert_eq!(process.end().code(), Some(OUT_OF_MEMORY_STATUS));
    let log = process.log_lines();
    assert!(
        matches!(&log[..], [line] if line.starts_with("out of memory")),
        "{log:?}"
    );
}

#[test]
fn garbage_gets_a_bounded_number_of_errors() {
    let (process, mut client) = Process::negotiated();
    let mut state = 1u64;
    let garbage: Vec<u8> = (0..2 << 20)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .collect();
    let lines = garbage.iter().filter(|byte| **byte == b'\n').count();
    let sender = send_while_reading(&client, [&garbage, &b"\n\xFF\n{'id': 'end'}"[..]].concat());
    let mut answers = 0;
    while !client.line().contains("end") {
        answers += 1;
    }
    sender.join().unwrap();
    assert!(answers <= 20 * lines, "{answers} answers to {lines} lines");
    let peak = process.kib("status", "VmHWM:");
    assert!(peak < 16 << 10, "{peak} KiB");
}

#[test]
fn a_client_that_does_not_read_is_not_read_from() {
    let (mut process, mut client) = Process::negotiated();
    client.stream.set_nonblocking(true).unwrap();
    let requests = format!("{{'execute': 'query-version', 'id': '{}'}}", "x".repeat(2000)).repeat(10);
    let started = Instant::now();
    let mut blocked = 0;
    while blocked < 20 {
        assert!(started.elapsed() < common::DEADLINE);
        match client.stream.write(requests.as_bytes()) {
            Ok(written) => blocked = if written == 0 { blocked + 1 } else { 0 },
            Err(_) => {
                blocked += 1;
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
    let peak = process.kib("status", "VmHWM:");
    assert!(peak < 10 << 10, "{peak} KiB");
    drop(client);
    assert!(process.end().success(), "{:?}", process.log_lines());
}

#[test]
fn a_client_that_does_not_read_its_events_is_dropped() {
    let (mut process, _client) = Process::negotiated();
    let mut sent = 0;
    while process.child.try_wait().unwrap().is_none() {
        let event = ipc::qmp::TimedEvent {
            seconds: 0,
            microseconds: 0,
            event: Event::Stop,
        };
        if process.channel.send(ipc::qmp::ToQmp::Event(event)).is_err() {
            break;
        }
        sent += 1;
        assert!(sent < 100_000);
    }
    assert_eq!(process.end().code(), Some(ipc::helper::CHANNEL_LOST_STATUS));
    let log = process.log_lines();
    assert!(log[0].contains("does not read"), "{log:?}");
}

#[test]
fn received_fds_do_not_pile_up() {
    let (process, mut client) = Process::negotiated();
    let before = process.open_fds();
    let null = std::fs::File::open("/dev/null").unwrap();
    for count in [1, 2, 16, 1, 16] {
        for _ in 0..20 {
            let fds = vec![null.as_raw_fd(); count];
            let message = [IoSlice::new(b" ")];
            let control = [ControlMessage::ScmRights(&fds)];
            sendmsg::<()>(client.stream.as_raw_fd(), &message, &control, MsgFlags::empty(), None).unwrap();
        }
        client.ask("{'execute': 'query-version'}");
        // The newest one waits for a command that takes it.
        assert_eq!(process.open_fds(), before + 1);
    }
}

#[test]
fn more_fds_than_the_process_may_hold_end_the_connection() {
    let (mut process, mut client) = Process::negotiated();
    let limit = libc::rlimit {
        rlim_cur: 20,
        rlim_max: 20,
    };
    // SAFETY: the pointer is to a local; the process is our child.
    let result = unsafe {
        libc::prlimit(
            process.child.id() as i32,
            libc::RLIMIT_NOFILE,
            &raw const limit,
            std::ptr::null_mut(),
        )
    };
    assert_eq!(result, 0);
    let null = std::fs::File::open("/dev/null").unwrap();
    let fds = vec![null.as_raw_fd(); 200];
    let control = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(
        client.stream.as_raw_fd(),
        &[IoSlice::new(b" ")],
        &control,
        MsgFlags::empty(),
        None,
    )
    .unwrap();
    assert_eq!(client.rest(), Vec::<String>::new());
    assert_eq!(process.end().code(), Some(ipc::helper::CHANNEL_LOST_STATUS));
}
