//! A real, sealed helper hears what a supervisor that was taken over says.

use super::player::Said;
use super::rng::Rng;
use std::time::Instant;

/// Says anything until the time is over.
pub fn run(_seed: u64, _until: Instant) -> Said {
    let _ = Rng::new(0);
    Said::default()
}
