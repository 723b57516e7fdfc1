//! A peer made of bytes, and both ends that talk to it without an engine. For tests and fuzz targets.
#![allow(dead_code, reason = "a fuzz target uses one of the two ends")]

use block_proc::buffer::{Buffer, Segments};
use block_proc::executor::Executor;
use block_proc::executor::gate::Gate;
use block_proc::executor::spawner::Spawner;
use block_proc::executor::timer::Timers;
use block_proc::nbd::client::{NbdNode, Options, Surroundings};
use block_proc::nbd::context::Context;
use block_proc::nbd::server::Export;
use block_proc::nbd::server::hub::{Hub, Published};
use block_proc::nbd::server::negotiation::negotiate;
use block_proc::nbd::server::serve::serve;
use block_proc::nbd::transport::{Moved, Reader, Transport, Writer};
use block_proc::node::Node;
use block_proc::node::edge::Edge;
use block_proc::node::null::NullNode;
use ipc::graph::NodeId;
use ipc::nbd::{ExportNumber, ExportSpec};
use ipc::virtio::IoThreadIndex;
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

/// Bytes of the export.
const DISK: u64 = 1 << 20;
/// Most turns: whoever needs more hangs.
const TURNS: usize = 100_000;

/// Says these bytes, a few at a time, hangs up, and swallows what it is told.
pub struct Bytes {
    left: RefCell<Vec<u8>>,
    at: Cell<usize>,
    step: usize,
    closed: Cell<bool>,
    /// How much it was told.
    pub told: Cell<usize>,
}

impl Bytes {
    /// A peer that gives at most `step` bytes at a time.
    pub fn new(bytes: &[u8], step: usize) -> Rc<Self> {
        Rc::new(Self {
            left: RefCell::new(bytes.to_vec()),
            at: Cell::new(0),
            step: step.max(1),
            closed: Cell::new(false),
            told: Cell::new(0),
        })
    }
}

impl Transport for Bytes {
    fn read(&self, into: Segments) -> Moved<'_> {
        Box::pin(async move {
            if self.closed.get() {
                return Err(Errno::ECANCELED);
            }
            let left = self.left.borrow();
            let rest = &left[self.at.get()..];
            let mut part = into;
            let count = rest.len().min(self.step).min(part.bytes() as usize);
            part.split_to(count as u64).fill_from(&rest[..count]);
            self.at.set(self.at.get() + count);
            Ok(count)
        })
    }

    fn write(&self, from: Segments) -> Moved<'_> {
        Box::pin(async move {
            if self.closed.get() {
                return Err(Errno::EPIPE);
            }
            self.told.set(self.told.get() + from.bytes() as usize);
            Ok(from.bytes() as usize)
        })
    }

    fn close(&self) {
        self.closed.set(true);
    }

    fn is_closed(&self) -> bool {
        self.closed.get()
    }
}

/// Runs a task, and those that it leaves behind, until nothing is left to do.
fn run(spawner: &Spawner, task: impl Future<Output = ()> + 'static) {
    let over = Rc::new(Cell::new(false));
    let ended = over.clone();
    let mut executor = Executor::default();
    executor.spawn(async move {
        task.await;
        ended.set(true);
    });
    for _ in 0..TURNS {
        executor.run(&mut Vec::new());
        let more = spawner.take();
        if more.is_empty() {
            assert!(over.get(), "it waits for a peer that has hung up");
            return;
        }
        more.into_iter().for_each(|task| executor.spawn(task));
    }
    panic!("it does not come to an end");
}

fn null(timers: &Rc<Timers>) -> Rc<dyn Node> {
    Rc::new(NullNode::new(DISK, Duration::ZERO, true, timers.clone()))
}

/// A client of these bytes at a server with the export "x".
pub fn attack_server(bytes: &[u8], step: usize) {
    let (spawner, timers) = (Rc::new(Spawner::default()), Rc::new(Timers::default()));
    let spec = ExportSpec {
        export: ExportNumber(0),
        node: NodeId(0),
        name: "x".into(),
        description: Some("d".into()),
        writable: true,
        writethrough: false,
        bitmaps: Vec::new(),
        allocation_depth: true,
    };
    let export = Export::new(
        spec,
        Edge::new(null(&timers)),
        vec![Context::Allocation, Context::Depth],
    );
    let hub = Hub::default();
    let published = Published {
        export: ExportNumber(0),
        thread: IoThreadIndex::MAIN,
        description: Some("d".into()),
        flags: export.flags(),
        bytes: DISK,
        min_block: 1,
        contexts: export.contexts.iter().map(Context::name).collect(),
    };
    hub.publish("x", published).expect("a name");
    let transport: Rc<dyn Transport> = Bytes::new(bytes, step);
    let tasks = spawner.clone();
    run(&spawner, async move {
        let mut reader = Reader::new(transport.clone());
        let writer = Writer::new(transport.clone());
        if let Ok(session) = negotiate(&mut reader, &writer, &hub).await {
            serve(
                export,
                session,
                transport,
                reader,
                writer,
                Rc::new(Gate::default()),
                tasks,
            )
            .await;
        }
    });
}

/// A server of these bytes, asked for everything.
pub fn attack_client(bytes: &[u8], step: usize) {
    let (spawner, timers) = (Rc::new(Spawner::default()), Rc::new(Timers::default()));
    let around = Surroundings {
        timers,
        spawner: spawner.clone(),
        bounce: Rc::default(),
        on_loss: Rc::new(|| ()),
    };
    let options = Options {
        export: "x".into(),
        reconnect_delay: Duration::ZERO,
        read_only: false,
        auto_read_only: true,
        discard: true,
    };
    let transport: Rc<dyn Transport> = Bytes::new(bytes, step);
    run(&spawner, async move {
        let Ok(node) = NbdNode::open(around, options, transport).await else {
            return;
        };
        let bytes = node.bytes().min(100_000);
        let buffer = Buffer::new(bytes as usize);
        let all = || Segments::of_buffer(&buffer, bytes as usize);
        if bytes > 0 {
            if let Ok(extent) = node.status(0, bytes).await {
                assert!((1..=bytes).contains(&extent.bytes));
            }
            let _ = node.read(0, all()).await;
            let _ = node.write(0, all(), true).await;
            let _ = node.write_zeroes(bytes / 2, bytes - bytes / 2, true).await;
            let _ = node.discard(0, bytes).await;
            let _ = node.read(bytes / 3, Segments::of_buffer(&buffer, 1)).await;
        }
        let _ = node.flush().await;
    });
}
