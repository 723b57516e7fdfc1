//! Any packet on the launcher's channel, in both directions: no panic, and what is read is what was meant.
#![no_main]

use ipc::launch::{Report, decode_request, encode_request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(role) = decode_request(bytes) {
        assert_eq!(encode_request(role), bytes);
    }
    if let Some(report) = Report::decode(bytes) {
        assert_eq!(Report::decode(&report.encode()), Some(report));
    }
});
