//! How jobs begin: the id, the filter in its place, and block-proc at work.

use super::{BlockJob, End, announce};
use crate::graph::Graph;
use crate::graph::error::GraphError;
use crate::graph::job::JobUse;
use crate::graph::node::{Node, no_report};
use crate::graph::options::{CommonOptions, DriverOptions, JobFilter, NodeOptions};
use crate::graph::permissions::Needs;
use crate::graph::settings::Settings;
use crate::jobs::{Endings, JobError, Transaction};
use crate::logging;
use crate::vm::{Vm, graph, resize};
use ipc::block_job::{JobControl, JobNumber, JobOnError, JobSpec, JobWork, Switch};
use ipc::graph::{ChildRole, CopyBeforeWriteSpec, GraphRequest, NodeId, NodeSpec, Preallocation};
use ipc::job::{JobType, OnError};
use ipc::qmp::QmpError;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Why a job does not begin.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error(transparent)]
    Job(#[from] JobError),
    #[error("Invalid job ID ''")]
    NoId,
    #[error("{0}")]
    Refused(String),
}

impl BeginError {
    pub fn refused(text: impl Into<String>) -> Self {
        Self::Refused(text.into())
    }
}

impl From<BeginError> for QmpError {
    fn from(error: BeginError) -> Self {
        match error {
            BeginError::Graph(error) => error.into(),
            BeginError::Job(error) => error.into(),
            error => Self::generic(error.to_string()),
        }
    }
}

/// What the commands that begin jobs have in common.
pub struct Common {
    /// `job-id`; the drive's where nothing is said.
    pub id: Option<String>,
    /// What it does.
    pub kind: JobType,
    /// `auto-finalize`, `auto-dismiss`.
    pub endings: Endings,
    /// `speed`.
    pub speed: i64,
    /// `on-source-error`.
    pub on_source_error: Option<OnError>,
    /// `on-target-error`.
    pub on_target_error: Option<OnError>,
    /// `filter-node-name`.
    pub filter_name: Option<String>,
    /// The jobs that it ends with.
    pub transaction: Option<Transaction>,
}

/// What a job does, when its filter's number is known.
pub type MakeWork = Box<dyn FnOnce(NodeId) -> JobWork>;
/// What its success changes, likewise.
pub type MakeEnd = Box<dyn FnOnce(NodeId) -> End>;

/// A job that is to begin.
pub struct Beginning {
    /// See there.
    pub common: Common,
    /// What the filter goes over.
    pub source: NodeId,
    /// The filter.
    pub filter: Filter,
    /// What it does, when the filter's number is known.
    pub work: MakeWork,
    /// The nodes that it uses, and how.
    pub uses: Vec<Use>,
    /// What its success changes; the filter's number is known by then.
    pub end: MakeEnd,
    /// Nodes that were made writable for it.
    pub made_writable: Vec<NodeId>,
}

/// A node that a job uses.
pub struct Use {
    /// The node.
    pub node: NodeId,
    /// What for.
    pub needs: Needs,
    /// Nodes above that know.
    pub beside: Vec<NodeId>,
}

impl Use {
    /// It reads there, whatever others do.
    pub fn reads(node: NodeId) -> Self {
        Self {
            node,
            needs: Needs::of_reader(),
            beside: Vec::new(),
        }
    }

    /// It writes there, and nobody else.
    pub fn writes(node: NodeId, beside: Vec<NodeId>) -> Self {
        Self {
            node,
            needs: Needs::of_copier(),
            beside,
        }
    }
}

/// A job's filter.
pub enum Filter {
    /// One that only stands there.
    CommitTop,
    /// A mirror's.
    MirrorTop,
    /// A stream's.
    CopyOnRead,
    /// A backup's.
    CopyBeforeWrite {
        /// The backup.
        target: NodeId,
        /// Bytes that are copied together.
        cluster_bytes: u32,
    },
}

impl Filter {
    fn kind(&self) -> JobFilter {
        match self {
            Self::CommitTop => JobFilter::CommitTop,
            Self::MirrorTop => JobFilter::MirrorTop,
            Self::CopyOnRead => JobFilter::CopyOnRead,
            Self::CopyBeforeWrite { .. } => JobFilter::CopyBeforeWrite,
        }
    }

    fn spec(&self, file: NodeId) -> NodeSpec {
        match *self {
            Self::CommitTop => NodeSpec::Pass { file },
            Self::MirrorTop => NodeSpec::MirrorTop { file },
            Self::CopyOnRead => NodeSpec::CopyOnRead { file, for_job: true },
            Self::CopyBeforeWrite { target, cluster_bytes } => NodeSpec::CopyBeforeWrite(CopyBeforeWriteSpec {
                file,
                target,
                cluster_bytes,
                for_job: true,
                bitmap: None,
                break_snapshot: true,
                timeout_s: 0,
            }),
        }
    }
}

/// QMP's word for block-proc.
fn on_error(word: Option<OnError>) -> JobOnError {
    match word {
        None | Some(OnError::Report) => JobOnError::Report,
        Some(OnError::Ignore) => JobOnError::Ignore,
        Some(OnError::Enospc | OnError::Auto) => JobOnError::Enospc,
        Some(OnError::Stop) => JobOnError::Stop,
    }
}

/// The id of a job that has none of its own: its drive's.
///
/// # Errors
/// [`BeginError::NoId`].
pub fn default_id(graph: &Graph, node: NodeId) -> Result<String, BeginError> {
    let of_drive = graph.device_name(node).or_else(|| {
        let drives = graph.backends.iter().filter(|backend| !backend.id.is_empty());
        let shows = |root: NodeId| graph.explicit(root).id == node;
        let mut shown = drives.filter(|backend| backend.root.is_some_and(shows));
        shown.next().map(|backend| backend.id.clone())
    });
    of_drive.ok_or(BeginError::NoId)
}

/// Begins a job. In a transaction it is created, and [`launch`] lets it run when the transaction is through. The graph's turn is
/// the caller's. Returns its id.
///
/// # Errors
/// [`BeginError`]; then nothing has changed.
pub async fn begin(vm: &Rc<Vm>, mut beginning: Beginning) -> Result<String, BeginError> {
    let id = match beginning.common.id.take() {
        Some(id) => id,
        None => default_id(&vm.graph.borrow(), beginning.source)?,
    };
    let common = &beginning.common;
    let created = vm
        .jobs
        .borrow_mut()
        .create(&id, common.kind, common.endings, common.transaction)?;
    announce(vm, created);
    let waits = common.transaction.is_some();
    match try_begin(vm, &id, beginning).await {
        Ok(()) if waits => Ok(id),
        Ok(()) => {
            run(vm, &id);
            Ok(id)
        }
        Err(error) => {
            let steps = vm.jobs.borrow_mut().give_up(&id);
            announce(vm, steps);
            graph::remove_unused(vm).await;
            Err(error)
        }
    }
}

async fn try_begin(vm: &Rc<Vm>, id: &str, beginning: Beginning) -> Result<(), BeginError> {
    let Beginning {
        common,
        source,
        filter,
        work,
        uses,
        end,
        made_writable,
    } = beginning;
    let speed = vm.jobs.borrow_mut().set_speed(id, common.speed)?;
    if let Some(name) = &common.filter_name {
        let checked = vm.graph.borrow().check_name(name);
        checked.map_err(|error| match common.kind {
            JobType::Backup | JobType::Stream => BeginError::Refused(format!("Could not create node: {error}")),
            _ => error.into(),
        })?;
    }
    let number = JobNumber(vm.job_work.next.get() + 1);
    vm.job_work.next.set(number.0);
    let filter_id = add_filter(vm, &common, source, &filter).await?;
    let uses = uses.into_iter().map(|used| JobUse {
        job: id.to_owned(),
        kind: common.kind,
        node: used.node,
        needs: used.needs,
        beside: used.beside.into_iter().chain([filter_id]).collect(),
    });
    let of_filter = JobUse {
        job: id.to_owned(),
        kind: common.kind,
        node: filter_id,
        needs: Needs::of_reader(),
        beside: Vec::new(),
    };
    let uses: Vec<JobUse> = uses.chain([of_filter]).collect();
    let switch = Switch {
        changes: vm.graph.borrow().users_to(source, filter_id),
        start: vec![JobSpec {
            job: number,
            work: work(filter_id),
            speed,
            on_source_error: on_error(common.on_source_error),
            on_target_error: on_error(common.on_target_error),
            paused: common.transaction.is_some(),
        }],
        ..Switch::default()
    };
    let switched = graph::switch(vm, switch, |graph| {
        graph.jobs.extend(uses);
        graph.move_idle_backends(source, filter_id);
        Ok(())
    })
    .await;
    match switched {
        Ok(devices) => resize::announce(vm, devices).await,
        Err(error) => {
            graph::remove(vm, filter_id).await;
            return Err(error.into());
        }
    }
    let job = BlockJob {
        number,
        id: id.to_owned(),
        filter: filter_id,
        source,
        end: end(filter_id),
        made_writable,
        is_done: Cell::new(false),
    };
    vm.job_work.jobs.borrow_mut().insert(number, Rc::new(job));
    Ok(())
}

/// The job's state says that it runs, and what block-proc has told of it so far is heard.
fn run(vm: &Rc<Vm>, id: &str) {
    let steps = vm.jobs.borrow_mut().start(id);
    announce(vm, steps);
    let Some(number) = vm.job_work.of_id(id).map(|job| job.number) else {
        return;
    };
    let early = vm.job_work.early.take();
    for (job, progress, what) in early {
        if job == number {
            if let Some(block) = vm.block.get() {
                super::told(vm, &block, job, progress, what);
            }
        } else if job > number {
            // Of an older one it is too late.
            vm.job_work.early.borrow_mut().push((job, progress, what));
        }
    }
}

/// Lets a job of a transaction run.
pub async fn launch(vm: &Rc<Vm>, id: &str) {
    run(vm, id);
    if let Err(error) = super::control(vm, id, JobControl::Resume).await {
        logging::line(format_args!("job {id}: {error}"));
    }
}

async fn add_filter(vm: &Vm, common: &Common, source: NodeId, filter: &Filter) -> Result<NodeId, GraphError> {
    let (id, settings, thread) = {
        let mut graph = vm.graph.borrow_mut();
        let id = graph.new_id()?;
        let node = graph.node_or_missing(source);
        (id, node.settings, node.thread)
    };
    let mut children = BTreeMap::from([(ChildRole::File, source)]);
    if let Filter::CopyBeforeWrite { target, .. } = filter {
        children.insert(ChildRole::Target, *target);
    }
    let node = Node {
        id,
        name: common.filter_name.clone().unwrap_or_else(|| Graph::made_up_name(id)),
        options: NodeOptions {
            name: common.filter_name.clone(),
            common: CommonOptions::default(),
            driver: DriverOptions::JobFilter {
                kind: filter.kind(),
                implicit: common.filter_name.is_none(),
            },
        },
        settings: Settings {
            detect_zeroes: Default::default(),
            ..settings
        },
        children,
        file: None,
        thread,
        is_monitor_owned: false,
        report: no_report(),
        password: None,
    };
    graph::add_filter(vm, node, filter.spec(source)).await
}

/// A node has to be in the thread of another: one that nobody uses is moved there. Returns its number, which is another one
/// then.
///
/// # Errors
/// [`GraphError::OtherThread`].
pub async fn bring_along(vm: &Vm, node: NodeId, source: NodeId) -> Result<NodeId, GraphError> {
    let (name, from, to) = {
        let graph = vm.graph.borrow();
        let found = graph.node_or_missing(node);
        (found.name.clone(), found.thread, graph.node_or_missing(source).thread)
    };
    if from == to {
        return Ok(node);
    }
    graph::move_to_thread(vm, node, to).await?;
    let graph = vm.graph.borrow();
    Ok(graph.node_named(&name).ok_or(GraphError::NoNode(name))?.id)
}

/// How large a node is, bytes.
pub async fn bytes_of(vm: &Vm, node: NodeId) -> Result<u64, GraphError> {
    graph::refresh(vm).await?;
    Ok(vm.graph.borrow().node_or_missing(node).report.bytes)
}

/// Makes a node larger, so that it holds what will be copied to it. One that is larger stays so.
///
/// # Errors
/// block-proc's.
pub async fn grow(vm: &Vm, node: NodeId, bytes: u64) -> Result<(), GraphError> {
    if bytes_of(vm, node).await? >= bytes {
        return Ok(());
    }
    let request = GraphRequest::Resize {
        node,
        bytes,
        preallocation: Preallocation::Off,
    };
    graph::ask(vm, request).await?;
    graph::refresh(vm).await
}
