//! block-proc is killed at a random moment while it writes to a qcow2 image: QEMU's tools find nothing but leaks in the image,
//! and everything that was acknowledged before an acknowledged flush is there.

mod common;
mod qcow2_common;

use common::*;
use ipc::block::{DiskInfo, ImageFormat};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use qcow2_common::{Random, check, create, qemu_img};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

const DISK_BYTES: u64 = 8 << 20;
const SECTOR: u64 = 512;
const SECTORS: usize = (DISK_BYTES / SECTOR) as usize;
/// Requests under way at once.
const SLOTS: u16 = 8;
const LARGEST_BYTES: u64 = 32 << 10;

/// What a sector may hold: what the last acknowledged flush has made durable, and all that was written after that, in the
/// order in which it was sent. Nothing is sent for a sector that a request is under way for.
#[derive(Clone)]
struct Sector {
    /// Numbers of writes, by which their content can be told; 0 are zeroes.
    history: VecDeque<u64>,
    /// How many were taken off its front.
    forgotten: u64,
    /// Place of the last acknowledged one, with those that were taken off.
    acknowledged: u64,
}

impl Sector {
    fn new() -> Self {
        Self {
            history: VecDeque::from([0]),
            forgotten: 0,
            acknowledged: 0,
        }
    }

    fn acknowledge(&mut self) {
        self.acknowledged = self.forgotten + self.history.len() as u64 - 1;
    }

    /// What was acknowledged at this place is durable.
    fn flushed(&mut self, place: u64) {
        while self.forgotten < place {
            self.history.pop_front();
            self.forgotten += 1;
        }
    }
}

struct Request {
    /// Sectors; empty for a flush.
    sectors: std::ops::Range<usize>,
    /// For a flush: what was acknowledged of each sector when it was sent.
    acknowledged: Option<Vec<u64>>,
}

fn content(number: u64, sector: usize) -> Vec<u8> {
    match number {
        0 => vec![0; SECTOR as usize],
        _ => pattern(number << 20 | sector as u64, SECTOR as usize),
    }
}

struct Load {
    queue: Queue,
    random: Random,
    sectors: Vec<Sector>,
    under_way: Vec<Option<Request>>,
    next: u64,
    flushes: u64,
}

impl Load {
    /// Sends a request in a free slot, of sectors that no other request is about.
    fn send(&mut self, slot: u16) {
        let kind = self.random.below(16);
        if kind == 0 {
            let acknowledged = Some(self.sectors.iter().map(|sector| sector.acknowledged).collect());
            self.queue.prepare(slot, T_FLUSH, 0, None);
            self.under_way[usize::from(slot)] = Some(Request {
                sectors: 0..0,
                acknowledged,
            });
            return;
        }
        let count = 1 + self.random.below(LARGEST_BYTES / SECTOR) as usize;
        let first = self.random.below((SECTORS - count) as u64) as usize;
        let sectors = first..first + count;
        let is_taken = |other: &Request| other.sectors.start < sectors.end && sectors.start < other.sectors.end;
        if self.under_way.iter().flatten().any(is_taken) {
            return;
        }
        let number = if kind == 1 { 0 } else { self.next };
        self.next += 1;
        let data = match number {
            0 => {
                let mut range = (first as u64).to_le_bytes().to_vec();
                range.extend((count as u32).to_le_bytes());
                range.extend(1_u32.to_le_bytes());
                range
            }
            _ => sectors.clone().flat_map(|sector| content(number, sector)).collect(),
        };
        self.queue.put(self.queue.data_at(slot), &data);
        let data = readable(self.queue.data_at(slot), data.len() as u32);
        match number {
            0 => self.queue.prepare(slot, T_WRITE_ZEROES, 0, Some(data)),
            _ => self.queue.prepare(slot, T_OUT, first as u64, Some(data)),
        }
        for sector in &mut self.sectors[sectors.clone()] {
            sector.history.push_back(number);
        }
        self.under_way[usize::from(slot)] = Some(Request {
            sectors,
            acknowledged: None,
        });
    }

    /// Takes what is acknowledged.
    fn receive(&mut self) {
        while let Some((head, _)) = self.queue.next_used() {
            let slot = (head / 3) as u16;
            assert_eq!(self.queue.status(slot), S_OK);
            let request = self.under_way[usize::from(slot)].take().expect("a request");
            self.sectors[request.sectors].iter_mut().for_each(Sector::acknowledge);
            self.flushes += u64::from(request.acknowledged.is_some());
            let durable = request.acknowledged.into_iter().flatten();
            for (sector, place) in self.sectors.iter_mut().zip(durable) {
                sector.flushed(place);
            }
        }
    }
}

/// Returns how many writes were sent and how many flushes were acknowledged, and whether the image has leaks.
fn round(seed: u64) -> (u64, u64, bool) {
    let mut random = Random::new(seed);
    let folder = tempfile::tempdir().unwrap();
    let options = [
        "cluster_size=512",
        "cluster_size=4096",
        "cluster_size=65536",
        "cluster_size=16384,extended_l2=on",
        "cluster_size=4096,refcount_bits=1",
    ];
    let path = folder.path().join("image");
    std::fs::write(
        &path,
        create(folder.path(), options[seed as usize % options.len()], DISK_BYTES),
    )
    .unwrap();
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let info = DiskInfo {
        format: ImageFormat::Qcow2,
        ..info(file.metadata().unwrap().len())
    };
    let engine = ENGINES[(seed / 5) as usize % ENGINES.len()];
    let (mut vm, queue) = Vm::with_disk(engine, &file, info, F_FLUSH | F_WRITE_ZEROES);
    let mut load = Load {
        queue,
        random: random.clone(),
        sectors: vec![Sector::new(); SECTORS],
        under_way: (0..SLOTS).map(|_| None).collect(),
        next: 1,
        flushes: 0,
    };
    let pid = Pid::from_raw(vm.helper.child.id() as i32);
    let moment = Duration::from_micros(random.below(150_000));
    let killer = std::thread::spawn(move || {
        // The moment is what is random here; nothing waits for it to be late enough.
        std::thread::sleep(moment);
        kill(pid, Signal::SIGKILL).unwrap();
    });
    let start = Instant::now();
    while vm.helper.child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(60), "it is not killed");
        load.receive();
        for slot in 0..SLOTS {
            if load.under_way[usize::from(slot)].is_none() {
                load.send(slot);
            }
        }
        load.queue.publish();
        load.queue.kick();
        std::thread::yield_now();
    }
    killer.join().unwrap();
    load.receive();
    drop(vm);

    let (code, said) = check(&path);
    assert!(matches!(code, 0 | 3), "seed {seed}: {said}");
    let raw = folder.path().join("raw");
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        path.to_str().unwrap(),
        raw.to_str().unwrap(),
    ]);
    let data = std::fs::read(raw).unwrap();
    for (at, sector) in load.sectors.iter().enumerate() {
        let found = &data[at * SECTOR as usize..][..SECTOR as usize];
        let mut possible = sector.history.iter();
        assert!(
            possible.any(|number| found == content(*number, at)),
            "seed {seed}, sector {at}: not one of {:?}",
            sector.history
        );
    }
    (load.next - 1, load.flushes, code == 3)
}

fn rounds(seeds: std::ops::Range<u64>) {
    let count = seeds.end - seeds.start;
    let (mut writes, mut flushes, mut leaks) = (0, 0, 0);
    for seed in seeds {
        let (sent, flushed, leaked) = round(seed);
        writes += sent;
        flushes += flushed;
        leaks += u64::from(leaked);
    }
    println!("killed {count} times: {writes} writes, {flushes} flushes, {leaks} images with leaks, none with errors");
    assert!(writes > count && flushes > count, "hardly anything was written");
}

#[test]
fn a_killed_block_proc_leaves_a_sound_image_with_all_that_was_flushed() {
    rounds(0..12);
}

#[test]
#[ignore = "two minutes: make soak"]
fn a_block_proc_that_is_killed_two_hundred_times_leaves_sound_images() {
    rounds(1000..1200);
}
