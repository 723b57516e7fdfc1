//! Which exports there are, for all threads: the one that negotiates must know them, and where their nodes live.

use super::negotiation::Session;
use ipc::Failure;
use ipc::nbd::{ExportNumber, NbdClient};
use ipc::virtio::IoThreadIndex;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a client may know of an export before it has chosen it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Its number.
    pub export: ExportNumber,
    /// Where its node lives.
    pub thread: IoThreadIndex,
    /// For people.
    pub description: Option<String>,
    /// See [`super::super::wire::export_flag`].
    pub flags: u16,
    /// Its size.
    pub bytes: u64,
    /// Requests must keep to blocks of so many bytes.
    pub min_block: u32,
    /// Names of its metadata contexts.
    pub contexts: Vec<String>,
}

/// A client on its way to another thread.
pub struct Handover {
    /// The client.
    pub client: NbdClient,
    /// Its connection.
    pub socket: OwnedFd,
    /// What was read of it already.
    pub ahead: Vec<u8>,
    /// What it has chosen.
    pub session: Session,
}

type Taker = Box<dyn Fn(Handover) + Send + Sync>;

/// See the module.
#[derive(Default)]
pub struct Hub {
    exports: Mutex<BTreeMap<String, Published>>,
    threads: Mutex<BTreeMap<u8, Taker>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hub {
    /// How a thread gets clients.
    pub fn add_thread(&self, thread: IoThreadIndex, taker: impl Fn(Handover) + Send + Sync + 'static) {
        lock(&self.threads).insert(thread.0, Box::new(taker));
    }

    /// Gives a client to the thread of its export. `false` when there is none.
    pub fn hand_over(&self, handover: Handover) -> bool {
        let threads = lock(&self.threads);
        let Some(taker) = threads.get(&handover.session.thread.0) else {
            return false;
        };
        taker(handover);
        true
    }

    /// Makes an export known.
    ///
    /// # Errors
    /// When there is one of this name.
    pub fn publish(&self, name: &str, published: Published) -> Result<(), Failure> {
        let mut exports = lock(&self.exports);
        if exports.contains_key(name) {
            return Err(Failure::new(format!("NBD server already has export named '{name}'")));
        }
        exports.insert(name.to_owned(), published);
        Ok(())
    }

    /// It cannot be chosen any more.
    pub fn withdraw(&self, name: &str, export: ExportNumber) {
        let mut exports = lock(&self.exports);
        if exports.get(name).is_some_and(|known| known.export == export) {
            exports.remove(name);
        }
    }

    /// It has this size now.
    pub fn set_bytes(&self, name: &str, bytes: u64) {
        if let Some(known) = lock(&self.exports).get_mut(name) {
            known.bytes = bytes;
        }
    }

    /// An export.
    pub fn find(&self, name: &str) -> Option<Published> {
        lock(&self.exports).get(name).cloned()
    }

    /// All names, with what is said of them.
    pub fn list(&self) -> Vec<(String, Option<String>)> {
        let exports = lock(&self.exports);
        let named = exports.iter();
        named
            .map(|(name, known)| (name.clone(), known.description.clone()))
            .collect()
    }
}
