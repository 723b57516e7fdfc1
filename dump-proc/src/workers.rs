//! Threads that take part in writing a dump. They are started before the process is sealed and wait until there is work.

use crate::memory::GuestMemory;
use ipc::memory::RamRegion;
use ipc::thread_queue::{Receiver, Sender, queue};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Most threads: memory bandwidth ends before.
const MAX_WORKERS: usize = 16;
/// Codecs' states are on the heap, but are made here. What is not used costs nothing.
pub const STACK_BYTES: usize = 1 << 20;

/// Work that any number of threads share.
pub trait Task: Send + Sync {
    /// Takes part until nothing is left or somebody has failed. `each` is told bytes of memory done by all.
    fn work(&self, memory: &GuestMemory, each: &mut dyn FnMut(u64));
}

type Order = (Arc<dyn Task>, Arc<GuestMemory>);

/// The threads beside the main one.
pub struct Workers {
    orders: Vec<Sender<Order>>,
    /// One word for each that has stopped working.
    done: Receiver<()>,
}

impl Workers {
    /// As many as this process may use processors, less one for the main thread.
    ///
    /// # Errors
    /// The system's.
    pub fn start() -> std::io::Result<Self> {
        let count = allowed_processors().min(MAX_WORKERS) - 1;
        let (report, done) = queue();
        let mut orders = Vec::with_capacity(count);
        for number in 1..=count {
            let (order, ordered) = queue::<Order>();
            let report = report.clone();
            std::thread::Builder::new()
                .name(format!("dump-{number}"))
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    report.send(());
                    while let Some((task, memory)) = ordered.recv() {
                        task.work(&memory, &mut |_| {});
                        drop((task, memory));
                        report.send(());
                    }
                })?;
            orders.push(order);
        }
        // What a thread asks of the system when it starts is not allowed any more once the process is sealed.
        for _ in 0..count {
            done.recv();
        }
        Ok(Self { orders, done })
    }

    /// Has all threads work, this one included, until all have stopped. `each` is told bytes of memory done by all.
    pub fn run<T: Task + 'static>(&self, task: T, memory: &Arc<GuestMemory>, each: &mut dyn FnMut(u64)) -> T {
        let task = Arc::new(task);
        let order = || (Arc::clone(&task) as Arc<dyn Task>, Arc::clone(memory));
        self.orders.iter().for_each(|worker| worker.send(order()));
        task.work(memory, each);
        for _ in &self.orders {
            self.done.recv();
        }
        // The others have given theirs back before they said so.
        Arc::into_inner(task).unwrap_or_else(|| ipc::helper::die("a worker still has the dump"))
    }
}

/// Guest RAM in chunks that are handed out one by one.
pub struct Chunks {
    pieces: Vec<RamRegion>,
    chunk_bytes: u64,
    next: AtomicU64,
    /// Bytes of memory done.
    done: AtomicU64,
    stopped: AtomicBool,
}

impl Chunks {
    /// Chunks of these pieces; in the middle of a piece they begin at multiples of their size in the memory fd.
    pub fn new(pieces: Vec<RamRegion>, chunk_bytes: u64) -> Self {
        Self {
            pieces,
            chunk_bytes,
            next: AtomicU64::new(0),
            done: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
        }
    }

    /// A chunk that nobody has, and the number of the piece that it is of.
    pub fn take(&self) -> Option<(usize, RamRegion)> {
        if self.stopped.load(Ordering::Relaxed) {
            return None;
        }
        let mut number = self.next.fetch_add(1, Ordering::Relaxed);
        for (index, piece) in self.pieces.iter().enumerate() {
            let before_first = piece.offset % self.chunk_bytes;
            let chunks = (before_first + piece.bytes).div_ceil(self.chunk_bytes);
            if number < chunks {
                let begin = (number * self.chunk_bytes).saturating_sub(before_first);
                let end = ((number + 1) * self.chunk_bytes - before_first).min(piece.bytes);
                let chunk = RamRegion {
                    guest_address: piece.guest_address + begin,
                    bytes: end - begin,
                    offset: piece.offset + begin,
                };
                return Some((index, chunk));
            }
            number -= chunks;
        }
        None
    }

    /// Counts what is done; all of it so far.
    pub fn add_done(&self, bytes: u64) -> u64 {
        self.done.fetch_add(bytes, Ordering::Relaxed) + bytes
    }

    /// No chunk is handed out any more.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

/// The first of several workers' errors.
pub struct FirstError<E>(Mutex<Option<E>>);

impl<E> Default for FirstError<E> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<E> FirstError<E> {
    /// Takes an error, unless there is one.
    pub fn set(&self, error: E) {
        // A worker that panicked took the process with it.
        let mut first = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        first.get_or_insert(error);
    }

    /// When all workers have stopped.
    ///
    /// # Errors
    /// The first one.
    pub fn check(self) -> Result<(), E> {
        match self.0.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

fn allowed_processors() -> usize {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else {
        return 1;
    };
    let count = (0..CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .count();
    count.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_every_piece_once_and_are_aligned() {
        let piece = |guest_address, bytes, offset| RamRegion {
            guest_address,
            bytes,
            offset,
        };
        let pieces = vec![
            piece(0, 10_000, 0),
            piece(70_001, 9_000, 5_001),
            piece(1 << 32, 4096, 16_384),
        ];
        let chunks = Chunks::new(pieces.clone(), 4096);
        let mut ends = [0; 3];
        while let Some((index, chunk)) = chunks.take() {
            let whole = pieces[index];
            assert_eq!(chunk.offset, whole.offset + ends[index]);
            assert_eq!(chunk.guest_address, whole.guest_address + ends[index]);
            assert!(ends[index] == 0 || chunk.offset % 4096 == 0);
            assert!((1..=4096).contains(&chunk.bytes));
            ends[index] += chunk.bytes;
        }
        assert_eq!(ends, [10_000, 9_000, 4096]);
        let stopped = Chunks::new(pieces, 4096);
        stopped.stop();
        assert!(stopped.take().is_none());
    }
}
