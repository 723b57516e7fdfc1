//! Single instructions.

use core::arch::asm;

/// Reads a byte from an I/O port.
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: no port of a PC reaches memory by itself. The same holds for all port functions here.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) };
    value
}

/// Reads two bytes from an I/O port.
pub fn in16(port: u16) -> u16 {
    let value;
    // SAFETY: as in8.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nostack, preserves_flags)) };
    value
}

/// Reads four bytes from an I/O port.
pub fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as in8.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags)) };
    value
}

/// Writes a byte to an I/O port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: as in8.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

/// Writes two bytes to an I/O port.
pub fn out16(port: u16, value: u16) {
    // SAFETY: as in8.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags)) };
}

/// Writes four bytes to an I/O port.
pub fn out32(port: u16, value: u32) {
    // SAFETY: as in8.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Waits for the next interrupt. Ring 3 always runs with interrupts off, so one that arrived before ends the wait at
/// once: none is missed, and handlers run only here.
pub fn wait_for_interrupt() {
    // SAFETY: faults in ring 3; boot.s executes it with interrupts on. The handlers only touch counters.
    unsafe { asm!("hlt", options(nostack)) };
}

/// Raises the invalid opcode exception.
pub fn undefined_instruction() -> ! {
    // SAFETY: does not return.
    unsafe { asm!("ud2", options(noreturn, nostack)) }
}
