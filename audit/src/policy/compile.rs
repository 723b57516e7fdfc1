//! From a policy to the programs that the kernel must have, as /proc and ptrace would show them.

use super::{Kind, Policy, PolicyError};
use seccompiler::{BpfProgram, TargetArch, compile_from_json};
use std::collections::{BTreeMap, HashMap};

/// One instruction of a filter: the kernel's `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Jump if true.
    pub jt: u8,
    /// Jump if false.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// BPF_RET | BPF_K.
pub(super) const RETURN: u16 = 0x06;

impl Policy {
    /// Compiles all filters. `trap` becomes user notification, as Bulkhead's build does it: seccompiler has no such action.
    ///
    /// # Errors
    /// [`PolicyError::Compile`].
    pub fn compile(&self) -> Result<BTreeMap<Kind, Vec<Instruction>>, PolicyError> {
        let failed = |error: String| PolicyError::Compile {
            name: self.name.clone(),
            error,
        };
        let mut programs: HashMap<String, BpfProgram> =
            compile_from_json(self.text.as_bytes(), TargetArch::x86_64).map_err(|error| failed(error.to_string()))?;
        self.filters
            .keys()
            .map(|kind| {
                let program = programs
                    .remove(kind.name())
                    .ok_or_else(|| failed(format!("{} was not compiled", kind.name())))?;
                let instructions = program.iter().map(|of| Instruction {
                    code: of.code,
                    jt: of.jt,
                    jf: of.jf,
                    k: match (of.code, of.k) {
                        (RETURN, libc::SECCOMP_RET_TRAP) => libc::SECCOMP_RET_USER_NOTIF,
                        (_, k) => k,
                    },
                });
                Ok((*kind, instructions.collect()))
            })
            .collect()
    }
}
