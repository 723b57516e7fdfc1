//! Random requests, many at a time, on encrypted nodes and on a plain array; then QEMU's tools look at the image.

mod encryption_common;
mod qcow2_common;

use block_proc::crypto::cipher::Spec;
use block_proc::executor::Executor;
use block_proc::node::Node;
use block_proc::node::qcow2::encrypt::NewEncryption;
use encryption_common::*;
use qcow2_common::*;
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

const SECTOR: u64 = 512;

/// A node, what it should hold, and how many bytes that is.
struct Disk {
    node: Rc<dyn Node>,
    model: Rc<RefCell<Vec<u8>>>,
    bytes: u64,
}

/// Runs requests that do not overlap at the same time.
fn batch(disk: &Disk, random: &mut Random) {
    let mut executor = Executor::<()>::default();
    let mut spawned = 0;
    let mut taken: Vec<Range<u64>> = Vec::new();
    for _ in 0..random.below(8) + 1 {
        // Some are longer than a buffer for ciphertext.
        let largest = [SECTOR, 4096, 64 << 10, 600 << 10][random.below(4) as usize];
        let start = random.below(disk.bytes / SECTOR) * SECTOR;
        let length = ((random.below(largest / SECTOR) + 1) * SECTOR).min(disk.bytes - start);
        if taken
            .iter()
            .any(|other| other.start < start + length && start < other.end)
        {
            continue;
        }
        taken.push(start..start + length);
        spawned += 1;
        let (node, model) = (disk.node.clone(), disk.model.clone());
        let places = start as usize..(start + length) as usize;
        let seed = random.next();
        match random.below(10) {
            0..4 => {
                executor.spawn(async move {
                    let data = random_bytes(length as usize, seed);
                    node.write(start, segments(&data), seed & 7 == 0)
                        .await
                        .expect("a write");
                    model.borrow_mut()[places].copy_from_slice(&data);
                });
            }
            4..6 => {
                executor.spawn(async move {
                    node.write_zeroes(start, length, seed & 1 == 0).await.expect("zeroes");
                    model.borrow_mut()[places].fill(0);
                });
            }
            6 => {
                // Reading tells what it has become.
                executor.spawn(async move {
                    node.discard(start, length).await.expect("a discard");
                    let now = read(&*node, start, length as usize).await.expect("a read");
                    model.borrow_mut()[places].copy_from_slice(&now);
                });
            }
            7 => executor.spawn(async move { node.flush().await.expect("a flush") }),
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

fn run(new: NewEncryption, options: &str, bytes: u64, backing_bytes: Option<u64>, seed: u64) {
    run_format("qcow2", new, options, bytes, backing_bytes, seed);
}

fn run_format(format: &str, new: NewEncryption, options: &str, bytes: u64, backing_bytes: Option<u64>, seed: u64) {
    let mut options = options.to_owned();
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random::new(seed);
    let mut model = vec![0; bytes as usize];
    let base = backing_bytes.map(|bytes| {
        let data = random_bytes(bytes as usize, seed);
        model[..bytes as usize].copy_from_slice(&data);
        let path = folder.path().join("base");
        std::fs::write(&path, &data).unwrap();
        options += &format!(",backing_file={},backing_fmt=raw", path.display());
        Memory::new(data, seed)
    });
    let backing = || base.clone().map(|node| node as Rc<dyn Node>);
    let image = match (format, new) {
        ("luks", NewEncryption::Luks(luks)) => our_luks(luks, bytes),
        _ => our_qcow2(folder.path(), &options, new, bytes),
    };
    let child = Memory::new(image, seed);
    let open = || {
        let (node, found) = open_any(&child, format, backing());
        assert_eq!(found, bytes);
        node
    };
    let mut disk = Disk {
        node: open(),
        model: Rc::new(RefCell::new(model)),
        bytes,
    };
    for round in 0..60 {
        batch(&disk, &mut random);
        if round == 30 {
            let closed = disk.node.clone();
            block_on(async move { closed.flush().await.expect("a flush") });
            disk.node = open();
        }
    }
    assert!(all(&disk.node, bytes) == *disk.model.borrow(), "{options}, seed {seed}");
    let closed = disk.node.clone();
    block_on(async move { closed.flush().await.expect("a flush") });
    assert_same_for_qemu(folder.path(), format, &child.bytes.borrow(), &disk.model.borrow());
}

fn luks_with(mode: &str, iv: &str) -> NewEncryption {
    let spec = Spec::of_qemu(Some("aes-128"), Some(mode), Some(iv), None);
    NewEncryption::Luks(quick(spec.unwrap()))
}

#[test]
fn luks() {
    run_format("luks", luks_with("xts", "plain64"), "", 1 << 20, None, 1);
    run_format("luks", luks_with("cbc", "essiv"), "", 900 << 10, None, 2);
}

#[test]
fn qcow2_with_luks() {
    let luks = luks_with("xts", "plain64");
    for seed in 0..2 {
        run(luks, "cluster_size=4k", 2 << 20, None, seed);
        run(luks, "cluster_size=512", 1 << 20, Some(700 << 10), seed);
        run(luks, "extended_l2=on", 2 << 20, Some(1 << 20), seed);
    }
}

#[test]
fn qcow2_with_the_first_format() {
    let aes = NewEncryption::Aes;
    for seed in 0..2 {
        run(aes, "cluster_size=4k", 2 << 20, None, seed);
        run(aes, "cluster_size=512", 1 << 20, Some(700 << 10), seed);
        run(aes, "extended_l2=on", 2 << 20, Some(1 << 20), seed);
        run(aes, "compat=0.10", 2 << 20, Some(1 << 20), seed);
    }
}
