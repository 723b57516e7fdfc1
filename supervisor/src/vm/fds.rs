//! File descriptors that clients and the command line hand over, until something uses them.
//!
//! - Named ones (`getfd`, `closefd`): a command that takes a name uses the fd up.
//! - Sets (`add-fd`, `remove-fd`, `-add-fd`): the file name `/dev/fdset/N` opens a set. What is opened is a duplicate of the
//!   newest member with the wanted access mode; the set keeps its members until they are removed.
//!
//! All monitors share one table, and it outlives their connections: whoever passed an fd may disconnect and come back.
//! Nothing here reads or writes an fd. Both what is held and the clients' texts are bounded, because a compromised
//! qmp-proc can ask as often as it likes.

use crate::config::{FdSetId, InheritedFd};
use ipc::caps::ClientGivenFd;
use ipc::qmp::{AddFdInfo, FdsetFdInfo, FdsetInfo, QmpError};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

/// How many are held at a time, named and in sets together.
const MAX_HELD: usize = 512;
/// Longest name or note, bytes.
const MAX_TEXT_BYTES: usize = 4096;
/// Where file names of sets begin.
const FDSET_PREFIX: &str = "/dev/fdset/";
/// What has to be the same in a set's member and in what is to be opened.
const MATCHED: OFlag = OFlag::O_ACCMODE.union(OFlag::O_DIRECT);

/// Why a file descriptor is not taken or not found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FdError {
    /// The client passed none.
    #[error("No file descriptor supplied via SCM_RIGHTS")]
    NotSupplied,
    /// A name that could be taken for the number of an fd.
    #[error("Parameter 'fdname' expects a name not starting with a digit")]
    NameIsNumber,
    /// `fdset-id` below 0.
    #[error("Parameter 'fdset-id' expects a non-negative value")]
    NegativeSet,
    /// closefd, remove-fd: it is not there.
    #[error("File descriptor named '{0}' not found")]
    NotFound(String),
    /// A command's `fd:NAME` is not there.
    #[error("File descriptor named '{0}' has not been found")]
    NotNamed(String),
    /// `/dev/fdset/` followed by something else than a number.
    #[error("Could not parse fdset {0}")]
    NoNumber(String),
    /// No such set.
    #[error("Failed to find fdset {FDSET_PREFIX}{0}")]
    NoSet(FdSetId),
    /// The set has no member of this access mode.
    #[error("Failed to find file descriptor with matching flags={0:#x}")]
    NoMatch(i32),
    /// Too many are held.
    #[error("{MAX_HELD} file descriptors are held already: close or remove some")]
    Full,
    /// A name or a note that is too long.
    #[error("Parameter '{0}' expects at most {MAX_TEXT_BYTES} bytes")]
    LongText(&'static str),
    /// The system refuses.
    #[error("Could not duplicate the file descriptor: {}", .0.desc())]
    System(Errno),
}

impl From<FdError> for QmpError {
    fn from(error: FdError) -> Self {
        Self::generic(error.to_string())
    }
}

/// Why `-add-fd` is refused.
#[derive(Debug, thiserror::Error)]
#[error("-add-fd fd={fd}: {problem}")]
pub struct InheritError {
    fd: RawFd,
    problem: String,
}

/// One fd of a set.
struct Member {
    fd: ClientGivenFd,
    opaque: Option<String>,
}

impl Member {
    /// The number by which it is known. As long as it is held, no other has it.
    fn number(&self) -> i64 {
        self.fd.as_fd().as_raw_fd().into()
    }
}

/// Named fds and sets.
#[derive(Default)]
pub struct Fds {
    named: BTreeMap<String, ClientGivenFd>,
    /// Members in the order in which they were added; no set is empty.
    sets: BTreeMap<FdSetId, Vec<Member>>,
}

impl Fds {
    /// Takes over what `-add-fd` names. The numbers are free afterwards.
    ///
    /// # Errors
    /// The first that the parent process did not leave open for us.
    pub fn inherit(descriptors: &[InheritedFd]) -> Result<Self, InheritError> {
        let mut fds = Self::default();
        for InheritedFd { fd, set, opaque } in descriptors {
            let failed = |problem: &dyn std::fmt::Display| InheritError {
                fd: *fd,
                problem: problem.to_string(),
            };
            let copy = duplicate_inherited(*fd).map_err(|errno| match errno {
                Errno::EBADF => failed(&"no such file descriptor was inherited"),
                errno => failed(&errno),
            })?;
            fds.add(Some(ClientGivenFd::new(copy)), Some(set.number()), opaque.clone())
                .map_err(|error| failed(&error))?;
        }
        // One number may stand in several sets: only now is it of no more use.
        let mut numbers: Vec<_> = descriptors.iter().map(|inherited| inherited.fd).collect();
        numbers.sort_unstable();
        numbers.dedup();
        for number in numbers {
            // SAFETY: open and inherited, as was checked above; nothing in this process owns it.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
        Ok(fds)
    }

    /// `getfd`. One of the same name is replaced.
    ///
    /// # Errors
    /// [`FdError`].
    pub fn name(&mut self, name: String, fd: Option<ClientGivenFd>) -> Result<(), FdError> {
        let fd = fd.ok_or(FdError::NotSupplied)?;
        if name.starts_with(|first: char| first.is_ascii_digit()) {
            return Err(FdError::NameIsNumber);
        }
        if name.len() > MAX_TEXT_BYTES {
            return Err(FdError::LongText("fdname"));
        }
        if !self.named.contains_key(&name) {
            self.check_room()?;
        }
        self.named.insert(name, fd);
        Ok(())
    }

    /// `closefd`.
    ///
    /// # Errors
    /// [`FdError::NotFound`].
    pub fn close(&mut self, name: String) -> Result<(), FdError> {
        match self.named.remove(&name) {
            Some(fd) => {
                drop(fd);
                Ok(())
            }
            None => Err(FdError::NotFound(name)),
        }
    }

    /// Takes a named fd out of the table, for a command that uses it up.
    ///
    /// # Errors
    /// [`FdError::NotNamed`].
    pub fn take(&mut self, name: &str) -> Result<ClientGivenFd, FdError> {
        self.named
            .remove(name)
            .ok_or_else(|| FdError::NotNamed(name.to_owned()))
    }

    /// `add-fd`. Without a number it makes a set of the lowest number that is free.
    ///
    /// # Errors
    /// [`FdError`].
    pub fn add(
        &mut self,
        fd: Option<ClientGivenFd>,
        set: Option<i64>,
        opaque: Option<String>,
    ) -> Result<AddFdInfo, FdError> {
        let fd = fd.ok_or(FdError::NotSupplied)?;
        let set = match set {
            Some(number) => FdSetId::new(number).ok_or(FdError::NegativeSet)?,
            None => self.lowest_free(),
        };
        if opaque.as_ref().is_some_and(|opaque| opaque.len() > MAX_TEXT_BYTES) {
            return Err(FdError::LongText("opaque"));
        }
        self.check_room()?;
        let member = Member { fd, opaque };
        let info = AddFdInfo {
            fdset_id: set.number(),
            fd: member.number(),
        };
        self.sets.entry(set).or_default().push(member);
        Ok(info)
    }

    /// `remove-fd`: one member, or the whole set.
    ///
    /// # Errors
    /// [`FdError::NotFound`].
    pub fn remove(&mut self, set: i64, fd: Option<i64>) -> Result<(), FdError> {
        let not_found = || {
            FdError::NotFound(match fd {
                Some(fd) => format!("fdset-id:{set}, fd:{fd}"),
                None => format!("fdset-id:{set}"),
            })
        };
        let id = FdSetId::new(set).ok_or_else(not_found)?;
        let members = self.sets.get_mut(&id).ok_or_else(not_found)?;
        match fd {
            None => members.clear(),
            Some(fd) => {
                let at = members.iter().position(|member| member.number() == fd);
                drop(members.remove(at.ok_or_else(not_found)?));
            }
        }
        if members.is_empty() {
            self.sets.remove(&id);
        }
        Ok(())
    }

    /// `query-fdsets`: the highest number first, members in the order in which they came.
    pub fn list(&self) -> Vec<FdsetInfo> {
        let info = |member: &Member| FdsetFdInfo {
            fd: member.number(),
            opaque: member.opaque.clone(),
        };
        let set = |(id, members): (&FdSetId, &Vec<Member>)| FdsetInfo {
            fdset_id: id.number(),
            fds: members.iter().map(info).collect(),
        };
        self.sets.iter().rev().map(set).collect()
    }

    /// Opens a set as open(2) opens a file: a duplicate of the newest member whose access mode and O_DIRECT are those of
    /// `flags`.
    ///
    /// # Errors
    /// [`FdError::NoSet`], [`FdError::NoMatch`], [`FdError::System`].
    pub fn open(&self, set: FdSetId, flags: OFlag) -> Result<ClientGivenFd, FdError> {
        let members = self.sets.get(&set).ok_or(FdError::NoSet(set))?;
        for member in members.iter().rev() {
            let has = fcntl(&member.fd, FcntlArg::F_GETFL).map_err(FdError::System)?;
            if OFlag::from_bits_retain(has) & MATCHED == flags & MATCHED {
                return member
                    .fd
                    .try_clone()
                    .map_err(|error| FdError::System(error.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw)));
            }
        }
        Err(FdError::NoMatch(flags.bits()))
    }

    fn lowest_free(&self) -> FdSetId {
        let mut lowest = FdSetId::default();
        for set in self.sets.keys() {
            if *set != lowest {
                break;
            }
            lowest = lowest.next();
        }
        lowest
    }

    fn check_room(&self) -> Result<(), FdError> {
        let held = self.named.len() + self.sets.values().map(Vec::len).sum::<usize>();
        if held < MAX_HELD { Ok(()) } else { Err(FdError::Full) }
    }
}

/// The set that a file name means; `None` for the name of a file.
///
/// # Errors
/// [`FdError::NoNumber`].
pub fn set_of(path: &Path) -> Option<Result<FdSetId, FdError>> {
    let path = path.to_str()?;
    let number = path.strip_prefix(FDSET_PREFIX)?;
    let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    let id = digits.then(|| number.parse().ok().and_then(FdSetId::new)).flatten();
    Some(id.ok_or_else(|| FdError::NoNumber(path.to_owned())))
}

/// A copy of an fd that was open when this process was started. All that the process itself opens closes on exec, which
/// an inherited one cannot.
fn duplicate_inherited(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: a number that is not open is an error of the call.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if Errno::result(flags)
        .map(FdFlag::from_bits_retain)?
        .contains(FdFlag::FD_CLOEXEC)
    {
        return Err(Errno::EBADF);
    }
    // SAFETY: it is open, and nobody closes it while it is borrowed here.
    let inherited = unsafe { BorrowedFd::borrow_raw(fd) };
    let copy = fcntl(inherited, FcntlArg::F_DUPFD_CLOEXEC(3))?;
    // SAFETY: the kernel has just made this number for us.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

#[cfg(test)]
#[path = "fds_test.rs"]
mod tests;
