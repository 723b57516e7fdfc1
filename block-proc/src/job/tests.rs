//! What is planned and copied, against a model: disks of sectors that are data, zeroes, or nobody's.

use super::copier::{CHUNK_BYTES, Copier, Options, Order, Target, ZERO_STEP_BYTES};
use super::layers::Layers;
use crate::bitmap::Bitmap;
use crate::buffer::Segments;
use crate::executor::Executor;
use crate::node::{Extent, ExtentKind, Node, NodeFuture};
use proptest::prelude::*;
use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

const SECTOR: u64 = 512;
/// Not a whole number of bits.
const SECTORS: usize = 517;
const DISK: u64 = SECTORS as u64 * SECTOR;

/// An image: for each sector what it has of its own; data is a number.
struct Image {
    sectors: RefCell<Vec<Option<u8>>>,
    below: Option<Rc<Image>>,
    /// Writes of zeroes, and of data.
    zeroed: RefCell<Vec<(u64, u64)>>,
    written: RefCell<Vec<(u64, u64)>>,
}

impl Image {
    fn new(sectors: Vec<Option<u8>>, below: Option<Rc<Self>>) -> Rc<Self> {
        Rc::new(Self {
            sectors: RefCell::new(sectors),
            below,
            zeroed: RefCell::default(),
            written: RefCell::default(),
        })
    }

    fn byte(&self, sector: usize) -> u8 {
        match self.sectors.borrow().get(sector).copied().flatten() {
            Some(byte) => byte,
            None => self.below.as_ref().map_or(0, |below| below.byte(sector)),
        }
    }

    fn put(&self, offset: u64, bytes: u64, from: impl Fn(usize) -> u8) {
        let first = (offset / SECTOR) as usize;
        for number in 0..(bytes / SECTOR) as usize {
            self.sectors.borrow_mut()[first + number] = Some(from(number));
        }
    }
}

async fn turn() {
    let mut is_over = false;
    poll_fn(|context| {
        if std::mem::replace(&mut is_over, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl Node for Image {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        Box::pin(async move {
            turn().await;
            let sectors = (offset / SECTOR) as usize..((offset + into.bytes()) / SECTOR) as usize;
            let bytes: Vec<u8> = sectors
                .flat_map(|sector| [self.byte(sector); SECTOR as usize])
                .collect();
            into.fill_from(&bytes);
            turn().await;
            Ok(())
        })
    }

    fn write(&self, offset: u64, from: Segments, _durable: bool) -> NodeFuture<'_> {
        Box::pin(async move {
            let mut bytes = vec![0; from.bytes() as usize];
            from.read_into(&mut bytes);
            turn().await;
            self.put(offset, from.bytes(), |sector| bytes[sector * SECTOR as usize]);
            self.written.borrow_mut().push((offset, from.bytes()));
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, _may_unmap: bool) -> NodeFuture<'_> {
        Box::pin(async move {
            turn().await;
            self.put(offset, bytes, |_| 0);
            self.zeroed.borrow_mut().push((offset, bytes));
            Ok(())
        })
    }

    fn discard(&self, _offset: u64, _bytes: u64) -> NodeFuture<'_> {
        Box::pin(async { Ok(()) })
    }

    fn flush(&self) -> NodeFuture<'_> {
        Box::pin(async { Ok(()) })
    }

    fn bytes(&self) -> u64 {
        self.sectors.borrow().len() as u64 * SECTOR
    }

    fn status(&self, offset: u64, bytes: u64) -> NodeFuture<'_, Extent> {
        Box::pin(async move {
            turn().await;
            let sectors = self.sectors.borrow();
            let kind = |sector: u64| match sectors[sector as usize] {
                None => ExtentKind::Unallocated,
                Some(0) => ExtentKind::Zero,
                Some(_) => ExtentKind::Data,
            };
            let first = offset / SECTOR;
            let same = (first..(offset + bytes) / SECTOR).take_while(|sector| kind(*sector) == kind(first));
            let bytes = same.count() as u64 * SECTOR;
            Ok(Extent {
                bytes,
                kind: kind(first),
            })
        })
    }
}

/// Runs of sectors.
fn sectors(length: usize) -> impl Strategy<Value = Vec<Option<u8>>> {
    let run = (
        1_usize..60,
        prop_oneof![Just(None), Just(Some(0)), (1_u8..255).prop_map(Some)],
    );
    prop::collection::vec(run, 0..20).prop_map(move |runs| {
        let mut sectors: Vec<Option<u8>> = runs.into_iter().flat_map(|(count, what)| vec![what; count]).collect();
        sectors.resize(length, None);
        sectors
    })
}

fn run(copier: &Rc<Copier>, writes: Vec<(u64, u64, u8)>, source: &Rc<Image>) {
    let mut executor = Executor::default();
    let (job, guest) = (copier.clone(), copier.clone());
    executor.spawn(async move {
        for lap in 0.. {
            let mut from = 0;
            loop {
                let plan = job.plan(from, lap == 0).await.unwrap();
                let mut end = from;
                for piece in &plan.pieces {
                    assert!(piece.range.start >= end && piece.range.start < piece.range.end);
                    let most = if piece.may_be_zero {
                        ZERO_STEP_BYTES
                    } else {
                        CHUNK_BYTES
                    };
                    assert!(piece.range.end - piece.range.start <= most);
                    end = piece.range.end;
                }
                for piece in plan.pieces {
                    job.copy_piece(piece).await.unwrap();
                }
                match plan.until {
                    Some(until) => from = until,
                    None => break,
                }
            }
            if job.left.borrow().is_clean() {
                break;
            }
        }
    });
    // As a mirror's filter does it.
    let source = source.clone();
    executor.spawn(async move {
        for (offset, bytes, byte) in writes {
            source.put(offset, bytes, |_| byte);
            guest.left.borrow_mut().set(offset..offset + bytes);
            for _ in 0..3 {
                turn().await;
            }
        }
    });
    let mut finished = Vec::new();
    executor.run(&mut finished);
    assert_eq!(finished.len(), 2);
}

fn write() -> impl Strategy<Value = (u64, u64, u8)> {
    (0..SECTORS as u64, 1_u64..40, 0_u8..255)
        .prop_map(|(first, count, byte)| (first * SECTOR, count.min(SECTORS as u64 - first) * SECTOR, byte))
}

fn options(order: Order, leaves_out: bool, target_reads_zeroes: bool) -> Options {
    Options {
        order,
        leaves_out,
        target_reads_zeroes,
        unmap: false,
        compress: None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn a_mirror_becomes_what_the_source_is(
        (base, top, old, writes) in (sectors(400), sectors(SECTORS), sectors(SECTORS), prop::collection::vec(write(), 0..30)),
        bits in 9_u32..14,
        is_new: bool,
    ) {
        let base = Image::new(base, None);
        let source = Image::new(top, Some(base.clone()));
        let target = Image::new(if is_new { vec![None; SECTORS] } else { old }, None);
        let mut left = Bitmap::new(DISK, 1 << bits);
        left.set(0..DISK);
        let layers = Layers { own: None, nodes: vec![source.clone(), base], is_all: true };
        let options = options(Order::Following, false, is_new);
        let copier = Rc::new(Copier::new(source.clone(), Target::Node(target.clone()), layers, options, left));
        run(&copier, writes, &source);
        // What the guest has written after the last lap is still left, and nothing else.
        let left = copier.left.borrow();
        for sector in 0..SECTORS {
            if !left.is_dirty(sector as u64 * SECTOR) {
                prop_assert_eq!(target.byte(sector), source.byte(sector), "sector {}", sector);
            }
        }
    }

    #[test]
    fn a_commit_copies_what_the_layers_have_and_nothing_else(
        (base, middle, top) in (sectors(SECTORS), sectors(450), sectors(SECTORS)),
        bits in 9_u32..14,
    ) {
        let base = Image::new(base, None);
        let middle = Image::new(middle, Some(base.clone()));
        let top = Image::new(top, Some(middle.clone()));
        // Beyond the middle one's end there are zeroes, whatever the base has.
        let expected: Vec<u8> = (0..SECTORS)
            .map(|sector| match (top.sectors.borrow()[sector], sector < 450) {
                (None, false) => 0,
                _ => top.byte(sector),
            })
            .collect();
        let before: Vec<u8> = (0..SECTORS).map(|sector| base.byte(sector)).collect();
        let mut left = Bitmap::new(DISK, 1 << bits);
        left.set(0..DISK);
        let cut = Image::new(expected.iter().map(|byte| Some(*byte)).collect(), None);
        let layers = Layers { own: None, nodes: vec![top.clone(), middle], is_all: false };
        let options = options(Order::Following, true, false);
        // Read through an image that shows what the driver would.
        let copier = Rc::new(Copier::new(cut, Target::Node(base.clone()), layers, options, left));
        run(&copier, Vec::new(), &top);
        for (sector, expected) in expected.iter().enumerate() {
            prop_assert_eq!(base.byte(sector), *expected, "sector {}, which was {}", sector, before[sector]);
        }
        prop_assert!(copier.left.borrow().is_clean());
        let zeroed: u64 = base.zeroed.borrow().iter().map(|(_, bytes)| bytes).sum();
        let written: u64 = base.written.borrow().iter().map(|(_, bytes)| bytes).sum();
        prop_assert!(zeroed + written <= DISK, "{} + {}", zeroed, written);
    }

    #[test]
    fn a_backup_keeps_what_the_source_was(
        (top, writes) in (sectors(SECTORS), prop::collection::vec(write(), 0..30)),
        bits in 9_u32..14,
    ) {
        let source = Image::new(top, None);
        let target = Image::new(vec![None; SECTORS], None);
        let expected: Vec<u8> = (0..SECTORS).map(|sector| source.byte(sector)).collect();
        let mut left = Bitmap::new(DISK, 1 << bits);
        left.set(0..DISK);
        let layers = Layers { own: None, nodes: vec![source.clone()], is_all: true };
        let options = options(Order::Keeping, true, true);
        let copier = Rc::new(Copier::new(source.clone(), Target::Node(target.clone()), layers, options, left));
        let filter = crate::node::copy_before_write::CopyBeforeWriteNode::new(source, target.clone(), true);
        filter.begin(copier.clone(), None);
        let mut executor = Executor::default();
        executor.spawn(async move {
            for (offset, bytes, byte) in writes {
                let buffer = crate::buffer::Buffer::new(bytes as usize);
                let from = Segments::of_buffer(&buffer, bytes as usize);
                from.fill_from(&vec![byte; bytes as usize]);
                filter.write(offset, from, false).await.unwrap();
                // The snapshot shows what was.
                let into = Segments::of_buffer(&buffer, bytes as usize);
                filter.read_snapshot(offset, into.clone()).await.unwrap();
                let mut there = vec![0; bytes as usize];
                into.read_into(&mut there);
                let first = (offset / SECTOR) as usize;
                for (number, sector) in there.chunks(SECTOR as usize).enumerate() {
                    assert_eq!(sector[0], expected[first + number]);
                }
            }
            expected
        });
        let job = copier.clone();
        executor.spawn(async move {
            let mut from = Some(0);
            while let Some(at) = from {
                let plan = job.plan(at, true).await.unwrap();
                for piece in plan.pieces {
                    job.copy_piece(piece).await.unwrap();
                }
                from = plan.until;
            }
            Vec::new()
        });
        let mut finished = Vec::new();
        executor.run(&mut finished);
        prop_assert!(copier.left.borrow().is_clean());
        let expected = finished.into_iter().find(|list| !list.is_empty()).expect("both have ended");
        for (sector, byte) in expected.iter().enumerate() {
            prop_assert_eq!(target.byte(sector), *byte, "sector {}", sector);
        }
    }
}
