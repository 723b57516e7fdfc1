//! Any bytes that an NBD client may say, to our server: no panic, no hang, no growth of memory.
#![no_main]

#[path = "../../tests/nbd_common/mod.rs"]
mod nbd_common;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // A byte that says how much comes at a time, then the peer.
    let Some((step, bytes)) = bytes.split_first() else { return };
    nbd_common::attack_server(bytes, usize::from(*step) * 16 + 1);
});
