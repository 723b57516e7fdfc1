//! What can be wrong with an encrypted image, or with its key.

use nix::errno::Errno;

/// Why an image cannot be unlocked or created.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CryptoError {
    /// No magic number.
    #[error("Volume is not in LUKS format")]
    NotLuks,
    /// Not LUKS 1.
    #[error("LUKS version {0} is not supported: Bulkhead knows version 1")]
    Version(u16),
    /// An algorithm that we do not have, by its kind and name.
    #[error("the {0} {1:?} is not supported")]
    Unsupported(&'static str, String),
    /// The header contradicts the format, the file or itself.
    #[error("the LUKS header is invalid: {0}")]
    Invalid(String),
    /// A hostile header could keep us busy for ever.
    #[error(
        "{what} of the LUKS header asks for {iterations} iterations of PBKDF2, and Bulkhead makes at most {limit}: \
         set a shorter --iter-time for it (cryptsetup luksChangeKey)"
    )]
    Iterations {
        /// Whose they are.
        what: String,
        /// How many.
        iterations: u32,
        /// The most there may be.
        limit: u32,
    },
    /// No password opens it, or there is no password.
    #[error("Invalid password, cannot unlock any keyslot")]
    WrongKey,
    /// A cipher that wants a key of another length.
    #[error("{cipher} has no key of {bytes} bytes")]
    KeyBytes {
        /// The cipher.
        cipher: String,
        /// The length of the key.
        bytes: usize,
    },
    /// The host's.
    #[error("the encryption header cannot be read or written: {0}")]
    Host(#[from] Errno),
}

impl CryptoError {
    /// [`Self::Invalid`].
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid(what.into())
    }

    /// What the system calls it, if it has a name for it.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::WrongKey => Some(Errno::EKEYREJECTED),
            Self::Host(errno) => Some(*errno),
            _ => None,
        }
    }
}
