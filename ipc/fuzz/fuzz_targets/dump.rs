//! Any packets on dump-proc's channel, in both directions: no panic, no growth, no descriptor that stays.
#![no_main]

#[path = "../packets.rs"]
mod packets;

use ipc::dump::{FromDump, ToDump};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| packets::both::<ToDump, FromDump>(bytes));
