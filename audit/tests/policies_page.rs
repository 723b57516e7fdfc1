//! docs/POLICIES.md and the README's numbers are written from the data. `BULKHEAD_UPDATE=1 cargo test -p audit --test
//! policies_page` writes them anew; without that the test compares.

use audit::policy::page::{numbers, page};
use audit::policy::{Process, Source};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/POLICIES.md");
const README: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");

/// Compares a file with what it must be, or writes it.
fn keep(path: &str, wanted: &str) {
    if std::env::var_os("BULKHEAD_UPDATE").is_some() {
        std::fs::write(path, wanted).unwrap();
    }
    let written = std::fs::read_to_string(path).unwrap_or_default();
    let differs = wanted.lines().zip(written.lines()).find(|(new, old)| new != old);
    assert!(
        wanted == written,
        "{path} is out of date (first difference: {differs:?}): BULKHEAD_UPDATE=1 cargo test -p audit --test policies_page"
    );
}

#[test]
fn the_page_of_policies_is_that_of_the_data() {
    keep(PAGE, &page(&Source::Embedded).unwrap());
}

#[test]
fn the_readme_has_the_number_of_calls_of_every_sealed_process() {
    let text = std::fs::read_to_string(README).unwrap();
    let (before, rest) = text
        .split_once("| system calls allowed once sealed")
        .expect("the table");
    let (_, after) = rest.split_once("\n\n").expect("a paragraph after the table");
    let table = numbers(&Source::Embedded).unwrap();
    keep(README, &format!("{before}{table}\n{after}"));
}

#[test]
fn what_is_embedded_is_what_the_directory_has() {
    let directory = Source::Directory(concat!(env!("CARGO_MANIFEST_DIR"), "/../policies").into());
    for process in Process::ALL {
        let (embedded, file) = (
            Source::Embedded.read(process).unwrap(),
            directory.read(process).unwrap(),
        );
        assert_eq!(embedded.filters, file.filters, "{}", process.name());
        for filter in file.filters.values() {
            for rule in &filter.rules {
                assert!(rule.reason.trim().len() > 3, "{}: {rule:?}", process.name());
            }
        }
    }
}
