//! From what the supervisor asks for to a job at work.

use super::copier::{CHUNK_BYTES, Copier, Layers, Nothing, Options};
use super::{CHUNK_OF_COMMIT, COPIES, Filters, Job, Kind, Phase, everything, nothing};
use crate::bitmaps::SharedBitmap;
use crate::graph::driver::Driver;
use crate::graph::{Graph, User, wrong_driver};
use crate::node::Node;
use crate::node::copy_before_write::CopyBeforeWriteNode;
use crate::node::copy_on_read::CopyOnReadNode;
use crate::node::mirror_top::MirrorTopNode;
use ipc::Failure;
use ipc::block_job::{BitmapAction, BitmapNumber, CopyFrom, JobNumber, JobSpec, JobWork, Switch};
use ipc::graph::{ChildRole, NodeId};
use std::rc::Rc;
use std::time::Instant;

/// Bytes for each bit of a commit or a stream.
const GRANULARITY: u64 = 64 << 10;
/// Bits of one job need at most this much memory, bytes: the granularity grows with the disk.
const MAX_BITS_BYTES: u64 = 16 << 20;
/// Most copies of a backup under way, whatever is asked for.
const MOST_COPIES: u32 = 64;

/// Checks that a job can begin, with what a switch does before that.
///
/// # Errors
/// What is not there, is something else, or is in use.
pub fn check(graph: &Graph, spec: &JobSpec, switch: &Switch) -> Result<(), Failure> {
    let layers = |nodes: &[NodeId]| nodes.iter().try_for_each(|node| graph.member(*node).map(drop));
    let from = |from: &CopyFrom| match from {
        CopyFrom::Layers { nodes, .. } => layers(nodes),
        CopyFrom::Nothing => Ok(()),
        CopyFrom::Bitmap(number) => check_bitmap(graph, spec, *number, switch),
    };
    match &spec.work {
        JobWork::Commit {
            top,
            layers: over,
            base,
        } => {
            layers(over)?;
            target(graph, *base, graph.target(*top)?.node().bytes())
        }
        JobWork::Stream { filter, layers: below } => {
            pulling_filter(graph, *filter)?;
            layers(below)
        }
        JobWork::Mirror {
            filter,
            target: to,
            from: what,
            granularity,
            ..
        } => {
            let filter = mirror_filter(graph, *filter)?;
            if filter.has_mirror() {
                return Err(Failure::new("the mirror's filter has a mirror already"));
            }
            if !granularity.is_power_of_two() || !(512..=64 << 20).contains(granularity) {
                return Err(Failure::new(format!("a mirror's granularity of {granularity} bytes")));
            }
            if matches!(what, CopyFrom::Bitmap(_)) {
                return Err(Failure::new("a mirror does not begin with a bitmap"));
            }
            from(what)?;
            target(graph, *to, filter.bytes())
        }
        JobWork::Backup {
            filter,
            from: what,
            bitmap,
            compress,
            ..
        } => {
            let to = graph.member(*filter)?.child(ChildRole::Target)?.node;
            let filter = backup_filter(graph, *filter)?;
            if filter.is_on() {
                return Err(Failure::new("the backup's filter is at work already"));
            }
            from(what)?;
            if let Some(number) = bitmap {
                check_bitmap(graph, spec, *number, switch)?;
            }
            if *compress {
                compressed_cluster_bytes(graph, to)?;
            }
            target(graph, to, filter.copier().bytes())
        }
    }
}

fn check_bitmap(graph: &Graph, spec: &JobSpec, number: BitmapNumber, switch: &Switch) -> Result<(), Failure> {
    let uses = |other: &&JobSpec| match &other.work {
        JobWork::Backup { from, bitmap, .. } => *from == CopyFrom::Bitmap(number) || *bitmap == Some(number),
        _ => false,
    };
    if switch
        .start
        .iter()
        .find(uses)
        .is_some_and(|first| first.job != spec.job)
    {
        return Err(Failure::new("two jobs begin with one bitmap"));
    }
    let of_it = |action: &&BitmapAction| match action {
        BitmapAction::Add { bitmap, .. } | BitmapAction::Remove(bitmap) => *bitmap == number,
        _ => false,
    };
    match switch.bitmaps.iter().rfind(of_it) {
        Some(BitmapAction::Add { lost: false, .. }) => Ok(()),
        Some(_) => Err(Failure::new(format!("bitmap {} cannot be used", number.0))),
        None => bitmap(graph, number)?.borrow().check_free(),
    }
}

/// What a target writes compressed at a time: an image, or what only stands before one.
fn compressed_cluster_bytes(graph: &Graph, target: NodeId) -> Result<u64, Failure> {
    let mut at = target;
    while let Err(failure) = graph.qcow2(at) {
        at = graph.member(at)?.child(ChildRole::File).map_err(|_| failure)?.node;
    }
    Ok(1 << graph.qcow2(at)?.header().cluster_bits)
}

fn target(graph: &Graph, node: NodeId, bytes: u64) -> Result<(), Failure> {
    writable(graph, node)?;
    let there = graph.target(node)?.node().bytes();
    if there < bytes {
        return Err(Failure::new(format!(
            "{bytes} bytes are copied to node {} of {there} bytes",
            node.0
        )));
    }
    Ok(())
}

fn writable(graph: &Graph, node: NodeId) -> Result<(), Failure> {
    if graph.member(node)?.read_only {
        return Err(Failure::new(format!("node {} is read-only", node.0)));
    }
    Ok(())
}

fn mirror_filter(graph: &Graph, node: NodeId) -> Result<Rc<MirrorTopNode>, Failure> {
    match &graph.member(node)?.driver {
        Driver::MirrorTop(filter) => Ok(filter.clone()),
        _ => Err(wrong_driver(node, "a mirror's filter")),
    }
}

fn backup_filter(graph: &Graph, node: NodeId) -> Result<Rc<CopyBeforeWriteNode>, Failure> {
    match &graph.member(node)?.driver {
        Driver::CopyBeforeWrite(filter) => Ok(filter.clone()),
        _ => Err(wrong_driver(node, "a backup's filter")),
    }
}

fn pulling_filter(graph: &Graph, node: NodeId) -> Result<Rc<CopyOnReadNode>, Failure> {
    match &graph.member(node)?.driver {
        Driver::CopyOnRead(filter) => Ok(filter.clone()),
        _ => Err(wrong_driver(node, "a stream's filter")),
    }
}

fn bitmap(graph: &Graph, number: BitmapNumber) -> Result<SharedBitmap, Failure> {
    let bitmap = graph.bitmap(number);
    bitmap.ok_or_else(|| Failure::new(format!("there is no bitmap {}", number.0)))
}

/// What takes the nodes for a job, one after the other.
struct Taking<'a> {
    graph: &'a mut Graph,
    job: JobNumber,
    users: Vec<User>,
}

impl Taking<'_> {
    fn node(&mut self, node: NodeId, writes: bool) -> Result<Rc<dyn Node>, Failure> {
        let user = User::Job(self.job, self.users.len());
        let edge = self.graph.attach(user, node, writes)?;
        self.users.push(user);
        Ok(edge)
    }

    fn layers(&mut self, nodes: &[NodeId], is_all: bool) -> Result<Layers, Failure> {
        let nodes: Result<_, _> = nodes.iter().map(|node| self.node(*node, false)).collect();
        Ok(Layers { nodes: nodes?, is_all })
    }
}

/// Begins a job that was checked. Nothing may be under way.
///
/// # Errors
/// None, after [`check`].
pub fn begin(graph: &mut Graph, spec: &JobSpec, now: Instant) -> Result<Job, Failure> {
    let mut taking = Taking {
        graph,
        job: spec.job,
        users: Vec::new(),
    };
    let made = make(&mut taking, spec, now);
    let users = taking.users;
    match made {
        Ok(job) => Ok(Job { users, ..job }),
        Err(failure) => {
            users.into_iter().for_each(|user| graph.detach(user));
            Err(failure)
        }
    }
}

/// Granularity for a disk, so that its bits need no more memory than they may.
fn granularity(bytes: u64, wanted: u64) -> u64 {
    wanted.max(bytes.div_ceil(MAX_BITS_BYTES * 8).next_power_of_two())
}

fn make(taking: &mut Taking<'_>, spec: &JobSpec, now: Instant) -> Result<Job, Failure> {
    let job = |kind, copier: Rc<Copier>, filters, phase| Job {
        number: spec.job,
        kind,
        copier,
        filters,
        bitmap: None,
        users: Vec::new(),
        phase,
        cursor: 0,
        under_way: Vec::new(),
        paused: spec.paused,
        ready: false,
        speed: spec.speed,
        next_at: now,
        left_out: None,
        on_source_error: spec.on_source_error,
        on_target_error: spec.on_target_error,
        copied: 0,
        most_copies: COPIES,
        chunk: CHUNK_OF_COMMIT,
        waiting: Vec::new(),
        events: Vec::new(),
        end: None,
    };
    let no_filters = || Filters {
        mirror: None,
        backup: None,
    };
    match &spec.work {
        JobWork::Commit { top, layers, base } => {
            let (source, target) = (taking.node(*top, false)?, taking.node(*base, true)?);
            let bytes = source.bytes();
            let copier = Copier::new(source, target, everything(bytes, granularity(bytes, GRANULARITY)));
            copier.set_layers(taking.layers(layers, false)?);
            copier.options.borrow_mut().nothing = Nothing::LeftOut;
            Ok(job(Kind::Once, copier, no_filters(), Phase::Scan(0)))
        }
        JobWork::Stream { filter, layers } => {
            let node = pulling_filter(taking.graph, *filter)?;
            taking.node(*filter, false)?;
            let bytes = node.bytes();
            let copier = Copier::pulling(node, everything(bytes, granularity(bytes, GRANULARITY)));
            copier.set_layers(taking.layers(layers, false)?);
            copier.options.borrow_mut().nothing = Nothing::LeftOut;
            Ok(job(Kind::Once, copier, no_filters(), Phase::Scan(0)))
        }
        JobWork::Mirror {
            filter,
            target,
            from,
            target_reads_zeroes,
            granularity: wanted,
            buffer_bytes,
            unmap,
            write_blocking,
        } => {
            let filter_node = mirror_filter(taking.graph, *filter)?;
            taking.node(*filter, false)?;
            let target = taking.node(*target, true)?;
            let bytes = filter_node.bytes();
            let left = nothing(bytes, granularity(bytes, u64::from(*wanted)));
            let copier = Copier::new(filter_node.child().clone(), target, left);
            copier.options.replace(Options {
                target_reads_zeroes: *target_reads_zeroes,
                unmap: *unmap,
                ..Options::default()
            });
            let phase = match from {
                CopyFrom::Layers { nodes, is_all } => {
                    copier.set_layers(taking.layers(nodes, *is_all)?);
                    Phase::Scan(0)
                }
                // What the guest writes is read through the source.
                CopyFrom::Nothing | CopyFrom::Bitmap(_) => Phase::Copy,
            };
            filter_node.set_write_blocking(*write_blocking);
            filter_node.set_only_whole(!matches!(from, CopyFrom::Layers { is_all: true, .. }));
            filter_node.set_mirror(Some(copier.clone()));
            let filters = Filters {
                mirror: Some(filter_node),
                ..no_filters()
            };
            let chunk = CHUNK_BYTES.min(*buffer_bytes).max(copier.left.borrow().granularity());
            let most = usize::try_from(buffer_bytes / chunk).unwrap_or(COPIES).clamp(1, COPIES);
            Ok(Job {
                chunk,
                most_copies: most,
                ..job(Kind::Mirror, copier, filters, phase)
            })
        }
        JobWork::Backup {
            filter,
            from,
            bitmap: beside,
            bitmap_mode,
            target_reads_zeroes,
            compress,
            max_workers,
            max_chunk,
        } => {
            let filter_node = backup_filter(taking.graph, *filter)?;
            taking.node(*filter, false)?;
            let compress = match compress {
                true => {
                    let to = taking.graph.member(*filter)?.child(ChildRole::Target)?.node;
                    Some(compressed_cluster_bytes(taking.graph, to)?)
                }
                false => None,
            };
            let copier = filter_node.copier().clone();
            let granularity = copier.left.borrow().granularity();
            copier.options.replace(Options {
                target_reads_zeroes: *target_reads_zeroes,
                unmap: true,
                compress,
                ..Options::default()
            });
            let bytes = copier.bytes();
            copier.left.borrow_mut().set(0..bytes);
            let (kind, phase) = match from {
                CopyFrom::Layers { nodes, is_all } => {
                    copier.set_layers(taking.layers(nodes, *is_all)?);
                    // With all of the chain there is no such thing.
                    copier.options.borrow_mut().nothing = Nothing::LeftOutWhole;
                    (Kind::Once, Phase::Scan(0))
                }
                CopyFrom::Nothing => (Kind::FilterOnly, Phase::Copy),
                // Zeroes are written like other data: a target that is opened without its backing image would leave them
                // out, and show what is below when it has that again.
                CopyFrom::Bitmap(_) => (Kind::Once, Phase::Copy),
            };
            let number = match from {
                CopyFrom::Bitmap(number) => Some(*number),
                CopyFrom::Layers { .. } | CopyFrom::Nothing => *beside,
            };
            let mut used = None;
            if let Some(number) = number {
                let bitmap = bitmap(taking.graph, number)?;
                bitmap.borrow_mut().begin_use()?;
                if matches!(from, CopyFrom::Bitmap(_)) {
                    filter_node.cover(bitmap.borrow().bits());
                }
                used = Some((bitmap, *bitmap_mode));
            }
            filter_node.turn(true);
            let filters = Filters {
                backup: Some(filter_node),
                ..no_filters()
            };
            let chunk = match max_chunk {
                0 => CHUNK_BYTES,
                bytes => CHUNK_BYTES.min(*bytes),
            };
            let made = job(kind, copier, filters, phase);
            Ok(Job {
                bitmap: used,
                chunk: chunk.max(granularity),
                most_copies: (*max_workers).clamp(1, MOST_COPIES) as usize,
                ..made
            })
        }
    }
}
