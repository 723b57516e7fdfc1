//! A small LUKS volume with any bytes of its header or of its key material changed, then any requests: no panic, no hang, no
//! growth of memory.
#![no_main]

#[path = "../../tests/qcow2_common/mod.rs"]
mod qcow2_common;

use block_proc::crypto::cipher::Spec;
use block_proc::crypto::hash::Hash;
use block_proc::crypto::luks::header::{HEADER_BYTES, Header};
use block_proc::crypto::luks::{CreateOptions, Iterations};
use block_proc::crypto::random::Random;
use block_proc::node::Node;
use block_proc::node::luks::{LuksNode, Options, format};
use ipc::secret::{Secret, Seed};
use libfuzzer_sys::fuzz_target;
use qcow2_common::{Memory, block_on, read, segments};
use std::sync::OnceLock;

/// Most iterations of PBKDF2 that are worth a fuzzer's time.
const MOST_ITERATIONS: u32 = 2000;
const PAYLOAD_BYTES: usize = 64 << 10;

fn key() -> Secret {
    Secret::new(b"key".to_vec()).expect("a short key")
}

fn volume() -> &'static [u8] {
    static VOLUME: OnceLock<Vec<u8>> = OnceLock::new();
    VOLUME.get_or_init(|| {
        let child = Memory::new(Vec::new(), 1);
        child.turns.set(0);
        let same = child.clone();
        let payload = block_on(async move {
            let options = CreateOptions {
                spec: Spec::of_luks("aes", "cbc-essiv:sha256", 16).expect("a cipher"),
                hash: Hash::Sha256,
                iterations: Iterations::Count(1000),
            };
            let mut random = Random::from_seed(&Seed::new([1; 32]));
            format(&*same, &options, 1, &key(), &mut random).await.expect("a header")
        });
        let mut bytes = child.bytes.borrow().clone();
        bytes.resize(payload as usize + PAYLOAD_BYTES, 0);
        bytes
    })
}

fuzz_target!(|bytes: &[u8]| {
    // A byte that says how, changes of the header, three bytes each, then requests, three bytes each.
    let Some((&how, rest)) = bytes.split_first() else { return };
    let (changes, requests) = rest.split_at((usize::from(how % 32) * 3).min(rest.len()));
    let mut image = volume().to_vec();
    for change in changes.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]]));
        // Most places are in the header; a few are in the key material.
        let at = if at % 16 == 0 { 4096 + at } else { at % HEADER_BYTES };
        image[at] = change[2];
    }
    if how & 32 != 0 {
        image.truncate(usize::from(how) * 1024);
    }
    let Ok(header) = Header::parse(&image, image.len() as u64) else { return };
    assert_eq!(Header::parse(&header.encode(), image.len() as u64).as_ref(), Ok(&header));
    let active = header.slots.iter().filter(|slot| slot.is_active);
    let iterations = active.map(|slot| slot.iterations).chain([header.digest_iterations]);
    if iterations.max() > Some(MOST_ITERATIONS) {
        return;
    }
    let child = Memory::new(image, 1);
    child.turns.set(0);
    child.largest.set(4 << 20);
    let options = Options {
        file_bytes: child.bytes.borrow().len() as u64,
        align: if how & 64 != 0 { 512 } else { 1 },
        key: Some(key()),
    };
    let Ok(node) = block_on(LuksNode::open(child, options)) else { return };
    let size = node.bytes();
    let requests = requests.to_vec();
    block_on(async move {
        for request in requests.chunks_exact(3).take(32) {
            let offset = (u64::from(request[1]) * 512).min(size);
            let bytes = (u64::from(request[2] % 32) * 512).min(size - offset);
            if bytes == 0 {
                continue;
            }
            match request[0] % 4 {
                0 => drop(read(&*node, offset, bytes as usize).await),
                1 => drop(node.write_zeroes(offset, bytes, false).await),
                2 => drop(node.flush().await),
                _ => {
                    let data = vec![request[0]; bytes as usize];
                    if node.write(offset, segments(&data), false).await.is_ok() {
                        let back = read(&*node, offset, bytes as usize).await;
                        assert_eq!(back.as_ref(), Ok(&data));
                    }
                }
            }
        }
    });
});
