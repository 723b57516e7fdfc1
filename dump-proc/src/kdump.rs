//! The kdump-compressed format: every page by itself, in any order, with a descriptor that says where it is.
//!
//! Because the order is free, workers on all processors take chunks of memory from a counter, compress them, take room in
//! the output from another counter and write there; nobody waits for anybody. Pages of zeroes have one copy between them,
//! and memory that the guest never touched is not even looked at. What precedes the pages is written last when it needs the
//! guest's note and the guest has not said where that is: it is found on the way.

pub mod header;
pub mod sink;

use crate::codec::{self, Codec, PAGE};
use crate::elf::{DumpError, Meter, notes};
use crate::exclude;
use crate::kernel;
use crate::memory::GuestMemory;
use crate::output::is_zero;
use crate::vmcoreinfo::{self, Note, Search};
use crate::workers::{FirstError, Task, Workers};
use header::{About, Descriptor, Layout};
use ipc::dump::{Compressor, DumpOutput, Exclude};
use ipc::paging::Paging;
use ipc::vcpu::{VcpuRegisters, VmCoreInfo};
use sink::Sink;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use zerocopy::IntoBytes;

/// What a dump is made of.
pub struct Sources<'a> {
    /// Guest RAM.
    pub memory: &'a Arc<GuestMemory>,
    /// Of every vCPU.
    pub registers: &'a [VcpuRegisters],
    /// Where the guest says that its note is.
    pub vmcoreinfo: Option<VmCoreInfo>,
    /// What is left out.
    pub exclude: Exclude,
}

/// Writes the dump and closes `output`; returns how many bytes of guest memory are in it. `progress` is told bytes done and
/// in all.
///
/// # Errors
/// See [`DumpError`]. What was written stays.
pub fn write(
    sources: &Sources<'_>,
    compressor: Compressor,
    flattened: bool,
    output: DumpOutput,
    workers: &Workers,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64, DumpError> {
    let Sources {
        memory,
        registers,
        vmcoreinfo,
        exclude,
    } = *sources;
    let vcpus: Vec<Paging> = registers.iter().map(Paging::from).collect();
    let said = vmcoreinfo::said(memory, vmcoreinfo).map_err(DumpError::Read)?;
    // The head can be written last, and then all that is read may tell what is in it. What a live dump has read is not the
    // memory of one instant any more.
    let needs_search = said.is_none();
    let is_late = needs_search && !exclude.drops_pages() && memory.live().is_none();
    let note = match said {
        None if !is_late => vmcoreinfo::find(memory, &vcpus, workers).map_err(DumpError::Read)?,
        note => note,
    };
    let kept = match exclude.drops_pages() {
        true => Some(Arc::new(exclude::kept(memory, note.as_ref(), &vcpus, &exclude)?)),
        false => None,
    };
    // A dump looks the same whenever the note is found.
    let notes_bytes = match needs_search {
        true => notes(registers, None).len() as u64 + LATE_ROOM,
        false => notes(registers, note.as_ref()).len() as u64,
    };
    let layout = Layout::new(memory.pieces(None), notes_bytes, kept);
    let total = layout.regions().iter().map(|region| region.bytes).sum();
    let mut meter = Meter::new(total, progress);
    let sink = if flattened {
        Sink::records(output.fd)
    } else {
        Sink::file(output.fd)
    };
    let head = |layout: &Layout, note: Option<&Note>| {
        let about = about(memory, registers, note, exclude.level()).map_err(DumpError::Read)?;
        let notes = notes(registers, note);
        Ok(layout.encode(codec::flag(compressor), registers.len() as u32, &about, &notes))
    };
    let sink = sink.map_err(DumpError::Header)?;
    // The first byte of a file comes last: half a dump that a machine leaves behind which was killed is taken for none.
    let is_file = sink.is_file();
    let mut first = match is_late {
        true => Vec::new(),
        false => head(&layout, note.as_ref())?,
    };
    if let Some(byte) = first.first_mut().filter(|_| is_file) {
        *byte = 0;
    }
    let search = is_late.then(|| Search::new(&vcpus));
    let job = Job::begin(layout, &first, sink, compressor, search)?;
    let written = workers.run(job, memory, &mut |done| meter.set(done));
    written.finish(|layout, found| match (found, is_late || is_file) {
        (_, false) => Ok(Vec::new()),
        (Some(found), _) => head(layout, Some(found)),
        (None, _) => head(layout, note.as_ref()),
    })?;
    meter.set(total);
    Ok(total)
}

/// By how much a note that is found later can lengthen the notes, bytes: its text is less than a page.
const LATE_ROOM: u64 = 2 * PAGE_BYTES;

fn notes(registers: &[VcpuRegisters], note: Option<&Note>) -> Vec<u8> {
    notes::encode(registers, note.map(|note| note.text.as_slice()))
}

fn about(memory: &GuestMemory, registers: &[VcpuRegisters], note: Option<&Note>, level: u32) -> std::io::Result<About> {
    let mut about = About {
        level,
        ..About::default()
    };
    if let Some(note) = note {
        about.names = note.read_names(memory)?;
        // The last of the notes, padded.
        let text = note.text.len() as u64;
        let notes_bytes = notes(registers, Some(note)).len() as u64;
        about.vmcoreinfo = Some((notes_bytes - text.next_multiple_of(4), text));
    }
    about.phys_base = match note.and_then(|note| note.number("NUMBER(phys_base)")) {
        Some(said) => said,
        None => kernel::phys_base(memory, registers)?.unwrap_or_default(),
    };
    Ok(about)
}

/// One read of guest memory, bytes.
const READ_BYTES: u64 = 256 << 10;
/// Pages of a chunk: 2 MiB.
const CHUNK_PAGES: u64 = 512;
const PAGE_BYTES: u64 = PAGE as u64;
/// Stands for the offset of the page of zeroes while a chunk is being made.
const ZEROES: u64 = u64::MAX;

/// A dump that is being written, shared by all workers.
pub struct Job {
    layout: Layout,
    sink: Sink,
    compressor: Compressor,
    /// Who looks for the guest's note meanwhile; what precedes the pages is written last then.
    search: Option<Search>,
    /// The next chunk that nobody has.
    next_chunk: AtomicU64,
    /// Where the next pages go.
    end: AtomicU64,
    pages_done: AtomicU64,
    failed: AtomicBool,
    error: FirstError<DumpError>,
}

/// Part of a piece of RAM.
struct Chunk {
    /// Number of its first page among those that exist.
    first_page: u64,
    guest_address: u64,
    /// Offset in the memory fd.
    offset: u64,
    pages: u64,
}

/// What a worker uses from chunk to chunk.
struct Scratch {
    codec: Box<dyn Codec>,
    memory: Vec<u8>,
    out: Vec<u8>,
    descriptors: Vec<Descriptor>,
}

impl Job {
    /// Writes what precedes the pages. `head` is [`Layout::encode`]'s, or nothing when that is to come later.
    ///
    /// # Errors
    /// The output's.
    fn begin(
        layout: Layout,
        head: &[u8],
        sink: Sink,
        compressor: Compressor,
        search: Option<Search>,
    ) -> Result<Self, DumpError> {
        if !head.is_empty() {
            sink.put(0, head).map_err(DumpError::Header)?;
        }
        layout
            .bitmaps(|offset, bytes| sink.put(offset, bytes))
            .map_err(DumpError::Header)?;
        let zero_page = layout.zero_page_offset();
        sink.put(zero_page, &[0; PAGE]).map_err(DumpError::Memory)?;
        Ok(Self {
            layout,
            sink,
            compressor,
            search,
            next_chunk: AtomicU64::new(0),
            end: AtomicU64::new(zero_page + PAGE_BYTES),
            pages_done: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            error: FirstError::default(),
        })
    }

    /// When all workers have stopped. `head` is what precedes the pages, with the note that was found, or nothing when that is
    /// there already.
    ///
    /// # Errors
    /// The first worker's.
    fn finish(self, head: impl FnOnce(&Layout, Option<&Note>) -> Result<Vec<u8>, DumpError>) -> Result<(), DumpError> {
        self.error.check()?;
        let found = self.search.and_then(Search::finish);
        let head = head(&self.layout, found.as_ref())?;
        if !head.is_empty() {
            self.sink.put(0, &head).map_err(DumpError::Header)?;
        }
        self.sink.finish(self.end.into_inner()).map_err(DumpError::Memory)
    }

    fn chunk(&self, mut number: u64) -> Option<Chunk> {
        let mut first_page = 0;
        for region in self.layout.regions() {
            let pages = region.bytes / PAGE_BYTES;
            let chunks = pages.div_ceil(CHUNK_PAGES);
            if number < chunks {
                let skipped = number * CHUNK_PAGES;
                return Some(Chunk {
                    first_page: first_page + skipped,
                    guest_address: region.guest_address + skipped * PAGE_BYTES,
                    offset: region.offset + skipped * PAGE_BYTES,
                    pages: CHUNK_PAGES.min(pages - skipped),
                });
            }
            number -= chunks;
            first_page += pages;
        }
        None
    }

    fn write(&self, memory: &GuestMemory, chunk: &Chunk, scratch: &mut Scratch) -> Result<(), DumpError> {
        let Scratch {
            codec,
            memory: bytes,
            out,
            descriptors,
        } = scratch;
        out.clear();
        descriptors.clear();
        let zeroes = Descriptor {
            offset: ZEROES,
            bytes: PAGE as u32,
            flags: 0,
            page_flags: 0,
        };
        let flag = codec::flag(self.compressor);
        let (mut offset, end) = (chunk.offset, chunk.offset + chunk.pages * PAGE_BYTES);
        while offset < end {
            // As much as stays in the cache until it is compressed.
            let near = end.min(offset + READ_BYTES);
            let extent = memory.extent(offset, near).map_err(DumpError::Read)?;
            let pages = offset / PAGE_BYTES..(offset + extent.bytes) / PAGE_BYTES;
            offset += extent.bytes;
            if !extent.is_data {
                let count = self.layout.rank(pages.end) - self.layout.rank(pages.start);
                descriptors.resize(descriptors.len() + count as usize, zeroes);
                continue;
            }
            let data = &mut bytes[..extent.bytes as usize];
            memory.read(offset - extent.bytes, data).map_err(DumpError::Read)?;
            if let Some(search) = &self.search {
                let address = chunk.guest_address + (offset - extent.bytes - chunk.offset);
                search.look(memory, address, data).map_err(DumpError::Read)?;
            }
            for (number, page) in pages.zip(data.as_chunks::<PAGE>().0) {
                if !self.layout.has(number) {
                    continue;
                }
                if is_zero(page) {
                    descriptors.push(zeroes);
                    continue;
                }
                let begin = out.len();
                let mut flags = flag;
                if !codec.compress(page, out) || out.len() - begin >= PAGE {
                    out.truncate(begin);
                    out.extend_from_slice(page);
                    flags = 0;
                }
                descriptors.push(Descriptor {
                    // From the start of this chunk's room, until that is known.
                    offset: begin as u64,
                    bytes: (out.len() - begin) as u32,
                    flags,
                    page_flags: 0,
                });
            }
        }
        memory
            .release(chunk.offset, chunk.pages * PAGE_BYTES)
            .map_err(DumpError::Read)?;
        let room = if out.is_empty() {
            0
        } else {
            let room = self.end.fetch_add(out.len() as u64, Ordering::Relaxed);
            self.sink.put(room, out).map_err(DumpError::Memory)?;
            room
        };
        for descriptor in descriptors.iter_mut() {
            descriptor.offset = match descriptor.offset {
                ZEROES => self.layout.zero_page_offset(),
                into => room + into,
            };
        }
        if descriptors.is_empty() {
            return Ok(());
        }
        let table = self.layout.descriptor_offset(self.layout.rank(chunk.first_page));
        self.sink.put(table, descriptors.as_bytes()).map_err(DumpError::Memory)
    }
}

impl Task for Job {
    fn work(&self, memory: &GuestMemory, each: &mut dyn FnMut(u64)) {
        let mut scratch = Scratch {
            codec: codec::new(self.compressor),
            memory: vec![0; READ_BYTES as usize],
            // A page that grows is noticed when it has grown.
            out: Vec::with_capacity(((CHUNK_PAGES + 2) * PAGE_BYTES) as usize),
            descriptors: Vec::with_capacity(CHUNK_PAGES as usize),
        };
        while !self.failed.load(Ordering::Relaxed) {
            let Some(chunk) = self.chunk(self.next_chunk.fetch_add(1, Ordering::Relaxed)) else {
                return;
            };
            if let Err(error) = self.write(memory, &chunk, &mut scratch) {
                self.failed.store(true, Ordering::Relaxed);
                self.error.set(error);
                return;
            }
            let done = self.pages_done.fetch_add(chunk.pages, Ordering::Relaxed) + chunk.pages;
            each(done * PAGE_BYTES);
        }
    }
}
