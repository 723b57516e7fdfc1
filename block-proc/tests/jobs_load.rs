//! Jobs in a real block-proc, while the guest writes: what they copy is what was or is there.

mod common;
mod jobs_load_common;
use common::*;
use ipc::block::{EngineChoice, IoKind};
use ipc::block_job::{
    BitmapAction, BitmapMode, BitmapNumber, CopyFrom, JobControl, JobErrorAction, JobEvent, JobNumber, JobOnError,
    JobWork, Switch,
};
use ipc::graph::{BlkdebugSpec, ChildRole, EdgeChange, GraphReply, InjectedError, IoType, ManualIo, NodeId, NodeSpec};
use jobs_load_common::*;

fn mirror(filter: NodeId, target: NodeId, from: CopyFrom, write_blocking: bool) -> JobWork {
    JobWork::Mirror {
        filter,
        target,
        from,
        target_reads_zeroes: true,
        granularity: 64 << 10,
        buffer_bytes: 16 << 20,
        unmap: true,
        write_blocking,
    }
}

fn backup(filter: NodeId, from: CopyFrom, compress: bool) -> JobWork {
    JobWork::Backup {
        filter,
        from,
        bitmap: None,
        bitmap_mode: BitmapMode::Never,
        target_reads_zeroes: true,
        compress,
        max_workers: 64,
        max_chunk: 0,
    }
}

#[test]
fn a_mirror_under_load_becomes_the_disk() {
    if !has_qemu_img() {
        return;
    }
    let mut seed = 0;
    for (source, target) in [
        (Shape::Raw, Shape::Raw),
        (Shape::Qcow2, Shape::Qcow2),
        (Shape::Chain, Shape::Raw),
        (Shape::Chain, Shape::Qcow2),
    ] {
        for (engine, write_blocking) in [(ENGINES[0], false), (ENGINES[1], true), (ENGINES[0], true)] {
            seed += 1;
            let mut machine = Machine::new(engine, source, seed);
            let new = machine.target("target", target);
            let filter = machine.mirror_top();
            let writer = machine.write();
            writer.rounds(3);
            let work = mirror(filter, new, machine.all_layers(), write_blocking);
            let spec = machine.spec(work);
            let job = machine.begin(filter, spec);
            machine.ready(job);
            writer.rounds(20);
            let end = Switch {
                settle: vec![job],
                changes: vec![Machine::device_to(new)],
                ..Switch::default()
            };
            machine.switch(end).unwrap();
            machine.control(job, JobControl::End { success: true });
            machine.remove(filter);
            writer.rounds(5);
            machine.hold(writer);
            machine.check_guest();
            machine.flush(new);
            let model = machine.model.clone();
            machine.check_image("target", image_format(target), &model);
        }
    }
}

#[test]
fn a_backup_under_load_is_the_disk_as_it_was() {
    if !has_qemu_img() {
        return;
    }
    let mut seed = 100;
    for (source, target, compress) in [
        (Shape::Raw, Shape::Raw, false),
        (Shape::Raw, Shape::Qcow2, true),
        (Shape::Qcow2, Shape::Qcow2, false),
        (Shape::Chain, Shape::Raw, false),
        (Shape::Chain, Shape::Qcow2, true),
    ] {
        for engine in ENGINES {
            seed += 1;
            let mut machine = Machine::new(engine, source, seed);
            let new = machine.target("target", target);
            let filter = machine.copy_before_write(new, true);
            let work = backup(filter, machine.all_layers(), compress);
            let mut spec = machine.spec(work);
            spec.speed = 64 << 20;
            let job = machine.begin(filter, spec);
            let model = machine.model.clone();
            let writer = machine.write();
            machine.ended(job);
            writer.rounds(2);
            let back = Switch {
                changes: vec![Machine::device_to(machine.source)],
                ..Switch::default()
            };
            machine.switch(back).unwrap();
            machine.control(job, JobControl::End { success: true });
            machine.remove(filter);
            machine.remove(new);
            machine.check_image("target", image_format(target), &model);
            machine.hold(writer);
            machine.check_guest();
        }
    }
}

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

#[test]
fn the_middle_layer_is_committed_under_load() {
    if !has_qemu_img() {
        return;
    }
    for (seed, engine) in (200..).zip(ENGINES) {
        let mut machine = Machine::new(engine, Shape::Chain, seed);
        let [top, middle, base] = machine.layers[..] else {
            panic!("three layers")
        };
        let grow = ipc::graph::GraphRequest::Resize {
            node: base,
            bytes: DISK,
            preallocation: ipc::graph::Preallocation::Off,
        };
        machine.vm.graph(grow).unwrap();
        let filter = machine.add(NodeSpec::Pass { file: middle });
        let spec = machine.spec(JobWork::Commit {
            top: middle,
            layers: vec![middle],
            base,
        });
        let job = spec.job;
        let writer = machine.write();
        let begin = Switch {
            changes: vec![backing_to(top, Some(filter))],
            start: vec![spec],
            ..Switch::default()
        };
        machine.switch(begin).unwrap();
        machine.ended(job);
        let end = Switch {
            changes: vec![backing_to(top, Some(base))],
            ..Switch::default()
        };
        machine.switch(end).unwrap();
        machine.control(job, JobControl::End { success: true });
        machine.remove(filter);
        machine.remove(middle);
        writer.rounds(5);
        machine.hold(writer);
        machine.check_guest();
    }
}

#[test]
fn a_stream_under_load_makes_an_image_stand_alone() {
    if !has_qemu_img() {
        return;
    }
    for (seed, engine) in (300..).zip(ENGINES) {
        let mut machine = Machine::new(engine, Shape::Chain, seed);
        let [top, middle, base] = machine.layers[..] else {
            panic!("three layers")
        };
        let filter = machine.add(NodeSpec::CopyOnRead {
            file: top,
            for_job: true,
        });
        let spec = machine.spec(JobWork::Stream {
            filter,
            layers: vec![middle, base],
        });
        let writer = machine.write();
        let job = machine.begin(filter, spec);
        machine.ended(job);
        let end = Switch {
            changes: vec![Machine::device_to(top), backing_to(top, None)],
            ..Switch::default()
        };
        machine.switch(end).unwrap();
        machine.control(job, JobControl::End { success: true });
        for node in [filter, middle, base] {
            machine.remove(node);
        }
        writer.rounds(5);
        machine.hold(writer);
        machine.check_guest();
    }
}

#[test]
fn the_active_layer_is_committed_under_load() {
    if !has_qemu_img() {
        return;
    }
    for (seed, engine) in (400..).zip(ENGINES) {
        let mut machine = Machine::new(engine, Shape::Chain, seed);
        let [top, middle, base] = machine.layers[..] else {
            panic!("three layers")
        };
        let grow = ipc::graph::GraphRequest::Resize {
            node: base,
            bytes: DISK,
            preallocation: ipc::graph::Preallocation::Off,
        };
        machine.vm.graph(grow).unwrap();
        let filter = machine.mirror_top();
        let from = CopyFrom::Layers {
            nodes: vec![top, middle],
            is_all: false,
        };
        let JobWork::Mirror {
            granularity,
            buffer_bytes,
            ..
        } = mirror(filter, base, from.clone(), false)
        else {
            panic!("a mirror")
        };
        let spec = machine.spec(JobWork::Mirror {
            filter,
            target: base,
            from,
            target_reads_zeroes: false,
            granularity,
            buffer_bytes,
            unmap: true,
            write_blocking: false,
        });
        let writer = machine.write();
        let job = machine.begin(filter, spec);
        machine.ready(job);
        let end = Switch {
            settle: vec![job],
            changes: vec![Machine::device_to(base)],
            ..Switch::default()
        };
        machine.switch(end).unwrap();
        machine.control(job, JobControl::End { success: true });
        for node in [filter, top, middle] {
            machine.remove(node);
        }
        writer.rounds(5);
        machine.hold(writer);
        machine.check_guest();
        machine.flush(base);
        let model = machine.model.clone();
        machine.check_image("base", "raw", &model);
    }
}

#[test]
fn only_what_is_new_is_mirrored_without_a_first_copy() {
    if !has_qemu_img() {
        return;
    }
    let mut machine = Machine::new(EngineChoice::Auto, Shape::Qcow2, 500);
    let source = machine.source;
    let target = machine.qcow2("target", DISK, Some(("source", "qcow2", source)));
    let filter = machine.mirror_top();
    let work = mirror(filter, target, CopyFrom::Nothing, false);
    let spec = machine.spec(work);
    let job = machine.begin(filter, spec);
    machine.ready(job);
    assert_eq!(machine.progress(job).total, 0);
    let writer = machine.write();
    writer.rounds(10);
    let end = Switch {
        settle: vec![job],
        changes: vec![Machine::device_to(target)],
        ..Switch::default()
    };
    machine.switch(end).unwrap();
    machine.control(job, JobControl::End { success: true });
    machine.hold(writer);
    machine.check_guest();
}

#[test]
fn a_snapshot_can_be_read_while_the_guest_writes() {
    if !has_qemu_img() {
        return;
    }
    for (seed, engine) in (600..).zip(ENGINES) {
        for source in [Shape::Raw, Shape::Chain] {
            let mut machine = Machine::new(engine, source, seed);
            let target = machine.target("target", Shape::Qcow2);
            let filter = machine.copy_before_write(target, false);
            let access = machine.add(NodeSpec::SnapshotAccess { file: filter });
            let begin = Switch {
                changes: vec![Machine::device_to(filter)],
                ..Switch::default()
            };
            machine.switch(begin).unwrap();
            let model = machine.model.clone();
            let writer = machine.write();
            writer.rounds(5);
            // A backup of the snapshot: itself a job, which reads while the guest writes.
            let copy = machine.target("copy", Shape::Raw);
            let above = machine.add(NodeSpec::Pass { file: access });
            let spec = machine.spec(JobWork::Commit {
                top: above,
                layers: vec![access],
                base: copy,
            });
            let job = spec.job;
            let start = Switch {
                start: vec![spec],
                ..Switch::default()
            };
            machine.switch(start).unwrap();
            machine.ended(job);
            machine.control(job, JobControl::End { success: true });
            machine.remove(copy);
            machine.check_image("copy", "raw", &model);
            machine.hold(writer);
            machine.check_guest();
            let refused = machine.vm.graph(ipc::graph::GraphRequest::Remove(filter)).unwrap_err();
            assert!(refused.message.contains("is a child of"), "{refused:?}");
        }
    }
}

#[test]
fn jobs_stop_and_go_on_at_the_speed_that_is_asked_for() {
    if !has_qemu_img() {
        return;
    }
    let mut machine = Machine::new(EngineChoice::Auto, Shape::Raw, 700);
    // All of it is data: zeroes take no time.
    let io = ManualIo::Write {
        offset: 0,
        bytes: DISK,
        pattern: 7,
        durable: false,
    };
    let node = machine.source;
    machine.vm.graph(ipc::graph::GraphRequest::Io { node, io }).unwrap();
    machine.model.fill(7);
    let target = machine.target("target", Shape::Raw);
    let filter = machine.mirror_top();
    let work = mirror(filter, target, machine.all_layers(), false);
    let mut spec = machine.spec(work);
    spec.speed = 64 << 10;
    let job = machine.begin(filter, spec);
    let second = std::time::Duration::from_millis(1000);
    std::thread::sleep(second);
    machine.control(job, JobControl::Pause);
    let paused = machine.progress(job);
    assert!((1..=4 << 16).contains(&paused.done), "{paused:?}");
    std::thread::sleep(second);
    assert_eq!(machine.progress(job), paused);
    machine.control(job, JobControl::Resume);
    machine.control(job, JobControl::SetSpeed(128 << 10));
    std::thread::sleep(second);
    let faster = machine.progress(job);
    assert!((1 << 16..=4 << 16).contains(&(faster.done - paused.done)), "{faster:?}");
    // A machine that is stopped does not stop its jobs, nor wait for them.
    machine.vm.done(ipc::block::BlockRequest::Pause);
    machine.control(job, JobControl::SetSpeed(0));
    machine.ready(job);
    machine.vm.done(ipc::block::BlockRequest::Resume);
    machine.control(job, JobControl::End { success: false });
    let gone = machine.vm.graph(ipc::graph::GraphRequest::ControlJob {
        job,
        control: JobControl::Resume,
    });
    assert_eq!(gone.unwrap_err().message, format!("there is no job {}", job.0));
    let writer = machine.write();
    writer.rounds(2);
    machine.hold(writer);
    machine.check_guest();
}

#[test]
fn what_cannot_begin_changes_nothing() {
    if !has_qemu_img() {
        return;
    }
    let mut machine = Machine::new(EngineChoice::Auto, Shape::Raw, 800);
    let small = machine.raw("small", DISK - 512);
    let target = machine.target("target", Shape::Raw);
    let filter = machine.mirror_top();
    let bad = mirror(filter, small, machine.all_layers(), false);
    let bad = machine.spec(bad);
    let missing = mirror(filter, NodeId(9999), machine.all_layers(), false);
    let missing = machine.spec(missing);
    let wrong = mirror(target, target, machine.all_layers(), false);
    let wrong = machine.spec(wrong);
    for (spec, expected) in [
        (
            bad,
            &format!("{DISK} bytes are copied to node {} of {} bytes", small.0, DISK - 512)[..],
        ),
        (missing, "there is no node 9999 in this thread"),
        (wrong, &format!("node {} is not a mirror's filter", target.0)[..]),
    ] {
        let switch = Switch {
            changes: vec![Machine::device_to(filter)],
            start: vec![spec],
            ..Switch::default()
        };
        assert_eq!(machine.switch(switch).unwrap_err().message, expected);
    }
    // Nobody has them: not the device, not a job.
    for node in [filter, small, target] {
        machine.remove(node);
    }
    machine.check_guest();
}

#[test]
fn a_job_keeps_its_nodes() {
    if !has_qemu_img() {
        return;
    }
    let mut machine = Machine::new(EngineChoice::Auto, Shape::Raw, 900);
    let target = machine.target("target", Shape::Raw);
    let filter = machine.copy_before_write(target, true);
    let work = backup(filter, CopyFrom::Nothing, false);
    let spec = machine.spec(work);
    let job = machine.begin(filter, spec);
    for node in [filter, target] {
        let refused = machine.vm.graph(ipc::graph::GraphRequest::Remove(node)).unwrap_err();
        assert!(
            refused.message.contains("is used by") || refused.message.contains("is a child of"),
            "{refused:?}"
        );
    }
    let model = machine.model.clone();
    let writer = machine.write();
    writer.rounds(20);
    machine.hold(writer);
    // It copies what is overwritten, and nothing by itself.
    let progress = machine.progress(job);
    assert!(0 < progress.done && progress.done <= progress.total, "{progress:?}");
    machine
        .switch(Switch {
            changes: vec![Machine::device_to(machine.source)],
            ..Switch::default()
        })
        .unwrap();
    machine.control(job, JobControl::End { success: true });
    machine.remove(filter);
    machine.remove(target);
    let copied = std::fs::read(machine.path("target")).unwrap();
    let mut differ = 0;
    for (number, (was, now)) in model.chunks(1 << 16).zip(machine.model.chunks(1 << 16)).enumerate() {
        if was != now {
            differ += 1;
            assert!(copied[number << 16..][..was.len()] == *was, "cluster {number}");
        }
    }
    assert!(differ > 10);
    machine.check_guest();
}

/// Fails requests of a kind.
fn failing(file: NodeId, iotype: IoType, errno: i32, once: bool) -> NodeSpec {
    NodeSpec::Blkdebug(BlkdebugSpec {
        file,
        inject_errors: vec![InjectedError {
            event: None,
            state: None,
            iotypes: vec![iotype],
            errno,
            offset: None,
            once,
            immediately: false,
        }],
        set_states: Vec::new(),
        align: None,
    })
}

#[test]
fn what_fails_is_treated_as_its_policy_says() {
    if !has_qemu_img() {
        return;
    }
    use JobErrorAction as Action;
    for (iotype, kind, errno, policy, action) in [
        (
            IoType::Read,
            IoKind::Read,
            libc::EIO,
            JobOnError::Report,
            Action::Report,
        ),
        (
            IoType::Read,
            IoKind::Read,
            libc::EIO,
            JobOnError::Ignore,
            Action::Ignore,
        ),
        (IoType::Read, IoKind::Read, libc::EIO, JobOnError::Stop, Action::Stop),
        (
            IoType::BlockStatus,
            IoKind::Read,
            libc::EIO,
            JobOnError::Stop,
            Action::Stop,
        ),
        (
            IoType::Write,
            IoKind::Write,
            libc::EIO,
            JobOnError::Enospc,
            Action::Report,
        ),
        (
            IoType::Write,
            IoKind::Write,
            libc::ENOSPC,
            JobOnError::Enospc,
            Action::Stop,
        ),
        (
            IoType::Write,
            IoKind::Write,
            libc::EIO,
            JobOnError::Ignore,
            Action::Ignore,
        ),
        (IoType::Flush, IoKind::Write, libc::EIO, JobOnError::Stop, Action::Stop),
    ] {
        let is_source = kind == IoKind::Read;
        let mut machine = Machine::new(EngineChoice::Auto, Shape::Qcow2, 1000);
        let target = machine.target("target", Shape::Raw);
        let debug = if is_source { machine.source } else { target };
        let debug = machine.add(failing(debug, iotype, errno, action != Action::Report));
        let (source, target) = if is_source {
            (debug, target)
        } else {
            (machine.source, debug)
        };
        let filter = machine.add(NodeSpec::MirrorTop { file: source });
        let from = CopyFrom::Layers {
            nodes: vec![source],
            is_all: true,
        };
        let mut spec = machine.spec(mirror(filter, target, from, false));
        (spec.on_source_error, spec.on_target_error) = if is_source {
            (policy, JobOnError::Report)
        } else {
            (JobOnError::Report, policy)
        };
        let job = machine.begin(filter, spec);
        let (_, _, what) = machine.told();
        assert_eq!(what, JobEvent::Error { kind, action, errno }, "{iotype:?} {policy:?}");
        match action {
            Action::Report => {
                let (_, _, what) = machine.told();
                let JobEvent::Ended(Err(failure)) = what else {
                    panic!("{what:?}")
                };
                assert_eq!(failure.errno, Some(errno));
                let end = Switch {
                    changes: vec![Machine::device_to(machine.source)],
                    ..Switch::default()
                };
                machine.switch(end).unwrap();
            }
            Action::Stop | Action::Ignore => {
                if action == Action::Stop {
                    machine.control(job, JobControl::Resume);
                }
                machine.ready(job);
                let end = Switch {
                    settle: vec![job],
                    changes: vec![Machine::device_to(target)],
                    ..Switch::default()
                };
                machine.switch(end).unwrap();
            }
        }
        machine.control(job, JobControl::End { success: true });
        machine.remove(filter);
        machine.check_guest();
    }
}

#[test]
fn a_settling_that_fails_leaves_everything_as_it_is() {
    if !has_qemu_img() {
        return;
    }
    let mut machine = Machine::new(EngineChoice::Auto, Shape::Raw, 1200);
    let target = machine.target("target", Shape::Raw);
    let debug = failing(target, IoType::Write, libc::EIO, true);
    let NodeSpec::Blkdebug(mut debug) = debug else {
        panic!("blkdebug")
    };
    // Only what is written after the guest has begun.
    debug.inject_errors[0].offset = Some(64 << 10);
    debug.inject_errors[0].once = true;
    let debug = machine.add(NodeSpec::Blkdebug(debug));
    let filter = machine.mirror_top();
    let work = mirror(filter, debug, CopyFrom::Nothing, false);
    let mut spec = machine.spec(work);
    spec.on_target_error = JobOnError::Stop;
    let job = machine.begin(filter, spec);
    machine.ready(job);
    machine.control(job, JobControl::Pause);
    let data = pattern(1, 4096);
    assert_eq!(machine.queue.as_mut().unwrap().write(128, &data), S_OK);
    machine.model[64 << 10..][..4096].copy_from_slice(&data);
    let end = || Switch {
        settle: vec![job],
        changes: vec![Machine::device_to(target)],
        ..Switch::default()
    };
    assert_eq!(machine.switch(end()).unwrap_err().errno, Some(libc::EIO));
    machine.check_guest();
    assert_eq!(machine.progress(job).total - machine.progress(job).done, 64 << 10);
    machine.control(job, JobControl::Resume);
    machine.switch(end()).unwrap();
    machine.control(job, JobControl::End { success: true });
    let there = &std::fs::read(machine.path("target")).unwrap()[64 << 10..][..4096];
    assert!(*there == data);
}

#[test]
fn a_backup_that_fails_leaves_the_guest_alone() {
    if !has_qemu_img() {
        return;
    }
    let mut machine = Machine::new(EngineChoice::Auto, Shape::Raw, 1300);
    let target = machine.target("target", Shape::Raw);
    let debug = machine.add(failing(target, IoType::Write, libc::ENOSPC, false));
    let filter = machine.copy_before_write(debug, true);
    let work = backup(filter, CopyFrom::Nothing, false);
    let mut spec = machine.spec(work);
    spec.on_target_error = JobOnError::Ignore;
    let job = machine.begin(filter, spec);
    let writer = machine.write();
    let expected = JobEvent::Error {
        kind: IoKind::Write,
        action: JobErrorAction::Report,
        errno: libc::ENOSPC,
    };
    assert_eq!(machine.told().2, expected);
    assert!(matches!(machine.told().2, JobEvent::Ended(Err(_))));
    writer.rounds(5);
    machine.hold(writer);
    machine.check_guest();
    machine.control(job, JobControl::End { success: false });
}

#[test]
fn an_image_that_is_pointed_elsewhere_takes_its_job_along() {
    if !has_qemu_img() {
        return;
    }
    // The source's own file is replaced under a job, as when it is opened anew.
    let mut machine = Machine::new(EngineChoice::Auto, Shape::Chain, 1100);
    let target = machine.target("target", Shape::Qcow2);
    let filter = machine.mirror_top();
    let work = mirror(filter, target, machine.all_layers(), false);
    let mut spec = machine.spec(work);
    spec.speed = 8 << 20;
    let writer = machine.write();
    let job = machine.begin(filter, spec);
    for _ in 0..10 {
        let extra = machine.add(NodeSpec::Pass {
            file: machine.layers[1],
        });
        for child in [extra, machine.layers[1]] {
            let change = EdgeChange::Child {
                parent: machine.source,
                role: ChildRole::Backing,
                child: Some(child),
            };
            machine
                .switch(Switch {
                    changes: vec![change],
                    ..Switch::default()
                })
                .unwrap();
        }
        machine.remove(extra);
    }
    machine.control(job, JobControl::SetSpeed(0));
    machine.ready(job);
    let end = Switch {
        settle: vec![job],
        changes: vec![Machine::device_to(target)],
        ..Switch::default()
    };
    machine.switch(end).unwrap();
    machine.control(job, JobControl::End { success: true });
    machine.hold(writer);
    machine.check_guest();
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

#[test]
fn a_killed_block_proc_leaves_images_that_check() {
    if !has_qemu_img() {
        return;
    }
    for (seed, kind) in (1500..).zip(["mirror", "backup", "compressed backup", "commit", "stream"]) {
        for round in 0..3 {
            let mut machine = Machine::new(EngineChoice::Auto, Shape::Chain, seed * 10 + round);
            let [top, middle, base] = machine.layers[..] else {
                panic!("three layers")
            };
            let target = machine.target("target", Shape::Qcow2);
            let (filter, work, change) = match kind {
                "mirror" => {
                    let filter = machine.mirror_top();
                    let work = mirror(filter, target, machine.all_layers(), round == 1);
                    (filter, work, Machine::device_to(filter))
                }
                "commit" => {
                    let grow = ipc::graph::GraphRequest::Resize {
                        node: base,
                        bytes: DISK,
                        preallocation: ipc::graph::Preallocation::Off,
                    };
                    machine.vm.graph(grow).unwrap();
                    let filter = machine.add(NodeSpec::Pass { file: middle });
                    let work = JobWork::Commit {
                        top: middle,
                        layers: vec![middle],
                        base,
                    };
                    (filter, work, backing_to(top, Some(filter)))
                }
                "stream" => {
                    let filter = machine.add(NodeSpec::CopyOnRead {
                        file: top,
                        for_job: true,
                    });
                    let work = JobWork::Stream {
                        filter,
                        layers: vec![middle, base],
                    };
                    (filter, work, Machine::device_to(filter))
                }
                kind => {
                    let filter = machine.copy_before_write(target, true);
                    let work = backup(filter, machine.all_layers(), kind != "backup");
                    (filter, work, Machine::device_to(filter))
                }
            };
            let mut spec = machine.spec(work);
            spec.speed = 16 << 20;
            let job = spec.job;
            machine
                .switch(Switch {
                    changes: vec![change],
                    start: vec![spec],
                    ..Switch::default()
                })
                .unwrap();
            let writer = machine.write();
            writer.rounds(1 + round);
            machine.hold(writer);
            let queue = machine.queue.as_mut().unwrap();
            assert_eq!(queue.ask(T_FLUSH, 0, None).0, S_OK);
            // Somewhere in the middle, whatever it is doing.
            let half = |machine: &mut Machine| {
                let progress = machine.progress(job);
                progress.done * 4 > progress.total * (1 + round)
            };
            while !half(&mut machine) {}
            machine.vm.helper.child.kill().unwrap();
            machine.vm.helper.child.wait().unwrap();
            for image in ["source", "middle", "target"] {
                let path = machine.path(image);
                let check = std::process::Command::new("qemu-img")
                    .args(["check", "-q", "-f", "qcow2", path.to_str().unwrap()])
                    .status()
                    .unwrap();
                // 3: clusters that nobody refers to.
                assert!(matches!(check.code(), Some(0 | 3)), "{kind}: {image}: {check}");
            }
            let plain = machine.path("plain");
            let source = machine.path("source");
            qemu_img(&[
                "convert",
                "-f",
                "qcow2",
                "-O",
                "raw",
                source.to_str().unwrap(),
                plain.to_str().unwrap(),
            ]);
            assert!(
                std::fs::read(plain).unwrap() == machine.model,
                "{kind} {round} {filter:?}"
            );
        }
    }
}

#[test]
fn a_write_does_not_wait_for_a_copy_for_ever() {
    if !has_qemu_img() {
        return;
    }
    use std::time::{Duration, Instant};
    for break_snapshot in [true, false] {
        let mut machine = Machine::new(EngineChoice::Auto, Shape::Raw, 1800);
        let slow = machine.add(NodeSpec::Null {
            bytes: DISK,
            latency_ns: 3_000_000_000,
            read_zeroes: false,
        });
        let spec = ipc::graph::CopyBeforeWriteSpec {
            break_snapshot,
            timeout_s: 1,
            ..machine.before_write(slow)
        };
        let filter = machine.add(NodeSpec::CopyBeforeWrite(spec));
        let access = machine.add(NodeSpec::SnapshotAccess { file: filter });
        machine
            .switch(Switch {
                changes: vec![Machine::device_to(filter)],
                ..Switch::default()
            })
            .unwrap();
        let data = pattern(1, 4096);
        let start = Instant::now();
        let status = machine.queue.as_mut().unwrap().write(0, &data);
        let took = start.elapsed();
        assert!((900..2800).contains(&took.as_millis()), "{took:?}");
        let read = ManualIo::Read {
            offset: 1 << 20,
            bytes: 512,
            pattern: None,
        };
        let read = machine
            .vm
            .graph(ipc::graph::GraphRequest::Io { node: access, io: read });
        if break_snapshot {
            assert_eq!(status, S_OK);
            assert_eq!(read.unwrap_err().errno, Some(libc::EACCES));
            machine.model[..4096].copy_from_slice(&data);
        } else {
            assert_eq!((status, read), (S_IOERR, Ok(GraphReply::Done)));
            // The copy has gone on, and what it was for can be done when it is over.
            std::thread::sleep(Duration::from_millis(2600));
            assert_eq!(machine.queue.as_mut().unwrap().write(0, &data), S_OK);
            machine.model[..4096].copy_from_slice(&data);
        }
        machine.check_guest();
    }
}
