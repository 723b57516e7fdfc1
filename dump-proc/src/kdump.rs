//! The kdump-compressed format: every page by itself, in any order, with a descriptor that says where it is.
//!
//! Because the order is free, workers on all processors take chunks of memory from a counter, compress them, take room in
//! the output from another counter and write there; nobody waits for anybody. Pages of zeroes have one copy between them,
//! and memory that the guest never touched is not even looked at.

pub mod header;
pub mod sink;

use crate::codec::{self, Codec, PAGE};
use crate::elf::{DumpError, Meter, notes};
use crate::memory::GuestMemory;
use crate::output::is_zero;
use crate::vmcoreinfo;
use crate::workers::Workers;
use header::{About, Descriptor, Layout};
use ipc::dump::{Compressor, DumpOutput};
use ipc::paging::Paging;
use ipc::vcpu::{VcpuRegisters, VmCoreInfo};
use sink::Sink;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use zerocopy::IntoBytes;

/// What a dump is made of.
pub struct Sources<'a> {
    /// Guest RAM.
    pub memory: &'a Arc<GuestMemory>,
    /// Of every vCPU.
    pub registers: &'a [VcpuRegisters],
    /// Where the guest says that its note is.
    pub vmcoreinfo: Option<VmCoreInfo>,
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
    } = *sources;
    let vcpus: Vec<Paging> = registers.iter().map(Paging::from).collect();
    let note = vmcoreinfo::find(memory, vmcoreinfo, &vcpus).map_err(DumpError::Read)?;
    let notes = notes::encode(registers, note.as_ref().map(|note| note.text.as_slice()));
    let mut about = About::default();
    if let Some(note) = &note {
        about.names = note.read_names(memory).map_err(DumpError::Read)?;
        about.phys_base = note.number("NUMBER(phys_base)").unwrap_or_default();
        // The last of the notes, padded.
        let text = note.text.len() as u64;
        about.vmcoreinfo = Some((notes.len() as u64 - text.next_multiple_of(4), text));
    }
    let layout = Layout::new(memory.pieces(None), notes.len() as u64);
    let total = layout.regions().iter().map(|region| region.bytes).sum();
    let mut meter = Meter::new(total, progress);
    let sink = if flattened {
        Sink::records(output.fd)
    } else {
        Sink::file(output.fd)
    };
    let head = layout.encode(codec::flag(compressor), registers.len() as u32, &about, &notes);
    let job = Job::begin(layout, &head, sink.map_err(DumpError::Header)?, compressor)?;
    workers.run(job, memory, |done| meter.set(done)).finish()?;
    meter.set(total);
    Ok(total)
}

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
    /// The next chunk that nobody has.
    next_chunk: AtomicU64,
    /// Where the next pages go.
    end: AtomicU64,
    pages_done: AtomicU64,
    failed: AtomicBool,
    error: Mutex<Option<DumpError>>,
}

/// Part of a piece of RAM.
struct Chunk {
    /// Number of its first page among those that exist.
    first_page: u64,
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
    /// Writes what precedes the pages. `head` is [`Layout::encode`]'s.
    ///
    /// # Errors
    /// The output's.
    fn begin(layout: Layout, head: &[u8], sink: Sink, compressor: Compressor) -> Result<Self, DumpError> {
        sink.put(0, head).map_err(DumpError::Header)?;
        layout
            .bitmaps(|offset, bytes| sink.put(offset, bytes))
            .map_err(DumpError::Header)?;
        let zero_page = layout.zero_page_offset();
        sink.put(zero_page, &[0; PAGE]).map_err(DumpError::Memory)?;
        Ok(Self {
            layout,
            sink,
            compressor,
            next_chunk: AtomicU64::new(0),
            end: AtomicU64::new(zero_page + PAGE_BYTES),
            pages_done: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            error: Mutex::new(None),
        })
    }

    /// Takes part until nothing is left or somebody has failed. `each` is told bytes of memory done by all.
    pub fn work(&self, memory: &GuestMemory, mut each: impl FnMut(u64)) {
        let mut scratch = Scratch {
            codec: codec::new(self.compressor),
            memory: vec![0; (CHUNK_PAGES * PAGE_BYTES) as usize],
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
                let mut first = self.error.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert(error);
                return;
            }
            let done = self.pages_done.fetch_add(chunk.pages, Ordering::Relaxed) + chunk.pages;
            each(done * PAGE_BYTES);
        }
    }

    /// When all workers have stopped.
    ///
    /// # Errors
    /// The first worker's.
    fn finish(self) -> Result<(), DumpError> {
        if let Some(error) = self.error.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
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
            let extent = memory.extent(offset, end).map_err(DumpError::Read)?;
            offset += extent.bytes;
            if !extent.is_data {
                descriptors.resize(descriptors.len() + (extent.bytes / PAGE_BYTES) as usize, zeroes);
                continue;
            }
            let data = &mut bytes[..extent.bytes as usize];
            memory.read(offset - extent.bytes, data).map_err(DumpError::Read)?;
            for page in data.as_chunks::<PAGE>().0 {
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
        let table = self.layout.descriptor_offset(chunk.first_page);
        self.sink.put(table, descriptors.as_bytes()).map_err(DumpError::Memory)
    }
}
