//! Whether a policy is enforced, or only watched while it is being written.
//!
//! Filters are stacked and the strictest answer counts, so that a call which only one of a helper's four filters lacks is
//! killed there. With [`Mode::Log`] no filter kills: where it would, it has the kernel log the call
//! (`SECCOMP_RET_LOG`). That leaves the helper's sealed filter to decide, whose answer is the same in both modes: the
//! supervisor is notified, and lets the call go on. `SECCOMP_RET_LOG` alone would not do: the kernel's log has neither the
//! arguments nor is it the VM's, and takes root to read.

use crate::Instruction;

/// What becomes of a call that a policy lacks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// The process is killed.
    #[default]
    Enforce,
    /// The call is told and goes on. For development: nothing is confined by seccomp.
    Log,
}

/// The helpers' only argument, in [`Mode::Log`]: `ps` and the audit see it.
pub const LOG_ARGUMENT: &std::ffi::CStr = c"--policy-mode=log";

impl Mode {
    /// The mode in which the launcher has started this helper.
    pub fn of_this_process() -> Self {
        let asked = std::env::args_os().nth(1);
        match asked.is_some_and(|argument| argument.as_encoded_bytes() == LOG_ARGUMENT.to_bytes()) {
            true => Self::Log,
            false => Self::Enforce,
        }
    }
}

/// The kernel's BPF_MAXINSNS.
const MAX_INSTRUCTIONS: usize = 4096;
/// BPF_RET | BPF_K.
const RETURN: u16 = 0x06;

/// A program that logs where the original kills. It lies on the stack: it is also made between fork and exec.
pub(crate) struct Relaxed {
    instructions: [Instruction; MAX_INSTRUCTIONS],
    length: usize,
}

impl Relaxed {
    pub(crate) fn of(program: &[Instruction]) -> std::io::Result<Self> {
        const NOTHING: Instruction = Instruction {
            code: 0,
            jt: 0,
            jf: 0,
            k: 0,
        };
        if program.len() > MAX_INSTRUCTIONS {
            return Err(std::io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut relaxed = Self {
            instructions: [NOTHING; MAX_INSTRUCTIONS],
            length: program.len(),
        };
        for (to, from) in relaxed.instructions.iter_mut().zip(program) {
            let kills = from.code == RETURN && from.k == libc::SECCOMP_RET_KILL_PROCESS;
            *to = Instruction {
                k: if kills { libc::SECCOMP_RET_LOG } else { from.k },
                ..*from
            };
        }
        Ok(relaxed)
    }

    pub(crate) fn instructions(&self) -> &[Instruction] {
        &self.instructions[..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Process, programs};

    #[test]
    fn a_relaxed_program_kills_nothing_and_is_otherwise_the_same() {
        for process in [Process::Launcher, Process::Vcpu, Process::Qmp] {
            let programs = programs(process);
            for program in [programs.startup, programs.sealed, programs.forbidden] {
                let relaxed = Relaxed::of(program).unwrap();
                assert_eq!(relaxed.instructions().len(), program.len());
                for (new, old) in relaxed.instructions().iter().zip(program) {
                    assert_eq!((new.code, new.jt, new.jf), (old.code, old.jt, old.jf));
                    if new.code == RETURN {
                        assert_ne!(new.k, libc::SECCOMP_RET_KILL_PROCESS);
                    } else {
                        assert_eq!(new.k, old.k);
                    }
                }
            }
        }
    }
}
