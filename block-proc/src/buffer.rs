//! Memory that the kernel reads and writes: guest pages, and our own aligned buffers.
//!
//! The guest may change its pages at any time. Nothing here makes a Rust reference to them: they are raw segments for the
//! kernel, or are copied with volatile accesses.

use ipc::memory::GuestRam;
use smallvec::SmallVec;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

/// Most segments of one system call (IOV_MAX).
pub const MAX_SEGMENTS: usize = 1024;
/// Source of zeroes.
static ZEROES: [u8; 4096] = [0; 4096];
/// Alignment of our own buffers, bytes: enough for O_DIRECT on every disk.
const BUFFER_ALIGN: usize = 4096;

/// Our own memory: zeroed, aligned, of fixed size.
#[derive(Debug)]
pub struct Buffer {
    start: *mut u8,
    layout: Layout,
}

// SAFETY: the memory belongs to this value alone and is only touched by raw volatile copies and by the kernel.
unsafe impl Send for Buffer {}
// SAFETY: as above; there is no reference to the memory that a concurrent access could invalidate.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A buffer of `bytes` zeroes; at least one.
    pub fn new(bytes: usize) -> Arc<Self> {
        let layout = Layout::from_size_align(bytes.max(1), BUFFER_ALIGN).expect("buffer sizes are small constants");
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        Arc::new(Self { start, layout })
    }

    /// Size, bytes.
    pub fn bytes(&self) -> usize {
        self.layout.size()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout; segments that point here hold an Arc of it.
        unsafe { dealloc(self.start, self.layout) };
    }
}

/// A scatter list: at most [`MAX_SEGMENTS`] pieces of memory that stay valid as long as this value.
#[derive(Debug, Default, Clone)]
pub struct Segments {
    /// One needs no memory of its own. More are where they stay when this value moves.
    iovecs: SmallVec<[libc::iovec; 1]>,
    /// What `advance` has left behind.
    done: usize,
    bytes: u64,
    /// Keeps our own memory alive. Guest RAM is mapped for the life of the process.
    backing: Option<Arc<Buffer>>,
}

// SAFETY: the pointers go to memory that every thread may access and that nobody holds references to.
unsafe impl Send for Segments {}

impl Segments {
    /// Appends a piece of guest memory. `false` when it is not all RAM or there are too many pieces.
    #[must_use]
    pub fn push_guest(&mut self, memory: &'static GuestRam, address: GuestAddress, bytes: usize) -> bool {
        if bytes == 0 {
            return true;
        }
        let Ok(slice) = memory.get_slice(address, bytes) else {
            return false;
        };
        self.push(slice.ptr_guard_mut().as_ptr(), bytes)
    }

    fn push(&mut self, start: *mut u8, bytes: usize) -> bool {
        if self.iovecs.len() == MAX_SEGMENTS {
            return false;
        }
        self.iovecs.push(libc::iovec {
            iov_base: start.cast(),
            iov_len: bytes,
        });
        self.bytes += bytes as u64;
        true
    }

    /// The first `bytes` of a buffer (all of it, if it is shorter).
    pub fn of_buffer(buffer: &Arc<Buffer>, bytes: usize) -> Self {
        Self::repeating(buffer, bytes.min(buffer.bytes()))
    }

    /// `bytes` taken from the buffer over and over, up to [`MAX_SEGMENTS`] times.
    pub fn repeating(buffer: &Arc<Buffer>, bytes: usize) -> Self {
        let mut segments = Self {
            backing: Some(buffer.clone()),
            ..Self::default()
        };
        let mut left = bytes;
        while left > 0 {
            let piece = left.min(buffer.bytes());
            if !segments.push(buffer.start, piece) {
                break;
            }
            left -= piece;
        }
        segments
    }

    /// What is left of it, for the kernel.
    pub fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs[self.done..]
    }

    /// Bytes left.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether every piece starts and ends on a multiple of `align` bytes (a power of two).
    pub fn is_aligned(&self, align: usize) -> bool {
        self.iovecs()
            .iter()
            .all(|iovec| (iovec.iov_base as usize | iovec.iov_len) & (align - 1) == 0)
    }

    /// Leaves the first `bytes` behind.
    pub fn advance(&mut self, bytes: u64) {
        let mut left = bytes.min(self.bytes);
        self.bytes -= left;
        while left > 0 {
            let iovec = &mut self.iovecs[self.done];
            let piece = left.min(iovec.iov_len as u64);
            // The piece is not longer than iov_len, so it fits a usize and stays inside the segment.
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(piece as usize);
            iovec.iov_len -= piece as usize;
            if iovec.iov_len == 0 {
                self.done += 1;
            }
            left -= piece;
        }
    }

    /// Takes the first `bytes` (all, if there are fewer) off and returns them.
    #[must_use]
    pub fn split_to(&mut self, bytes: u64) -> Self {
        let mut front = Self {
            backing: self.backing.clone(),
            ..Self::default()
        };
        let mut left = bytes.min(self.bytes);
        for iovec in self.iovecs() {
            if left == 0 {
                break;
            }
            let piece = left.min(iovec.iov_len as u64);
            front.iovecs.push(libc::iovec {
                iov_base: iovec.iov_base,
                iov_len: piece as usize,
            });
            front.bytes += piece;
            left -= piece;
        }
        self.advance(front.bytes);
        front
    }

    /// Fills all that is left with zeroes.
    pub fn fill_zeroes(&self) {
        for slice in self.slices() {
            let mut at = 0;
            while at < slice.len() {
                let piece = ZEROES.len().min(slice.len() - at);
                // Inside the slice, by the line above.
                if let Ok(part) = slice.subslice(at, piece) {
                    part.copy_from(&ZEROES[..piece]);
                }
                at += piece;
            }
        }
    }

    /// Gives up the last byte.
    pub fn truncate_one(&mut self) {
        if let Some(last) = self.iovecs.last_mut() {
            last.iov_len -= 1;
            self.bytes -= 1;
            if last.iov_len == 0 {
                self.iovecs.pop();
            }
        }
    }

    /// Copies as much as fits, from the start of what is left of both. Moves neither.
    pub fn copy_to(&self, to: &Self) {
        let (mut from, mut to) = (self.slices(), to.slices());
        let (mut source, mut target) = (from.next(), to.next());
        while let (Some(s), Some(t)) = (source, target) {
            let piece = s.len().min(t.len());
            s.copy_to_volatile_slice(t);
            source = rest(s, piece).or_else(|| from.next());
            target = rest(t, piece).or_else(|| to.next());
        }
    }

    /// Copies bytes in, from the start of what is left; returns how many had room.
    pub fn fill_from(&self, bytes: &[u8]) -> usize {
        let mut copied = 0;
        for slice in self.slices() {
            let piece = slice.len().min(bytes.len() - copied);
            slice.copy_from(&bytes[copied..copied + piece]);
            copied += piece;
        }
        copied
    }

    /// Copies bytes out, from the start of what is left; returns how many there were. Each is read once.
    pub fn read_into(&self, bytes: &mut [u8]) -> usize {
        let mut copied = 0;
        for slice in self.slices() {
            let piece = slice.len().min(bytes.len() - copied);
            slice.copy_to(&mut bytes[copied..copied + piece]);
            copied += piece;
        }
        copied
    }

    fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.iovecs().iter().map(|iovec| {
            // SAFETY: the segment is valid as long as `self`, by the invariant of this type.
            unsafe { VolatileSlice::new(iovec.iov_base.cast(), iovec.iov_len) }
        })
    }
}

fn rest(slice: VolatileSlice<'_>, done: usize) -> Option<VolatileSlice<'_>> {
    (done < slice.len()).then(|| slice.offset(done).ok()).flatten()
}

/// Size of a bounce buffer, bytes: larger requests go in steps.
pub const BOUNCE_BYTES: usize = 256 << 10;
/// How many bounce buffers there may be: what a guest can make us allocate is bounded by it.
const MAX_BOUNCE_BUFFERS: usize = 16;

/// The bounce buffers of the data plane's thread.
#[derive(Debug)]
pub struct BouncePool {
    state: RefCell<BounceState>,
    bytes: usize,
    most: usize,
}

impl Default for BouncePool {
    fn default() -> Self {
        Self::of(BOUNCE_BYTES, MAX_BOUNCE_BUFFERS)
    }
}

#[derive(Debug, Default)]
struct BounceState {
    free: Vec<Arc<Buffer>>,
    made: usize,
    waiting: VecDeque<Waker>,
}

/// A bounce buffer on loan.
#[derive(Debug)]
pub struct Bounce {
    buffer: Arc<Buffer>,
    pool: Rc<BouncePool>,
}

impl Bounce {
    /// The memory.
    pub fn buffer(&self) -> &Arc<Buffer> {
        &self.buffer
    }
}

impl BouncePool {
    /// At most so many buffers of so many bytes; by default of [`BOUNCE_BYTES`].
    pub fn of(bytes: usize, most: usize) -> Self {
        Self {
            state: RefCell::default(),
            bytes,
            most,
        }
    }

    /// Waits for a buffer. A task must not hold two.
    pub async fn take(self: &Rc<Self>) -> Bounce {
        poll_fn(|context| {
            let mut state = self.state.borrow_mut();
            let buffer = match state.free.pop() {
                Some(buffer) => buffer,
                None if state.made < self.most => {
                    state.made += 1;
                    Buffer::new(self.bytes)
                }
                None => {
                    state.waiting.push_back(context.waker().clone());
                    return Poll::Pending;
                }
            };
            Poll::Ready(Bounce {
                buffer,
                pool: self.clone(),
            })
        })
        .await
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        let mut state = self.pool.state.borrow_mut();
        state.free.push(self.buffer.clone());
        // All, because the first may no longer want it; who comes too late waits again.
        state.waiting.drain(..).for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copying_crosses_segment_borders_and_advancing_leaves_the_rest() {
        let from = Buffer::new(8);
        Segments::of_buffer(&from, 8).fill_from(b"abcdefgh");
        let mut source = Segments::repeating(&from, 20);
        source.advance(3);
        let target = Buffer::new(16);
        let mut pieces = Segments::default();
        assert!(pieces.push(target.start, 5));
        assert!(pieces.push(target.start.wrapping_add(5), 7));
        source.copy_to(&pieces);
        let mut bytes = [0; 12];
        assert_eq!(pieces.read_into(&mut bytes), 12);
        assert_eq!(&bytes, b"defghabcdefg");
        source.advance(100);
        assert_eq!((source.bytes(), source.iovecs().len()), (0, 0));
    }

    #[test]
    fn splitting_gives_the_front_away_and_keeps_the_rest() {
        let buffer = Buffer::new(8);
        let mut rest = Segments::repeating(&buffer, 20);
        Segments::of_buffer(&buffer, 8).fill_from(b"abcdefgh");
        let front = rest.split_to(11);
        let mut bytes = [0; 20];
        assert_eq!(front.read_into(&mut bytes), 11);
        assert_eq!(&bytes[..11], b"abcdefghabc");
        assert_eq!(rest.read_into(&mut bytes), 9);
        assert_eq!(&bytes[..9], b"defghabcd");
        assert_eq!((front.bytes(), rest.bytes(), rest.split_to(100).bytes()), (11, 9, 9));
        Segments::of_buffer(&buffer, 3).fill_zeroes();
        Segments::of_buffer(&buffer, 8).read_into(&mut bytes);
        assert_eq!(&bytes[..8], b"\0\0\0defgh");
    }

    #[test]
    fn alignment_looks_at_starts_and_lengths() {
        let buffer = Buffer::new(4096);
        assert!(Segments::of_buffer(&buffer, 1024).is_aligned(512));
        assert!(!Segments::of_buffer(&buffer, 1000).is_aligned(512));
        let mut segments = Segments::of_buffer(&buffer, 1024);
        segments.advance(8);
        assert!(!segments.is_aligned(512));
    }
}
