//! The tables without clients; the errors' texts are compared with those of a live server.

use super::*;
use std::fs::{File, OpenOptions};

fn given() -> Option<ClientGivenFd> {
    Some(ClientGivenFd::new(File::open("/dev/null").unwrap().into()))
}

fn opened(options: &mut OpenOptions) -> Option<ClientGivenFd> {
    Some(ClientGivenFd::new(options.open("/dev/null").unwrap().into()))
}

fn set(number: i64) -> FdSetId {
    FdSetId::new(number).unwrap()
}

fn numbers(fds: &Fds) -> Vec<i64> {
    fds.list().iter().map(|set| set.fdset_id).collect()
}

#[test]
fn names_are_kept_replaced_and_used_up() {
    let mut fds = Fds::default();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    fds.name("a".into(), Some(ClientGivenFd::new(writer))).unwrap();
    fds.name("a".into(), given()).unwrap();
    // End of file: the one before is closed.
    assert_eq!(nix::unistd::read(&reader, &mut [0]).unwrap(), 0);
    fds.name(String::new(), given()).unwrap();
    drop(fds.take("a").unwrap());
    assert_eq!(fds.take("a").unwrap_err(), FdError::NotNamed("a".into()));
    fds.close(String::new()).unwrap();
    assert_eq!(
        fds.close(String::new()).unwrap_err().to_string(),
        "File descriptor named '' not found"
    );
}

#[test]
fn what_is_refused_is_refused_in_the_protocols_words_and_order() {
    let mut fds = Fds::default();
    let not_supplied = "No file descriptor supplied via SCM_RIGHTS";
    assert_eq!(fds.name("1a".into(), None).unwrap_err().to_string(), not_supplied);
    assert_eq!(fds.add(None, Some(-1), None).unwrap_err().to_string(), not_supplied);
    assert_eq!(
        fds.name("1a".into(), given()).unwrap_err().to_string(),
        "Parameter 'fdname' expects a name not starting with a digit"
    );
    assert_eq!(
        fds.add(given(), Some(-1), None).unwrap_err().to_string(),
        "Parameter 'fdset-id' expects a non-negative value"
    );
    fds.add(given(), Some(7), None).unwrap();
    for (id, fd, name) in [
        (99, None, "fdset-id:99"),
        (-1, None, "fdset-id:-1"),
        (7, Some(999), "fdset-id:7, fd:999"),
        (8, Some(1), "fdset-id:8, fd:1"),
    ] {
        assert_eq!(
            fds.remove(id, fd).unwrap_err().to_string(),
            format!("File descriptor named '{name}' not found")
        );
    }
    assert_eq!(
        fds.open(set(4), OFlag::O_RDWR).unwrap_err().to_string(),
        "Failed to find fdset /dev/fdset/4"
    );
    assert_eq!(
        fds.open(set(7), OFlag::O_RDWR).unwrap_err().to_string(),
        "Failed to find file descriptor with matching flags=0x2"
    );
}

#[test]
fn sets_take_the_lowest_free_number_and_are_listed_from_the_highest() {
    let mut fds = Fds::default();
    for expected in [0, 1] {
        assert_eq!(fds.add(given(), None, None).unwrap().fdset_id, expected);
    }
    let first = fds.add(given(), Some(7), Some("r:/x".into())).unwrap();
    let second = fds.add(given(), Some(7), None).unwrap();
    let list = fds.list();
    assert_eq!(numbers(&fds), [7, 1, 0]);
    let members: Vec<_> = list[0]
        .fds
        .iter()
        .map(|member| (member.fd, member.opaque.as_deref()))
        .collect();
    assert_eq!(members, [(first.fd, Some("r:/x")), (second.fd, None)]);
    fds.remove(7, Some(first.fd)).unwrap();
    assert_eq!(fds.list()[0].fds.len(), 1);
    fds.remove(7, None).unwrap();
    assert_eq!(numbers(&fds), [1, 0]);
    fds.remove(0, None).unwrap();
    assert_eq!(fds.add(given(), None, None).unwrap().fdset_id, 0);
    assert_eq!(fds.add(given(), None, None).unwrap().fdset_id, 2);
}

#[test]
fn a_set_opens_its_newest_member_of_the_same_access_mode() {
    let mut fds = Fds::default();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("f");
    std::fs::write(&path, "x").unwrap();
    fds.add(given(), Some(1), None).unwrap();
    fds.add(
        Some(ClientGivenFd::new(File::open(&path).unwrap().into())),
        Some(1),
        None,
    )
    .unwrap();
    fds.add(opened(OpenOptions::new().read(true).write(true)), Some(1), None)
        .unwrap();
    let inode = |fd: &ClientGivenFd| nix::sys::stat::fstat(fd).unwrap().st_ino;
    let read = fds.open(set(1), OFlag::O_RDONLY).unwrap();
    assert_eq!(
        inode(&read),
        std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&path).unwrap())
    );
    assert_ne!(inode(&fds.open(set(1), OFlag::O_RDWR).unwrap()), inode(&read));
    // As strict as the server that clients know: a member for both directions is none for writing alone.
    assert_eq!(
        fds.open(set(1), OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC)
            .unwrap_err()
            .to_string(),
        "Failed to find file descriptor with matching flags=0x241"
    );
    assert!(fds.open(set(1), OFlag::O_RDONLY | OFlag::O_DIRECT).is_err());
    assert_eq!(fds.list()[0].fds.len(), 3, "opening takes nothing out of the set");
}

#[test]
fn what_is_held_is_bounded() {
    let mut fds = Fds::default();
    for number in 0..MAX_HELD {
        if number % 2 == 0 {
            fds.name(format!("n{number}"), given()).unwrap();
        } else {
            fds.add(given(), Some(3), None).unwrap();
        }
    }
    assert_eq!(fds.name("more".into(), given()), Err(FdError::Full));
    assert_eq!(fds.add(given(), None, None), Err(FdError::Full));
    // A replacement needs no room.
    fds.name("n0".into(), given()).unwrap();
    fds.remove(3, None).unwrap();
    let long = "x".repeat(MAX_TEXT_BYTES + 1);
    assert_eq!(fds.name(long.clone(), given()), Err(FdError::LongText("fdname")));
    assert_eq!(fds.add(given(), None, Some(long)), Err(FdError::LongText("opaque")));
}

#[test]
fn names_of_sets_are_told_from_names_of_files() {
    let parse = |name: &str| set_of(Path::new(name));
    assert_eq!(parse("/dev/fdset/0"), Some(Ok(set(0))));
    assert_eq!(parse("/dev/fdset/12"), Some(Ok(set(12))));
    for name in ["disk", "/dev/fdset", "dev/fdset/1", "./dev/fdset/1"] {
        assert_eq!(parse(name), None, "{name}");
    }
    for name in [
        "/dev/fdset/",
        "/dev/fdset/x",
        "/dev/fdset/-1",
        "/dev/fdset/1/2",
        "/dev/fdset/99999999999999999999",
    ] {
        assert_eq!(parse(name), Some(Err(FdError::NoNumber(name.into()))), "{name}");
    }
}

#[test]
fn only_an_inherited_number_is_taken_over() {
    let ours = File::open("/dev/null").unwrap();
    for fd in [ours.as_raw_fd(), 100_000] {
        let inherited = InheritedFd {
            fd,
            set: set(1),
            opaque: None,
        };
        let error = Fds::inherit(&[inherited]).err().unwrap().to_string();
        assert_eq!(error, format!("-add-fd fd={fd}: no such file descriptor was inherited"));
    }
}
