//! Locks that keep other programs off an image in use.
//!
//! They are QEMU's, so that its tools and Bulkhead respect each other: shared OFD locks on single bytes far inside the file,
//! byte 100+n for "I use permission n" and 200+n for "I do not share permission n". Whoever finds the byte that contradicts
//! him locked by another has to give up. They live on an open file description, of which the supervisor keeps an fd: it
//! can open the file anew without asking itself.
//!
//! What is locked is what a node's users need. A node that nobody uses locks nothing.

use super::permissions::{Needs, Permissions};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::cell::Cell;
use std::os::fd::AsFd;

/// Permissions with locks: QEMU's bit number and name.
const LOCKED: [(Permissions, i64, &str); 3] = [
    (Permissions::READ, 0, "consistent read"),
    (Permissions::WRITE, 1, "write"),
    (Permissions::RESIZE, 3, "resize"),
];
const USED_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;

/// Why a lock is not had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockError {
    /// Another program's stands against it: the permission's name.
    Taken(&'static str),
    /// The system refuses.
    System(Errno),
}

/// The locks that a description has.
#[derive(Debug, Clone, Default)]
pub struct Locks(Cell<Needs>);

impl Locks {
    /// Takes and gives up locks until they are what is needed. After an error they are as before.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn change(&self, file: &impl AsFd, needs: Needs) -> Result<(), LockError> {
        let has = self.0.get();
        let added = bytes(needs).filter(|byte| !bytes(has).any(|held| held == *byte));
        let added: Vec<i64> = added.collect();
        let taken = take(file, &added).and_then(|()| check(file, has, needs));
        let kept = match taken {
            Ok(()) => needs,
            Err(_) => has,
        };
        let given_up = bytes(has)
            .chain(added.iter().copied())
            .filter(|byte| !bytes(kept).any(|held| held == *byte));
        for byte in given_up {
            // Fails only where locking did.
            let _ = set(file, byte, libc::F_UNLCK);
        }
        self.0.set(kept);
        taken
    }

    /// Gives up all.
    pub fn release(&self, file: &impl AsFd) {
        // Giving up asks nobody.
        let _ = self.change(file, Needs::default());
    }
}

fn bytes(needs: Needs) -> impl Iterator<Item = i64> {
    LOCKED.into_iter().flat_map(move |(permission, bit, _)| {
        let used = needs.uses.contains(permission).then_some(USED_BASE + bit);
        let unshared = needs.unshared.contains(permission).then_some(UNSHARED_BASE + bit);
        used.into_iter().chain(unshared)
    })
}

fn take(file: &impl AsFd, bytes: &[i64]) -> Result<(), LockError> {
    for byte in bytes {
        match set(file, *byte, libc::F_RDLCK) {
            Ok(()) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(LockError::Taken("write")),
            // A file system without locks cannot tell; QEMU goes on as well.
            Err(Errno::ENOLCK | Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(()),
            Err(errno) => return Err(LockError::System(errno)),
        }
    }
    Ok(())
}

/// Whether others' locks stand against what is new.
fn check(file: &impl AsFd, has: Needs, needs: Needs) -> Result<(), LockError> {
    for (permission, bit, name) in LOCKED {
        let is_new = |now: Permissions, before: Permissions| now.contains(permission) && !before.contains(permission);
        let used = is_new(needs.uses, has.uses).then_some(UNSHARED_BASE + bit);
        let unshared = is_new(needs.unshared, has.unshared).then_some(USED_BASE + bit);
        for byte in used.into_iter().chain(unshared) {
            let mut probe = byte_lock(byte, libc::F_WRLCK);
            match fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)) {
                Ok(_) if probe.l_type == libc::F_UNLCK as i16 => {}
                Ok(_) => return Err(LockError::Taken(name)),
                Err(Errno::ENOLCK | Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(()),
                Err(errno) => return Err(LockError::System(errno)),
            }
        }
    }
    Ok(())
}

fn set(file: &impl AsFd, byte: i64, kind: i32) -> Result<(), Errno> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&byte_lock(byte, kind))).map(drop)
}

fn byte_lock(byte: i64, kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn open(path: &std::path::Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    fn writer() -> Needs {
        let unshared = Permissions::WRITE.and(Permissions::RESIZE);
        Needs {
            uses: Permissions::READ.and(unshared),
            unshared,
        }
    }

    fn reader() -> Needs {
        Needs::of_device(true)
    }

    #[test]
    fn a_writer_keeps_others_off_until_it_needs_no_more() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, second) = (open(file.path()), open(file.path()));
        let (one, two) = (Locks::default(), Locks::default());
        one.change(&first, writer()).unwrap();
        for needs in [writer(), reader()] {
            assert!(matches!(two.change(&second, needs), Err(LockError::Taken(_))));
        }
        // What failed has left nothing behind.
        one.change(&first, reader()).unwrap();
        two.change(&second, reader()).unwrap();
        assert_eq!(one.change(&first, writer()), Err(LockError::Taken("write")));
        two.release(&second);
        one.change(&first, writer()).unwrap();
        one.release(&first);
        two.change(&second, writer()).unwrap();
    }

    #[test]
    fn a_description_does_not_stand_in_its_own_way() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first = open(file.path());
        let locks = Locks::default();
        for needs in [reader(), writer(), reader(), writer(), Needs::default(), writer()] {
            locks.change(&first, needs).unwrap();
        }
        let second = open(file.path());
        assert!(Locks::default().change(&second, reader()).is_err());
    }
}
