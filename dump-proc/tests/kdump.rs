//! kdump-compressed dumps, read by a reader of our own and by other people's tools.

mod common;

use common::{Dumper, GIB, MIB, Ram, pattern, registers};
use ipc::Failure;
use ipc::dump::{Compressor, DumpForm, DumpOutput, DumpReply, DumpRequest, Exclude};
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::process::Command;

const PAGE: usize = 4096;
const ALL: [Compressor; 5] = [
    Compressor::Zlib,
    Compressor::SmallZlib,
    Compressor::Lzo,
    Compressor::Snappy,
    Compressor::Zstd,
];

fn dump(ram: &Ram, output: impl Into<OwnedFd>, compressor: Compressor, flattened: bool) -> Result<u64, Failure> {
    let request = DumpRequest::Write {
        output: DumpOutput::new(output.into()).unwrap(),
        registers: vec![registers(0), registers(1)],
        vmcoreinfo: None,
        form: DumpForm::Kdump {
            compressor,
            flattened,
            exclude: Exclude::default(),
        },
    };
    Dumper::sealed(ram).bare.ask(request).map(|reply| match reply {
        DumpReply::Written { memory_bytes } => memory_bytes,
        other => panic!("unexpected {other:?}"),
    })
}

/// From the flattened stream to the plain file, as makedumpfile -R does it.
fn unflatten(mut stream: impl Read) -> File {
    let file = tempfile::tempfile().unwrap();
    let mut header = [0; 4096];
    stream.read_exact(&mut header).unwrap();
    assert!(header.starts_with(b"makedumpfile\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x01"));
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head).unwrap();
        let field = |at: usize| i64::from_be_bytes(head[at..at + 8].try_into().unwrap());
        if (field(0), field(8)) == (-1, -1) {
            assert_eq!(stream.read(&mut head).unwrap(), 0);
            return file;
        }
        let mut bytes = vec![0; field(8) as usize];
        stream.read_exact(&mut bytes).unwrap();
        file.write_all_at(&bytes, field(0) as u64).unwrap();
    }
}

struct Reader {
    file: File,
    bitmap: Vec<u8>,
    descriptors: u64,
    compressor: Compressor,
    /// How many pages are stored as they are, and compressed, by where they are.
    raw: std::collections::BTreeSet<u64>,
    compressed: usize,
}

impl Reader {
    fn new(file: File, compressor: Compressor) -> Self {
        let word = |at: u64| {
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, at).unwrap();
            u64::from(u32::from_le_bytes(bytes))
        };
        let status = match compressor {
            Compressor::Zlib | Compressor::SmallZlib => 1,
            Compressor::Lzo => 2,
            Compressor::Snappy => 4,
            Compressor::Zstd => 0x20,
        };
        assert_eq!((word(8), word(424), word(428)), (6, status, 4096));
        let (sub, bitmaps) = (word(432), word(436) * PAGE as u64);
        let start = (1 + sub) * PAGE as u64;
        let mut bitmap = vec![0; bitmaps as usize / 2];
        file.read_exact_at(&mut bitmap, start + bitmaps / 2).unwrap();
        Self {
            file,
            bitmap,
            descriptors: start + bitmaps,
            compressor,
            raw: Default::default(),
            compressed: 0,
        }
    }

    fn exists(&self, frame: u64) -> bool {
        self.bitmap
            .get(frame as usize / 8)
            .is_some_and(|byte| byte >> (frame % 8) & 1 == 1)
    }

    /// The page of this number among those that exist.
    fn page(&mut self, number: u64) -> Vec<u8> {
        let mut descriptor = [0; 24];
        self.file
            .read_exact_at(&mut descriptor, self.descriptors + number * 24)
            .unwrap();
        let offset = u64::from_le_bytes(descriptor[..8].try_into().unwrap());
        let size = u32::from_le_bytes(descriptor[8..12].try_into().unwrap());
        let flags = u32::from_le_bytes(descriptor[12..16].try_into().unwrap());
        let mut bytes = vec![0; size as usize];
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        if flags == 0 {
            assert_eq!(bytes.len(), PAGE);
            self.raw.insert(offset);
            return bytes;
        }
        assert!(bytes.len() < PAGE);
        self.compressed += 1;
        match self.compressor {
            Compressor::Zlib | Compressor::SmallZlib => {
                let mut page = vec![0; PAGE];
                let mut inflate = flate2::Decompress::new(true);
                let end = inflate
                    .decompress(&bytes, &mut page, flate2::FlushDecompress::Finish)
                    .unwrap();
                assert_eq!((end, inflate.total_out()), (flate2::Status::StreamEnd, PAGE as u64));
                page
            }
            Compressor::Lzo => bulkhead_tests::dumpfile::lzo::decode(&bytes).unwrap(),
            Compressor::Snappy => snap::raw::Decoder::new().decompress_vec(&bytes).unwrap(),
            Compressor::Zstd => {
                let mut page = Vec::with_capacity(PAGE);
                let mut frames = ruzstd::decoding::FrameDecoder::new();
                frames.decode_all_to_vec(&bytes, &mut page).unwrap();
                page
            }
        }
    }

    fn assert_equal_to(&mut self, ram: &Ram) {
        let (mut number, mut wanted) = (0, vec![0; PAGE]);
        for frame in 0..self.bitmap.len() as u64 * 8 {
            if !self.exists(frame) {
                continue;
            }
            ram.memfd
                .read_exact_at(&mut wanted, common::offset_of(frame * PAGE as u64))
                .unwrap();
            assert!(self.page(number) == wanted, "page frame {frame}");
            number += 1;
        }
        assert_eq!(number, ram.bytes / PAGE as u64);
    }
}

/// What no codec makes smaller.
fn noise(bytes: u64) -> Vec<u8> {
    let mut state = 1_u64;
    let words = (0..bytes / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
    });
    words.collect()
}

/// Text, pointers, noise, zeroes in data, and memory that was never touched, across several chunks.
fn mixed_ram() -> Ram {
    let ram = Ram::new(13 * MIB + 3 * 4096);
    let text = b"a line that comes again and again, with a number in it\n".repeat(2000);
    ram.write(4096, &text);
    ram.write(3 * MIB - 100, &noise(MIB));
    let pointers: Vec<u8> = (0..MIB / 8)
        .flat_map(|at| (0xffff_8880_0000_0000 | (at * 192)).to_le_bytes())
        .collect();
    ram.write(6 * MIB + 123, &pointers);
    ram.write(9 * MIB, &vec![0; MIB as usize]);
    ram.write(13 * MIB + 2 * 4096, &[5; 4096]);
    ram
}

#[test]
fn every_page_comes_back_in_every_form() {
    let ram = mixed_ram();
    let touched = ram.blocks();
    for compressor in ALL {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(
            dump(&ram, file.try_clone().unwrap(), compressor, false).unwrap(),
            ram.bytes
        );
        let mut reader = Reader::new(file, compressor);
        reader.assert_equal_to(&ram);
        // Noise is stored as it is, zeroes once, and the rest is compressed.
        assert!((256..300).contains(&reader.raw.len()), "{:?}", reader.raw.len());
        assert!((280..300).contains(&reader.compressed), "{}", reader.compressed);

        let (source, sink) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        common::set_nonblocking(&sink);
        let plain = std::thread::spawn(move || unflatten(File::from(source)));
        dump(&ram, sink, compressor, true).unwrap();
        Reader::new(plain.join().unwrap(), compressor).assert_equal_to(&ram);
    }
    assert_eq!(ram.blocks(), touched, "looking at memory has allocated some");
}

#[test]
fn memory_on_both_sides_of_the_hole_is_there_and_the_hole_is_not() {
    let ram = Ram::new(3 * GIB + 2 * MIB);
    ram.fill(3 * GIB - 4096, 4096);
    ram.fill(4 * GIB, 8192);
    ram.fill(4 * GIB + 2 * MIB - 4096, 4096);
    let file = tempfile::tempfile().unwrap();
    dump(&ram, file.try_clone().unwrap(), Compressor::Lzo, false).unwrap();
    let mut reader = Reader::new(file, Compressor::Lzo);
    let frame = |address: u64| address / PAGE as u64;
    assert!(reader.exists(frame(3 * GIB) - 1) && !reader.exists(frame(3 * GIB)));
    assert!(!reader.exists(frame(4 * GIB) - 1) && reader.exists(frame(4 * GIB)));
    let above = frame(3 * GIB);
    for (number, address) in [
        (above - 1, 3 * GIB - 4096),
        (above, 4 * GIB),
        (above + 1, 4 * GIB + 4096),
        (above + 511, 4 * GIB + 2 * MIB - 4096),
    ] {
        assert!(reader.page(number) == pattern(address, 4096), "{address:#x}");
    }
    assert!(reader.page(0) == vec![0; PAGE] && reader.page(above + 2) == vec![0; PAGE]);
}

#[test]
fn a_dump_begins_where_the_client_has_left_its_offset() {
    let ram = mixed_ram();
    let mut file = tempfile::tempfile().unwrap();
    file.seek(std::io::SeekFrom::Start(12345)).unwrap();
    dump(&ram, file.try_clone().unwrap(), Compressor::Snappy, false).unwrap();
    let end = file.stream_position().unwrap();
    assert_eq!(end, file.metadata().unwrap().len());
    let mut moved = tempfile::tempfile().unwrap();
    file.seek(std::io::SeekFrom::Start(12345)).unwrap();
    std::io::copy(&mut file, &mut moved).unwrap();
    Reader::new(moved, Compressor::Snappy).assert_equal_to(&ram);
}

#[test]
fn an_output_that_is_full_or_gone_is_an_error_and_not_the_end() {
    let ram = mixed_ram();
    for flattened in [false, true] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let failure = dump(&ram, full, Compressor::Lzo, flattened).unwrap_err();
        assert_eq!(
            failure.message,
            "dump: failed to write elf header: No space left on device"
        );
    }
    let (source, sink) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    drop(source);
    let failure = dump(&ram, sink, Compressor::Zlib, true).unwrap_err();
    assert!(failure.message.ends_with("Broken pipe"), "{}", failure.message);
}

/// makedumpfile reads what it would have written itself: the flattened form becomes the plain one.
#[test]
fn makedumpfile_takes_the_stream_apart() {
    if Command::new("makedumpfile").arg("-v").output().is_err() {
        println!("SKIPPED: makedumpfile is not installed");
        return;
    }
    let ram = mixed_ram();
    let directory = tempfile::tempdir().unwrap();
    let (flat, plain) = (directory.path().join("flat"), directory.path().join("plain"));
    dump(&ram, File::create(&flat).unwrap(), Compressor::Zlib, true).unwrap();
    let output = Command::new("makedumpfile")
        .arg("-R")
        .arg(&plain)
        .stdin(File::open(&flat).unwrap())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    Reader::new(File::open(&plain).unwrap(), Compressor::Zlib).assert_equal_to(&ram);
}
