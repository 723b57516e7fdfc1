//! Groups of limits (throttle-group objects), as throttle nodes use them.

use super::{Vm, graph};
use crate::graph::error::GraphError;
use crate::objects;
use crate::objects::throttle::Limits;
use ipc::graph::{GraphRequest, GroupId};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// The numbers of the groups that block-proc knows, by their objects' ids.
#[derive(Default)]
pub struct Groups(RefCell<BTreeMap<String, GroupId>>);

impl Groups {
    /// Whether block-proc has a group of this name.
    pub fn is_used(&self, name: &str) -> bool {
        self.0.borrow().contains_key(name)
    }
}

/// The number of a group for block-proc, which learns its limits with the first use.
///
/// # Errors
/// [`GraphError::NoGroup`], or what block-proc says.
pub async fn number(vm: &Vm, name: &str) -> Result<GroupId, GraphError> {
    let known = vm.throttle_groups.0.borrow().get(name).copied();
    if let Some(group) = known {
        return Ok(group);
    }
    let limits = match vm.objects.borrow().get(name) {
        Some(objects::Backend::ThrottleGroup(limits)) => limits.to_wire(),
        _ => return Err(GraphError::NoGroup(name.to_owned())),
    };
    let group = {
        let groups = vm.throttle_groups.0.borrow();
        GroupId(groups.values().map(|group| group.0).max().map_or(1, |last| last + 1))
    };
    graph::ask(vm, GraphRequest::SetGroup { group, limits }).await?;
    vm.throttle_groups.0.borrow_mut().insert(name.to_owned(), group);
    Ok(group)
}

/// A group has other limits from now on.
///
/// # Errors
/// What block-proc says; then the limits are as before.
pub async fn change(vm: &Vm, name: &str, limits: Limits) -> Result<(), GraphError> {
    let known = vm.throttle_groups.0.borrow().get(name).copied();
    if let Some(group) = known {
        let limits = limits.to_wire();
        graph::ask(vm, GraphRequest::SetGroup { group, limits }).await?;
    }
    if let Some(objects::Backend::ThrottleGroup(own)) = vm.objects.borrow_mut().get_mut(name) {
        *own = limits;
    }
    Ok(())
}
