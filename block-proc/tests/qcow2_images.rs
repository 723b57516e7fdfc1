//! Images that QEMU's tools made, with every feature that we know: they read back the same, and what we do not know is
//! kept.

mod qcow2_common;

use block_proc::node::Node;
use block_proc::node::qcow2::OpenError;
use qcow2_common::*;
use std::path::Path;

const SIZE: u64 = 6 << 20;

/// Data, holes, zeroes and text that compresses, in pieces that no cluster size fits.
fn model() -> Vec<u8> {
    let mut random = Random::new(99);
    let mut data = vec![0; SIZE as usize];
    let mut at = 0;
    while at < data.len() {
        let length = ((random.below(600) + 1) * 512) as usize;
        let end = (at + length).min(data.len());
        match random.below(3) {
            0 => data[at..end].iter_mut().for_each(|byte| *byte = random.next() as u8),
            1 => data[at..end]
                .iter_mut()
                .enumerate()
                .for_each(|(i, byte)| *byte = (i % 97) as u8),
            _ => {}
        }
        at = end;
    }
    data
}

fn convert(folder: &Path, arguments: &[&str]) -> Vec<u8> {
    let (raw, image) = (folder.join("model"), folder.join("image"));
    std::fs::write(&raw, model()).unwrap();
    let files = [raw.to_str().unwrap(), image.to_str().unwrap()];
    qemu_img(&[&["convert", "-f", "raw", "-O", "qcow2"], arguments, &files].concat());
    std::fs::read(&image).unwrap()
}

#[test]
fn images_of_every_kind_read_back() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [
        &["-o", "compat=0.10"][..],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=2M"],
        &["-o", "extended_l2=on"],
        &["-o", "refcount_bits=1"],
        &["-o", "refcount_bits=64,cluster_size=1k"],
        &["-o", "lazy_refcounts=on"],
        &["-o", "preallocation=metadata"],
        &["-c"],
        &["-c", "-o", "compat=0.10,cluster_size=4k"],
        &["-c", "-o", "cluster_size=2M"],
        &["-c", "-o", "cluster_size=512"],
        &["-c", "-o", "compression_type=zstd"],
        &["-c", "-o", "compression_type=zstd,cluster_size=2M"],
        &["-c", "-o", "extended_l2=on"],
        &["-S", "0"],
    ] {
        let child = Memory::new(convert(folder.path(), arguments), 1);
        let node = open(&child, None).unwrap_or_else(|error| panic!("{arguments:?}: {error}"));
        assert!(content(&node) == model(), "{arguments:?}");
    }
}

/// Clusters that compressed data shares with other compressed data are counted down piece by piece.
#[test]
fn compressed_clusters_can_be_written_over() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [
        &["-c"][..],
        &["-c", "-o", "cluster_size=4k,refcount_bits=16"],
        &["-c", "-o", "compression_type=zstd,extended_l2=on"],
        &["-c", "-o", "compat=0.10,cluster_size=512"],
    ] {
        let child = Memory::new(convert(folder.path(), arguments), 2);
        let node = open(&child, None).unwrap();
        let mut random = Random::new(5);
        let mut model = model();
        for round in 0..120_u64 {
            let start = random.below(SIZE / 512 - 64) * 512;
            let length = (random.below(64) + 1) * 512;
            let data = vec![round as u8; length as usize];
            model[start as usize..(start + length) as usize].copy_from_slice(&data);
            let writer = node.clone();
            block_on(async move {
                writer.write(start, segments(&data), false).await.unwrap();
                if round % 10 == 0 {
                    writer.flush().await.unwrap();
                }
            });
        }
        let writer = node.clone();
        block_on(async move { writer.flush().await.unwrap() });
        assert!(content(&node) == model, "{arguments:?}");
        let path = save(&child, folder.path().join("image"));
        assert_eq!(check(&path), (0, check(&path).1), "{arguments:?}");
    }
}

#[test]
fn internal_snapshots_keep_what_they_had() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    for options in ["cluster_size=512", "cluster_size=64k", "extended_l2=on", "compat=0.10"] {
        std::fs::write(&path, create(folder.path(), options, 1 << 20)).unwrap();
        let name = path.to_str().unwrap();
        qemu_io(&path, &["write -P 1 0 600k"]);
        qemu_img(&["snapshot", "-c", "one", name]);
        qemu_io(&path, &["write -P 2 100k 300k"]);
        qemu_img(&["snapshot", "-c", "two", name]);
        let child = Memory::new(std::fs::read(&path).unwrap(), 3);
        let node = open(&child, None).unwrap();
        block_on(async move {
            node.write(50 << 10, segments(&[3; 512 * 301]), false).await.unwrap();
            node.write_zeroes(400 << 10, 100 << 10, true).await.unwrap();
            node.discard(512 << 10, 64 << 10).await.unwrap();
            node.flush().await.unwrap();
        });
        save(&child, path.clone());
        assert_eq!(check(&path).0, 0, "{options}: {}", check(&path).1);
        qemu_io(
            &path,
            &["read -P 3 50k 154112", "read -P 2 205312 204288", "read -P 0 400k 100k"],
        );
        for (snapshot, pattern) in [("two", "read -P 2 100k 300k"), ("one", "read -P 1 0 600k")] {
            qemu_img(&["snapshot", "-a", snapshot, name]);
            qemu_io(&path, &[pattern]);
        }
        qemu_img(&["snapshot", "-d", "one", name]);
        qemu_img(&["snapshot", "-d", "two", name]);
        assert_eq!(check(&path).0, 0, "{options}");
    }
}

/// Who changes the disk without keeping bitmaps must say so, in time: those that record changes are out of date then, the
/// others are not.
#[test]
fn bitmaps_are_marked_as_out_of_date_with_the_first_change() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let name = path.to_str().unwrap();
    std::fs::write(&path, create(folder.path(), "", 1 << 20)).unwrap();
    qemu_img(&["bitmap", "--add", name, "records"]);
    qemu_img(&["bitmap", "--add", "--disable", name, "rests"]);
    let before = std::fs::read(&path).unwrap();
    let child = Memory::new(before.clone(), 4);
    let options = block_proc::node::qcow2::Options {
        writable: false,
        ..options(&child)
    };
    let reader = open_with(&child, options, None).unwrap();
    assert!(reader.header().bitmaps.is_some() && reader.header().autoclear == 1);
    assert!(block_on(async move { reader.write(0, segments(&[1; 512]), false).await }).is_err());
    assert!(*child.bytes.borrow() == before);
    let node = open(&child, None).unwrap();
    assert!(content(&node) == vec![0; 1 << 20]);
    assert!(*child.bytes.borrow() == before, "reading leaves them as they are");
    let writer = node.clone();
    block_on(async move {
        writer.write(0, segments(&[1; 512]), false).await.unwrap();
        writer.create_snapshot(&snapshot_info("1")).await.unwrap();
        writer.flush().await.unwrap();
    });
    save(&child, path.clone());
    let flags = |name: &str| {
        let info = qemu_img(&["info", "--output=json", path.to_str().unwrap()]);
        let at = info
            .find(&format!("\"name\": \"{name}\""))
            .unwrap_or_else(|| panic!("{info}"));
        let start = info[..at].rfind("\"flags\"").unwrap();
        info[start..at].to_owned()
    };
    assert!(flags("records").contains("in-use"), "{}", flags("records"));
    assert!(!flags("rests").contains("in-use"), "{}", flags("rests"));
    assert_eq!(check(&path).0, 0, "{}", check(&path).1);
    block_on(async move { node.resize(2 << 20, ipc::graph::Preallocation::Off).await.unwrap() });
    save(&child, path.clone());
    assert!(flags("rests").contains("in-use"), "no bitmap fits another size");
    for name in ["records", "rests"] {
        qemu_img(&["bitmap", "--remove", path.to_str().unwrap(), name]);
    }
    assert_eq!(check(&path).0, 0, "{}", check(&path).1);
}

#[test]
fn a_chain_of_three_reads_and_copies() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (base, middle, top) = (at("base"), at("middle"), at("top"));
    std::fs::write(&base, vec![0x11; 700 << 10]).unwrap();
    let new = |backing: &Path, format: &str, image: &Path, size: &str| {
        let (backing, image) = (backing.to_str().unwrap(), image.to_str().unwrap());
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", backing, "-F", format, image, size]);
    };
    new(&base, "raw", &middle, "1M");
    qemu_io(&middle, &["write -P 0x22 100k 130k", "write -z 300k 64k"]);
    new(&middle, "qcow2", &top, "1536k");
    let expected = folder.path().join("expected");
    qemu_io(&top, &["write -P 0x33 500k 1k"]);
    let bottom = Memory::new(std::fs::read(&base).unwrap(), 1);
    let node = open(&Memory::new(std::fs::read(&middle).unwrap(), 2), Some(bottom)).unwrap();
    let child = Memory::new(std::fs::read(&top).unwrap(), 3);
    let node = open(&child, Some(node)).unwrap();
    assert_eq!(node.header().backing_name.as_deref(), middle.to_str());
    assert_eq!(node.header().backing_format.as_deref(), Some("qcow2"));
    let writer = node.clone();
    block_on(async move {
        writer.write(350 << 10, segments(&[0x44; 1536]), false).await.unwrap();
        writer
            .write((1 << 20) - 512, segments(&[0x55; 1024]), false)
            .await
            .unwrap();
        writer.discard(0, 128 << 10).await.unwrap();
        writer.flush().await.unwrap();
    });
    save(&child, top.clone());
    qemu_img(&[
        "convert",
        "-O",
        "raw",
        top.to_str().unwrap(),
        expected.to_str().unwrap(),
    ]);
    assert!(content(&node) == std::fs::read(&expected).unwrap());
    assert_eq!(check(&top).0, 0);
    qemu_io(
        &top,
        &[
            "read -P 0x44 350k 1536",
            "read -P 0x22 128k 102k",
            "read -P 0 300k 50k",
            "read -P 0x33 500k 1k",
        ],
    );
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |options: &str| {
        let child = Memory::new(create(folder.path(), options, 1 << 20), 1);
        open(&child, None).map(drop).unwrap_err().to_string()
    };
    let base = folder.path().join("base");
    std::fs::write(&base, [0; 512]).unwrap();
    let overlay = refused(&format!("backing_file={},backing_fmt=raw", base.display()));
    assert!(overlay.contains(base.to_str().unwrap()), "{overlay}");
    let data_file = refused(&format!("data_file={}", folder.path().join("data").display()));
    assert!(data_file.contains("external data file"), "{data_file}");
    let mut image = create(folder.path(), "", 1 << 20);
    // An unknown feature, with the name that the image's own table has for bit 4 (extended L2) put on bit 63.
    image[72] = 0x80;
    let error = open(&Memory::new(image.clone(), 1), None).map(drop).unwrap_err();
    assert_eq!(error, OpenError::Unsupported("incompatible feature bit 63".into()));
    image[72] = 0;
    for bit in [1, 2] {
        image[79] = bit;
        let child = Memory::new(image.clone(), 1);
        if bit == 2 {
            assert_eq!(open(&child, None).map(drop).unwrap_err(), OpenError::Corrupt);
        }
        let options = block_proc::node::qcow2::Options {
            writable: false,
            ..options(&child)
        };
        assert!(content(&open_with(&child, options, None).unwrap()) == vec![0; 1 << 20]);
    }
    image[79] = 0;
    image[35] = 2;
    let error = open(&Memory::new(image, 1), None).map(drop).unwrap_err().to_string();
    assert!(error.contains("LUKS"), "{error}");
}
