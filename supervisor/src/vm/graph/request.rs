//! Requests to block-proc about the graph.

use super::super::Vm;
use super::super::block_proc::Stage;
use super::super::restart::offline;
use crate::graph::error::GraphError;
use crate::helper::{HelperError, STORAGE_DEADLINE};
use crate::logging;
use ipc::Role;
use ipc::block::{BlockReply, BlockRequest};
use ipc::graph::{GraphReply, GraphRequest};
use std::time::Duration;

/// A request to block-proc about the graph. Images are read and flushed for it.
///
/// # Errors
/// What block-proc says, or that it is gone.
pub async fn ask(vm: &Vm, request: GraphRequest) -> Result<GraphReply, GraphError> {
    ask_within(vm, STORAGE_DEADLINE, request).await
}

/// As [`ask`], with another deadline.
///
/// # Errors
/// As there.
pub async fn ask_within(vm: &Vm, deadline: Duration, request: GraphRequest) -> Result<GraphReply, GraphError> {
    let offline = offline::answer(&request);
    if vm.block.stage() == Stage::Lost {
        return offline.ok_or_else(|| GraphError::BlockProc(HelperError::Gone(Role::Block).to_string()));
    }
    let block = vm.block.serving().await;
    let block = block.ok_or_else(|| GraphError::BlockProc("there is no block-proc".to_owned()))?;
    match block.ask_within(deadline, BlockRequest::Graph(request)).await {
        Ok(BlockReply::Graph(reply)) => Ok(reply),
        Ok(_) => Err(unexpected()),
        Err(HelperError::Gone(role)) => match (vm.block.stage(), offline) {
            (Stage::Lost, Some(reply)) => Ok(reply),
            _ => Err(GraphError::BlockProc(HelperError::Gone(role).to_string())),
        },
        Err(HelperError::Failed(failure)) if failure.message.starts_with("the image is not in qcow2 format") => {
            Err(GraphError::NotInFormat("qcow2"))
        }
        Err(error) => {
            let text = logging::printable(error.to_string().as_bytes()).to_string();
            Err(match error {
                HelperError::Failed(failure) if failure.errno == Some(libc::EKEYREJECTED) => GraphError::WrongKey(text),
                _ => GraphError::BlockProc(text),
            })
        }
    }
}

pub(super) fn unexpected() -> GraphError {
    GraphError::BlockProc("block-proc answered with something else".to_owned())
}
