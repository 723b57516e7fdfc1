//! Random requests, many at a time, on the qcow2 driver and on a plain array; then QEMU's tools look at the image.

mod qcow2_common;

use block_proc::executor::Executor;
use block_proc::node::Node;
use block_proc::node::qcow2::Qcow2Node;
use qcow2_common::*;
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

const SECTOR: u64 = 512;

struct Case {
    options: String,
    bytes: u64,
    backing_bytes: Option<u64>,
    requests: u64,
    seed: u64,
    cache_bytes: u64,
}

impl Case {
    fn new(options: &str, bytes: u64, requests: u64, seed: u64) -> Self {
        Self {
            options: options.into(),
            bytes,
            backing_bytes: None,
            requests,
            seed,
            cache_bytes: 4 << 20,
        }
    }
}

/// Runs requests that do not overlap at the same time.
fn batch(node: &Rc<Qcow2Node>, model: &Rc<RefCell<Vec<u8>>>, random: &mut Random) {
    let mut executor = Executor::<()>::default();
    let mut spawned = 0;
    let mut taken: Vec<Range<u64>> = Vec::new();
    let size = node.bytes();
    let cluster = 1 << node.header().cluster_bits;
    for _ in 0..random.below(8) + 1 {
        let largest = match random.below(4) {
            0 => SECTOR,
            1 => cluster,
            2 => 3 * cluster,
            _ => 16 << 10,
        };
        let start = random.below(size / SECTOR) * SECTOR;
        let start = if random.below(3) == 0 {
            start / cluster * cluster
        } else {
            start
        };
        let length = ((random.below(largest / SECTOR + 1) + 1) * SECTOR).min(size - start);
        if taken
            .iter()
            .any(|other| other.start < start + length && start < other.end)
        {
            continue;
        }
        taken.push(start..start + length);
        spawned += 1;
        let (node, model) = (node.clone(), model.clone());
        let places = start as usize..(start + length) as usize;
        let fill = (random.next() | 1) as u8;
        match random.below(12) {
            0..5 => {
                let data: Vec<u8> = (0..length).map(|at| fill.wrapping_add((at / SECTOR) as u8)).collect();
                let durable = random.below(8) == 0;
                executor.spawn(async move {
                    node.write(start, segments(&data), durable).await.expect("a write");
                    model.borrow_mut()[places].copy_from_slice(&data);
                });
            }
            5..7 => {
                executor.spawn(async move {
                    node.write_zeroes(start, length, fill & 2 != 0).await.expect("zeroes");
                    model.borrow_mut()[places].fill(0);
                });
            }
            7 => {
                // Reading tells what it has become.
                executor.spawn(async move {
                    node.discard(start, length).await.expect("a discard");
                    let now = read(&*node, start, length as usize).await.expect("a read");
                    model.borrow_mut()[places].copy_from_slice(&now);
                });
            }
            8 => {
                let flushed = node;
                taken.pop();
                executor.spawn(async move { flushed.flush().await.expect("a flush") });
            }
            _ => {
                executor.spawn(async move {
                    let now = read(&*node, start, length as usize).await.expect("a read");
                    assert!(now == model.borrow()[places], "{length} bytes at {start:#x} differ");
                });
            }
        }
    }
    let mut finished = Vec::new();
    executor.run(&mut finished);
    assert_eq!(finished.len(), spawned, "requests wait for each other");
}

fn run(case: &Case) {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random::new(case.seed);
    let mut options = case.options.clone();
    let mut model = vec![0; case.bytes as usize];
    let base = case.backing_bytes.map(|bytes| {
        let data: Vec<u8> = (0..bytes).map(|at| (at / SECTOR % 251 + 1) as u8).collect();
        let shared = bytes.min(case.bytes) as usize;
        model[..shared].copy_from_slice(&data[..shared]);
        std::fs::write(folder.path().join("base"), &data).unwrap();
        options += &format!(",backing_file={},backing_fmt=raw", folder.path().join("base").display());
        Memory::new(data, case.seed)
    });
    let backing = || base.as_ref().map(|base| base.clone() as Rc<dyn Node>);
    let child = Memory::new(create(folder.path(), &options, case.bytes), case.seed);
    child.cache_bytes.set(case.cache_bytes);
    let model = Rc::new(RefCell::new(model));
    let mut node = open(&child, backing()).expect("the image");
    for request in 0..case.requests {
        batch(&node, &model, &mut random);
        if request % 97 == 96 {
            let closed = node.clone();
            block_on(async move { closed.flush().await.expect("a flush") });
            node = open(&child, backing()).expect("the image again");
        }
    }
    assert!(content(&node) == *model.borrow(), "seed {}", case.seed);
    let closed = node.clone();
    block_on(async move { closed.flush().await.expect("a flush") });
    let image = save(&child, folder.path().join("image.qcow2"));
    let (code, said) = check(&image);
    assert_eq!(code, 0, "{options}, seed {}: {said}", case.seed);
    let raw = folder.path().join("model.raw");
    std::fs::write(&raw, &*model.borrow()).unwrap();
    let (image, raw) = (image.to_str().unwrap(), raw.to_str().unwrap());
    qemu_img(&["compare", "-f", "qcow2", "-F", "raw", image, raw]);
}

#[test]
fn every_cluster_size() {
    for (bits, bytes) in [
        (9, 512 << 10),
        (10, 700 << 10),
        (12, 2 << 20),
        (16, 8 << 20),
        (21, 40 << 20),
    ] {
        for compat in ["0.10", "1.1"] {
            let options = format!("cluster_size={},compat={compat}", 1_u64 << bits);
            run(&Case::new(&options, bytes, 300, bits));
        }
    }
}

#[test]
fn every_refcount_width() {
    for width in [1, 2, 4, 8, 16, 32, 64] {
        let options = format!("cluster_size=512,refcount_bits={width}");
        run(&Case::new(&options, 3 << 20, 400, width));
        let options = format!("cluster_size=65536,refcount_bits={width},lazy_refcounts=on");
        run(&Case::new(&options, 5 << 20, 200, width));
    }
}

#[test]
fn subclusters() {
    for (bits, bytes) in [(14, 2 << 20), (16, 8 << 20), (21, 40 << 20)] {
        let options = format!("cluster_size={},extended_l2=on", 1_u64 << bits);
        run(&Case::new(&options, bytes, 400, bits));
        run(&Case {
            backing_bytes: Some(bytes / 2 + 512),
            ..Case::new(&options, bytes, 400, bits + 100)
        });
    }
}

#[test]
fn a_backing_file_of_any_length() {
    for backing_bytes in [512, 1_000_448, 2 << 20, 5 << 20] {
        for options in [
            "cluster_size=4096",
            "cluster_size=65536,compat=0.10",
            "cluster_size=512,refcount_bits=1",
        ] {
            run(&Case {
                backing_bytes: Some(backing_bytes),
                ..Case::new(options, (2 << 20) + 1536, 250, backing_bytes)
            });
        }
    }
}

#[test]
fn metadata_preallocated_by_qemu() {
    for options in [
        "preallocation=metadata,cluster_size=4096",
        "preallocation=full",
        "preallocation=falloc,extended_l2=on",
    ] {
        run(&Case::new(options, 3 << 20, 300, 7));
    }
}

#[test]
fn many_seeds() {
    for seed in 1000..1040 {
        let bits = [9, 12, 16][seed as usize % 3];
        run(&Case::new(
            &format!("cluster_size={}", 1_u64 << bits),
            1 << 20,
            150,
            seed,
        ));
    }
}

/// Tables come and go all the time, and changes are written because there is no room for more.
#[test]
fn caches_of_a_few_slices() {
    for (options, bytes) in [
        ("cluster_size=512", 2 << 20),
        ("cluster_size=512,refcount_bits=64", 2 << 20),
        ("cluster_size=4096", 32 << 20),
        ("cluster_size=16384,extended_l2=on", 32 << 20),
    ] {
        for seed in 0..4 {
            run(&Case {
                cache_bytes: 2048,
                ..Case::new(options, bytes, 150, seed)
            });
        }
    }
}
