//! A guest and its supervisor, played by the test: RAM in a memfd, virtqueues laid out by hand, eventfds for kicks and
//! interrupts, and the real block-proc executable behind them.
#![allow(dead_code, reason = "every test file uses another part")]

use bulkhead_tests::bare::Bare;
use ipc::block::{BlockEvent, BlockReply, BlockRequest, BlockSetup, DeviceStats, DiskInfo, EngineChoice, ImageFormat};
use ipc::caps::{CallFd, DiskFd, FenceFd, GuestMemRw, InflightFd, KickFd, SeccompListener};
use ipc::graph::{Backing, DeviceOptions, GraphReply, GraphRequest, NodeId, NodeReport, NodeSpec, OnError, Qcow2Spec};
use ipc::memory::{GuestRam, map_read_write};
use ipc::virtio::{
    Activation, ActivationNumber, DeviceIdentity, DeviceIndex, DeviceKind, IoThreadIndex, QueueFds, QueueSetup,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use vm_memory::{Bytes, GuestAddress};

/// What most tests run with.
pub const ENGINES: [EngineChoice; 2] = [EngineChoice::IoUring, EngineChoice::Threads];

/// Guest RAM, bytes.
pub const RAM_BYTES: u64 = 64 << 20;
/// Size of the record of requests under way, bytes.
pub const INFLIGHT_BYTES: u64 = (1 << 20) + ipc::inflight::LEDGER_BYTES;
/// Descriptors of a queue, unless a test says otherwise.
pub const QUEUE_SIZE: u16 = 128;
/// Bytes that every request slot has for data.
pub const SLOT_BYTES: u64 = 64 << 10;

const QUEUE_AREA: u64 = 0x10_0000;
const QUEUE_AREA_BYTES: u64 = 0x2_0000;
const DATA_AREA: u64 = 16 << 20;
const SLOTS_PER_QUEUE: u64 = 32;

pub const F_RO: u64 = 1 << 5;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_MQ: u64 = 1 << 12;
pub const F_DISCARD: u64 = 1 << 13;
pub const F_WRITE_ZEROES: u64 = 1 << 14;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

pub const S_OK: u8 = 0;
pub const S_IOERR: u8 = 1;
pub const S_UNSUPP: u8 = 2;
/// What the driver writes into the status byte beforehand.
pub const S_UNSET: u8 = 0x55;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Deadline for anything that must happen, milliseconds.
const DEADLINE_MS: u16 = 20_000;

/// block-proc and the guest that it serves.
pub struct Vm {
    pub helper: Bare<BlockRequest, BlockReply, BlockEvent>,
    pub ram: GuestRam,
    pub engine: EngineChoice,
    listener: SeccompListener,
    fds: Vec<Vec<(EventFd, EventFd)>>,
    activations: u64,
}

/// Guest RAM as an fd to pass on and a mapping of our own.
pub fn ram() -> (GuestMemRw, GuestRam) {
    let memfd = memfd_create(c"guest-ram", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&memfd, RAM_BYTES as i64).unwrap();
    let ours = map_read_write(GuestMemRw::new(memfd.try_clone().unwrap()), RAM_BYTES).unwrap();
    (GuestMemRw::new(memfd), ours)
}

/// A disk on the main thread.
pub fn add_device(device: DeviceIndex, queues: u16) -> BlockRequest {
    BlockRequest::AddDevice {
        device,
        kind: DeviceKind::Block,
        thread: IoThreadIndex::MAIN,
        queues,
        queue_size: 256,
    }
}

/// What block-proc begins with, with a record of its own of requests under way.
pub fn block_setup(memory: GuestMemRw, engine: EngineChoice, io_threads: u8) -> BlockSetup {
    let (fence, _) = fence_pair();
    BlockSetup {
        memory,
        ram_bytes: RAM_BYTES,
        engine,
        io_threads,
        inflight: inflight(),
        inflight_bytes: INFLIGHT_BYTES,
        fence,
    }
}

/// A record of requests under way: no test has more disks than fit.
pub fn inflight() -> InflightFd {
    let record = memfd_create(c"inflight", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&record, INFLIGHT_BYTES as i64).unwrap();
    InflightFd::new(record)
}

/// What block-proc holds, and where it shows that nothing of it is left.
pub fn fence_pair() -> (FenceFd, OwnedFd) {
    let (held, watched) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).unwrap();
    (FenceFd::new(held), watched)
}

pub fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap()
}

fn duplicate(eventfd: &EventFd) -> std::os::fd::OwnedFd {
    eventfd.as_fd().try_clone_to_owned().unwrap()
}

impl Vm {
    /// Starts and seals block-proc with one device per entry: its number of queues.
    pub fn start(engine: EngineChoice, queues: &[u16]) -> Self {
        let (memory, ram) = ram();
        Self::start_on(engine, queues, memory, ram)
    }

    pub fn start_on(engine: EngineChoice, queues: &[u16], memory: GuestMemRw, ram: GuestRam) -> Self {
        let disks = (0..).map(DeviceIndex).zip(queues);
        let disks = disks.map(|(device, queues)| add_device(device, *queues)).collect();
        Self::start_devices(engine, 0, disks, memory, ram)
    }

    /// As the other two, with any devices on any threads.
    pub fn start_devices(
        engine: EngineChoice,
        io_threads: u8,
        devices: Vec<BlockRequest>,
        memory: GuestMemRw,
        ram: GuestRam,
    ) -> Self {
        let mut helper = Bare::start(env!("CARGO_BIN_EXE_block-proc"));
        let setup = block_setup(memory, engine, io_threads);
        helper.ask(BlockRequest::Setup(setup)).expect("Setup");
        let mut fds = Vec::new();
        for request in devices {
            let BlockRequest::AddDevice { device, queues, .. } = request else {
                panic!("{request:?} adds no device")
            };
            helper.ask(request).expect("AddDevice");
            let pairs: Vec<_> = (0..queues).map(|_| (eventfd(), eventfd())).collect();
            for pairs in pairs.chunks(8) {
                let queues = pairs
                    .iter()
                    .map(|(kick, call)| QueueFds {
                        kick: KickFd::new(duplicate(kick)),
                        call: CallFd::new(duplicate(call)),
                    })
                    .collect();
                helper
                    .ask(BlockRequest::AddQueues { device, queues })
                    .expect("AddQueues");
            }
            fds.push(pairs);
        }
        let Ok(BlockReply::Sealed { listener, engine, .. }) = helper.ask(BlockRequest::Seal) else {
            panic!("not sealed")
        };
        Self {
            helper,
            ram,
            engine,
            listener,
            fds,
            activations: 0,
        }
    }

    pub fn attach(&mut self, device: u8, file: &File, info: DiskInfo) -> DeviceIdentity {
        self.attach_in(IoThreadIndex::MAIN, device, file, info)
    }

    /// As `attach`, for a device of another thread. Its nodes have the numbers 2n (the file) and 2n + 1.
    pub fn attach_in(&mut self, thread: IoThreadIndex, device: u8, file: &File, info: DiskInfo) -> DeviceIdentity {
        let (file_node, node) = (NodeId(u32::from(device) * 2), NodeId(u32::from(device) * 2 + 1));
        let options = options(&info);
        self.add(thread, file_node, file_spec(file, info.clone()));
        let spec = match info.format {
            ImageFormat::Raw => raw_spec(file_node, info.read_only),
            ImageFormat::Qcow2 => NodeSpec::Qcow2(qcow2_spec(file_node, Backing::FromImage)),
        };
        self.add(thread, node, spec);
        let attach = GraphRequest::Attach {
            device: DeviceIndex(device),
            node,
            options,
        };
        match self.graph(attach) {
            Ok(GraphReply::Attached(identity)) => identity,
            other => panic!("Attach: {other:?}"),
        }
    }

    pub fn graph(&mut self, request: GraphRequest) -> Result<GraphReply, ipc::Failure> {
        self.helper.ask(BlockRequest::Graph(request)).map(|reply| match reply {
            BlockReply::Graph(reply) => reply,
            other => panic!("no answer of the graph: {other:?}"),
        })
    }

    pub fn add(&mut self, thread: IoThreadIndex, node: NodeId, spec: NodeSpec) -> NodeReport {
        match self.graph(GraphRequest::Add { node, thread, spec }) {
            Ok(GraphReply::Added(report)) => report,
            other => panic!("Add: {other:?}"),
        }
    }

    /// The driver of a device: sets up all its queues and activates.
    pub fn activate(&mut self, device: u8, features: u64) -> Vec<Queue> {
        let mut queues: Vec<Queue> = (0..self.fds[usize::from(device)].len())
            .map(|queue| self.queue(device, queue as u16))
            .collect();
        queues.iter_mut().for_each(Queue::clear);
        self.activate_with(device, features, &queues).expect("Activate");
        queues
    }

    pub fn queue(&self, device: u8, queue: u16) -> Queue {
        let (kick, call) = &self.fds[usize::from(device)][usize::from(queue)];
        let number = u64::from(device) * 4 + u64::from(queue);
        let base = QUEUE_AREA + number * QUEUE_AREA_BYTES;
        Queue {
            ram: self.ram.clone(),
            setup: QueueSetup {
                index: queue,
                size: QUEUE_SIZE,
                descriptor_table: base,
                avail_ring: base + 0x8000,
                used_ring: base + 0xa000,
            },
            requests: base + 0xe000,
            data: DATA_AREA + number * SLOTS_PER_QUEUE * SLOT_BYTES,
            kick: duplicate(kick).into_event(),
            call: duplicate(call).into_event(),
            avail: 0,
            seen: 0,
        }
    }

    pub fn activate_with(&mut self, device: u8, features: u64, queues: &[Queue]) -> Result<BlockReply, ipc::Failure> {
        self.activations += 1;
        self.helper.ask(BlockRequest::Activate {
            device: DeviceIndex(device),
            number: ActivationNumber(self.activations),
            activation: Activation {
                features: features | F_VERSION_1,
                queues: queues.iter().map(|queue| queue.setup).collect(),
            },
        })
    }

    pub fn done(&mut self, request: BlockRequest) {
        match self.helper.ask(request) {
            Ok(BlockReply::Done) => {}
            other => panic!("not Done: {other:?}"),
        }
    }

    pub fn reset(&mut self, device: u8) {
        self.done(BlockRequest::Reset {
            device: DeviceIndex(device),
        });
    }

    pub fn stats(&mut self) -> Vec<DeviceStats> {
        match self.helper.ask(BlockRequest::GetStats) {
            Ok(BlockReply::Stats(stats)) => stats.into_values().collect(),
            other => panic!("not Stats: {other:?}"),
        }
    }

    /// A device with one queue on a file, ready to go.
    pub fn with_disk(engine: EngineChoice, file: &File, info: DiskInfo, features: u64) -> (Self, Queue) {
        let mut vm = Self::start(engine, &[1]);
        vm.attach(0, file, info);
        let queue = vm.activate(0, features).remove(0);
        (vm, queue)
    }
}

impl Drop for Vm {
    /// No test may have made block-proc do what its policy does not allow.
    fn drop(&mut self) {
        let mut fds = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        let violated = poll(&mut fds, PollTimeout::ZERO).is_ok()
            && fds[0]
                .revents()
                .is_some_and(|events| events.contains(PollFlags::POLLIN));
        if violated {
            let number = violation(&self.listener);
            if std::thread::panicking() {
                eprintln!("block-proc is held at system call {number}");
            } else {
                panic!("block-proc tried system call {number}");
            }
        }
        if std::thread::panicking() {
            eprintln!("log: {:?}", self.helper.log_lines());
        }
    }
}

/// The number of the system call that a sealed process is held at.
pub fn violation(listener: &SeccompListener) -> i32 {
    use std::os::fd::AsRawFd;
    // struct seccomp_notif: id, pid, flags, then struct seccomp_data, which starts with the number.
    let mut notification = [0u8; 80];
    // SAFETY: SECCOMP_IOCTL_NOTIF_RECV writes the 80 bytes of struct seccomp_notif.
    let result = unsafe { libc::ioctl(listener.as_fd().as_raw_fd(), 0xc050_2100, notification.as_mut_ptr()) };
    assert_eq!(result, 0, "SECCOMP_IOCTL_NOTIF_RECV");
    i32::from_ne_bytes(std::array::from_fn(|i| notification[16 + i]))
}

trait IntoEvent {
    fn into_event(self) -> EventFd;
}
impl IntoEvent for std::os::fd::OwnedFd {
    fn into_event(self) -> EventFd {
        // SAFETY: the callers made it from an EventFd.
        unsafe { EventFd::from_owned_fd(self) }
    }
}

/// A descriptor without its flags for chaining.
#[derive(Debug, Clone, Copy)]
pub struct Desc {
    pub address: u64,
    pub bytes: u32,
    pub flags: u16,
}

pub fn readable(address: u64, bytes: u32) -> Desc {
    Desc {
        address,
        bytes,
        flags: 0,
    }
}

pub fn writable(address: u64, bytes: u32) -> Desc {
    Desc {
        address,
        bytes,
        flags: WRITE,
    }
}

/// One virtqueue, seen from the driver. Slot `n` uses descriptors `3n..3n+3`.
pub struct Queue {
    pub ram: GuestRam,
    pub setup: QueueSetup,
    requests: u64,
    data: u64,
    pub kick: EventFd,
    pub call: EventFd,
    pub avail: u16,
    pub seen: u16,
}

impl Queue {
    /// As a driver leaves its rings before DRIVER_OK.
    pub fn clear(&mut self) {
        let zeroes = vec![0; QUEUE_AREA_BYTES as usize];
        self.ram
            .write_slice(&zeroes, GuestAddress(self.setup.descriptor_table))
            .unwrap();
        let _ = self.call.read();
        (self.avail, self.seen) = (0, 0);
    }

    pub fn header_at(&self, slot: u16) -> u64 {
        self.requests + u64::from(slot) * 64
    }

    pub fn status_at(&self, slot: u16) -> u64 {
        self.header_at(slot) + 32
    }

    pub fn data_at(&self, slot: u16) -> u64 {
        self.data + u64::from(slot) * SLOT_BYTES
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn get(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        self.ram.read_slice(&mut buffer, GuestAddress(address)).unwrap();
        buffer
    }

    pub fn status(&self, slot: u16) -> u8 {
        self.get(self.status_at(slot), 1)[0]
    }

    pub fn write_header(&self, slot: u16, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.put(self.header_at(slot), &header);
        self.put(self.status_at(slot), &[S_UNSET]);
    }

    pub fn write_descriptor(&self, table: u64, index: u16, desc: Desc, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&desc.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&desc.bytes.to_le_bytes());
        bytes[12..14].copy_from_slice(&desc.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(table + u64::from(index) * 16, &bytes);
    }

    /// Lays a chain out in consecutive descriptors from `head`.
    pub fn write_chain(&self, table: u64, head: u16, chain: &[Desc]) {
        for (i, desc) in (0..).zip(chain) {
            let last = usize::from(i) + 1 == chain.len();
            let flags = if last { desc.flags } else { desc.flags | NEXT };
            self.write_descriptor(table, head + i, Desc { flags, ..*desc }, head + i + 1);
        }
    }

    /// Makes a chain available; the device sees it after [`Self::publish`].
    pub fn offer(&mut self, head: u16) {
        let place = self.setup.avail_ring + 4 + u64::from(self.avail % self.setup.size) * 2;
        self.put(place, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
    }

    pub fn publish(&self) {
        fence(Ordering::SeqCst);
        self.ram
            .store(
                self.avail.to_le(),
                GuestAddress(self.setup.avail_ring + 2),
                Ordering::SeqCst,
            )
            .unwrap();
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// A request in the usual layout: header, data, status.
    pub fn prepare(&mut self, slot: u16, kind: u32, sector: u64, data: Option<Desc>) {
        self.write_header(slot, kind, sector);
        let chain: Vec<Desc> = [
            Some(readable(self.header_at(slot), 16)),
            data,
            Some(writable(self.status_at(slot), 1)),
        ]
        .into_iter()
        .flatten()
        .collect();
        let head = slot * 3;
        self.write_chain(self.setup.descriptor_table, head, &chain);
        self.offer(head);
    }

    pub fn used_index(&self) -> u16 {
        u16::from_le(
            self.ram
                .load(GuestAddress(self.setup.used_ring + 2), Ordering::SeqCst)
                .unwrap(),
        )
    }

    /// The next used element, if there is one: head and length.
    pub fn next_used(&mut self) -> Option<(u32, u32)> {
        if self.used_index() == self.seen {
            return None;
        }
        fence(Ordering::SeqCst);
        let place = self.setup.used_ring + 4 + u64::from(self.seen % self.setup.size) * 8;
        let bytes = self.get(place, 8);
        self.seen = self.seen.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Some((word(0), word(4)))
    }

    /// Waits for the interrupt and the next used element.
    pub fn wait_used(&mut self) -> (u32, u32) {
        loop {
            if let Some(used) = self.next_used() {
                return used;
            }
            assert!(self.wait_call(DEADLINE_MS), "no interrupt in time");
        }
    }

    /// Waits for the interrupt and takes it.
    pub fn wait_call(&self, milliseconds: u16) -> bool {
        let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
        let came = poll(&mut fds, PollTimeout::from(milliseconds)).unwrap() > 0;
        if came {
            self.call.read().unwrap();
        }
        came
    }

    /// Sends one request in slot 0 and waits: status and used length.
    pub fn ask(&mut self, kind: u32, sector: u64, data: Option<Desc>) -> (u8, u32) {
        self.prepare(0, kind, sector, data);
        self.publish();
        self.kick();
        let (head, length) = self.wait_used();
        assert_eq!(head, 0);
        (self.status(0), length)
    }

    /// Sends a chain that the test laid out itself from descriptor 0, with slot 0's status.
    pub fn ask_chain(&mut self, chain: &[Desc]) -> (u8, u32) {
        self.write_chain(self.setup.descriptor_table, 0, chain);
        self.offer(0);
        self.publish();
        self.kick();
        let (head, length) = self.wait_used();
        assert_eq!(head, 0);
        (self.status(0), length)
    }

    pub fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.put(self.data_at(0), bytes);
        self.ask(T_OUT, sector, Some(readable(self.data_at(0), bytes.len() as u32)))
            .0
    }

    pub fn read(&mut self, sector: u64, bytes: usize) -> (u8, Vec<u8>) {
        self.put(self.data_at(0), &vec![0xee; bytes]);
        let (status, _) = self.ask(T_IN, sector, Some(writable(self.data_at(0), bytes as u32)));
        (status, self.get(self.data_at(0), bytes))
    }

    /// A discard or write-zeroes request of (sector, sectors, flags) ranges.
    pub fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.put(self.data_at(0), &bytes);
        self.ask(kind, 0, Some(readable(self.data_at(0), bytes.len() as u32))).0
    }
}

/// A file of `bytes` that reads as zeroes, without a name.
pub fn image(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

/// A read-write disk with a write cache.
pub fn info(bytes: u64) -> DiskInfo {
    DiskInfo {
        format: ImageFormat::Raw,
        bytes,
        is_block_device: false,
        read_only: false,
        discard: true,
        direct: false,
        no_flush: false,
        write_cache: true,
        serial: "bulkhead-0001".into(),
        logical_block_bytes: 512,
    }
}

/// How a device uses a disk that is described so.
pub fn options(info: &DiskInfo) -> DeviceOptions {
    DeviceOptions {
        read_only: info.read_only,
        write_cache: info.write_cache,
        serial: info.serial.clone(),
        logical_block_bytes: info.logical_block_bytes,
        read_error: OnError::Report,
        write_error: OnError::Report,
    }
}

pub fn file_spec(file: &File, info: DiskInfo) -> NodeSpec {
    NodeSpec::File {
        disk: DiskFd::new(file.try_clone().unwrap().into()),
        info,
    }
}

pub fn raw_spec(file: NodeId, read_only: bool) -> NodeSpec {
    NodeSpec::Raw {
        file,
        offset: 0,
        bytes: None,
        read_only,
    }
}

pub fn qcow2_spec(file: NodeId, backing: Backing) -> Qcow2Spec {
    Qcow2Spec {
        file,
        backing,
        data_file: None,
        read_only: false,
        discard: true,
        lazy_refcounts: None,
        l2_cache_bytes: None,
        refcount_cache_bytes: None,
        key: None,
        may_be_locked: false,
    }
}

/// Bytes that differ from sector to sector.
pub fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}
