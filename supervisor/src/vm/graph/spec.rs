//! What block-proc is told of a node that is described, and the keys for it.

use super::super::{Vm, nbd_client, throttling};
use super::request::ask;
use super::request::unexpected;
use crate::graph::error::GraphError;
use crate::graph::node::Node;
use crate::graph::open;
use crate::graph::options::{DetectZeroes, DriverOptions, Qcow2Options};
use crate::graph::settings::Settings;
use crate::objects;
use ipc::graph::{Backing, BlkdebugSpec, ChildRole, GraphRequest, LuksSpec, NodeId, NodeSpec, Qcow2Spec};
use ipc::secret::Secret;
use std::collections::BTreeMap;

/// Tells a node that nobody uses yet of its `detect-zeroes`.
pub(super) async fn detect_zeroes(vm: &Vm, node: NodeId, settings: Settings) -> Result<(), GraphError> {
    match detect_zeroes_request(node, settings) {
        Some(request) => ask(vm, request).await.map(drop),
        None => Ok(()),
    }
}

/// What block-proc is told of a node's `detect-zeroes`, if anything.
pub fn detect_zeroes_request(node: NodeId, settings: Settings) -> Option<GraphRequest> {
    let may_unmap = match settings.detect_zeroes {
        DetectZeroes::Off => return None,
        DetectZeroes::On => false,
        DetectZeroes::Unmap => true,
    };
    Some(GraphRequest::DetectZeroes { node, may_unmap })
}

/// What a node is, for creating it anew over children that may have other numbers now.
///
/// # Errors
/// What the node needs and is not there any more.
pub async fn spec_again(vm: &Vm, node: &Node, numbers: &BTreeMap<NodeId, NodeId>) -> Result<NodeSpec, GraphError> {
    let child = |role| -> Option<NodeId> { numbers.get(node.children.get(&role)?).copied() };
    let file = || child(ChildRole::File).ok_or_else(unexpected);
    Ok(match &node.options.driver {
        DriverOptions::File(_) => {
            let file = node.file.as_deref().ok_or_else(unexpected)?;
            let failed = |error: &dyn std::fmt::Display| GraphError::BlockProc(error.to_string());
            NodeSpec::File {
                disk: file.for_block_proc().map_err(|error| failed(&error))?,
                info: open::info_now(file).map_err(|errno| failed(&errno.desc()))?,
            }
        }
        DriverOptions::Raw { offset, bytes, .. } => NodeSpec::Raw {
            file: file()?,
            offset: *offset,
            bytes: *bytes,
            read_only: node.settings.read_only,
        },
        DriverOptions::Qcow2(qcow2) => NodeSpec::Qcow2(Qcow2Spec {
            file: file()?,
            backing: child(ChildRole::Backing).map_or(Backing::None, Backing::Node),
            data_file: child(ChildRole::DataFile),
            read_only: node.settings.read_only,
            discard: node.settings.discard,
            lazy_refcounts: qcow2.lazy_refcounts,
            l2_cache_bytes: qcow2.l2_cache_bytes,
            refcount_cache_bytes: qcow2.refcount_cache_bytes,
            key: match &node.password {
                Some(password) => Some(Secret::clone(password)),
                None => qcow2_key(vm, qcow2)?,
            },
            may_be_locked: node.settings.may_be_locked,
        }),
        DriverOptions::Luks { key_secret, .. } => NodeSpec::Luks(LuksSpec {
            file: file()?,
            read_only: node.settings.read_only,
            key: match (key(vm, key_secret.as_deref()), &node.password) {
                // Its secret may be gone by now.
                (Err(_), Some(password)) => Some(Secret::clone(password)),
                (key, _) => key?,
            },
        }),
        DriverOptions::Null {
            bytes,
            latency_ns,
            read_zeroes,
            ..
        } => NodeSpec::Null {
            bytes: *bytes,
            latency_ns: *latency_ns,
            read_zeroes: *read_zeroes,
        },
        DriverOptions::Nbd(nbd) => NodeSpec::Nbd(nbd_client::spec(vm, nbd, node.settings).await?),
        DriverOptions::Throttle { group, .. } => NodeSpec::Throttle {
            file: file()?,
            group: throttling::number(vm, group).await?,
        },
        DriverOptions::JobFilter { .. } => return Err(GraphError::OtherThread(node.name.clone())),
        DriverOptions::CopyOnRead { .. } => NodeSpec::CopyOnRead {
            file: file()?,
            for_job: false,
        },
        DriverOptions::Blkdebug(blkdebug) => NodeSpec::Blkdebug(BlkdebugSpec {
            file: file()?,
            inject_errors: blkdebug.inject_errors.clone(),
            set_states: blkdebug.set_states.clone(),
            align: blkdebug.align,
        }),
    })
}

pub(super) fn qcow2_key(vm: &Vm, qcow2: &Qcow2Options) -> Result<Option<Secret>, GraphError> {
    let secret = qcow2.encrypt.as_ref().and_then(|encrypt| encrypt.key_secret.as_deref());
    key(vm, secret)
}

/// What an object of the type secret holds.
///
/// # Errors
/// That there is none, or that it is no key.
pub fn key(vm: &Vm, id: Option<&str>) -> Result<Option<Secret>, GraphError> {
    let Some(id) = id else { return Ok(None) };
    match vm.objects.borrow().get(id) {
        Some(objects::Backend::Secret(secret)) => secret
            .key()
            .map(Some)
            .map_err(|error| GraphError::Key(id.to_owned(), error.to_string())),
        Some(_) => Err(GraphError::Key(id.to_owned(), "it is no secret".to_owned())),
        None => Err(GraphError::NoSecret(id.to_owned())),
    }
}
