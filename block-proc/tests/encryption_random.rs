//! Random requests, many at a time, on encrypted nodes and on a plain array; then QEMU's tools look at the image.

mod encryption_common;
mod qcow2_common;

use block_proc::executor::Executor;
use block_proc::node::Node;
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

fn run(format: &str, options: &str, bytes: u64, backing_bytes: Option<u64>, seed: u64) {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random::new(seed);
    let mut model = vec![0; bytes as usize];
    let mut options = format!(
        "{options},{}",
        if format == "luks" {
            "key-secret=s"
        } else {
            "encrypt.key-secret=s"
        }
    );
    let base = backing_bytes.map(|bytes| {
        let data = random_bytes(bytes as usize, seed);
        model[..bytes as usize].copy_from_slice(&data);
        let path = folder.path().join("base");
        std::fs::write(&path, &data).unwrap();
        options += &format!(",backing_file={},backing_fmt=raw", path.display());
        Memory::new(data, seed)
    });
    let backing = || base.clone().map(|node| node as Rc<dyn Node>);
    let path = folder.path().join("new");
    let (name, size) = (path.to_str().unwrap(), bytes.to_string());
    qemu_img_encrypted(&["create", "-q", "-f", format, "-o", &options, name, &size]);
    let mut image = std::fs::read(&path).unwrap();
    if format == "luks" {
        let payload = u32::from_be_bytes(image[104..108].try_into().unwrap()) as usize * 512;
        image.resize(payload + bytes as usize, 0);
    }
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
    if format == "luks" {
        // Zeroes in the file are not zeroes on the disk.
        let node = disk.node.clone();
        block_on(async move { node.write_zeroes(0, bytes, false).await.unwrap() });
    }
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

#[test]
fn luks() {
    run("luks", QUICK, 1 << 20, None, 1);
    run(
        "luks",
        "iter-time=10,cipher-mode=cbc,ivgen-alg=essiv",
        900 << 10,
        None,
        2,
    );
}

#[test]
fn qcow2_with_luks() {
    let luks = "encrypt.format=luks,encrypt.iter-time=10";
    run("qcow2", &format!("{luks},cluster_size=4k"), 2 << 20, None, 1);
    run(
        "qcow2",
        &format!("{luks},cluster_size=512"),
        1 << 20,
        Some(700 << 10),
        2,
    );
    run("qcow2", &format!("{luks},extended_l2=on"), 2 << 20, Some(1 << 20), 3);
}

#[test]
fn qcow2_with_the_first_format() {
    for seed in 0..3 {
        run("qcow2", "encrypt.format=aes,cluster_size=4k", 2 << 20, None, seed);
        run(
            "qcow2",
            "encrypt.format=aes,cluster_size=512",
            1 << 20,
            Some(700 << 10),
            seed,
        );
        run(
            "qcow2",
            "encrypt.format=aes,extended_l2=on",
            2 << 20,
            Some(1 << 20),
            seed,
        );
        run("qcow2", "encrypt.format=aes,compat=0.10", 2 << 20, Some(1 << 20), seed);
    }
}
