//! The tests, by name.
//!
//! | `test=` | keys | what it does |
//! |---|---|---|
//! | `hello` | | prints RAM and the number of processors |
//! | `acpi` | | checks all tables, prints their signatures |
//! | `rtc`, `clock` | | reads the time; measures the time stamp counter |
//! | `rtc-set` | `year` `times` | sets the clock to years that count down to the given one |
//! | `echo` | | prints `echo ready`, then serial in to serial out until a line `quit` |
//! | `spin` | `ms` `count` | prints an increasing counter |
//! | `panic` | `event` | reports through pvpanic and goes on |
//! | `reset` | `how=i8042\|acpi\|triple` | resets the machine |
//! | `poweroff`, `hang` | | ACPI S5; stops with interrupts off |
//! | `powerbutton` | `ms` | waits for the button, reads its status |
//! | `smp` | `cpus` `rounds` | starts all processors, lets them work and interrupts each |
//! | `pci`, `pci-move` | | both ways to configuration space; moves a device's registers and uses it there |
//! | `blk` | below | every request, in 8 combinations of interrupts or polling and ring features |
//! | `blk-verify` | `mib` `seed` `write=0` and below | pattern through all queues, flush, read back, checksum |
//! | `blk-log` | `batch` `start` `sectors` `count` and below | numbered records; prints how many are durable |
//! | `blk-evil` | `case` | a driver that breaks the rules, then a reset and good requests |
//! | `blk-resize` | `ms` | waits for the configuration interrupt, prints the new size |
//! | `msix` | below | masks, pending interrupts, another vector |
//! | `rng` | | two answers of virtio-rng |
//! | `rng-fill` | `bytes` `buffer` | so many bytes of virtio-rng; prints the first 64 and how long it took |
//! | `rng-evil` | | buffers that no driver may offer, then good ones |
//! | `fwcfg` | `at` `tell=0` | a VMCOREINFO note, announced through fw_cfg by ports and descriptors |
//! | `step` | `mib` `ms` `disk=0` and below | keeps far pages in step, with the processor and with a disk |
//! | `bench` | see [`bench`] | requests a second and a histogram of latency |
//!
//! Disk keys: `dev=N` `queues=N` `size=N` (descriptors) `mode=irq\|poll` `indirect=0` `event=0` `access=ecam`.

mod bench;
mod blk;
mod blk_data;
mod blk_evil;
mod fw_cfg;
mod interrupts;
mod machine;
mod pci;
mod rng;
mod smp;
mod step;

use crate::failure::{Outcome, failure};
use crate::script::Arguments;

/// Runs the test of this name.
pub fn run(name: &str, arguments: Arguments<'_>) -> Outcome {
    match name {
        "hello" => machine::hello(),
        "acpi" => machine::acpi(),
        "rtc" => machine::rtc(),
        "rtc-set" => machine::set_rtc(arguments),
        "clock" => machine::clock(),
        "echo" => machine::echo(),
        "spin" => machine::spin(arguments),
        "panic" => machine::panic(arguments),
        "reset" => machine::reset(arguments),
        "poweroff" => crate::power::off(),
        "hang" => machine::hang(),
        "powerbutton" => machine::power_button(arguments),
        "smp" => smp::run(arguments),
        "pci" => pci::discover(),
        "pci-move" => pci::relocate(),
        "blk" => blk::run(arguments),
        "blk-verify" => blk_data::verify(arguments),
        "blk-evil" => blk_evil::run(arguments),
        "rng" => rng::run(),
        "rng-fill" => rng::fill(arguments),
        "rng-evil" => rng::evil(),
        "msix" => interrupts::msix(arguments),
        "blk-resize" => interrupts::resize(arguments),
        "step" => step::run(arguments),
        "fwcfg" => fw_cfg::run(arguments),
        "bench" => bench::run(arguments),
        "blk-log" => blk_data::log(arguments),
        _ => Err(failure("no such test")),
    }
}
