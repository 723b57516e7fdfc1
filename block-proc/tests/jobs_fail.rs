//! Jobs in a real block-proc when something fails: requests, beginnings, endings, block-proc itself.

mod common;
mod jobs_load_common;
use common::*;
use ipc::block::{EngineChoice, IoKind};
use ipc::block_job::{CopyFrom, JobControl, JobErrorAction, JobEvent, JobOnError, JobWork, Switch};
use ipc::graph::{BlkdebugSpec, GraphReply, InjectedError, IoType, ManualIo, NodeId, NodeSpec};
use jobs_load_common::*;

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
