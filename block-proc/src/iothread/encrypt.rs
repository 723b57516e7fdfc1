//! New encrypted images, from what a client said of them.

use crate::crypto::CryptoError;
use crate::crypto::cipher::Spec;
use crate::crypto::hash::Hash;
use crate::crypto::luks::{CreateOptions, Iterations};
use crate::crypto::random::Random;
use crate::node::Node;
use crate::node::luks::format;
use crate::node::qcow2::encrypt::{NewEncryption, encrypt};
use crate::node::qcow2::{L2_CACHE_BYTES, Options, REFCOUNT_CACHE_BYTES};
use ipc::Failure;
use ipc::graph::{CreateLuks, Preallocation};
use ipc::secret::{Secret, Seed};
use std::rc::Rc;
use std::time::Duration;

/// Encrypts the qcow2 image that was just made on a node: without `luks` in the first way.
///
/// # Errors
/// What is wrong with the words, or the node's.
pub async fn qcow2(child: Rc<dyn Node>, luks: Option<CreateLuks>, key: &Secret, seed: &Seed) -> Result<(), Failure> {
    let encryption = match luks {
        None => NewEncryption::Aes,
        Some(luks) => NewEncryption::Luks(read(&luks).map_err(failure)?),
    };
    let limits = child.limits();
    let options = Options {
        writable: true,
        unmap: false,
        file_bytes: child.bytes(),
        is_block_device: !limits.grows,
        align: limits.align,
        l2_cache_bytes: L2_CACHE_BYTES,
        refcount_cache_bytes: REFCOUNT_CACHE_BYTES,
        key: None,
        may_be_locked: false,
    };
    let made = encrypt(child, options, encryption, key, &mut Random::from_seed(seed)).await;
    made.map_err(|error| Failure::new(error.to_string()))
}

/// Makes a node an encrypted disk of so many bytes.
///
/// # Errors
/// What is wrong with the words, or the node's.
pub async fn luks(
    child: &dyn Node,
    bytes: u64,
    luks: &CreateLuks,
    key: &Secret,
    seed: &Seed,
    preallocation: Preallocation,
) -> Result<(), Failure> {
    let options = read(luks).map_err(failure)?;
    let whole = options.area_bytes().checked_add(bytes);
    let whole = whole.ok_or_else(|| Failure::new("The requested file size is too large"))?;
    child.resize(whole, preallocation).await?;
    format(child, &options, child.limits().align, key, &mut Random::from_seed(seed))
        .await
        .map_err(failure)?;
    child.flush().await.map_err(|errno| failure(errno.into()))
}

fn read(luks: &CreateLuks) -> Result<CreateOptions, CryptoError> {
    Ok(CreateOptions {
        spec: Spec::of_qemu(
            luks.cipher.as_deref(),
            luks.mode.as_deref(),
            luks.iv.as_deref(),
            luks.iv_hash.as_deref(),
        )?,
        hash: Hash::of_name(luks.hash.as_deref().unwrap_or("sha256"))?,
        iterations: luks
            .iter_time_ms
            .map_or_else(Iterations::default, |ms| Iterations::Time(Duration::from_millis(ms))),
    })
}

fn failure(error: CryptoError) -> Failure {
    Failure {
        errno: error.errno().map(|errno| errno as i32),
        message: error.to_string(),
    }
}
