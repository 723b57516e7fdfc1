//! What is asked of jobs while they work, what becomes of errors, and what is refused.

mod common;
mod job_common;
use common::*;
use ipc::Failure;
use ipc::block::{BlockRequest, IoKind};
use ipc::block_job::*;
use ipc::graph::{BlkdebugSpec, GraphReply, GraphRequest, InjectedError, IoType, ManualIo, NodeId, NodeSpec};
use job_common::*;
use nix::errno::Errno;
use std::time::{Duration, Instant};

/// A source with data everywhere.
fn full(lab: &mut Lab, node: NodeId) {
    let io = ManualIo::Write {
        offset: 0,
        bytes: DISK,
        pattern: 7,
        durable: false,
    };
    assert_eq!(lab.vm.graph(GraphRequest::Io { node, io }), Ok(GraphReply::Done));
}

fn is_full(lab: &mut Lab, node: NodeId) {
    let io = ManualIo::Read {
        offset: 0,
        bytes: DISK,
        pattern: Some(7),
    };
    assert_eq!(lab.vm.graph(GraphRequest::Io { node, io }), Ok(GraphReply::Done));
}

/// A mirror of a full disk.
fn prepare(lab: &mut Lab, source: &Image) -> (Image, NodeId, JobSpec) {
    full(lab, source.node);
    let target = lab.image(Kind::Raw, None);
    let filter = lab.mirror_filter(source.node);
    let spec = lab.spec(mirror(filter, target.node, &[source.node]));
    (target, filter, spec)
}

fn progress(lab: &mut Lab, job: JobNumber) -> JobProgress {
    lab.progress()[&job]
}

#[test]
fn a_limited_job_keeps_to_its_limit_pauses_goes_on_and_is_quick_at_once_without() {
    for engine in ENGINES {
        let (mut lab, source) = Lab::new(engine, Kind::Raw);
        let (_, filter, spec) = prepare(&mut lab, &source);
        let job = spec.job;
        let speed = 512 << 10;
        let start = Instant::now();
        lab.begin(JobSpec { speed, ..spec }, vec![device(filter)]).unwrap();
        std::thread::sleep(Duration::from_millis(700));
        let done = progress(&mut lab, job).done;
        let most = (start.elapsed().as_secs_f64() + 0.3) * speed as f64;
        assert!(done > 0 && (done as f64) < most, "{done} bytes, at most {most}");

        assert_eq!(lab.control(job, JobControl::Pause), Ok(GraphReply::Done));
        let rests = progress(&mut lab, job);
        std::thread::sleep(Duration::from_millis(400));
        assert_eq!(progress(&mut lab, job), rests);
        lab.control(job, JobControl::SetSpeed(0)).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(progress(&mut lab, job), rests, "it is still paused");
        lab.control(job, JobControl::Resume).unwrap();
        lab.expect(job, JobEvent::Ready);
        assert_eq!(progress(&mut lab, job).done, DISK);
    }
}

#[test]
fn a_slow_job_is_cancelled_at_once_and_leaves_its_nodes_free() {
    for engine in ENGINES {
        let (mut lab, source) = Lab::new(engine, Kind::Qcow2);
        let (target, filter, spec) = prepare(&mut lab, &source);
        let job = spec.job;
        lab.begin(JobSpec { speed: 65536, ..spec }, vec![device(filter)])
            .unwrap();
        let refused = lab.vm.graph(GraphRequest::Remove(target.node)).unwrap_err();
        assert!(refused.message.contains("is used by job"), "{refused:?}");
        lab.writer.run();
        lab.writer.wait_rounds(3);
        let start = Instant::now();
        lab.end(job, false);
        assert!(start.elapsed() < Duration::from_secs(5));
        assert!(lab.progress().is_empty());
        let nobody = lab.control(job, JobControl::Resume).unwrap_err();
        assert!(nobody.message.contains("there is no job"), "{nobody:?}");
        lab.switch(Switch {
            changes: vec![device(source.node)],
            ..Switch::default()
        })
        .unwrap();
        lab.remove(&[filter, target.node, target.file]);
        lab.writer.stop();
    }
}

#[test]
fn a_paused_machine_does_not_stop_a_job_and_does_not_wait_for_it() {
    for engine in ENGINES {
        let (mut lab, source) = Lab::new(engine, Kind::Raw);
        let (_, filter, spec) = prepare(&mut lab, &source);
        let job = spec.job;
        lab.begin(JobSpec { speed: 1 << 20, ..spec }, vec![device(filter)])
            .unwrap();
        let start = Instant::now();
        lab.vm.done(BlockRequest::Pause);
        assert!(start.elapsed() < Duration::from_secs(5));
        let before = progress(&mut lab, job).done;
        lab.control(job, JobControl::SetSpeed(0)).unwrap();
        let ready = lab.expect(job, JobEvent::Ready);
        assert!(ready.done > before);
        lab.vm.done(BlockRequest::Resume);
        lab.writer.write(1);
    }
}

#[test]
fn a_job_that_begins_paused_waits_and_its_filter_works() {
    let (mut lab, source) = Lab::new(ENGINES[0], Kind::Raw);
    let (target, filter, spec) = prepare(&mut lab, &source);
    let job = spec.job;
    lab.begin(JobSpec { paused: true, ..spec }, vec![device(filter)])
        .unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(progress(&mut lab, job).done, 0);
    lab.control(job, JobControl::Resume).unwrap();
    lab.expect(job, JobEvent::Ready);
    is_full(&mut lab, target.node);
}

fn failing(file: NodeId, errno: Errno, iotype: IoType, offset: Option<u64>, once: bool) -> NodeSpec {
    NodeSpec::Blkdebug(BlkdebugSpec {
        file,
        inject_errors: vec![InjectedError {
            event: None,
            state: None,
            iotypes: vec![iotype],
            errno: errno as i32,
            offset,
            once,
            immediately: false,
        }],
        set_states: vec![],
        align: None,
    })
}

fn error(kind: IoKind, action: JobErrorAction, errno: Errno) -> JobEvent {
    JobEvent::Error {
        kind,
        action,
        errno: errno as i32,
    }
}

fn ended_with(errno: Errno) -> JobEvent {
    JobEvent::Ended(Err(Failure {
        message: errno.desc().to_owned(),
        errno: Some(errno as i32),
    }))
}

#[test]
fn errors_end_a_job_stop_it_or_are_passed_over_as_its_policy_says() {
    use JobErrorAction as Action;
    use JobOnError as Policy;
    for (policy, errno, action) in [
        (Policy::Report, Errno::EIO, Action::Report),
        (Policy::Ignore, Errno::EIO, Action::Ignore),
        (Policy::Stop, Errno::EIO, Action::Stop),
        (Policy::Enospc, Errno::ENOSPC, Action::Stop),
        (Policy::Enospc, Errno::EIO, Action::Report),
    ] {
        for kind in [IoKind::Read, IoKind::Write] {
            let (mut lab, source) = Lab::new(ENGINES[0], Kind::Raw);
            full(&mut lab, source.node);
            let mut target = lab.image(Kind::Raw, None).node;
            let mut read = source.node;
            let at = Some(4 << 20);
            match kind {
                IoKind::Read => read = lab.node(failing(source.node, errno, IoType::Read, at, true)),
                _ => target = lab.node(failing(target, errno, IoType::Write, at, true)),
            }
            let filter = lab.mirror_filter(read);
            let spec = lab.spec(mirror(filter, target, &[source.node]));
            let job = spec.job;
            let (on_source_error, on_target_error) = match kind {
                IoKind::Read => (policy, Policy::Report),
                _ => (Policy::Report, policy),
            };
            let spec = JobSpec {
                on_source_error,
                on_target_error,
                ..spec
            };
            lab.begin(spec, vec![device(filter)]).unwrap();
            lab.expect(job, error(kind, action, errno));
            if action == Action::Report {
                lab.expect(job, ended_with(errno));
                lab.writer.write(2);
                lab.end(job, false);
                continue;
            }
            if action == Action::Stop {
                assert_eq!(lab.control(job, JobControl::Pause), Ok(GraphReply::Done));
                assert!(progress(&mut lab, job).done < DISK);
                lab.control(job, JobControl::Resume).unwrap();
            }
            lab.expect(job, JobEvent::Ready);
            is_full(&mut lab, target);
        }
    }
}

#[test]
fn what_a_stream_cannot_read_stays_below_and_the_rest_goes_on() {
    let (mut lab, base) = Lab::new(ENGINES[0], Kind::Raw);
    full(&mut lab, base.node);
    let broken = lab.node(failing(base.node, Errno::EIO, IoType::Read, Some(4 << 20), false));
    let top = lab.image(Kind::Qcow2, Some(&base));
    let filter = lab.node(NodeSpec::CopyOnRead {
        file: top.node,
        for_job: true,
    });
    let work = JobWork::Stream {
        filter,
        layers: vec![broken],
    };
    let spec = lab.spec(work);
    let job = spec.job;
    let spec = JobSpec {
        on_source_error: JobOnError::Ignore,
        ..spec
    };
    lab.begin(spec, vec![backing(top.node, Some(broken)), device(filter)])
        .unwrap();
    lab.expect(job, error(IoKind::Read, JobErrorAction::Ignore, Errno::EIO));
    let progress = lab.expect(job, ended_with(Errno::EIO));
    assert_eq!(progress.done, DISK);
}

#[test]
fn a_backup_that_fails_breaks_and_not_the_guests_write() {
    for (for_job, break_snapshot) in [(true, true), (false, false), (false, true)] {
        let (mut lab, source) = Lab::new(ENGINES[0], Kind::Raw);
        full(&mut lab, source.node);
        let good = lab.image(Kind::Raw, None);
        let target = lab.node(failing(good.node, Errno::EIO, IoType::Write, None, false));
        let filter = lab.node(NodeSpec::CopyBeforeWrite(ipc::graph::CopyBeforeWriteSpec {
            file: source.node,
            target,
            cluster_bytes: 64 << 10,
            for_job,
            bitmap: None,
            break_snapshot,
            timeout_s: 0,
        }));
        let snapshot = lab.node(NodeSpec::SnapshotAccess { file: filter });
        let changes = vec![device(filter)];
        let work = JobWork::Backup {
            bitmap: None,
            filter,
            from: CopyFrom::Nothing,
            bitmap_mode: BitmapMode::Never,
            target_reads_zeroes: true,
            compress: false,
            max_workers: 64,
            max_chunk: 0,
        };
        let job = match for_job {
            true => {
                let spec = lab.spec(work);
                let job = spec.job;
                let on_target_error = JobOnError::Ignore;
                lab.begin(
                    JobSpec {
                        on_target_error,
                        ..spec
                    },
                    changes,
                )
                .unwrap();
                Some(job)
            }
            false => {
                let switch = Switch {
                    changes,
                    ..Switch::default()
                };
                lab.switch(switch).unwrap();
                None
            }
        };
        let status = lab.writer.queue().write(8, &[1; 512]);
        assert_eq!(status, if break_snapshot { S_OK } else { S_IOERR });
        if let Some(job) = job {
            lab.expect(job, error(IoKind::Write, JobErrorAction::Report, Errno::EIO));
            lab.expect(job, ended_with(Errno::EIO));
            lab.end(job, false);
        }
        let io = ManualIo::Read {
            offset: 0,
            bytes: 4096,
            pattern: Some(7),
        };
        let read = lab.vm.graph(GraphRequest::Io { node: snapshot, io });
        match break_snapshot {
            true => assert_eq!(read.unwrap_err().errno, Some(Errno::EACCES as i32)),
            false => assert_eq!(read, Ok(GraphReply::Done)),
        }
    }
}

#[test]
fn what_cannot_begin_is_refused_and_nothing_has_changed() {
    let (mut lab, source) = Lab::new(ENGINES[0], Kind::Raw);
    let target = lab.image(Kind::Raw, None);
    let small = lab.image_of(Kind::Raw, 1 << 20, None);
    let filter = lab.mirror_filter(source.node);
    let nobody = NodeId(999);
    let good = mirror(filter, target.node, &[source.node]);
    let with = |change: fn(&mut u32, &mut CopyFrom)| {
        let mut work = good.clone();
        if let JobWork::Mirror { granularity, from, .. } = &mut work {
            change(granularity, from);
        }
        work
    };
    let stream = JobWork::Stream {
        filter: source.node,
        layers: vec![],
    };
    for (work, message) in [
        (mirror(source.node, target.node, &[]), "not a mirror's filter"),
        (mirror(filter, small.node, &[]), "are copied to node"),
        (mirror(filter, nobody, &[]), "there is no node"),
        (mirror(filter, target.node, &[nobody]), "there is no node"),
        (stream, "not a stream's filter"),
        (with(|granularity, _| *granularity = 3000), "granularity of 3000"),
        (
            with(|_, from| *from = CopyFrom::Bitmap(BitmapNumber(1))),
            "does not begin with a bitmap",
        ),
    ] {
        let spec = lab.spec(work);
        let failure = lab.begin(spec, vec![device(filter)]).unwrap_err();
        assert!(failure.message.contains(message), "{failure:?}");
        // The edge has not moved either: nobody uses the filter.
        assert!(lab.progress().is_empty());
    }
    lab.remove(&[filter]);
    let filter = lab.mirror_filter(source.node);
    let first = lab.spec(mirror(filter, target.node, &[source.node]));
    let second = JobSpec {
        job: JobNumber(77),
        ..first.clone()
    };
    let twice = Switch {
        start: vec![first.clone(), second.clone()],
        ..Switch::default()
    };
    assert!(lab.switch(twice).unwrap_err().message.contains("one filter"));
    assert!(lab.progress().is_empty());
    lab.begin(first.clone(), vec![]).unwrap();
    assert!(lab.begin(second, vec![]).unwrap_err().message.contains("already"));
    assert!(
        lab.begin(first.clone(), vec![])
            .unwrap_err()
            .message
            .contains("exists already")
    );
    lab.expect(first.job, JobEvent::Ready);
    let settle = Switch {
        settle: vec![JobNumber(1000)],
        ..Switch::default()
    };
    assert!(lab.switch(settle).unwrap_err().message.contains("there is no job"));
}
