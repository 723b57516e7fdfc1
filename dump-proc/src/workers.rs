//! Threads that take part in writing a dump. They are started before the process is sealed and wait until there is work.

use crate::kdump::Job;
use crate::memory::GuestMemory;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// Most threads: memory bandwidth ends before.
const MAX_WORKERS: usize = 16;
/// Codecs' states are on the heap.
pub const STACK_BYTES: usize = 128 << 10;

type Order = (Arc<Job>, Arc<GuestMemory>);

/// The threads beside the main one.
pub struct Workers {
    orders: Vec<Sender<Order>>,
    /// One word for each that has stopped working.
    done: Receiver<()>,
}

impl Workers {
    /// As many as this process may use processors, less one for the main thread.
    ///
    /// # Errors
    /// The system's.
    pub fn start() -> std::io::Result<Self> {
        let count = allowed_processors().min(MAX_WORKERS) - 1;
        let (report, done) = channel();
        let mut orders = Vec::with_capacity(count);
        for number in 1..=count {
            let (order, ordered) = channel::<Order>();
            let report = report.clone();
            std::thread::Builder::new()
                .name(format!("dump-{number}"))
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    let _ = report.send(());
                    while let Ok((job, memory)) = ordered.recv() {
                        job.work(&memory, |_| {});
                        drop((job, memory));
                        let _ = report.send(());
                    }
                })?;
            orders.push(order);
        }
        // What a thread asks of the system when it starts is not allowed any more once the process is sealed.
        for _ in 0..count {
            let _ = done.recv();
        }
        Ok(Self { orders, done })
    }

    /// Has all threads work, this one included, until all have stopped. `each` is told bytes of memory done by all.
    pub fn run(&self, job: Job, memory: &Arc<GuestMemory>, each: impl FnMut(u64)) -> Job {
        let job = Arc::new(job);
        let sent = self
            .orders
            .iter()
            .filter(|order| order.send((job.clone(), memory.clone())).is_ok());
        let sent = sent.count();
        job.work(memory, each);
        for _ in 0..sent {
            let _ = self.done.recv();
        }
        // The others have given theirs back before they said so.
        Arc::into_inner(job).unwrap_or_else(|| ipc::helper::die("a worker still has the dump"))
    }
}

fn allowed_processors() -> usize {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else {
        return 1;
    };
    let count = (0..CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .count();
    count.max(1)
}
