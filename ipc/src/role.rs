//! The helper roles.

use serde::{Deserialize, Serialize};

/// One kind of helper process. Each is an executable of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Role {
    /// Runs the vCPUs.
    Vcpu = 1,
    /// Serves the disks.
    Block = 2,
    /// Writes one memory dump.
    Dump = 3,
    /// Serves one management client.
    Qmp = 4,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 4] = [Self::Vcpu, Self::Block, Self::Dump, Self::Qmp];

    /// File name of the executable, which is also the name in logs and of the policy.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "vcpu-proc",
            Self::Block => "block-proc",
            Self::Dump => "dump-proc",
            Self::Qmp => "qmp-proc",
        }
    }

    /// The role with this wire number.
    pub const fn from_u8(number: u8) -> Option<Self> {
        match number {
            1 => Some(Self::Vcpu),
            2 => Some(Self::Block),
            3 => Some(Self::Dump),
            4 => Some(Self::Qmp),
            _ => None,
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
