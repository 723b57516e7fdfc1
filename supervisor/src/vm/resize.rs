//! block_resize, and telling drivers that their disk has changed.

use super::{Vm, graph};
use crate::graph::error::GraphError;
use crate::graph::options::DriverOptions;
use crate::logging;
use ipc::graph::{GraphReply, GraphRequest, Preallocation};
use ipc::qmp::QmpError;
use ipc::vcpu::VcpuRequest;
use ipc::virtio::{DeviceIdentity, DeviceIndex};
use std::collections::BTreeMap;

/// What QEMU counts sizes of images in, bytes.
const SECTOR_BYTES: u64 = 512;

/// Why a size is not possible.
#[derive(Debug, thiserror::Error)]
enum ResizeError {
    #[error("Parameter 'size' expects a >0 size")]
    Negative,
    #[error("The new size must be a multiple of 512")]
    Uneven,
}

/// block_resize: the device counts where both names are given.
///
/// # Errors
/// The error reply.
pub async fn resize(vm: &Vm, device: Option<&str>, node: Option<&str>, size: i64) -> Result<(), QmpError> {
    let _turn = vm.graph_change.enter().await;
    let (node, is_qcow2) = {
        let graph = vm.graph.borrow();
        let id = graph.lookup(device, node)?.id;
        (id, matches!(graph.image(id).options.driver, DriverOptions::Qcow2(_)))
    };
    let refused = |error: ResizeError| QmpError::generic(error.to_string());
    let bytes = u64::try_from(size).map_err(|_| refused(ResizeError::Negative))?;
    vm.graph.borrow().check_idle(node)?;
    vm.graph.borrow().check_resize(node)?;
    if is_qcow2 && !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(refused(ResizeError::Uneven));
    }
    let request = GraphRequest::Resize {
        node,
        bytes,
        preallocation: Preallocation::Off,
    };
    let GraphReply::Resized(devices) = graph::ask(vm, request).await? else {
        return Err(GraphError::BlockProc("block-proc answered with something else".to_owned()).into());
    };
    graph::refresh(vm).await?;
    announce(vm, devices).await;
    Ok(())
}

/// Tells drivers what they see now, with an interrupt for a changed configuration.
pub async fn announce(vm: &Vm, devices: BTreeMap<DeviceIndex, DeviceIdentity>) {
    for (device, identity) in devices {
        vm.block.shown.borrow_mut().insert(device, identity.clone());
        // A machine without vCPUs has no drivers.
        let Ok(vcpu) = vm.vcpu() else { return };
        if let Err(error) = vcpu.ask(VcpuRequest::ConfigureDevice { device, identity }).await {
            logging::line(format_args!("{}: {error}", vm.device_name(device)));
        }
    }
}
