//! A cache of metadata tables, in slices: whole tables of large clusters would be megabytes.
//!
//! Slices are found by their offset in the image. Nobody keeps one over an await: who comes back from waiting asks again.
//! Changed slices stay until they are written; the limit counts them, and who changes much is made to write
//! ([`Cache::is_strained`]).

use super::io;
use crate::node::Node;
use crate::node::event::{Event, say};
use nix::errno::Errno;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

struct Slice {
    bytes: Vec<u8>,
    dirty: bool,
    /// Being written: not to be forgotten, because a reader would find the old one.
    writing: bool,
    /// When it was last used.
    used: u64,
}

#[derive(Default)]
struct State {
    slices: BTreeMap<u64, Slice>,
    by_use: BTreeMap<u64, u64>,
    /// Who waits for a slice that is being read.
    loading: BTreeMap<u64, Vec<Waker>>,
    clock: u64,
    dirty: usize,
}

/// See the module.
pub struct Cache {
    child: Rc<dyn Node>,
    slice_bytes: u64,
    limit: usize,
    events: Events,
    state: RefCell<State>,
}

/// What is said to the child before slices are read and written.
#[derive(Debug, Clone, Copy)]
pub struct Events {
    /// Before reading.
    pub load: Event,
    /// Before writing.
    pub update: Event,
}

impl Events {
    /// For L2 tables.
    pub const L2: Self = Self {
        load: Event::L2Load,
        update: Event::L2Update,
    };
    /// For refcount blocks.
    pub const REFCOUNTS: Self = Self {
        load: Event::RefblockLoad,
        update: Event::RefblockUpdatePart,
    };
}

impl State {
    fn touch(&mut self, offset: u64) -> Option<&mut Slice> {
        let slice = self.slices.get_mut(&offset)?;
        self.clock += 1;
        self.by_use.remove(&slice.used);
        self.by_use.insert(self.clock, offset);
        slice.used = self.clock;
        Some(slice)
    }
}

/// Keeps the promise that a slice being read is waited for, also when the reader's task is dropped.
struct Loading<'a>(&'a Cache, u64);

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        let waiting = self.0.state.borrow_mut().loading.remove(&self.1);
        waiting.into_iter().flatten().for_each(Waker::wake);
    }
}

impl Cache {
    /// A cache of at most `limit` slices, apart from changed ones.
    pub fn new(child: Rc<dyn Node>, slice_bytes: u64, limit: usize, events: Events) -> Self {
        Self {
            child,
            slice_bytes,
            limit: limit.max(2),
            events,
            state: RefCell::default(),
        }
    }

    /// The slice that an offset lies in, and the position in it.
    pub fn place(&self, offset: u64) -> (u64, usize) {
        let at = offset % self.slice_bytes;
        (offset - at, at as usize)
    }

    /// Size of a slice, bytes.
    pub fn slice_bytes(&self) -> u64 {
        self.slice_bytes
    }

    /// Looks into a slice, if it is here.
    pub fn look<R>(&self, slice: u64, look: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let mut state = self.state.borrow_mut();
        Some(look(&state.touch(slice)?.bytes))
    }

    /// Changes a slice, if it is here.
    pub fn change<R>(&self, slice: u64, change: impl FnOnce(&mut [u8]) -> R) -> Option<R> {
        let mut state = self.state.borrow_mut();
        let found = state.touch(slice)?;
        let was_dirty = std::mem::replace(&mut found.dirty, true);
        let result = change(&mut found.bytes);
        state.dirty += usize::from(!was_dirty);
        Some(result)
    }

    /// Looks into a slice, once it is here.
    ///
    /// # Errors
    /// The child's.
    pub async fn read<R>(&self, slice: u64, mut look: impl FnMut(&[u8]) -> R) -> Result<R, Errno> {
        loop {
            if let Some(result) = self.look(slice, &mut look) {
                return Ok(result);
            }
            self.load(slice).await?;
        }
    }

    /// Brings a slice in.
    ///
    /// # Errors
    /// The child's.
    pub async fn load(&self, slice: u64) -> Result<(), Errno> {
        let mut waited = false;
        poll_fn(|context| match self.state.borrow_mut().loading.get_mut(&slice) {
            Some(waiting) => {
                waited = true;
                waiting.push(context.waker().clone());
                Poll::Pending
            }
            None => Poll::Ready(()),
        })
        .await;
        // Whoever waited looks again: it may be here, or is to be tried once more.
        if waited || self.state.borrow().slices.contains_key(&slice) {
            return Ok(());
        }
        self.state.borrow_mut().loading.insert(slice, Vec::new());
        let loading = Loading(self, slice);
        say(&*self.child, self.events.load).await;
        let bytes = io::read(&*self.child, slice, self.slice_bytes as usize).await?;
        self.insert(slice, bytes, false);
        drop(loading);
        Ok(())
    }

    /// Puts a slice in the cache.
    pub fn insert(&self, slice: u64, bytes: Vec<u8>, dirty: bool) {
        self.forget(slice..slice + 1);
        self.make_room();
        let mut state = self.state.borrow_mut();
        state.clock += 1;
        let used = state.clock;
        state.by_use.insert(used, slice);
        state.dirty += usize::from(dirty);
        state.slices.insert(
            slice,
            Slice {
                bytes,
                dirty,
                writing: false,
                used,
            },
        );
    }

    /// Drops slices: their cluster has another use now.
    pub fn forget(&self, range: std::ops::Range<u64>) {
        let mut state = self.state.borrow_mut();
        let gone: Vec<u64> = state.slices.range(range).map(|(offset, _)| *offset).collect();
        for offset in gone {
            if let Some(slice) = state.slices.remove(&offset) {
                state.by_use.remove(&slice.used);
                state.dirty -= usize::from(slice.dirty);
            }
        }
    }

    fn make_room(&self) {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        if state.slices.len() < self.limit {
            return;
        }
        let oldest = state.by_use.iter().find_map(|(used, offset)| {
            let slice = state.slices.get(offset)?;
            (!slice.dirty && !slice.writing).then_some((*used, *offset))
        });
        if let Some((used, offset)) = oldest {
            state.by_use.remove(&used);
            state.slices.remove(&offset);
        }
    }

    /// Whether so much is changed that it should be written.
    pub fn is_strained(&self) -> bool {
        self.state.borrow().dirty > self.limit / 2
    }

    /// Whether anything is changed.
    pub fn is_dirty(&self) -> bool {
        self.state.borrow().dirty > 0
    }

    /// Copies of the changed slices, which count as being written until [`Self::written`].
    pub fn take_dirty(&self) -> Vec<(u64, Vec<u8>)> {
        let mut state = self.state.borrow_mut();
        state.dirty = 0;
        state
            .slices
            .iter_mut()
            .filter(|(_, slice)| slice.dirty)
            .map(|(offset, slice)| {
                slice.dirty = false;
                slice.writing = true;
                (*offset, slice.bytes.clone())
            })
            .collect()
    }

    /// Writes what [`Self::take_dirty`] gave. Neighbours go together.
    ///
    /// # Errors
    /// The child's.
    pub async fn write(&self, taken: &[(u64, Vec<u8>)]) -> Result<(), Errno> {
        let mut at = 0;
        while at < taken.len() {
            let start = taken[at].0;
            let mut run = Vec::new();
            while at < taken.len() && taken[at].0 == start + run.len() as u64 && run.len() < MAX_WRITE_BYTES {
                run.extend_from_slice(&taken[at].1);
                at += 1;
            }
            say(&*self.child, self.events.update).await;
            io::write(&*self.child, start, &run).await?;
        }
        Ok(())
    }

    /// The writing is over: what failed is changed still.
    pub fn written(&self, taken: &[(u64, Vec<u8>)], success: bool) {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        for (offset, _) in taken {
            if let Some(slice) = state.slices.get_mut(offset) {
                slice.writing = false;
                if !success && !slice.dirty {
                    slice.dirty = true;
                    state.dirty += 1;
                }
            }
        }
    }

    /// How many slices are in memory.
    pub fn slices(&self) -> usize {
        self.state.borrow().slices.len()
    }
}

/// Largest write of neighbouring slices, bytes.
const MAX_WRITE_BYTES: usize = 1 << 20;
