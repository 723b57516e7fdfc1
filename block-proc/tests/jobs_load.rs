//! Jobs in a real block-proc, while the guest writes: what they copy is what was or is there.

mod common;
mod jobs_load_common;
use common::*;
use ipc::block::EngineChoice;
use ipc::block_job::{CopyFrom, JobControl, JobWork, Switch};
use ipc::graph::{ChildRole, EdgeChange, ManualIo, NodeSpec};
use jobs_load_common::*;

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
