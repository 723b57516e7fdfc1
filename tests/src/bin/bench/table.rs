//! A row of the printed table: what one value was in every run of both programs.

use std::collections::BTreeMap;

/// Measured values by row, in the rows' order.
pub type Values = BTreeMap<(usize, String), Vec<f64>>;

/// Adds those of one run.
pub fn add(all: &mut Values, run: Values) {
    for (row, mut values) in run {
        all.entry(row).or_default().append(&mut values);
    }
}

/// Prints rows.
pub fn rows(ours: &Values, theirs: &Values) {
    for (name, values) in ours {
        row(&name.1, values, theirs.get(name).map_or(&[], Vec::as_slice));
    }
}

/// The smallest, the middle and the largest of some values.
fn summary(values: &[f64]) -> Option<(f64, f64, f64)> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    Some((*values.first()?, *values.get(values.len() / 2)?, *values.last()?))
}

/// Prints the head.
pub fn head() {
    println!("| row | Bulkhead min / median / max | QEMU min / median / max | ratio of medians (pair by pair) |");
    println!("|---|---|---|---|");
}

/// Prints a row.
pub fn row(name: &str, ours: &[f64], theirs: &[f64]) {
    let (our, their) = (summary(ours), summary(theirs));
    let text = |summary: Option<(f64, f64, f64)>| match summary {
        // Whole numbers for what is large.
        Some((min, median, max)) if median >= 1000.0 => format!("{min:.0} / {median:.0} / {max:.0}"),
        Some((min, median, max)) => format!("{min:.1} / {median:.1} / {max:.1}"),
        None => "–".into(),
    };
    let ratio = our.zip(their).map_or_else(String::new, |(our, their)| {
        let pairs: Vec<f64> = ours.iter().zip(theirs).map(|(our, their)| our / their).collect();
        let (least, _, most) = summary(&pairs).unwrap_or_default();
        format!("{} ({}–{})", short(our.1 / their.1), short(least), short(most))
    });
    println!("| {name} | {} | {} | {ratio} |", text(our), text(their));
}

/// A ratio with two digits that say something.
fn short(ratio: f64) -> String {
    match ratio {
        ratio if ratio < 0.095 => format!("{ratio:.3}"),
        ratio => format!("{ratio:.2}"),
    }
}
