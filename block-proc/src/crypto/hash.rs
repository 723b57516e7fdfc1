//! Hash functions by their LUKS names, and PBKDF2 with them.

use super::CryptoError;
use super::pace::Pace;
use hmac::digest::{Digest, Output, OutputSizeUser};
use hmac::{EagerHash, Hmac, KeyInit, Mac};
use nix::errno::Errno;
use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::{Sha224, Sha256, Sha384, Sha512};
use zeroize::{Zeroize, Zeroizing};

/// Iterations of PBKDF2 between two looks at the clock: some tens of microseconds.
const ITERATIONS_BETWEEN: u32 = 256;

/// A hash function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// SHA-1: what old headers have.
    Sha1,
    /// SHA-224.
    Sha224,
    /// SHA-256: what headers have today.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
    /// RIPEMD-160.
    Ripemd160,
}

/// Does something with the type of a hash function.
macro_rules! with_type {
    ($hash:expr, $type:ident => $what:expr) => {
        match $hash {
            Hash::Sha1 => {
                type $type = Sha1;
                $what
            }
            Hash::Sha224 => {
                type $type = Sha224;
                $what
            }
            Hash::Sha256 => {
                type $type = Sha256;
                $what
            }
            Hash::Sha384 => {
                type $type = Sha384;
                $what
            }
            Hash::Sha512 => {
                type $type = Sha512;
                $what
            }
            Hash::Ripemd160 => {
                type $type = Ripemd160;
                $what
            }
        }
    };
}

impl Hash {
    const ALL: [Self; 6] = [
        Self::Sha1,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
        Self::Ripemd160,
    ];

    /// Its name in headers and in options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
        }
    }

    /// By its name.
    ///
    /// # Errors
    /// When there is none with it.
    pub fn of_name(name: &str) -> Result<Self, CryptoError> {
        Self::ALL
            .into_iter()
            .find(|hash| hash.name() == name)
            .ok_or_else(|| CryptoError::Unsupported("hash", name.to_owned()))
    }

    /// Size of its result, bytes.
    pub fn bytes(self) -> usize {
        with_type!(self, H => <H as Digest>::output_size())
    }

    /// The hash of pieces in a row.
    pub fn digest(self, pieces: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        with_type!(self, H => {
            let mut hasher = H::new();
            pieces.iter().for_each(|piece| hasher.update(piece));
            Zeroizing::new(hasher.finalize().to_vec())
        })
    }

    /// PBKDF2 with HMAC (RFC 8018): fills `key`.
    ///
    /// # Errors
    /// The pace's.
    pub async fn pbkdf2(
        self,
        password: &[u8],
        salt: &[u8],
        iterations: u32,
        key: &mut [u8],
        pace: &Pace<'_>,
    ) -> Result<(), Errno> {
        with_type!(self, H => pbkdf2::<H>(password, salt, iterations, key, pace).await)
    }
}

async fn pbkdf2<H: EagerHash>(
    password: &[u8],
    salt: &[u8],
    iterations: u32,
    key: &mut [u8],
    pace: &Pace<'_>,
) -> Result<(), Errno>
where
    Hmac<H>: Mac + KeyInit + Clone,
{
    let keyed = <Hmac<H> as KeyInit>::new_from_slice(password).expect("HMAC takes keys of every length");
    let length = <Hmac<H> as OutputSizeUser>::output_size();
    for (number, block) in (1_u32..).zip(key.chunks_mut(length)) {
        let mut last = keyed.clone();
        last.update(salt);
        last.update(&number.to_be_bytes());
        let mut last: Output<Hmac<H>> = last.finalize().into_bytes();
        let mut sum = last.clone();
        for done in 1..iterations {
            let mut mac = keyed.clone();
            mac.update(&last);
            last = mac.finalize().into_bytes();
            sum.iter_mut().zip(&last).for_each(|(sum, byte)| *sum ^= byte);
            if done.is_multiple_of(ITERATIONS_BETWEEN) {
                pace.turn().await?;
            }
        }
        block.copy_from_slice(&sum[..block.len()]);
        sum.as_mut_slice().zeroize();
        last.as_mut_slice().zeroize();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Segments;
    use crate::executor::Executor;
    use crate::node::NodeFuture;
    use std::cell::Cell;
    use std::future::ready;
    use std::rc::Rc;

    /// Counts how often the thread was given away.
    #[derive(Default)]
    struct Turns(Cell<u32>);

    impl Node for Turns {
        fn read(&self, _: u64, _: Segments) -> NodeFuture<'_> {
            self.0.set(self.0.get() + 1);
            Box::pin(ready(Ok(())))
        }

        fn write(&self, _: u64, _: Segments, _: bool) -> NodeFuture<'_> {
            Box::pin(ready(Err(Errno::EROFS)))
        }

        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> NodeFuture<'_> {
            Box::pin(ready(Err(Errno::EROFS)))
        }

        fn discard(&self, _: u64, _: u64) -> NodeFuture<'_> {
            Box::pin(ready(Err(Errno::EROFS)))
        }

        fn flush(&self) -> NodeFuture<'_> {
            Box::pin(ready(Ok(())))
        }

        fn bytes(&self) -> u64 {
            0
        }
    }

    use crate::node::Node;

    fn run(hash: Hash, password: &'static [u8], salt: &'static [u8], iterations: u32, bytes: usize) -> (Vec<u8>, u32) {
        let turns = Rc::new(Turns::default());
        let node = turns.clone();
        let mut executor = Executor::default();
        executor.spawn(async move {
            let mut key = vec![0; bytes];
            let pace = Pace::new(&*node, 512);
            hash.pbkdf2(password, salt, iterations, &mut key, &pace).await.unwrap();
            key
        });
        let mut finished = Vec::new();
        executor.run(&mut finished);
        (finished.pop().expect("a key"), turns.0.get())
    }

    #[test]
    fn pbkdf2_is_what_the_pbkdf2_crate_computes() {
        for (password, salt) in [(&b"password"[..], &b"salt"[..]), (b"", b""), (&[0xa5; 200], &[1; 32])] {
            for bytes in [1, 20, 32, 33, 64, 130] {
                for iterations in [1, 2, 777] {
                    let ours = |hash| run(hash, password, salt, iterations, bytes).0;
                    let mut theirs = vec![0; bytes];
                    pbkdf2::pbkdf2_hmac::<Sha1>(password, salt, iterations, &mut theirs);
                    assert_eq!(ours(Hash::Sha1), theirs);
                    pbkdf2::pbkdf2_hmac::<Sha256>(password, salt, iterations, &mut theirs);
                    assert_eq!(ours(Hash::Sha256), theirs);
                    pbkdf2::pbkdf2_hmac::<Sha512>(password, salt, iterations, &mut theirs);
                    assert_eq!(ours(Hash::Sha512), theirs);
                    pbkdf2::pbkdf2_hmac::<Ripemd160>(password, salt, iterations, &mut theirs);
                    assert_eq!(ours(Hash::Ripemd160), theirs);
                }
            }
        }
    }

    /// RFC 6070, the fourth of its vectors but for its length.
    #[test]
    fn pbkdf2_known_answer() {
        let (key, _) = run(Hash::Sha1, b"password", b"salt", 4096, 20);
        assert_eq!(key[..4], [0x4b, 0x00, 0x79, 0x01]);
        assert_eq!(key[16..], [0x65, 0xa4, 0x29, 0xc1]);
    }

    #[test]
    fn long_computations_give_the_thread_away() {
        let (_, turns) = run(Hash::Sha256, b"password", b"salt", 300_000, 32);
        assert!(turns >= 3, "{turns}");
    }

    #[test]
    fn names_and_sizes() {
        for hash in Hash::ALL {
            assert_eq!(Hash::of_name(hash.name()), Ok(hash));
            assert_eq!(hash.digest(&[b"a", b"bc"]).len(), hash.bytes());
            assert_eq!(hash.digest(&[b"a", b"bc"]), hash.digest(&[b"abc"]));
        }
        assert!(Hash::of_name("md5").is_err());
    }
}
