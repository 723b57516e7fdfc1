//! A small image with any bytes changed, then any requests: no panic, no hang, no growth of memory.
#![no_main]

#[path = "../../tests/qcow2_common/mod.rs"]
mod qcow2_common;

use block_proc::node::Node;
use block_proc::node::qcow2::Options;
use libfuzzer_sys::fuzz_target;
use qcow2_common::{Memory, block_on, open_with, read, segments};

const CLUSTER: usize = 512;
/// Where the parts of the image are, clusters.
const REFCOUNT_TABLE: usize = 1;
const REFCOUNT_BLOCK: usize = 2;
const L1: usize = 3;
const L2: usize = 4;
const DATA: usize = 5;
const DIRECTORY: usize = 7;
const TABLE: usize = 8;
const BITS: usize = 9;
const END: usize = 10;
const COPIED: u64 = 1 << 63;

fn put(image: &mut [u8], at: usize, value: u64) {
    image[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// A disk of 64 KiB with two L2 tables' room, of which one is there with two clusters of data.
fn image() -> Vec<u8> {
    let mut image = vec![0; END * CLUSTER];
    image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    put(&mut image, 20 - 4, 9);
    put(&mut image, 24, 64 << 10);
    put(&mut image, 32, 2);
    put(&mut image, 40, (L1 * CLUSTER) as u64);
    put(&mut image, 48, (REFCOUNT_TABLE * CLUSTER) as u64);
    put(&mut image, 56, 1 << 32);
    put(&mut image, 96, 4 << 32 | 104);
    put(&mut image, REFCOUNT_TABLE * CLUSTER, (REFCOUNT_BLOCK * CLUSTER) as u64);
    for cluster in 0..END {
        image[REFCOUNT_BLOCK * CLUSTER + cluster * 2 + 1] = 1;
    }
    put(&mut image, L1 * CLUSTER, (L2 * CLUSTER) as u64 | COPIED);
    put(&mut image, L2 * CLUSTER, (DATA * CLUSTER) as u64 | COPIED);
    put(&mut image, L2 * CLUSTER + 8, ((DATA + 1) * CLUSTER) as u64 | COPIED);
    // A bitmap: the feature, the extension, its directory, its table, its bits.
    put(&mut image, 88, 1);
    put(&mut image, 104, 0x2385_2875 << 32 | 24);
    put(&mut image, 112, 1 << 32);
    put(&mut image, 120, 32);
    put(&mut image, 128, (DIRECTORY * CLUSTER) as u64);
    put(&mut image, DIRECTORY * CLUSTER, (TABLE * CLUSTER) as u64);
    put(&mut image, DIRECTORY * CLUSTER + 8, 1 << 32 | 2);
    put(&mut image, DIRECTORY * CLUSTER + 16, 1 << 56 | 9 << 48 | 1 << 32);
    image[DIRECTORY * CLUSTER + 24] = b'b';
    put(&mut image, TABLE * CLUSTER, (BITS * CLUSTER) as u64);
    image[BITS * CLUSTER] = 3;
    image
}

fuzz_target!(|bytes: &[u8]| {
    // Changes of the image, four bytes each, then requests, three bytes each.
    let Some((&changes, rest)) = bytes.split_first() else { return };
    let (changes, requests) = rest.split_at((usize::from(changes % 16) * 4).min(rest.len()));
    let mut image = image();
    for change in changes.chunks_exact(4) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % image.len();
        image[at] = change[2];
        let next = (at + 1) % image.len();
        image[next] ^= change[3];
    }
    let child = Memory::new(image, 1);
    child.turns.set(0);
    child.largest.set(16 << 20);
    let options = Options {
        writable: changes.len() % 8 != 4,
        ..qcow2_common::options(&child)
    };
    let Ok(node) = open_with(&child, options, None) else { return };
    let size = node.bytes();
    let requests = requests.to_vec();
    block_on(async move {
        for request in requests.chunks_exact(3).take(64) {
            let offset = (u64::from(request[1]) * 512).min(size / 512 * 512);
            let bytes = (u64::from(request[2] % 32) * 512).min(size - offset) / 512 * 512;
            if bytes == 0 {
                continue;
            }
            match request[0] % 5 {
                0 => drop(read(&*node, offset, bytes as usize).await),
                1 => drop(node.write_zeroes(offset, bytes, request[0] & 16 != 0).await),
                2 => drop(node.discard(offset, bytes).await),
                3 => drop(node.flush().await),
                _ => drop(node.write(offset, segments(&vec![request[0]; bytes as usize]), request[0] & 16 != 0).await),
            }
        }
        drop(node.store_bitmaps().await);
    });
});
