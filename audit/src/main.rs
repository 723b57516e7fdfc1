//! `bulkhead-audit`, which `bulkhead audit` executes. The crate's page is in `lib.rs`.

use audit::command;
use std::process::ExitCode;

fn main() -> ExitCode {
    match command::run(std::env::args_os().skip(1), &mut std::io::stdout().lock()) {
        Ok(clean) if clean => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bulkhead audit: {error}");
            ExitCode::from(2)
        }
    }
}
