//! drive-backup and blockdev-backup: the target becomes what the disk was at the moment when the job began.

use super::End;
use super::begin::{BeginError, Beginning, Common, Filter, Use, begin, bring_along, bytes_of};
use super::sync;
use super::target::{self, NewTarget, Under};
use crate::graph::bitmaps::{BitmapError, Use as BitmapUse};
use crate::graph::options::DriverOptions;
use crate::jobs::{Endings, Transaction};
use crate::vm::{Vm, graph};
use ipc::block_job::{BitmapMode, BitmapNumber, CopyFrom, JobWork};
use ipc::graph::NodeId;
use ipc::job::{BackupPerf, BitmapSyncMode, BlockdevBackup, DriveBackup, JobType, SyncMode};
use std::rc::Rc;

/// Bytes that are copied together, at least.
const CLUSTER_BYTES: u32 = 64 << 10;
/// Requests in flight, where the client does not say.
const WORKERS: u32 = 64;

/// blockdev-backup. In a transaction the job waits for [`super::begin::launch`]. The graph's turn is the caller's. Returns the
/// job's id.
///
/// # Errors
/// [`BeginError`].
pub async fn to_node(
    vm: &Rc<Vm>,
    asked: BlockdevBackup,
    transaction: Option<Transaction>,
) -> Result<String, BeginError> {
    graph::refresh(vm).await?;
    let source = vm.graph.borrow().lookup_any(&asked.device)?.id;
    let target = vm.graph.borrow().lookup_any(&asked.target)?.id;
    backup(vm, source, target, asked, transaction, false).await
}

/// drive-backup: to a file, which is made unless it is there.
///
/// # Errors
/// [`BeginError`].
pub async fn to_file(vm: &Rc<Vm>, asked: DriveBackup, transaction: Option<Transaction>) -> Result<String, BeginError> {
    graph::refresh(vm).await?;
    let source = vm.graph.borrow().lookup_any(&asked.device)?.id;
    vm.graph.borrow().check_idle(source)?;
    let (sync, under) = sync::of_new_target(&vm.graph.borrow(), source, asked.sync);
    let target = target::open(
        vm,
        source,
        NewTarget {
            file: &asked.target,
            format: asked.format.as_deref(),
            mode: asked.mode.unwrap_or_default(),
            name: None,
            named_below: under,
            under: under.map_or(Under::Nothing, Under::Node),
        },
    )
    .await?;
    let asked = BlockdevBackup {
        job_id: asked.job_id,
        device: asked.device,
        sync,
        speed: asked.speed,
        bitmap: asked.bitmap,
        bitmap_mode: asked.bitmap_mode,
        compress: asked.compress,
        on_source_error: asked.on_source_error,
        on_target_error: asked.on_target_error,
        auto_finalize: asked.auto_finalize,
        auto_dismiss: asked.auto_dismiss,
        filter_node_name: asked.filter_node_name,
        x_perf: asked.x_perf,
        target: asked.target,
    };
    let begun = backup(vm, source, target, asked, transaction, true).await;
    if begun.is_err() {
        graph::remove_unused(vm).await;
    }
    begun
}

async fn backup(
    vm: &Rc<Vm>,
    source: NodeId,
    target: NodeId,
    asked: BlockdevBackup,
    transaction: Option<Transaction>,
    is_file: bool,
) -> Result<String, BeginError> {
    let (bitmap, bitmap_mode) = check(vm, source, &asked)?;
    let perf = perf(asked.x_perf)?;
    {
        let graph = vm.graph.borrow();
        graph.check_idle(source)?;
        graph.check_idle(target)?;
        let compress = asked.compress.unwrap_or(false);
        if compress && !matches!(graph.image(target).options.driver, DriverOptions::Qcow2(_)) {
            return Err(BeginError::refused(format!(
                "Compression is not supported for this drive {}",
                graph.device_or_node_name(target)
            )));
        }
        if source == target {
            return Err(BeginError::refused("Source and target cannot be the same"));
        }
    }
    let target = bring_along(vm, target, source).await?;
    if bytes_of(vm, source).await? != bytes_of(vm, target).await? {
        return Err(BeginError::refused("Source and target image have different sizes"));
    }
    let (from, reads_zeroes, cluster_bytes) = {
        let graph = vm.graph.borrow();
        let from = match (asked.sync, bitmap) {
            (SyncMode::Incremental | SyncMode::Bitmap, Some(bitmap)) => CopyFrom::Bitmap(bitmap),
            _ => sync::copied(&graph, source, asked.sync),
        };
        // The target's clusters are copied as a whole: otherwise what is around would be read from below them.
        let cluster_bytes = sync::cluster_bytes(&graph, target).map_or(CLUSTER_BYTES, |bytes| bytes.max(CLUSTER_BYTES));
        (
            from,
            sync::is_alone(&graph, target),
            cluster_bytes.max(perf.min_cluster),
        )
    };
    if perf.chunk != 0 && perf.chunk < u64::from(cluster_bytes) {
        return Err(BeginError::refused(format!(
            "Required max-chunk ({}) is less than backup cluster size ({cluster_bytes})",
            perf.chunk
        )));
    }
    let compress = asked.compress.unwrap_or(false);
    let beside = if is_file { vec![source] } else { Vec::new() };
    let beginning = Beginning {
        common: Common {
            id: asked.job_id,
            kind: JobType::Backup,
            endings: Endings::of(asked.auto_finalize, asked.auto_dismiss),
            speed: asked.speed.unwrap_or(0),
            on_source_error: asked.on_source_error,
            on_target_error: asked.on_target_error,
            filter_name: asked.filter_node_name,
            transaction,
        },
        source,
        filter: Filter::CopyBeforeWrite { target, cluster_bytes },
        work: Box::new(move |filter| JobWork::Backup {
            filter,
            bitmap: bitmap.filter(|bitmap| from != CopyFrom::Bitmap(*bitmap)),
            from,
            bitmap_mode,
            target_reads_zeroes: reads_zeroes,
            compress,
            max_workers: perf.workers,
            max_chunk: perf.chunk,
        }),
        uses: vec![
            Use::reads(source),
            Use {
                beside,
                ..Use::reads(target)
            },
        ],
        end: Box::new(|_| End::Backup),
        made_writable: Vec::new(),
    };
    begin(vm, beginning).await
}

/// QEMU's refusals about bitmaps, in its order.
fn check(vm: &Vm, source: NodeId, asked: &BlockdevBackup) -> Result<(Option<BitmapNumber>, BitmapMode), BeginError> {
    let mode = |word| match word {
        BitmapSyncMode::OnSuccess => BitmapMode::OnSuccess,
        BitmapSyncMode::Never => BitmapMode::Never,
        BitmapSyncMode::Always => BitmapMode::Always,
    };
    let refused = |text: &str| Err(BeginError::refused(text));
    let mut bitmap_mode = asked.bitmap_mode;
    if asked.sync == SyncMode::Incremental {
        if bitmap_mode.is_some_and(|mode| mode != BitmapSyncMode::OnSuccess) {
            return refused("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'");
        }
        bitmap_mode = Some(BitmapSyncMode::OnSuccess);
    }
    if matches!(asked.sync, SyncMode::Incremental | SyncMode::Bitmap) && asked.bitmap.is_none() {
        return refused(&format!(
            "must provide a valid bitmap name for '{}' sync mode",
            asked.sync.name()
        ));
    }
    let Some(name) = &asked.bitmap else {
        return match asked.bitmap_mode {
            Some(_) => refused("Cannot specify bitmap sync mode without a bitmap"),
            None => Ok((None, BitmapMode::Never)),
        };
    };
    let bitmap = find_bitmap(vm, source, name)?;
    let Some(bitmap_mode) = bitmap_mode else {
        return refused("Bitmap sync mode must be given when providing a bitmap");
    };
    if asked.sync == SyncMode::None {
        return refused("sync mode 'none' does not produce meaningful bitmap outputs");
    }
    if bitmap_mode == BitmapSyncMode::Never && asked.sync != SyncMode::Bitmap {
        return refused(&format!(
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{}'",
            asked.sync.name()
        ));
    }
    Ok((Some(bitmap), mode(bitmap_mode)))
}

struct Perf {
    workers: u32,
    chunk: u64,
    min_cluster: u32,
}

fn perf(asked: Option<BackupPerf>) -> Result<Perf, BeginError> {
    let asked = asked.unwrap_or(BackupPerf {
        use_copy_range: None,
        max_workers: None,
        max_chunk: None,
        min_cluster_size: None,
    });
    let workers = match asked.max_workers {
        None => WORKERS,
        Some(workers) => u32::try_from(workers)
            .ok()
            .filter(|workers| (1..=i32::MAX as u32).contains(workers))
            .ok_or_else(|| BeginError::refused("max-workers must be between 1 and 2147483647"))?,
    };
    let chunk = match asked.max_chunk {
        None => 0,
        Some(chunk) => u64::try_from(chunk)
            .map_err(|_| BeginError::refused("max-chunk must be zero (which means no limit) or positive"))?,
    };
    let cluster = asked.min_cluster_size.unwrap_or(0);
    let min_cluster = u32::try_from(cluster)
        .ok()
        .filter(|bytes| *bytes == 0 || (bytes.is_power_of_two() && *bytes <= 64 << 20))
        .ok_or_else(|| BeginError::refused("min-cluster-size needs to be a power of 2"))?;
    Ok(Perf {
        workers,
        chunk,
        min_cluster,
    })
}

/// As QEMU, which says here in other words that it is not there.
fn find_bitmap(vm: &Vm, source: NodeId, name: &str) -> Result<BitmapNumber, BeginError> {
    let graph = vm.graph.borrow();
    match graph.usable_bitmap_on(source, name, BitmapUse::Change) {
        Ok(bitmap) => Ok(bitmap.number),
        Err(BitmapError::NotFound(_)) => Err(BeginError::refused(format!("Bitmap '{name}' could not be found"))),
        Err(error) => Err(BeginError::refused(error.to_string())),
    }
}
