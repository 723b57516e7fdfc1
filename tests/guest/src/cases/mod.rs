//! The tests, by name.

mod bench;
mod blk;
mod blk_data;
mod blk_evil;
mod interrupts;
mod machine;
mod pci;
mod rng;
mod smp;

use crate::failure::{Outcome, failure};
use crate::script::Arguments;

/// Runs the test of this name.
pub fn run(name: &str, arguments: Arguments<'_>) -> Outcome {
    match name {
        "hello" => machine::hello(),
        "acpi" => machine::acpi(),
        "rtc" => machine::rtc(),
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
        "msix" => interrupts::msix(arguments),
        "blk-resize" => interrupts::resize(arguments),
        "bench" => bench::run(arguments),
        "blk-log" => blk_data::log(arguments),
        _ => Err(failure("no such test")),
    }
}
