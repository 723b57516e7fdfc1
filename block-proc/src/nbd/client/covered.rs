//! Which parts of a read have arrived: a server may send them in any order, but each once, and all.

use std::collections::BTreeMap;

/// Most parts that may stand apart at a time. A server that sends more is hung up on.
const MAX_PARTS: usize = 1024;

/// See the module.
#[derive(Debug, Default)]
pub struct Covered(BTreeMap<u64, u64>);

impl Covered {
    /// Adds a part that is not empty. `false` when it has arrived before, or when there are too many.
    #[must_use]
    pub fn add(&mut self, start: u64, end: u64) -> bool {
        let before = self.0.range(..=start).next_back().map(|(s, e)| (*s, *e));
        let after = self.0.range(start..).next().map(|(s, e)| (*s, *e));
        if before.is_some_and(|(_, e)| e > start) || after.is_some_and(|(s, _)| s < end) {
            return false;
        }
        let (mut from, mut to) = (start, end);
        if let Some((s, e)) = before
            && e == start
        {
            self.0.remove(&s);
            from = s;
        }
        if let Some((s, e)) = after
            && s == end
        {
            self.0.remove(&s);
            to = e;
        }
        self.0.insert(from, to);
        self.0.len() <= MAX_PARTS
    }

    /// Whether everything up to here has arrived.
    pub fn is_whole(&self, bytes: u64) -> bool {
        bytes == 0 || self.0.get(&0) == Some(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_count_once_and_the_whole_is_seen(parts in prop::collection::vec((0u64..64, 1u64..16), 0..40)) {
            let mut covered = Covered::default();
            let mut model = [false; 80];
            for (start, length) in parts {
                let range = start as usize..(start + length) as usize;
                let is_new = model[range.clone()].iter().all(|seen| !seen);
                prop_assert_eq!(covered.add(start, start + length), is_new);
                if is_new {
                    model[range].fill(true);
                }
                let whole = model.iter().take_while(|seen| **seen).count();
                prop_assert_eq!(covered.is_whole(80), whole == 80);
                if whole > 0 && model[whole..].iter().all(|seen| !seen) {
                    prop_assert!(covered.is_whole(whole as u64));
                }
            }
        }
    }

    #[test]
    fn a_server_cannot_make_the_list_long() {
        let mut covered = Covered::default();
        let accepted = (0..1 << 20).take_while(|i| covered.add(i * 2, i * 2 + 1)).count();
        assert_eq!(accepted, MAX_PARTS);
    }
}
