//! Data of encrypted images: on its way between the guest and a data cluster it passes a cipher. Metadata, zero clusters
//! and the backing file stay as they are.

use super::header::Encryption;
use super::{Fault, Header, OpenError, Options, Qcow2Node, io};
use crate::buffer::Segments;
use crate::crypto::cipher::{SectorCipher, Spec};
use crate::crypto::luks::header::HEADER_BYTES;
use crate::crypto::transfer::{Transfer, check_sectors};
use crate::crypto::{CryptoError, luks};
use crate::node::Node;
use ipc::secret::Secret;
use nix::errno::Errno;
use zeroize::Zeroizing;

/// The cipher of an image.
pub struct Crypt {
    /// Without one the image is locked.
    transfer: Option<Transfer>,
    /// What numbers a sector: its place in the image, or (in the first format) on the disk.
    by_place_in_image: bool,
    luks: Option<luks::Header>,
}

/// Reads the LUKS header of an image that has one: what a client is told of it. The password is not needed.
///
/// # Errors
/// What is wrong with it.
pub async fn read_luks_header(
    header: &Header,
    child: &dyn Node,
    options: &Options,
) -> Result<Option<luks::Header>, OpenError> {
    let Some(Encryption::Luks { offset, bytes }) = header.encryption else {
        return Ok(None);
    };
    let length = (HEADER_BYTES as u64).min(bytes).next_multiple_of(options.align);
    let start = io::read(child, offset, length as usize).await?;
    Ok(Some(luks::Header::parse(&start, bytes)?))
}

impl Crypt {
    /// Unlocks an encrypted image; there is nothing to do for others.
    ///
    /// # Errors
    /// [`OpenError::KeyRequired`], or what is wrong with the key or the encryption header.
    pub(super) async fn open(header: &Header, child: &dyn Node, options: &Options) -> Result<Option<Self>, OpenError> {
        let luks = read_luks_header(header, child, options).await?;
        let (Some(encryption), key) = (header.encryption, &options.key) else {
            return Ok(None);
        };
        if header.is_data_file_raw() {
            let what = "encryption of an external data file that is to be readable as a raw image";
            return Err(OpenError::Unsupported(what.into()));
        }
        let cipher = match (key.as_ref().map(Secret::bytes), encryption, &luks) {
            (None, ..) if options.may_be_locked => None,
            (None, ..) => return Err(OpenError::KeyRequired),
            (Some(password), Encryption::Luks { offset, .. }, Some(luks)) => {
                let key = luks::unlock(luks, child, offset, options.align, password).await?;
                Some(SectorCipher::new(luks.spec, &key)?)
            }
            (Some(password), ..) => Some(legacy_cipher(password)?),
        };
        Ok(Some(Self {
            transfer: cipher.map(Transfer::new),
            by_place_in_image: luks.is_some(),
            luks,
        }))
    }

    fn transfer(&self) -> Result<&Transfer, Errno> {
        self.transfer.as_ref().ok_or(Errno::ENOKEY)
    }

    fn position(&self, guest: u64, host: u64) -> u64 {
        if self.by_place_in_image { host } else { guest }
    }
}

/// The first format's cipher. Its password is the key, cut or filled up with zeroes; a wrong one is noticed by nobody.
fn legacy_cipher(password: &[u8]) -> Result<SectorCipher, CryptoError> {
    let mut key = Zeroizing::new([0; 16]);
    let length = password.len().min(key.len());
    key[..length].copy_from_slice(&password[..length]);
    SectorCipher::new(Spec::LEGACY_AES, &*key)
}

impl Qcow2Node {
    /// The LUKS header, if the image has one.
    pub fn luks(&self) -> Option<&luks::Header> {
        self.crypt.as_ref()?.luks.as_ref()
    }

    /// Reads guest data from its place in the image.
    pub(super) async fn read_data(&self, guest: u64, host: u64, into: Segments) -> Result<(), Fault> {
        let node = &*self.data;
        match &self.crypt {
            None => node.read(host, into).await?,
            Some(crypt) => {
                let position = crypt.position(guest, host);
                crypt.transfer()?.read(node, host, position, into).await?;
            }
        }
        Ok(())
    }

    /// Writes guest data to its place in the image.
    pub(super) async fn write_data(&self, guest: u64, host: u64, from: Segments, durable: bool) -> Result<(), Fault> {
        let node = &*self.data;
        match &self.crypt {
            None => node.write(host, from, durable).await?,
            Some(crypt) => {
                let position = crypt.position(guest, host);
                crypt.transfer()?.write(node, host, position, from, durable).await?;
            }
        }
        Ok(())
    }

    /// Whether it was opened without the password that it needs.
    pub(super) fn is_locked(&self) -> bool {
        self.crypt.as_ref().is_some_and(|crypt| crypt.transfer.is_none())
    }

    /// Encrypted data is written in whole sectors.
    pub(super) fn check_whole(&self, offset: u64, bytes: u64) -> Result<(), Fault> {
        match self.crypt {
            Some(_) => Ok(check_sectors(offset, bytes)?),
            None => Ok(()),
        }
    }
}
