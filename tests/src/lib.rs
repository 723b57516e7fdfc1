//! The test harness: starting helpers bare or through `bulkhead`, and looking at what runs.
//!
//! - [`bare`]: one helper executable without launcher or sandbox; the test plays the supervisor. For tests beside the
//!   helper's own code.
//! - [`guest`]: the freestanding guest that tests a machine from inside.
//! - [`lab`]: `bulkhead` with a real Linux guest, wherever the tests run.

pub mod bare;
pub mod guest;
pub mod lab;
