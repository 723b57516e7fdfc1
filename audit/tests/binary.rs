//! `audit binary` on the helpers that were just built: what it must find, and what must not be there.

use audit::binary::{compare, reach};
use audit::policy::{Process, Source};
use std::path::PathBuf;

/// The helpers lie beside the tests' directory.
fn helper(process: Process) -> Option<PathBuf> {
    let test = std::env::current_exe().unwrap();
    let found = test
        .ancestors()
        .map(|path| path.join(process.name()))
        .find(|path| path.is_file());
    if found.is_none() {
        println!("SKIPPED: no {}: cargo build --workspace comes first", process.name());
    }
    found
}

#[test]
fn what_helpers_can_call_is_found_in_their_code() {
    for (process, must) in [
        (Process::QmpProc, ["recvmsg", "sendmsg", "poll", "write"]),
        (Process::DumpProc, ["recvmsg", "preadv2", "pwrite64", "lseek"]),
        (Process::VcpuProc, ["ioctl", "tgkill", "futex", "poll"]),
        (
            Process::BlockProc,
            ["io_uring_enter", "preadv2", "pwritev2", "fallocate"],
        ),
    ] {
        let Some(path) = helper(process) else {
            return;
        };
        let found = compare(&Source::Embedded.read(process).unwrap(), &reach(&path).unwrap());
        for call in must {
            assert!(found.sealed.iter().any(|of| of == call), "{call}: {found}");
        }
        // Made by the kernel, not by code.
        let unreached: Vec<_> = found
            .sealed_unreached
            .iter()
            .filter(|call| *call != "restart_syscall")
            .collect();
        assert!(unreached.is_empty(), "allowed without need: {found}");
        assert!(found.foreign.is_empty(), "{found}");
        // seccomp is called through `syscall`, whose number is an argument.
        assert!(found.until_sealed.iter().any(|of| of == "seccomp"), "{found}");
        // Nothing that a helper never does is linked in.
        for call in [
            "execve",
            "ptrace",
            "mount",
            "setns",
            "bpf",
            "init_module",
            "connect",
            "bind",
            "listen",
        ] {
            assert!(!found.never.contains_key(call), "{call} in {:?}", found.never[call]);
        }
        println!("{found}");
    }
}

#[test]
fn what_is_no_executable_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("helper");
    for content in [
        &b""[..],
        b"\x7fELF",
        b"\x7fELF\x02\x01 and then nothing of the kind, but long enough to look at",
    ] {
        std::fs::write(&path, content).unwrap();
        assert!(reach(&path).is_err());
    }
    assert!(reach(&directory.path().join("missing")).is_err());
}
