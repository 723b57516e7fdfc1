//! Passwords and seeds on their way to who needs them: shown by nothing, wiped when they go.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use zeroize::{Zeroize, Zeroizing};

/// Longest secret that travels, bytes: key files of other tools are shorter.
pub const MAX_SECRET_BYTES: usize = 16 << 10;
/// Size of a [`Seed`], bytes.
pub const SEED_BYTES: usize = 32;

/// A password, or the content of a key file.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<Vec<u8>>);

/// A secret that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a secret of {0} bytes is too long: a key has at most {MAX_SECRET_BYTES} bytes")]
pub struct TooLong(pub usize);

impl Secret {
    /// Takes bytes over.
    ///
    /// # Errors
    /// [`TooLong`].
    pub fn new(bytes: Vec<u8>) -> Result<Self, TooLong> {
        let bytes = Zeroizing::new(bytes);
        match bytes.len() {
            0..=MAX_SECRET_BYTES => Ok(Self(bytes)),
            length => Err(TooLong(length)),
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(Vec::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// A password that is text in JSON; in messages it is bytes as ever.
pub mod text {
    use super::Secret;
    use serde::de::Error as _;
    use serde::ser::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// Writes it.
    ///
    /// # Errors
    /// The serializer's, or that it is no text.
    pub fn serialize<S: Serializer>(secret: &Secret, serializer: S) -> Result<S::Ok, S::Error> {
        if !serializer.is_human_readable() {
            return secret.serialize(serializer);
        }
        std::str::from_utf8(secret.bytes())
            .map_err(S::Error::custom)?
            .serialize(serializer)
    }

    /// Reads it.
    ///
    /// # Errors
    /// The deserializer's, or that it is too long.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
        if !deserializer.is_human_readable() {
            return Secret::deserialize(deserializer);
        }
        Secret::new(String::deserialize(deserializer)?.into_bytes()).map_err(D::Error::custom)
    }
}

/// Random bytes of the supervisor, for a process that may not ask the kernel for any. Used once: whoever makes salts and
/// keys from it gets a new one each time.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed([u8; SEED_BYTES]);

impl Seed {
    /// Takes random bytes over.
    pub fn new(bytes: [u8; SEED_BYTES]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8; SEED_BYTES] {
        &self.0
    }
}

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seed")
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{decode, encode};

    #[test]
    fn secrets_travel_and_show_nothing() {
        let secret = Secret::new(b"hunter2".to_vec()).unwrap();
        let (bytes, fds) = encode(&secret, 1000).unwrap();
        assert!(fds.is_empty());
        assert_eq!(decode::<Secret>(&bytes, Vec::new(), 1000).unwrap(), secret);
        let seed = Seed::new([7; SEED_BYTES]);
        let (bytes, _) = encode(&seed, 1000).unwrap();
        assert_eq!(decode::<Seed>(&bytes, Vec::new(), 1000).unwrap(), seed);
        assert_eq!(format!("{secret:?} {seed:?}"), "Secret Seed");
    }

    #[test]
    fn a_long_secret_is_refused_on_both_sides() {
        assert_eq!(Secret::new(vec![0; 20_000]), Err(TooLong(20_000)));
        let (bytes, _) = encode(&vec![0_u8; 20_000], 1 << 20).unwrap();
        assert!(decode::<Secret>(&bytes, Vec::new(), 1 << 20).is_err());
    }
}
