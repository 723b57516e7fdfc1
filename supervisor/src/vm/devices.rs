//! The virtio devices: transport in vcpu-proc, queues in block-proc, and what is behind each of them.

use super::Vm;
use super::start::{MIN_RAM_BYTES, engine};
use crate::config::{BlockDevice, Device, Model, VmConfig};
use crate::helper::{Block, Helper, HelperError, STORAGE_DEADLINE};
use crate::logging;
use crate::objects::{self, Backend};
use crate::sandbox::verify::threads_named;
use ipc::block::{BlockReply, BlockRequest, BlockSetup, DiskInfo, EngineChoice, Polling, io_thread_name};
use ipc::caps::{CallFd, DiskFd, KickFd};
use ipc::vcpu::VcpuRequest;
use ipc::virtio::{DeviceIdentity, DeviceIndex, DeviceKind, IoThreadIndex, QUEUE_FDS_PER_MESSAGE, QueueFds};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

/// Descriptors of a virtio-rng device's queue, as QEMU has it.
const RNG_QUEUE_SIZE: u16 = 8;

/// The eventfds of a device's queues.
pub type DeviceQueues = Vec<QueueFds>;

/// Whether anything needs block-proc from the start; without a guest it is what there is. Otherwise it comes when an iothread does.
pub fn need_block_proc(vm: &Vm) -> bool {
    let has_threads = || {
        let objects = vm.objects.borrow();
        objects
            .iter()
            .any(|object| matches!(object.backend, Backend::IoThread { .. }))
    };
    vm.config.guest.is_none() || !vm.config.devices.is_empty() || has_threads()
}

/// What both sides call the device.
pub fn kind(device: &Device) -> DeviceKind {
    match device.model {
        Model::Block(_) => DeviceKind::Block,
        Model::Rng(_) => DeviceKind::Rng,
    }
}

/// Largest size of its queues.
pub fn queue_size(device: &Device) -> u16 {
    match &device.model {
        Model::Block(block) => block.queue_size,
        Model::Rng(_) => RNG_QUEUE_SIZE,
    }
}

fn queue_count(device: &Device) -> u16 {
    match &device.model {
        Model::Block(block) => block.queues,
        Model::Rng(_) => 1,
    }
}

/// The eventfds of all queues of all devices, twice: for the transport and for the device.
pub fn queue_fds(config: &VmConfig) -> Result<Vec<(DeviceQueues, DeviceQueues)>, String> {
    let event = || -> Result<(OwnedFd, OwnedFd), std::io::Error> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let event = event.as_fd().try_clone_to_owned()?;
        Ok((event.try_clone()?, event))
    };
    let pair = || -> Result<(QueueFds, QueueFds), std::io::Error> {
        let (kick, kick2) = event()?;
        let (call, call2) = event()?;
        Ok((
            QueueFds {
                kick: KickFd::new(kick),
                call: CallFd::new(call),
            },
            QueueFds {
                kick: KickFd::new(kick2),
                call: CallFd::new(call2),
            },
        ))
    };
    let device = |device: &Device| (0..queue_count(device)).map(|_| pair()).collect::<Result<Vec<_>, _>>();
    let devices = config.devices.iter().map(device).collect::<Result<Vec<_>, _>>();
    let devices = devices.map_err(|error| format!("eventfds of the virtqueues: {error}"))?;
    Ok(devices.into_iter().map(|queues| queues.into_iter().unzip()).collect())
}

/// Pieces that fit into one message.
pub fn chunked(queues: DeviceQueues) -> Vec<DeviceQueues> {
    let mut queues = queues.into_iter().peekable();
    let mut chunks = Vec::new();
    while queues.peek().is_some() {
        chunks.push(queues.by_ref().take(QUEUE_FDS_PER_MESSAGE).collect());
    }
    chunks
}

/// Starts block-proc with all threads and devices, and seals it.
pub async fn start_block(vm: &Rc<Vm>, queues: Vec<DeviceQueues>) -> Result<(), String> {
    let helper: Rc<Helper<Block>> = vm.start_helper().await?;
    let _ = vm.block.set(Rc::clone(&helper));
    let failed = |error: HelperError| error.to_string();
    let threads = vm.objects.borrow().threads();
    let setup = BlockSetup {
        memory: vm.ram.read_write.try_clone().map_err(|error| error.to_string())?,
        ram_bytes: vm.config.ram_bytes.max(MIN_RAM_BYTES),
        engine: engine(&vm.config.drives)?,
        io_threads: threads,
    };
    helper.ask(BlockRequest::Setup(setup)).await.map_err(failed)?;
    for ((device, config), queues) in vm.devices().zip(&vm.config.devices).zip(queues) {
        let request = BlockRequest::AddDevice {
            device,
            kind: kind(config),
            thread: thread_of(vm, config),
            queues: queues.len() as u16,
            queue_size: queue_size(config),
        };
        helper.ask(request).await.map_err(failed)?;
        for queues in chunked(queues) {
            helper
                .ask(BlockRequest::AddQueues { device, queues })
                .await
                .map_err(failed)?;
        }
    }
    let details = vm.seal_helper(&helper).await?;
    let thread_ids = (1..=threads).map(|number| {
        let name = io_thread_name(IoThreadIndex(number));
        threads_named(helper.pid, &name).first().copied()
    });
    vm.io_threads.replace(thread_ids.collect());
    let polled: Vec<(IoThreadIndex, Polling)> = vm
        .objects
        .borrow()
        .iter()
        .filter_map(|object| object.backend.io_thread())
        .collect();
    for (thread, polling) in polled {
        set_polling(vm, thread, polling).await.map_err(failed)?;
    }
    if engine(&vm.config.drives)? == EngineChoice::Auto && details.engine == Some(EngineChoice::Threads) {
        logging::line("this host offers no io_uring: disks are served by threads, which costs speed");
    }
    Ok(())
}

/// Says how a thread polls. It may just be waiting for the host's storage, because the machine is being stopped.
pub async fn set_polling(vm: &Vm, thread: IoThreadIndex, polling: Polling) -> Result<(), HelperError> {
    let block = vm.block.get().ok_or(HelperError::Gone(ipc::Role::Block))?;
    let request = BlockRequest::SetPolling { thread, polling };
    block.ask_within(STORAGE_DEADLINE, request).await.map(drop)
}

fn thread_of(vm: &Vm, device: &Device) -> IoThreadIndex {
    let Model::Block(BlockDevice {
        io_thread: Some(id), ..
    }) = &device.model
    else {
        return IoThreadIndex::MAIN;
    };
    let found = vm.objects.borrow().io_thread(id);
    found.map_or(IoThreadIndex::MAIN, |(thread, _)| thread)
}

/// Gives block-proc what is behind each device, and vcpu-proc what its driver will see. A drive that no device uses stays
/// open and locked.
pub async fn attach(vm: &Vm, disks: Vec<(DiskFd, DiskInfo)>) -> Result<(), String> {
    let mut disks: Vec<_> = disks.into_iter().map(Some).collect();
    for (device, config) in vm.devices().zip(&vm.config.devices) {
        let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", vm.device_name(device));
        let identity = match &config.model {
            Model::Block(block) => {
                let (disk, info) = disks
                    .get_mut(block.drive)
                    .and_then(Option::take)
                    .ok_or_else(|| failed(&"its drive is in use"))?;
                attach_disk(vm, device, block, disk, info)
                    .await
                    .map_err(|error| format!("-drive file={}: {error}", vm.config.drives[block.drive].file.display()))?
            }
            Model::Rng(rng) => {
                let source = match &rng.backend {
                    Some(id) => vm
                        .objects
                        .borrow()
                        .get(id)
                        .and_then(Backend::rng_source)
                        .map(ipc::caps::RngSourceFd::try_clone)
                        .transpose()
                        .map_err(|error| failed(&error))?,
                    None => None,
                };
                let source = match source {
                    Some(source) => source,
                    None => objects::system_source().map_err(|error| failed(&error))?,
                };
                let request = BlockRequest::AttachRng {
                    device,
                    source,
                    limit: rng.limit,
                };
                match ask_block(vm, request).await.map_err(|error| failed(&error))? {
                    BlockReply::RngAttached(identity) => identity,
                    _ => return Err(failed(&"block-proc answered with something else")),
                }
            }
        };
        vm.ask_vcpus(VcpuRequest::ConfigureDevice { device, identity })
            .await
            .map_err(|error| failed(&error))?;
    }
    Ok(())
}

async fn attach_disk(
    vm: &Vm,
    device: DeviceIndex,
    config: &BlockDevice,
    disk: DiskFd,
    mut info: DiskInfo,
) -> Result<DeviceIdentity, String> {
    info.serial.clone_from(&config.serial);
    let drive = &vm.config.drives[config.drive];
    let mut chain = vm.roots.chain(drive, &disk).map_err(|errno| errno.to_string())?;
    let mut request = BlockRequest::AttachDisk { device, disk, info };
    loop {
        let reply = ask_block(vm, request).await;
        match reply.map_err(|error| error.to_string())? {
            BlockReply::DiskAttached(identity) => return Ok(identity),
            BlockReply::BackingNeeded { name, format } => {
                let backing = vm.roots.open_backing(&mut chain, &name, format, drive.cache.no_flush);
                let (disk, info) = backing.map_err(|error| error.to_string())?;
                request = BlockRequest::AddBacking { device, disk, info };
            }
            _ => return Err("block-proc answered with something else".to_owned()),
        }
    }
}

async fn ask_block(vm: &Vm, request: BlockRequest) -> Result<BlockReply, HelperError> {
    let block = vm.block.get().ok_or(HelperError::Gone(ipc::Role::Block))?;
    block.ask(request).await
}
