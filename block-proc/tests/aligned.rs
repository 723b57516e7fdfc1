//! Requests on any bytes of a node that takes whole blocks only.

mod qcow2_common;

use block_proc::buffer::Segments;
use block_proc::executor::Executor;
use block_proc::node::aligned::Aligned;
use block_proc::node::window::WindowNode;
use block_proc::node::{Limits, Node, NodeFuture};
use qcow2_common::{Memory, Random, block_on, read, segments};
use std::cell::Cell;
use std::rc::Rc;

const BLOCK: u64 = 4096;

/// What O_DIRECT is: anything but whole blocks is refused.
struct Blocks {
    memory: Rc<Memory>,
    block: u64,
    grows: bool,
}

impl Blocks {
    fn check(&self, offset: u64, bytes: u64) {
        let whole = |value: u64| value.is_multiple_of(self.block);
        assert!(whole(offset) && whole(bytes), "{bytes} bytes at {offset}");
        assert!(
            self.grows || offset + bytes <= self.bytes(),
            "{bytes} bytes at {offset}"
        );
    }
}

impl Node for Blocks {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        self.check(offset, into.bytes());
        self.memory.read(offset, into)
    }

    fn write(&self, offset: u64, from: Segments, durable: bool) -> NodeFuture<'_> {
        self.check(offset, from.bytes());
        self.memory.write(offset, from, durable)
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> NodeFuture<'_> {
        self.check(offset, bytes);
        self.memory.write_zeroes(offset, bytes, may_unmap)
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        self.check(offset, bytes);
        self.memory.discard(offset, bytes)
    }

    fn flush(&self) -> NodeFuture<'_> {
        self.memory.flush()
    }

    fn bytes(&self) -> u64 {
        self.memory.bytes()
    }

    fn limits(&self) -> Limits {
        Limits {
            align: self.block,
            grows: self.grows,
        }
    }
}

fn blocks(bytes: usize, seed: u64) -> (Rc<Memory>, Rc<Aligned>) {
    let memory = Memory::new((0..bytes).map(|at| (at / 7) as u8).collect(), seed);
    let blocks = Blocks {
        memory: memory.clone(),
        block: BLOCK,
        grows: false,
    };
    (memory, Aligned::new(Rc::new(blocks), BLOCK))
}

#[test]
fn neighbours_in_one_block_that_are_written_at_once_do_not_undo_each_other() {
    const BYTES: u64 = 1 << 20;
    for seed in 0..40 {
        let (memory, node) = blocks(BYTES as usize, seed);
        let mut model = memory.bytes.borrow().clone();
        let mut random = Random::new(seed);
        for _ in 0..20 {
            // Ranges beside each other, each in a task of its own, so that tasks meet in their blocks.
            let mut executor = Executor::default();
            let mut at = random.below(3 * BLOCK);
            while at < BYTES {
                let bytes = (1 + random.below(2 * BLOCK)).min(BYTES - at);
                let (node, byte, kind) = (node.clone(), random.next() as u8, random.below(4));
                let range = at as usize..(at + bytes) as usize;
                let offset = at;
                match kind {
                    0 | 1 => model[range].fill(byte),
                    2 => model[range].fill(0),
                    _ => {}
                }
                executor.spawn(async move {
                    match kind {
                        0 | 1 => {
                            node.write(offset, segments(&vec![byte; bytes as usize]), kind == 0)
                                .await
                        }
                        2 => node.write_zeroes(offset, bytes, false).await,
                        _ => node.read(offset, segments(&vec![0; bytes as usize])).await,
                    }
                });
                at += bytes;
            }
            let mut results = Vec::new();
            executor.run(&mut results);
            assert!(results.iter().all(Result::is_ok), "{results:?}");
            assert!(*memory.bytes.borrow() == model, "seed {seed}");
        }
        let (offset, bytes) = (random.below(BYTES / 2), random.below(BYTES / 2) as usize);
        let node = node.clone();
        let seen = block_on(async move { read(&*node, offset, bytes).await }).unwrap();
        assert!(seen == model[offset as usize..][..bytes], "seed {seed}");
    }
}

#[test]
fn a_window_at_an_odd_offset_of_a_direct_file_is_read_and_written() {
    let (memory, node) = blocks(64 << 10, 1);
    let window = Rc::new(WindowNode::new(node, 1000, Some(8192)).unwrap());
    let mut model = memory.bytes.borrow().clone();
    model[1000 + 512..1000 + 1536].fill(9);
    model[1000 + 4096..1000 + 8192].fill(0);
    let same = window.clone();
    let seen = block_on(async move {
        same.write(512, segments(&[9; 1024]), false).await.unwrap();
        same.write_zeroes(4096, 4096, true).await.unwrap();
        // A hint that covers no block of the file.
        same.discard(0, 1024).await.unwrap();
        read(&*same, 0, 8192).await.unwrap()
    });
    assert_eq!(seen, model[1000..][..8192]);
    assert_eq!(*memory.bytes.borrow(), model, "nothing beside the window");
}

#[test]
fn a_node_that_does_not_grow_is_written_to_its_end_and_not_beyond() {
    // blkdebug's `align` may be larger than what the node below has its size in.
    let memory = Memory::new(vec![1; 4096 + 512], 1);
    let blocks = Blocks {
        memory: memory.clone(),
        block: 512,
        grows: false,
    };
    let node = Aligned::new(Rc::new(blocks), 4096);
    let (same, ended) = (node.clone(), Rc::new(Cell::new(false)));
    let done = ended.clone();
    let seen = block_on(async move {
        same.write(4096 + 100, segments(&[2; 412]), false).await.unwrap();
        done.set(true);
        read(&*same, 4000, 608).await.unwrap()
    });
    assert!(ended.get());
    assert_eq!(
        (seen[..196].to_vec(), seen[196..].to_vec()),
        (vec![1; 196], vec![2; 412])
    );
    assert_eq!(memory.bytes(), 4096 + 512);
}
