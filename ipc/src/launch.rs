//! Supervisor ↔ launcher: fixed-size packets, so that the launcher parses nothing and allocates nothing.
//!
//! A request is 8 bytes and carries two fds: the helper's end of its channel, and the log socket. The answer is
//! [`Report`] with the new process's pidfd. Later, when a helper ends, another report says how.

use crate::Role;

/// Bytes of a request and of a report.
pub const PACKET_BYTES: usize = 24;

/// What the launcher says. `pid` is as the launcher's PID namespace (the host's) numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// The helper has been started; the packet carries its pidfd.
    Started {
        /// Its role.
        role: Role,
        /// Its process id.
        pid: i32,
        /// Its id in the launcher's user namespace; 0 when all share one.
        id: i32,
    },
    /// The helper could not be started.
    Failed {
        /// Its role.
        role: Role,
        /// At which step: see [`Step`].
        step: Step,
        /// The system's error number.
        errno: i32,
    },
    /// A helper has ended and was reaped.
    Ended {
        /// Its role.
        role: Role,
        /// Its process id.
        pid: i32,
        /// `CLD_EXITED`, `CLD_KILLED` or `CLD_DUMPED`.
        code: i32,
        /// Exit status or signal number.
        status: i32,
    },
}

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident = $text:literal)*) => {
        /// The steps of starting a helper, for error messages.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Step { $($(#[$doc])* $name,)* }

        impl Step {
            const ALL: &[Self] = &[$(Self::$name),*];

            /// The step with this number; what is no step's number counts as the last step.
            pub fn from_u8(number: u8) -> Self {
                Self::ALL.get(usize::from(number)).copied().unwrap_or(Self::Exec)
            }
        }

        impl std::fmt::Display for Step {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $(Self::$name => $text,)* })
            }
        }
    };
}

steps! {
    /// clone3 with the namespaces.
    Clone = "creating the process and its namespaces"
    /// Writing to cgroup.procs.
    Groups = "entering its control groups"
    /// Writing /proc/PID/uid_map and gid_map.
    IdMaps = "writing the user id maps"
    /// prlimit.
    Limits = "setting resource limits"
    /// Making the empty root.
    Root = "entering an empty root directory"
    /// dup2 and close_range.
    Files = "arranging its file descriptors"
    /// setresuid and friends.
    Ids = "changing its user and group ids"
    /// Dropping capabilities.
    Capabilities = "dropping capabilities"
    /// prctl.
    Prctl = "setting process attributes"
    /// landlock_restrict_self.
    Landlock = "entering its Landlock domain"
    /// Installing the stage-1 filter.
    Seccomp = "loading its start-up seccomp filter"
    /// execveat.
    Exec = "executing its program"
}

/// A request's bytes.
pub fn encode_request(role: Role) -> [u8; PACKET_BYTES] {
    let mut packet = [0; PACKET_BYTES];
    packet[..4].copy_from_slice(b"BHLQ");
    packet[4] = role as u8;
    packet
}

/// Reads a request.
pub fn decode_request(packet: &[u8]) -> Option<Role> {
    let packet: &[u8; PACKET_BYTES] = packet.try_into().ok()?;
    if &packet[..4] != b"BHLQ" || packet[5..].iter().any(|byte| *byte != 0) {
        return None;
    }
    Role::from_u8(packet[4])
}

impl Report {
    /// The report's bytes.
    pub fn encode(&self) -> [u8; PACKET_BYTES] {
        let mut packet = [0; PACKET_BYTES];
        packet[..4].copy_from_slice(b"BHLR");
        let (kind, role, words): (u8, Role, [i32; 3]) = match *self {
            Self::Started { role, pid, id } => (1, role, [pid, id, 0]),
            Self::Failed { role, step, errno } => (2, role, [step as i32, errno, 0]),
            Self::Ended {
                role,
                pid,
                code,
                status,
            } => (3, role, [pid, code, status]),
        };
        packet[4] = kind;
        packet[5] = role as u8;
        for (slot, word) in packet[8..20].chunks_exact_mut(4).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        packet
    }

    /// Reads a report.
    pub fn decode(packet: &[u8]) -> Option<Self> {
        let packet: &[u8; PACKET_BYTES] = packet.try_into().ok()?;
        if &packet[..4] != b"BHLR" {
            return None;
        }
        let role = Role::from_u8(packet[5])?;
        let word = |index: usize| {
            let at = 8 + 4 * index;
            i32::from_le_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]])
        };
        Some(match packet[4] {
            1 => Self::Started {
                role,
                pid: word(0),
                id: word(1),
            },
            2 => Self::Failed {
                role,
                step: *Step::ALL.get(usize::try_from(word(0)).ok()?)?,
                errno: word(1),
            },
            3 => Self::Ended {
                role,
                pid: word(0),
                code: word(1),
                status: word(2),
            },
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_read_back_as_written() {
        for role in Role::ALL {
            assert_eq!(decode_request(&encode_request(role)), Some(role));
        }
        for report in [
            Report::Started {
                role: Role::Vcpu,
                pid: 4711,
                id: 63,
            },
            Report::Failed {
                role: Role::Dump,
                step: Step::Exec,
                errno: 2,
            },
            Report::Ended {
                role: Role::Qmp,
                pid: 1,
                code: 2,
                status: 9,
            },
        ] {
            assert_eq!(Report::decode(&report.encode()), Some(report));
        }
    }

    #[test]
    fn other_bytes_are_refused() {
        assert_eq!(decode_request(&[0; PACKET_BYTES]), None);
        assert_eq!(decode_request(&encode_request(Role::Qmp)[..10]), None);
        let mut packet = encode_request(Role::Qmp);
        packet[9] = 1;
        assert_eq!(decode_request(&packet), None);
    }
}
