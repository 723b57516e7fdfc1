//! The tables in boot.s that ring 3 completes: interrupt descriptors, task segments, page tables, counters.

use crate::alloc;
use core::sync::atomic::{AtomicU64, Ordering};

unsafe extern "C" {
    static interrupt_stubs: u8;
    static exception_stubs: u8;
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static idt: [AtomicU64; 512];
    static gdt: [AtomicU64; 520];
    static ap_mailbox: [AtomicU64; 4];
    static page_map: [AtomicU64; 512];
    static interrupt_counts: [AtomicU64; 256];
}

/// Selector of ring 0's code.
const KERNEL_CODE: u64 = 0x10;
/// Selector of processor 0's task state segment.
const FIRST_TASK: u64 = 0x40;
/// Last byte of a task state segment with a full port bitmap.
const TASK_LIMIT: u64 = 104 + 8192;
/// Present, writable, user, accessed.
const TABLE_FLAGS: u64 = 0x27;
/// The same and dirty, a large page.
const PAGE_FLAGS: u64 = 0xe7;
const ADDRESS_BITS: u64 = 0x000f_ffff_ffff_f000;
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// Points every vector at its stub.
pub fn fill_idt() {
    let (exceptions, interrupts) = (&raw const exception_stubs as u64, &raw const interrupt_stubs as u64);
    for vector in 0..256_usize {
        let handler = match vector {
            0..32 => exceptions + 16 * vector as u64,
            _ => interrupts + 32 * (vector as u64 - 32),
        };
        let low = handler & 0xffff | KERNEL_CODE << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        // SAFETY: defined in boot.s with this size; shared with the processor only.
        let table = unsafe { &idt };
        table[2 * vector].store(low, Ordering::SeqCst);
        table[2 * vector + 1].store(handler >> 32, Ordering::SeqCst);
    }
}

/// Removes all handlers: the next exception is a triple fault.
pub fn clear_idt() {
    // SAFETY: as in fill_idt.
    for entry in unsafe { &idt } {
        entry.store(0, Ordering::SeqCst);
    }
}

/// How many interrupts with this vector have arrived on all processors.
pub fn interrupts(vector: u8) -> u64 {
    // SAFETY: defined in boot.s with this size; ring 0 changes it with locked instructions.
    let counts = unsafe { &interrupt_counts };
    counts[usize::from(vector)].load(Ordering::SeqCst)
}

/// The code that application processors start with.
pub fn trampoline() -> &'static [u8] {
    let (start, end) = (&raw const ap_trampoline, &raw const ap_trampoline_end);
    // SAFETY: both lie in boot.s's text, which nothing writes.
    unsafe { core::slice::from_raw_parts(start, end as usize - start as usize) }
}

/// Prepares the start of application processor `index` (from 1): its task segment and stacks.
pub fn prepare_processor(index: u64) {
    const USER_STACK: u64 = 64 << 10;
    const RING0_STACK: u64 = 4096;
    let stacks = alloc::permanent(USER_STACK + RING0_STACK);
    let user = stacks.address() + USER_STACK;
    let ring0 = user + RING0_STACK;
    // Its port bitmap forbids nothing, as boot.s has it for the boot processor.
    let task = alloc::permanent(TASK_LIMIT + 1);
    task.write::<u32>(4, ring0 as u32);
    task.write::<u32>(8, (ring0 >> 32) as u32);
    task.write::<u16>(102, 104);
    task.write::<u8>(TASK_LIMIT, 0xff);
    let base = task.address();
    let low = TASK_LIMIT | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    let selector = FIRST_TASK + 16 * index;
    // SAFETY: defined in boot.s with these sizes.
    let (descriptors, mailbox) = unsafe { (&gdt, &ap_mailbox) };
    descriptors[(selector / 8) as usize].store(low, Ordering::SeqCst);
    descriptors[(selector / 8 + 1) as usize].store(base >> 32, Ordering::SeqCst);
    for (place, value) in mailbox.iter().zip([ring0, user - 8, selector, index]) {
        place.store(value, Ordering::SeqCst);
    }
}

/// Makes physical addresses above 4 GiB reachable.
pub fn map(address: u64, bytes: u64) {
    let mut page = address & !(LARGE_PAGE_BYTES - 1);
    while page < address + bytes {
        // The table that the processor walks is made of entries that only go from absent to present here.
        // SAFETY: defined in boot.s with this size.
        let top = unsafe { &page_map };
        let pointers = next_table(&top[(page >> 39 & 511) as usize]);
        let directory = next_table(&pointers[(page >> 30 & 511) as usize]);
        let entry = &directory[(page >> 21 & 511) as usize];
        if entry.load(Ordering::SeqCst) == 0 {
            entry.store(page | PAGE_FLAGS, Ordering::SeqCst);
        }
        page += LARGE_PAGE_BYTES;
    }
}

fn next_table(entry: &AtomicU64) -> &'static [AtomicU64; 512] {
    if entry.load(Ordering::SeqCst) == 0 {
        entry.store(alloc::permanent(4096).address() | TABLE_FLAGS, Ordering::SeqCst);
    }
    let address = entry.load(Ordering::SeqCst) & ADDRESS_BITS;
    // SAFETY: entries point to whole zeroed pages, from boot.s or from the allocator, which are used for nothing else.
    unsafe { &*(address as *const [AtomicU64; 512]) }
}

/// Where boot.s sends exceptions.
#[unsafe(no_mangle)]
extern "C" fn exception_report(vector: u64, error: u64, instruction: u64, address: u64) -> ! {
    crate::serial::last_line(format_args!(
        "BHG: FAIL exception vector={vector} error={error:#x} rip={instruction:#x} cr2={address:#x}"
    ));
    crate::power::off()
}
