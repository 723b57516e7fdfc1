//! Images that their writer left dirty: they are repaired when they are opened for writing, whatever their counts are.

mod qcow2_common;

use block_proc::node::Node;
use qcow2_common::*;

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}

/// An image with data, snapshots, compressed and zero clusters, and a bitmap.
fn image(folder: &std::path::Path, options: &str) -> Vec<u8> {
    let path = folder.join("image");
    std::fs::write(&path, create(folder, options, 3 << 20)).unwrap();
    let name = path.to_str().unwrap();
    qemu_io(&path, &["write -P 1 0 600k", "write -z 1M 300k"]);
    qemu_img(&["snapshot", "-c", "one", name]);
    let cluster = 1_u64 << std::fs::read(&path).unwrap()[23];
    let compressed = format!("write -c -P 5 2M {cluster}");
    qemu_io(&path, &["write -P 2 100k 300k", &compressed]);
    if !options.contains("0.10") {
        qemu_img(&["bitmap", "--add", "--disable", name, "rests"]);
    }
    std::fs::read(&path).unwrap()
}

#[test]
fn a_dirty_image_is_repaired() {
    let folder = tempfile::tempdir().unwrap();
    for (options, seed) in [
        ("cluster_size=512", 1),
        ("cluster_size=4k,refcount_bits=64", 2),
        ("cluster_size=64k,lazy_refcounts=on", 3),
        ("extended_l2=on", 4),
        ("cluster_size=4k,refcount_bits=4", 5),
    ] {
        let sound = image(folder.path(), options);
        let expected = content(&open(&Memory::new(sound.clone(), 1), None).unwrap());
        let mut random = Random::new(seed);
        for kind in 0..4 {
            let mut broken = sound.clone();
            let table = u64_at(&broken, 48) as usize;
            let block = u64_at(&broken, table) as usize;
            let cluster = 1_usize << broken[23];
            match kind {
                // All counts are 0.
                0 => broken[block..block + cluster].fill(0),
                // Anything.
                1 => broken[block..block + cluster]
                    .iter_mut()
                    .for_each(|byte| *byte = random.next() as u8),
                // No block at all.
                2 => broken[table..table + 8].fill(0),
                // Flags are wrong.
                _ => {
                    let l1 = u64_at(&broken, 40) as usize;
                    broken[l1] ^= 0x80;
                    let l2 = (u64_at(&broken, l1) & 0x00ff_ffff_ffff_fe00) as usize;
                    broken[l2] ^= 0x80;
                }
            }
            broken[79] |= 1;
            let child = Memory::new(broken, seed);
            let node = open(&child, None).unwrap_or_else(|error| panic!("{options}, {kind}: {error}"));
            let path = save(&child, folder.path().join("repaired"));
            assert_eq!(check(&path).0, 0, "{options}, {kind}: {}", check(&path).1);
            assert!(content(&node) == expected, "{options}, {kind}");
            let writer = node.clone();
            block_on(async move {
                writer.write(1 << 20, segments(&vec![9; 1 << 20]), false).await.unwrap();
                writer.flush().await.unwrap();
            });
            save(&child, path.clone());
            assert_eq!(check(&path).0, 0, "{options}, {kind}: {}", check(&path).1);
            let out = folder.path().join("snapshot.raw");
            let names = [path.to_str().unwrap(), out.to_str().unwrap()];
            qemu_img(&["convert", "-O", "raw", "-l", "snapshot.name=one", names[0], names[1]]);
            let snapshot = std::fs::read(&out).unwrap();
            assert!(snapshot[..600 << 10].iter().all(|byte| *byte == 1), "{options}, {kind}");
        }
    }
}

/// A cut while repairing: the image is dirty still, or repaired.
#[test]
fn repairing_can_be_cut_at_any_write() {
    let folder = tempfile::tempdir().unwrap();
    let mut broken = image(folder.path(), "cluster_size=512");
    let table = u64_at(&broken, 48) as usize;
    let block = u64_at(&broken, table) as usize;
    broken[block..block + 512].fill(0);
    broken[79] |= 1;
    let mut finished = false;
    for writes in 0.. {
        let child = Memory::new(broken.clone(), writes);
        child.writes_left.set(Some(writes));
        finished |= open(&child, None).is_ok();
        child.writes_left.set(None);
        let node = open(&child, None).unwrap_or_else(|error| panic!("cut at {writes}: {error}"));
        assert_eq!(node.bytes(), 3 << 20);
        let path = save(&child, folder.path().join("repaired"));
        let (code, said) = check(&path);
        assert!(code == 0 || (code == 3 && !finished), "cut at {writes}: {said}");
        if finished {
            break;
        }
    }
}

/// Tables that lie are an error, and cost neither much memory nor another image.
#[test]
fn an_image_that_cannot_be_repaired_is_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let sound = image(folder.path(), "cluster_size=4k");
    let l1 = u64_at(&sound, 40) as usize;
    let l2 = (u64_at(&sound, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    for (at, value) in [(l1, 1_u64 << 55), (l2, 1 << 54 | 1 << 63), (l2 + 8, 1 << 62 | 1 << 50)] {
        let mut broken = sound.clone();
        broken[at..at + 8].copy_from_slice(&value.to_be_bytes());
        broken[79] |= 1;
        let child = Memory::new(broken.clone(), 1);
        child.largest.set(64 << 20);
        assert!(open(&child, None).is_err(), "{at:#x}");
        assert!(*child.bytes.borrow() == broken, "{at:#x}: it was written");
    }
}
