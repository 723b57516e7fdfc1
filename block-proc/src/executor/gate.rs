//! Requests that come from elsewhere than a device: a change of the graph waits for those under way, and lets no other begin.

use super::spawner::Waiters;
use std::cell::Cell;

/// See the module.
#[derive(Default)]
pub struct Gate {
    closed: Cell<bool>,
    inside: Cell<usize>,
    opened: Waiters,
}

/// A request under way.
pub struct Pass<'a>(&'a Gate);

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.0.inside.set(self.0.inside.get() - 1);
    }
}

impl Gate {
    /// Closes it, or opens it.
    pub fn set_closed(&self, closed: bool) {
        if self.closed.replace(closed) && !closed {
            self.opened.wake();
        }
    }

    /// How many requests are under way.
    pub fn inside(&self) -> usize {
        self.inside.get()
    }

    /// Waits until it is open. Nothing of a peer's may be waited for inside.
    pub async fn enter(&self) -> Pass<'_> {
        self.opened.until(|| (!self.closed.get()).then_some(())).await;
        self.inside.set(self.inside.get() + 1);
        Pass(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Executor;
    use std::rc::Rc;

    #[test]
    fn who_comes_while_it_is_closed_waits() {
        let gate = Rc::new(Gate::default());
        let mut executor = Executor::default();
        gate.set_closed(true);
        for number in 0..3 {
            let gate = gate.clone();
            executor.spawn(async move {
                let _pass = gate.enter().await;
                assert_eq!(gate.inside(), 1);
                number
            });
        }
        let mut finished = Vec::new();
        executor.run(&mut finished);
        assert_eq!((finished.len(), gate.inside()), (0, 0));
        gate.set_closed(false);
        executor.run(&mut finished);
        finished.sort_unstable();
        assert_eq!((finished, gate.inside()), (vec![0, 1, 2], 0));
    }
}
