//! A small image with snapshots, any bytes of its tables changed, maybe marked as not closed; then snapshots are made,
//! deleted and gone back to, and sizes changed: no panic, no hang, no growth of memory.
#![no_main]

#[path = "../../tests/qcow2_common/mod.rs"]
mod qcow2_common;

use block_proc::node::Node;
use ipc::graph::{CreateQcow2, Preallocation};
use libfuzzer_sys::fuzz_target;
use qcow2_common::{Memory, block_on, make, open, read, segments, snapshot_info};
use std::sync::OnceLock;

/// The image, and where its tables are.
struct Seed {
    image: Vec<u8>,
    places: Vec<usize>,
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn seed() -> &'static Seed {
    static SEED: OnceLock<Seed> = OnceLock::new();
    SEED.get_or_init(|| {
        let spec = CreateQcow2 {
            bytes: 64 << 10,
            cluster_bytes: 512,
            ..CreateQcow2::default()
        };
        let child = make(&spec, None).expect("an image");
        child.turns.set(0);
        let node = open(&child, None).expect("the image");
        block_on(async move {
            for number in 0..3_u64 {
                node.write(number * 2048, segments(&[number as u8; 4096]), false).await.expect("a write");
                node.create_snapshot(&snapshot_info(&number.to_string())).await.expect("a snapshot");
            }
            node.write(1024, segments(&[9; 512]), true).await.expect("a write");
        });
        let image = child.bytes.borrow().clone();
        let (l1, counts, table) = (u64_at(&image, 40) as usize, u64_at(&image, 48) as usize, u64_at(&image, 64) as usize);
        let l2 = (u64_at(&image, l1) & 0x00ff_ffff_ffff_fe00) as usize;
        let first_l1 = u64_at(&image, table) as usize;
        let places = vec![24, 56, 72, table, table + 80, first_l1, l1, l2, counts, u64_at(&image, counts) as usize];
        Seed { image, places }
    })
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&changes, rest)) = bytes.split_first() else { return };
    let (changed, requests) = rest.split_at((usize::from(changes % 16) * 4).min(rest.len()));
    let seed = seed();
    let mut image = seed.image.clone();
    image[79] |= changes >> 7;
    for change in changed.chunks_exact(4) {
        let at = seed.places[usize::from(change[0]) % seed.places.len()] + usize::from(change[1]);
        if let Some(byte) = image.get_mut(at) {
            *byte = if change[3] & 1 == 0 { change[2] } else { *byte ^ change[2] };
        }
    }
    let child = Memory::new(image, 1);
    child.turns.set(0);
    child.largest.set(16 << 20);
    child.cache_bytes.set(64 << 10);
    let Ok(node) = open(&child, None) else { return };
    let requests = requests.to_vec();
    block_on(async move {
        for request in requests.chunks_exact(2).take(24) {
            let id = (request[1] % 5).to_string();
            let size = node.bytes() / 512 * 512;
            let offset = (u64::from(request[1]) * 512).min(size.saturating_sub(512));
            match request[0] % 7 {
                0 => drop(node.create_snapshot(&snapshot_info(&id)).await),
                1 => drop(node.delete_snapshot(&id).await),
                2 => drop(node.revert_to_snapshot(&id).await),
                3 => drop(node.resize(u64::from(request[1]) * 1024, Preallocation::Off).await),
                4 => drop(node.details().await),
                5 if size >= 512 => drop(node.write(offset, segments(&[1; 512]), request[0] & 8 != 0).await),
                _ if size >= 512 => drop(read(&*node, offset, 512).await),
                _ => {}
            }
        }
        let _ = node.flush().await;
    });
});
