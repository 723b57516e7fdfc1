//! What is in the dumped memory: a fifth zero pages, the rest files, structures, text and noise, the same in every run as
//! far as the machine's files are.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// What is of one kind, bytes.
const EXTENT: usize = 1 << 20;
const PAGE: usize = 4096;
/// Where files are taken from.
const PLACES: [&str; 3] = ["/usr/bin", "/usr/lib", "/usr/share"];

/// A generator that is the same everywhere.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 32) % end
    }
}

/// The bytes of all files, one after the other.
struct Files {
    paths: Vec<PathBuf>,
    open: Option<File>,
}

impl Files {
    fn new() -> Self {
        let mut directories: Vec<PathBuf> = PLACES.iter().map(PathBuf::from).collect();
        let mut paths = Vec::new();
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => directories.push(entry.path()),
                    Ok(kind) if kind.is_file() && entry.metadata().is_ok_and(|about| about.len() > 4096) => {
                        paths.push(entry.path());
                    }
                    _ => {}
                }
            }
        }
        // In an order that is not the directories': all kinds of files everywhere.
        let order = |path: &PathBuf| {
            let bytes = path.as_os_str().as_encoded_bytes().iter();
            bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
            })
        };
        paths.sort_by_cached_key(order);
        Self { paths, open: None }
    }

    /// Without any files left, what remains is as it was.
    fn read(&mut self, buffer: &mut [u8]) {
        let mut at = 0;
        while at < buffer.len() {
            let got = self.open.as_mut().and_then(|file| file.read(&mut buffer[at..]).ok());
            match got {
                Some(got @ 1..) => at += got,
                _ => match self.paths.pop() {
                    Some(path) => {
                        at = at.next_multiple_of(PAGE);
                        self.open = File::open(path).ok();
                    }
                    None => return,
                },
            }
        }
    }
}

/// Fills a memory and returns how many of its pages are zero, and what was put in.
pub fn fill(memory: &File, bytes: u64) -> (u64, String) {
    let mut files = Files::new();
    let mut noise = Noise(1);
    let mut extent = vec![0; EXTENT];
    let (mut zeroes, mut kinds) = (0, [0_u64; 5]);
    for offset in (0..bytes).step_by(EXTENT) {
        extent.fill(0);
        let kind = match noise.below(100) {
            0..17 => 0,
            17..50 => {
                files.read(&mut extent);
                1
            }
            50..71 => {
                structures(&mut extent, &mut noise);
                2
            }
            71..86 => {
                text(&mut extent, &mut noise);
                3
            }
            _ => {
                extent
                    .chunks_exact_mut(8)
                    .for_each(|word| word.copy_from_slice(&noise.next().to_le_bytes()));
                4
            }
        };
        kinds[kind] += 1;
        let pages = extent.chunks_exact(PAGE);
        zeroes += pages.filter(|page| page.iter().all(|byte| *byte == 0)).count() as u64;
        memory.write_all_at(&extent, offset).expect("filling guest memory");
    }
    let [zero, files, structures, text, noise] = kinds;
    let what =
        format!("{zero} MiB of zeroes, {files} of files, {structures} of structures, {text} of text, {noise} of noise");
    (zeroes, what)
}

/// Objects of a few sizes as allocators lay them out: pointers into the kernel's memory, counters, flags, short names, and
/// what was never set.
fn structures(extent: &mut [u8], noise: &mut Noise) {
    let sizes = [64, 96, 192, 256, 640, 1024];
    for slab in extent.chunks_exact_mut(4 * PAGE) {
        let size = sizes[noise.below(sizes.len() as u64) as usize];
        let base = 0xffff_8880_0000_0000 + (noise.below(1 << 20) << 12);
        let operations = 0xffff_ffff_8200_0000 + noise.below(1 << 16) * 64;
        for object in slab.chunks_exact_mut(size) {
            if noise.below(8) == 0 {
                continue;
            }
            for (index, word) in object.chunks_exact_mut(8).enumerate() {
                let value = match (index % 16, noise.below(4)) {
                    (0, _) => operations,
                    (1 | 2 | 9, _) => base + noise.below(1 << 14) * 8,
                    (3, _) => noise.below(64),
                    (4, 0) => noise.next() >> 40,
                    (8, _) => u64::from_le_bytes(*b"kworker/"),
                    (10, 1) => base,
                    (12, 2) => noise.next(),
                    _ => 0,
                };
                word.copy_from_slice(&value.to_le_bytes());
            }
        }
    }
}

/// A log.
fn text(extent: &mut [u8], noise: &mut Noise) {
    let words = [
        "GET",
        "POST",
        "/index.html",
        "/api/v1/items",
        "200",
        "404",
        "connection",
        "closed",
        "by",
        "peer",
        "timeout",
        "kernel:",
        "systemd[1]:",
        "Started",
        "Stopped",
        "session",
        "user",
        "root",
        "disk",
        "eth0:",
        "link",
        "up",
    ];
    let mut log = String::with_capacity(extent.len() + 256);
    let mut second = 1_700_000_000 + noise.below(1 << 20);
    while log.len() < extent.len() {
        second += noise.below(3);
        let _ = write!(log, "{second}.{:06} host{} ", noise.below(1_000_000), noise.below(8));
        for _ in 0..4 + noise.below(8) {
            log.push_str(words[noise.below(words.len() as u64) as usize]);
            log.push(' ');
        }
        let _ = writeln!(log, "id={:x}", noise.next() >> 32);
    }
    extent.copy_from_slice(&log.as_bytes()[..extent.len()]);
}
