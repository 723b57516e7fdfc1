//! For the tests of jobs: images in a folder, a guest that writes all the time and knows what must be there, and what is
//! asked of jobs.
#![allow(dead_code, reason = "every test file uses another part")]

use crate::common::*;
use ipc::Failure;
use ipc::block::{BlockEvent, EngineChoice};
use ipc::block_job::*;
use ipc::graph::{
    Backing, ChildRole, CreateQcow2, CreateSpec, DeviceOptions, EdgeChange, GraphReply, GraphRequest, ManualIo, NodeId,
    NodeSpec, Preallocation,
};
use ipc::virtio::{DeviceIndex, IoThreadIndex};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

pub const MAIN: IoThreadIndex = IoThreadIndex::MAIN;
pub const DEVICE: DeviceIndex = DeviceIndex(0);
/// No multiple of any chunk.
pub const DISK: u64 = (20 << 20) + 37 * 512;

/// A disk, what is written to it, and nodes that have numbers of their own.
pub struct Lab {
    pub vm: Vm,
    pub folder: tempfile::TempDir,
    pub writer: Writer,
    next: u32,
    jobs: u32,
}

/// How an image is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Raw,
    Qcow2,
}
pub const KINDS: [Kind; 2] = [Kind::Raw, Kind::Qcow2];

/// An image that is open.
#[derive(Debug, Clone)]
pub struct Image {
    pub kind: Kind,
    pub file: NodeId,
    pub node: NodeId,
    pub path: PathBuf,
}

impl Image {
    fn format(&self) -> &'static str {
        match self.kind {
            Kind::Raw => "raw",
            Kind::Qcow2 => "qcow2",
        }
    }

    /// As the header of an image above has it: name and format.
    pub fn name(&self) -> (String, Option<String>) {
        (self.path.to_str().unwrap().to_owned(), Some(self.format().to_owned()))
    }

    pub fn check(&self) {
        if self.kind == Kind::Qcow2 {
            let (text, ok) = qemu_img(&["check", "-U", "-f", "qcow2", self.path.to_str().unwrap()]);
            assert!(ok, "{text}");
        }
    }

    /// That it holds these bytes, by qemu-img.
    pub fn holds(&self, folder: &Path, bytes: &[u8]) {
        self.check();
        let raw = folder.join("expected");
        std::fs::write(&raw, bytes).unwrap();
        let format = self.format();
        let (raw, own) = (raw.to_str().unwrap(), self.path.to_str().unwrap());
        let (text, ok) = qemu_img(&["compare", "-U", "-f", "raw", "-F", format, raw, own]);
        assert!(ok, "{text}");
    }
}

pub fn qemu_img(arguments: &[&str]) -> (String, bool) {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img");
    let text = [output.stdout, output.stderr].concat();
    (String::from_utf8_lossy(&text).into_owned(), output.status.success())
}

impl Lab {
    /// A disk of one image that the guest has written some of.
    pub fn new(engine: EngineChoice, kind: Kind) -> (Self, Image) {
        let mut vm = Vm::start(engine, &[1, 1]);
        let folder = tempfile::tempdir().unwrap();
        let mut nodes = 0;
        let image = open(&mut vm, folder.path(), &mut nodes, kind, DISK, None);
        let attach = GraphRequest::Attach {
            device: DEVICE,
            node: image.node,
            options: options(&info(DISK)),
        };
        assert!(matches!(vm.graph(attach), Ok(GraphReply::Attached(_))));
        let queue = vm.activate(0, F_FLUSH | F_WRITE_ZEROES).remove(0);
        let lab = Self {
            vm,
            folder,
            writer: Writer::new(queue),
            next: nodes,
            jobs: 0,
        };
        (lab, image)
    }

    pub fn image(&mut self, kind: Kind, backing: Option<&Image>) -> Image {
        self.image_of(kind, DISK, backing)
    }

    pub fn image_of(&mut self, kind: Kind, bytes: u64, backing: Option<&Image>) -> Image {
        open(&mut self.vm, self.folder.path(), &mut self.next, kind, bytes, backing)
    }

    pub fn node(&mut self, spec: NodeSpec) -> NodeId {
        self.next += 1;
        self.vm.add(MAIN, NodeId(self.next), spec);
        NodeId(self.next)
    }

    /// An overlay between the device and what it had.
    pub fn snapshot(&mut self, below: &Image) -> Image {
        let image = self.image(Kind::Qcow2, Some(below));
        let changes = vec![backing(image.node, Some(below.node)), device(image.node)];
        self.switch(Switch {
            changes,
            ..Switch::default()
        })
        .unwrap();
        image
    }

    pub fn switch(&mut self, switch: Switch) -> Result<GraphReply, Failure> {
        self.vm.graph(GraphRequest::Switch(switch))
    }

    /// Starts a job, while edges move.
    pub fn start(&mut self, work: JobWork, changes: Vec<EdgeChange>) -> JobNumber {
        let spec = self.spec(work);
        let job = spec.job;
        self.begin(spec, changes).unwrap();
        job
    }

    pub fn spec(&mut self, work: JobWork) -> JobSpec {
        self.jobs += 1;
        JobSpec {
            job: JobNumber(self.jobs),
            work,
            speed: 0,
            on_source_error: JobOnError::Report,
            on_target_error: JobOnError::Report,
            paused: false,
        }
    }

    pub fn begin(&mut self, spec: JobSpec, changes: Vec<EdgeChange>) -> Result<GraphReply, Failure> {
        self.switch(Switch {
            changes,
            start: vec![spec],
            ..Switch::default()
        })
    }

    pub fn event(&mut self) -> (JobNumber, JobProgress, JobEvent) {
        match self.vm.helper.event() {
            BlockEvent::Job { job, progress, what } => (job, progress, what),
            other => panic!("{other:?}"),
        }
    }

    /// The next event must be this one.
    pub fn expect(&mut self, job: JobNumber, what: JobEvent) -> JobProgress {
        let (number, progress, event) = self.event();
        assert_eq!((number, event), (job, what));
        progress
    }

    pub fn ends_well(&mut self, job: JobNumber) {
        let progress = self.expect(job, JobEvent::Ended(Ok(())));
        assert_eq!(progress.done, progress.total);
    }

    pub fn control(&mut self, job: JobNumber, control: JobControl) -> Result<GraphReply, Failure> {
        self.vm.graph(GraphRequest::ControlJob { job, control })
    }

    pub fn end(&mut self, job: JobNumber, success: bool) {
        assert_eq!(self.control(job, JobControl::End { success }), Ok(GraphReply::Done));
    }

    pub fn progress(&mut self) -> BTreeMap<JobNumber, JobProgress> {
        match self.vm.graph(GraphRequest::ReportJobs) {
            Ok(GraphReply::Jobs(jobs)) => jobs,
            other => panic!("{other:?}"),
        }
    }

    pub fn bitmaps(&mut self) -> BTreeMap<BitmapNumber, BitmapReport> {
        match self.vm.graph(GraphRequest::ReportBitmaps) {
            Ok(GraphReply::Bitmaps(bitmaps)) => bitmaps,
            other => panic!("{other:?}"),
        }
    }

    pub fn remove(&mut self, nodes: &[NodeId]) {
        for node in nodes {
            assert_eq!(
                self.vm.graph(GraphRequest::Remove(*node)),
                Ok(GraphReply::Done),
                "{node:?}"
            );
        }
    }

    /// Changes what an image's header says of its backing file.
    pub fn rename_backing(&mut self, node: NodeId, backing: Option<&Image>) {
        let backing = backing.map(Image::name);
        let rename = GraphRequest::SetBackingName { node, backing };
        assert_eq!(self.vm.graph(rename), Ok(GraphReply::Done));
    }

    pub fn flush(&mut self, node: NodeId) {
        let io = ManualIo::Flush;
        assert_eq!(self.vm.graph(GraphRequest::Io { node, io }), Ok(GraphReply::Done));
    }

    /// A filter that the guest's requests go through from the next switch on.
    pub fn mirror_filter(&mut self, source: NodeId) -> NodeId {
        self.node(NodeSpec::MirrorTop { file: source })
    }

    /// Reads a whole disk as the driver of the second device, which gets it for that.
    pub fn read_second(&mut self, node: NodeId) -> Vec<u8> {
        let read_only = DeviceOptions {
            read_only: true,
            ..options(&info(DISK))
        };
        let attach = GraphRequest::Attach {
            device: DeviceIndex(1),
            node,
            options: read_only,
        };
        assert!(matches!(self.vm.graph(attach), Ok(GraphReply::Attached(_))));
        let mut queue = self.vm.activate(1, 0).remove(0);
        read_all(&mut queue)
    }
}

fn open(vm: &mut Vm, folder: &Path, nodes: &mut u32, kind: Kind, bytes: u64, backing: Option<&Image>) -> Image {
    let (file, node) = (NodeId(*nodes + 1), NodeId(*nodes + 2));
    *nodes += 2;
    let path = folder.join(format!("image{}", node.0));
    let host = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let length = if kind == Kind::Raw { bytes } else { 0 };
    host.set_len(length).unwrap();
    vm.add(MAIN, file, file_spec(&host, info(length)));
    if kind == Kind::Raw {
        vm.add(MAIN, node, raw_spec(file, false));
    } else {
        let spec = CreateSpec::Qcow2(CreateQcow2 {
            bytes,
            cluster_bytes: 16 << 10,
            backing: backing.map(Image::name),
            preallocation: Preallocation::Off,
            ..CreateQcow2::default()
        });
        let create = GraphRequest::Create {
            file,
            spec,
            data_file: None,
        };
        assert_eq!(vm.graph(create), Ok(GraphReply::Done));
        vm.add(MAIN, node, NodeSpec::Qcow2(qcow2_spec(file, Backing::None)));
    }
    Image { kind, file, node, path }
}

pub fn device(node: NodeId) -> EdgeChange {
    EdgeChange::Device { device: DEVICE, node }
}

pub fn backing(parent: NodeId, child: Option<NodeId>) -> EdgeChange {
    EdgeChange::Child {
        parent,
        role: ChildRole::Backing,
        child,
    }
}

/// Reads all of a disk through a queue.
pub fn read_all(queue: &mut Queue) -> Vec<u8> {
    let mut all = Vec::new();
    while (all.len() as u64) < DISK {
        let bytes = SLOT_BYTES.min(DISK - all.len() as u64) as usize;
        let (status, read) = queue.read(all.len() as u64 / 512, bytes);
        assert_eq!(status, S_OK);
        all.extend(read);
    }
    all
}

/// A guest that writes: on the calling thread, or on one of its own until it is stopped.
pub struct Writer {
    idle: Option<State>,
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    busy: Option<JoinHandle<State>>,
}

struct State {
    queue: Queue,
    disk: Vec<u8>,
    random: u64,
}

impl State {
    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 16) % limit
    }

    /// A few requests at once, that do not overlap; then all of them have ended.
    fn round(&mut self) {
        let count = 1 + self.below(6);
        let part = DISK / 512 / count;
        for slot in 0..count as u16 {
            let sectors = 1 + self.below(SLOT_BYTES / 512);
            let sector = u64::from(slot) * part + self.below(part - sectors);
            let range = (sector * 512) as usize..((sector + sectors) * 512) as usize;
            let at = self.queue.data_at(slot);
            if self.below(4) == 0 {
                let unmap = self.below(2) as u32;
                let mut bytes = sector.to_le_bytes().to_vec();
                bytes.extend((sectors as u32).to_le_bytes());
                bytes.extend(unmap.to_le_bytes());
                self.queue.put(at, &bytes);
                self.queue.prepare(slot, T_WRITE_ZEROES, 0, Some(readable(at, 16)));
                self.disk[range].fill(0);
            } else {
                let data = pattern(self.random, range.len());
                self.queue.put(at, &data);
                self.queue
                    .prepare(slot, T_OUT, sector, Some(readable(at, range.len() as u32)));
                self.disk[range].copy_from_slice(&data);
            }
        }
        self.queue.publish();
        self.queue.kick();
        for _ in 0..count {
            self.queue.wait_used();
        }
        for slot in 0..count as u16 {
            assert_eq!(self.queue.status(slot), S_OK, "slot {slot}");
        }
    }
}

impl Writer {
    fn new(queue: Queue) -> Self {
        let idle = State {
            queue,
            disk: vec![0; DISK as usize],
            random: 0x1234_5678_9abc_def1,
        };
        Self {
            idle: Some(idle),
            stop: Arc::default(),
            rounds: Arc::default(),
            busy: None,
        }
    }

    pub fn write(&mut self, rounds: usize) {
        let state = self.idle.as_mut().unwrap();
        (0..rounds).for_each(|_| state.round());
    }

    /// Writes on until [`Self::stop`].
    pub fn run(&mut self) {
        let mut state = self.idle.take().unwrap();
        let (stop, rounds) = (self.stop.clone(), self.rounds.clone());
        stop.store(false, Ordering::SeqCst);
        self.busy = Some(std::thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                state.round();
                rounds.fetch_add(1, Ordering::SeqCst);
            }
            state
        }));
    }

    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::SeqCst)
    }

    /// Waits until so many more rounds are written.
    pub fn wait_rounds(&self, more: u64) {
        let until = self.rounds.load(Ordering::SeqCst) + more;
        while self.rounds.load(Ordering::SeqCst) < until {
            assert!(
                self.busy.as_ref().is_some_and(|busy| !busy.is_finished()),
                "the writer has failed"
            );
            std::thread::yield_now();
        }
    }

    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.idle = Some(self.busy.take().unwrap().join().expect("the writer has failed"));
    }

    /// What must be on the disk.
    pub fn disk(&self) -> &[u8] {
        &self.idle.as_ref().unwrap().disk
    }

    pub fn queue(&mut self) -> &mut Queue {
        &mut self.idle.as_mut().unwrap().queue
    }

    /// What the guest reads is what it has written.
    pub fn verify(&mut self) {
        let state = self.idle.as_mut().unwrap();
        let there = read_all(&mut state.queue);
        if let Some(at) = (0..there.len()).find(|at| there[*at] != state.disk[*at]) {
            panic!("the guest reads something else at {at:#x}");
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

pub fn mirror(filter: NodeId, target: NodeId, layers: &[NodeId]) -> JobWork {
    JobWork::Mirror {
        filter,
        target,
        from: CopyFrom::Layers {
            nodes: layers.to_vec(),
            is_all: true,
        },
        target_reads_zeroes: true,
        granularity: 64 << 10,
        buffer_bytes: 16 << 20,
        unmap: true,
        write_blocking: false,
    }
}
