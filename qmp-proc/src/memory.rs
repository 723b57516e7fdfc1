//! Memory without system calls.
//!
//! The sealed process may call neither brk nor mmap. So before sealing, [`reserve`] makes glibc's heap as large as it can
//! ever become (address space only: pages that are not touched cost nothing), and [`Bounded`] counts what is allocated and
//! ends the process cleanly at a limit well below the reserve. The distance between the two is for fragmentation.
//!
//! This module is the crate's only unsafe code besides the helper library's: an allocator cannot be written without.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// What a process may have allocated at one time, bytes. The costliest legal message (2 Mi tokens, all of them short
/// strings) takes about 130 MiB.
pub const LIMIT_BYTES: usize = 320 << 20;
/// Size of the heap.
const RESERVE_BYTES: usize = 2 * LIMIT_BYTES;
/// Exit status when the limit is reached.
pub const OUT_OF_MEMORY_STATUS: i32 = 4;
/// What glibc's malloc adds to an allocation, and the multiple that it rounds to.
const OVERHEAD_BYTES: usize = 8;
const GRANULE_BYTES: usize = 16;

/// glibc's malloc with a limit.
pub struct Bounded {
    used: AtomicUsize,
}

impl Bounded {
    /// Nothing allocated yet.
    #[allow(clippy::new_without_default)] // A static needs a const constructor.
    pub const fn new() -> Self {
        Self {
            used: AtomicUsize::new(0),
        }
    }

    /// Bytes in use, with malloc's overhead.
    pub fn used_bytes(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize) {
        let used = self.used.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        if used > LIMIT_BYTES {
            // The caller could only abort, which takes system calls that the seal forbids.
            ipc::helper::log(
                "out of memory: the client's messages need more than one connection may take; connection ended",
            );
            ipc::helper::exit_now(OUT_OF_MEMORY_STATUS);
        }
    }

    fn give(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// What an allocation really takes. Sizes near `usize::MAX` come out as no less than the limit.
fn cost(bytes: usize) -> usize {
    bytes.saturating_add(OVERHEAD_BYTES + GRANULE_BYTES - 1) / GRANULE_BYTES * GRANULE_BYTES
}

// SAFETY: every method hands its caller's arguments, with their contracts, to `System` unchanged.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.take(cost(layout.size()));
        // SAFETY: see above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.take(cost(layout.size()));
        // SAFETY: see above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        self.give(cost(layout.size()));
        // SAFETY: see above.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        self.take(cost(new_size));
        self.give(cost(layout.size()));
        // SAFETY: see above.
        unsafe { System.realloc(block, layout, new_size) }
    }
}

/// Makes the heap as large as it will ever be. Call it before sealing, on the process's only thread.
///
/// # Errors
/// When the address space is limited below it.
pub fn reserve() -> std::io::Result<()> {
    let settings = [
        // All from the one heap; never a mapping of its own for a large block, never a second heap.
        (libc::M_MMAP_MAX, 0),
        (libc::M_ARENA_MAX, 1),
        // Never give memory back.
        (libc::M_TRIM_THRESHOLD, i32::MAX),
    ];
    for (parameter, value) in settings {
        // SAFETY: mallopt takes any numbers and tells by its result what it makes of them.
        if unsafe { libc::mallopt(parameter, value) } != 1 {
            return Err(std::io::Error::other("mallopt refused a parameter"));
        }
    }
    // SAFETY: the block is freed unused; it only moves the end of the heap, which `sbrk(0)` tells.
    let moved = unsafe {
        let before = libc::sbrk(0) as usize;
        // The compiler may leave out an allocation that nobody looks at.
        let block = std::hint::black_box(libc::malloc(RESERVE_BYTES));
        if block.is_null() {
            return Err(std::io::Error::last_os_error());
        }
        libc::free(block);
        (libc::sbrk(0) as usize).saturating_sub(before)
    };
    if moved < LIMIT_BYTES {
        return Err(std::io::Error::other("the heap has not grown"));
    }
    Ok(())
}
