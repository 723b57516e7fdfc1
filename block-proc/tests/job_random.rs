//! Copiers and filters on nodes in memory that yield at random: whatever the order, no write is lost, a snapshot stays what
//! it was, and a stream never takes the guest's newer data away. A seed repeats a run.

mod qcow2_common;
use block_proc::bitmap::Bitmap;
use block_proc::buffer::Segments;
use block_proc::executor::Executor;
use block_proc::job::copier::{Copier, Layers, Nothing, Options};
use block_proc::node::copy_before_write::{CopyBeforeWriteNode, SnapshotAccessNode};
use block_proc::node::copy_on_read::CopyOnReadNode;
use block_proc::node::mirror_top::MirrorTopNode;
use block_proc::node::{Extent, ExtentKind, Node, NodeFuture};
use nix::errno::Errno;
use qcow2_common::*;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

const GRANULARITY: u64 = 4096;
const DISK: u64 = 24 * GRANULARITY + 1536;
const SECTOR: u64 = 512;

fn bytes(random: &mut Random, count: u64) -> Vec<u8> {
    (0..count).map(|_| random.next() as u8 | 1).collect()
}

/// A range of whole sectors.
fn range(random: &mut Random, longest: u64) -> (u64, u64) {
    let sectors = DISK / SECTOR;
    let start = random.below(sectors);
    let length = 1 + random.below((longest / SECTOR).min(sectors - start));
    (start * SECTOR, length * SECTOR)
}

/// One who writes anything anywhere.
async fn guest(node: Rc<dyn Node>, seed: u64, writes: u64) {
    let mut random = Random::new(seed);
    for _ in 0..writes {
        let (offset, length) = range(&mut random, 3 * GRANULARITY);
        let done = match random.below(5) {
            0 => node.write_zeroes(offset, length, true).await,
            1 => node.discard(offset, length).await,
            _ => node.write(offset, segments(&bytes(&mut random, length)), false).await,
        };
        done.unwrap();
        turns(random.below(6)).await;
    }
}

fn everything() -> Bitmap {
    let mut bits = Bitmap::new(DISK, GRANULARITY);
    bits.set(0..DISK);
    bits
}

fn run(tasks: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>>) {
    let mut executor = Executor::default();
    let count = tasks.len();
    tasks.into_iter().for_each(|task| executor.spawn(task));
    let mut finished = Vec::new();
    executor.run(&mut finished);
    assert_eq!(finished.len(), count, "somebody waits for something that never comes");
}

#[test]
fn whatever_the_order_a_mirror_that_is_settled_is_its_source() {
    for seed in 0..600 {
        let mut random = Random::new(seed);
        let source = Memory::new(bytes(&mut random, DISK), seed);
        let target = Memory::new(vec![0; DISK as usize], seed + 1);
        let filter = Rc::new(MirrorTopNode::new(source.clone()));
        let copier = Copier::new(source.clone(), target.clone(), everything());
        filter.set_mirror(Some(copier.clone()));
        filter.set_write_blocking(seed % 3 == 0);
        let mut tasks: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        for number in 0..24 {
            tasks.push(Box::pin(guest(filter.clone(), seed * 100 + number, 6)));
        }
        for number in 0..4 {
            let copier = copier.clone();
            let mut random = Random::new(seed * 1000 + number);
            tasks.push(Box::pin(async move {
                for _ in 0..20 {
                    let from = random.below(DISK);
                    let run = copier.left.borrow().next(from, GRANULARITY * (1 + random.below(4)));
                    if let Some(run) = run {
                        // Whole bits, as a job takes them.
                        copier
                            .copy_now(run.start - run.start % GRANULARITY..run.end)
                            .await
                            .unwrap();
                    }
                    turns(random.below(4)).await;
                }
            }));
        }
        if seed % 3 == 1 {
            let filter = filter.clone();
            tasks.push(Box::pin(async move {
                turns(30).await;
                filter.set_write_blocking(true);
            }));
        }
        run(tasks);
        block_on({
            let copier = copier.clone();
            async move { copier.settle().await.unwrap() }
        });
        assert!(copier.left.borrow().is_clean() && copier.is_idle(), "seed {seed}");
        assert!(*source.bytes.borrow() == *target.bytes.borrow(), "seed {seed}");
    }
}

/// What a file with holes says of itself: what is zero is a hole.
struct Sparse(Rc<Memory>);

impl Node for Sparse {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        self.0.read(offset, into)
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        self.0.write(offset, from, durable)
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        self.0.write_zeroes(offset, bytes, may_unmap)
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        self.0.discard(offset, bytes)
    }

    fn flush(&self) -> NodeFuture<'_> {
        self.0.flush()
    }

    fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        let own = self.0.bytes.borrow();
        let mut sectors = own[offset as usize..(offset + bytes) as usize].chunks(SECTOR as usize);
        let is_zero = |sector: &[u8]| sector.iter().all(|byte| *byte == 0);
        let first = is_zero(sectors.next().expect("somebody asks for something"));
        let same = 1 + sectors.take_while(|sector| is_zero(sector) == first).count() as u64;
        let extent = Extent {
            bytes: (same * SECTOR).min(bytes),
            kind: if first { ExtentKind::Zero } else { ExtentKind::Data },
        };
        Box::pin(async move {
            // Who asks has it later than it was.
            turns(offset / SECTOR % 3).await;
            Ok(extent)
        })
    }
}

#[test]
fn a_scan_beside_copies_and_a_writing_guest_forgets_nothing() {
    for seed in 0..600 {
        let mut random = Random::new(seed);
        let mut half = |zeroes: u64| {
            let mut data = bytes(&mut random, DISK);
            for granule in data.chunks_mut(GRANULARITY as usize) {
                if random.below(4) < zeroes {
                    granule.fill(0);
                }
            }
            data
        };
        let source = Memory::new(half(2), seed);
        // Now and then something is in the way.
        let target = Memory::new(half(if seed % 2 == 0 { 4 } else { 3 }), seed + 1);
        let (from, to) = (Rc::new(Sparse(source.clone())), Rc::new(Sparse(target.clone())));
        let filter = Rc::new(MirrorTopNode::new(from.clone()));
        let copier = Copier::new(from.clone(), to, Bitmap::new(DISK, GRANULARITY));
        copier.set_layers(Layers {
            nodes: vec![from],
            is_all: true,
        });
        filter.set_mirror(Some(copier.clone()));
        filter.set_write_blocking(seed % 3 == 0);
        let mut tasks: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        for number in 0..6 {
            tasks.push(Box::pin(guest(filter.clone(), seed * 100 + number, 6)));
        }
        let scanning = Rc::new(Cell::new(true));
        let (scanner, goes_on) = (copier.clone(), scanning.clone());
        tasks.push(Box::pin(async move {
            let mut at = 0;
            while at < DISK {
                let scanned = scanner.scan(at).await.unwrap();
                let mut left = scanner.left.borrow_mut();
                scanned.copied.into_iter().for_each(|run| left.set(run));
                at = scanned.until;
            }
            goes_on.set(false);
        }));
        for _ in 0..3 {
            let (copier, scanning) = (copier.clone(), scanning.clone());
            tasks.push(Box::pin(async move {
                while scanning.get() {
                    let run = copier.left.borrow().next(0, 2 * GRANULARITY);
                    if let Some(run) = run {
                        copier
                            .copy_now(run.start - run.start % GRANULARITY..run.end)
                            .await
                            .unwrap();
                    }
                    turns(1).await;
                }
            }));
        }
        run(tasks);
        block_on({
            let copier = copier.clone();
            async move { copier.settle().await.unwrap() }
        });
        assert!(*source.bytes.borrow() == *target.bytes.borrow(), "seed {seed}");
    }
}

#[test]
fn a_mirror_that_writes_both_is_not_behind_when_the_guest_is_answered() {
    for seed in 0..200 {
        let mut random = Random::new(seed);
        let data = bytes(&mut random, DISK);
        let source = Memory::new(data.clone(), seed);
        let target = Memory::new(data, seed + 1);
        let filter = Rc::new(MirrorTopNode::new(source.clone()));
        let copier = Copier::new(source.clone(), target.clone(), Bitmap::new(DISK, GRANULARITY));
        filter.set_mirror(Some(copier.clone()));
        filter.set_write_blocking(true);
        // More than there are buffers, all at one place.
        let write = |number: u64| -> std::pin::Pin<Box<dyn Future<Output = ()>>> {
            let filter = filter.clone();
            let mut random = Random::new(seed * 100 + number);
            Box::pin(async move {
                for _ in 0..3 {
                    let (offset, length) = range(&mut random, GRANULARITY);
                    let data = segments(&bytes(&mut random, length));
                    filter.write(offset % (2 * GRANULARITY), data, false).await.unwrap();
                }
            })
        };
        run((0..40).map(write).collect());
        assert!(copier.left.borrow().is_clean());
        assert!(*source.bytes.borrow() == *target.bytes.borrow(), "seed {seed}");
    }
}

#[test]
fn whatever_the_order_a_snapshot_stays_what_it_was() {
    for seed in 0..600 {
        let mut random = Random::new(seed);
        let before = bytes(&mut random, DISK);
        let source = Memory::new(before.clone(), seed);
        let target = Memory::new(vec![0; DISK as usize], seed + 1);
        let copier = Copier::new(source.clone(), target.clone(), everything());
        let filter = CopyBeforeWriteNode::new(source.clone(), copier.clone(), true, true, None);
        let filter = Rc::new(filter);
        let snapshot = Rc::new(SnapshotAccessNode::new(filter.clone()));
        let fails = seed % 4 == 0;
        if fails {
            target.writes_left.set(Some(random.below(12)));
        }
        let mut tasks: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        for number in 0..6 {
            tasks.push(Box::pin(guest(filter.clone(), seed * 100 + number, 5)));
        }
        for number in 0..3 {
            let (copier, snapshot, before) = (copier.clone(), snapshot.clone(), before.clone());
            let mut random = Random::new(seed * 1000 + number);
            tasks.push(Box::pin(async move {
                for _ in 0..8 {
                    let (offset, length) = range(&mut random, 4 * GRANULARITY);
                    if number == 0 {
                        let copied = copier.copy_left(copier.whole(offset..offset + length)).await;
                        assert!(copied.is_ok() || fails);
                    }
                    match read(&*snapshot, offset, length as usize).await {
                        Ok(there) => {
                            let expected = &before[offset as usize..(offset + length) as usize];
                            assert!(there == expected, "seed {seed}: the snapshot has changed");
                        }
                        Err(errno) => assert!(fails && errno == Errno::EACCES, "{errno}"),
                    }
                    turns(random.below(4)).await;
                }
            }));
        }
        run(tasks);
        if !fails {
            block_on({
                let copier = copier.clone();
                async move { copier.copy_all_left(0..DISK).await.unwrap() }
            });
            assert!(*target.bytes.borrow() == before, "seed {seed}");
        }
    }
}

/// An image over another: what was never written to it is below.
struct Overlay {
    own: Rc<Memory>,
    below: Rc<Memory>,
    there: RefCell<Vec<bool>>,
}

impl Overlay {
    fn take(&self, offset: u64, bytes: u64) {
        let sectors = (offset / SECTOR) as usize..((offset + bytes) / SECTOR) as usize;
        self.there.borrow_mut()[sectors].fill(true);
    }

    fn extent(&self, offset: u64, bytes: u64) -> Extent {
        let there = self.there.borrow();
        let first = (offset / SECTOR) as usize;
        let last = ((offset + bytes).div_ceil(SECTOR)) as usize;
        let same = there[first..last]
            .iter()
            .take_while(|own| **own == there[first])
            .count() as u64;
        let kind = if there[first] {
            ExtentKind::Data
        } else {
            ExtentKind::Unallocated
        };
        Extent {
            bytes: (same * SECTOR).min(bytes),
            kind,
        }
    }
}

impl Node for Overlay {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        Box::pin(async move {
            let (mut at, mut left) = (offset, into);
            while left.bytes() > 0 {
                let extent = self.extent(at, left.bytes());
                let piece = left.split_to(extent.bytes);
                match extent.kind {
                    ExtentKind::Data => self.own.read(at, piece).await?,
                    _ => self.below.read(at, piece).await?,
                }
                at += extent.bytes;
            }
            Ok(())
        })
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        let bytes = from.bytes();
        let written = self.own.write(offset, from, durable);
        Box::pin(async move {
            written.await?;
            self.take(offset, bytes);
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        let written = self.own.write_zeroes(offset, bytes, may_unmap);
        Box::pin(async move {
            written.await?;
            self.take(offset, bytes);
            Ok(())
        })
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        self.write_zeroes(offset, bytes, true)
    }

    fn flush(&self) -> NodeFuture<'_> {
        self.own.flush()
    }

    fn bytes(&self) -> u64 {
        self.own.bytes()
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        Box::pin(async move {
            let extent = self.extent(offset, bytes);
            // Who asks has it later than it was.
            turns(offset / SECTOR % 3).await;
            Ok(extent)
        })
    }
}

#[test]
fn whatever_the_order_a_stream_takes_what_is_below_and_leaves_what_the_guest_has_written() {
    for seed in 0..600 {
        let mut random = Random::new(seed);
        let mut below = bytes(&mut random, DISK);
        for (at, byte) in below.iter_mut().enumerate() {
            if at as u64 / GRANULARITY % 2 == 1 {
                *byte = 0;
            }
        }
        let base = Memory::new(below.clone(), seed);
        let overlay = Rc::new(Overlay {
            own: Memory::new(vec![0xee; DISK as usize], seed + 1),
            below: base.clone(),
            there: RefCell::new(vec![false; (DISK / SECTOR) as usize]),
        });
        let filter = Rc::new(CopyOnReadNode::new(overlay.clone(), true));
        let copier = Copier::pulling(filter.clone(), everything());
        copier.set_layers(Layers {
            nodes: vec![Rc::new(Sparse(base))],
            is_all: false,
        });
        copier.options.replace(Options {
            nothing: Nothing::LeftOut,
            ..Options::default()
        });
        let model = Rc::new(RefCell::new(below));
        let mut tasks: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        // Each has every sixth sector for itself, so that it is known what is there.
        for number in 0..6 {
            let (filter, model) = (filter.clone(), model.clone());
            let mut random = Random::new(seed * 100 + number);
            tasks.push(Box::pin(async move {
                for _ in 0..10 {
                    let at = (random.below(DISK / SECTOR / 6) * 6 + number) * SECTOR;
                    let data = bytes(&mut random, SECTOR);
                    filter.write(at, segments(&data), false).await.unwrap();
                    model.borrow_mut()[at as usize..(at + SECTOR) as usize].copy_from_slice(&data);
                    turns(random.below(5)).await;
                }
            }));
        }
        let next = Rc::new(Cell::new(0));
        for _ in 0..3 {
            let (copier, next) = (copier.clone(), next.clone());
            tasks.push(Box::pin(async move {
                while let Some(run) = Some(next.get()).filter(|at| *at < DISK) {
                    let end = (run + 3 * GRANULARITY).min(DISK);
                    next.set(end);
                    copier.copy_left(run..end).await.unwrap();
                }
            }));
        }
        run(tasks);
        assert!(copier.left.borrow().is_clean());
        assert!(
            overlay.there.borrow().iter().all(|own| *own),
            "seed {seed}: something is missing"
        );
        assert!(*overlay.own.bytes.borrow() == *model.borrow(), "seed {seed}");
    }
}
