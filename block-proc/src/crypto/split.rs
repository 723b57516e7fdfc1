//! The anti-forensic splitter of LUKS: a key becomes many stripes of the same size, of which all are needed to have it
//! back. Wiping any one of them is enough to lose it.

use super::hash::Hash;
use super::random::Random;
use zeroize::Zeroizing;

/// The key that stripes were made from. Their bytes in a row are a multiple of the key's size.
pub fn merge(hash: Hash, stripes: &[u8], key_bytes: usize) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; key_bytes]);
    let mut stripes = stripes.chunks_exact(key_bytes).peekable();
    while let Some(stripe) = stripes.next() {
        xor(&mut key, stripe);
        if stripes.peek().is_some() {
            diffuse(hash, &mut key);
        }
    }
    key
}

/// Makes stripes from a key.
pub fn split(hash: Hash, key: &[u8], count: usize, random: &mut Random) -> Zeroizing<Vec<u8>> {
    let mut stripes = Zeroizing::new(vec![0; key.len() * count]);
    let last = key.len() * count.saturating_sub(1);
    random.fill(&mut stripes[..last]);
    let mut state = Zeroizing::new(vec![0; key.len()]);
    for stripe in stripes[..last].chunks_exact(key.len()) {
        xor(&mut state, stripe);
        diffuse(hash, &mut state);
    }
    xor(&mut state, key);
    stripes[last..].copy_from_slice(&state);
    stripes
}

/// Replaces each piece as long as a hash by the hash of its number and itself; the last may be cut short.
fn diffuse(hash: Hash, state: &mut [u8]) {
    for (number, piece) in (0_u32..).zip(state.chunks_mut(hash.bytes())) {
        let digest = hash.digest(&[&number.to_be_bytes(), piece]);
        piece.copy_from_slice(&digest[..piece.len()]);
    }
}

fn xor(to: &mut [u8], from: &[u8]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to ^= from);
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::secret::Seed;

    #[test]
    fn all_stripes_are_needed_to_have_the_key_back() {
        let mut random = Random::from_seed(&Seed::new([3; 32]));
        for (hash, bytes) in [
            (Hash::Sha1, 16),
            (Hash::Sha256, 64),
            (Hash::Sha512, 64),
            (Hash::Ripemd160, 48),
        ] {
            let key: Vec<u8> = (0..bytes as u8).collect();
            let mut stripes = split(hash, &key, 100, &mut random);
            assert_eq!(*merge(hash, &stripes, bytes), key);
            stripes[5] ^= 1;
            assert_ne!(*merge(hash, &stripes, bytes), key);
        }
    }
}
