//! Long computations that let others work.

use crate::node::Node;
use crate::node::qcow2::io;
use nix::errno::Errno;
use std::cell::Cell;
use std::time::{Duration, Instant};

/// How long a computation may keep the thread.
const TURN: Duration = Duration::from_millis(5);

/// Gives the thread away now and then.
///
/// A task that only waits for itself is run again at once; what lets the data plane's loop look at the guests' requests is
/// an operation of the engine. So a turn reads a piece of the image.
pub struct Pace<'a> {
    node: &'a dyn Node,
    bytes: usize,
    since: Cell<Instant>,
    /// Time in which others worked.
    away: Cell<Duration>,
}

impl<'a> Pace<'a> {
    /// `bytes`: the smallest piece that can be read from the node.
    pub fn new(node: &'a dyn Node, bytes: usize) -> Self {
        Self {
            node,
            bytes,
            since: Cell::new(Instant::now()),
            away: Cell::default(),
        }
    }

    /// Gives the thread away if it is time.
    ///
    /// # Errors
    /// The node's.
    pub async fn turn(&self) -> Result<(), Errno> {
        if self.since.get().elapsed() < TURN {
            return Ok(());
        }
        let start = Instant::now();
        io::read(self.node, 0, self.bytes).await?;
        self.away.set(self.away.get() + start.elapsed());
        self.since.set(Instant::now());
        Ok(())
    }

    /// How long others have worked so far.
    pub fn away(&self) -> Duration {
        self.away.get()
    }
}
