//! Random bytes from a seed.

use chacha20::ChaCha20Rng;
use chacha20::rand_core::{Rng as _, SeedableRng as _};
use ipc::secret::Seed;

/// A generator that nobody can guess who does not have its seed.
pub struct Random(ChaCha20Rng);

impl Random {
    /// Uses a seed up.
    pub fn from_seed(seed: &Seed) -> Self {
        Self(ChaCha20Rng::from_seed(*seed.bytes()))
    }

    /// Fills with random bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        self.0.fill_bytes(bytes);
    }

    /// So many random bytes.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.fill(&mut bytes);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_all_that_decides() {
        let seed = |byte| Seed::new([byte; 32]);
        let (mut one, mut same) = (Random::from_seed(&seed(1)), Random::from_seed(&seed(1)));
        let mut other = Random::from_seed(&seed(2));
        let first: [u8; 40] = one.array();
        assert_eq!(first, same.array());
        assert_ne!(first, other.array());
        assert_ne!(first, one.array());
    }
}
