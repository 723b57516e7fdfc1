//! Dirty bitmaps, as QMP describes them.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// `BlockDirtyBitmapAdd`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddBitmap {
    /// Drive or node.
    pub node: String,
    /// The bitmap's name.
    pub name: String,
    /// Bytes for each bit.
    pub granularity: Option<u32>,
    /// Its image keeps it.
    pub persistent: Option<bool>,
    /// Writes do not make it dirty at first.
    pub disabled: Option<bool>,
}

/// `BlockDirtyBitmap`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapName {
    /// Drive or node.
    pub node: String,
    /// The bitmap's name.
    pub name: String,
}

/// `BlockDirtyBitmapMerge`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergeBitmaps {
    /// Drive or node.
    pub node: String,
    /// The bitmap that grows.
    pub target: String,
    /// What it gets.
    pub bitmaps: Vec<BitmapSource>,
}

/// `BlockDirtyBitmapOrStr`. In JSON a text or an object; messages name which.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", untagged)]
pub enum BitmapSource {
    /// On the same node.
    Here(String),
    /// On another one.
    Of(BitmapName),
}

/// [`BitmapSource`] in messages.
#[derive(Serialize, Deserialize)]
#[serde(remote = "BitmapSource")]
enum InMessage {
    Here(String),
    Of(BitmapName),
}

impl Serialize for BitmapSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            Self::serialize(self, serializer)
        } else {
            InMessage::serialize(self, serializer)
        }
    }
}

impl<'de> Deserialize<'de> for BitmapSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            Self::deserialize(deserializer)
        } else {
            InMessage::deserialize(deserializer)
        }
    }
}

/// `BlockDirtyBitmapSha256`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapSha256 {
    /// Of its bits.
    pub sha256: String,
}

/// `BlockDirtyInfo`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyInfo {
    /// Absent: what is collected while a job works with a bitmap.
    pub name: Option<String>,
    /// Bytes that are dirty.
    pub count: i64,
    /// Bytes for each bit.
    pub granularity: i64,
    /// Writes make it dirty.
    pub recording: bool,
    /// A job works with it.
    pub busy: bool,
    /// Its image keeps it.
    pub persistent: bool,
    /// It cannot be trusted.
    pub inconsistent: Option<bool>,
}
