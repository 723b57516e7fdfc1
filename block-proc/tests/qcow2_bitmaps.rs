//! Persistent bitmaps of qcow2 images: ours that QEMU reads, QEMU's that we read, hostile ones, and writes that fail.

mod qcow2_common;
use block_proc::bitmap::Bitmap;
use block_proc::bitmaps::{DirtyBitmap, SharedBitmap};
use block_proc::node::Node;
use block_proc::node::qcow2::{OpenError, Qcow2Node};
use qcow2_common::*;
use std::cell::RefCell;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;

const DISK: u64 = 24 << 20;

/// A saved image, and its path for qemu-img.
struct Image {
    folder: tempfile::TempDir,
    path: PathBuf,
}

impl Image {
    fn new(options: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, create(folder.path(), options, DISK)).unwrap();
        Self { folder, path }
    }

    fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }

    fn bitmap(&self, arguments: &[&str]) {
        let mut all = vec!["bitmap"];
        all.extend(arguments);
        // The name goes between options and bitmap.
        all.insert(all.len() - 1, self.name());
        qemu_img(&all);
    }

    fn child(&self) -> Rc<Memory> {
        Memory::new(std::fs::read(&self.path).unwrap(), 3)
    }

    fn bitmaps_by_qemu(&self) -> String {
        qemu_img(&["info", self.name()])
    }
}

fn dirty(bitmap: &SharedBitmap) -> Vec<Range<u64>> {
    let bitmap = bitmap.borrow();
    let mut at = 0;
    std::iter::from_fn(|| {
        let run = bitmap.bits().next(at, u64::MAX)?;
        at = run.end;
        Some(run)
    })
    .collect()
}

/// A write as the graph does it.
fn write(node: &Rc<Qcow2Node>, offset: u64, bytes: u64) {
    for bitmap in node.bitmaps() {
        bitmap.borrow_mut().record(offset..offset + bytes);
    }
    let node = node.clone();
    block_on(async move { node.write(offset, segments(&vec![7; bytes as usize]), false).await }).unwrap();
}

fn store(node: &Rc<Qcow2Node>) -> Result<(), nix::errno::Errno> {
    let node = node.clone();
    block_on(async move { node.store_bitmaps().await })
}

fn keep(node: &Rc<Qcow2Node>, name: &str, granularity: u64, enabled: bool) -> SharedBitmap {
    node.check_new_bitmap(name).unwrap();
    let bits = Bitmap::new(node.bytes(), granularity);
    let bitmap = Rc::new(RefCell::new(DirtyBitmap::new(bits, enabled, Some(name.into()))));
    node.keep_bitmap(bitmap.clone());
    bitmap
}

fn is_clean(path: &Path) {
    assert_eq!(check(path).0, 0, "{}", check(path).1);
}

#[test]
fn what_qemu_has_recorded_is_read_and_what_we_record_is_read_by_qemu() {
    for options in [
        "",
        "cluster_size=512",
        "cluster_size=2M,extended_l2=on",
        "refcount_bits=1",
    ] {
        let image = Image::new(options);
        image.bitmap(&["--add", "-g", "4096", "records"]);
        image.bitmap(&["--add", "--disable", "rests"]);
        qemu_io(&image.path, &["write 1M 8k", "write 20M 512", "discard 3M 1M"]);
        let child = image.child();
        let node = open(&child, None).unwrap();
        let records = node.bitmap("records").unwrap();
        let by_qemu = [1 << 20..(1 << 20) + 8192, 3 << 20..4 << 20, 20 << 20..(20 << 20) + 4096];
        assert_eq!(dirty(&records), by_qemu, "{options}");
        assert!(dirty(&node.bitmap("rests").unwrap()).is_empty());
        assert!(!node.bitmap("rests").unwrap().borrow().is_enabled());

        write(&node, 10 << 20, 100);
        let whole = keep(&node, "whole", 512, true);
        whole.borrow_mut().record(0..DISK);
        store(&node).unwrap();
        save(&child, image.path.clone());
        is_clean(&image.path);
        let info = image.bitmaps_by_qemu();
        assert!(!info.contains("in-use") && info.contains("whole"), "{options}: {info}");
        // QEMU reads ours: what it merges is what we had.
        image.bitmap(&["--add", "-g", "4096", "--disable", "copy"]);
        image.bitmap(&["--merge", "records", "copy"]);
        image.bitmap(&["--add", "-g", "512", "--disable", "copy2"]);
        image.bitmap(&["--merge", "whole", "copy2"]);
        is_clean(&image.path);
        let again = open(&image.child(), None).unwrap();
        let ours = [
            1 << 20..(1 << 20) + 8192,
            3 << 20..4 << 20,
            10 << 20..(10 << 20) + 4096,
            20 << 20..(20 << 20) + 4096,
        ];
        assert_eq!(dirty(&again.bitmap("copy").unwrap()), ours, "{options}");
        assert_eq!(dirty(&again.bitmap("records").unwrap()), ours, "{options}");
        assert_eq!(dirty(&again.bitmap("copy2").unwrap()), vec![0..DISK; 1]);
        drop(image.folder);
    }
}

#[test]
fn marks_come_before_the_first_change_and_go_with_storing() {
    let image = Image::new("");
    image.bitmap(&["--add", "records"]);
    image.bitmap(&["--add", "--disable", "rests"]);
    let child = image.child();
    let node = open(&child, None).unwrap();
    let marks = |what: &str| {
        save(&child, image.path.clone());
        is_clean(&image.path);
        let described = node.describe().bitmaps;
        let marked: Vec<bool> = described.iter().map(|bitmap| bitmap.in_use).collect();
        let by_qemu = image.bitmaps_by_qemu().matches("in-use").count();
        assert_eq!(marked.iter().filter(|marked| **marked).count(), by_qemu, "{what}");
        marked
    };
    assert_eq!(marks("opened"), [false, false]);
    write(&node, 0, 512);
    assert_eq!(marks("written"), [true, false]);
    let other = node.clone();
    block_on(async move { other.outdate_bitmap("rests").await.unwrap() });
    assert_eq!(marks("changed"), [true, true]);
    // Whoever opens it now cannot trust them.
    let late = open(&image.child(), None).unwrap();
    assert!(late.bitmaps().iter().all(|bitmap| bitmap.borrow().is_inconsistent()));
    write(&late, 0, 512);
    store(&late).unwrap();
    assert!(
        late.describe().bitmaps.iter().all(|bitmap| bitmap.in_use),
        "storing makes nothing true"
    );
    store(&node).unwrap();
    assert_eq!(marks("stored"), [false, false]);
    write(&node, 512, 512);
    assert_eq!(marks("written again"), [true, false]);
    let other = node.clone();
    block_on(async move { other.resize(DISK * 2, ipc::graph::Preallocation::Off).await.unwrap() });
    assert_eq!(marks("resized"), [true, true]);
    node.bitmaps()
        .iter()
        .for_each(|bitmap| bitmap.borrow_mut().resize(DISK * 2));
    store(&node).unwrap();
    assert_eq!(marks("stored with another size"), [false, false]);
    for name in ["records", "rests"] {
        let (other, bitmap) = (node.clone(), node.bitmap(name).unwrap());
        block_on(async move { other.remove_bitmap(name).await.unwrap() });
        node.forget_bitmap(&bitmap);
        save(&child, image.path.clone());
        is_clean(&image.path);
    }
    assert!(node.header().bitmaps.is_none() && node.header().autoclear == 0);
    assert!(!image.bitmaps_by_qemu().contains("bitmaps:"));
}

#[test]
fn a_failing_host_leaves_an_image_that_checks_and_bitmaps_that_are_marked_or_true() {
    let image = Image::new("cluster_size=512");
    image.bitmap(&["--add", "-g", "512", "records"]);
    for left in 0..80 {
        let child = image.child();
        let node = open(&child, None).unwrap();
        write(&node, 0, 4096);
        let _new = keep(&node, "new", 4096, true);
        write(&node, 1 << 20, 512);
        block_on({
            let node = node.clone();
            async move { node.flush().await.unwrap() }
        });
        child.writes_left.set(Some(left));
        let failed = store(&node).is_err();
        child.writes_left.set(None);
        let path = save(&child, image.folder.path().join("cut"));
        let (code, said) = check_all(&path);
        assert!(code == 0 || code == 3, "{left}: {said}");
        let late = open(&child, None).unwrap();
        let records = late.bitmap("records").unwrap();
        assert!(
            records.borrow().is_inconsistent() || dirty(&records).len() == 2,
            "{left}"
        );
        // It can be tried again.
        store(&node).unwrap();
        let path = save(&child, image.folder.path().join("again"));
        let (code, said) = check_all(&path);
        assert!(code == 0 || code == 3, "{left}: {said}");
        let late = open(&child, None).unwrap();
        assert_eq!(dirty(&late.bitmap("records").unwrap()).len(), 2, "{left}");
        assert_eq!(dirty(&late.bitmap("new").unwrap()).len(), 1, "{left}");
        if !failed {
            return;
        }
    }
    panic!("it never succeeds");
}

/// With the output of errors.
fn check_all(path: &Path) -> (i32, String) {
    let output = tool("qemu-img", &["check", "-f", "qcow2", path.to_str().unwrap()]);
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

fn put(bytes: &mut [u8], at: u64, value: u64, length: usize) {
    bytes[at as usize..at as usize + length].copy_from_slice(&value.to_be_bytes()[8 - length..]);
}

#[test]
fn hostile_directories_and_tables_are_refused() {
    let image = Image::new("");
    image.bitmap(&["--add", "records"]);
    image.bitmap(&["--add", "--disable", "rests"]);
    qemu_io(&image.path, &["write 0 64k"]);
    let good = image.child();
    let header = open(&good, None).unwrap().header().clone();
    let place = header.bitmaps.unwrap();
    let good = good.bytes.borrow().clone();
    let directory = place.directory_offset;
    let extension = good
        .windows(4)
        .position(|bytes| bytes == [0x23, 0x85, 0x28, 0x75])
        .unwrap() as u64
        + 8;
    let table = u64::from_be_bytes(good[directory as usize..][..8].try_into().unwrap());
    let second = directory + 32;
    let cases: [(&str, u64, u64, usize); 18] = [
        ("no bitmaps in a directory", extension, 0, 4),
        ("too many", extension, 70_000, 4),
        ("more than there are", extension, 3, 4),
        ("fewer than there are", extension, 1, 4),
        ("a huge directory", extension + 8, 1 << 40, 8),
        ("no directory", extension + 8, 0, 8),
        ("a directory at the header", extension + 16, 0, 8),
        ("a directory between clusters", extension + 16, directory + 512, 8),
        ("a directory beyond the end", extension + 16, !0xffff, 8),
        ("a directory in a table", extension + 16, header.l1_offset, 8),
        ("a table beyond the end", directory, 1 << 40, 8),
        ("a table in a table", directory, header.refcount_table_offset, 8),
        ("a table that is too long", directory + 8, u64::from(u32::MAX), 4),
        ("a table that does not fit", directory + 8, 2, 4),
        ("a granularity of nothing", directory + 17, 3, 1),
        ("a huge granularity", directory + 17, 60, 1),
        ("a name of nothing", directory + 18, 0, 2),
        ("bits in the header", table, 512, 8),
    ];
    for (what, at, value, length) in cases {
        let mut bytes = good.clone();
        put(&mut bytes, at, value, length);
        let opened = open(&Memory::new(bytes, 1), None);
        assert!(
            matches!(opened, Err(OpenError::Bitmaps(_))),
            "{what}: {:?}",
            opened.err()
        );
    }
    // What is not known stays as it is, and is no bitmap.
    for (at, value, length) in [(second + 16, 2, 1), (second + 12, 1 << 9, 4)] {
        let mut bytes = good.clone();
        put(&mut bytes, at, value, length);
        let child = Memory::new(bytes, 1);
        let node = open(&child, None).unwrap();
        assert!(node.bitmap("rests").is_none() && node.bitmap("records").is_some());
        write(&node, 1 << 20, 512);
        store(&node).unwrap();
        let late = open(&child, None).unwrap();
        assert!(late.bitmap("rests").is_none() && dirty(&late.bitmap("records").unwrap()).len() == 2);
    }
}

#[test]
fn damaged_bitmaps_do_no_more_than_fail() {
    let image = Image::new("cluster_size=512");
    image.bitmap(&["--add", "-g", "512", "records"]);
    image.bitmap(&["--add", "-g", "65536", "rough"]);
    qemu_io(&image.path, &["write 0 64k", "write 5M 1k"]);
    let good = image.child().bytes.borrow().clone();
    let header = open(&image.child(), None).unwrap().header().clone();
    let directory = header.bitmaps.unwrap().directory_offset as usize;
    let table = u64::from_be_bytes(good[directory..][..8].try_into().unwrap()) as usize;
    let mut random = Random::new(77);
    for _ in 0..400 {
        let mut bytes = good.clone();
        for _ in 0..=random.below(3) {
            let at = [directory, table, 104][random.below(3) as usize] + random.below(120) as usize;
            if let Some(byte) = bytes.get_mut(at) {
                *byte = random.next() as u8;
            }
        }
        let child = Memory::new(bytes, random.next());
        child.largest.set(64 << 20);
        let Ok(node) = open(&child, None) else { continue };
        let other = node.clone();
        block_on(async move {
            let _ = other.write(1 << 20, segments(&[1; 512]), false).await;
            let _ = other.store_bitmaps().await;
            let names: Vec<String> = other.describe().bitmaps.into_iter().map(|bitmap| bitmap.name).collect();
            for name in names {
                let _ = other.remove_bitmap(&name).await;
            }
            let _ = other.flush().await;
        });
    }
}

#[test]
fn an_old_image_keeps_no_bitmaps() {
    let image = Image::new("compat=0.10");
    let node = open(&image.child(), None).unwrap();
    assert_eq!(
        node.check_new_bitmap("b"),
        Err("Cannot store dirty bitmaps in qcow2 v2 files")
    );
}
