//! The lab by hand.
//!
//! - `lab where`: where tests with a real guest run, or why they cannot.
//! - `lab run 'uname -a; ls -l /dev/kvm'`: boots the lab, runs a shell script as root in it, and switches it off.
//!   `bulkhead` and its helpers are in /opt/bulkhead, a guest's kernel and initramfs in /opt/guest, room for files in
//!   /scratch.
//! - `lab initramfs FILE`: writes the guest's initramfs, to boot it with anything.

use bulkhead_tests::lab::pieces::Kernel;
use bulkhead_tests::lab::{Lab, Site, guest, machine};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        ["where"] => {
            match Site::available() {
                Ok(()) => println!("real guests: {}", Site::describe()),
                Err(reason) => println!("real guests: tests with one are skipped: {reason}"),
            }
            Ok(0)
        }
        ["run", script] => run(script),
        ["initramfs", file] => Kernel::find()
            .and_then(|kernel| guest::initramfs(&kernel))
            .and_then(|archive| std::fs::write(file, archive).map_err(|error| format!("{file}: {error}")))
            .map(|()| 0),
        _ => Err("usage: lab where | lab run SCRIPT | lab initramfs FILE".into()),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(script: &str) -> Result<u8, String> {
    Lab::available()?;
    let lab = machine::hypervisor(Lab::builder()).start()?;
    eprintln!("lab: up after {:.1} s", lab.boot_time.as_secs_f64());
    let output = lab.run(script);
    print!("{}", output.stdout);
    eprint!("{}", output.stderr);
    Ok(u8::try_from(output.status).unwrap_or(1))
}
