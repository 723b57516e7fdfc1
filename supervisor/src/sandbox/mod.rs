//! The walls: the supervisor's own, and the check that every helper's stand.

pub mod own;
pub mod symbols;
pub mod verify;
pub mod violation;
