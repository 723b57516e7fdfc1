//! Images that somebody made to do harm: clear errors, bounded memory, bounded time, and never a wrong place written.

mod qcow2_common;

use block_proc::node::Node;
use block_proc::node::qcow2::{Fault, OpenError};
use nix::errno::Errno;
use qcow2_common::*;

/// What is done to an image.
type Damage = fn(&mut [u8]);

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn get(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}

/// 1 MiB of which the first 64 KiB are written.
fn image() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, create(folder.path(), "cluster_size=4k", 1 << 20)).unwrap();
    qemu_io(&path, &["write -P 7 0 64k"]);
    std::fs::read(&path).unwrap()
}

/// Where the first L2 table is.
fn l2(image: &[u8]) -> usize {
    (get(image, get(image, 40) as usize) & 0x00ff_ffff_ffff_fe00) as usize
}

fn error(image: Vec<u8>) -> OpenError {
    open(&Memory::new(image, 1), None).map(drop).unwrap_err()
}

#[test]
fn absurd_sizes_and_places_are_refused() {
    let absurd: [(&str, usize, u64); 11] = [
        ("the disk's size", 24, u64::MAX),
        ("entries", 24, 1 << 60),
        ("the L1 table", 40, 1 << 55),
        ("the L1 table", 40, 12345),
        ("the L1 table", 40, 0),
        ("the refcount table", 48, u64::MAX - 4095),
        ("refcount_order", 96, 7 << 32 | 104),
        ("header_length", 96, 4 << 32 | 0xffff_ffff),
        ("header_length", 96, 4 << 32 | 96),
        ("L1 table has", 32, 0xffff_ffff),
        ("internal snapshots", 60, 0xffff_ffff << 32),
    ];
    for (what, at, value) in absurd {
        let mut image = image();
        // The snapshot count is the high half of eight bytes of which the low half starts the table's offset.
        put(&mut image, at, value);
        let said = error(image).to_string();
        assert!(said.contains(what), "{what} at {at}: {said}");
    }
    assert_eq!(error(vec![0; 4096]), OpenError::NotQcow2);
    assert_eq!(error(Vec::new()), OpenError::NotQcow2);
    let mut old = image();
    old[7] = 1;
    assert_eq!(error(old), OpenError::Version(1));
    for bits in [0, 8, 22, 63, 255] {
        let mut image = image();
        image[23] = bits;
        assert!(error(image).to_string().contains("cluster_bits"));
    }
    let mut backing = image();
    put(&mut backing, 8, 4000);
    backing[16..20].copy_from_slice(&1000_u32.to_be_bytes());
    assert!(error(backing).to_string().contains("backing file's name"));
}

#[test]
fn tables_that_share_clusters_are_refused_for_writing() {
    let damaged: [(&str, Damage); 5] = [
        ("L2 table is the L1 table", |image| {
            let l1 = get(image, 40);
            put(image, l1 as usize, l1 | 1 << 63);
        }),
        ("L2 table is the header's neighbour, the refcount table", |image| {
            let (l1, table) = (get(image, 40), get(image, 48));
            put(image, l1 as usize, table | 1 << 63);
        }),
        ("a refcount block is the refcount table", |image| {
            let table = get(image, 48);
            put(image, table as usize, table);
        }),
        ("the L1 table is the refcount table", |image| {
            let table = get(image, 48);
            put(image, 40, table);
        }),
        ("a refcount block twice", |image| {
            let table = get(image, 48) as usize;
            let block = get(image, table);
            put(image, table + 8, block);
        }),
    ];
    for (what, damage) in damaged {
        let mut image = image();
        damage(&mut image);
        let error = error(image);
        assert!(
            matches!(error, OpenError::Damaged(Fault::Overlap { .. })),
            "{what}: {error}"
        );
    }
    let mut image = image();
    let l1 = get(&image, 40) as usize;
    put(&mut image, l1, 1 << 50 | 1 << 63);
    assert_eq!(error(image), OpenError::Damaged(Fault::L2Table(1 << 50)));
}

/// Damage found late: the guest gets EIO, the image is marked, and nothing is written any more.
#[test]
fn damage_found_while_writing_marks_the_image() {
    let damaged: [(&str, Damage); 4] = [
        ("data on the L1 table", |image| {
            let (l2, l1) = (l2(image), get(image, 40));
            put(image, l2, l1 | 1 << 63);
        }),
        ("data on its own L2 table", |image| {
            let l2 = l2(image);
            put(image, l2, l2 as u64 | 1 << 63);
        }),
        ("data on the header", |image| {
            let l2 = l2(image);
            put(image, l2, 0x0000_0000_0000_0200 | 1 << 63);
        }),
        ("free clusters that are tables", |image| {
            let block = get(image, get(image, 48) as usize) as usize;
            image[block..block + 2 * 64].fill(0);
            let l2 = l2(image);
            put(image, l2, 0);
        }),
    ];
    for (what, damage) in damaged {
        let mut image = image();
        damage(&mut image);
        let child = Memory::new(image, 1);
        let node = open(&child, None).unwrap_or_else(|error| panic!("{what}: {error}"));
        let before = child.bytes.borrow().clone();
        block_on(async move {
            assert_eq!(
                node.write(0, segments(&[1; 512]), false).await,
                Err(Errno::EIO),
                "{what}"
            );
            assert_eq!(
                node.write(8192, segments(&[1; 512]), false).await,
                Err(Errno::EIO),
                "{what}"
            );
            assert_eq!(node.flush().await, Err(Errno::EIO), "{what}");
            assert_eq!(read(&*node, 8192, 512).await.unwrap(), [7; 512], "{what}");
        });
        let mut expected = before;
        expected[79] |= 2;
        assert!(*child.bytes.borrow() == expected, "{what}: something else was written");
        assert_eq!(open(&child, None).map(drop).unwrap_err(), OpenError::Corrupt);
    }
}

#[test]
fn damaged_compressed_data_is_an_error_and_not_damage_of_the_image() {
    let mut image = image();
    let at = l2(&image);
    let extent = 1 << 62 | get(&image, at) & 0x00ff_ffff_ffff_fe00;
    put(&mut image, at, extent);
    // Far behind the file's end, and as long as an entry can say.
    put(&mut image, at + 8, 1 << 62 | 0xf << 58 | 1 << 40);
    let child = Memory::new(image.clone(), 1);
    let node = open(&child, None).unwrap();
    block_on(async move {
        assert_eq!(read(&*node, 0, 512).await, Err(Errno::EIO));
        assert_eq!(read(&*node, 4096, 512).await, Err(Errno::EIO));
        assert_eq!(read(&*node, 8192, 512).await.unwrap(), [7; 512]);
    });
    assert!(*child.bytes.borrow() == image);
}

/// Random bytes changed in tables and header: whatever happens, it ends, and memory stays small.
#[test]
fn damaged_at_random() {
    let folder = tempfile::tempdir().unwrap();
    let images: Vec<Vec<u8>> = ["cluster_size=4k", "extended_l2=on", "cluster_size=512", "compat=0.10"]
        .iter()
        .map(|options| {
            let path = folder.path().join("image");
            std::fs::write(&path, create(folder.path(), options, 1 << 20)).unwrap();
            qemu_io(&path, &["write -P 7 0 64k", "write -z 100k 64k"]);
            qemu_img(&["snapshot", "-c", "one", path.to_str().unwrap()]);
            qemu_io(&path, &["write -P 9 32k 64k"]);
            std::fs::read(&path).unwrap()
        })
        .collect();
    let mut opened = 0;
    for seed in 0..4000_u64 {
        let mut random = Random::new(seed);
        let mut image = images[seed as usize % images.len()].clone();
        let places: Vec<usize> = {
            let l1 = get(&image, 40) as usize;
            let table = get(&image, 48) as usize;
            let block = get(&image, table) as usize;
            vec![0, 0, l1, l2(&image), table, block, get(&image, 64) as usize]
        };
        for _ in 0..random.below(4) + 1 {
            let place = places[random.below(places.len() as u64) as usize] + random.below(112) as usize;
            if let Some(byte) = image.get_mut(place) {
                *byte = match random.below(3) {
                    0 => random.next() as u8,
                    1 => *byte ^ (1 << random.below(8)),
                    _ => [0, 0xff, 0x80, 1][random.below(4) as usize],
                };
            }
        }
        let child = Memory::new(image, seed);
        child.turns.set(0);
        child.largest.set(64 << 20);
        let Ok(node) = open(&child, None) else { continue };
        opened += 1;
        let size = node.bytes();
        block_on(async move {
            for _ in 0..12 {
                let offset = random.below(size.min(1 << 20) / 512) * 512;
                let bytes = ((random.below(64) + 1) * 512).min(size - offset);
                // Errors are fine here: what counts is that it ends.
                let _ = match random.below(5) {
                    0 => read(&*node, offset, bytes as usize).await.map(drop),
                    1 => node.write_zeroes(offset, bytes, true).await,
                    2 => node.discard(offset, bytes).await,
                    3 => node.flush().await,
                    _ => node.write(offset, segments(&vec![1; bytes as usize]), false).await,
                };
            }
            let _ = node.flush().await;
            assert!(node.cached_slices() <= (32 << 20) / 512);
        });
    }
    assert!(opened > 400, "only {opened} images were worth the test");
}

/// More tables than the cache holds: old ones go.
#[test]
fn the_table_cache_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let child = Memory::new(create(folder.path(), "cluster_size=512", 1 << 30), 1);
    child.turns.set(0);
    child.cache_bytes.set(1 << 20);
    let node = open(&child, None).unwrap();
    let writer = node.clone();
    block_on(async move {
        for table in 0..(1 << 30) / 32768_u64 {
            writer
                .write(table * 32768, segments(&[table as u8; 512]), false)
                .await
                .unwrap();
        }
        writer.flush().await.unwrap();
        for table in 0..(1 << 30) / 32768_u64 {
            assert_eq!(read(&*writer, table * 32768, 512).await.unwrap(), [table as u8; 512]);
        }
    });
    assert!(node.cached_slices() <= (1 << 20) / 512, "{}", node.cached_slices());
    assert_eq!(check(&save(&child, folder.path().join("image"))).0, 0);
}
