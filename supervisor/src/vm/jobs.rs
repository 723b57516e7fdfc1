//! The commands about jobs; what a job does is its own module's ([`super::create`]).

use super::Vm;
use crate::jobs::Steps;
use ipc::qmp::{Event, QmpError};

/// Tells clients of a job's steps.
pub fn announce(vm: &Vm, id: &str, Steps(steps): Steps) {
    for status in steps {
        vm.emit(Event::JobStatusChange {
            id: id.to_owned(),
            status,
        });
    }
}

/// job-cancel.
///
/// # Errors
/// The error reply.
pub fn cancel(vm: &Vm, id: &str) -> Result<(), QmpError> {
    let steps = vm.jobs.borrow_mut().cancel(id)?;
    announce(vm, id, steps);
    Ok(())
}

/// job-finalize.
///
/// # Errors
/// The error reply.
pub fn finalize(vm: &Vm, id: &str) -> Result<(), QmpError> {
    let steps = vm.jobs.borrow_mut().finalize(id)?;
    announce(vm, id, steps);
    Ok(())
}

/// job-dismiss.
///
/// # Errors
/// The error reply.
pub fn dismiss(vm: &Vm, id: &str) -> Result<(), QmpError> {
    let steps = vm.jobs.borrow_mut().dismiss(id)?;
    announce(vm, id, steps);
    Ok(())
}
