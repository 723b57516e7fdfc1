//! Snapshot tables that somebody made to do harm, and hosts that fail in the middle of a change.

mod qcow2_common;

use block_proc::node::Node;
use block_proc::node::qcow2::{OpenError, Options};
use ipc::graph::{CreateQcow2, Preallocation};
use nix::errno::Errno;
use qcow2_common::*;

fn get(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// 256 KiB, with the snapshots 1 and 2.
fn image() -> Vec<u8> {
    let spec = CreateQcow2 {
        bytes: 256 << 10,
        cluster_bytes: 512,
        ..CreateQcow2::default()
    };
    let child = make(&spec, None).unwrap();
    let node = open(&child, None).unwrap();
    block_on(async move {
        for id in ["1", "2"] {
            node.write(0, segments(&[7; 65536]), false).await.unwrap();
            node.create_snapshot(&snapshot_info(id)).await.unwrap();
        }
        node.write(32 << 10, segments(&[8; 8192]), true).await.unwrap();
    });
    child.bytes.borrow().clone()
}

#[test]
fn absurd_snapshot_tables_are_refused() {
    let sound = image();
    let table = get(&sound, 64) as usize;
    let absurd: [(&str, usize, u64); 6] = [
        ("a snapshot's L1 table", table, 1 << 60),
        ("a snapshot's L1 table", table, 777),
        ("a snapshot's L1 table", table + 8, 0xffff_ffff_0001_0006),
        ("bytes of extra data", table + 32, 0xffff_ffff),
        (
            "does not end in the file",
            table + 8,
            get(&sound, table + 8) & !0xffff_ffff | 0xffff_ffff,
        ),
        ("is not on a cluster", 64, u64::MAX - 511),
    ];
    for (what, at, value) in absurd {
        for writable in [true, false] {
            let mut image = sound.clone();
            put(&mut image, at, value);
            let child = Memory::new(image, 1);
            let options = Options {
                writable,
                ..options(&child)
            };
            let said = open_with(&child, options, None).map(drop).unwrap_err().to_string();
            assert!(said.contains(what), "{what} at {at}: {said}");
        }
    }
    // Two snapshots with one L1 table; a snapshot whose L1 table is the active one.
    for other in [get(&sound, table), get(&sound, 40)] {
        let mut image = sound.clone();
        let second = table + 40 + 24 + 7_usize.next_multiple_of(8);
        put(&mut image, second, other);
        let error = open(&Memory::new(image, 1), None).map(drop).unwrap_err();
        assert!(matches!(error, OpenError::Damaged(_)), "{error}");
    }
}

/// Counts and tables that lie, found while a snapshot is deleted: EIO, the image is marked, nothing else is written.
#[test]
fn damage_found_while_changing_snapshots_marks_the_image() {
    let sound = image();
    let table = get(&sound, 64) as usize;
    let l1 = get(&sound, table) as usize;
    let l2 = (get(&sound, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    for (at, value) in [
        (l1, 1_u64 << 50),
        (l2, 1_u64 << 50),
        (l2 + 8, (sound.len() as u64 * 4).next_multiple_of(512)),
    ] {
        let mut image = sound.clone();
        put(&mut image, at, value);
        let child = Memory::new(image, 1);
        let node = open(&child, None).unwrap();
        let before = child.bytes.borrow().clone();
        block_on(async move {
            let failed = node.delete_snapshot("1").await.unwrap_err();
            assert_eq!(failed.errno, Some(Errno::EIO as i32));
            assert_eq!(node.write(0, segments(&[1; 512]), false).await, Err(Errno::EIO));
            assert_eq!(read(&*node, 32 << 10, 512).await.unwrap(), [8; 512]);
        });
        let now = child.bytes.borrow();
        let mut expected = before;
        expected[79] |= 2;
        let same = now.iter().zip(&expected).filter(|(now, before)| now != before).count();
        assert_eq!(same, 0, "{at:#x}: what the image uses has changed");
    }
}

/// The host fails at any write of a change: the image is the old or the new one, and goes on working.
#[test]
fn a_host_that_fails_in_the_middle_of_a_change() {
    let folder = tempfile::tempdir().unwrap();
    let sound = image();
    for kind in 0..5 {
        let mut succeeded = false;
        for writes in 0..400 {
            let child = Memory::new(sound.clone(), writes);
            child.turns.set(0);
            let node = open(&child, None).unwrap();
            let expected = content(&node);
            child.writes_left.set(Some(writes));
            let changed = node.clone();
            let result = block_on(async move {
                match kind {
                    0 => changed.create_snapshot(&snapshot_info("3")).await,
                    1 => changed.delete_snapshot("1").await,
                    2 => changed.revert_to_snapshot("1").await,
                    3 => changed.resize(4 << 20, Preallocation::Off).await,
                    _ => changed.resize(64 << 10, Preallocation::Off).await,
                }
            });
            child.writes_left.set(None);
            succeeded |= result.is_ok();
            let writer = node.clone();
            block_on(async move {
                writer.write(0, segments(&[5; 1024]), false).await.unwrap();
                writer.flush().await.unwrap();
            });
            let found = content(&node);
            assert!(found[..1024] == [5; 1024]);
            if kind != 2 && kind != 4 {
                assert!(found[1024..expected.len()] == expected[1024..], "{kind}, {writes}");
            }
            let (code, said) = check(&save(&child, folder.path().join("image")));
            assert!(matches!(code, 0 | 3), "{kind}, {writes}: {said}");
            let again = open(&child, None).unwrap_or_else(|error| panic!("{kind}, {writes}: {error}"));
            assert!(content(&again) == found);
            assert_eq!(again.snapshots(), node.snapshots());
            if result.is_ok() {
                break;
            }
        }
        assert!(succeeded, "{kind} needs more writes than this test has tried");
    }
}
