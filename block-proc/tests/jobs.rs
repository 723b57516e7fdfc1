//! Block jobs in a real block-proc, on raw and qcow2 images, while a guest writes all the time.

mod common;
mod job_common;
use common::*;
use ipc::block_job::*;
use ipc::graph::{GraphReply, NodeSpec};
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
        (base.check(), top.check());
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
