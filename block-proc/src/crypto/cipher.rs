//! The cipher for sectors of one key: AES with a mode, and a rule for what makes each sector's encryption differ.

use super::hash::Hash;
use super::{CryptoError, SECTOR_BYTES};
use aes::cipher::array::Array;
use aes::cipher::consts::U16;
use aes::cipher::{
    BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt, BlockSizeUser, InnerIvInit, KeyInit,
};
use aes::{Aes128, Aes192, Aes256};
use xts_mode::Xts128;

type Block = Array<u8, U16>;

/// A block cipher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// AES with a key of 128 bits.
    Aes128,
    /// AES with a key of 192 bits.
    Aes192,
    /// AES with a key of 256 bits.
    Aes256,
}

/// How blocks make a sector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// IEEE 1619: two keys.
    Xts,
    /// Each block depends on the one before.
    Cbc,
    /// Each block for itself: equal blocks show.
    Ecb,
}

/// What makes a sector's encryption differ from another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Iv {
    /// Nothing.
    None,
    /// The low 32 bits of its number.
    Plain,
    /// Its number.
    Plain64,
    /// Its number, encrypted with the hash of the key.
    Essiv(Hash),
}

/// All that there is to say about a cipher but its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spec {
    /// The block cipher.
    pub algorithm: Algorithm,
    /// The mode.
    pub mode: Mode,
    /// The initial vector of a sector.
    pub iv: Iv,
}

impl Algorithm {
    /// QEMU's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes128 => "aes-128",
            Self::Aes192 => "aes-192",
            Self::Aes256 => "aes-256",
        }
    }

    /// Size of one key, bytes.
    pub fn key_bytes(self) -> usize {
        match self {
            Self::Aes128 => 16,
            Self::Aes192 => 24,
            Self::Aes256 => 32,
        }
    }

    fn of_key_bytes(bytes: usize) -> Option<Self> {
        [Self::Aes128, Self::Aes192, Self::Aes256]
            .into_iter()
            .find(|algorithm| algorithm.key_bytes() == bytes)
    }
}

impl Mode {
    /// QEMU's name, which is LUKS's as well.
    pub fn name(self) -> &'static str {
        match self {
            Self::Xts => "xts",
            Self::Cbc => "cbc",
            Self::Ecb => "ecb",
        }
    }
}

impl Iv {
    /// QEMU's name of the generator, without its hash function.
    pub fn name(self) -> &'static str {
        match self {
            Self::None | Self::Plain => "plain",
            Self::Plain64 => "plain64",
            Self::Essiv(_) => "essiv",
        }
    }
}

impl Spec {
    /// What an image in QEMU's first format for encryption has.
    pub const LEGACY_AES: Self = Self {
        algorithm: Algorithm::Aes128,
        mode: Mode::Cbc,
        iv: Iv::Plain64,
    };

    /// As a LUKS header says it: `aes`, `xts-plain64`, and how long its key is.
    ///
    /// # Errors
    /// What of it there is not.
    pub fn of_luks(cipher: &str, mode: &str, key_bytes: usize) -> Result<Self, CryptoError> {
        if cipher != "aes" {
            return Err(CryptoError::Unsupported("cipher", cipher.to_owned()));
        }
        let (mode_name, iv) = mode.split_once('-').unwrap_or((mode, ""));
        let unsupported = || CryptoError::Unsupported("cipher mode", mode.to_owned());
        let (mode, key_parts) = match mode_name {
            "xts" => (Mode::Xts, 2),
            "cbc" => (Mode::Cbc, 1),
            "ecb" => (Mode::Ecb, 1),
            _ => return Err(unsupported()),
        };
        let iv = match (mode, iv.split_once(':').unwrap_or((iv, ""))) {
            (Mode::Ecb, _) => Iv::None,
            (_, ("plain", "")) => Iv::Plain,
            (_, ("plain64", "")) => Iv::Plain64,
            (_, ("essiv", hash)) => Iv::Essiv(Hash::of_name(hash)?),
            _ => return Err(unsupported()),
        };
        let algorithm = Algorithm::of_key_bytes(key_bytes / key_parts).filter(|_| key_bytes.is_multiple_of(key_parts));
        let spec = Self {
            algorithm: algorithm.ok_or_else(|| CryptoError::KeyBytes {
                cipher: format!("{cipher}-{mode_name}"),
                bytes: key_bytes,
            })?,
            mode,
            iv,
        };
        spec.check()
    }

    /// In QEMU's words. Without them: aes-256, xts, plain64; the hash of essiv is sha256.
    ///
    /// # Errors
    /// What of it there is not.
    pub fn of_qemu(
        algorithm: Option<&str>,
        mode: Option<&str>,
        iv: Option<&str>,
        iv_hash: Option<&str>,
    ) -> Result<Self, CryptoError> {
        let algorithm = match algorithm.unwrap_or("aes-256") {
            "aes-128" => Algorithm::Aes128,
            "aes-192" => Algorithm::Aes192,
            "aes-256" => Algorithm::Aes256,
            other => return Err(CryptoError::Unsupported("cipher", other.to_owned())),
        };
        let mode = match mode.unwrap_or("xts") {
            "xts" => Mode::Xts,
            "cbc" => Mode::Cbc,
            "ecb" => Mode::Ecb,
            other => return Err(CryptoError::Unsupported("cipher mode", other.to_owned())),
        };
        let iv = match (mode, iv.unwrap_or("plain64")) {
            (Mode::Ecb, _) => Iv::None,
            (_, "plain") => Iv::Plain,
            (_, "plain64") => Iv::Plain64,
            (_, "essiv") => Iv::Essiv(Hash::of_name(iv_hash.unwrap_or("sha256"))?),
            (_, other) => return Err(CryptoError::Unsupported("IV generator", other.to_owned())),
        };
        Self { algorithm, mode, iv }.check()
    }

    fn check(self) -> Result<Self, CryptoError> {
        match self.iv {
            Iv::Essiv(hash) if Algorithm::of_key_bytes(hash.bytes()).is_none() => Err(CryptoError::Unsupported(
                "IV generator",
                format!("essiv:{}", hash.name()),
            )),
            _ => Ok(self),
        }
    }

    /// The mode as a LUKS header says it.
    pub fn luks_mode(self) -> String {
        match self.iv {
            // QEMU wants a generator's name also where nothing is generated.
            Iv::None => format!("{}-plain64", self.mode.name()),
            Iv::Essiv(hash) => format!("{}-essiv:{}", self.mode.name(), hash.name()),
            Iv::Plain | Iv::Plain64 => format!("{}-{}", self.mode.name(), self.iv.name()),
        }
    }

    /// Size of all keys together, bytes.
    pub fn key_bytes(self) -> usize {
        match self.mode {
            Mode::Xts => 2 * self.algorithm.key_bytes(),
            Mode::Cbc | Mode::Ecb => self.algorithm.key_bytes(),
        }
    }
}

/// AES with its key.
enum Aes {
    Aes128(Aes128),
    Aes192(Aes192),
    Aes256(Aes256),
}

impl Aes {
    fn new(key: &[u8]) -> Option<Self> {
        match key.len() {
            16 => Aes128::new_from_slice(key).ok().map(Self::Aes128),
            24 => Aes192::new_from_slice(key).ok().map(Self::Aes192),
            32 => Aes256::new_from_slice(key).ok().map(Self::Aes256),
            _ => None,
        }
    }

    fn encrypt_block(&self, block: &mut Block) {
        match self {
            Self::Aes128(aes) => aes.encrypt_block(block),
            Self::Aes192(aes) => aes.encrypt_block(block),
            Self::Aes256(aes) => aes.encrypt_block(block),
        }
    }
}

/// The initial vectors of a key.
enum Ivs {
    None,
    Plain,
    Plain64,
    Essiv(Box<Aes>),
}

impl Ivs {
    fn of(&self, sector: u64) -> Block {
        let mut iv = Block::default();
        match self {
            Self::None => {}
            Self::Plain => iv[..4].copy_from_slice(&(sector as u32).to_le_bytes()),
            Self::Plain64 => iv[..8].copy_from_slice(&sector.to_le_bytes()),
            Self::Essiv(cipher) => {
                iv[..8].copy_from_slice(&sector.to_le_bytes());
                cipher.encrypt_block(&mut iv);
            }
        }
        iv
    }
}

/// Encrypts or decrypts sectors, in place.
trait Sectors {
    /// Without its last piece if that is no whole sector.
    fn encrypt(&self, ivs: &Ivs, first: u64, data: &mut [u8]);
    fn decrypt(&self, ivs: &Ivs, first: u64, data: &mut [u8]);
}

impl<C> Sectors for Xts128<C>
where
    C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt,
{
    fn encrypt(&self, ivs: &Ivs, first: u64, data: &mut [u8]) {
        for (number, sector) in sectors(first, data) {
            self.encrypt_sector(sector, ivs.of(number));
        }
    }

    fn decrypt(&self, ivs: &Ivs, first: u64, data: &mut [u8]) {
        for (number, sector) in sectors(first, data) {
            self.decrypt_sector(sector, ivs.of(number));
        }
    }
}

struct Cbc<C>(C);

impl<C> Sectors for Cbc<C>
where
    C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt,
{
    fn encrypt(&self, ivs: &Ivs, first: u64, data: &mut [u8]) {
        for (number, sector) in sectors(first, data) {
            cbc::Encryptor::inner_iv_init(&self.0, &ivs.of(number)).encrypt_blocks(blocks(sector));
        }
    }

    fn decrypt(&self, ivs: &Ivs, first: u64, data: &mut [u8]) {
        for (number, sector) in sectors(first, data) {
            cbc::Decryptor::inner_iv_init(&self.0, &ivs.of(number)).decrypt_blocks(blocks(sector));
        }
    }
}

struct Ecb<C>(C);

impl<C> Sectors for Ecb<C>
where
    C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt,
{
    fn encrypt(&self, _ivs: &Ivs, _first: u64, data: &mut [u8]) {
        self.0.encrypt_blocks(blocks(data));
    }

    fn decrypt(&self, _ivs: &Ivs, _first: u64, data: &mut [u8]) {
        self.0.decrypt_blocks(blocks(data));
    }
}

fn sectors(first: u64, data: &mut [u8]) -> impl Iterator<Item = (u64, &mut [u8])> {
    // The numbers of a disk's sectors are below 2^55.
    (first..).zip(data.chunks_exact_mut(SECTOR_BYTES))
}

fn blocks(data: &mut [u8]) -> &mut [Block] {
    Block::slice_as_chunks_mut(data).0
}

/// See the module.
pub struct SectorCipher {
    spec: Spec,
    ivs: Ivs,
    sectors: Box<dyn Sectors>,
}

impl SectorCipher {
    /// With a key.
    ///
    /// # Errors
    /// When it has another length than the cipher's.
    pub fn new(spec: Spec, key: &[u8]) -> Result<Self, CryptoError> {
        if key.len() != spec.key_bytes() {
            return Err(CryptoError::KeyBytes {
                cipher: format!("{}-{}", spec.algorithm.name(), spec.mode.name()),
                bytes: key.len(),
            });
        }
        let ivs = match spec.iv {
            Iv::None => Ivs::None,
            Iv::Plain => Ivs::Plain,
            Iv::Plain64 => Ivs::Plain64,
            Iv::Essiv(hash) => {
                let cipher = Aes::new(&hash.digest(&[key]));
                let unsupported = || CryptoError::Unsupported("IV generator", format!("essiv:{}", hash.name()));
                Ivs::Essiv(Box::new(cipher.ok_or_else(unsupported)?))
            }
        };
        let sectors = match spec.algorithm {
            Algorithm::Aes128 => with_mode::<Aes128>(spec.mode, key),
            Algorithm::Aes192 => with_mode::<Aes192>(spec.mode, key),
            Algorithm::Aes256 => with_mode::<Aes256>(spec.mode, key),
        };
        Ok(Self { spec, ivs, sectors })
    }

    /// What it was made from.
    pub fn spec(&self) -> Spec {
        self.spec
    }

    /// Encrypts whole sectors, of which the first has this number.
    pub fn encrypt(&self, first: u64, data: &mut [u8]) {
        self.sectors.encrypt(&self.ivs, first, data);
    }

    /// As [`Self::encrypt`], back.
    pub fn decrypt(&self, first: u64, data: &mut [u8]) {
        self.sectors.decrypt(&self.ivs, first, data);
    }
}

/// The key is as long as the mode wants it.
fn with_mode<C>(mode: Mode, key: &[u8]) -> Box<dyn Sectors>
where
    C: KeyInit + BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt + 'static,
{
    let cipher = |key: &[u8]| C::new_from_slice(key).expect("the key's length was checked");
    match mode {
        Mode::Xts => {
            let (data, tweak) = key.split_at(key.len() / 2);
            Box::new(Xts128::new(cipher(data), cipher(tweak)))
        }
        Mode::Cbc => Box::new(Cbc(cipher(key))),
        Mode::Ecb => Box::new(Ecb(cipher(key))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits = text.as_bytes().chunks(2);
        digits
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect()
    }

    /// XTS: IEEE 1619, vectors 4 and 10. The others: `openssl enc -nopad`, with IVs made by hand.
    #[test]
    fn known_answers() {
        let counting = |bytes: usize| (0..bytes as u8).collect::<Vec<u8>>();
        let sector = 0x1122_3344_5566_7788_u64;
        let keys = [
            "2718281828459045235360287471352631415926535897932384626433832795",
            "2718281828459045235360287471352662497757247093699959574966967627\
             3141592653589793238462643383279502884197169399375105820974944592",
        ];
        let answers = [
            (
                "xts-plain64",
                hex(keys[0]),
                0,
                "27a7479befa1d476489f308cd4cfa6e2",
                "0a282df920147beabe421ee5319d0568",
            ),
            (
                "xts-plain64",
                hex(keys[1]),
                0xff,
                "1c3b3a102f770386e4836c99e370cf9b",
                "c4f36ffda9fcea70b9c6e693e148c151",
            ),
            (
                "cbc-plain64",
                counting(16),
                sector,
                "d54885bc2d8fa732061505c04e734415",
                "bfb0157ffa08a1fa0855c50f09075be6",
            ),
            (
                "cbc-plain",
                counting(24),
                sector,
                "f3860c4788320806c9ccf73d9c3e18c3",
                "5f9bfd352c609545a3f1b7ed1e23a565",
            ),
            (
                "cbc-essiv:sha256",
                counting(32),
                sector,
                "bc76652295b9c4b60d7801f34f3af3bc",
                "331d76609ca62af2bdbb2bd3bdb265fb",
            ),
            (
                "ecb-plain64",
                counting(32),
                sector,
                "5a6e045708fb7196f02e553d02c3a692",
                "9200cd8d239680cb5a69e65440326314",
            ),
        ];
        let plain: Vec<u8> = (0..SECTOR_BYTES).map(|i| i as u8).collect();
        for (mode, key, sector, first, last) in answers {
            let spec = Spec::of_luks("aes", mode, key.len()).unwrap();
            assert_eq!(spec.luks_mode(), mode);
            let cipher = SectorCipher::new(spec, &key).unwrap();
            if sector > 0 {
                // The second of three sectors has the number.
                let mut data = [&plain[..], &plain, &plain].concat();
                cipher.encrypt(sector - 1, &mut data);
                assert_eq!(data[512..528], hex(first), "{mode}");
                assert_eq!(data[1008..1024], hex(last), "{mode}");
                cipher.decrypt(sector - 1, &mut data);
                assert_eq!(data, [&plain[..], &plain, &plain].concat(), "{mode}");
            }
            let mut one = plain.clone();
            cipher.encrypt(sector, &mut one);
            assert_eq!((&one[..16], &one[496..]), (&hex(first)[..], &hex(last)[..]), "{mode}");
        }
    }

    #[test]
    fn what_there_is_not_is_named() {
        for (cipher, mode, bytes, what) in [
            ("serpent", "xts-plain64", 64, "cipher \"serpent\""),
            ("aes", "lrw-benbi", 32, "cipher mode \"lrw-benbi\""),
            ("aes", "xts-essiv:sha1", 64, "essiv:sha1"),
            ("aes", "xts-essiv:whirlpool", 64, "hash \"whirlpool\""),
            ("aes", "cbc", 32, "cipher mode \"cbc\""),
            ("aes", "cbc-plain64:sha256", 32, "cipher mode \"cbc-plain64:sha256\""),
            ("aes", "xts-plain64", 33, "no key of 33 bytes"),
            ("aes", "cbc-plain64", 64, "no key of 64 bytes"),
            ("aes", "cbc-plain64", 0, "no key of 0 bytes"),
        ] {
            let said = Spec::of_luks(cipher, mode, bytes).unwrap_err().to_string();
            assert!(said.contains(what), "{said}");
        }
    }

    #[test]
    fn words_of_qemu_and_of_luks_mean_the_same() {
        for (qemu, luks) in [
            ((None, None, None, None), ("xts-plain64", 64)),
            ((Some("aes-128"), Some("xts"), None, None), ("xts-plain64", 32)),
            (
                (Some("aes-256"), Some("cbc"), Some("essiv"), Some("sha256")),
                ("cbc-essiv:sha256", 32),
            ),
            ((Some("aes-192"), Some("cbc"), Some("plain"), None), ("cbc-plain", 24)),
            ((None, Some("ecb"), None, None), ("ecb-plain64", 32)),
        ] {
            let (algorithm, mode, iv, hash) = qemu;
            let spec = Spec::of_qemu(algorithm, mode, iv, hash).unwrap();
            assert_eq!((spec.luks_mode().as_str(), spec.key_bytes()), luks);
            assert_eq!(Spec::of_luks("aes", luks.0, luks.1).unwrap(), spec);
        }
        assert!(Spec::of_qemu(Some("twofish-256"), None, None, None).is_err());
        assert!(Spec::of_qemu(None, Some("ctr"), None, None).is_err());
        assert!(Spec::of_qemu(None, None, Some("essiv"), Some("sha512")).is_err());
    }
}
