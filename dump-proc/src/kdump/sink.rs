//! Where a kdump-compressed dump goes: to offsets of a file, or as a stream of records that say their offsets (makedumpfile's
//! flattened format). Any worker may write anywhere at any time.

use crate::memory::file_offset;
use crate::output::{write, write_at};
use ipc::caps::DumpFd;
use nix::unistd::{Whence, lseek};
use std::io;
use std::sync::{Mutex, PoisonError};

/// Length of the flattened format's header, bytes.
const HEADER_BYTES: usize = 4096;

/// The output.
pub enum Sink {
    /// The dump begins at this offset of the file.
    File {
        /// The file.
        fd: DumpFd,
        /// The offset.
        base: u64,
    },
    /// Records, one after the other.
    Records(Mutex<DumpFd>),
}

impl Sink {
    /// The plain format, from the file's current offset on.
    ///
    /// # Errors
    /// The system's error; a pipe has no offsets.
    pub fn file(fd: DumpFd) -> io::Result<Self> {
        let base = lseek(&fd, 0, Whence::SeekCur)?;
        let base = u64::try_from(base).map_err(io::Error::other)?;
        Ok(Self::File { fd, base })
    }

    /// The flattened format, which begins at once.
    ///
    /// # Errors
    /// The system's error.
    pub fn records(fd: DumpFd) -> io::Result<Self> {
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend_from_slice(b"makedumpfile\0\0\0\0");
        for field in [1_u64, 1] {
            header.extend_from_slice(&field.to_be_bytes());
        }
        header.resize(HEADER_BYTES, 0);
        write(&fd, &header)?;
        Ok(Self::Records(Mutex::new(fd)))
    }

    /// Whether the same place can be written again.
    pub fn is_file(&self) -> bool {
        matches!(self, Self::File { .. })
    }

    /// Writes bytes of the dump at their place.
    ///
    /// # Errors
    /// The system's error.
    pub fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::File { fd, base } => write_at(fd, base.saturating_add(offset), bytes),
            Self::Records(fd) => {
                let mut head = [0; 16];
                head[..8].copy_from_slice(&offset.to_be_bytes());
                head[8..].copy_from_slice(&(bytes.len() as u64).to_be_bytes());
                // A worker that panicked took the process with it.
                let fd = fd.lock().unwrap_or_else(PoisonError::into_inner);
                write(&fd, &head)?;
                write(&fd, bytes)
            }
        }
    }

    /// After the last byte. The dump has `bytes` of them.
    ///
    /// # Errors
    /// The system's error.
    pub fn finish(self, bytes: u64) -> io::Result<()> {
        match self {
            // As writing in order would have left it.
            Self::File { fd, base } => {
                lseek(&fd, file_offset(base.saturating_add(bytes))?, Whence::SeekSet)?;
                Ok(())
            }
            Self::Records(fd) => {
                let fd = fd.into_inner().unwrap_or_else(PoisonError::into_inner);
                write(&fd, &[0xff; 16])
            }
        }
    }
}
