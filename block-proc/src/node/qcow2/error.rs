//! What can be wrong with an image.

use super::compressed::Damaged;
use super::entry::Impossible;
use crate::crypto::CryptoError;
use nix::errno::Errno;

/// Why an image is not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// No magic number.
    #[error("the image is not in qcow2 format: if its bytes are the disk's bytes, write format=raw")]
    NotQcow2,
    /// A version that does not exist.
    #[error("qcow2 version {0} is not supported: Bulkhead knows 2 and 3")]
    Version(u32),
    /// A feature that we do not have.
    #[error("the qcow2 image uses {0}, which Bulkhead does not support")]
    Unsupported(String),
    /// The header contradicts the format, the file or itself.
    #[error("the qcow2 header is invalid: {0}")]
    Invalid(String),
    /// A backing file that nobody has opened.
    #[error("the qcow2 image has the backing file {0:?}, which is not open")]
    Backing(String),
    /// An external data file that nobody has opened.
    #[error("the qcow2 image has the external data file {0:?}, which is not open")]
    DataFile(String),
    /// The other way round.
    #[error("the qcow2 image has no external data file: leave data-file out")]
    NoDataFile,
    /// The corrupt bit.
    #[error("the qcow2 image is marked as corrupt: repair it (qemu-img check -r all), or open it with readonly=on")]
    Corrupt,
    /// The dirty bit.
    #[error(
        "the qcow2 image was not closed, and its refcounts could not be repaired: repair it (qemu-img check -r all), \
         or open it with readonly=on"
    )]
    Dirty,
    /// Found while looking through the tables.
    #[error("the qcow2 image is damaged: {0}: repair it (qemu-img check -r all)")]
    Damaged(#[from] Fault),
    /// The image is encrypted, and nobody has said how to open it.
    #[error("Parameter 'encrypt.key-secret' is required for cipher")]
    KeyRequired,
    /// The encryption header, or the key.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// O_DIRECT needs larger pieces than the image has.
    #[error("the image's clusters are smaller than the host's blocks of {0} bytes: open it without cache.direct=on")]
    Alignment(u64),
    /// What it says of its bitmaps.
    #[error("the bitmaps of the qcow2 image are damaged: {0}")]
    Bitmaps(String),
    /// The host's.
    #[error("the image cannot be read: {0}")]
    Host(#[from] Errno),
}

impl OpenError {
    /// [`Self::Invalid`].
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid(what.into())
    }
}

/// Why a request fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The host's error.
    #[error("{0}")]
    Errno(#[from] Errno),
    /// Two uses of one cluster.
    #[error("{what} at {offset:#x} lies on metadata")]
    Overlap {
        /// What was to be there.
        what: &'static str,
        /// Where.
        offset: u64,
    },
    /// An L1 entry that points nowhere.
    #[error("there cannot be an L2 table at {0:#x}")]
    L2Table(u64),
    /// An entry of the refcount table that points nowhere.
    #[error("there cannot be a refcount block at {0:#x}")]
    RefcountBlock(u64),
    /// A cluster in use whose count is 0.
    #[error("the cluster at {0:#x} is in use, and its refcount is 0")]
    Unreferenced(u64),
    /// See [`Impossible`].
    #[error(transparent)]
    Entry(#[from] Impossible),
    /// See [`Damaged`].
    #[error(transparent)]
    Compressed(#[from] Damaged),
    /// Nobody writes such: what is compressed was not encrypted.
    #[error("a compressed cluster in an encrypted image")]
    CompressedEncrypted,
}
