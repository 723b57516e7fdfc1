//! Physical memory and device registers, reached by volatile accesses with a bounds check.

use core::sync::atomic::{Ordering, fence};

/// A range of physical addresses outside of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    address: u64,
    bytes: u64,
}

/// Types of which every bit pattern is valid.
///
/// # Safety
/// Implemented for integers only.
pub unsafe trait Plain: Copy {}
// SAFETY: integers.
unsafe impl Plain for u8 {}
// SAFETY: integers.
unsafe impl Plain for u16 {}
// SAFETY: integers.
unsafe impl Plain for u32 {}
// SAFETY: integers.
unsafe impl Plain for u64 {}

unsafe extern "C" {
    static image_start: u8;
    static image_end: u8;
}

/// Where the image lies.
pub fn image() -> (u64, u64) {
    (&raw const image_start as u64, &raw const image_end as u64)
}

impl Region {
    /// The range. It has to lie outside of the image (which holds every Rust object), not at address 0, and has to be
    /// mapped (the lower 4 GiB are; see [`crate::tables::map`]).
    pub fn new(address: u64, bytes: u64) -> Self {
        let (start, end) = image();
        assert!(address != 0 && address.checked_add(bytes).is_some());
        assert!(
            address + bytes <= start || address >= end,
            "region {address:#x}+{bytes:#x} in the image"
        );
        Self { address, bytes }
    }

    /// Its first address.
    pub fn address(self) -> u64 {
        self.address
    }

    /// Its length.
    pub fn bytes(self) -> u64 {
        self.bytes
    }

    /// A part of it.
    pub fn part(self, offset: u64, bytes: u64) -> Self {
        assert!(offset <= self.bytes && bytes <= self.bytes - offset);
        Self {
            address: self.address + offset,
            bytes,
        }
    }

    #[track_caller]
    fn pointer<T: Plain>(self, offset: u64) -> *mut T {
        let size = size_of::<T>() as u64;
        assert!(
            offset <= self.bytes && size <= self.bytes - offset && (self.address + offset).is_multiple_of(size),
            "access at {offset:#x} of {self:x?}"
        );
        (self.address + offset) as *mut T
    }

    /// Reads.
    #[track_caller]
    pub fn read<T: Plain>(self, offset: u64) -> T {
        // SAFETY: in bounds, aligned, mapped, outside of every Rust object, and every value is valid.
        unsafe { self.pointer::<T>(offset).read_volatile() }
    }

    /// Reads at any alignment, as ACPI tables need.
    #[track_caller]
    pub fn read_unaligned<T: Plain + From<u8> + core::ops::Shl<u32, Output = T> + core::ops::BitOr<Output = T>>(
        self,
        offset: u64,
    ) -> T {
        let mut value = T::from(0);
        for index in (0..size_of::<T>() as u64).rev() {
            let byte = T::from(self.read::<u8>(offset + index));
            value = if size_of::<T>() == 1 { byte } else { value << 8 | byte };
        }
        value
    }

    /// Writes.
    #[track_caller]
    pub fn write<T: Plain>(self, offset: u64, value: T) {
        // SAFETY: as read.
        unsafe { self.pointer::<T>(offset).write_volatile(value) }
    }

    /// Sets all bytes.
    pub fn fill(self, value: u8) {
        // SAFETY: mapped, outside of every Rust object.
        unsafe { core::ptr::write_bytes(self.address as *mut u8, value, self.bytes as usize) };
        fence(Ordering::SeqCst);
    }

    /// Copies bytes in, at the start.
    pub fn copy_from(self, bytes: &[u8]) {
        assert!(bytes.len() as u64 <= self.bytes);
        // SAFETY: in bounds, mapped, outside of every Rust object and so of `bytes`.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), self.address as *mut u8, bytes.len()) };
        fence(Ordering::SeqCst);
    }

    /// Copies bytes out, from the start.
    pub fn copy_to(self, bytes: &mut [u8]) {
        assert!(bytes.len() as u64 <= self.bytes);
        fence(Ordering::SeqCst);
        // SAFETY: as copy_from.
        unsafe { core::ptr::copy_nonoverlapping(self.address as *const u8, bytes.as_mut_ptr(), bytes.len()) };
    }
}
