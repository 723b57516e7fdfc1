//! Tasks that nobody waits for, from inside other tasks: connections have them. The thread takes them up in its next turn.

use std::cell::RefCell;
use std::pin::Pin;
use std::task::Waker;

/// A task in the background.
pub type Background = Pin<Box<dyn Future<Output = ()>>>;

/// See the module.
#[derive(Default)]
pub struct Spawner(RefCell<Vec<Background>>);

impl Spawner {
    /// Adds one.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.0.borrow_mut().push(Box::pin(task));
    }

    /// Those that were added since the last call.
    pub fn take(&self) -> Vec<Background> {
        self.0.take()
    }
}

/// Tasks that wait for something that other tasks of the thread change.
#[derive(Default)]
pub struct Waiters(RefCell<Vec<Waker>>);

impl Waiters {
    /// Wakes all; each looks whether it is what it waits for.
    pub fn wake(&self) {
        self.0.take().into_iter().for_each(Waker::wake);
    }

    /// Waits until there is an answer. Whoever changes what it depends on calls [`Self::wake`].
    pub async fn until<T>(&self, mut look: impl FnMut() -> Option<T>) -> T {
        std::future::poll_fn(|context| match look() {
            Some(answer) => std::task::Poll::Ready(answer),
            None => {
                self.0.borrow_mut().push(context.waker().clone());
                std::task::Poll::Pending
            }
        })
        .await
    }
}
