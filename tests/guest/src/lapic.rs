//! The local interrupt controller, by its memory window, and the I/O interrupt controller.

use crate::cpu::{self, out8};
use crate::region::Region;
use crate::{clock, tables};

/// The spurious interrupt: the one vector whose stub acknowledges nothing.
const SPURIOUS_VECTOR: u32 = 0xff;
/// The timer's, only to end a wait.
const TIMER_VECTOR: u32 = 0x40;
/// Ends the wait of an idle processor.
pub const WAKE_VECTOR: u8 = 0x41;

const ID: u64 = 0x20;
const SPURIOUS: u64 = 0xf0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const TIMER: u64 = 0x320;
const TIMER_INITIAL: u64 = 0x380;
const TIMER_COUNT: u64 = 0x390;
const TIMER_DIVIDE: u64 = 0x3e0;
const TIMER_PERIODIC: u32 = 1 << 17;
const MASKED: u32 = 1 << 16;
/// Command register: delivery pending.
const PENDING: u32 = 1 << 12;
/// Command register: level asserted.
const ASSERT: u32 = 1 << 14;

fn window() -> Region {
    Region::new(0xfee0_0000, 4096)
}

/// Switches this processor's controller on and the old PICs off.
pub fn init() {
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
    window().write::<u32>(SPURIOUS, 0x100 | SPURIOUS_VECTOR);
}

/// This processor's number.
pub fn id() -> u32 {
    window().read::<u32>(ID) >> 24
}

fn command(destination: u32, low: u32) {
    window().write::<u32>(COMMAND_HIGH, destination << 24);
    window().write::<u32>(COMMAND_LOW, low);
    while window().read::<u32>(COMMAND_LOW) & PENDING != 0 {
        core::hint::spin_loop();
    }
}

/// Sends an interrupt to another processor.
pub fn interrupt(destination: u32, vector: u8) {
    command(destination, ASSERT | u32::from(vector));
}

/// Starts another processor at the page, which lies below 1 MiB.
pub fn start(destination: u32, page: u32) {
    command(destination, 0x500 | ASSERT);
    clock::pause_us(200);
    command(destination, 0x600 | ASSERT | page >> 12);
}

/// Lets the timer interrupt this processor every 50 ms, or stops it.
pub fn tick(on: bool) {
    window().write::<u32>(TIMER_DIVIDE, 0xb);
    window().write::<u32>(TIMER, TIMER_VECTOR | if on { TIMER_PERIODIC } else { MASKED });
    window().write::<u32>(TIMER_INITIAL, if on { 50_000_000 } else { 0 });
}

/// Lets the timer count down from the top, without an interrupt.
pub fn count_down() {
    window().write::<u32>(TIMER_DIVIDE, 0xb);
    window().write::<u32>(TIMER, TIMER_VECTOR | MASKED);
    window().write::<u32>(TIMER_INITIAL, u32::MAX);
}

/// What the timer has come to.
pub fn count() -> u64 {
    window().read::<u32>(TIMER_COUNT).into()
}

/// Sleeps until the count of a vector differs from `seen`. `false`: not within the time.
pub fn wait(vector: u8, seen: u64, timeout_ms: u64) -> bool {
    if tables::interrupts(vector) != seen {
        return true;
    }
    let deadline = clock::Deadline::after_ms(timeout_ms);
    tick(true);
    let arrived = loop {
        if tables::interrupts(vector) != seen {
            break true;
        }
        if deadline.passed() {
            break false;
        }
        cpu::wait_for_interrupt();
    };
    tick(false);
    arrived
}

/// Routes a line of the I/O interrupt controller to this processor: edge-triggered, active high.
pub fn route_line(controller: u64, line: u32, vector: u8) {
    let window = Region::new(controller, 0x20);
    let put = |register: u32, value: u32| {
        window.write::<u32>(0, register);
        window.write::<u32>(0x10, value);
    };
    put(0x11 + 2 * line, id() << 24);
    put(0x10 + 2 * line, u32::from(vector));
}
