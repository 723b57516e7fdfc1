//! The order of an object's members where a QEMU server prints them.
//!
//! There objects are hash tables of 512 buckets; within a bucket the newest member comes first. Scripts compare such output
//! byte by byte, so the order is part of the protocol in practice.

/// The hash bucket of a member name (TDB's hash function, modulo 512).
pub fn bucket(name: &str) -> u32 {
    let bytes = name.as_bytes();
    let start = 0x238F_13AFu32.wrapping_mul(bytes.len() as u32);
    let sum = bytes.iter().enumerate().fold(start, |sum, (i, byte)| {
        sum.wrapping_add(u32::from(*byte) << (i * 5 % 24))
    });
    1_103_515_243u32.wrapping_mul(sum).wrapping_add(12345) % 512
}
