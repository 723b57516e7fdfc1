//! For the tests of the qcow2 driver: a child node in memory that yields at random and can record, images by qemu-img,
//! random numbers that a seed repeats.
#![allow(dead_code, reason = "every test file uses another part")]

use block_proc::buffer::{Buffer, Segments};
use block_proc::executor::Executor;
use block_proc::node::qcow2::{Children, OpenError, Options, Qcow2Node};
use block_proc::node::{Node, NodeFuture};
use ipc::Failure;
use ipc::graph::{CreateQcow2, Preallocation, SnapshotInfo};
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::rc::Rc;
use std::task::Poll;

/// xorshift64*: good enough to be surprising, small enough to be here.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit.max(1)
    }
}

/// What a recording child has seen, in order.
#[derive(Clone)]
pub enum Event {
    /// A write began; it has the number of its place among the writes.
    Write(u64, Vec<u8>),
    /// A flush ended that began after these writes had ended.
    Flush(BTreeSet<usize>),
    /// The test's own.
    Mark(u64),
}

/// A child node in memory.
pub struct Memory {
    pub bytes: RefCell<Vec<u8>>,
    random: RefCell<Random>,
    /// Every operation waits up to so many turns.
    pub turns: Cell<u64>,
    pub log: RefCell<Option<Vec<Event>>>,
    writes: Cell<usize>,
    ended: RefCell<BTreeSet<usize>>,
    /// So many more writes work.
    pub writes_left: Cell<Option<u64>>,
    /// Reading fails from now on.
    pub fail_reads: Cell<bool>,
    pub largest: Cell<u64>,
    /// Largest cache of whoever opens it, bytes.
    pub cache_bytes: Cell<u64>,
}

impl Memory {
    pub fn new(bytes: Vec<u8>, seed: u64) -> Rc<Self> {
        Rc::new(Self {
            bytes: RefCell::new(bytes),
            random: RefCell::new(Random::new(seed)),
            turns: Cell::new(3),
            log: RefCell::default(),
            writes: Cell::new(0),
            ended: RefCell::default(),
            writes_left: Cell::new(None),
            fail_reads: Cell::new(false),
            largest: Cell::new(1 << 32),
            cache_bytes: Cell::new(4 << 20),
        })
    }

    pub fn mark(&self, mark: u64) {
        if let Some(log) = &mut *self.log.borrow_mut() {
            log.push(Event::Mark(mark));
        }
    }

    async fn wait(&self) {
        let count = self.random.borrow_mut().below(self.turns.get() + 1);
        turns(count).await;
    }

    async fn put(&self, offset: u64, data: Vec<u8>) -> Result<(), Errno> {
        if let Some(left) = self.writes_left.get() {
            self.writes_left.set(Some(left.checked_sub(1).ok_or(Errno::EIO)?));
        }
        if offset + data.len() as u64 > self.largest.get() {
            return Err(Errno::EFBIG);
        }
        let number = self.writes.get();
        self.writes.set(number + 1);
        if let Some(log) = &mut *self.log.borrow_mut() {
            log.push(Event::Write(offset, data.clone()));
        }
        self.wait().await;
        {
            let mut bytes = self.bytes.borrow_mut();
            let end = offset as usize + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[offset as usize..end].copy_from_slice(&data);
        }
        self.ended.borrow_mut().insert(number);
        self.wait().await;
        Ok(())
    }
}

impl Node for Memory {
    fn read(&self, offset: u64, into: Segments) -> NodeFuture<'_> {
        Box::pin(async move {
            self.wait().await;
            if self.fail_reads.get() {
                return Err(Errno::EIO);
            }
            {
                let bytes = self.bytes.borrow();
                let start = (offset as usize).min(bytes.len());
                let done = into.fill_from(&bytes[start..(start + into.bytes() as usize).min(bytes.len())]);
                let mut rest = into;
                rest.advance(done as u64);
                rest.fill_zeroes();
            }
            self.wait().await;
            Ok(())
        })
    }

    fn write(&self, offset: u64, from: Segments, _durable: bool) -> NodeFuture<'_> {
        let mut data = vec![0; from.bytes() as usize];
        from.read_into(&mut data);
        Box::pin(self.put(offset, data))
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, _may_unmap: bool) -> NodeFuture<'_> {
        Box::pin(self.put(offset, vec![0; bytes as usize]))
    }

    fn discard(&self, offset: u64, bytes: u64) -> NodeFuture<'_> {
        Box::pin(self.put(offset, vec![0; bytes as usize]))
    }

    fn flush(&self) -> NodeFuture<'_> {
        Box::pin(async move {
            let ended = self.ended.borrow().clone();
            self.wait().await;
            if let Some(log) = &mut *self.log.borrow_mut() {
                log.push(Event::Flush(ended));
            }
            Ok(())
        })
    }

    fn bytes(&self) -> u64 {
        self.bytes.borrow().len() as u64
    }

    fn resize(&self, bytes: u64, _preallocation: Preallocation) -> NodeFuture<'_, (), Failure> {
        Box::pin(async move {
            self.wait().await;
            self.bytes.borrow_mut().resize(bytes as usize, 0);
            Ok(())
        })
    }
}

/// A snapshot to be made.
pub fn snapshot_info(id: &str) -> SnapshotInfo {
    SnapshotInfo {
        id: id.into(),
        name: format!("name-{id}"),
        vm_state_bytes: 0,
        date_seconds: 1_700_000_000,
        date_nanoseconds: 5,
        vm_clock_ns: 12_345_678_901,
        icount: None,
        disk_bytes: 0,
    }
}

/// A new image by our own means, on a node that had other bytes before.
pub fn make(spec: &CreateQcow2, data_file: Option<Rc<Memory>>) -> Result<Rc<Memory>, Failure> {
    let child = Memory::new(vec![0xa5; 3000], 1);
    let (node, spec) = (child.clone() as Rc<dyn Node>, spec.clone());
    block_on(async move {
        let data_file = data_file.map(|node| node as Rc<dyn Node>);
        block_proc::node::qcow2::create::create(&node, &spec, data_file.as_ref()).await
    })?;
    Ok(child)
}

/// Lets others go first, so many times.
pub async fn turns(mut count: u64) {
    poll_fn(|context| {
        if count == 0 {
            return Poll::Ready(());
        }
        count -= 1;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Runs one future to its end.
pub fn block_on<T: 'static>(future: impl Future<Output = T> + 'static) -> T {
    let mut executor = Executor::default();
    executor.spawn(future);
    let mut finished = Vec::new();
    executor.run(&mut finished);
    finished.pop().expect("the future waits for something that never comes")
}

pub fn options(child: &Memory) -> Options {
    Options {
        writable: true,
        unmap: true,
        file_bytes: child.bytes.borrow().len() as u64,
        is_block_device: false,
        align: 1,
        l2_cache_bytes: child.cache_bytes.get(),
        refcount_cache_bytes: child.cache_bytes.get(),
        key: None,
        may_be_locked: false,
    }
}

pub fn open(child: &Rc<Memory>, backing: Option<Rc<dyn Node>>) -> Result<Rc<Qcow2Node>, OpenError> {
    open_with(child, options(child), backing)
}

pub fn open_with(
    child: &Rc<Memory>,
    options: Options,
    backing: Option<Rc<dyn Node>>,
) -> Result<Rc<Qcow2Node>, OpenError> {
    block_on(Qcow2Node::open(child.clone(), options, Children::over(backing)))
}

pub fn open_children(child: &Rc<Memory>, options: Options, children: Children) -> Result<Rc<Qcow2Node>, OpenError> {
    block_on(Qcow2Node::open(child.clone(), options, children))
}

pub fn segments(data: &[u8]) -> Segments {
    let buffer = Buffer::new(data.len());
    let segments = Segments::of_buffer(&buffer, data.len());
    segments.fill_from(data);
    segments
}

pub async fn read(node: &dyn Node, offset: u64, bytes: usize) -> Result<Vec<u8>, Errno> {
    let buffer = Buffer::new(bytes);
    node.read(offset, Segments::of_buffer(&buffer, bytes)).await?;
    let mut data = vec![0; bytes];
    Segments::of_buffer(&buffer, bytes).read_into(&mut data);
    Ok(data)
}

/// All that the guest would read.
pub fn content(node: &Rc<Qcow2Node>) -> Vec<u8> {
    let node = node.clone();
    block_on(async move {
        let mut all = Vec::new();
        while (all.len() as u64) < node.bytes() {
            let step = (node.bytes() - all.len() as u64).min(1 << 20) as usize;
            all.extend(read(&*node, all.len() as u64, step).await.expect("a read"));
        }
        all
    })
}

pub fn tool(name: &str, arguments: &[&str]) -> Output {
    Command::new(name)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{name}: {error}: `make packages` installs qemu-utils"))
}

/// qemu-img, which must succeed.
pub fn qemu_img(arguments: &[&str]) -> String {
    let output = tool("qemu-img", arguments);
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// qemu-io's commands on a qcow2 image.
pub fn qemu_io(image: &Path, commands: &[&str]) {
    let mut arguments = vec!["-f", "qcow2"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(image.to_str().unwrap());
    let output = tool("qemu-io", &arguments);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !said.contains("failed"), "qemu-io: {said}");
}

/// What qemu-img check says: 0 clean, 3 only leaks.
pub fn check(image: &Path) -> (i32, String) {
    let output = tool("qemu-img", &["check", "-f", "qcow2", image.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap_or(-1), text)
}

/// A new image's bytes.
pub fn create(folder: &Path, options: &str, size: u64) -> Vec<u8> {
    let path = folder.join("new.qcow2");
    let size = size.to_string();
    let mut arguments = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    arguments.extend([path.to_str().unwrap(), &size]);
    qemu_img(&arguments);
    std::fs::read(&path).unwrap()
}

/// Writes a child's bytes to a file.
pub fn save(child: &Memory, path: PathBuf) -> PathBuf {
    std::fs::write(&path, &*child.bytes.borrow()).unwrap();
    path
}
