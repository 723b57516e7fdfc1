//! From a password to the master key.

use super::{DIGEST_BYTES, Header};
use crate::crypto::CryptoError;
use crate::crypto::cipher::SectorCipher;
use crate::crypto::luks::header::Slot;
use crate::crypto::pace::Pace;
use crate::crypto::split::merge;
use crate::node::Node;
use crate::node::qcow2::io;
use zeroize::{Zeroize, Zeroizing};

/// Tries a password on every slot in use. The header begins at `start` of the node; `align`: pieces that can be read from
/// it start and end on multiples of this many bytes.
///
/// # Errors
/// [`CryptoError::WrongKey`], or what else went wrong.
pub async fn unlock(
    header: &Header,
    node: &dyn Node,
    start: u64,
    align: u64,
    password: &[u8],
) -> Result<Zeroizing<Vec<u8>>, CryptoError> {
    let pace = Pace::new(node, align.max(512) as usize);
    for slot in header.slots.iter().filter(|slot| slot.is_active) {
        let material = header.material(slot);
        let first = (start + material.start) / align * align;
        let end = (start + material.end).next_multiple_of(align);
        let mut bytes = Zeroizing::new(io::read(node, first, (end - first) as usize).await?);
        let skip = (start + material.start - first) as usize;
        let material = &mut bytes[skip..skip + (material.end - material.start) as usize];
        if let Some(key) = open_slot(header, slot, material, password, &pace).await? {
            return Ok(key);
        }
    }
    Err(CryptoError::WrongKey)
}

async fn open_slot(
    header: &Header,
    slot: &Slot,
    material: &mut [u8],
    password: &[u8],
    pace: &Pace<'_>,
) -> Result<Option<Zeroizing<Vec<u8>>>, CryptoError> {
    let mut slot_key = Zeroizing::new(vec![0; header.spec.key_bytes()]);
    header
        .hash
        .pbkdf2(password, &slot.salt, slot.iterations, &mut slot_key, pace)
        .await?;
    SectorCipher::new(header.spec, &slot_key)?.decrypt(0, material);
    let key = merge(
        header.hash,
        &material[..header.material_bytes()],
        header.spec.key_bytes(),
    );
    pace.turn().await?;
    let mut digest = digest(header, &key, pace).await?;
    let is_right = digest == header.digest;
    digest.zeroize();
    Ok(is_right.then_some(key))
}

/// What the header has of its master key.
pub(super) async fn digest(header: &Header, key: &[u8], pace: &Pace<'_>) -> Result<[u8; DIGEST_BYTES], CryptoError> {
    let mut digest = [0; DIGEST_BYTES];
    header
        .hash
        .pbkdf2(key, &header.digest_salt, header.digest_iterations, &mut digest, pace)
        .await?;
    Ok(digest)
}
