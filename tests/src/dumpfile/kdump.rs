//! kdump-compressed dumps.

use super::notes::{self, Note};
use super::ram::GuestRam;
use super::{PAGE, Pages, bytes, demand, lzo, number};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;

const BLOCK: u64 = PAGE as u64;
const DESCRIPTOR_BYTES: usize = 24;
const ZLIB: u32 = 1;
const LZO: u32 = 2;
const SNAPPY: u32 = 4;
const ZSTD: u32 = 0x20;

/// A kdump-compressed dump.
pub struct KdumpDump {
    file: File,
    file_bytes: u64,
    /// sysname nodename release version machine domainname.
    pub names: [String; 6],
    /// The codec's flag.
    pub codec: u32,
    /// How many processors the header counts.
    pub vcpus: u64,
    /// phys_base.
    pub phys_base: u64,
    /// dump_level.
    pub level: u64,
    /// All of them.
    pub notes: Vec<Note>,
    /// Which pages exist, and which are in the dump; the lowest bit comes first.
    exist: Vec<u8>,
    present: Vec<u8>,
    frames: u64,
    /// Of the pages that are in the dump, in order.
    descriptors: Vec<Descriptor>,
    data: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Descriptor {
    offset: u64,
    bytes: u32,
    flags: u32,
}

impl KdumpDump {
    pub(super) fn open(file: File) -> Result<Self, String> {
        let word = |at| number(&file, at, 4);
        let long = |at| number(&file, at, 8);
        demand(word(8)? == 6, || "header version".into())?;
        let mut names: [String; 6] = Default::default();
        for (name, at) in names.iter_mut().zip((12..).step_by(65)) {
            let text = bytes(&file, at, 65)?;
            let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
            *name = String::from_utf8_lossy(text).into_owned();
        }
        let codec = word(424)? as u32;
        demand([ZLIB, LZO, SNAPPY, ZSTD].contains(&codec), || {
            format!("status {codec:#x}")
        })?;
        demand(word(428)? == BLOCK, || "block size".into())?;
        let (sub_blocks, bitmap_blocks) = (word(432)?, word(436)?);
        let frames = long(BLOCK + 96)?;
        demand(word(440)? == frames.min(u64::from(u32::MAX)), || "max_mapnr".into())?;
        let bitmap_bytes = frames.div_ceil(8).next_multiple_of(BLOCK);
        demand(bitmap_blocks * BLOCK == 2 * bitmap_bytes, || {
            format!("{bitmap_blocks} blocks of bitmaps")
        })?;

        let (notes_offset, notes_bytes) = (long(BLOCK + 48)?, long(BLOCK + 56)?);
        demand(notes_offset == BLOCK + 104, || format!("notes at {notes_offset}"))?;
        // Room for a note that was found late may be left.
        let least = (104 + notes_bytes).div_ceil(BLOCK);
        demand((least..=least + 2).contains(&sub_blocks), || {
            format!("{sub_blocks} blocks of sub-header, {notes_bytes} bytes of notes")
        })?;
        let notes = notes::parse(&bytes(&file, notes_offset, notes_bytes as usize)?)?;
        let said = (long(BLOCK + 32)?, long(BLOCK + 40)?);
        let own = notes.iter().find(|note| note.name == "VMCOREINFO");
        let there = own.map_or((0, 0), |note| {
            (notes_offset + note.offset as u64, note.content.len() as u64)
        });
        demand(said == there, || {
            format!("VMCOREINFO is at {there:?}, the sub-header says {said:?}")
        })?;
        for (at, what) in [(12, "split"), (64, "eraseinfo"), (72, "eraseinfo")] {
            demand(number(&file, BLOCK + at, 4)? == 0, || what.into())?;
        }

        let bitmaps = (1 + sub_blocks) * BLOCK;
        let exist = bytes(&file, bitmaps, bitmap_bytes as usize)?;
        let present = bytes(&file, bitmaps + bitmap_bytes, bitmap_bytes as usize)?;
        let count: u64 = present.iter().map(|byte| u64::from(byte.count_ones())).sum();
        let table = bitmaps + 2 * bitmap_bytes;
        let raw = bytes(&file, table, count as usize * DESCRIPTOR_BYTES)?;
        let descriptor = |raw: &[u8]| Descriptor {
            offset: u64::from_le_bytes(raw[..8].try_into().expect("8 bytes")),
            bytes: u32::from_le_bytes(raw[8..12].try_into().expect("4 bytes")),
            flags: u32::from_le_bytes(raw[12..16].try_into().expect("4 bytes")),
        };
        let (vcpus, phys_base, level) = (word(460)?, long(BLOCK)?, word(BLOCK + 8)?);
        let file_bytes = file.metadata().map_err(|error| error.to_string())?.len();
        Ok(Self {
            descriptors: raw.chunks_exact(DESCRIPTOR_BYTES).map(descriptor).collect(),
            data: table + count * DESCRIPTOR_BYTES as u64,
            file,
            file_bytes,
            names,
            codec,
            vcpus,
            phys_base,
            level,
            notes,
            exist,
            present,
            frames,
        })
    }

    /// Whether a page is in the dump.
    pub fn has(&self, frame: u64) -> bool {
        bit(&self.present, frame)
    }

    /// Of all compressed pages how many bytes they take.
    pub fn sizes(&self) -> BTreeSet<u32> {
        let compressed = self.descriptors.iter().filter(|descriptor| descriptor.flags != 0);
        compressed.map(|descriptor| descriptor.bytes).collect()
    }

    /// How many pages are in the dump, of how many that exist.
    pub fn counts(&self) -> (u64, u64) {
        let ones = |bitmap: &[u8]| bitmap.iter().map(|byte| u64::from(byte.count_ones())).sum();
        (ones(&self.present), ones(&self.exist))
    }

    pub(super) fn each_page(&self, each: &mut dyn FnMut(u64, &[u8; PAGE])) -> Result<(), String> {
        let mut reader = Reader::new(self)?;
        let mut descriptors = self.descriptors.iter();
        for frame in (0..self.frames).filter(|frame| bit(&self.present, *frame)) {
            let descriptor = descriptors.next().ok_or("too few descriptors")?;
            if reader.zero != Some(*descriptor) {
                let page = reader.page(descriptor);
                each(
                    frame * BLOCK,
                    &page.map_err(|error| format!("page frame {frame:#x}: {error}"))?,
                );
            }
        }
        Ok(())
    }

    pub(super) fn compare(&self, ram: &GuestRam) -> Result<Pages, String> {
        let mut pages = Pages::default();
        let mut reader = Reader::new(self)?;
        let mut descriptors = self.descriptors.iter();
        let holes = ram.holes();
        let mut wanted = [0; PAGE];
        let mut next = 0;
        for (address, bytes) in ram.pieces() {
            let (first, end) = (address / BLOCK, (address + bytes) / BLOCK);
            demand((next..first).all(|frame| !bit(&self.exist, frame)), || {
                format!("the dump has pages below {address:#x} where no RAM is")
            })?;
            for frame in first..end {
                demand(bit(&self.exist, frame), || {
                    format!("page frame {frame:#x} does not exist")
                })?;
                if !bit(&self.present, frame) {
                    pages.excluded += 1;
                    continue;
                }
                let descriptor = descriptors.next().ok_or("too few descriptors")?;
                let is_hole = holes[(ram.offset(frame * BLOCK) / BLOCK) as usize];
                if reader.zero == Some(*descriptor) && is_hole {
                    pages.zero += 1;
                    continue;
                }
                ram.read(frame * BLOCK, &mut wanted);
                let got = reader
                    .page(descriptor)
                    .map_err(|error| format!("page frame {frame:#x}: {error}"))?;
                demand(got == wanted, || format!("page frame {frame:#x} differs"))?;
                match (reader.zero == Some(*descriptor), descriptor.flags) {
                    (true, _) => pages.zero += 1,
                    (false, 0) => pages.raw += 1,
                    (false, _) => pages.compressed += 1,
                }
                let is_zero = wanted.iter().all(|byte| *byte == 0);
                demand(is_zero == (reader.zero == Some(*descriptor)), || {
                    format!("page frame {frame:#x}: zeroes are not shared, {descriptor:?}")
                })?;
            }
            next = end;
        }
        demand(self.frames == next, || {
            format!("{} page frames, not {next}", self.frames)
        })?;
        let beyond = next..self.exist.len() as u64 * 8;
        demand(beyond.into_iter().all(|frame| !bit(&self.exist, frame)), || {
            "the dump has pages behind the last".into()
        })?;
        demand(descriptors.next().is_none(), || "too many descriptors".into())?;
        self.check_room()?;
        Ok(pages)
    }

    /// Nothing overlaps, but for the page of zeroes, and the file ends with its last page.
    fn check_room(&self) -> Result<(), String> {
        // Quickly, of millions that share it.
        let zero = self
            .descriptors
            .iter()
            .find(|descriptor| descriptor.offset == self.data);
        let others = self.descriptors.iter().filter(|descriptor| Some(*descriptor) != zero);
        let distinct: BTreeSet<Descriptor> = others.copied().collect();
        let mut end = self.data + zero.map_or(0, |zero| u64::from(zero.bytes));
        for descriptor in distinct {
            demand(descriptor.offset >= end, || {
                format!("{descriptor:?} overlaps with what ends at {end}")
            })?;
            end = descriptor.offset + u64::from(descriptor.bytes);
        }
        demand(end <= self.file_bytes, || format!("the last page ends at {end}"))
    }
}

fn bit(bitmap: &[u8], frame: u64) -> bool {
    bitmap
        .get(frame as usize / 8)
        .is_some_and(|byte| byte >> (frame % 8) & 1 == 1)
}

/// Reads pages.
struct Reader<'dump> {
    dump: &'dump KdumpDump,
    /// The descriptor of the page of zeroes.
    zero: Option<Descriptor>,
    inflate: flate2::Decompress,
    zstd: ruzstd::decoding::FrameDecoder,
}

impl<'dump> Reader<'dump> {
    fn new(dump: &'dump KdumpDump) -> Result<Self, String> {
        let mut reader = Self {
            dump,
            zero: None,
            inflate: flate2::Decompress::new(true),
            zstd: ruzstd::decoding::FrameDecoder::new(),
        };
        // It comes first, if there is one.
        let first = dump
            .descriptors
            .iter()
            .find(|descriptor| descriptor.offset == dump.data);
        if let Some(first) = first
            && reader.page(first)?.iter().all(|byte| *byte == 0)
        {
            reader.zero = Some(*first);
        }
        Ok(reader)
    }

    fn page(&mut self, descriptor: &Descriptor) -> Result<[u8; PAGE], String> {
        let Descriptor { offset, bytes, flags } = *descriptor;
        demand(bytes as usize <= PAGE, || format!("{descriptor:?} is too large"))?;
        let mut stored = [0; PAGE];
        let stored = &mut stored[..bytes as usize];
        let read = self.dump.file.read_exact_at(stored, offset);
        read.map_err(|error| format!("{descriptor:?}: {error}"))?;
        let mut page = [0; PAGE];
        if flags == 0 {
            demand(bytes as usize == PAGE, || format!("{descriptor:?} is not whole"))?;
            page.copy_from_slice(stored);
            return Ok(page);
        }
        demand(flags == self.dump.codec, || {
            format!("{descriptor:?} is of another codec")
        })?;
        demand((bytes as usize) < PAGE, || format!("{descriptor:?} gains nothing"))?;
        let length = match flags {
            ZLIB => {
                self.inflate.reset(true);
                let end = self
                    .inflate
                    .decompress(stored, &mut page, flate2::FlushDecompress::Finish);
                let end = end.map_err(|error| format!("zlib: {error}"))?;
                demand(end == flate2::Status::StreamEnd, || "zlib: no end".into())?;
                demand(self.inflate.total_in() == u64::from(bytes), || {
                    "zlib: something follows".into()
                })?;
                self.inflate.total_out() as usize
            }
            LZO => {
                let found = lzo::decode(stored).ok_or("lzo: not valid")?;
                let length = found.len();
                page[..length.min(PAGE)].copy_from_slice(&found[..length.min(PAGE)]);
                length
            }
            SNAPPY => {
                let found = snap::raw::Decoder::new().decompress(stored, &mut page);
                found.map_err(|error| format!("snappy: {error}"))?
            }
            _ => {
                let mut rest: &[u8] = stored;
                let started = self.zstd.reset(&mut rest);
                started.map_err(|error| format!("zstd: {error}"))?;
                let done = self
                    .zstd
                    .decode_blocks(&mut rest, ruzstd::decoding::BlockDecodingStrategy::All);
                done.map_err(|error| format!("zstd: {error}"))?;
                demand(rest.is_empty(), || "zstd: something follows".into())?;
                self.zstd.read(&mut page).map_err(|error| format!("zstd: {error}"))?
            }
        };
        demand(length == PAGE, || format!("{length} bytes of a page"))?;
        Ok(page)
    }
}
