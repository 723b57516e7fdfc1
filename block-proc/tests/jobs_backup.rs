//! Backups with bitmaps and compressed ones, by a real block-proc.

mod common;
mod jobs_load_common;
use common::*;
use ipc::block::EngineChoice;
use ipc::block_job::{BitmapAction, BitmapMode, BitmapNumber, CopyFrom, JobControl, JobNumber, JobWork, Switch};
use ipc::graph::{GraphReply, NodeId, NodeSpec};
use jobs_load_common::*;

#[test]
fn clusters_are_compressed_one_by_one_whatever_is_copied_together() {
    if !has_qemu_img() {
        return;
    }
    for cluster in ["4k", "64k"] {
        let mut machine = Machine::new(EngineChoice::Auto, Shape::Raw, 1600);
        let path = machine.path("target");
        let (path_text, bytes) = (path.display().to_string(), DISK.to_string());
        let cluster = format!("cluster_size={cluster}");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &cluster, &path_text, &bytes]);
        let file = machine.file(&path, path.metadata().unwrap().len());
        let target = machine.add(NodeSpec::Qcow2(qcow2_spec(file, ipc::graph::Backing::None)));
        let filter = machine.copy_before_write(target, true);
        let work = backup(filter, machine.all_layers(), true);
        let spec = machine.spec(work);
        let job = machine.begin(filter, spec);
        machine.ended(job);
        machine
            .switch(Switch {
                changes: vec![Machine::device_to(machine.source)],
                ..Switch::default()
            })
            .unwrap();
        machine.control(job, JobControl::End { success: true });
        machine.remove(filter);
        machine.remove(target);
        let model = machine.model.clone();
        machine.check_image("target", "qcow2", &model);
    }
}

#[test]
fn a_full_backup_begins_its_bitmap_anew() {
    if !has_qemu_img() {
        return;
    }
    for (mode, success, expected) in [
        (BitmapMode::OnSuccess, true, 4096),
        (BitmapMode::OnSuccess, false, 2 * 4096),
        (BitmapMode::Always, true, 4096),
    ] {
        let mut machine = Machine::new(EngineChoice::Auto, Shape::Qcow2, 1700);
        machine
            .switch(Switch {
                bitmaps: vec![BitmapAction::Add {
                    bitmap: BITMAP,
                    node: machine.source,
                    granularity: 4096,
                    disabled: false,
                    persistent: None,
                    lost: false,
                }],
                ..Switch::default()
            })
            .unwrap();
        let write = |machine: &mut Machine, at: u64| {
            let queue = machine.queue.as_mut().unwrap();
            assert_eq!(queue.write(at * 8, &pattern(at, 4096)), S_OK);
        };
        write(&mut machine, 5);
        let target = machine.target("target", Shape::Raw);
        let filter = machine.copy_before_write(target, true);
        let mut work = backup(filter, machine.all_layers(), false);
        if let JobWork::Backup {
            bitmap, bitmap_mode, ..
        } = &mut work
        {
            (*bitmap, *bitmap_mode) = (Some(BITMAP), mode);
        }
        let spec = machine.spec(work);
        let job = machine.begin(filter, spec);
        machine.ended(job);
        write(&mut machine, 900);
        machine.control(job, JobControl::End { success });
        assert_eq!(dirty(&mut machine), expected, "{mode:?} {success}");
    }
}

/// A backup of what is dirty in a bitmap.
fn incremental(machine: &mut Machine, target: NodeId, mode: BitmapMode) -> (JobNumber, NodeId) {
    let filter = machine.copy_before_write(target, true);
    let JobWork::Backup {
        target_reads_zeroes,
        compress,
        max_workers,
        max_chunk,
        ..
    } = backup(filter, CopyFrom::Nothing, false)
    else {
        panic!("a backup")
    };
    let spec = machine.spec(JobWork::Backup {
        filter,
        from: CopyFrom::Bitmap(BITMAP),
        bitmap: None,
        bitmap_mode: mode,
        target_reads_zeroes,
        compress,
        max_workers,
        max_chunk,
    });
    (machine.begin(filter, spec), filter)
}

const BITMAP: BitmapNumber = BitmapNumber(1);

fn dirty(machine: &mut Machine) -> u64 {
    match machine.vm.graph(ipc::graph::GraphRequest::ReportBitmaps) {
        Ok(GraphReply::Bitmaps(bitmaps)) => bitmaps[&BITMAP].dirty_bytes,
        other => panic!("ReportBitmaps: {other:?}"),
    }
}

#[test]
fn incremental_backups_follow_the_guest() {
    if !has_qemu_img() {
        return;
    }
    for (seed, format) in [(1400, Shape::Raw), (1401, Shape::Qcow2)] {
        let mut machine = Machine::new(EngineChoice::Auto, Shape::Chain, seed);
        let target = machine.target("target", format);
        let filter = machine.copy_before_write(target, true);
        let work = backup(filter, machine.all_layers(), false);
        let spec = machine.spec(work);
        let full = spec.job;
        let begin = Switch {
            changes: vec![Machine::device_to(filter)],
            bitmaps: vec![BitmapAction::Add {
                bitmap: BITMAP,
                node: machine.source,
                granularity: 4096,
                disabled: false,
                persistent: None,
                lost: false,
            }],
            start: vec![spec],
            ..Switch::default()
        };
        machine.switch(begin).unwrap();
        let writer = machine.write();
        writer.rounds(2);
        machine.ended(full);
        machine.hold(writer);
        let (mut last, mut last_filter) = (full, filter);
        for (round, mode, success) in [
            (0, BitmapMode::OnSuccess, true),
            (1, BitmapMode::Never, true),
            (2, BitmapMode::OnSuccess, false),
            (3, BitmapMode::Always, true),
            (4, BitmapMode::OnSuccess, true),
        ] {
            let back = Switch {
                changes: vec![Machine::device_to(machine.source)],
                ..Switch::default()
            };
            machine.switch(back).unwrap();
            machine.control(last, JobControl::End { success: true });
            machine.remove(last_filter);
            let before = dirty(&mut machine);
            assert!(before > 0);
            let model = machine.model.clone();
            (last, last_filter) = incremental(&mut machine, target, mode);
            let writer = machine.write();
            machine.ended(last);
            machine.hold(writer);
            machine.flush(target);
            machine.check_image("target", image_format(format), &model);
            if round == 2 {
                // Nothing was copied, as far as its client is concerned.
                machine
                    .switch(Switch {
                        changes: vec![Machine::device_to(machine.source)],
                        ..Switch::default()
                    })
                    .unwrap();
                machine.control(last, JobControl::End { success });
                assert!(dirty(&mut machine) >= before);
                machine.remove(last_filter);
                last_filter = machine.copy_before_write(target, true);
                let work = backup(last_filter, CopyFrom::Nothing, false);
                let spec = machine.spec(work);
                last = machine.begin(last_filter, spec);
            }
            let writer = machine.write();
            writer.rounds(1);
            machine.hold(writer);
        }
        machine.check_guest();
    }
}
