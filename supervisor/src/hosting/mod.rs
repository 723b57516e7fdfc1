//! What a host with many machines needs: limits for each role ([`cgroup`]), numbers for a monitoring system ([`metrics`]), and
//! somebody who clears up when the supervisor was killed ([`warden`]).
//!
//! The sealed supervisor opens and removes nothing that it was not asked for, and a killed one removes nothing at all. The
//! warden therefore is a process of its own, forked before the launcher. It outlives the supervisor by some milliseconds.

pub mod cgroup;
pub mod metrics;
pub mod warden;
