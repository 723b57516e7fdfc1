//! Any packets on vcpu-proc's channel, in both directions: no panic, no growth, no descriptor that stays.
#![no_main]

#[path = "../packets.rs"]
mod packets;

use ipc::vcpu::{FromVcpu, ToVcpu};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| packets::both::<ToVcpu, FromVcpu>(bytes));
