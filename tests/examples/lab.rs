//! Boots a site and runs a shell script there: `cargo run -p bulkhead-tests --example lab -- 'uname -a; ls /dev/kvm'`.

use bulkhead_tests::lab::{Site, machine};
use std::process::ExitCode;

fn main() -> ExitCode {
    let script = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
    let site = match Site::start_with(machine::hypervisor) {
        Ok(site) => site,
        Err(error) => {
            eprintln!("lab: {error}");
            return ExitCode::FAILURE;
        }
    };
    if let Site::Lab(lab) = &site {
        eprintln!("lab: up after {:.1} s", lab.boot_time.as_secs_f64());
    }
    let output = site.run(&script);
    print!("{}", output.stdout);
    eprint!("{}", output.stderr);
    ExitCode::from(output.status as u8)
}
