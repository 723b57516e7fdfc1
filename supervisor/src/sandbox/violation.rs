//! What a helper tried that its sealed filter does not allow.

use nix::errno::Errno;
use std::fmt;
use std::os::fd::BorrowedFd;

/// One refused system call. The thread that made it is stopped in it until it is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Violation {
    /// System call number (x86-64).
    pub number: i32,
    /// Its arguments.
    pub arguments: [u64; 6],
    /// Where the call was made.
    pub instruction_pointer: u64,
}

impl Violation {
    /// The call's name; `None` when it is newer than the table.
    pub fn name(&self) -> Option<&'static str> {
        policies::syscalls::name(self.number.into())
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name}(")?,
            None => write!(f, "system call {}(", self.number)?,
        }
        for (index, argument) in self.arguments.iter().enumerate() {
            write!(f, "{}{argument:#x}", if index == 0 { "" } else { ", " })?;
        }
        write!(f, ") at {:#x}", self.instruction_pointer)
    }
}

/// A violation that waits for what becomes of it.
#[derive(Debug)]
pub struct Notification {
    /// What was tried.
    pub violation: Violation,
    id: u64,
}

/// Reads a violation from a sealed filter's listener.
///
/// # Errors
/// When there is none (any more): the process has ended.
pub fn receive(listener: BorrowedFd<'_>) -> Result<Notification, Errno> {
    let notification = crate::sys::receive_notification(listener)?;
    Ok(Notification {
        violation: Violation {
            number: notification.data.nr,
            arguments: notification.data.args,
            instruction_pointer: notification.data.instruction_pointer,
        },
        id: notification.id,
    })
}

/// Lets the call go on. Whoever watches must not take the arguments for what the kernel then does: another thread may have
/// changed what they point to. Here they only are told.
pub fn allow(listener: BorrowedFd<'_>, notification: &Notification) {
    crate::sys::continue_notified(listener, notification.id);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_violation_reads_as_a_call() {
        let mut violation = Violation {
            number: 257,
            arguments: [1, 2, 3, 4, 5, 6],
            instruction_pointer: 0x1000,
        };
        assert_eq!(violation.to_string(), "openat(0x1, 0x2, 0x3, 0x4, 0x5, 0x6) at 0x1000");
        violation.number = 999;
        assert!(
            violation.to_string().starts_with("system call 999(0x1, "),
            "{violation}"
        );
    }
}
