//! Pages of RAM, handed out one after the other. Given back only down to a mark.

use crate::region::{Region, image};
use crate::start_info;
use core::sync::atomic::{AtomicU64, Ordering};

const PAGE_BYTES: u64 = 4096;
/// RAM that is there when the monitor gives no memory map.
const FALLBACK_END: u64 = 64 << 20;

static NEXT: AtomicU64 = AtomicU64::new(0);
static END: AtomicU64 = AtomicU64::new(0);

/// Finds the free RAM behind the image, below 4 GiB.
pub fn init() {
    let (start, end) = image();
    let ram_end = start_info::ram()
        .find(|(address, bytes)| (*address..address + bytes).contains(&start))
        .map_or(FALLBACK_END, |(address, bytes)| address + bytes);
    // A module lies at the end of RAM (then everything before it is free) or close behind the image.
    let modules = start_info::highest_module_end();
    let first = if modules > end && modules < ram_end / 2 {
        modules
    } else {
        end
    };
    NEXT.store(first.next_multiple_of(PAGE_BYTES), Ordering::SeqCst);
    END.store(ram_end, Ordering::SeqCst);
}

/// Zeroed memory, aligned to a page.
pub fn pages(bytes: u64) -> Region {
    let bytes = bytes.next_multiple_of(PAGE_BYTES);
    let address = NEXT.fetch_add(bytes, Ordering::SeqCst);
    assert!(address + bytes <= END.load(Ordering::SeqCst), "out of memory");
    let region = Region::new(address, bytes);
    region.fill(0);
    region
}

/// How many bytes are left.
pub fn available() -> u64 {
    END.load(Ordering::SeqCst) - NEXT.load(Ordering::SeqCst)
}

/// A point to which memory can be given back.
pub struct Mark(u64);

/// The current point.
pub fn mark() -> Mark {
    Mark(NEXT.load(Ordering::SeqCst))
}

/// Gives back everything that was handed out since. No processor, page table or device may use it any more.
pub fn release(mark: &Mark) {
    NEXT.store(mark.0, Ordering::SeqCst);
}
