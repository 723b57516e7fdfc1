//! Encryption of disks: what turns sectors into ciphertext, and a password into a key.
//!
//! | room | what |
//! |---|---|
//! | [`cipher`] | one key's cipher for sectors: AES with XTS, CBC or ECB |
//! | [`hash`] | hash functions by their LUKS names, PBKDF2 |
//! | [`split`] | the anti-forensic splitter: a key spread over many sectors |
//! | [`luks`] | LUKS version 1: header, unlocking, creating |
//! | [`random`] | salts and keys from a seed |
//! | [`transfer`] | encrypted reading and writing over a node |
//! | [`pace`] | long computations that let others work |
//!
//! Algorithms come from RustCrypto's crates; here is what says how LUKS and qcow2 use them. Keys are wiped when they go.

pub mod cipher;
pub mod error;
pub mod hash;
pub mod luks;
pub mod pace;
pub mod random;
pub mod split;
pub mod transfer;

pub use error::CryptoError;

/// The unit of encryption, bytes.
pub const SECTOR_BYTES: usize = 512;
