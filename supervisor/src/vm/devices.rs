//! The virtio devices: transport in vcpu-proc, queues in block-proc, and what is behind each of them.

use super::block_proc::Stage;
use super::start::{MIN_RAM_BYTES, disk_error, engine};
use super::{Vm, graph};
use crate::config::{BlockDevice, Device, Model, VmConfig};
use crate::graph::error::GraphError;
use crate::graph::node;
use crate::graph::open::Opened;
use crate::graph::options::NodeOptions;
use crate::graph::settings::Settings;
use crate::helper::{Block, Helper, HelperError, STORAGE_DEADLINE};
use crate::logging;
use crate::objects::{self, Backend};
use crate::sandbox::verify::threads_named;
use ipc::block::{BlockReply, BlockRequest, BlockSetup, EngineChoice, Polling, io_thread_name};
use ipc::caps::{CallFd, FenceFd, KickFd};
use ipc::vcpu::VcpuRequest;
use ipc::virtio::{DeviceIdentity, DeviceIndex, DeviceKind, IoThreadIndex, QUEUE_FDS_PER_MESSAGE, QueueFds};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
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
    let has_nodes = vm.config.trees().next().is_some();
    vm.config.guest.is_none() || !vm.config.devices.is_empty() || has_nodes || has_threads()
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

/// Starts block-proc with all threads and devices, and seals it. It has no nodes yet.
pub async fn start_block(vm: &Rc<Vm>) -> Result<(), String> {
    let (fence, held) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|errno| format!("socketpair: {errno}"))?;
    let queues = clones(&vm.block.queues.borrow()).map_err(|error| error.to_string())?;
    let helper: Rc<Helper<Block>> = vm.start_helper().await?;
    vm.block.started(Rc::clone(&helper), fence);
    let failed = |error: HelperError| error.to_string();
    let threads = vm.objects.borrow().threads();
    let setup = BlockSetup {
        memory: vm.ram.read_write.try_clone().map_err(|error| error.to_string())?,
        ram_bytes: vm.config.ram_bytes.max(MIN_RAM_BYTES),
        engine: engine(&vm.config)?,
        io_threads: threads,
        inflight: vm.block.inflight.0.try_clone().map_err(|error| error.to_string())?,
        inflight_bytes: vm.block.inflight.1,
        fence: FenceFd::new(held),
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
        let request = BlockRequest::SetPolling { thread, polling };
        helper.ask(request).await.map_err(failed)?;
    }
    if engine(&vm.config)? == EngineChoice::Auto && details.engine == Some(EngineChoice::Threads) {
        logging::line("this host offers no io_uring: disks are served by threads, which costs speed");
    }
    Ok(())
}

/// The same eventfds once more.
fn clones(devices: &[DeviceQueues]) -> std::io::Result<Vec<DeviceQueues>> {
    let clone = |queue: &QueueFds| {
        Ok(QueueFds {
            kick: queue.kick.try_clone()?,
            call: queue.call.try_clone()?,
        })
    };
    let devices = devices.iter();
    devices.map(|queues| queues.iter().map(clone).collect()).collect()
}

/// Size of the record of the disks' requests under way, bytes.
pub fn inflight_bytes(config: &VmConfig) -> u64 {
    let disks = config.devices.iter().filter(|device| kind(device) == DeviceKind::Block);
    ipc::inflight::total_bytes(disks.map(|device| (queue_count(device), queue_size(device))))
}

/// Starts block-proc if nothing has needed it so far. Whoever stops or resets the machine finds it there, or not.
pub async fn need_block(vm: &Rc<Vm>) -> Result<(), String> {
    if vm.block.stage() != Stage::Absent && vm.block.stage() != Stage::Starting {
        return Ok(());
    }
    let _turn = vm.change.enter().await;
    if vm.block.stage() != Stage::Absent {
        return Ok(());
    }
    vm.block.set_stage(Stage::Starting);
    start_block(vm).await?;
    vm.block.set_stage(Stage::Serving);
    Ok(())
}

/// Says how a thread polls. It may just be waiting for the host's storage, because the machine is being stopped.
pub async fn set_polling(vm: &Vm, thread: IoThreadIndex, polling: Polling) -> Result<(), HelperError> {
    let request = || Some(BlockRequest::SetPolling { thread, polling });
    let asked = vm.block.ask_surely(STORAGE_DEADLINE, request).await;
    match asked {
        Some(Ok(_)) => Ok(()),
        Some(Err(failure)) => Err(failure.into()),
        None => Err(HelperError::Gone(ipc::Role::Block)),
    }
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

/// Creates the nodes of the command line, gives block-proc what is behind each device, and vcpu-proc what its driver will
/// see. A drive that no device uses stays open and locked.
pub async fn attach(vm: &Vm, disks: Vec<Opened>) -> Result<(), String> {
    create_nodes(vm, disks).await?;
    for (device, config) in vm.devices().zip(&vm.config.devices) {
        let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", vm.device_name(device));
        let identity = match &config.model {
            Model::Block(block) => attach_disk(vm, device, block).await.map_err(|error| {
                let drive = vm.config.drives.iter().find(|drive| drive.backend.id == block.drive);
                drive.map_or_else(|| failed(&error.line()), |drive| disk_error(&drive.node, &error))
            })?,
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
                let kept = source.try_clone().map_err(|error| failed(&error))?;
                vm.block.rng_sources.borrow_mut().insert(device, (kept, rng.limit));
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
        vm.block.shown.borrow_mut().insert(device, identity.clone());
        vm.ask_vcpus(VcpuRequest::ConfigureDevice { device, identity })
            .await
            .map_err(|error| failed(&error))?;
    }
    Ok(())
}

async fn create_nodes(vm: &Vm, disks: Vec<Opened>) -> Result<(), String> {
    let _turn = vm.graph_change.enter().await;
    let threads = threads_of_trees(vm);
    let drives = std::iter::repeat_n(None, vm.config.blockdevs.len()).chain(vm.config.drives.iter().map(Some));
    for (((tree, opened), thread), drive) in vm.config.trees().zip(disks).zip(threads).zip(drives) {
        let failed = |error: &GraphError| disk_error(tree, error);
        let settings = match drive {
            Some(_) => Settings::of_drive(&tree.common),
            None => Settings::of_root(&tree.common),
        };
        if let Some(drive) = drive {
            let checked = vm.graph.borrow().check_drive_id(&drive.backend.id);
            checked.map_err(|error| failed(&error))?;
        }
        let root = graph::add(vm, tree, settings, opened, thread)
            .await
            .map_err(|error| failed(&error))?;
        let described = graph::change_description(vm, |graph| {
            match drive {
                Some(drive) => graph.backends.push(node::Backend::of_drive(&drive.backend, root)),
                None => graph.own(root),
            }
            Ok(())
        });
        described.map_err(|error| failed(&error))?;
    }
    Ok(())
}

/// The thread of each tree: that of the device which uses it, directly or by way of others.
fn threads_of_trees(vm: &Vm) -> Vec<IoThreadIndex> {
    let trees: Vec<&NodeOptions> = vm.config.trees().collect();
    let blockdevs = vm.config.blockdevs.len();
    let mut threads = vec![IoThreadIndex::MAIN; trees.len()];
    let place_of = |name: &str| {
        let drive = vm.config.drives.iter().position(|drive| drive.backend.id == name);
        let has = |tree: &&NodeOptions| tree.nodes().iter().any(|node| node.name.as_deref() == Some(name));
        drive
            .map(|place| blockdevs + place)
            .or_else(|| trees.iter().position(has))
    };
    for device in &vm.config.devices {
        let Model::Block(block) = &device.model else { continue };
        let thread = thread_of(vm, device);
        let mut open: Vec<&str> = vec![&block.drive];
        let mut seen = Vec::new();
        while let Some(name) = open.pop() {
            let Some(place) = place_of(name).filter(|place| !seen.contains(place)) else {
                continue;
            };
            seen.push(place);
            threads[place] = thread;
            open.extend(trees[place].references());
        }
    }
    threads
}

async fn attach_disk(vm: &Vm, device: DeviceIndex, config: &BlockDevice) -> Result<DeviceIdentity, GraphError> {
    let _turn = vm.graph_change.enter().await;
    let mut backend = {
        let graph = vm.graph.borrow();
        match graph.backend(&config.drive) {
            Some(backend) => backend.clone(),
            None => node::Backend::of_node(graph.lookup_any(&config.drive)?.id),
        }
    };
    backend.write_cache = config.write_cache.unwrap_or(backend.write_cache);
    backend.read_error = config.read_error.unwrap_or(backend.read_error);
    backend.write_error = config.write_error.unwrap_or(backend.write_error);
    graph::attach(vm, device, backend).await
}

async fn ask_block(vm: &Vm, request: BlockRequest) -> Result<BlockReply, HelperError> {
    let block = vm.block.get().ok_or(HelperError::Gone(ipc::Role::Block))?;
    block.ask(request).await
}
