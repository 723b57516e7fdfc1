//! A test program's `main` for tests that may be impossible where they run.
//!
//! The standard harness knows at compile time only which tests to ignore. With this one (`harness = false` in
//! Cargo.toml) tests that cannot run are listed as ignored, so that both `cargo test` and `cargo nextest` count them as
//! skipped, never as passed, and the reason is printed.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

/// A test: its name and what it does; it fails by panicking.
pub type Test = (&'static str, fn());

/// Runs what the command line asks for. `possible` says of a test by its name why it cannot run, if it cannot.
pub fn main(possible: impl Fn(&str) -> Result<(), String>, tests: &[Test]) -> ExitCode {
    let request = Request::parse(std::env::args().skip(1));
    let chosen: Vec<&Test> = tests.iter().filter(|(name, _)| request.wants(name)).collect();
    if request.list {
        // nextest asks twice: for all tests, and for the ignored ones.
        for (name, _) in &chosen {
            if !request.ignored_only || possible(name).is_err() {
                println!("{name}: test");
            }
        }
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", chosen.len());
    let begun = Instant::now();
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    for (name, body) in chosen {
        print!("test {name} ... ");
        let _ = std::io::stdout().flush();
        if let Err(reason) = possible(name) {
            println!("ignored, skipped here: {reason}");
            ignored += 1;
        } else if catch_unwind(AssertUnwindSafe(body)).is_ok() {
            println!("ok");
            passed += 1;
        } else {
            println!("FAILED");
            failed += 1;
        }
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; {ignored} ignored; 0 measured; {} filtered out; \
         finished in {:.2}s\n",
        tests.len() - passed - failed - ignored,
        begun.elapsed().as_secs_f64()
    );
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(101)
    }
}

#[derive(Default, Debug)]
struct Request {
    list: bool,
    ignored_only: bool,
    exact: bool,
    filters: Vec<String>,
    skip: Vec<String>,
}

impl Request {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Self {
        let mut request = Self::default();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--list" => request.list = true,
                "--ignored" => request.ignored_only = true,
                "--exact" => request.exact = true,
                "--skip" => request.skip.extend(arguments.next()),
                // Options with a value that mean nothing here.
                "--format" | "--test-threads" | "--color" | "--logfile" | "-Z" => {
                    arguments.next();
                }
                option if option.starts_with('-') => {}
                filter => request.filters.push(filter.to_owned()),
            }
        }
        request
    }

    fn wants(&self, name: &str) -> bool {
        let matches = |filter: &String| {
            if self.exact {
                name == filter
            } else {
                name.contains(filter.as_str())
            }
        };
        (self.filters.is_empty() || self.filters.iter().any(matches)) && !self.skip.iter().any(matches)
    }
}

#[cfg(test)]
mod tests {
    use super::Request;

    fn parse(line: &str) -> Request {
        Request::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn the_options_of_nextest_are_understood() {
        let list = parse("--list --format terse --ignored");
        assert!(list.list && list.ignored_only && list.filters.is_empty());

        let run = parse("boots --exact --nocapture");
        assert!(!run.list && run.wants("boots") && !run.wants("boots_twice"));
    }

    #[test]
    fn filters_match_parts_of_names() {
        let run = parse("boot --skip twice --test-threads 1");
        assert!(run.wants("boots") && !run.wants("boots_twice") && !run.wants("stops"));
    }
}
