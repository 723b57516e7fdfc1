//! How jobs end.
//!
//! A job's changes are made when all of its transaction have done their work. What fails before fails them all.

use super::{BlockJob, End, announce};
use crate::graph::error::GraphError;
use crate::jobs::{Transaction, Wish};
use crate::logging;
use crate::vm::{Vm, graph, reopen, resize};
use ipc::block_job::{JobControl, Switch};
use ipc::graph::{ChildRole, EdgeChange, GraphRequest, NodeDetails, NodeId};
use std::rc::Rc;

/// A job's work is done. Its transaction is finalized, if nothing else is to be waited for.
pub async fn worked(vm: &Rc<Vm>, id: &str) {
    let (steps, ready) = vm.jobs.borrow_mut().worked(id);
    announce(vm, steps);
    if let Some(transaction) = ready {
        finalize(vm, transaction).await;
    }
}

/// Makes the changes of all jobs of a transaction, or of none of those that are left when one fails.
pub async fn finalize(vm: &Rc<Vm>, transaction: Transaction) {
    let together = vm.jobs.borrow().together(transaction);
    for id in &together {
        let Some(job) = vm.job_work.of_id(id) else { continue };
        if let Err(error) = make_changes(vm, &job).await {
            return abort(vm, id, Some(error.to_string())).await;
        }
    }
    for id in together {
        if let Some(job) = vm.job_work.of_id(&id) {
            clear_away(vm, &job, true).await;
        }
        let steps = vm.jobs.borrow_mut().succeed(&id);
        announce(vm, steps);
    }
}

/// A job fails, or is cancelled (without an error), and all of its transaction with it.
pub async fn abort(vm: &Rc<Vm>, id: &str, error: Option<String>) {
    let Some(transaction) = vm.jobs.borrow().get(id).map(crate::jobs::Job::transaction) else {
        return;
    };
    let together = vm.jobs.borrow().together(transaction);
    for id in &together {
        // What is under way counts as done.
        if let Err(error) = super::control(vm, id, JobControl::Pause).await {
            logging::line(format_args!("job {id}: {error}"));
        }
    }
    super::refresh(vm).await;
    for other in &together {
        let error = error.clone().filter(|_| other == id);
        let steps = vm.jobs.borrow_mut().abort(other, error);
        announce(vm, steps);
    }
    for id in together {
        if let Some(job) = vm.job_work.of_id(&id) {
            clear_away(vm, &job, false).await;
        }
        let steps = vm.jobs.borrow_mut().conclude(&id);
        announce(vm, steps);
    }
}

/// The machine ends: no job goes on.
pub async fn give_up_all(vm: &Rc<Vm>) {
    abort_all(vm, None).await;
}

/// block-proc has ended, and the work of all jobs with it.
pub async fn fail_all(vm: &Rc<Vm>, error: &str) {
    // What it had told of jobs whose commands were not done: they have failed.
    vm.job_work.early.borrow_mut().clear();
    abort_all(vm, Some(error)).await;
}

async fn abort_all(vm: &Rc<Vm>, error: Option<&str>) {
    let _turn = vm.job_work.turn.enter().await;
    loop {
        let next = vm.job_work.jobs.borrow().values().next().map(|job| job.id.clone());
        let Some(id) = next else { return };
        abort(vm, &id, error.map(str::to_owned)).await;
        // Whatever became of it.
        vm.job_work.jobs.borrow_mut().retain(|_, job| job.id != id);
    }
}

/// Undoes the beginning of a job of a transaction that fails.
pub async fn undo_beginning(vm: &Vm, id: &str) {
    if let Some(job) = vm.job_work.of_id(id) {
        clear_away_held(vm, &job, false).await;
    }
    let steps = vm.jobs.borrow_mut().give_up(id);
    announce(vm, steps);
}

async fn make_changes(vm: &Vm, job: &BlockJob) -> Result<(), GraphError> {
    let _turn = vm.graph_change.enter().await;
    let leaves = vm.jobs.borrow().get(&job.id).is_some_and(|job| job.wish == Wish::Leave);
    let settle = if job.end.settles() {
        vec![job.number]
    } else {
        Vec::new()
    };
    match &job.end {
        End::Backup => {}
        End::Mirror { .. } if leaves => move_users(vm, job.filter, job.source, Vec::new(), settle, job).await?,
        End::Mirror { from, to, backing } => {
            let below = backing.map(|backing| EdgeChange::Child {
                parent: *to,
                role: ChildRole::Backing,
                child: Some(backing),
            });
            move_users(vm, *from, *to, below.into_iter().collect(), settle, job).await?;
        }
        End::Commit { base, backing_file } => {
            let name = backing_name(vm, Some(*base), backing_file.as_deref());
            let above: Vec<NodeId> = {
                let graph = vm.graph.borrow();
                let parents = graph.parents(job.filter);
                let over = parents.filter(|(_, role)| *role == ChildRole::Backing);
                over.map(|(parent, _)| parent.id).collect()
            };
            for image in above {
                write_backing_name(vm, image, name.clone()).await?;
            }
            move_users(vm, job.filter, *base, Vec::new(), settle, job).await?;
        }
        End::Stream {
            top,
            base,
            backing_file,
        } => {
            let name = backing_name(vm, *base, backing_file.as_deref());
            graph::ask(
                vm,
                GraphRequest::SetBackingName {
                    node: *top,
                    backing: name,
                },
            )
            .await?;
            let below = EdgeChange::Child {
                parent: *top,
                role: ChildRole::Backing,
                child: *base,
            };
            move_users(vm, job.filter, job.source, vec![below], settle, job).await?;
        }
    }
    job.is_done.set(true);
    Ok(())
}

/// The name and format by which an image is told of what is below it.
fn backing_name(vm: &Vm, base: Option<NodeId>, name: Option<&str>) -> Option<(String, Option<String>)> {
    let graph = vm.graph.borrow();
    let base = base?;
    let name = name.map_or_else(|| graph.filename(base), str::to_owned);
    Some((name, Some(graph.image(base).driver_name().to_owned())))
}

/// Writes to an image's header what is below it; an image that is read-only is opened for writing meanwhile.
async fn write_backing_name(
    vm: &Vm,
    image: NodeId,
    backing: Option<(String, Option<String>)>,
) -> Result<(), GraphError> {
    let (is_qcow2, read_only) = {
        let graph = vm.graph.borrow();
        let node = graph.node_or_missing(image);
        (
            matches!(node.report.details, NodeDetails::Qcow2(_)),
            node.settings.read_only,
        )
    };
    if !is_qcow2 {
        return Ok(());
    }
    let writable = if read_only {
        reopen::set_writable(vm, image, true).await?
    } else {
        image
    };
    let written = graph::ask(
        vm,
        GraphRequest::SetBackingName {
            node: writable,
            backing,
        },
    )
    .await;
    if read_only {
        reopen::set_writable(vm, writable, false).await?;
    }
    written.map(drop)
}

/// Moves what uses a node to another, with other changes of edges; the job does not use its nodes any more.
async fn move_users(
    vm: &Vm,
    from: NodeId,
    to: NodeId,
    mut changes: Vec<EdgeChange>,
    settle: Vec<ipc::block_job::JobNumber>,
    job: &BlockJob,
) -> Result<(), GraphError> {
    changes.extend(vm.graph.borrow().users_to(from, to));
    let id = job.id.clone();
    let switch = Switch {
        settle,
        changes,
        ..Switch::default()
    };
    let devices = graph::switch(vm, switch, |graph| {
        graph.move_idle_backends(from, to);
        graph.jobs.retain(|job| job.job != id);
        Ok(())
    })
    .await?;
    resize::announce(vm, devices).await;
    Ok(())
}

/// Takes a job's filter and its claims away.
async fn clear_away(vm: &Vm, job: &BlockJob, success: bool) {
    let _turn = vm.graph_change.enter().await;
    clear_away_held(vm, job, success).await;
}

async fn clear_away_held(vm: &Vm, job: &BlockJob, success: bool) {
    if vm.job_work.jobs.borrow_mut().remove(&job.number).is_none() {
        return;
    }
    let log = |error: GraphError| logging::line(format_args!("job {}: {error}", job.id));
    // None that has done what it should have: then nobody uses its filter any more.
    let moved = move_users(vm, job.filter, job.source, Vec::new(), Vec::new(), job).await;
    moved.unwrap_or_else(log);
    let end = GraphRequest::ControlJob {
        job: job.number,
        control: JobControl::End { success },
    };
    graph::ask(vm, end).await.map(drop).unwrap_or_else(log);
    let _ = graph::change_description(vm, |graph| {
        graph.jobs.retain(|used| used.job != job.id);
        Ok(())
    });
    graph::remove(vm, job.filter).await;
    for node in &job.made_writable {
        let is_idle = {
            let graph = vm.graph.borrow();
            graph.nodes.contains_key(node) && !graph.is_written(*node)
        };
        if is_idle {
            let restored = reopen::set_writable(vm, *node, false).await;
            restored.map(drop).unwrap_or_else(log);
        }
    }
    graph::remove_unused(vm).await;
}
