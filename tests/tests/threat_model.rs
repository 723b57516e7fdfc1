//! The tests that docs/THREAT-MODEL.md names exist.

#[test]
fn every_test_that_the_threat_model_names_exists() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let page = std::fs::read_to_string(format!("{root}/docs/THREAT-MODEL.md")).unwrap();
    let section = page
        .split("## What is tried")
        .nth(1)
        .unwrap()
        .split("\n## ")
        .next()
        .unwrap();
    let mut found = 0;
    for name in section.split('`').skip(1).step_by(2) {
        let (file, test) = match name.split_once("::") {
            Some((file, test)) => (format!("{file}.rs"), Some(test)),
            None if name.ends_with(".rs") && !name.contains('/') => (name.to_owned(), None),
            None => continue,
        };
        let source = std::fs::read_to_string(format!("{root}/tests/tests/{file}"));
        let source = source.unwrap_or_else(|error| panic!("{file}: {error}"));
        // Those of ipc_fuzz.rs are made by a macro.
        let named = |test: &str| source.contains(&format!("fn {test}(")) || source.contains(&format!(" {test} "));
        assert!(test.is_none_or(named), "{file} has no {test:?}");
        found += 1;
    }
    assert!(found > 15, "{found}");
}
