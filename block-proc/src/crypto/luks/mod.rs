//! LUKS version 1: a header that says how a disk is encrypted, and keeps its master key in up to eight slots, each locked
//! with a password of its own. (LUKS1 On-Disk Format Specification 1.2.3.)
//!
//! ```text
//! 0          4096                                             payload offset
//! ┌──────────┬──────────────┬──────────────┬─ ─ ─ ─ ┬──────────┬─────────────────────────
//! │ header   │ key material │ key material │        │          │ the disk's sectors
//! └──────────┴──────────────┴──────────────┴─ ─ ─ ─ ┴──────────┴─────────────────────────
//! ```
//!
//! In a qcow2 image the part before the payload is a run of clusters that a header extension names, and the payload is the
//! image's data clusters.

pub mod create;
pub mod header;
pub mod unlock;

pub use create::{CreateOptions, Created, Iterations, create};
pub use header::Header;
pub use unlock::unlock;

/// Most iterations of PBKDF2 that a header can ask for. A minute's work at worst, of which others notice nothing.
pub const MAX_ITERATIONS: u32 = 1 << 26;
/// Stripes of a key: nobody has ever used another number.
pub const STRIPES: usize = 4000;
/// Slots for keys.
pub const SLOTS: usize = 8;
/// Size of the master key's digest, bytes.
pub const DIGEST_BYTES: usize = 20;
/// Size of a salt, bytes.
pub const SALT_BYTES: usize = 32;
