//! From a description to a job: everything that can be refused is refused here, before anything changes.

use super::copier::{BUFFERS, CHUNK_BYTES, Copier, Options, Order, Target};
use super::layers::{Layers, whole_chain};
use super::pace::Pace;
use super::{End, Job, Kind, Lap};
use crate::bitmap::Bitmap;
use crate::bitmaps::{SharedBitmap, check_size};
use crate::graph::{Graph, User};
use crate::node::Node;
use crate::node::edge::Edge;
use ipc::Failure;
use ipc::block_job::{BitmapNumber, CopyFrom, JobNumber, JobSpec, JobWork};
use ipc::graph::NodeId;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Instant;

/// Bytes for each bit of a job that has no granularity of its own, on small disks and on large ones.
const FINE_BYTES: u64 = 4 << 10;
const COARSE_BYTES: u64 = 64 << 10;
/// What a large disk is, bytes.
const LARGE_DISK_BYTES: u64 = 64 << 30;
/// Mirrors' granularity, bytes.
const GRANULARITIES: std::ops::RangeInclusive<u32> = 512..=64 << 20;

/// A job that is about to begin: the nodes are taken.
struct Taking<'a> {
    graph: &'a mut Graph,
    job: JobNumber,
    taken: usize,
}

impl Taking<'_> {
    fn take(&mut self, node: NodeId, writes: bool) -> Result<Rc<Edge>, Failure> {
        self.taken += 1;
        self.graph.attach(User::Job(self.job, self.taken), node, writes)
    }

    fn free_bitmap(&self, number: BitmapNumber) -> Result<SharedBitmap, Failure> {
        let bitmap = self.graph.bitmap(number);
        let bitmap = bitmap.ok_or_else(|| Failure::new(format!("there is no bitmap {}", number.0)))?;
        bitmap.borrow().check_free()?;
        Ok(bitmap)
    }

    fn layers(&mut self, from: &CopyFrom) -> Result<Layers, Failure> {
        match from {
            CopyFrom::Layers { nodes, is_all } => self.images(nodes, *is_all),
            CopyFrom::Nothing | CopyFrom::Bitmap(_) => Ok(Layers::default()),
        }
    }

    fn images(&mut self, nodes: &[NodeId], is_all: bool) -> Result<Layers, Failure> {
        let mut layers = Layers {
            is_all,
            ..Layers::default()
        };
        for node in nodes {
            layers.nodes.push(self.take(*node, false)?);
        }
        Ok(layers)
    }
}

/// Makes a job, and takes its nodes for it. It begins with [`Job::hook`].
///
/// # Errors
/// What is impossible about it: then the nodes are free again.
pub fn prepare(graph: &mut Graph, spec: &JobSpec, now: Instant) -> Result<Job, Failure> {
    let job = spec.job;
    let mut taking = Taking { graph, job, taken: 0 };
    let made = make(&mut taking, spec, now);
    if made.is_err() {
        graph.detach_job(job);
    }
    made
}

fn make(taking: &mut Taking<'_>, spec: &JobSpec, now: Instant) -> Result<Job, Failure> {
    let mut limits = (BUFFERS, CHUNK_BYTES);
    let options = |order, target_reads_zeroes, unmap| Options {
        order,
        leaves_out: true,
        target_reads_zeroes,
        unmap,
        compress: None,
    };
    let (kind, copier) = match &spec.work {
        JobWork::Commit { top, layers, base } => {
            let source = taking.take(*top, false)?;
            let layers = taking.images(layers, false)?;
            let base = taking.take(*base, true)?;
            if base.bytes() < source.bytes() {
                return Err(Failure::new("the base is smaller than what is to be committed"));
            }
            let left = all_of(source.bytes(), granularity(source.bytes()))?;
            let options = options(Order::Following, false, true);
            (
                Kind::Commit,
                Copier::new(source, Target::Node(base), layers, options, left),
            )
        }
        JobWork::Stream { filter, layers } => {
            let found = taking.graph.copy_on_read(*filter)?;
            taking.take(*filter, true)?;
            let mut layers = taking.images(layers, false)?;
            layers.own = Some(found.child().clone());
            let bytes = found.bytes();
            let left = all_of(bytes, granularity(bytes))?;
            let options = options(Order::Following, false, true);
            let source: Rc<dyn Node> = found.clone();
            (
                Kind::Stream,
                Copier::new(source, Target::Pull(found), layers, options, left),
            )
        }
        JobWork::Mirror {
            filter,
            target,
            from,
            target_reads_zeroes,
            granularity,
            buffer_bytes,
            unmap,
            write_blocking,
        } => {
            let found = taking.graph.mirror_top(*filter)?;
            if found.has_mirror() {
                return Err(Failure::new(format!("node {} has a mirror already", filter.0)));
            }
            if !granularity.is_power_of_two() || !GRANULARITIES.contains(granularity) {
                return Err(Failure::new(format!("a mirror's granularity of {granularity} bytes")));
            }
            taking.take(*filter, false)?;
            let layers = taking.layers(from)?;
            let target = taking.take(*target, true)?;
            if target.bytes() < found.bytes() {
                return Err(Failure::new("the target is smaller than the source"));
            }
            let granularity = u64::from(*granularity);
            let mut left = clean(found.bytes(), granularity)?;
            match from {
                CopyFrom::Layers { .. } => left.set(0..found.bytes()),
                CopyFrom::Nothing => {}
                CopyFrom::Bitmap(_) => return Err(Failure::new("a mirror begins without a bitmap")),
            }
            let options = Options {
                leaves_out: false,
                ..options(Order::Following, *target_reads_zeroes, *unmap)
            };
            limits = in_buffer(*buffer_bytes, granularity);
            found.set_write_blocking(*write_blocking);
            let source = found.child().clone();
            let copier = Copier::new(source, Target::Node(target), layers, options, left);
            (Kind::Mirror(found), copier)
        }
        JobWork::Backup {
            filter,
            from,
            bitmap,
            bitmap_mode,
            target_reads_zeroes,
            compress,
            max_workers,
            max_chunk,
        } => {
            let (found, cluster, target) = taking.graph.copy_before_write(*filter)?;
            if found.has_begun() {
                return Err(Failure::new(format!("node {} has begun already", filter.0)));
            }
            taking.take(*filter, false)?;
            let bytes = found.bytes();
            if found.target().bytes() < bytes {
                return Err(Failure::new("the target is smaller than the source"));
            }
            taking.take(target, true)?;
            let mut layers = taking.layers(from)?;
            let mut left = clean(bytes, cluster)?;
            let used = match from {
                CopyFrom::Bitmap(number) => Some(*number),
                CopyFrom::Nothing | CopyFrom::Layers { .. } => *bitmap,
            };
            let used = used.map(|number| taking.free_bitmap(number)).transpose()?;
            match from {
                CopyFrom::Bitmap(_) => layers = whole_chain(found.child().clone()),
                CopyFrom::Nothing => {
                    layers = whole_chain(found.child().clone());
                    left.set(0..bytes);
                }
                CopyFrom::Layers { .. } => left.set(0..bytes),
            }
            let mut options = options(Order::Keeping, *target_reads_zeroes, false);
            if *compress {
                let bits = taking.graph.qcow2(target)?.header().cluster_bits;
                options.compress = Some(1 << bits);
            }
            if *max_chunk != 0 {
                limits.1 = limits.1.min(*max_chunk - *max_chunk % cluster).max(cluster);
            }
            limits.0 = limits.0.min(*max_workers as usize).max(1);
            let target = Target::Node(found.target().clone());
            let copier = Copier::new(found.child().clone(), target, layers, options, left);
            let kind = Kind::Backup {
                filter: found,
                only_before_writes: *from == CopyFrom::Nothing,
                only_dirty: matches!(from, CopyFrom::Bitmap(_)),
                bitmap: used.map(|bitmap| (bitmap, *bitmap_mode)),
            };
            (kind, copier)
        }
    };
    let granularity = copier.left.borrow().granularity();
    let (workers, largest) = limits;
    Ok(Job {
        number: spec.job,
        at_first: match &kind {
            // Its bits are taken when it begins.
            Kind::Backup {
                bitmap: Some((bitmap, _)),
                only_dirty: true,
                ..
            } => bitmap.borrow().bits().dirty_bytes(),
            _ => copier.bytes(),
        },
        lap: match &kind {
            Kind::Backup {
                only_before_writes: true,
                ..
            } => Lap::Over,
            _ => Lap::At(0),
        },
        kind,
        copier: Rc::new(copier),
        pace: Pace::new(spec.speed, now),
        on_source_error: spec.on_source_error,
        on_target_error: spec.on_target_error,
        workers,
        largest: largest.max(granularity),
        granularity,
        paused: spec.paused,
        stopped: false,
        ready: false,
        flushed: false,
        is_first_lap: true,
        pieces: VecDeque::new(),
        planning: false,
        in_flight: 0,
        not_before: None,
        left_out: None,
        end: End::Not,
    })
}

fn granularity(bytes: u64) -> u64 {
    if bytes <= LARGE_DISK_BYTES {
        FINE_BYTES
    } else {
        COARSE_BYTES
    }
}

fn clean(bytes: u64, granularity: u64) -> Result<Bitmap, Failure> {
    check_size(bytes, granularity)?;
    Ok(Bitmap::new(bytes, granularity))
}

fn all_of(bytes: u64, granularity: u64) -> Result<Bitmap, Failure> {
    let mut left = clean(bytes, granularity)?;
    left.set(0..bytes);
    Ok(left)
}

/// How many copies, of what size, are in flight at most.
fn in_buffer(bytes: u64, granularity: u64) -> (usize, u64) {
    if bytes == 0 {
        return (BUFFERS, CHUNK_BYTES);
    }
    let bytes = bytes.max(granularity);
    let chunk = CHUNK_BYTES.min(bytes).max(granularity);
    let workers = (bytes / chunk).clamp(1, BUFFERS as u64);
    (workers as usize, chunk)
}
