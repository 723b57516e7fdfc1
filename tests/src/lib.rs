//! The test harness: starting helpers bare or through `bulkhead`, and looking at what runs.
//!
//! - [`bare`]: one helper executable without launcher or sandbox; the test plays the supervisor. For tests beside the
//!   helper's own code.

pub mod bare;
