//! Making a new header, with a new master key in its first slot.

use super::header::{HEADER_BYTES, MATERIAL_AT, Slot};
use super::unlock::digest;
use super::{DIGEST_BYTES, Header, MAX_ITERATIONS, SLOTS, STRIPES};
use crate::crypto::cipher::{SectorCipher, Spec};
use crate::crypto::hash::Hash;
use crate::crypto::pace::Pace;
use crate::crypto::random::Random;
use crate::crypto::split::split;
use crate::crypto::{CryptoError, SECTOR_BYTES};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// Fewest iterations (the specification's recommendation, and QEMU's).
const MIN_ITERATIONS: u32 = 1000;
/// The master key is random: its digest needs less than a password.
const DIGEST_PART: u32 = 8;
/// Key material begins on multiples of this many bytes, for disks with large sectors.
const MATERIAL_ALIGN: u64 = 4096;
/// How long the speed of PBKDF2 is measured.
const MEASURED: Duration = Duration::from_millis(20);

/// How much work it is to try a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Iterations {
    /// As many iterations as this machine makes in that time.
    Time(Duration),
    /// So many (at least 1000).
    Count(u32),
}

impl Default for Iterations {
    /// QEMU's `iter-time`.
    fn default() -> Self {
        Self::Time(Duration::from_secs(2))
    }
}

/// What a new header is to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreateOptions {
    /// The cipher.
    pub spec: Spec,
    /// `hash-alg`.
    pub hash: Hash,
    /// `iter-time`.
    pub iterations: Iterations,
}

impl CreateOptions {
    /// Size of header and all slots: where the payload begins, bytes.
    pub fn area_bytes(&self) -> u64 {
        MATERIAL_AT + SLOTS as u64 * self.slot_bytes()
    }

    fn slot_bytes(&self) -> u64 {
        (self.spec.key_bytes() as u64 * STRIPES as u64).next_multiple_of(MATERIAL_ALIGN)
    }
}

/// A new header and its key.
pub struct Created {
    /// As it was made.
    pub header: Header,
    /// What goes to the image's start (or, in qcow2, to the start of the header's clusters). The area is
    /// [`CreateOptions::area_bytes`] long; what is behind these bytes does not matter.
    pub bytes: Vec<u8>,
    /// The cipher of the payload.
    pub cipher: SectorCipher,
}

/// Makes a header that opens with the password.
///
/// # Errors
/// A key that does not fit the cipher, or the pace's.
pub async fn create(
    options: &CreateOptions,
    password: &[u8],
    random: &mut Random,
    pace: &Pace<'_>,
) -> Result<Created, CryptoError> {
    let (spec, hash) = (options.spec, options.hash);
    let iterations = match options.iterations {
        Iterations::Count(count) => count,
        Iterations::Time(time) => iterations_in(time, hash, spec.key_bytes(), pace).await?,
    };
    let iterations = iterations.clamp(MIN_ITERATIONS, MAX_ITERATIONS);
    let slot_bytes = options.slot_bytes();
    let mut header = Header {
        spec,
        hash,
        payload_offset: options.area_bytes(),
        digest: [0; DIGEST_BYTES],
        digest_salt: random.array(),
        digest_iterations: (iterations / DIGEST_PART).max(MIN_ITERATIONS),
        uuid: uuid(random),
        slots: std::array::from_fn(|number| Slot {
            is_active: number == 0,
            iterations: if number == 0 { iterations } else { 0 },
            salt: if number == 0 {
                random.array()
            } else {
                Default::default()
            },
            material_offset: MATERIAL_AT + number as u64 * slot_bytes,
            stripes: STRIPES as u32,
        }),
    };
    let mut key = Zeroizing::new(vec![0; spec.key_bytes()]);
    random.fill(&mut key);
    header.digest = digest(&header, &key, pace).await?;

    let mut slot_key = Zeroizing::new(vec![0; spec.key_bytes()]);
    let salt = header.slots[0].salt;
    hash.pbkdf2(password, &salt, iterations, &mut slot_key, pace).await?;
    let mut material = split(hash, &key, STRIPES, random);
    let sectors = material.len().next_multiple_of(SECTOR_BYTES);
    material.resize(sectors, 0);
    SectorCipher::new(spec, &slot_key)?.encrypt(0, &mut material);

    let mut bytes = vec![0; MATERIAL_AT as usize];
    bytes[..HEADER_BYTES].copy_from_slice(&header.encode());
    bytes.extend_from_slice(&material);
    Ok(Created {
        cipher: SectorCipher::new(spec, &key)?,
        header,
        bytes,
    })
}

/// How many iterations for a key of that size this machine makes in a time.
async fn iterations_in(time: Duration, hash: Hash, key_bytes: usize, pace: &Pace<'_>) -> Result<u32, CryptoError> {
    let mut key = Zeroizing::new(vec![0; key_bytes]);
    let mut count = MIN_ITERATIONS;
    loop {
        let (start, away) = (Instant::now(), pace.away());
        hash.pbkdf2(&[0; 16], &[0; 32], count, &mut key, pace).await?;
        let took = start.elapsed().saturating_sub(pace.away() - away);
        if took >= MEASURED || count >= MAX_ITERATIONS {
            let per_second = f64::from(count) / took.as_secs_f64().max(f64::EPSILON);
            // Saturates.
            return Ok((per_second * time.as_secs_f64()) as u32);
        }
        count *= 2;
    }
}

/// A random UUID (RFC 9562, version 4) as text.
fn uuid(random: &mut Random) -> String {
    let mut bytes: [u8; 16] = random.array();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = String::new();
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    text
}
