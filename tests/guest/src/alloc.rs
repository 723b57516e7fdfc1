//! Pages of RAM, handed out one after the other: from below what a test gives back at its end, from above what stays.

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
    // A module lies close behind the image, or else so high that what is before it is enough.
    let (low, high) = start_info::modules();
    let close = high > end && high < ram_end / 2;
    let first = if close { high } else { end };
    let last = if low > end && !close { ram_end.min(low) } else { ram_end };
    NEXT.store(first.next_multiple_of(PAGE_BYTES), Ordering::SeqCst);
    END.store(last & !(PAGE_BYTES - 1), Ordering::SeqCst);
}

/// Zeroed memory, aligned to a page.
pub fn pages(bytes: u64) -> Region {
    let bytes = bytes.next_multiple_of(PAGE_BYTES);
    let address = NEXT.fetch_add(bytes, Ordering::SeqCst);
    assert!(address + bytes <= END.load(Ordering::SeqCst), "out of memory");
    zeroed(address, bytes)
}

/// The same, but never given back: for page tables and stacks.
pub fn permanent(bytes: u64) -> Region {
    let bytes = bytes.next_multiple_of(PAGE_BYTES);
    let address = END.fetch_sub(bytes, Ordering::SeqCst) - bytes;
    assert!(address >= NEXT.load(Ordering::SeqCst), "out of memory");
    zeroed(address, bytes)
}

fn zeroed(address: u64, bytes: u64) -> Region {
    let region = Region::new(address, bytes);
    region.fill(0);
    region
}

/// A point to which memory can be given back.
pub struct Mark(u64);

/// The current point.
pub fn mark() -> Mark {
    Mark(NEXT.load(Ordering::SeqCst))
}

/// Gives back all [`pages`] that were handed out since. No device may use them any more.
pub fn release(mark: &Mark) {
    NEXT.store(mark.0, Ordering::SeqCst);
}
