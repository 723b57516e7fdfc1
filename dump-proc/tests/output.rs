//! Where a dump may go, and what is said when it cannot go there.

mod common;

use common::{Dumper, MIB, Ram, assert_equal_to_ram, dump, registers, set_nonblocking};
use ipc::Failure;
use nix::sys::resource::Resource;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;

fn small_ram() -> Ram {
    let ram = Ram::new(8 * MIB);
    ram.fill(4096, 3 * MIB);
    ram.fill(8 * MIB - 100, 10);
    ram
}

/// What a reader of a stream got, as a file.
fn collect(mut reader: impl Read + Send + 'static) -> std::thread::JoinHandle<File> {
    std::thread::spawn(move || {
        let mut file = tempfile::tempfile().unwrap();
        std::io::copy(&mut reader, &mut file).unwrap();
        file
    })
}

fn pipe() -> (File, OwnedFd) {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    (reader.into(), writer)
}

#[test]
fn a_pipe_gets_the_same_bytes_as_a_file() {
    let ram = small_ram();
    let file = tempfile::tempfile().unwrap();
    dump(&ram, file.try_clone().unwrap()).unwrap();
    let (reader, writer) = pipe();
    let piped = collect(reader);
    dump(&ram, writer).unwrap();
    let (mut piped, mut file) = (piped.join().unwrap(), file);
    let (mut a, mut b) = (Vec::new(), Vec::new());
    piped.rewind().unwrap();
    piped.read_to_end(&mut a).unwrap();
    file.rewind().unwrap();
    file.read_to_end(&mut b).unwrap();
    assert!(a == b);
}

#[test]
fn a_socket_works_as_a_pipe_does() {
    let ram = small_ram();
    let (reader, writer) = UnixStream::pair().unwrap();
    let copy = collect(reader);
    dump(&ram, writer).unwrap();
    assert_equal_to_ram(&copy.join().unwrap(), 0, &ram);
}

#[test]
fn a_non_blocking_pipe_is_waited_for() {
    let ram = small_ram();
    let (mut reader, writer) = pipe();
    set_nonblocking(&writer);
    let copy = std::thread::spawn(move || {
        let mut file = tempfile::tempfile().unwrap();
        let mut buffer = [0; 65536];
        for round in 0.. {
            if round < 3 {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            match reader.read(&mut buffer).unwrap() {
                0 => break,
                length => file.write_all(&buffer[..length]).unwrap(),
            }
        }
        file
    });
    dump(&ram, writer).unwrap();
    assert_equal_to_ram(&copy.join().unwrap(), 0, &ram);
}

#[test]
fn a_dump_starts_at_the_current_offset_and_leaves_it_at_the_end() {
    let ram = small_ram();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"HEADER").unwrap();
    dump(&ram, file.try_clone().unwrap()).unwrap();
    assert_equal_to_ram(&file, 6, &ram);
    assert_eq!(file.stream_position().unwrap(), file.metadata().unwrap().len());
    let mut start = [0; 6];
    file.read_exact_at(&mut start, 0).unwrap();
    assert_eq!(&start, b"HEADER");
}

#[test]
fn old_data_does_not_shine_through_the_holes() {
    let ram = small_ram();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![0xaa; 10 << 20]).unwrap();
    file.seek(SeekFrom::Start(4096)).unwrap();
    dump(&ram, file.try_clone().unwrap()).unwrap();
    assert_equal_to_ram(&file, 4096, &ram);
    assert_eq!(file.metadata().unwrap().len(), 10 << 20);
}

#[test]
fn a_file_opened_for_appending_is_appended_to() {
    let ram = small_ram();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dump");
    std::fs::write(&path, vec![1; 12345]).unwrap();
    let file = OpenOptions::new().append(true).open(&path).unwrap();
    dump(&ram, file).unwrap();
    let file = File::open(&path).unwrap();
    assert_equal_to_ram(&file, 12345, &ram);
}

/// The failure of a dump to `output`.
fn failure(output: impl Into<OwnedFd>) -> (String, Option<i32>) {
    let Failure { message, errno } = dump(&small_ram(), output).unwrap_err();
    (message, errno)
}

#[test]
fn a_full_device_is_reported() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let (message, errno) = failure(full);
    assert_eq!(message, "dump: failed to write elf header: No space left on device");
    assert_eq!(errno, Some(nix::libc::ENOSPC));
}

#[test]
fn a_full_file_system_is_reported() {
    // A tmpfs of 1 MiB needs a mount namespace; a user namespace gives the right to one.
    let Some(file) = file_on_a_small_tmpfs() else {
        eprintln!("SKIPPED: this host does not let the test mount a tmpfs");
        return;
    };
    let (message, errno) = failure(file.try_clone().unwrap());
    assert_eq!(message, "dump: failed to save memory: No space left on device");
    assert_eq!(errno, Some(nix::libc::ENOSPC));
    assert!(
        file.metadata().unwrap().blocks() * 512 > 512 << 10,
        "what was written stays"
    );
}

/// A new file on a tmpfs that exists in a thread's own mount namespace only, and so as long as the file is open.
fn file_on_a_small_tmpfs() -> Option<File> {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_owned();
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).ok()?;
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).ok()?;
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), Some("size=1m")).ok()?;
        File::create_new(path.join("dump")).ok()
    })
    .join()
    .unwrap()
}

#[test]
fn a_reader_that_went_away_is_reported() {
    let (reader, writer) = pipe();
    drop(reader);
    let (message, errno) = failure(writer);
    assert_eq!(message, "dump: failed to write elf header: Broken pipe");
    assert_eq!(errno, Some(nix::libc::EPIPE));

    let (mut reader, writer) = pipe();
    let leaver = std::thread::spawn(move || reader.read_exact(&mut [0; 200_000]).unwrap());
    let (message, _) = failure(writer);
    assert_eq!(message, "dump: failed to save memory: Broken pipe");
    leaver.join().unwrap();
}

#[test]
fn a_file_size_limit_is_an_error_not_a_death() {
    for (limit, what) in [(2 * MIB, "save memory"), (100, "write elf header")] {
        let mut dumper = Dumper::sealed(&small_ram());
        let pid = nix::libc::pid_t::try_from(dumper.bare.child.id()).unwrap();
        let limit = nix::libc::rlimit {
            rlim_cur: limit,
            rlim_max: limit,
        };
        // SAFETY: `limit` is valid for the call; the process is our child.
        let result = unsafe {
            nix::libc::prlimit(
                pid,
                Resource::RLIMIT_FSIZE as u32,
                &raw const limit,
                std::ptr::null_mut(),
            )
        };
        assert_eq!(result, 0);
        let file = tempfile::tempfile().unwrap();
        let Failure { message, errno } = dumper.write(file, vec![registers(0)], None).unwrap_err();
        assert_eq!(message, format!("dump: failed to {what}: File too large"));
        assert_eq!(errno, Some(nix::libc::EFBIG));
        assert_eq!(dumper.bare.child.wait().unwrap().code(), Some(0));
    }
}

#[test]
fn an_fd_that_cannot_be_written_is_reported() {
    let (message, errno) = failure(File::open("/dev/null").unwrap());
    assert_eq!(message, "dump: failed to write elf header: Bad file descriptor");
    assert_eq!(errno, Some(nix::libc::EBADF));
}
