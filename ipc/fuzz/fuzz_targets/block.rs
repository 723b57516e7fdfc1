//! Any packets on block-proc's channel, in both directions: no panic, no growth, no descriptor that stays.
#![no_main]

#[path = "../packets.rs"]
mod packets;

use ipc::block::{FromBlock, ToBlock};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| packets::both::<ToBlock, FromBlock>(bytes));
