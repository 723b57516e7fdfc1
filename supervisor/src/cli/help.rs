//! What Bulkhead says about itself: `--help`, `-version` and the lists.

use super::options::{Group, OPTIONS, OptionSpec};
use super::{chardev, cpu, machine};
use crate::device_types::{DEVICE_TYPES, DeviceType, VMCOREINFO};
use crate::frontend::FRONTEND_TYPES;
use ipc::objects::types::OBJECT_TYPES;
use std::fmt::Write;

/// Widest line, columns.
const WIDTH: usize = 100;
/// Where an option's description begins.
const INDENT: usize = 26;

const INTRODUCTION: &str = "\
Bulkhead runs a Linux guest on KVM, cut into sandboxed processes. Options are QEMU's.

Usage: bulkhead -kernel FILE [OPTION]...
       bulkhead doctor            what this host has of what Bulkhead needs, and what each gap costs
       bulkhead audit --help      policies, programs and running machines held against each other
       bulkhead dump SOCKET FILE  a running machine's memory into a file, for crash, drgn or gdb

Examples:
  A guest on the terminal, with one disk:
    bulkhead -m 1G -smp 2 -nographic -kernel vmlinuz -initrd initrd.img \\
        -append \"console=ttyS0 root=/dev/vda1\" -drive file=disk.img,if=virtio,format=raw

  In the background, managed over QMP, the console in a file:
    bulkhead -name web -m 2G -kernel vmlinuz -append \"console=ttyS0 root=/dev/vda\" \\
        -drive file=/dev/vg/web,if=virtio,format=raw,cache=none,discard=unmap \\
        -serial file:web.log -qmp unix:web.qmp,server=on,wait=off -pidfile web.pid -daemonize

Options may have one dash or two. A value is the next argument: -m 1G.
";

/// `--help`.
pub(super) fn help() -> String {
    let mut text = INTRODUCTION.to_owned();
    for (group, heading) in Group::ALL {
        let _ = write!(text, "\n{heading}:\n");
        for option in OPTIONS.iter().filter(|option| option.group == group) {
            describe(&mut text, option);
        }
    }
    text
}

fn describe(text: &mut String, option: &OptionSpec) {
    let mut left = format!("  -{}", option.names[0]);
    if !option.value.is_empty() {
        left = format!("{left} {}", option.value);
    }
    let mut line = if option.help.is_empty() || left.chars().count() + 2 <= INDENT {
        left
    } else {
        text.push_str(&left);
        text.push('\n');
        String::new()
    };
    for word in option.help.split_whitespace() {
        let columns = line.chars().count();
        if columns > INDENT && columns + 1 + word.chars().count() > WIDTH {
            text.push_str(&line);
            text.push('\n');
            line = String::new();
        }
        if line.chars().count() < INDENT {
            line = format!("{line:INDENT$}");
        } else {
            line.push(' ');
        }
        line.push_str(word);
    }
    text.push_str(&line);
    text.push('\n');
}

/// `-version`.
pub(super) fn version() -> String {
    format!("Bulkhead {}\n", env!("CARGO_PKG_VERSION"))
}

/// `-machine help`: QEMU's form, which tools read for the default.
pub(super) fn machines() -> String {
    let mut text = "Supported machines are:\n".to_owned();
    for (place, (name, what)) in machine::MACHINES.iter().enumerate() {
        let default = if place == 0 { " (default)" } else { "" };
        let _ = writeln!(text, "{name:20} {what}{default}");
    }
    text
}

/// `-accel help`.
pub(super) fn accelerators() -> String {
    "Accelerators supported:\nkvm\nqtest\n".to_owned()
}

/// `-cpu help`.
pub(super) fn cpus() -> String {
    list("Available CPUs:", cpu::CPUS)
}

/// `-chardev help`.
pub(super) fn chardevs() -> String {
    list("Available character devices:", chardev::BACKENDS)
}

/// `-device help`.
pub(super) fn devices() -> String {
    let mut text = String::new();
    for ty in DEVICE_TYPES {
        let DeviceType {
            name,
            alias,
            description,
            category,
            ..
        } = ty;
        let gap = if text.is_empty() { "" } else { "\n" };
        let _ = writeln!(
            text,
            "{gap}{category} devices:\nname \"{name}\", bus PCI, alias \"{alias}\", desc \"{description}\""
        );
    }
    let _ = writeln!(
        text,
        "name \"{VMCOREINFO}\", desc \"tells dumps where a Linux guest has its VMCOREINFO note\""
    );
    text
}

/// `-device help` with `-accel qtest`.
pub(super) fn qtest_devices() -> String {
    let mut text = devices();
    text.push_str("\nDevices of -accel qtest, which use a drive and have no guest's side:\n");
    for ty in FRONTEND_TYPES {
        let alias = ty.alias.map(|alias| format!(", alias \"{alias}\"")).unwrap_or_default();
        let _ = writeln!(
            text,
            "name \"{}\", bus {}{alias}, desc \"{}\"",
            ty.name,
            ty.bus.name(),
            ty.description
        );
    }
    text
}

/// `-object help`.
pub(super) fn objects() -> String {
    let mut text = "List of user creatable objects:\n".to_owned();
    for ty in OBJECT_TYPES {
        let _ = writeln!(text, "  {}", ty.name);
    }
    text
}

/// `-drive format=help`: which can be written, then which can only be read.
pub(super) fn image_formats() -> String {
    let names = crate::graph::options::DRIVERS;
    format!(
        "Supported formats: {0}\nSupported formats (read-only): {0}\n",
        names.join(" ")
    )
}

fn list(heading: &str, entries: &[(&str, &str)]) -> String {
    let mut text = format!("{heading}\n");
    for (name, what) in entries {
        let _ = writeln!(text, "  {name:18} {what}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_names_every_option_and_fits_the_terminal() {
        let text = help();
        for option in OPTIONS {
            assert!(
                text.contains(&format!("\n  -{}", option.names[0])),
                "{}",
                option.names[0]
            );
            assert_eq!(option.takes_value(), !option.value.is_empty(), "{}", option.names[0]);
        }
        for line in text.lines() {
            assert!(line.chars().count() <= WIDTH, "{line}");
            assert_eq!(line.trim_end(), line);
        }
    }

    #[test]
    fn one_machine_is_the_default() {
        assert_eq!(machines().lines().filter(|line| line.contains("(default)")).count(), 1);
    }
}
