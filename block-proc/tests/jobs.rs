//! Block jobs in a real block-proc, on raw and qcow2 images, while a guest writes all the time.

mod common;
mod job_common;
use common::*;
use ipc::block_job::*;
use ipc::graph::{CopyBeforeWriteSpec, GraphReply, NodeId, NodeSpec};
use job_common::*;

#[test]
fn middle_layers_are_committed_under_load() {
    for (engine, kind) in ENGINES.into_iter().zip(KINDS) {
        let (mut lab, base) = Lab::new(engine, kind);
        lab.writer.write(100);
        let low = lab.snapshot(&base);
        lab.writer.write(60);
        let middle = lab.snapshot(&low);
        lab.writer.write(60);
        let top = lab.snapshot(&middle);
        lab.writer.run();
        lab.writer.wait_rounds(5);
        let work = JobWork::Commit {
            top: middle.node,
            layers: vec![middle.node, low.node],
            base: base.node,
        };
        let job = lab.start(work, vec![]);
        lab.ends_well(job);
        let changes = vec![backing(top.node, Some(base.node))];
        lab.switch(Switch {
            changes,
            ..Switch::default()
        })
        .unwrap();
        lab.end(job, true);
        lab.rename_backing(top.node, Some(&base));
        lab.remove(&[middle.node, low.node]);
        lab.writer.wait_rounds(5);
        lab.writer.stop();
        lab.writer.verify();
        lab.flush(top.node);
        lab.flush(base.node);
        base.check();
        top.check();
    }
}

#[test]
fn a_stream_takes_all_below_into_the_image_and_nothing_from_the_guest() {
    for (engine, kind) in ENGINES.into_iter().zip(KINDS) {
        let (mut lab, base) = Lab::new(engine, kind);
        lab.writer.write(100);
        let middle = lab.snapshot(&base);
        lab.writer.write(60);
        let top = lab.snapshot(&middle);
        lab.writer.write(20);
        lab.writer.run();
        let filter = lab.node(NodeSpec::CopyOnRead {
            file: top.node,
            for_job: true,
        });
        let work = JobWork::Stream {
            filter,
            layers: vec![middle.node, base.node],
        };
        let job = lab.start(work, vec![device(filter)]);
        lab.ends_well(job);
        let changes = vec![device(top.node), backing(top.node, None)];
        lab.switch(Switch {
            changes,
            ..Switch::default()
        })
        .unwrap();
        lab.end(job, true);
        lab.rename_backing(top.node, None);
        lab.remove(&[filter, middle.node, base.node]);
        lab.writer.wait_rounds(5);
        lab.writer.stop();
        lab.writer.verify();
        lab.flush(top.node);
        top.check();
    }
}

#[test]
fn a_mirror_becomes_the_disk_under_load_and_no_write_is_lost() {
    for (engine, kind) in ENGINES.into_iter().zip(KINDS) {
        for (to, write_blocking) in [
            (Kind::Raw, false),
            (Kind::Qcow2, true),
            (Kind::Qcow2, false),
            (Kind::Raw, true),
        ] {
            let (mut lab, base) = Lab::new(engine, kind);
            lab.writer.write(60);
            let top = lab.snapshot(&base);
            lab.writer.run();
            let target = lab.image(to, None);
            let filter = lab.mirror_filter(top.node);
            let work = match mirror(filter, target.node, &[top.node, base.node]) {
                JobWork::Mirror {
                    filter,
                    target,
                    from,
                    target_reads_zeroes,
                    granularity,
                    buffer_bytes,
                    unmap,
                    ..
                } => JobWork::Mirror {
                    filter,
                    target,
                    from,
                    target_reads_zeroes,
                    granularity,
                    buffer_bytes,
                    unmap,
                    write_blocking,
                },
                other => other,
            };
            let job = lab.start(work, vec![device(filter)]);
            lab.expect(job, JobEvent::Ready);
            lab.writer.wait_rounds(20);
            let switch = Switch {
                settle: vec![job],
                changes: vec![device(target.node)],
                ..Switch::default()
            };
            lab.switch(switch).unwrap();
            lab.end(job, true);
            lab.remove(&[filter]);
            lab.writer.wait_rounds(20);
            lab.writer.stop();
            lab.writer.verify();
            lab.flush(target.node);
            let disk = lab.writer.disk().to_vec();
            target.holds(lab.folder.path(), &disk);
            // Nothing of it goes to the source any more.
            lab.remove(&[top.node, base.node]);
        }
    }
}

#[test]
fn a_mirror_with_nothing_to_do_is_ready_at_once() {
    let (mut lab, source) = Lab::new(ENGINES[0], Kind::Qcow2);
    let target = lab.image(Kind::Qcow2, None);
    let filter = lab.mirror_filter(source.node);
    let job = lab.start(mirror(filter, target.node, &[source.node]), vec![device(filter)]);
    let progress = lab.expect(job, JobEvent::Ready);
    assert_eq!((progress.done, progress.total, progress.ready), (0, 0, true));
    assert_eq!(lab.control(job, JobControl::Pause), Ok(GraphReply::Done));
}

fn backup_filter(lab: &mut Lab, source: &Image, target: &Image) -> NodeId {
    lab.node(NodeSpec::CopyBeforeWrite(CopyBeforeWriteSpec {
        file: source.node,
        target: target.node,
        cluster_bytes: 64 << 10,
        for_job: true,
        bitmap: None,
        break_snapshot: true,
        timeout_s: 0,
    }))
}

fn backup(filter: NodeId, from: CopyFrom, target_reads_zeroes: bool, compress: bool) -> JobWork {
    JobWork::Backup {
        filter,
        from,
        bitmap: None,
        bitmap_mode: BitmapMode::OnSuccess,
        target_reads_zeroes,
        compress,
        max_workers: 64,
        max_chunk: 0,
    }
}

fn layers(nodes: &[NodeId], is_all: bool) -> CopyFrom {
    CopyFrom::Layers {
        nodes: nodes.to_vec(),
        is_all,
    }
}

/// Takes the filter out and ends the job.
fn end_backup(lab: &mut Lab, job: JobNumber, filter: NodeId, source: NodeId) {
    let changes = vec![device(source)];
    lab.switch(Switch {
        changes,
        ..Switch::default()
    })
    .unwrap();
    lab.end(job, true);
    lab.remove(&[filter]);
}

#[test]
fn a_backup_is_what_the_disk_was_when_it_began() {
    for (engine, kind) in ENGINES.into_iter().zip(KINDS) {
        for (to, compress) in [(Kind::Raw, false), (Kind::Qcow2, false), (Kind::Qcow2, true)] {
            let (mut lab, base) = Lab::new(engine, kind);
            lab.writer.write(60);
            let top = lab.snapshot(&base);
            lab.writer.write(20);
            let target = lab.image(to, None);
            let filter = backup_filter(&mut lab, &top, &target);
            let disk = lab.writer.disk().to_vec();
            let from = layers(&[top.node, base.node], true);
            let job = lab.start(backup(filter, from, true, compress), vec![device(filter)]);
            lab.writer.run();
            lab.ends_well(job);
            lab.writer.wait_rounds(5);
            end_backup(&mut lab, job, filter, top.node);
            lab.writer.stop();
            lab.writer.verify();
            target.holds(lab.folder.path(), &disk);
            if compress {
                let (text, _) = qemu_img(&["check", "-U", target.path.to_str().unwrap()]);
                assert!(!text.contains("0.00% compressed"), "{text}");
            }
        }
    }
}

#[test]
fn a_backup_of_the_top_holds_whole_clusters_of_what_it_has() {
    let (mut lab, base) = Lab::new(ENGINES[0], Kind::Qcow2);
    lab.writer.write(60);
    let top = lab.snapshot(&base);
    let below = lab.writer.disk().to_vec();
    lab.writer.write(3);
    let target = lab.image(Kind::Qcow2, Some(&base));
    let filter = backup_filter(&mut lab, &top, &target);
    let disk = lab.writer.disk().to_vec();
    let job = lab.start(
        backup(filter, layers(&[top.node], false), false, false),
        vec![device(filter)],
    );
    lab.writer.run();
    lab.ends_well(job);
    end_backup(&mut lab, job, filter, top.node);
    lab.writer.stop();
    lab.flush(target.node);
    lab.flush(base.node);
    // Of the filter's clusters it has all or nothing itself.
    let name = target.path.to_str().unwrap();
    let (map, ok) = qemu_img(&["map", "-U", "--output=json", name]);
    assert!(ok, "{map}");
    let number = |line: &str, key: &str| -> u64 {
        let rest = line[line.find(key).unwrap() + key.len()..].trim_start_matches(|c: char| !c.is_ascii_digit());
        rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap()]
            .parse()
            .unwrap()
    };
    let mut there = vec![0; DISK.div_ceil(64 << 10) as usize];
    for line in map.lines().filter(|line| line.contains("\"depth\": 0")) {
        let start = number(line, "\"start\"");
        for at in (start..start + number(line, "\"length\"")).step_by(512) {
            there[(at / (64 << 10)) as usize] += 512;
        }
    }
    let last = there.pop().unwrap();
    assert!(last == 0 || last == DISK % (64 << 10), "{map}");
    assert!(there.iter().all(|bytes| [0, 64 << 10].contains(bytes)), "{map}");
    assert!(there.contains(&0) && there.contains(&(64 << 10)), "{map}");
    // With it: the disk as it was.
    lab.switch(Switch {
        changes: vec![backing(target.node, Some(base.node))],
        ..Switch::default()
    })
    .unwrap();
    assert!(disk != below);
    assert!(lab.read_second(target.node) == disk);
}

fn add_bitmap(bitmap: BitmapNumber, node: NodeId) -> BitmapAction {
    BitmapAction::Add {
        bitmap,
        node,
        granularity: 64 << 10,
        disabled: false,
        persistent: None,
        lost: false,
    }
}

#[test]
fn an_incremental_backup_on_the_full_one_is_the_disk() {
    for (engine, kind) in ENGINES.into_iter().zip(KINDS) {
        let (mut lab, source) = Lab::new(engine, kind);
        lab.writer.write(60);
        let full = lab.image(Kind::Qcow2, None);
        let filter = backup_filter(&mut lab, &source, &full);
        let bitmap = BitmapNumber(7);
        let spec = lab.spec(backup(filter, layers(&[source.node], true), true, false));
        let job = spec.job;
        let switch = Switch {
            changes: vec![device(filter)],
            bitmaps: vec![add_bitmap(bitmap, source.node)],
            start: vec![spec],
            ..Switch::default()
        };
        lab.switch(switch).unwrap();
        lab.writer.run();
        lab.ends_well(job);
        lab.writer.wait_rounds(3);
        end_backup(&mut lab, job, filter, source.node);
        let mut below = full;
        for (mode, is_kept) in [
            (BitmapMode::OnSuccess, false),
            (BitmapMode::Never, true),
            (BitmapMode::Always, false),
        ] {
            lab.writer.stop();
            let disk = lab.writer.disk().to_vec();
            let target = lab.image(Kind::Qcow2, Some(&below));
            lab.switch(Switch {
                changes: vec![backing(target.node, Some(below.node))],
                ..Switch::default()
            })
            .unwrap();
            let filter = backup_filter(&mut lab, &source, &target);
            let before = lab.bitmaps()[&bitmap].dirty_bytes;
            let mut work = backup(filter, CopyFrom::Bitmap(bitmap), false, false);
            if let JobWork::Backup { bitmap_mode, .. } = &mut work {
                *bitmap_mode = mode;
            }
            let job = lab.start(work, vec![device(filter)]);
            assert!(lab.bitmaps()[&bitmap].busy && before > 0);
            lab.writer.run();
            lab.ends_well(job);
            lab.writer.wait_rounds(1);
            end_backup(&mut lab, job, filter, source.node);
            lab.writer.stop();
            let report = lab.bitmaps()[&bitmap];
            assert!(!report.busy);
            assert!(report.dirty_bytes > 0, "what was written since is dirty");
            if is_kept {
                assert!(report.dirty_bytes >= before);
            }
            lab.flush(below.node);
            lab.flush(target.node);
            target.holds(lab.folder.path(), &disk);
            below = target;
            lab.writer.run();
        }
        lab.writer.stop();
        lab.writer.verify();
    }
}

#[test]
fn a_fleecing_snapshot_shows_what_was_there() {
    for (engine, kind) in ENGINES.into_iter().zip(KINDS) {
        let (mut lab, source) = Lab::new(engine, kind);
        lab.writer.write(60);
        let target = lab.image(Kind::Qcow2, None);
        let filter = lab.node(NodeSpec::CopyBeforeWrite(CopyBeforeWriteSpec {
            file: source.node,
            target: target.node,
            cluster_bytes: 64 << 10,
            for_job: false,
            bitmap: None,
            break_snapshot: false,
            timeout_s: 0,
        }));
        let snapshot = lab.node(NodeSpec::SnapshotAccess { file: filter });
        let disk = lab.writer.disk().to_vec();
        lab.switch(Switch {
            changes: vec![device(filter)],
            ..Switch::default()
        })
        .unwrap();
        lab.writer.run();
        lab.writer.wait_rounds(10);
        assert!(lab.read_second(snapshot) == disk);
        lab.writer.stop();
        lab.writer.verify();
    }
}
