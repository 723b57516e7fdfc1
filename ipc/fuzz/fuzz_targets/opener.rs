//! Any packets on the opener's channel, in both directions: no panic, no growth, no descriptor that stays.
#![no_main]

#[path = "../packets.rs"]
mod packets;

use ipc::opener::{FromOpener, ToOpener};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| packets::both::<ToOpener, FromOpener>(bytes));
