//! The LUKS driver: an encrypted disk in its child, behind the header. In qcow2 images encryption is the driver's own.

use super::{Limits, Node, NodeFuture};
use crate::buffer::{BOUNCE_BYTES, Buffer, Segments};
use crate::crypto::cipher::SectorCipher;
use crate::crypto::luks::header::{HEADER_BYTES, Header};
use crate::crypto::luks::{CreateOptions, create, unlock};
use crate::crypto::pace::Pace;
use crate::crypto::random::Random;
use crate::crypto::transfer::{Transfer, check_sectors};
use crate::crypto::{CryptoError, SECTOR_BYTES};
use crate::node::qcow2::io;
use ipc::secret::Secret;
use nix::errno::Errno;
use std::rc::Rc;
use std::sync::Arc;

/// How the image is used.
#[derive(Debug, Clone)]
pub struct Options {
    /// Length of the image file or block device.
    pub file_bytes: u64,
    /// Requests to the child start and end on multiples of this many bytes (1: no matter).
    pub align: u64,
    /// The password.
    pub key: Option<Secret>,
}

/// Why an image is not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// There is no password.
    #[error("Parameter 'key-secret' is required for cipher")]
    KeyRequired,
    /// See [`CryptoError`].
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// O_DIRECT needs larger pieces than the image has.
    #[error(
        "the LUKS payload is not on a multiple of the host's blocks of {0} bytes: open the image without cache.direct=on"
    )]
    Alignment(u64),
}

impl OpenError {
    /// What the system calls it, if it has a name for it.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::KeyRequired => Some(Errno::ENOKEY),
            Self::Crypto(error) => error.errno(),
            Self::Alignment(_) => None,
        }
    }
}

/// See the module.
pub struct LuksNode {
    child: Rc<dyn Node>,
    header: Header,
    transfer: Transfer,
    bytes: u64,
    zeroes: Arc<Buffer>,
}

/// Reads an image's header.
///
/// # Errors
/// What is wrong with it.
pub async fn read_header(child: &dyn Node, options: &Options) -> Result<Header, CryptoError> {
    let bytes = (HEADER_BYTES as u64).next_multiple_of(options.align.max(SECTOR_BYTES as u64));
    let bytes = io::read(child, 0, bytes as usize).await?;
    Header::parse(&bytes, options.file_bytes)
}

/// Writes a new header, and returns where the payload begins, bytes: the image is as much longer than its disk. `align` as in
/// [`Options`].
///
/// # Errors
/// The algorithms', or the child's.
pub async fn format(
    child: &dyn Node,
    options: &CreateOptions,
    align: u64,
    key: &Secret,
    random: &mut Random,
) -> Result<u64, CryptoError> {
    let pace = Pace::new(child, align.max(SECTOR_BYTES as u64) as usize);
    let mut created = create(options, key.bytes(), random, &pace).await?;
    let whole = (created.bytes.len() as u64).next_multiple_of(align);
    created.bytes.resize(whole as usize, 0);
    io::write(child, 0, &created.bytes).await?;
    Ok(created.header.payload_offset)
}

impl LuksNode {
    /// Opens an image.
    ///
    /// # Errors
    /// What is wrong with it, or with the key.
    pub async fn open(child: Rc<dyn Node>, options: Options) -> Result<Rc<Self>, OpenError> {
        let header = read_header(&*child, &options).await?;
        if !header.payload_offset.is_multiple_of(options.align) {
            return Err(OpenError::Alignment(options.align));
        }
        let Some(key) = &options.key else {
            return Err(OpenError::KeyRequired);
        };
        let key = unlock(&header, &*child, 0, options.align, key.bytes()).await?;
        let cipher = SectorCipher::new(header.spec, &key)?;
        let payload = options.file_bytes - header.payload_offset;
        Ok(Rc::new(Self {
            child,
            transfer: Transfer::new(cipher),
            bytes: payload / SECTOR_BYTES as u64 * SECTOR_BYTES as u64,
            zeroes: Buffer::new(BOUNCE_BYTES),
            header,
        }))
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    async fn write_encrypted(&self, offset: u64, from: Segments, durable: bool) -> Result<(), Errno> {
        let place = self.header.payload_offset + offset;
        self.transfer.write(&*self.child, place, offset, from, durable).await
    }

    /// Zeroes are data like any other here.
    async fn write_zeroes_encrypted(&self, mut offset: u64, mut bytes: u64) -> Result<(), Errno> {
        check_sectors(offset, bytes)?;
        while bytes > 0 {
            let step = bytes.min(BOUNCE_BYTES as u64);
            self.write_encrypted(offset, Segments::of_buffer(&self.zeroes, step as usize), false)
                .await?;
            offset += step;
            bytes -= step;
        }
        Ok(())
    }
}

impl Node for LuksNode {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        let place = self.header.payload_offset + offset;
        Box::pin(self.transfer.read(&*self.child, place, offset, into))
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        Box::pin(self.write_encrypted(offset, from, durable))
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, _may_unmap: bool) -> NodeFuture<'_> {
        Box::pin(self.write_zeroes_encrypted(offset, bytes))
    }

    /// Nothing: holes in the image would show which parts of the disk are in use.
    fn discard(&self, _offset: u64, _bytes: u64) -> NodeFuture<'_> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn flush(&self) -> NodeFuture<'_> {
        self.child.flush()
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn limits(&self) -> Limits {
        let align = self.child.limits().align.max(SECTOR_BYTES as u64);
        Limits { align, grows: false }
    }
}
