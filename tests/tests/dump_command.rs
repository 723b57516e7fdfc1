//! `bulkhead dump SOCKET FILE`, for people: against a machine of ours and against QEMU.

use bulkhead_tests::dumpfile::Dump;
use bulkhead_tests::dumpfile::ram::GuestRam;
use bulkhead_tests::lab::pieces::qemu;
use bulkhead_tests::machine::{Machine, programs, wait_until};
use bulkhead_tests::{guest, need_kvm};
use serde_json::json;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

fn machine() -> Machine {
    Machine::start(&format!(
        "-m 64 -S -append test=spin -kernel {}",
        guest::image().display()
    ))
}

fn command(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(programs().join("bulkhead"));
    command.arg("dump").arg(socket).args(arguments);
    command.current_dir(socket.parent().unwrap()).stdin(Stdio::null());
    command
}

fn dump(socket: &Path, arguments: &[&str]) -> Output {
    command(socket, arguments).output().unwrap()
}

/// What it complains about, in one line.
#[track_caller]
fn refusal(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let line = text.lines().last().unwrap_or_default();
    line.strip_prefix("bulkhead dump: ")
        .unwrap_or_else(|| panic!("{text}"))
        .to_owned()
}

#[test]
fn a_machine_is_dumped_and_the_command_that_opens_it_is_said() {
    need_kvm!();
    let mut machine = machine();
    machine.qmp();
    let socket = machine.path("qmp");
    // Relative to where the caller is, not the machine.
    for (arguments, format) in [
        (&["out"][..], "KDUMP   "),
        (&["--format=elf", "out.elf"], "\x7fELF"),
        (&["out.flat", "--format", "kdump-lzo"], "makedumpfile"),
    ] {
        let output = dump(&socket, arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
        let path = machine.path(arguments.iter().find(|word| word.starts_with("out")).unwrap());
        let name = path.file_name().unwrap().to_str().unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let [.., summary, advice] = lines[..] else {
            panic!("{text}")
        };
        assert!(
            summary.starts_with(&format!("{name}: ")) && summary.contains(" for 64.0 MiB of memory"),
            "{text}"
        );
        assert!(advice.contains(&format!("drgn -c {name}")), "{text}");
        assert!(std::fs::read(&path).unwrap().starts_with(format.as_bytes()));
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        if let Ok(ram) = GuestRam::of(machine.pid(), 64 << 20) {
            let compared = Dump::open(File::open(&path).unwrap()).and_then(|dump| dump.compare(&ram));
            compared.unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
    // Into a pipe, of a machine that runs.
    let output = dump(&socket, &["-"]);
    assert!(output.stdout.starts_with(b"makedumpfile"), "{:?}", output.stderr);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("standard output: 64.0 MiB of memory"), "{text}");
}

#[test]
fn refusals_are_clear_and_leave_nothing_behind() {
    need_kvm!();
    let mut machine = machine();
    let mut qmp = machine.qmp();
    let socket = machine.path("qmp");
    let missing = machine.path("nobody");
    let say = |arguments: &[&str]| refusal(&dump(&socket, arguments));
    assert_eq!(
        refusal(&dump(&missing, &["out"])),
        format!(
            "{}: No such file or directory; is that the socket of a machine that runs with -qmp unix:PATH,server=on,wait=off?",
            missing.display()
        )
    );
    let known = "elf, kdump-zlib, kdump-raw-zlib, ";
    let text = say(&["--format", "nope", "out"]);
    assert!(
        text.starts_with(&format!("the machine writes no nope; it writes: {known}")),
        "{text}"
    );
    assert_eq!(
        say(&["/nonexistent/out"]),
        "/nonexistent/out: No such file or directory"
    );
    std::fs::write(machine.path("mine"), "mine").unwrap();
    assert_eq!(say(&["mine"]), "mine exists; --force overwrites it");
    assert_eq!(std::fs::read(machine.path("mine")).unwrap(), b"mine");
    assert!(dump(&socket, &["mine", "--force", "--format", "elf"]).status.success());
    assert!(std::fs::read(machine.path("mine")).unwrap().starts_with(b"\x7fELF"));
    // A device stays.
    let full = say(&["/dev/full", "--force", "--format", "elf"]);
    assert_eq!(full, "dump: failed to write elf header: No space left on device");
    assert!(Path::new("/dev/full").exists());
    // A plain kdump into a pipe.
    assert_eq!(
        say(&["-", "--format", "kdump-raw-zlib"]),
        "kdump-raw formats require a seekable file"
    );
    // What was passed is used up or given back.
    let left = qmp
        .try_execute("closefd", json!({"fdname": "bulkhead-dump"}))
        .unwrap_err();
    assert_eq!(left["desc"], "File descriptor named 'bulkhead-dump' not found");
    // One that does not speak.
    let silent = machine.path("silent");
    let listener = UnixListener::bind(&silent).unwrap();
    let text = refusal(&dump(&silent, &["out"]));
    assert_eq!(
        text,
        format!(
            "{}: no greeting within 5 s; perhaps another client is connected",
            silent.display()
        )
    );
    drop(listener);
    let other = machine.path("other");
    let listener = UnixListener::bind(&other).unwrap();
    let speaker = std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"220 mail\r\n").unwrap());
    assert_eq!(
        refusal(&dump(&other, &["out"])),
        format!("{} is not the socket of a QMP monitor", other.display())
    );
    speaker.join().unwrap();
    assert!(!machine.path("out").exists());
}

/// Nobody reads the pipe, so the dump takes as long as the test wants.
#[test]
fn interrupted_it_says_that_the_dump_goes_on() {
    need_kvm!();
    let mut machine = machine();
    let mut qmp = machine.qmp();
    let socket = machine.path("qmp");
    let start = || -> Child {
        let mut command = command(&socket, &["-", "--format", "elf"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut child = start();
    wait_until("a dump", || qmp.run("query-dump")["status"] == "active");
    // A second one says why there is none.
    assert_eq!(
        refusal(&dump(&socket, &["second"])),
        "There is a dump in process, please wait."
    );
    assert!(!machine.path("second").exists());
    let mut stdout = child.stdout.take().unwrap();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(child.id() as i32),
        nix::sys::signal::Signal::SIGINT,
    )
    .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(text.ends_with(
        "bulkhead dump: interrupted. The machine goes on writing standard output, which is complete when query-dump says so.\n"
    ), "{text}");
    let drain = std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()).unwrap());
    wait_until("its end", || qmp.run("query-dump")["status"] == "completed");
    assert!(drain.join().unwrap() > 64 << 20);

    // The machine ends: the client says so and leaves nothing.
    let path = machine.path("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let child = command(&socket, &["fifo", "--force", "--format", "elf"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("a dump", || qmp.run("query-dump")["status"] == "active");
    qmp.run("quit");
    let output = child.wait_with_output().unwrap();
    let text = refusal(&output);
    assert!(
        [
            "the machine ends",
            "the machine has closed the connection: there is no dump"
        ]
        .contains(&text.as_str()),
        "{text}"
    );
    assert!(path.exists());
}

/// Any QMP server that writes dumps will do.
#[test]
fn qemu_is_dumped_as_well() {
    let Ok(program) = qemu() else {
        println!("SKIPPED: QEMU is not installed");
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("qmp");
    let mut child = Command::new(program)
        .args(["-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-S"])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
        .spawn()
        .unwrap();
    wait_until("QEMU's monitor", || socket.exists());
    let mut output = dump(&socket, &["out"]);
    for _ in 0..50 {
        // The socket is there before it is listened to.
        if output.status.success() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        output = dump(&socket, &["out"]);
    }
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let written = std::fs::read(directory.path().join("out")).unwrap_or_default();
    let _ = child.kill();
    let _ = child.wait();
    assert!(output.status.success(), "{text}");
    assert!(
        written.starts_with(b"makedumpfile") || written.starts_with(b"KDUMP   "),
        "{text}"
    );
    assert!(text.contains("crash VMLINUX out"), "{text}");
}
