//! A queue between the control thread and the data plane, with an eventfd that tells of new items.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// See the module.
pub struct Mailbox<T> {
    items: Mutex<VecDeque<T>>,
    wake: EventFd,
}

impl<T> Mailbox<T> {
    /// Empty.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            items: Mutex::default(),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        })
    }

    /// Appends an item and wakes the reader.
    pub fn put(&self, item: T) {
        self.lock().push_back(item);
        // Fails only on a full counter, which wakes as well.
        let _ = self.wake.write(1);
    }

    /// Takes the oldest item.
    pub fn take(&self) -> Option<T> {
        self.lock().pop_front()
    }

    /// Makes the eventfd unreadable until the next [`Self::put`]; for a reader that polls it. Empty the queue afterwards.
    pub fn acknowledge(&self) {
        // Fails only when there is nothing to acknowledge.
        let _ = self.wake.read();
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<T>> {
        self.items.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> AsFd for Mailbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
