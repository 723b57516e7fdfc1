//! The power fails: of what was written since the last flush, any part may be on the disk. Whatever is there must be an
//! image without errors other than leaks, and hold all that the guest has flushed.

mod qcow2_common;

use block_proc::executor::Executor;
use block_proc::node::Node;
use block_proc::node::qcow2::Qcow2Node;
use ipc::graph::Preallocation;
use qcow2_common::*;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;

const SECTOR: usize = 512;

/// What the guest did: by number, so that the child's log can say when.
struct Request {
    start: usize,
    data: Vec<u8>,
    began: u64,
    ended: Option<u64>,
    discard: bool,
}

#[derive(Default)]
struct Guest {
    clock: u64,
    requests: Vec<Request>,
    /// When a flush began and ended.
    flushes: Vec<(u64, u64)>,
    snapshots: Vec<Kept>,
}

/// An internal snapshot.
struct Kept {
    id: String,
    data: Vec<u8>,
    /// When making it had ended.
    made: u64,
    /// When deleting it began.
    going: u64,
}

type Shared = Rc<RefCell<Guest>>;

/// The next moment, noted in the child's log.
fn now(guest: &Shared, child: &Memory) -> u64 {
    let mut guest = guest.borrow_mut();
    guest.clock += 1;
    child.mark(guest.clock);
    guest.clock
}

fn load(node: &Rc<Qcow2Node>, child: &Rc<Memory>, random: &mut Random, batches: u64, changes: bool) -> Guest {
    let guest: Shared = Rc::default();
    let cluster = 1 << node.header().cluster_bits;
    for _ in 0..batches {
        if changes && random.below(3) == 0 {
            change(node, child, &guest, random);
        }
        let mut executor = Executor::<()>::default();
        let mut taken: Vec<std::ops::Range<u64>> = Vec::new();
        for _ in 0..random.below(6) + 1 {
            let (node, child, guest) = (node.clone(), child.clone(), guest.clone());
            let start = random.below(node.bytes() / 512) * 512;
            let start = if random.below(2) == 0 {
                start / cluster * cluster
            } else {
                start
            };
            let length = ((random.below(2 * cluster / 512) + 1) * 512).min(node.bytes() - start);
            if taken
                .iter()
                .any(|other| other.start < start + length && start < other.end)
            {
                continue;
            }
            taken.push(start..start + length);
            let kind = random.below(10);
            if kind == 0 {
                executor.spawn(async move {
                    let began = now(&guest, &child);
                    node.flush().await.expect("a flush");
                    let ended = now(&guest, &child);
                    guest.borrow_mut().flushes.push((began, ended));
                });
                continue;
            }
            let fill = (random.next() | 1) as u8;
            executor.spawn(async move {
                let began = now(&guest, &child);
                let data = vec![if kind < 7 { fill } else { 0 }; length as usize];
                let number = guest.borrow().requests.len();
                guest.borrow_mut().requests.push(Request {
                    start: start as usize,
                    data: data.clone(),
                    began,
                    ended: None,
                    discard: kind == 9,
                });
                match kind {
                    0..7 => node.write(start, segments(&data), false).await,
                    7 | 8 => node.write_zeroes(start, length, fill & 2 != 0).await,
                    _ => node.discard(start, length).await,
                }
                .expect("a request");
                let ended = now(&guest, &child);
                guest.borrow_mut().requests[number].ended = Some(ended);
            });
        }
        executor.run(&mut Vec::new());
    }
    let guest = Rc::try_unwrap(guest).ok().expect("all tasks are gone").into_inner();
    let stuck = guest.requests.iter().filter(|request| request.ended.is_none()).count();
    assert_eq!(stuck, 0, "requests wait for each other");
    guest
}

/// Makes a snapshot, deletes one, goes back to one, or changes the size.
fn change(node: &Rc<Qcow2Node>, child: &Rc<Memory>, guest: &Shared, random: &mut Random) {
    let there: Vec<usize> = {
        let guest = guest.borrow();
        let all = guest.snapshots.iter().enumerate();
        all.filter(|(_, kept)| kept.going == u64::MAX)
            .map(|(at, _)| at)
            .collect()
    };
    let chosen = there.get(random.below(there.len().max(1) as u64) as usize).copied();
    let began = now(guest, child);
    let node = node.clone();
    match (random.below(5), chosen) {
        (0 | 1, _) => {
            let data = content(&node);
            let id = (guest.borrow().snapshots.len() + 1).to_string();
            let info = snapshot_info(&id);
            block_on(async move { node.create_snapshot(&info).await }).expect("a snapshot");
            let made = now(guest, child);
            let going = u64::MAX;
            guest.borrow_mut().snapshots.push(Kept { id, data, made, going });
            // It has put everything on the disk.
            guest.borrow_mut().flushes.push((began, made));
        }
        (2, Some(chosen)) => {
            guest.borrow_mut().snapshots[chosen].going = began;
            let id = guest.borrow().snapshots[chosen].id.clone();
            block_on(async move { node.delete_snapshot(&id).await }).expect("a deletion");
        }
        (3, Some(chosen)) => {
            let (id, data) = {
                let kept = &guest.borrow().snapshots[chosen];
                (kept.id.clone(), kept.data.clone())
            };
            let number = guest.borrow().requests.len();
            let old = node.bytes() as usize;
            let cut = (data.len() < old).then(|| (data.len(), vec![0; old - data.len()]));
            for (start, data, discard) in [Some((0, data, false)), cut.map(|(start, data)| (start, data, true))]
                .into_iter()
                .flatten()
            {
                guest.borrow_mut().requests.push(Request {
                    start,
                    data,
                    began,
                    ended: None,
                    discard,
                });
            }
            block_on(async move { node.revert_to_snapshot(&id).await }).expect("going back");
            let ended = now(guest, child);
            guest.borrow_mut().requests[number..]
                .iter_mut()
                .for_each(|request| request.ended = Some(ended));
        }
        _ => {
            let (old, new) = (node.bytes(), (random.below(1024) + 64) * 512);
            let number = guest.borrow().requests.len();
            if new < old {
                guest.borrow_mut().requests.push(Request {
                    start: new as usize,
                    data: vec![0; (old - new) as usize],
                    began,
                    ended: None,
                    discard: true,
                });
            }
            let preallocation = match random.below(2) {
                0 if new > old => Preallocation::Metadata,
                _ => Preallocation::Off,
            };
            block_on(async move { node.resize(new, preallocation).await }).expect("another size");
            let ended = now(guest, child);
            guest.borrow_mut().requests[number..]
                .iter_mut()
                .for_each(|request| request.ended = Some(ended));
        }
    }
}

/// Every snapshot that was there at that time has what the disk had then.
fn check_snapshots(guest: &Guest, node: &Rc<Qcow2Node>, time: u64) {
    let found: Vec<String> = node.snapshots().into_iter().map(|snapshot| snapshot.id).collect();
    for kept in &guest.snapshots {
        let is_there = found.contains(&kept.id);
        assert!(
            is_there || kept.made > time || kept.going <= time,
            "snapshot {} is lost",
            kept.id
        );
    }
    for id in found {
        let kept = guest
            .snapshots
            .iter()
            .find(|kept| kept.id == id)
            .expect("a snapshot of ours");
        let reverted = node.clone();
        block_on(async move { reverted.revert_to_snapshot(&id).await }).expect("going back");
        assert!(content(node) == kept.data, "snapshot {} is damaged", kept.id);
    }
}

/// The disk after a cut at `cut`, and the guest's time then.
fn disk_at(before: &[u8], log: &[Event], cut: usize, random: &mut Random) -> (Vec<u8>, u64) {
    let mut stable = BTreeSet::new();
    let mut time = 0;
    for event in &log[..cut] {
        match event {
            Event::Flush(covered) => stable.extend(covered.iter().copied()),
            Event::Mark(mark) => time = *mark,
            Event::Write(..) => {}
        }
    }
    let mut disk = before.to_vec();
    // Sometimes nearly all arrives, sometimes nearly nothing.
    let chance = random.below(101);
    let writes = log[..cut].iter().filter_map(|event| match event {
        Event::Write(offset, data) => Some((*offset as usize, data)),
        _ => None,
    });
    for (number, (offset, data)) in writes.enumerate() {
        for (index, sector) in data.chunks(SECTOR).enumerate() {
            if stable.contains(&number) || random.below(100) < chance {
                let start = offset + index * SECTOR;
                if disk.len() < start + sector.len() {
                    disk.resize(start + sector.len(), 0);
                }
                disk[start..start + sector.len()].copy_from_slice(sector);
            }
        }
    }
    (disk, time)
}

/// Every sector is what it was at the last flush, or something that was written to it since.
fn check_content(guest: &Guest, before: &[u8], found: &[u8], time: u64) {
    let flushed = guest
        .flushes
        .iter()
        .filter(|(_, ended)| *ended <= time)
        .map(|(began, _)| *began)
        .max()
        .unwrap_or(0);
    for (sector, found) in found.chunks(SECTOR).enumerate() {
        let at = sector * SECTOR;
        let mut possible = vec![before.get(at).copied().unwrap_or(0)];
        let mut discarded = false;
        for request in &guest.requests {
            if request.began > time || !(request.start..request.start + request.data.len()).contains(&at) {
                continue;
            }
            if request.ended.is_some_and(|ended| ended < flushed) && !request.discard {
                possible.clear();
                discarded = false;
            }
            possible.push(request.data[at - request.start]);
            discarded |= request.discard;
        }
        let as_it_was = possible.iter().any(|byte| found.iter().all(|found| found == byte));
        assert!(
            as_it_was || (discarded && found.iter().all(|byte| *byte == found[0])),
            "sector {sector} is {:#x}, and can be {possible:x?}",
            found[0]
        );
    }
}

fn cut_often(folder: &Path, image: Vec<u8>, seed: u64, cuts: u64, changes: bool) {
    let mut random = Random::new(seed);
    let child = Memory::new(image, seed);
    // Every other time with so little memory that changes reach the disk between flushes.
    child
        .cache_bytes
        .set(if seed.is_multiple_of(2) { 2048 } else { 4 << 20 });
    let node = open(&child, None).expect("the image");
    let start = content(&node);
    let before = child.bytes.borrow().clone();
    *child.log.borrow_mut() = Some(Vec::new());
    let guest = load(&node, &child, &mut random, 60, changes);
    let log = child.log.take().expect("the log");
    for number in 0..cuts {
        let cut = random.below(log.len() as u64 + 1) as usize;
        let (disk, time) = disk_at(&before, &log, cut, &mut random);
        let disk = Memory::new(disk, seed);
        let path = save(&disk, folder.join("cut.qcow2"));
        let (code, said) = check(&path);
        assert!(matches!(code, 0 | 3), "seed {seed}, cut {number} at {cut}: {said}");
        let node = open(&disk, None).unwrap_or_else(|error| panic!("seed {seed}, cut {number}: {error}"));
        check_content(&guest, &start, &content(&node), time);
        if changes {
            check_snapshots(&guest, &node, time);
        }
    }
}

#[test]
fn a_power_loss_leaks_at_worst() {
    let folder = tempfile::tempdir().unwrap();
    for (seed, options, bytes) in [
        (1, "cluster_size=512", 256 << 10),
        (2, "cluster_size=512,refcount_bits=64", 3 << 20),
        (3, "cluster_size=512,refcount_bits=1", 256 << 10),
        (4, "cluster_size=4096", 1 << 20),
        (5, "cluster_size=65536", 2 << 20),
        (6, "cluster_size=4096,compat=0.10", 1 << 20),
        (7, "cluster_size=16384,extended_l2=on", 1 << 20),
        (8, "cluster_size=4096,preallocation=metadata", 1 << 20),
    ] {
        let image = create(folder.path(), options, bytes);
        cut_often(folder.path(), image, seed, 60, false);
    }
}

/// Clusters that a snapshot has as well are copied, and their tables too.
#[test]
fn a_power_loss_keeps_snapshots() {
    let folder = tempfile::tempdir().unwrap();
    for (seed, options) in [(1, "cluster_size=512"), (2, "cluster_size=4096")] {
        let path = folder.path().join("snapshot.qcow2");
        std::fs::write(&path, create(folder.path(), options, 256 << 10)).unwrap();
        qemu_io(&path, &["write -P 17 0 200k"]);
        let name = path.to_str().unwrap();
        qemu_img(&["snapshot", "-c", "first", name]);
        qemu_io(&path, &["write -P 34 100k 20k"]);
        cut_often(folder.path(), std::fs::read(&path).unwrap(), seed, 60, false);
    }
}

/// Snapshots are made, deleted and gone back to, and the size changes: a cut shows the image before or after.
#[test]
fn a_power_loss_while_snapshots_and_sizes_change() {
    let folder = tempfile::tempdir().unwrap();
    for (seed, options, bytes) in [
        (1, "cluster_size=512", 256 << 10),
        (2, "cluster_size=512,refcount_bits=64", 200 << 10),
        (3, "cluster_size=4096", 512 << 10),
        (4, "cluster_size=16384,extended_l2=on", 512 << 10),
        (5, "cluster_size=1024,refcount_bits=8", 300 << 10),
    ] {
        let image = create(folder.path(), options, bytes);
        cut_often(folder.path(), image, seed, 200, true);
    }
}

/// The host fails at any write: what was flushed stays, the image stays sound.
#[test]
fn a_failing_host_loses_nothing_that_was_flushed() {
    let folder = tempfile::tempdir().unwrap();
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let child = Memory::new(create(folder.path(), "cluster_size=512", 1 << 20), seed);
        let node = open(&child, None).expect("the image");
        let writer = node.clone();
        block_on(async move {
            for at in 0..40 {
                writer
                    .write(at * 5000 / 512 * 512, segments(&[7; 2048]), false)
                    .await
                    .unwrap();
            }
            writer.flush().await.unwrap();
        });
        child.writes_left.set(Some(random.below(60)));
        let writer = node.clone();
        let failed = block_on(async move {
            let mut failed = false;
            for at in 0..40 {
                let offset = (1 << 19) + at * 5000 / 512 * 512;
                failed |= writer.write(offset, segments(&[8; 2048]), true).await.is_err();
            }
            failed
        });
        assert!(failed);
        child.writes_left.set(None);
        let (code, said) = check(&save(&child, folder.path().join("failed.qcow2")));
        assert!(matches!(code, 0 | 3), "seed {seed}: {said}");
        let writer = node.clone();
        block_on(async move {
            writer.write(1 << 19, segments(&[9; 2048]), false).await.unwrap();
            writer.flush().await.unwrap();
            for at in 0..40 {
                assert_eq!(read(&*writer, at * 5000 / 512 * 512, 2048).await.unwrap(), [7; 2048]);
            }
            assert_eq!(read(&*writer, 1 << 19, 2048).await.unwrap(), [9; 2048]);
        });
        let (code, said) = check(&save(&child, folder.path().join("failed.qcow2")));
        assert!(matches!(code, 0 | 3), "seed {seed}, after: {said}");
    }
}
