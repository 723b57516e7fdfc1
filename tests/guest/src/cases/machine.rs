//! Tests of the board: serial port, clock, tables, power.

use crate::acpi;
use crate::cpu::{self, in8, in16, out8, out16};
use crate::failure::{Outcome, ensure, equal, failure};
use crate::script::Arguments;
use crate::{clock, lapic, power, println, serial, start_info, tables};

/// The machine is there.
pub fn hello() -> Outcome {
    let ram: u64 = start_info::ram().map(|(_, bytes)| bytes).sum();
    println!("hello ram_bytes={ram} processors={}", crate::smp::listed().unwrap_or(0));
    for (start, bytes) in start_info::ram() {
        println!("ram {start:#x}+{bytes:#x}");
    }
    Ok(())
}

/// All tables have good checksums, and those that a guest needs are there.
pub fn acpi() -> Outcome {
    let root = acpi::root()?;
    let mut needed = [(*b"FACP", false), (*b"APIC", false), (*b"MCFG", false)];
    for table in root.tables() {
        let table = table?;
        let signature = table.signature();
        println!(
            "acpi table={} bytes={}",
            core::str::from_utf8(&signature).unwrap_or("?"),
            table.body.bytes()
        );
        for (name, found) in &mut needed {
            *found |= *name == signature;
        }
    }
    ensure(needed.iter().all(|(_, found)| *found), "FADT, MADT or MCFG is missing")?;
    let fadt = root.fadt()?;
    let mut processors = 0;
    root.processors(|_| processors += 1)?;
    println!(
        "acpi reduced={} s5={:?} dsdt_bytes={} processors={processors} ioapic={:#x} ecam={:#x}",
        fadt.hardware_reduced(),
        fadt.soft_off_type(),
        fadt.dsdt.body.bytes(),
        root.io_controller()?,
        root.ecam()?.map_or(0, |(base, _)| base),
    );
    ensure(fadt.soft_off_type().is_some(), "no \\_S5 in the DSDT")
}

fn clock_register(register: u8) -> u8 {
    out8(0x70, register);
    in8(0x71)
}

/// The real-time clock shows a time and runs.
pub fn rtc() -> Outcome {
    let binary = clock_register(0x0b) & 4 != 0;
    let read = |register: u8| {
        let value = clock_register(register);
        if binary {
            value
        } else {
            (value >> 4) * 10 + (value & 15)
        }
    };
    let deadline = clock::Deadline::after_ms(5_000);
    let first = read(0);
    while read(0) == first {
        ensure(!deadline.passed(), "the clock stands still")?;
    }
    let [second, minute, hour, day, month, year] = [0, 2, 4, 7, 8, 9].map(read);
    println!("rtc 20{year:02}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}");
    ensure(
        second < 60 && minute < 60 && hour < 24 && (1..=31).contains(&day) && (1..=12).contains(&month),
        "not a time",
    )
}

/// Sets the clock's year again and again; the last one stays.
pub fn set_rtc(arguments: Arguments<'_>) -> Outcome {
    let (year, times) = (arguments.number("year", 30)?, arguments.number("times", 1)?);
    ensure(year < 100, "a year has two digits")?;
    for turn in (0..times).rev() {
        let year = (year + turn) % 100;
        out8(0x70, 0x09);
        out8(0x71, (year / 10 * 16 + year % 10) as u8);
    }
    println!("rtc-set done");
    Ok(())
}

/// How fast the time stamp counter runs.
pub fn clock() -> Outcome {
    clock::calibrate();
    println!("clock tsc_hertz={}", clock::hertz());
    Ok(())
}

/// Sends back what comes in, until a line `quit`.
pub fn echo() -> Outcome {
    println!("echo ready");
    let mut line = [0; 256];
    let mut length = 0;
    loop {
        let Some(byte) = serial::receive() else {
            core::hint::spin_loop();
            continue;
        };
        serial::send(&[byte]);
        if byte == b'\n' || byte == b'\r' {
            if &line[..length] == b"quit" {
                return Ok(());
            }
            length = 0;
        } else if length < line.len() {
            line[length] = byte;
            length += 1;
        }
    }
}

/// Prints a counter until the end of time, or `count` times, every `ms` milliseconds.
pub fn spin(arguments: Arguments<'_>) -> Outcome {
    let (count, ms) = (arguments.number("count", u64::MAX)?, arguments.number("ms", 100)?);
    for number in 0..count {
        println!("spin {number}");
        clock::pause_us(ms * 1000);
    }
    Ok(())
}

/// Reports a panic (or `event=2`: a crash kernel takes over) through pvpanic, and goes on.
pub fn panic(arguments: Arguments<'_>) -> Outcome {
    let events = power::pvpanic_events();
    println!("panic events={events:#x}");
    let event = arguments.number("event", 1)? as u8;
    ensure(
        events != 0xff && events & event == event,
        "pvpanic does not know the event",
    )?;
    power::pvpanic(event);
    Ok(())
}

/// Resets the machine: `how=i8042`, `acpi` or `triple`.
pub fn reset(arguments: Arguments<'_>) -> Outcome {
    let how = arguments.text("how").unwrap_or("i8042");
    println!("reset how={how}");
    match how {
        "i8042" => power::reset_by_keyboard_controller(),
        "acpi" => power::reset_by_acpi(),
        "triple" => power::reset_by_triple_fault(),
        _ => Err(failure("no such way to reset")),
    }
}

/// Prints a line and stops for good with interrupts off.
pub fn hang() -> Outcome {
    println!("hang");
    loop {
        cpu::wait_for_interrupt();
    }
}

/// Waits for the power button, `ms` milliseconds at most, and reads what was pressed.
pub fn power_button(arguments: Arguments<'_>) -> Outcome {
    const VECTOR: u8 = 0x48;
    /// Bulkhead's event device: its line, and the port whose bit 0 is the button; reading clears it.
    const EVENT_LINE: u32 = 9;
    const EVENT_STATUS: u16 = 0x604;
    const PM1_BUTTON: u16 = 1 << 8;
    let timeout_ms = arguments.number("ms", 60_000)?;
    let root = acpi::root()?;
    let fadt = root.fadt()?;
    let controller = root.io_controller()?;
    let reduced = fadt.hardware_reduced();
    let line = if reduced {
        EVENT_LINE
    } else {
        let (port, value) = fadt.enable_command();
        let event = fadt.pm1_event();
        if port != 0 && in16(fadt.pm1_control()) & 1 == 0 {
            out8(port, value);
            while in16(fadt.pm1_control()) & 1 == 0 {
                core::hint::spin_loop();
            }
        }
        out16(event, 0xffff);
        out16(event + fadt.pm1_enable_offset(), PM1_BUTTON);
        u32::from(fadt.control_interrupt())
    };
    let seen = tables::interrupts(VECTOR);
    // Edge-triggered for either: a level would interrupt again until the status is read.
    lapic::route_line(controller, line, VECTOR);
    println!("powerbutton waiting line={line}");
    ensure(lapic::wait(VECTOR, seen, timeout_ms), "nobody pressed the button")?;
    let status = if reduced {
        u16::from(in8(EVENT_STATUS))
    } else {
        let status = in16(fadt.pm1_event());
        out16(fadt.pm1_event(), PM1_BUTTON);
        out16(fadt.pm1_event() + fadt.pm1_enable_offset(), 0);
        status >> 8
    };
    println!(
        "powerbutton status={status:#x} interrupts={}",
        tables::interrupts(VECTOR) - seen
    );
    equal("power button status bit", status & 1, 1_u16)?;
    if reduced {
        equal("power button status after reading", in8(EVENT_STATUS), 0_u8)?;
    }
    Ok(())
}
