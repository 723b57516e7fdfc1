//! Not a test but a measurement: `cargo test --release -p block-proc --test job_speed -- --ignored --nocapture`.
//! `SPEED_FOLDER` says where the images are, `SPEED_DIRECT` that they are opened with O_DIRECT.

mod common;
mod job_common;
use common::*;
use ipc::block::EngineChoice;
use ipc::block_job::*;
use ipc::graph::{Backing, CopyBeforeWriteSpec, GraphRequest, NodeId, NodeSpec};
use job_common::*;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

const BYTES: u64 = 1 << 30;

/// An image of which every other part of 8 MiB has data, or all.
fn prepare(folder: &Path, name: &str, kind: Kind, is_full: bool) {
    let raw = folder.join("raw");
    let mut file = File::create(&raw).unwrap();
    let part = pattern(5, 8 << 20);
    for number in 0..BYTES / (8 << 20) {
        if is_full || number % 2 == 0 {
            file.write_all(&part).unwrap();
        } else {
            std::io::Seek::seek(&mut file, std::io::SeekFrom::Current(8 << 20)).unwrap();
        }
    }
    file.set_len(BYTES).unwrap();
    let to = folder.join(name);
    match kind {
        Kind::Raw => std::fs::rename(&raw, &to).unwrap(),
        Kind::Qcow2 => {
            let (raw, to) = (raw.to_str().unwrap(), to.to_str().unwrap());
            let (text, ok) = qemu_img(&["convert", "-f", "raw", "-O", "qcow2", raw, to]);
            assert!(ok, "{text}");
        }
    }
}

struct Bench {
    vm: Vm,
    next: u32,
}

impl Bench {
    fn node(&mut self, spec: NodeSpec) -> NodeId {
        self.next += 1;
        self.vm.add(MAIN, NodeId(self.next), spec);
        NodeId(self.next)
    }

    fn open(&mut self, path: &Path, kind: Kind, direct: bool) -> NodeId {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = File::options();
        options.read(true).write(true);
        if direct {
            options.custom_flags(libc::O_DIRECT);
        }
        let file = options.open(path).unwrap();
        let bytes = file.metadata().unwrap().len();
        let mut info = info(bytes);
        info.direct = direct;
        let file = self.node(file_spec(&file, info));
        match kind {
            Kind::Raw => self.node(raw_spec(file, false)),
            Kind::Qcow2 => self.node(NodeSpec::Qcow2(qcow2_spec(file, Backing::FromImage))),
        }
    }

    fn run(&mut self, work: JobWork) -> f64 {
        let start = Instant::now();
        let spec = JobSpec {
            job: JobNumber(1),
            work,
            speed: 0,
            on_source_error: JobOnError::Report,
            on_target_error: JobOnError::Report,
            paused: false,
        };
        let switch = Switch {
            start: vec![spec],
            ..Switch::default()
        };
        self.vm.graph(GraphRequest::Switch(switch)).unwrap();
        let ipc::block::BlockEvent::Job { what, .. } = self.vm.helper.event() else {
            panic!("another event")
        };
        assert!(matches!(what, JobEvent::Ready | JobEvent::Ended(Ok(()))), "{what:?}");
        start.elapsed().as_secs_f64()
    }
}

#[test]
#[ignore = "prints numbers; run it on a quiet machine"]
fn seconds_of_copies() {
    let folder = tempfile::tempdir_in(std::env::var("SPEED_FOLDER").unwrap_or("/tmp".into())).unwrap();
    let direct = std::env::var_os("SPEED_DIRECT").is_some();
    for kind in KINDS {
        for is_full in [true, false] {
            prepare(folder.path(), "source", kind, is_full);
            for job in ["mirror", "backup", "commit"] {
                let target = folder.path().join("target");
                let _ = std::fs::remove_file(&target);
                match kind {
                    Kind::Raw => File::create(&target).unwrap().set_len(BYTES).unwrap(),
                    Kind::Qcow2 => {
                        let (name, size) = (target.to_str().unwrap(), BYTES.to_string());
                        assert!(qemu_img(&["create", "-q", "-f", "qcow2", name, &size]).1);
                    }
                }
                let engine = if direct { EngineChoice::IoUring } else { ENGINES[0] };
                let mut bench = Bench {
                    vm: Vm::start(engine, &[]),
                    next: 0,
                };
                let source = bench.open(&folder.path().join("source"), kind, direct);
                let target = bench.open(&target, kind, direct);
                let nodes = vec![source];
                let seconds = match job {
                    "mirror" => {
                        let filter = bench.node(NodeSpec::MirrorTop { file: source });
                        bench.run(mirror(filter, target, &nodes))
                    }
                    "backup" => {
                        let filter = bench.node(NodeSpec::CopyBeforeWrite(CopyBeforeWriteSpec {
                            file: source,
                            target,
                            cluster_bytes: 64 << 10,
                            for_job: true,
                            bitmap: None,
                            break_snapshot: true,
                            timeout_s: 0,
                        }));
                        bench.run(JobWork::Backup {
                            filter,
                            from: CopyFrom::Layers { nodes, is_all: true },
                            bitmap_mode: BitmapMode::Never,
                            target_reads_zeroes: true,
                            compress: false,
                            max_workers: 64,
                            max_chunk: 0,
                        })
                    }
                    _ => bench.run(JobWork::Commit {
                        top: source,
                        layers: nodes,
                        base: target,
                    }),
                };
                let full = if is_full { "full" } else { "half empty" };
                println!("{job} of a {full} {kind:?} image of 1 GiB: {seconds:.2} s");
            }
        }
    }
}
