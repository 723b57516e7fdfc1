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

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "system call {}(", self.number)?;
        for (index, argument) in self.arguments.iter().enumerate() {
            write!(f, "{}{argument:#x}", if index == 0 { "" } else { ", " })?;
        }
        write!(f, ") at {:#x}", self.instruction_pointer)
    }
}

/// Reads a violation from a sealed filter's listener.
///
/// # Errors
/// When there is none (any more): the process has ended.
pub fn receive(listener: BorrowedFd<'_>) -> Result<Violation, Errno> {
    let notification = crate::sys::receive_notification(listener)?;
    Ok(Violation {
        number: notification.data.nr,
        arguments: notification.data.args,
        instruction_pointer: notification.data.instruction_pointer,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_violation_reads_as_a_call() {
        let violation = Violation {
            number: 257,
            arguments: [1, 2, 3, 4, 5, 6],
            instruction_pointer: 0x1000,
        };
        assert_eq!(
            violation.to_string(),
            "system call 257(0x1, 0x2, 0x3, 0x4, 0x5, 0x6) at 0x1000"
        );
    }
}
