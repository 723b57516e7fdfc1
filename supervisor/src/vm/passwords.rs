//! block_passwd, as QMP 2.0 has it: an encrypted image of a drive may be opened without its password. It is there, and
//! locked, and no guest runs until somebody says the password.
//!
//! Only drives are so (`-drive`, and blockdev-add in the form of that time): what is added in today's form without its
//! `key-secret` is refused as today.

use super::{Vm, graph};
use crate::graph::Graph;
use crate::graph::error::GraphError;
use crate::graph::node::Node;
use ipc::graph::{NodeDetails, NodeId};
use ipc::qmp::{ErrorClass, QmpError};
use ipc::secret::Secret;
use std::rc::Rc;

/// Why an image is not unlocked: the texts of that time.
#[derive(Debug, thiserror::Error)]
enum PasswordError {
    #[error("Device '{0}' is not encrypted")]
    NotEncrypted(String),
    #[error("Password incorrect")]
    Wrong,
    #[error(transparent)]
    Graph(#[from] GraphError),
}

impl From<PasswordError> for QmpError {
    fn from(error: PasswordError) -> Self {
        match error {
            PasswordError::Graph(error) => error.into(),
            error => Self::generic(error.to_string()),
        }
    }
}

/// block_passwd: the images below have the same password. One that is not locked has it already and keeps it.
///
/// # Errors
/// The error reply. Images that were unlocked before one failed stay so.
pub async fn set(vm: &Vm, device: Option<&str>, node: Option<&str>, password: Secret) -> Result<(), QmpError> {
    Ok(unlock(vm, device, node, password).await?)
}

async fn unlock(vm: &Vm, device: Option<&str>, node: Option<&str>, password: Secret) -> Result<(), PasswordError> {
    let _turn = vm.graph_change.enter().await;
    graph::refresh(vm).await?;
    let locked = {
        let graph = vm.graph.borrow();
        let root = graph.lookup(device, node)?.id;
        let chain = graph.tree(root);
        if !chain.iter().any(|id| encryption(graph.node_or_missing(*id)).is_some()) {
            return Err(PasswordError::NotEncrypted(graph.device_or_node_name(root)));
        }
        // Children come first: what is made again keeps the children that it has by then.
        chain
            .into_iter()
            .filter(|id| is_locked(&graph, *id))
            .collect::<Vec<_>>()
    };
    let password = Rc::new(password);
    for id in locked {
        let made = graph::make_again_with(vm, id, |node| node.password = Some(Rc::clone(&password))).await;
        made.map_err(|error| match error {
            GraphError::WrongKey(_) => PasswordError::Wrong,
            error => error.into(),
        })?;
    }
    Ok(())
}

/// Whether an encrypted image lacks its password; nothing of one that is not encrypted.
pub fn encryption(node: &Node) -> Option<bool> {
    match &node.report.details {
        NodeDetails::Qcow2(details) if details.encryption != 0 => Some(details.locked),
        _ => None,
    }
}

fn is_locked(graph: &Graph, id: NodeId) -> bool {
    encryption(graph.node_or_missing(id)) == Some(true)
}

/// No guest runs on a locked image.
///
/// # Errors
/// The error reply that names the first drive with one.
pub fn check(vm: &Vm) -> Result<(), QmpError> {
    let graph = vm.graph.borrow();
    for backend in &graph.backends {
        let nodes = backend.root.map(|root| graph.tree(root)).unwrap_or_default();
        if let Some(locked) = nodes.into_iter().find(|id| is_locked(&graph, *id)) {
            return Err(QmpError {
                class: ErrorClass::DeviceEncrypted,
                desc: format!(
                    "'{}' ({}) is encrypted",
                    graph.backend_name(backend),
                    graph.filename(locked)
                ),
            });
        }
    }
    Ok(())
}
