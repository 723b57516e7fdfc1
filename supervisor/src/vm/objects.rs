//! Objects of the running machine: object-add, object-del, and the queries that list some of them.

use super::block_proc::Stage;
use super::{Vm, devices, query};
use crate::objects::{Backend, ObjectError, Spec};
use ipc::block::Polling;
use ipc::info::{IoThreadInfo, Memdev};
use ipc::objects::NewObject;
use ipc::qmp::QmpError;
use ipc::virtio::IoThreadIndex;
use std::rc::Rc;

/// object-add.
pub async fn add(vm: &Rc<Vm>, object: NewObject) -> Result<(), QmpError> {
    let spec = Spec::new(&object)?;
    let id = object.id;
    let _turn = vm.object_change.enter().await;
    vm.objects.borrow_mut().create(id.clone(), spec, &vm.fds.borrow())?;
    let started = start_thread(vm, &id).await;
    started.map_err(|reason| {
        // Without its thread it is not what it says.
        let _ = vm.objects.borrow_mut().remove(&id);
        QmpError::generic(reason)
    })
}

/// Lets the thread of a new iothread poll as it should; block-proc comes with the first.
async fn start_thread(vm: &Rc<Vm>, id: &str) -> Result<(), String> {
    let found = vm.objects.borrow().io_thread(id);
    let Some((thread, polling)) = found else {
        return Ok(());
    };
    if matches!(vm.block.stage(), Stage::Absent | Stage::Starting) {
        return devices::need_block(vm).await;
    }
    let set = devices::set_polling(vm, thread, polling).await;
    set.map_err(|error| error.to_string())
}

/// object-del.
pub async fn delete(vm: &Vm, id: &str) -> Result<(), QmpError> {
    let _turn = vm.object_change.enter().await;
    let by_device = vm.config.devices.iter().any(|device| device.uses(id));
    let by_node = vm.throttle_groups.is_used(id);
    let by_frontend = super::frontends::use_thread(vm, id);
    if by_device || by_frontend || by_node || vm.config.memory_backend.as_deref() == Some(id) {
        return Err(ObjectError::InUse(id.to_owned()).into());
    }
    let removed = vm.objects.borrow_mut().remove(id)?;
    if let Some((thread, _)) = removed.io_thread() {
        // It is a spare one again, and sleeps.
        let slept = devices::set_polling(vm, thread, Polling::default()).await;
        slept.map_err(|error| QmpError::generic(error.to_string()))?;
    }
    Ok(())
}

/// query-iothreads.
pub fn io_threads(vm: &Vm) -> Vec<IoThreadInfo> {
    let thread_ids = vm.io_threads.borrow();
    let thread_id = |thread: IoThreadIndex| *thread_ids.get(usize::from(thread.0).checked_sub(1)?)?;
    let int = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let objects = vm.objects.borrow();
    let entries = objects.iter().filter_map(|object| {
        let (thread, polling) = object.backend.io_thread()?;
        Some(IoThreadInfo {
            id: object.id.clone(),
            thread_id: i64::from(thread_id(thread)?),
            poll_max_ns: int(polling.max_ns),
            poll_grow: int(polling.grow),
            poll_shrink: int(polling.shrink),
            aio_max_batch: int(polling.max_batch),
        })
    });
    entries.collect()
}

/// query-memdev: memory backends, and guest RAM where it is none of them.
pub fn memdevs(vm: &Vm) -> Vec<Memdev> {
    let own = vm
        .config
        .memory_backend
        .is_none()
        .then(|| query::memory(vm.config.ram_bytes));
    let objects = vm.objects.borrow();
    let backends = objects.iter().filter_map(|object| match object.backend {
        Backend::Memory { spec, .. } => Some(Memdev {
            id: Some(object.id.clone()),
            share: spec.share,
            prealloc: spec.prealloc,
            ..query::memory(spec.bytes)
        }),
        _ => None,
    });
    own.into_iter().chain(backends).collect()
}
