//! The ledger: what has changed in the tables of qcow2 images and is not in the images yet, noted where the next block-proc
//! finds it ([`ipc::inflight`]).

use ipc::Failure;
use ipc::graph::NodeId;
use ipc::inflight::{CHUNK_BYTES, CHUNK_HEADER_BYTES, LEDGER_BYTES, NOTE_BYTES};
use ipc::memory::GuestRam;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::{Bytes, GuestAddress};

const CHUNKS: u64 = LEDGER_BYTES / CHUNK_BYTES;
/// Entries of a chunk.
const ENTRIES: u64 = (CHUNK_BYTES - CHUNK_HEADER_BYTES) / NOTE_BYTES;

/// A changed entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Note {
    /// Where on the guest's disk, bytes.
    pub offset: u64,
    /// The entry's first half.
    pub descriptor: u64,
    /// Its second half.
    pub bitmap: u64,
}

/// The ledger of all images, shared by all threads.
pub struct Ledger {
    memory: GuestRam,
    base: u64,
    free: Mutex<BTreeSet<u64>>,
    /// What an earlier process has left, by owner: the chunks, in their order.
    left: Mutex<BTreeMap<u64, Vec<u64>>>,
    sequence: AtomicU64,
}

impl Ledger {
    /// At the end of a record of so many bytes.
    ///
    /// # Errors
    /// When the record has no room for a ledger.
    pub fn new(memory: GuestRam, record_bytes: u64) -> Result<Arc<Self>, Failure> {
        let mut ledger = Self {
            memory,
            base: record_bytes.checked_sub(LEDGER_BYTES).ok_or_else(no_room)?,
            free: Mutex::default(),
            left: Mutex::default(),
            sequence: AtomicU64::new(1),
        };
        let (mut free, mut left) = (BTreeSet::new(), BTreeMap::<u64, Vec<(u64, u64)>>::new());
        for chunk in 0..CHUNKS {
            match ledger.load(chunk, 0) {
                0 => drop(free.insert(chunk)),
                owner => left.entry(owner).or_default().push((ledger.load(chunk, 8), chunk)),
            }
        }
        let last = left.values().flatten().map(|(sequence, _)| *sequence).max();
        // A hostile record may say anything.
        *ledger.sequence.get_mut() = last.unwrap_or(0).saturating_add(1);
        let in_order = |mut chunks: Vec<(u64, u64)>| {
            chunks.sort_unstable();
            chunks.into_iter().map(|(_, chunk)| chunk).collect()
        };
        *ledger.free.get_mut().unwrap_or_else(PoisonError::into_inner) = free;
        *ledger.left.get_mut().unwrap_or_else(PoisonError::into_inner) = left
            .into_iter()
            .map(|(owner, chunks)| (owner, in_order(chunks)))
            .collect();
        Ok(Arc::new(ledger))
    }

    /// The account of an image.
    pub fn account(self: &Arc<Self>, node: NodeId) -> Account {
        let owner = u64::from(node.0) + 1;
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner).remove(&owner);
        Account {
            ledger: self.clone(),
            owner,
            chunks: RefCell::new(left.unwrap_or_default()),
            in_last: Cell::new(ENTRIES),
            missing: Cell::new(false),
            missing_in_commit: Cell::new(false),
        }
    }

    fn claim(&self, owner: u64) -> Option<u64> {
        let chunk = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop_first()?;
        self.store(chunk, 16, 0);
        self.store(chunk, 8, self.sequence.fetch_add(1, Ordering::Relaxed));
        self.store(chunk, 0, owner);
        Some(chunk)
    }

    fn give_back(&self, chunk: u64) {
        self.store(chunk, 0, 0);
        self.free.lock().unwrap_or_else(PoisonError::into_inner).insert(chunk);
    }

    fn load(&self, chunk: u64, at: u64) -> u64 {
        let place = GuestAddress(self.base + chunk * CHUNK_BYTES + at);
        let loaded = self.memory.load(place, Ordering::Acquire);
        loaded.expect("the chunk is in the record")
    }

    fn store(&self, chunk: u64, at: u64, value: u64) {
        let place = GuestAddress(self.base + chunk * CHUNK_BYTES + at);
        let stored = self.memory.store(value, place, Ordering::Release);
        stored.expect("the chunk is in the record");
    }
}

fn no_room() -> Failure {
    Failure::new("the record of requests under way has no room for the ledger")
}

/// Which notes a commit makes superfluous.
#[derive(Debug, Clone, Copy)]
pub struct Mark(usize);

/// What is noted of one image.
pub struct Account {
    ledger: Arc<Ledger>,
    owner: u64,
    chunks: RefCell<Vec<u64>>,
    /// Entries of the last chunk. No more are put into one that an earlier process or an earlier commit has had.
    in_last: Cell<u64>,
    /// There was no room for a note.
    missing: Cell<bool>,
    /// There was none for one that is being committed.
    missing_in_commit: Cell<bool>,
}

impl Account {
    /// What an earlier process has left, in its order. It stays noted until the next commit.
    pub fn left(&self) -> Vec<Note> {
        let chunks = self.chunks.borrow();
        let notes = chunks.iter().flat_map(|chunk| {
            let count = self.ledger.load(*chunk, 16).min(ENTRIES);
            (0..count).map(|index| {
                let word = |number: u64| {
                    self.ledger
                        .load(*chunk, CHUNK_HEADER_BYTES + index * NOTE_BYTES + number * 8)
                };
                Note {
                    offset: word(0),
                    descriptor: word(1),
                    bitmap: word(2),
                }
            })
        });
        notes.collect()
    }

    /// An entry has changed. It is noted before anything waits.
    pub fn note(&self, note: Note) {
        let mut chunks = self.chunks.borrow_mut();
        if self.in_last.get() == ENTRIES {
            match self.ledger.claim(self.owner) {
                Some(chunk) => chunks.push(chunk),
                None => return self.missing.set(true),
            }
            self.in_last.set(0);
        }
        let (Some(&chunk), index) = (chunks.last(), self.in_last.get()) else {
            return;
        };
        for (number, word) in (0..).zip([note.offset, note.descriptor, note.bitmap]) {
            let place = CHUNK_HEADER_BYTES + index * NOTE_BYTES + number * 8;
            self.ledger.store(chunk, place, word);
        }
        self.in_last.set(index + 1);
        self.ledger.store(chunk, 16, index + 1);
    }

    /// Whether something is not noted, and so must be committed before anybody is told that it is done.
    pub fn is_incomplete(&self) -> bool {
        self.missing.get() || self.missing_in_commit.get()
    }

    /// A commit begins, of everything that is noted.
    pub fn begin_commit(&self) -> Mark {
        self.in_last.set(ENTRIES);
        if self.missing.replace(false) {
            self.missing_in_commit.set(true);
        }
        Mark(self.chunks.borrow().len())
    }

    /// It is over.
    pub fn end_commit(&self, mark: Mark, success: bool) {
        let was_missing = self.missing_in_commit.replace(false);
        if success {
            let mut chunks = self.chunks.borrow_mut();
            chunks.drain(..mark.0).for_each(|chunk| self.ledger.give_back(chunk));
        } else if was_missing {
            self.missing.set(true);
        }
    }
}

#[cfg(test)]
mod tests;
