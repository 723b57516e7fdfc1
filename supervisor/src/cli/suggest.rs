//! "Did you mean": the known word nearest to an unknown one.

/// Longer words are not typing errors of ours, and comparing them costs time.
const LONGEST: usize = 40;

/// The candidate that is a typing error or two away from `word`, if there is one.
pub(super) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let length = word.chars().count();
    let limit = match length {
        0 | 1 => return None,
        2..=4 => 1,
        5..=LONGEST => 2,
        _ => return None,
    };
    candidates
        .into_iter()
        .filter(|candidate| candidate.len() > 1 && candidate.len().abs_diff(length) <= limit)
        .map(|candidate| (distance(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// `; did you mean X?`, or `otherwise` when nothing is near.
pub(super) fn hint<'a>(
    word: &str,
    prefix: &str,
    candidates: impl IntoIterator<Item = &'a str>,
    otherwise: impl FnOnce() -> String,
) -> String {
    nearest(word, candidates).map_or_else(otherwise, |found| format!("; did you mean {prefix}{found}?"))
}

/// Edits (insert, delete, replace, swap of neighbours) from one word to the other.
fn distance(from: &str, to: &str) -> usize {
    let from: Vec<char> = from.chars().collect();
    let to: Vec<char> = to.chars().collect();
    let mut before = vec![0; to.len() + 1];
    let mut above: Vec<usize> = (0..=to.len()).collect();
    for row in 1..=from.len() {
        let mut current = vec![row; to.len() + 1];
        for column in 1..=to.len() {
            let replace = above[column - 1] + usize::from(from[row - 1] != to[column - 1]);
            let mut best = replace.min(above[column] + 1).min(current[column - 1] + 1);
            let swapped = row > 1 && column > 1 && from[row - 1] == to[column - 2] && from[row - 2] == to[column - 1];
            if swapped {
                best = best.min(before[column - 2] + 1);
            }
            current[column] = best;
        }
        before = std::mem::replace(&mut above, current);
    }
    above[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_misses_are_found_and_far_ones_are_not() {
        let words = ["kernel", "append", "smp", "serial", "initrd", "S"];
        for (word, expected) in [
            ("kernle", Some("kernel")),
            ("apend", Some("append")),
            ("sm", Some("smp")),
            ("spm", Some("smp")),
            ("seriel", Some("serial")),
            ("network", None),
            ("s", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, words), expected, "{word}");
        }
        assert_eq!(nearest(&"k".repeat(10_000), words), None);
    }
}
