//! The virtio devices: transport in vcpu-proc, queues in block-proc, and what is behind each of them.

use super::Vm;
use super::start::{MIN_RAM_BYTES, engine};
use crate::config::{BlockDevice, Device, Model, VmConfig};
use crate::helper::{Block, Helper, HelperError, STORAGE_DEADLINE};
use crate::logging;
use crate::objects::{self, Backend};
use crate::sandbox::verify::threads_named;
use ipc::block::{BlockReply, BlockRequest, BlockSetup, DiskInfo, EngineChoice, ImageFormat, Polling, io_thread_name};
use ipc::caps::{CallFd, DiskFd, KickFd};
use ipc::graph::{Backing, DeviceOptions, GraphReply, GraphRequest, NodeId, NodeSpec, OnError, Qcow2Spec};
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
    let mut numbers = NodeNumbers(0);
    for (device, config) in vm.devices().zip(&vm.config.devices) {
        let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", vm.device_name(device));
        let identity = match &config.model {
            Model::Block(block) => {
                let disk = disks
                    .get_mut(block.drive)
                    .and_then(Option::take)
                    .ok_or_else(|| failed(&"its drive is in use"))?;
                attach_disk(vm, device, disk, (block, &mut numbers), thread_of(vm, config))
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

/// Numbers of nodes that were not given yet.
struct NodeNumbers(u32);

impl NodeNumbers {
    fn next(&mut self) -> NodeId {
        self.0 += 1;
        NodeId(self.0)
    }
}

/// One image of a chain: the file that holds it, and what it is.
struct Image {
    file: NodeId,
    info: DiskInfo,
}

async fn attach_disk(
    vm: &Vm,
    device: DeviceIndex,
    (disk, mut info): (DiskFd, DiskInfo),
    (config, numbers): (&BlockDevice, &mut NodeNumbers),
    thread: IoThreadIndex,
) -> Result<DeviceIdentity, String> {
    info.serial.clone_from(&config.serial);
    let options = DeviceOptions {
        read_only: info.read_only,
        write_cache: info.write_cache,
        serial: info.serial.clone(),
        logical_block_bytes: info.logical_block_bytes,
        read_error: OnError::Report,
        write_error: OnError::Report,
    };
    let drive = &vm.config.drives[config.drive];
    let mut chain = vm.roots.chain(drive, &disk).map_err(|errno| errno.to_string())?;
    let mut images = vec![add_file(vm, numbers.next(), thread, disk, info).await?];
    let mut below: Option<NodeId> = None;
    // Down, as long as an image names one below it; then up again.
    while let Some(image) = images.last() {
        let node = numbers.next();
        let spec = spec_of(image, below);
        match ask_graph(vm, GraphRequest::Add { node, thread, spec }).await? {
            GraphReply::Added(_) => {
                below = Some(node);
                images.pop();
            }
            GraphReply::BackingNamed { name, format } => {
                let format = backing_format(&name, format.as_deref())?;
                let backing = vm.roots.open_backing(&mut chain, &name, format, drive.cache.no_flush);
                let (disk, info) = backing.map_err(|error| error.to_string())?;
                images.push(add_file(vm, numbers.next(), thread, disk, info).await?);
            }
            _ => return Err(UNEXPECTED.to_owned()),
        }
    }
    let node = below.ok_or_else(|| UNEXPECTED.to_owned())?;
    match ask_graph(vm, GraphRequest::Attach { device, node, options }).await? {
        GraphReply::Attached(identity) => Ok(identity),
        _ => Err(UNEXPECTED.to_owned()),
    }
}

const UNEXPECTED: &str = "block-proc answered with something else";

async fn add_file(vm: &Vm, node: NodeId, thread: IoThreadIndex, disk: DiskFd, info: DiskInfo) -> Result<Image, String> {
    let spec = NodeSpec::File {
        disk,
        info: info.clone(),
    };
    match ask_graph(vm, GraphRequest::Add { node, thread, spec }).await? {
        GraphReply::Added(_) => Ok(Image { file: node, info }),
        _ => Err(UNEXPECTED.to_owned()),
    }
}

fn spec_of(image: &Image, below: Option<NodeId>) -> NodeSpec {
    let (file, read_only) = (image.file, image.info.read_only);
    match image.info.format {
        ImageFormat::Raw => NodeSpec::Raw {
            file,
            offset: 0,
            bytes: None,
            read_only,
        },
        ImageFormat::Qcow2 => NodeSpec::Qcow2(Qcow2Spec {
            file,
            backing: below.map_or(Backing::FromImage, Backing::Node),
            data_file: None,
            read_only,
            discard: image.info.discard,
            lazy_refcounts: None,
            l2_cache_bytes: None,
            refcount_cache_bytes: None,
        }),
    }
}

fn backing_format(name: &str, format: Option<&str>) -> Result<ImageFormat, String> {
    match format {
        Some("raw" | "file") => Ok(ImageFormat::Raw),
        Some("qcow2") => Ok(ImageFormat::Qcow2),
        Some(other) => Err(format!(
            "the backing file {name:?} has the format {other:?}, which Bulkhead does not support"
        )),
        // To guess it from what is in there would be to believe a guest's bytes.
        None => Err(format!(
            "the image does not say which format its backing file {name:?} has: \
             say it once with qemu-img rebase -u -b FILE -F FORMAT"
        )),
    }
}

async fn ask_graph(vm: &Vm, request: GraphRequest) -> Result<GraphReply, String> {
    let reply = ask_block(vm, BlockRequest::Graph(request)).await;
    match reply.map_err(|error| error.to_string())? {
        BlockReply::Graph(reply) => Ok(reply),
        _ => Err(UNEXPECTED.to_owned()),
    }
}

async fn ask_block(vm: &Vm, request: BlockRequest) -> Result<BlockReply, HelperError> {
    let block = vm.block.get().ok_or(HelperError::Gone(ipc::Role::Block))?;
    block.ask(request).await
}
