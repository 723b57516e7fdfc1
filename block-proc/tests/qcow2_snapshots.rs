//! Internal snapshots and sizes: random requests, snapshots made, deleted and gone back to, sizes changed; QEMU's tools
//! find nothing wrong at any time, and see in each snapshot what the disk was then.

mod qcow2_common;

use block_proc::node::Node;
use block_proc::node::qcow2::Qcow2Node;
use ipc::graph::{CreateQcow2, Preallocation};
use nix::errno::Errno;
use qcow2_common::*;
use std::path::Path;
use std::rc::Rc;

struct Model {
    disk: Vec<u8>,
    /// Id and content.
    snapshots: Vec<(String, Vec<u8>)>,
    next_id: u32,
}

fn flush(node: &Rc<Qcow2Node>) {
    let node = node.clone();
    block_on(async move { node.flush().await.expect("a flush") });
}

fn raw_file(folder: &Path, data: &[u8]) -> String {
    let path = folder.join("model.raw");
    std::fs::write(&path, data).unwrap();
    path.to_str().unwrap().into()
}

/// QEMU's tools on the image, and on each snapshot in it.
fn look(folder: &Path, child: &Memory, model: &Model, what: &str) {
    let image = save(child, folder.join("image"));
    let (code, said) = check(&image);
    assert_eq!(code, 0, "{what}: {said}");
    let name = image.to_str().unwrap();
    let list = qemu_img(&["snapshot", "-l", name]);
    assert_eq!(
        list.matches("\n").count().saturating_sub(2),
        model.snapshots.len(),
        "{what}: {list}"
    );
    qemu_img(&[
        "compare",
        "-f",
        "qcow2",
        "-F",
        "raw",
        name,
        &raw_file(folder, &model.disk),
    ]);
    for (id, data) in &model.snapshots {
        let out = folder.join("snapshot.raw");
        let option = format!("snapshot.id={id}");
        qemu_img(&[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            "-l",
            &option,
            name,
            out.to_str().unwrap(),
        ]);
        let found = std::fs::read(out).unwrap();
        assert!(
            found[..data.len().min(found.len())] == data[..data.len().min(found.len())],
            "{what}: snapshot {id}"
        );
    }
}

fn request(node: &Rc<Qcow2Node>, model: &mut Model, random: &mut Random) {
    let size = node.bytes();
    if size < 512 {
        return;
    }
    let start = random.below(size / 512) * 512;
    let length = ((random.below(120) + 1) * 512).min(size - start);
    let range = start as usize..(start + length) as usize;
    let fill = (random.next() | 1) as u8;
    let kind = random.below(8);
    let node = node.clone();
    let found = block_on(async move {
        match kind {
            0..5 => node.write(start, segments(&vec![fill; length as usize]), false).await,
            5 => node.write_zeroes(start, length, fill & 2 != 0).await,
            6 => node.discard(start, length).await,
            _ => node.flush().await,
        }
        .expect("a request");
        read(&*node, start, length as usize).await.expect("a read")
    });
    match kind {
        0..5 => model.disk[range].fill(fill),
        5 => model.disk[range].fill(0),
        6 => model.disk[range].copy_from_slice(&found),
        _ => assert!(found == model.disk[range]),
    }
}

fn change(node: &Rc<Qcow2Node>, model: &mut Model, random: &mut Random, sizes: bool) -> String {
    let which = random.below(model.snapshots.len().max(1) as u64) as usize;
    match random.below(if sizes { 6 } else { 4 }) {
        0 | 1 => {
            let id = model.next_id.to_string();
            model.next_id += 1;
            let info = snapshot_info(&id);
            let node = node.clone();
            block_on(async move { node.create_snapshot(&info).await }).expect("a snapshot");
            model.snapshots.push((id.clone(), model.disk.clone()));
            format!("create {id}")
        }
        2 if !model.snapshots.is_empty() => {
            let (id, _) = model.snapshots.remove(which);
            let (node, gone) = (node.clone(), id.clone());
            block_on(async move { node.delete_snapshot(&gone).await }).expect("a deletion");
            format!("delete {id}")
        }
        3 if !model.snapshots.is_empty() => {
            let (id, data) = model.snapshots[which].clone();
            let (node, there) = (node.clone(), id.clone());
            block_on(async move { node.revert_to_snapshot(&there).await }).expect("going back");
            model.disk = data;
            format!("revert {id}")
        }
        4 | 5 => {
            let bytes = (random.below(6144) + 1) * 512;
            let grows = bytes > node.bytes();
            let preallocation = match random.below(4) {
                1 if grows => Preallocation::Metadata,
                2 if grows => Preallocation::Falloc,
                3 if grows => Preallocation::Full,
                _ => Preallocation::Off,
            };
            let resized = node.clone();
            block_on(async move { resized.resize(bytes, preallocation).await }).expect("another size");
            assert_eq!(node.bytes(), bytes);
            model.disk.resize(bytes as usize, 0);
            format!("resize {bytes} {preallocation:?}")
        }
        _ => String::from("nothing"),
    }
}

fn run(spec: &CreateQcow2, rounds: u64, seed: u64) {
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random::new(seed);
    let child = make(spec, None).expect("an image");
    let mut node = open(&child, None).expect("the image");
    let mut model = Model {
        disk: vec![0; spec.bytes as usize],
        snapshots: Vec::new(),
        next_id: 1,
    };
    for round in 0..rounds {
        for _ in 0..random.below(12) {
            request(&node, &mut model, &mut random);
        }
        let done = change(&node, &mut model, &mut random, spec.version == 3);
        let what = format!("{spec:?}, seed {seed}, round {round}, {done}");
        if random.below(3) == 0 {
            flush(&node);
            node = open(&child, None).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        assert!(content(&node) == model.disk, "{what}");
        if round % 5 == 4 {
            flush(&node);
            look(folder.path(), &child, &model, &what);
        }
    }
}

#[test]
fn snapshots_and_sizes_at_random() {
    let base = |cluster_bytes| CreateQcow2 {
        bytes: 1 << 20,
        cluster_bytes,
        ..CreateQcow2::default()
    };
    let mut specs = vec![
        base(512),
        base(4096),
        base(65536),
        CreateQcow2 {
            refcount_bits: 8,
            ..base(512)
        },
        CreateQcow2 {
            refcount_bits: 64,
            ..base(1024)
        },
        CreateQcow2 {
            extended_l2: true,
            ..base(16384)
        },
        CreateQcow2 {
            version: 2,
            ..base(4096)
        },
        CreateQcow2 {
            version: 2,
            ..base(512)
        },
        CreateQcow2 {
            preallocation: Preallocation::Metadata,
            ..base(4096)
        },
    ];
    specs.push(CreateQcow2 {
        bytes: 512,
        ..base(512)
    });
    for (seed, spec) in specs.iter().enumerate() {
        run(spec, 60, seed as u64);
    }
}

/// What QEMU made, we take; what we made, QEMU takes.
#[test]
fn snapshots_of_qemu_and_ours_live_together() {
    let folder = tempfile::tempdir().unwrap();
    for options in ["cluster_size=512", "cluster_size=64k,compat=0.10", "extended_l2=on"] {
        let path = folder.path().join("image");
        std::fs::write(&path, create(folder.path(), options, 1 << 20)).unwrap();
        let name = path.to_str().unwrap();
        qemu_io(&path, &["write -P 1 0 600k"]);
        qemu_img(&["snapshot", "-c", "theirs", name]);
        qemu_io(&path, &["write -P 2 100k 300k"]);
        let child = Memory::new(std::fs::read(&path).unwrap(), 3);
        let node = open(&child, None).unwrap();
        assert_eq!(node.snapshots()[0].name, "theirs");
        assert_eq!(
            (node.snapshots()[0].id.as_str(), node.snapshots()[0].disk_bytes),
            ("1", 1 << 20)
        );
        let writer = node.clone();
        block_on(async move {
            writer.create_snapshot(&snapshot_info("2")).await.unwrap();
            writer.write(0, segments(&[3; 65536]), false).await.unwrap();
            writer.flush().await.unwrap();
            let again = writer.delete_snapshot("3").await.unwrap_err();
            assert_eq!(again.errno, Some(Errno::ENOENT as i32));
        });
        save(&child, path.clone());
        assert_eq!(check(&path).0, 0, "{}", check(&path).1);
        qemu_io(&path, &["read -P 3 0 64k", "read -P 2 100k 300k"]);
        qemu_img(&["snapshot", "-a", "name-2", name]);
        qemu_io(&path, &["read -P 1 0 100k", "read -P 2 100k 300k"]);
        qemu_img(&["snapshot", "-d", "name-2", name]);
        assert_eq!(check(&path).0, 0);
        let child = Memory::new(std::fs::read(&path).unwrap(), 3);
        let node = open(&child, None).unwrap();
        block_on(async move {
            node.revert_to_snapshot("1").await.unwrap();
            node.delete_snapshot("1").await.unwrap();
            node.flush().await.unwrap();
        });
        save(&child, path.clone());
        assert_eq!(check(&path).0, 0, "{}", check(&path).1);
        qemu_io(&path, &["read -P 1 0 600k"]);
    }
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let refused = |spec: CreateQcow2, errno: Errno| {
        let child = make(&spec, spec.data_file.is_some().then(|| Memory::new(Vec::new(), 1))).unwrap();
        let children = block_proc::node::qcow2::Children {
            data_file: spec
                .data_file
                .is_some()
                .then(|| Memory::new(Vec::new(), 1) as Rc<dyn Node>),
            ..Default::default()
        };
        let node = open_children(&child, options(&child), children).unwrap();
        let writer = node.clone();
        let failed = block_on(async move {
            writer.write(0, segments(&[5; 4096]), false).await.unwrap();
            let failed = writer.create_snapshot(&snapshot_info("1")).await.unwrap_err();
            writer.write(8192, segments(&[6; 4096]), false).await.unwrap();
            writer.flush().await.unwrap();
            failed
        });
        assert_eq!(failed.errno, Some(errno as i32));
        assert!(node.snapshots().is_empty());
        if spec.data_file.is_none() {
            let folder = tempfile::tempdir().unwrap();
            let (code, said) = check(&save(&child, folder.path().join("image")));
            assert_eq!(code, 0, "{said}");
        }
    };
    let base = || CreateQcow2 {
        bytes: 1 << 20,
        ..CreateQcow2::default()
    };
    refused(
        CreateQcow2 {
            refcount_bits: 1,
            ..base()
        },
        Errno::EINVAL,
    );
    refused(
        CreateQcow2 {
            data_file: Some(("d".into(), false)),
            ..base()
        },
        Errno::ENOTSUP,
    );
    let child = make(&CreateQcow2 { version: 2, ..base() }, None).unwrap();
    let node = open(&child, None).unwrap();
    block_on(async move {
        let said = node.resize(1000, Preallocation::Off).await.unwrap_err();
        assert_eq!(said.message, "The new size must be a multiple of 512");
        let said = node.resize(512, Preallocation::Full).await.unwrap_err();
        assert_eq!(said.message, "Preallocation can't be used for shrinking an image");
        let said = node.resize(1 << 62, Preallocation::Off).await.unwrap_err();
        assert_eq!(said.message, "Failed to grow the L1 table: File too large");
        node.create_snapshot(&snapshot_info("1")).await.unwrap();
        let said = node.resize(2 << 20, Preallocation::Off).await.unwrap_err();
        assert_eq!(said.message, "Can't resize a version 2 image which has snapshots");
        assert_eq!(node.bytes(), 1 << 20);
    });
}

/// What a larger backing file has there does not show in what is new.
#[test]
fn a_grown_disk_reads_as_zeroes_where_it_is_new() {
    let folder = tempfile::tempdir().unwrap();
    for (version, extended_l2) in [(2, false), (3, false), (3, true)] {
        let spec = CreateQcow2 {
            bytes: 100 << 10,
            version,
            extended_l2,
            backing: Some(("base".into(), Some("raw".into()))),
            ..CreateQcow2::default()
        };
        let base = vec![9; 1 << 20];
        std::fs::write(folder.path().join("base"), &base).unwrap();
        let child = make(&spec, None).unwrap();
        let node = open(&child, Some(Memory::new(base.clone(), 1))).unwrap();
        let resized = node.clone();
        block_on(async move { resized.resize(2 << 20, Preallocation::Off).await.unwrap() });
        let mut expected = vec![0; 2 << 20];
        expected[..100 << 10].fill(9);
        assert!(content(&node) == expected);
        let image = save(&child, folder.path().join("image"));
        assert_eq!(check(&image).0, 0, "{}", check(&image).1);
        qemu_io(&image, &["read -P 9 0 100k", "read -P 0 100k 1948k"]);
        // Smaller and larger again: what was cut off does not come back.
        let resized = node.clone();
        block_on(async move {
            resized.write(512, segments(&[7; 300 << 10]), false).await.unwrap();
            resized.resize(1024, Preallocation::Off).await.unwrap();
            resized.resize(1 << 20, Preallocation::Off).await.unwrap();
        });
        let mut expected = vec![0; 1 << 20];
        expected[..512].fill(9);
        expected[512..1024].fill(7);
        assert!(content(&node) == expected, "version {version}");
        let image = save(&child, folder.path().join("image"));
        assert_eq!(check(&image).0, 0, "{}", check(&image).1);
    }
}

/// A node below can go, come, and change its size.
#[test]
fn another_backing_node() {
    let spec = CreateQcow2 {
        bytes: 8192,
        cluster_bytes: 512,
        ..CreateQcow2::default()
    };
    let child = make(&spec, None).unwrap();
    let node = open(&child, None).unwrap();
    assert!(content(&node) == [0; 8192]);
    let below = Memory::new(vec![4; 1024], 1);
    node.set_backing(Some(below.clone()));
    let mut expected = vec![0; 8192];
    expected[..1024].fill(4);
    assert!(content(&node) == expected);
    below.bytes.borrow_mut().resize(2048, 5);
    expected[1024..2048].fill(5);
    assert!(content(&node) == expected);
    below.bytes.borrow_mut().truncate(512);
    expected[512..2048].fill(0);
    assert!(content(&node) == expected);
    node.set_backing(None);
    assert!(content(&node) == [0; 8192]);
}

/// Clusters that are written compressed unpack to what they were, with us and with QEMU.
#[test]
fn compressed_clusters_are_packed_together() {
    let folder = tempfile::tempdir().unwrap();
    for (cluster_bytes, zstd, refcount_bits, version) in [
        (4096, false, 16, 3),
        (65536, false, 16, 2),
        (65536, true, 16, 3),
        (2 << 20, false, 16, 3),
        (2 << 20, true, 2, 3),
        (65536, false, 1, 3),
        (512, false, 16, 3),
    ] {
        let clusters = if cluster_bytes > 65536 { 2 } else { 64 };
        let bytes = clusters * u64::from(cluster_bytes) + 1024;
        let spec = CreateQcow2 {
            bytes,
            version,
            cluster_bytes,
            refcount_bits,
            zstd,
            ..CreateQcow2::default()
        };
        let child = make(&spec, None).unwrap();
        let node = open(&child, None).unwrap();
        let mut random = Random::new(9);
        let mut model = vec![0; bytes as usize];
        for (number, piece) in model.chunks_mut(cluster_bytes as usize).enumerate() {
            match number % 4 {
                0 => piece.iter_mut().for_each(|byte| *byte = random.next() as u8),
                1 => piece
                    .iter_mut()
                    .enumerate()
                    .for_each(|(at, byte)| *byte = (at % 90) as u8 + 1),
                // What is repeated is farther away than QEMU's window.
                2 => {
                    let word: Vec<u8> = (0..7000).map(|_| random.next() as u8 & 7).collect();
                    piece
                        .iter_mut()
                        .enumerate()
                        .for_each(|(at, byte)| *byte = word[at % word.len()]);
                }
                _ => {}
            }
        }
        for round in 0..2 {
            let (writer, data) = (node.clone(), model.clone());
            block_on(async move {
                for (number, piece) in data.chunks(cluster_bytes as usize).enumerate() {
                    let offset = number as u64 * u64::from(cluster_bytes);
                    writer.write_compressed(offset, segments(piece)).await.unwrap();
                    if number % 7 == 6 {
                        writer.flush().await.unwrap();
                    }
                }
                writer.flush().await.unwrap();
                if round == 1 {
                    assert_eq!(
                        writer.write_compressed(100, segments(&[1; 512])).await,
                        Err(Errno::EINVAL)
                    );
                }
            });
            assert!(content(&node) == model, "{spec:?}");
            let image = save(&child, folder.path().join("image"));
            assert_eq!(check(&image).0, 0, "{spec:?}: {}", check(&image).1);
            let names = [image.to_str().unwrap().to_owned(), raw_file(folder.path(), &model)];
            qemu_img(&["compare", "-f", "qcow2", "-F", "raw", &names[0], &names[1]]);
            if round == 0 && refcount_bits > 1 && (4096..=65536).contains(&cluster_bytes) {
                let used = child.bytes.borrow().len();
                assert!(
                    used < model.len() * 7 / 10,
                    "{used} bytes for {}: {spec:?}",
                    model.len()
                );
            }
        }
        assert!(content(&open(&child, None).unwrap()) == model);
    }
}
