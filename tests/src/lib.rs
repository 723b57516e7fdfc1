//! The test harness: starting helpers bare or through `bulkhead`, and looking at what runs.
//!
//! - [`bare`]: one helper executable without launcher or sandbox; the test plays the supervisor. For tests beside the
//!   helper's own code.
//! - [`guest`]: the freestanding guest that tests a machine from inside.
//! - [`machine`], [`qmp`], [`procfs`]: the whole of `bulkhead` with its real sandbox, asked over QMP and looked at in /proc.
//! - [`census`]: how many descriptors each of its processes has.
//! - [`inject`]: a descriptor put into a running helper from outside.
//! - [`dumpfile`]: a reader of memory dumps that compares them with guest RAM.
//! - [`schema`]: what `query-qmp-schema` says, as a judge of replies and events.
//! - [`fuzz`]: messages that are almost requests.
//! - [`load`]: clients that measure, and clients that keep a server busy.
//! - [`lab`]: `bulkhead` with a real Linux guest, wherever the tests run.

pub mod bare;
pub mod census;
pub mod dumpfile;
pub mod fuzz;
pub mod guest;
pub mod images;
pub mod inject;
pub mod intruder;
pub mod lab;
pub mod load;
pub mod machine;
pub mod procfs;
pub mod qmp;
pub mod schema;
