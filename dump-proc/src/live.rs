//! Dumps of a guest that runs on: the memory of one instant.
//!
//! While the guest and its disks stand, [`Live::arm`] write-protects guest RAM in the processes that map it. Then they go
//! on. Whoever first writes to a page waits until a guard thread has put the page's old content aside and lifted the
//! protection of that page; whoever reads memory for the dump gets what was put aside laid over what is there now
//! ([`Live::overlay`]). What the dump has read it gives free ([`Live::release`]), and then nobody waits for it any more.
//!
//! That a page which is read while it changes comes out right rests on the order: its old content is put aside before
//! its writer goes on, and looked for after the page has been read. A page that a writer could have touched during the
//! read has been put aside by then.
//!
//! What is put aside is bounded ([`MAX_KEPT_BYTES`]): beyond that writers wait for the dump to come along, and when it does
//! not for a while ([`PATIENCE`]) it is given up, because the guest comes first: a writer that waits too long would count
//! as a process that does not answer. Pages of zeroes are noted, not copied.

mod faults;

use crate::memory::GuestMemory;
use crate::output::is_zero;
use faults::{Faults, MESSAGES};
use ipc::Failure;
use ipc::dump::{MAX_WATCHES, OVERRUN_STATUS};
use ipc::live::MemoryWatch;
use ipc::memory::{PAGE_BYTES, RamRegion};
use ipc::thread_queue::{Receiver, Sender, queue};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most bytes that are put aside at a time, together with [`MAX_KEPT_SHARE`].
const MAX_KEPT_BYTES: u64 = 512 << 20;
/// At most this part of guest RAM is put aside at a time.
const MAX_KEPT_SHARE: u64 = 4;
/// What a small guest may have in any case.
const MIN_KEPT_BYTES: u64 = 8 << 20;
/// How long a writer waits for room. Well below the time in which a helper has to answer the supervisor.
const PATIENCE: Duration = Duration::from_secs(2);

const PAGE: usize = PAGE_BYTES as usize;

/// A live dump that is under way.
pub struct Live {
    watched: Vec<Faults>,
    /// What is protected, as pieces of the memory fd that begin and end with pages.
    pieces: Vec<RamRegion>,
    max_kept: usize,
    kept: Mutex<Kept>,
    /// There is room again, or nothing to wait for.
    room: Condvar,
}

/// Old contents, by numbers of pages in the memory fd.
struct Kept {
    /// `None`: zeroes.
    pages: BTreeMap<u64, Option<Box<[u8; PAGE]>>>,
    /// One bit a page: the dump has read it.
    released: Vec<u64>,
}

impl Kept {
    fn is_released(&self, page: u64) -> bool {
        let word = self.released.get((page / 64) as usize);
        word.is_none_or(|word| word >> (page % 64) & 1 == 1)
    }

    fn release(&mut self, pages: std::ops::Range<u64>) {
        for page in pages.clone() {
            if let Some(word) = self.released.get_mut((page / 64) as usize) {
                *word |= 1 << (page % 64);
            }
        }
        let mut rest = self.pages.split_off(&pages.start);
        self.pages.append(&mut rest.split_off(&pages.end));
    }
}

impl Live {
    /// Takes over the processes' userfaultfds; nothing is protected yet. `pieces` is what the dump covers.
    ///
    /// # Errors
    /// Names what the kernel lacks.
    pub fn new(watches: Vec<MemoryWatch>, pieces: &[RamRegion]) -> Result<Self, Failure> {
        if watches.len() > MAX_WATCHES {
            return Err(Failure::new(format!("dump-proc: {} watches", watches.len())));
        }
        let pieces: Vec<_> = pieces.iter().map(whole_pages).collect();
        let end = pieces.iter().map(|piece| piece.offset + piece.bytes).max().unwrap_or(0);
        let bytes: u64 = pieces.iter().map(|piece| piece.bytes).sum();
        let max_kept = (bytes / MAX_KEPT_SHARE).clamp(MIN_KEPT_BYTES, MAX_KEPT_BYTES);
        Ok(Self {
            watched: watches.into_iter().map(Faults::begin).collect::<Result<_, _>>()?,
            pieces,
            max_kept: (max_kept / PAGE_BYTES) as usize,
            kept: Mutex::new(Kept {
                pages: BTreeMap::new(),
                released: vec![0; end.div_ceil(64 * PAGE_BYTES) as usize],
            }),
            room: Condvar::new(),
        })
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Protects guest RAM in one process.
    fn arm(&self, watch: usize) -> Result<(), Failure> {
        let faults = &self.watched[watch];
        for piece in &self.pieces {
            faults.protect(piece.offset, piece.bytes)?;
        }
        Ok(())
    }

    /// Lets one process's writers go on, page by page, for as long as there are any.
    fn guard(&self, watch: usize, memory: &GuestMemory) -> std::io::Result<()> {
        let faults = &self.watched[watch];
        let mut offsets = [0; MESSAGES];
        loop {
            for offset in faults.wait(&mut offsets)? {
                self.keep(memory, offset / PAGE_BYTES)?;
                faults.lift(offset / PAGE_BYTES * PAGE_BYTES, PAGE_BYTES)?;
            }
        }
    }

    /// Puts a page aside unless the dump has it.
    fn keep(&self, memory: &GuestMemory, page: u64) -> std::io::Result<()> {
        let mut kept = self.kept();
        loop {
            if kept.is_released(page) || kept.pages.contains_key(&page) {
                return Ok(());
            }
            if kept.pages.len() < self.max_kept {
                break;
            }
            let waited = self.room.wait_timeout(kept, PATIENCE);
            let (after, waited) = waited.unwrap_or_else(PoisonError::into_inner);
            if waited.timed_out() && after.pages.len() >= self.max_kept {
                ipc::helper::exit_now(OVERRUN_STATUS);
            }
            kept = after;
        }
        let mut content = Box::new([0; PAGE]);
        // Under the lock, so that the other process's guard cannot let a writer through meanwhile.
        memory.read_now(page * PAGE_BYTES, &mut content[..])?;
        let is_zero = is_zero(&content[..]);
        kept.pages.insert(page, (!is_zero).then_some(content));
        Ok(())
    }

    /// Lays what was put aside over what has just been read from `offset`.
    pub fn overlay(&self, offset: u64, bytes: &mut [u8]) {
        let end = offset + bytes.len() as u64;
        let kept = self.kept();
        for (page, content) in kept.pages.range(offset / PAGE_BYTES..end.div_ceil(PAGE_BYTES)) {
            let begin = (page * PAGE_BYTES).max(offset);
            let length = ((page + 1) * PAGE_BYTES).min(end) - begin;
            let target = &mut bytes[(begin - offset) as usize..][..length as usize];
            match content {
                Some(content) => target.copy_from_slice(&content[(begin % PAGE_BYTES) as usize..][..length as usize]),
                None => target.fill(0),
            }
        }
    }

    /// The dump has read this part of the memory fd and does not ask for it again.
    ///
    /// # Errors
    /// The system's.
    pub fn release(&self, offset: u64, bytes: u64) -> std::io::Result<()> {
        let pages = offset / PAGE_BYTES..(offset + bytes).div_ceil(PAGE_BYTES);
        self.kept().release(pages.clone());
        self.room.notify_all();
        for faults in &self.watched {
            faults.lift(pages.start * PAGE_BYTES, (pages.end - pages.start) * PAGE_BYTES)?;
        }
        Ok(())
    }
}

/// A piece with all of the pages that it has part in.
fn whole_pages(piece: &RamRegion) -> RamRegion {
    let offset = piece.offset / PAGE_BYTES * PAGE_BYTES;
    let end = (piece.offset + piece.bytes).next_multiple_of(PAGE_BYTES);
    RamRegion {
        guest_address: piece.guest_address - (piece.offset - offset),
        bytes: end - offset,
        offset,
    }
}

/// The guards: one thread for each process that may be watched, started before the seal.
pub struct Guards {
    orders: Vec<Sender<Arc<GuestMemory>>>,
    armed: Receiver<Result<(), Failure>>,
}

impl Guards {
    /// Starts the threads, which wait until there is something to guard.
    ///
    /// # Errors
    /// The system's.
    pub fn start() -> std::io::Result<Self> {
        let (report, armed) = queue();
        let mut orders = Vec::with_capacity(MAX_WATCHES);
        for watch in 0..MAX_WATCHES {
            let (order, ordered) = queue::<Arc<GuestMemory>>();
            let report = report.clone();
            std::thread::Builder::new()
                .name(format!("guard-{watch}"))
                .stack_size(crate::workers::STACK_BYTES)
                .spawn(move || {
                    report.send(Ok(()));
                    while let Some(memory) = ordered.recv() {
                        let Some(live) = memory.live() else { continue };
                        let result = live.arm(watch);
                        let is_armed = result.is_ok();
                        report.send(result);
                        if is_armed && let Err(error) = live.guard(watch, &memory) {
                            // The end of this process ends all protection.
                            ipc::helper::die(&format!("guarding guest memory: {error}"));
                        }
                    }
                })?;
            orders.push(order);
        }
        for _ in 0..MAX_WATCHES {
            armed.recv();
        }
        Ok(Self { orders, armed })
    }

    /// Protects the memory that is to be dumped, in all processes at once, and has faults served from then on.
    ///
    /// # Errors
    /// Why it could not be protected; some of it may be, until this process ends.
    pub fn arm(&self, memory: &Arc<GuestMemory>) -> Result<(), Failure> {
        let watches = memory.live().map_or(0, |live| live.watched.len());
        for order in &self.orders[..watches] {
            order.send(Arc::clone(memory));
        }
        let mut result = Ok(());
        for _ in 0..watches {
            let armed = self
                .armed
                .recv()
                .unwrap_or_else(|| Err(Failure::new("dump-proc: no guard")));
            result = result.and(armed);
        }
        result
    }
}

#[cfg(test)]
#[path = "live_test.rs"]
mod tests;
