//! What blockdev-create makes, as QMP describes it.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// `BlockdevCreateOptions`. In JSON it is a union with a tag among its members; messages cannot hold one, because their
/// encoding does not name members, and have an ordinary enum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", tag = "driver", rename_all = "kebab-case")]
pub enum CreateOptions {
    /// A file in the host's file system.
    File(CreateFile),
    /// An encrypted disk on a node.
    Luks(CreateLuks),
    /// A qcow2 image on a node.
    Qcow2(CreateQcow2),
}

/// [`CreateOptions`] in messages.
#[derive(Serialize, Deserialize)]
#[serde(remote = "CreateOptions")]
enum InMessage {
    File(CreateFile),
    Luks(CreateLuks),
    Qcow2(CreateQcow2),
}

impl Serialize for CreateOptions {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            Self::serialize(self, serializer)
        } else {
            InMessage::serialize(self, serializer)
        }
    }
}

impl<'de> Deserialize<'de> for CreateOptions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            Self::deserialize(deserializer)
        } else {
            InMessage::deserialize(deserializer)
        }
    }
}

/// `BlockdevCreateOptionsFile`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CreateFile {
    /// Its path.
    pub filename: String,
    /// Bytes.
    pub size: u64,
    /// How its space is provided.
    pub preallocation: Option<PreallocMode>,
    /// A wish to a file system that copies what is written; what is made is the same.
    pub nocow: Option<bool>,
    /// A wish to a file system that has such hints, bytes; what is made is the same.
    pub extent_size_hint: Option<u64>,
}

/// How a new image is encrypted: `QCryptoBlockCreateOptionsLUKS`, in QMP's words.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub struct LuksOptions {
    pub key_secret: Option<String>,
    pub cipher_alg: Option<String>,
    pub cipher_mode: Option<String>,
    pub ivgen_alg: Option<String>,
    pub ivgen_hash_alg: Option<String>,
    pub hash_alg: Option<String>,
    pub iter_time: Option<i64>,
}

/// `BlockdevCreateOptionsLUKS`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub struct CreateLuks {
    pub key_secret: Option<String>,
    pub cipher_alg: Option<String>,
    pub cipher_mode: Option<String>,
    pub ivgen_alg: Option<String>,
    pub ivgen_hash_alg: Option<String>,
    pub hash_alg: Option<String>,
    pub iter_time: Option<i64>,
    /// Name of the node that gets it.
    pub file: String,
    /// Bytes.
    pub size: u64,
    pub preallocation: Option<PreallocMode>,
}

/// `QCryptoBlockCreateOptions` of a qcow2 image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // QMP's names.
pub struct Qcow2Encryption {
    pub format: NewEncryptionFormat,
    pub key_secret: Option<String>,
    pub cipher_alg: Option<String>,
    pub cipher_mode: Option<String>,
    pub ivgen_alg: Option<String>,
    pub ivgen_hash_alg: Option<String>,
    pub hash_alg: Option<String>,
    pub iter_time: Option<i64>,
}

/// `QCryptoBlockFormat`, with the word that an image's other options have for the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // QMP's names.
pub enum NewEncryptionFormat {
    Aes,
    Luks,
    Qcow,
}

impl From<CreateLuks> for LuksOptions {
    fn from(options: CreateLuks) -> Self {
        Self {
            key_secret: options.key_secret,
            cipher_alg: options.cipher_alg,
            cipher_mode: options.cipher_mode,
            ivgen_alg: options.ivgen_alg,
            ivgen_hash_alg: options.ivgen_hash_alg,
            hash_alg: options.hash_alg,
            iter_time: options.iter_time,
        }
    }
}

impl From<Qcow2Encryption> for LuksOptions {
    fn from(options: Qcow2Encryption) -> Self {
        Self {
            key_secret: options.key_secret,
            cipher_alg: options.cipher_alg,
            cipher_mode: options.cipher_mode,
            ivgen_alg: options.ivgen_alg,
            ivgen_hash_alg: options.ivgen_hash_alg,
            hash_alg: options.hash_alg,
            iter_time: options.iter_time,
        }
    }
}

/// `BlockdevCreateOptionsQcow2`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CreateQcow2 {
    /// Name of the node that gets the image.
    pub file: String,
    /// Bytes.
    pub size: u64,
    /// Format version.
    pub version: Option<Qcow2Version>,
    /// Name of the backing file, for the header.
    pub backing_file: Option<String>,
    /// Format of the backing file, for the header.
    pub backing_fmt: Option<BackingFormat>,
    /// Subclusters.
    pub extended_l2: Option<bool>,
    /// Bytes.
    pub cluster_size: Option<u64>,
    /// How its space is provided.
    pub preallocation: Option<PreallocMode>,
    /// Refcounts may lag behind.
    pub lazy_refcounts: Option<bool>,
    /// Bits of a refcount.
    pub refcount_bits: Option<i64>,
    /// How compressed clusters are compressed.
    pub compression_type: Option<CompressionType>,
    /// Name of the node that gets the data.
    pub data_file: Option<String>,
    /// The data file alone is a raw image of the disk.
    pub data_file_raw: Option<bool>,
    /// How it is encrypted.
    pub encrypt: Option<Qcow2Encryption>,
}

/// `PreallocMode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // QMP's names.
pub enum PreallocMode {
    Off,
    Metadata,
    Falloc,
    Full,
}

/// `BlockdevQcow2Version`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // QMP's names.
pub enum Qcow2Version {
    V2,
    V3,
}

/// `Qcow2CompressionType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // QMP's names.
pub enum CompressionType {
    Zlib,
    Zstd,
}

/// `BlockdevDriver`, of a backing file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // QMP's names.
pub enum BackingFormat {
    Raw,
    Qcow2,
}

impl BackingFormat {
    /// As it stands in the header.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}
