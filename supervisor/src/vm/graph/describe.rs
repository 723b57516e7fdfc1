//! The description changes if what it becomes is allowed, and the locks of its files with it.

use super::super::Vm;
use crate::graph::Graph;
use crate::graph::error::GraphError;
use crate::graph::locks::LockError;
use crate::graph::permissions::Needs;

/// Changes the description, if what it becomes is allowed and its files can be locked. Otherwise nothing changes.
///
/// # Errors
/// [`GraphError`].
pub fn change_description<T>(
    vm: &Vm,
    change: impl FnOnce(&mut Graph) -> Result<T, GraphError>,
) -> Result<T, GraphError> {
    let before = vm.graph.borrow().clone();
    let mut after = before.clone();
    let result = change(&mut after)?;
    after.check_permissions()?;
    if let Err(error) = lock(&after) {
        // What was locked before nobody else can have taken meanwhile.
        let _ = lock(&before);
        return Err(error);
    }
    let gone = before.nodes.iter().filter(|(id, _)| !after.nodes.contains_key(id));
    for file in gone.filter_map(|(_, node)| node.file.as_ref()) {
        file.locks.release(&file.lock);
    }
    // A description made by an earlier change may have got a newer number meanwhile.
    vm.graph.replace(after);
    Ok(result)
}

/// Makes every file's locks what its users need.
fn lock(graph: &Graph) -> Result<(), GraphError> {
    for node in graph.nodes.values() {
        let Some(file) = node.file.as_ref().filter(|file| file.is_locked) else {
            continue;
        };
        let needs: Needs = graph.needs(node.id);
        file.locks.change(&file.lock, needs).map_err(|error| match error {
            LockError::Taken(permission) => GraphError::Locked {
                path: file.path.clone(),
                permission,
            },
            LockError::System(errno) => GraphError::Lock {
                path: file.path.clone(),
                errno,
            },
        })?;
    }
    Ok(())
}

/// Gives up all locks: the machine ends.
pub fn unlock_all(graph: &Graph) {
    for file in graph.nodes.values().filter_map(|node| node.file.as_ref()) {
        file.locks.release(&file.lock);
    }
}
