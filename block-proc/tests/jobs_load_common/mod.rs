//! A machine with one disk whose guest writes at random, for the tests of jobs: what the disk must read as is known at every
//! moment when the guest is held.
#![allow(dead_code, reason = "every test file uses another part")]

use crate::common::*;
use ipc::block::{BlockEvent, EngineChoice, ImageFormat};
use ipc::block_job::{
    BitmapMode, CopyFrom, JobControl, JobEvent, JobNumber, JobOnError, JobProgress, JobSpec, JobWork, Switch,
};
use ipc::graph::{
    Backing, ChildRole, CopyBeforeWriteSpec, EdgeChange, GraphReply, GraphRequest, ManualIo, NodeId, NodeSpec,
};
use ipc::virtio::{DeviceIndex, IoThreadIndex};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

pub const MAIN: IoThreadIndex = IoThreadIndex::MAIN;
pub const DEVICE: DeviceIndex = DeviceIndex(0);
/// Not a whole number of clusters.
pub const DISK: u64 = (16 << 20) + 5 * 512;

/// xorshift64*.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % limit.max(1)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Raw,
    Qcow2,
    /// qcow2 over qcow2 over raw, which is shorter.
    Chain,
}

pub struct Machine {
    pub vm: Vm,
    pub dir: tempfile::TempDir,
    pub model: Vec<u8>,
    pub source: NodeId,
    /// The images, from above.
    pub layers: Vec<NodeId>,
    pub random: Random,
    pub queue: Option<Queue>,
    next_node: u32,
    next_job: u32,
    pub events: Vec<(JobNumber, JobProgress, JobEvent)>,
}

pub fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
    text
}

/// Whether qemu-img is there; says so where it is not.
pub fn has_qemu_img() -> bool {
    let has = Command::new("qemu-img").arg("--version").output().is_ok();
    if !has {
        eprintln!("skipped: there is no qemu-img");
    }
    has
}

impl Machine {
    pub fn new(engine: EngineChoice, shape: Shape, seed: u64) -> Self {
        let mut machine = Self {
            vm: Vm::start(engine, &[1]),
            dir: tempfile::tempdir().unwrap(),
            model: vec![0; DISK as usize],
            source: NodeId(0),
            layers: Vec::new(),
            random: Random::new(seed),
            queue: None,
            next_node: 1,
            next_job: 1,
            events: Vec::new(),
        };
        match shape {
            Shape::Raw => machine.source = machine.raw("source", DISK),
            Shape::Qcow2 => machine.source = machine.qcow2("source", DISK, None),
            Shape::Chain => {
                let base = machine.raw("base", DISK - 300_032);
                machine.scribble(base, DISK - 300_032);
                let middle = machine.qcow2("middle", DISK, Some(("base", "raw", base)));
                machine.scribble(middle, DISK);
                machine.source = machine.qcow2("source", DISK, Some(("middle", "qcow2", middle)));
                machine.layers = vec![machine.source, middle, base];
            }
        }
        machine.scribble(machine.source, DISK);
        if machine.layers.is_empty() {
            machine.layers = vec![machine.source];
        }
        machine
            .layers
            .clone()
            .into_iter()
            .for_each(|layer| machine.flush(layer));
        let attach = GraphRequest::Attach {
            device: DEVICE,
            node: machine.source,
            options: options(&info(DISK)),
        };
        machine.vm.graph(attach).unwrap();
        machine.queue = Some(machine.vm.activate(0, F_FLUSH | F_WRITE_ZEROES | F_DISCARD).remove(0));
        machine
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn new_node(&mut self) -> NodeId {
        self.next_node += 1;
        NodeId(self.next_node)
    }

    pub fn file(&mut self, path: &Path, bytes: u64) -> NodeId {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let node = self.new_node();
        self.vm.add(MAIN, node, file_spec(&file, info(bytes)));
        node
    }

    /// A new raw image.
    pub fn raw(&mut self, name: &str, bytes: u64) -> NodeId {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        let file = self.file(&path, bytes);
        let node = self.new_node();
        self.vm.add(MAIN, node, raw_spec(file, false));
        node
    }

    /// A new qcow2 image, with a backing file: its name, format and node.
    pub fn qcow2(&mut self, name: &str, bytes: u64, backing: Option<(&str, &str, NodeId)>) -> NodeId {
        let path = self.path(name);
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        let full = backing.map(|(name, format, _)| (self.path(name).display().to_string(), format));
        if let Some((file, format)) = &full {
            arguments.extend(["-b", file, "-F", format]);
        }
        let (path_text, bytes) = (path.display().to_string(), bytes.to_string());
        arguments.extend([&path_text[..], &bytes]);
        qemu_img(&arguments);
        let file = self.file(&path, path.metadata().unwrap().len());
        let node = self.new_node();
        let backing = backing.map_or(Backing::None, |(_, _, node)| Backing::Node(node));
        self.vm.add(MAIN, node, NodeSpec::Qcow2(qcow2_spec(file, backing)));
        node
    }

    pub fn target(&mut self, name: &str, shape: Shape) -> NodeId {
        match shape {
            Shape::Raw => self.raw(name, DISK),
            _ => self.qcow2(name, DISK, None),
        }
    }

    /// Writes here and there on a node, and into the model.
    pub fn scribble(&mut self, node: NodeId, bytes: u64) {
        for _ in 0..24 {
            let offset = self.random.below(bytes / 512) * 512;
            let length = (self.random.below(900) * 512 + 512).min(bytes - offset);
            let pattern = 1 + self.random.below(255) as u8;
            let io = match self.random.below(5) {
                0 => ManualIo::Zero {
                    offset,
                    bytes: length,
                    may_unmap: true,
                },
                _ => ManualIo::Write {
                    offset,
                    bytes: length,
                    pattern,
                    durable: false,
                },
            };
            let byte = if matches!(io, ManualIo::Zero { .. }) {
                0
            } else {
                pattern
            };
            self.model[offset as usize..][..length as usize].fill(byte);
            assert_eq!(self.vm.graph(GraphRequest::Io { node, io }), Ok(GraphReply::Done));
        }
    }

    pub fn add(&mut self, spec: NodeSpec) -> NodeId {
        let node = self.new_node();
        self.vm.add(MAIN, node, spec);
        node
    }

    pub fn mirror_top(&mut self) -> NodeId {
        let file = self.source;
        self.add(NodeSpec::MirrorTop { file })
    }

    pub fn copy_before_write(&mut self, target: NodeId, for_job: bool) -> NodeId {
        let spec = self.before_write(target);
        self.add(NodeSpec::CopyBeforeWrite(CopyBeforeWriteSpec { for_job, ..spec }))
    }

    pub fn before_write(&self, target: NodeId) -> CopyBeforeWriteSpec {
        CopyBeforeWriteSpec {
            file: self.source,
            target,
            cluster_bytes: 64 << 10,
            for_job: false,
            bitmap: None,
            break_snapshot: true,
            timeout_s: 0,
        }
    }

    pub fn all_layers(&self) -> CopyFrom {
        CopyFrom::Layers {
            nodes: self.layers.clone(),
            is_all: true,
        }
    }

    pub fn spec(&mut self, work: JobWork) -> JobSpec {
        self.next_job += 1;
        JobSpec {
            job: JobNumber(self.next_job),
            work,
            speed: 0,
            on_source_error: JobOnError::Report,
            on_target_error: JobOnError::Report,
            paused: false,
        }
    }

    pub fn device_to(node: NodeId) -> EdgeChange {
        EdgeChange::Device { device: DEVICE, node }
    }

    pub fn switch(&mut self, switch: Switch) -> Result<(), ipc::Failure> {
        match self.vm.graph(GraphRequest::Switch(switch))? {
            GraphReply::Resized(_) => Ok(()),
            other => panic!("Switch: {other:?}"),
        }
    }

    /// Begins a job under a filter that goes between the device and its disk.
    pub fn begin(&mut self, filter: NodeId, spec: JobSpec) -> JobNumber {
        let job = spec.job;
        let switch = Switch {
            changes: vec![Self::device_to(filter)],
            start: vec![spec],
            ..Switch::default()
        };
        self.switch(switch).unwrap();
        job
    }

    pub fn control(&mut self, job: JobNumber, control: JobControl) {
        let answer = self.vm.graph(GraphRequest::ControlJob { job, control });
        assert_eq!(answer, Ok(GraphReply::Done), "{control:?}");
    }

    pub fn progress(&mut self, job: JobNumber) -> JobProgress {
        match self.vm.graph(GraphRequest::ReportJobs) {
            Ok(GraphReply::Jobs(jobs)) => jobs[&job],
            other => panic!("ReportJobs: {other:?}"),
        }
    }

    /// The next thing that a job tells.
    pub fn told(&mut self) -> (JobNumber, JobProgress, JobEvent) {
        loop {
            if let BlockEvent::Job { job, progress, what } = self.vm.helper.event() {
                return (job, progress, what);
            }
        }
    }

    /// Waits for a job's good end.
    pub fn ended(&mut self, job: JobNumber) {
        let (told, progress, what) = self.told();
        assert_eq!((told, &what), (job, &JobEvent::Ended(Ok(()))), "{progress:?}");
        assert_eq!(progress.done, progress.total);
    }

    pub fn ready(&mut self, job: JobNumber) {
        let (told, progress, what) = self.told();
        assert_eq!((told, &what), (job, &JobEvent::Ready));
        assert!(progress.ready, "{progress:?}");
    }

    /// What the guest reads is what it wrote.
    pub fn check_guest(&mut self) {
        let queue = self.queue.as_mut().expect("the writer is held");
        for (number, expected) in self.model.chunks(64 << 10).enumerate() {
            let (status, there) = queue.read(number as u64 * 128, expected.len());
            assert_eq!(status, S_OK);
            if let Some(at) = there
                .iter()
                .zip(expected)
                .position(|(there, expected)| there != expected)
            {
                panic!("byte {} is {}, not {}", (number << 16) + at, there[at], expected[at]);
            }
        }
    }

    pub fn remove(&mut self, node: NodeId) {
        assert_eq!(self.vm.graph(GraphRequest::Remove(node)), Ok(GraphReply::Done));
    }

    pub fn flush(&mut self, node: NodeId) {
        let io = ManualIo::Flush;
        assert_eq!(self.vm.graph(GraphRequest::Io { node, io }), Ok(GraphReply::Done));
    }

    /// A finished image reads as expected, for qemu-img.
    pub fn check_image(&self, name: &str, format: &str, expected: &[u8]) {
        let (path, plain) = (self.path(name), self.path("plain"));
        if format == "qcow2" {
            let info = qemu_img(&["check", "-U", "-f", "qcow2", path.to_str().unwrap()]);
            assert!(info.contains("No errors were found"), "{info}");
        }
        qemu_img(&[
            "convert",
            "-U",
            "-f",
            format,
            "-O",
            "raw",
            path.to_str().unwrap(),
            plain.to_str().unwrap(),
        ]);
        let there = std::fs::read(&plain).unwrap();
        assert_eq!(there.len(), expected.len());
        if let Some(at) = there
            .iter()
            .zip(expected)
            .position(|(there, expected)| there != expected)
        {
            panic!("{name}: byte {at} is {}, not {}", there[at], expected[at]);
        }
    }

    /// Lets the guest write, until it is held.
    pub fn write(&mut self) -> Writer {
        let queue = self.queue.take().expect("one writer");
        Writer::start(queue, self.model.clone(), self.random.below(1 << 40))
    }

    /// Holds the guest: nothing of it is in flight.
    pub fn hold(&mut self, writer: Writer) {
        let (queue, model) = writer.stop();
        self.queue = Some(queue);
        self.model = model;
    }
}

pub fn image_format(shape: Shape) -> &'static str {
    match shape {
        Shape::Raw => "raw",
        _ => "qcow2",
    }
}

pub fn disk_format(shape: Shape) -> ImageFormat {
    match shape {
        Shape::Raw => ImageFormat::Raw,
        _ => ImageFormat::Qcow2,
    }
}

pub fn backing_to(parent: NodeId, child: Option<NodeId>) -> EdgeChange {
    EdgeChange::Child {
        parent,
        role: ChildRole::Backing,
        child,
    }
}

const SLOTS: u64 = 8;

/// A guest at work in a thread of its own.
pub struct Writer {
    stop: Arc<(Mutex<(bool, u64)>, Condvar)>,
    thread: JoinHandle<(Queue, Vec<u8>)>,
}

impl Writer {
    fn start(mut queue: Queue, mut model: Vec<u8>, seed: u64) -> Self {
        let stop = Arc::new((Mutex::new((false, 0)), Condvar::new()));
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut random = Random::new(seed);
            loop {
                {
                    let mut state = told.0.lock().unwrap();
                    if state.0 {
                        return (queue, model);
                    }
                    state.1 += 1;
                    told.1.notify_all();
                }
                round(&mut queue, &mut model, &mut random);
            }
        });
        Self { stop, thread }
    }

    /// Waits until it has written for so many rounds more.
    pub fn rounds(&self, more: u64) {
        let mut state = self.stop.0.lock().unwrap();
        let until = state.1 + more;
        while state.1 < until {
            state = self.stop.1.wait(state).unwrap();
        }
    }

    fn stop(self) -> (Queue, Vec<u8>) {
        self.stop.0.lock().unwrap().0 = true;
        self.thread.join().expect("the writer")
    }
}

/// Some requests at once, none over another.
fn round(queue: &mut Queue, model: &mut [u8], random: &mut Random) {
    let part = DISK / 512 / SLOTS;
    for slot in 0..SLOTS {
        let sector = slot * part + random.below(part - 128);
        let sectors = 1 + random.below(127);
        let (at, bytes) = ((sector * 512) as usize, (sectors * 512) as usize);
        let address = queue.data_at(slot as u16);
        if random.below(8) == 0 {
            let mut range = sector.to_le_bytes().to_vec();
            range.extend((sectors as u32).to_le_bytes());
            range.extend((random.below(2) as u32).to_le_bytes());
            queue.put(address, &range);
            queue.prepare(slot as u16, T_WRITE_ZEROES, 0, Some(readable(address, 16)));
            model[at..at + bytes].fill(0);
        } else {
            let data = pattern(random.below(1 << 40), bytes);
            queue.put(address, &data);
            queue.prepare(slot as u16, T_OUT, sector, Some(readable(address, bytes as u32)));
            model[at..at + bytes].copy_from_slice(&data);
        }
    }
    queue.publish();
    queue.kick();
    for _ in 0..SLOTS {
        queue.wait_used();
    }
    for slot in 0..SLOTS {
        assert_eq!(queue.status(slot as u16), S_OK, "slot {slot}");
    }
}

pub fn mirror(filter: NodeId, target: NodeId, from: CopyFrom, write_blocking: bool) -> JobWork {
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

pub fn backup(filter: NodeId, from: CopyFrom, compress: bool) -> JobWork {
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
