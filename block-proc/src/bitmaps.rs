//! Dirty bitmaps as clients know them: which parts of a node were written to since somebody asked.
//!
//! A bitmap belongs to a node. Every write, write of zeroes and discard that goes to the node sets bits, before the request
//! begins: so a bit is never missing, whatever becomes of the request.
//!
//! While a job works with a bitmap, what is dirty in it is frozen, and new writes are collected apart. What becomes of the
//! two is said when the job ends ([`EndOfUse`]).

use crate::bitmap::Bitmap;
use ipc::Failure;
use ipc::block_job::BitmapReport;
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

/// Most memory for the bits of one bitmap, bytes.
pub const MAX_BITS_BYTES: u64 = 64 << 20;

/// A bitmap that its node, its users and its image share.
pub type SharedBitmap = Rc<RefCell<DirtyBitmap>>;

/// Memory for the bits of a bitmap, bytes.
pub fn bits_bytes(bytes: u64, granularity: u64) -> u64 {
    bytes.div_ceil(granularity).div_ceil(8)
}

/// Checks that a bitmap of a disk needs no more memory than there may be.
///
/// # Errors
/// When it does: says which granularity would do.
pub fn check_size(bytes: u64, granularity: u64) -> Result<(), Failure> {
    if bits_bytes(bytes, granularity) <= MAX_BITS_BYTES {
        return Ok(());
    }
    let enough = bytes.div_ceil(MAX_BITS_BYTES * 8).next_power_of_two();
    Err(Failure::new(format!(
        "A bitmap of {bytes} bytes with a granularity of {granularity} needs more than {} MiB of memory: choose a granularity \
         of {enough} or more",
        MAX_BITS_BYTES >> 20
    )))
}

/// What becomes of a bitmap that a job has worked with.
#[derive(Debug, Clone, Copy)]
pub enum EndOfUse<'a> {
    /// It is as if there had been no job: what was frozen and what was written since are dirty.
    Keep,
    /// What was frozen is clean, but for what the job has left undone.
    Drop {
        /// What it has left, if it has.
        left: Option<&'a Bitmap>,
    },
}

/// See the module.
#[derive(Debug)]
pub struct DirtyBitmap {
    bits: Bitmap,
    enabled: bool,
    /// Name in its image, if it is kept there.
    persistent: Option<String>,
    /// What is written while a job works with it.
    apart: Option<Bitmap>,
    inconsistent: bool,
    /// What it was before the first change that can be undone.
    before: Option<Bitmap>,
    /// Its image has something else, other than by a write.
    changed: bool,
}

impl DirtyBitmap {
    /// A bitmap with these bits.
    pub fn new(bits: Bitmap, enabled: bool, persistent: Option<String>) -> Self {
        Self {
            bits,
            enabled,
            persistent,
            apart: None,
            inconsistent: false,
            before: None,
            changed: false,
        }
    }

    /// One that cannot be trusted.
    pub fn inconsistent(bytes: u64, granularity: u64, persistent: Option<String>) -> Self {
        Self {
            inconsistent: true,
            ..Self::new(Bitmap::new(bytes, granularity), false, persistent)
        }
    }

    /// What is dirty. While a job works with it: what was dirty when it began.
    pub fn bits(&self) -> &Bitmap {
        &self.bits
    }

    /// Name under which its image keeps it.
    pub fn persistent(&self) -> Option<&str> {
        self.persistent.as_deref()
    }

    /// A job works with it.
    pub fn is_busy(&self) -> bool {
        self.apart.is_some()
    }

    /// It cannot be trusted, only removed.
    pub fn is_inconsistent(&self) -> bool {
        self.inconsistent
    }

    /// Writes make it dirty.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// A job begins to work with it: its bits stay as they are until [`Self::end_use`].
    ///
    /// # Errors
    /// When another one does, or it cannot be trusted.
    pub fn begin_use(&mut self) -> Result<(), Failure> {
        self.check_free()?;
        self.apart = Some(Bitmap::new(self.bits.bytes(), self.bits.granularity()));
        Ok(())
    }

    /// The job is done with it.
    pub fn end_use(&mut self, end: EndOfUse<'_>) {
        let Some(mut apart) = self.apart.take() else { return };
        self.changed = true;
        match end {
            EndOfUse::Keep => self.bits.merge(&apart),
            EndOfUse::Drop { left } => {
                if let Some(left) = left {
                    apart.merge(left);
                }
                self.bits = apart;
            }
        }
    }

    /// What is dirty, with what was written while a job works with it: what its image keeps if nobody asks again.
    pub fn all_bits(&self) -> Bitmap {
        let mut bits = self.bits.clone();
        if let Some(apart) = &self.apart {
            bits.merge(apart);
        }
        bits
    }

    /// A range of the node is about to change.
    pub fn record(&mut self, range: Range<u64>) {
        if !self.enabled {
            return;
        }
        if range.end > self.bits.bytes() {
            // A file that grows with what is written to it.
            self.resize(range.end);
        }
        self.apart.as_mut().unwrap_or(&mut self.bits).set(range);
    }

    /// The node has another size.
    pub fn resize(&mut self, bytes: u64) {
        if bytes == self.bits.bytes() || self.inconsistent {
            return;
        }
        self.before = None;
        if check_size(bytes, self.bits.granularity()).is_err() {
            // Nobody is there to be told. It says itself that it is worth nothing.
            self.bits = Bitmap::new(self.bits.bytes(), self.bits.granularity());
            (self.inconsistent, self.enabled) = (true, false);
            return;
        }
        self.bits.resize(bytes);
        if let Some(apart) = &mut self.apart {
            apart.resize(bytes);
        }
    }

    /// What it is now.
    pub fn report(&self) -> BitmapReport {
        BitmapReport {
            dirty_bytes: self.bits.dirty_bytes(),
            granularity: self.bits.granularity() as u32,
            enabled: self.enabled,
            busy: self.is_busy(),
            inconsistent: self.inconsistent,
            apart_bytes: self.apart.as_ref().map(Bitmap::dirty_bytes),
        }
    }

    /// Checks that it can be changed.
    ///
    /// # Errors
    /// When a job works with it, or it cannot be trusted.
    pub fn check_free(&self) -> Result<(), Failure> {
        if self.is_busy() {
            return Err(Failure::new("the bitmap is in use by a job"));
        }
        if self.inconsistent {
            return Err(Failure::new("the bitmap is inconsistent"));
        }
        Ok(())
    }

    /// Nothing is dirty any more.
    pub fn clear(&mut self) {
        self.changed = true;
        let clean = Bitmap::new(self.bits.bytes(), self.bits.granularity());
        let before = std::mem::replace(&mut self.bits, clean);
        self.before.get_or_insert(before);
    }

    /// What is dirty in other bits is so here as well.
    pub fn merge(&mut self, other: &Bitmap) {
        self.changed = true;
        if self.before.is_none() {
            self.before = Some(self.bits.clone());
        }
        self.bits.merge(other);
    }

    /// Undoes what was cleared and merged since [`Self::forget_before`], as if nothing had been written meanwhile.
    pub fn restore(&mut self) {
        if let Some(before) = self.before.take() {
            self.bits = before;
        }
    }

    /// What was done stays so.
    pub fn forget_before(&mut self) {
        self.before = None;
    }

    /// Whether writes make it dirty.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// Whether its image has something else, other than by a write. From now on it has not.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }
}
