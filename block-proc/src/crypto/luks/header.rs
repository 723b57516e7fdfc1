//! The header, checked before anything in it is believed; and its bytes.

use super::{DIGEST_BYTES, MAX_ITERATIONS, SALT_BYTES, SLOTS, STRIPES};
use crate::crypto::cipher::Spec;
use crate::crypto::hash::Hash;
use crate::crypto::{CryptoError, SECTOR_BYTES};
use std::ops::Range;

/// "LUKS", 0xba, 0xbe.
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// Size of the header, bytes.
pub const HEADER_BYTES: usize = SLOTS_AT + SLOTS * SLOT_BYTES;
/// Where key material may begin, bytes: what else is in the header's first block stays as it is.
pub const MATERIAL_AT: u64 = 4096;

const VERSION: u16 = 1;
const SLOT_ACTIVE: u32 = 0x00ac_71f3;
const SLOT_DISABLED: u32 = 0x0000_dead;
const SLOT_BYTES: usize = 48;
const NAME_BYTES: usize = 32;
const UUID_BYTES: usize = 40;

const CIPHER_AT: usize = 8;
const MODE_AT: usize = 40;
const HASH_AT: usize = 72;
const PAYLOAD_AT: usize = 104;
const KEY_BYTES_AT: usize = 108;
const DIGEST_AT: usize = 112;
const SALT_AT: usize = 132;
const ITERATIONS_AT: usize = 164;
const UUID_AT: usize = 168;
const SLOTS_AT: usize = 208;

/// A slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Whether there is a key in it. The rest means nothing without one.
    pub is_active: bool,
    /// Iterations of PBKDF2 over the password.
    pub iterations: u32,
    /// Their salt.
    pub salt: [u8; SALT_BYTES],
    /// Where the key's stripes are, bytes from the header's start.
    pub material_offset: u64,
    /// How many stripes.
    pub stripes: u32,
}

/// What the header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The payload's cipher, and the key material's.
    pub spec: Spec,
    /// The hash function of PBKDF2 and of the stripes.
    pub hash: Hash,
    /// Where the payload begins, bytes from the header's start.
    pub payload_offset: u64,
    /// Digest of the master key.
    pub digest: [u8; DIGEST_BYTES],
    /// Its salt.
    pub digest_salt: [u8; SALT_BYTES],
    /// Its iterations.
    pub digest_iterations: u32,
    /// The volume's UUID, as found.
    pub uuid: String,
    /// The slots.
    pub slots: [Slot; SLOTS],
}

impl Header {
    /// Reads the first [`HEADER_BYTES`]. `area_bytes`: what there is of header, key material and, where it follows,
    /// payload.
    ///
    /// # Errors
    /// The first thing that is wrong, by name.
    pub fn parse(bytes: &[u8], area_bytes: u64) -> Result<Self, CryptoError> {
        if bytes.len() < HEADER_BYTES || bytes[..MAGIC.len()] != MAGIC {
            return Err(CryptoError::NotLuks);
        }
        let version = u16::from_be_bytes([bytes[6], bytes[7]]);
        if version != VERSION {
            return Err(CryptoError::Version(version));
        }
        let (cipher, mode) = (name(bytes, CIPHER_AT, "cipher")?, name(bytes, MODE_AT, "cipher mode")?);
        let header = Self {
            spec: Spec::of_luks(cipher, mode, u32_at(bytes, KEY_BYTES_AT) as usize)?,
            hash: Hash::of_name(name(bytes, HASH_AT, "hash")?)?,
            payload_offset: sectors(u32_at(bytes, PAYLOAD_AT)),
            digest: array(bytes, DIGEST_AT),
            digest_salt: array(bytes, SALT_AT),
            digest_iterations: u32_at(bytes, ITERATIONS_AT),
            uuid: text(&bytes[UUID_AT..UUID_AT + UUID_BYTES]),
            slots: std::array::from_fn(|slot| Slot::read(&bytes[SLOTS_AT + slot * SLOT_BYTES..])),
        };
        for (number, slot) in header.slots.iter().enumerate() {
            let flag = u32_at(bytes, SLOTS_AT + number * SLOT_BYTES);
            if !matches!(flag, SLOT_ACTIVE | SLOT_DISABLED) {
                return Err(CryptoError::invalid(format!(
                    "key slot {number} has the state {flag:#x}"
                )));
            }
            if slot.is_active {
                header.check_slot(number, slot, area_bytes)?;
            }
        }
        check_iterations(|| "the master key's digest".to_owned(), header.digest_iterations)?;
        if header.payload_offset < HEADER_BYTES as u64 || header.payload_offset > area_bytes {
            return Err(CryptoError::invalid(format!(
                "the payload is at {}, in {area_bytes} bytes",
                header.payload_offset
            )));
        }
        Ok(header)
    }

    fn check_slot(&self, number: usize, slot: &Slot, area_bytes: u64) -> Result<(), CryptoError> {
        check_iterations(|| format!("key slot {number}"), slot.iterations)?;
        if slot.stripes as usize != STRIPES {
            return Err(CryptoError::invalid(format!(
                "key slot {number} has {} stripes, not {STRIPES}",
                slot.stripes
            )));
        }
        let material = self.material(slot);
        let place = |what: &str| {
            CryptoError::invalid(format!(
                "the key material of slot {number} ({} bytes at {}) {what}",
                self.material_bytes(),
                slot.material_offset
            ))
        };
        if material.start < HEADER_BYTES as u64 {
            return Err(place("lies on the header"));
        }
        if material.end > self.payload_offset {
            return Err(place("lies on the payload"));
        }
        if material.end > area_bytes {
            return Err(place("is not in the file"));
        }
        let others = self.slots.iter().take(number).filter(|other| other.is_active);
        for other in others.map(|other| self.material(other)) {
            if material.start < other.end && other.start < material.end {
                return Err(place("lies on another slot's"));
            }
        }
        Ok(())
    }

    /// Size of a slot's key material, bytes.
    pub fn material_bytes(&self) -> usize {
        self.spec.key_bytes() * STRIPES
    }

    /// Where a slot's key material is, up to the end of its last sector.
    pub fn material(&self, slot: &Slot) -> Range<u64> {
        let bytes = (self.material_bytes() as u64).next_multiple_of(SECTOR_BYTES as u64);
        // An offset is 32 bits of sectors, the size a constant.
        slot.material_offset..slot.material_offset + bytes
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, data: &[u8]| bytes[at..at + data.len()].copy_from_slice(data);
        put(0, &MAGIC);
        put(MAGIC.len(), &VERSION.to_be_bytes());
        put(CIPHER_AT, b"aes");
        put(MODE_AT, self.spec.luks_mode().as_bytes());
        put(HASH_AT, self.hash.name().as_bytes());
        put(PAYLOAD_AT, &in_sectors(self.payload_offset));
        put(KEY_BYTES_AT, &(self.spec.key_bytes() as u32).to_be_bytes());
        put(DIGEST_AT, &self.digest);
        put(SALT_AT, &self.digest_salt);
        put(ITERATIONS_AT, &self.digest_iterations.to_be_bytes());
        // One byte at least stays 0: the end of the text.
        put(UUID_AT, &self.uuid.as_bytes()[..self.uuid.len().min(UUID_BYTES - 1)]);
        for (number, slot) in self.slots.iter().enumerate() {
            let at = SLOTS_AT + number * SLOT_BYTES;
            let flag = if slot.is_active { SLOT_ACTIVE } else { SLOT_DISABLED };
            put(at, &flag.to_be_bytes());
            put(at + 4, &slot.iterations.to_be_bytes());
            put(at + 8, &slot.salt);
            put(at + 40, &in_sectors(slot.material_offset));
            put(at + 44, &slot.stripes.to_be_bytes());
        }
        bytes
    }
}

impl Slot {
    fn read(bytes: &[u8]) -> Self {
        Self {
            is_active: u32_at(bytes, 0) == SLOT_ACTIVE,
            iterations: u32_at(bytes, 4),
            salt: array(bytes, 8),
            material_offset: sectors(u32_at(bytes, 40)),
            stripes: u32_at(bytes, 44),
        }
    }
}

fn check_iterations(what: impl Fn() -> String, iterations: u32) -> Result<(), CryptoError> {
    match iterations {
        0 => Err(CryptoError::invalid(format!("{} has no iterations", what()))),
        1..=MAX_ITERATIONS => Ok(()),
        _ => Err(CryptoError::Iterations {
            what: what(),
            iterations,
            limit: MAX_ITERATIONS,
        }),
    }
}

fn sectors(count: u32) -> u64 {
    u64::from(count) * SECTOR_BYTES as u64
}

/// Offsets of ours are small.
fn in_sectors(bytes: u64) -> [u8; 4] {
    ((bytes / SECTOR_BYTES as u64) as u32).to_be_bytes()
}

/// A name that ends with a zero byte.
fn name<'a>(bytes: &'a [u8], at: usize, what: &str) -> Result<&'a str, CryptoError> {
    let field = &bytes[at..at + NAME_BYTES];
    let end = field.iter().position(|byte| *byte == 0);
    end.and_then(|end| std::str::from_utf8(&field[..end]).ok())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_graphic()))
        .ok_or_else(|| CryptoError::invalid(format!("the {what} has no name")))
}

/// Text of an image: up to a zero byte, and printable.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes[..end]
        .iter()
        .map(|byte| {
            if byte.is_ascii_graphic() {
                char::from(*byte)
            } else {
                '?'
            }
        })
        .collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

/// The caller knows that it is inside.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}
