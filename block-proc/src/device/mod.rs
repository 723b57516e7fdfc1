//! A virtio-blk device: its virtqueues, the disk behind it, what its driver sees and what is counted.
//!
//! Data flows one way: [`virtqueue`] yields chains, [`request`] makes checked requests of them, [`serve`] runs them on the
//! disk's node, and the answer goes back through the virtqueue.

pub mod chain;
pub mod inflight;
pub mod request;
pub mod rng;
pub mod serve;
pub mod stats;
pub mod virtqueue;

use crate::node::Node;
use crate::node::edge::Edge;
use crate::throttle::Member;
use inflight::Notes;
use ipc::Failure;
use ipc::block::{BlockEvent, DeviceStats, ErrorAction, IoKind};
use ipc::caps::CallFd;
use ipc::graph::{DeviceOptions, OnError};
use ipc::memory::GuestRam;
use ipc::virtio::{Activation, ActivationNumber, DeviceIdentity, DeviceIndex};
use nix::errno::Errno;
use request::{Geometry, MAX_RANGE_SECTORS, MAX_RANGES, Request, SECTOR_BYTES};
use serve::Answer;
use stats::{Accounts, Ending};
use std::rc::Rc;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_OK,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtqueue::{BrokenQueue, LOOK_AHEAD, VirtQueue};

/// Data segments of one request that we ask drivers to stay below: with header and status, a queue of 128 descriptors.
const SEG_MAX: u32 = 126;
/// Length of a serial number, bytes.
const SERIAL_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;
/// `struct virtio_blk_config` up to the write-zeroes fields, bytes.
const CONFIG_BYTES: usize = 60;
/// At least this long between two IoError events of one device.
const IO_ERROR_INTERVAL: Duration = Duration::from_secs(1);

/// What is behind a device.
pub struct Disk {
    /// To the top node of its graph.
    pub edge: Rc<Edge>,
    /// What is checked of every request.
    pub geometry: Geometry,
    /// Answer to VIRTIO_BLK_T_GET_ID, padded with zeroes.
    pub serial: [u8; SERIAL_BYTES],
    /// The guest is shown a volatile write cache.
    pub write_cache: bool,
    /// What becomes of a failed read.
    pub read_error: OnError,
    /// What becomes of any other that failed.
    pub write_error: OnError,
}

impl Disk {
    /// A disk as the supervisor describes it.
    ///
    /// # Errors
    /// One line that names what the description has wrong.
    pub fn new(edge: Rc<Edge>, options: &DeviceOptions) -> Result<Self, Failure> {
        let (block_sectors, serial) = Self::check(options)?;
        Ok(Self {
            geometry: Geometry {
                capacity_sectors: whole_blocks(edge.bytes(), block_sectors),
                block_sectors,
                read_only: options.read_only,
            },
            edge,
            serial,
            write_cache: options.write_cache,
            read_error: options.read_error,
            write_error: options.write_error,
        })
    }

    /// The same on a node that may have another size now; nothing, if it has not.
    fn resized(&self) -> Option<Self> {
        let capacity_sectors = whole_blocks(self.edge.bytes(), self.geometry.block_sectors);
        (capacity_sectors != self.geometry.capacity_sectors).then(|| Self {
            edge: self.edge.clone(),
            geometry: Geometry {
                capacity_sectors,
                ..self.geometry
            },
            serial: self.serial,
            write_cache: self.write_cache,
            read_error: self.read_error,
            write_error: self.write_error,
        })
    }

    fn on_error(&self, kind: Option<IoKind>) -> OnError {
        match kind {
            Some(IoKind::Read) => self.read_error,
            Some(_) => self.write_error,
            None => OnError::Report,
        }
    }

    /// Whether a request of that kind may have to be tried again.
    pub fn may_stop(&self, kind: Option<IoKind>) -> bool {
        matches!(self.on_error(kind), OnError::Stop | OnError::Enospc)
    }

    fn action(&self, kind: Option<IoKind>, errno: Errno) -> ErrorAction {
        match (self.on_error(kind), errno) {
            (OnError::Ignore, _) => ErrorAction::Ignore,
            (OnError::Stop, _) | (OnError::Enospc, Errno::ENOSPC) => ErrorAction::Stop,
            (OnError::Report | OnError::Enospc, _) => ErrorAction::Report,
        }
    }

    /// Logical block size in sectors, and serial number.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn check(options: &DeviceOptions) -> Result<(u64, [u8; SERIAL_BYTES]), Failure> {
        let block = u64::from(options.logical_block_bytes);
        if block != 512 && block != 4096 {
            return Err(Failure::new(format!(
                "logical block size {block} is neither 512 nor 4096"
            )));
        }
        let mut serial = [0; SERIAL_BYTES];
        serial
            .get_mut(..options.serial.len())
            .ok_or_else(|| Failure::new(format!("the disk's serial number is longer than {SERIAL_BYTES} bytes")))?
            .copy_from_slice(options.serial.as_bytes());
        Ok((block / SECTOR_BYTES, serial))
    }

    /// Puts what was written on stable storage.
    ///
    /// # Errors
    /// The host's.
    pub async fn flush(&self) -> Result<(), Errno> {
        if self.geometry.read_only {
            return Ok(());
        }
        self.edge.target().node().flush().await
    }

    /// Features and configuration space that the driver will see.
    pub fn identity(&self, queues: u16, queue_size: u16) -> DeviceIdentity {
        let mut bits = vec![
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
        ];
        if queues > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        if self.write_cache {
            bits.push(VIRTIO_BLK_F_FLUSH);
        }
        if self.geometry.read_only {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        let mut config = vec![0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        let block_sectors = self.geometry.block_sectors as u32;
        put(0, &self.geometry.capacity_sectors.to_le_bytes());
        // Header and status have descriptors of their own.
        put(12, &SEG_MAX.min(u32::from(queue_size.saturating_sub(2))).to_le_bytes());
        put(20, &(block_sectors * SECTOR_BYTES as u32).to_le_bytes());
        put(34, &queues.to_le_bytes());
        if !self.geometry.read_only {
            let max_sectors = MAX_RANGE_SECTORS / block_sectors * block_sectors;
            // Discard: largest range, number of ranges, alignment. Write-zeroes: largest range, number, may unmap.
            put(36, &max_sectors.to_le_bytes());
            put(40, &(MAX_RANGES as u32).to_le_bytes());
            put(44, &block_sectors.to_le_bytes());
            put(48, &max_sectors.to_le_bytes());
            put(52, &(MAX_RANGES as u32).to_le_bytes());
            put(56, &[1]);
        }
        DeviceIdentity {
            features: bits.into_iter().fold(0, |features, bit| features | 1 << bit),
            config,
        }
    }
}

/// The size of a disk in sectors, without what does not fill a block.
fn whole_blocks(bytes: u64, block_sectors: u64) -> u64 {
    let sectors = bytes / SECTOR_BYTES;
    sectors - sectors % block_sectors
}

/// A queue's place in a device: its interrupt and its notes stay, its ring comes and goes with the driver.
struct QueueSlot {
    call: CallFd,
    notes: Notes,
    ring: Option<VirtQueue>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// No driver.
    Idle,
    /// A driver is at work. `durable`: it was shown no write cache, or knows nothing of flushes.
    Active { durable: bool },
    /// The driver's rings are broken.
    Broken,
}

/// See the module.
pub struct Device {
    index: DeviceIndex,
    queues: Vec<QueueSlot>,
    /// Largest size of a queue.
    queue_size: u16,
    disk: Option<Rc<Disk>>,
    state: State,
    /// Requests taken and not yet over, also those of a broken ring.
    in_flight: usize,
    /// Requests to try again when the machine goes on, in the order in which they failed.
    kept: Vec<Kept>,
    accounts: Accounts,
    /// Whose limits its requests obey.
    throttle: Option<Rc<Member>>,
    last_io_error: Option<Instant>,
}

/// A request that the host failed and that is not answered yet.
struct Kept {
    queue: usize,
    request: Request,
    since: Instant,
}

/// A request to run: the disk, and whether what it changes must be durable.
pub struct Work {
    /// The queue that it came from.
    pub queue: usize,
    /// The request.
    pub request: Request,
    /// Its disk.
    pub disk: Rc<Disk>,
    /// See [`serve::serve`].
    pub durable: bool,
    /// When it was taken.
    pub since: Instant,
    /// Whose limits it obeys.
    pub throttle: Option<Rc<Member>>,
}

impl Device {
    /// A device without a disk; its queues by their interrupts and where their requests are noted.
    pub fn new(index: DeviceIndex, queue_size: u16, queues: Vec<(CallFd, Notes)>) -> Self {
        let slot = |(call, notes)| QueueSlot {
            call,
            notes,
            ring: None,
        };
        Self {
            index,
            queue_size,
            queues: queues.into_iter().map(slot).collect(),
            disk: None,
            state: State::Idle,
            in_flight: 0,
            kept: Vec::new(),
            accounts: Accounts::default(),
            throttle: None,
            last_io_error: None,
        }
    }

    /// Its disk, if one is attached.
    pub fn disk(&self) -> Option<&Rc<Disk>> {
        self.disk.as_ref()
    }

    /// Puts a disk behind it, once.
    pub fn attach(&mut self, disk: Disk) -> DeviceIdentity {
        let identity = disk.identity(self.queues.len() as u16, self.queue_size);
        self.disk = Some(Rc::new(disk));
        self.accounts = Accounts::default();
        identity
    }

    /// Looks at the size of its node again; what the driver will see, if that has changed. No request may be in flight.
    pub fn resize(&mut self) -> Option<DeviceIdentity> {
        let disk = self.disk.as_ref()?.resized()?;
        let identity = disk.identity(self.queues.len() as u16, self.queue_size);
        self.disk = Some(Rc::new(disk));
        Some(identity)
    }

    /// The counters.
    pub fn stats(&self) -> DeviceStats {
        self.accounts.stats(Instant::now())
    }

    /// See [`Accounts::set_histogram`].
    ///
    /// # Errors
    /// As there.
    pub fn set_histogram(&mut self, kind: IoKind, boundaries_ns: Vec<u64>) -> Result<(), Failure> {
        self.accounts.set_histogram(kind, boundaries_ns)
    }

    /// How many requests are in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Puts it under a group's limits, or under none. What waits goes on by the old ones.
    pub fn set_throttle(&mut self, member: Option<Rc<Member>>) {
        self.throttle = member;
    }

    /// How many queues it has.
    pub fn queues(&self) -> usize {
        self.queues.len()
    }

    /// A driver is ready; under a number that is noted, an earlier block-proc has served it.
    ///
    /// # Errors
    /// When there is one already, there is no disk, or what it programmed cannot be.
    pub fn activate(
        &mut self,
        memory: &'static GuestRam,
        activation: &Activation,
        activation_number: ActivationNumber,
    ) -> Result<(), Failure> {
        let number = self.index.0;
        if self.state != State::Idle || self.in_flight > 0 {
            return Err(Failure::new(format!("device {number} is active: reset it first")));
        }
        let disk = self
            .disk
            .as_ref()
            .ok_or_else(|| Failure::new(format!("device {number} has no disk")))?;
        let has = |bit: u32| activation.features & (1 << bit) != 0;
        let mut rings: Vec<Option<VirtQueue>> = self.queues.iter().map(|_| None).collect();
        for setup in &activation.queues {
            let place = rings
                .get_mut(usize::from(setup.index))
                .filter(|place| place.is_none())
                .ok_or_else(|| Failure::new(format!("device {number} has no (second) queue {}", setup.index)))?;
            let notes = self.queues[usize::from(setup.index)].notes;
            let ring = VirtQueue::new(
                memory,
                setup,
                has(VIRTIO_RING_F_EVENT_IDX),
                Some((notes, activation_number)),
            )
            .map_err(|error| Failure::new(format!("device {number} queue {}: {error}", setup.index)))?;
            *place = Some(ring);
        }
        // A driver that did not accept the flush feature cannot ask for durability, so every write has it.
        self.state = State::Active {
            durable: !(disk.write_cache && has(VIRTIO_BLK_F_FLUSH)),
        };
        for (slot, ring) in self.queues.iter_mut().zip(rings) {
            slot.ring = ring;
        }
        Ok(())
    }

    /// Stops serving. What is in flight goes on, and is answered unless the rings are broken.
    pub fn stop(&mut self) {
        if self.state == State::Broken {
            self.forget_rings();
        }
        self.kept.clear();
        self.state = State::Idle;
    }

    /// Forgets the driver's rings: what is still in flight is not answered.
    pub fn forget_rings(&mut self) {
        self.queues.iter_mut().for_each(|slot| slot.ring = None);
    }

    /// Takes all that the driver has made available on a queue. From then on it need not kick, until [`Self::ask_for_kicks`].
    ///
    /// # Errors
    /// Once, when the ring turns out to be broken: the event to send. What was taken before it is in `work`.
    pub fn take(&mut self, queue: usize, memory: &'static GuestRam, work: &mut Vec<Work>) -> Result<(), BlockEvent> {
        let State::Active { durable } = self.state else {
            return Ok(());
        };
        let (Some(slot), Some(disk)) = (self.queues.get_mut(queue), &self.disk) else {
            return Ok(());
        };
        let Some(ring) = &mut slot.ring else { return Ok(()) };
        let before = work.len();
        let since = Instant::now();
        let result = take_all(ring, memory, &disk.geometry, &mut |request| {
            work.push(Work {
                queue,
                request,
                disk: disk.clone(),
                durable,
                since,
                throttle: self.throttle.clone(),
            });
        });
        self.in_flight += work.len() - before;
        result.map_err(|error| self.broken(queue, &error))
    }

    /// Whether a queue has something to take.
    pub fn has_more(&self, queue: usize) -> bool {
        let ring = self.queues.get(queue).and_then(|slot| slot.ring.as_ref());
        matches!(self.state, State::Active { .. }) && ring.is_some_and(VirtQueue::has_more)
    }

    /// Has the driver kick again when it makes something available. `true` when it has done so meanwhile: take it.
    ///
    /// # Errors
    /// Once, when the ring turns out to be broken: the event to send.
    pub fn ask_for_kicks(&mut self, queue: usize) -> Result<bool, BlockEvent> {
        let State::Active { .. } = self.state else {
            return Ok(false);
        };
        let Some(ring) = self.queues.get_mut(queue).and_then(|slot| slot.ring.as_mut()) else {
            return Ok(false);
        };
        ring.enable_kicks().map_err(|error| self.broken(queue, &error))
    }

    /// Takes the requests that were kept when they failed.
    pub fn take_kept(&mut self, work: &mut Vec<Work>) {
        let (State::Active { durable }, Some(disk)) = (self.state, &self.disk) else {
            return;
        };
        self.in_flight += self.kept.len();
        work.extend(self.kept.drain(..).map(|kept| Work {
            queue: kept.queue,
            request: kept.request.checked_again(&disk.geometry),
            disk: disk.clone(),
            durable,
            since: kept.since,
            throttle: self.throttle.clone(),
        }));
    }

    /// Answers a request, or keeps it. The driver is told later, by [`Self::notify`].
    ///
    /// # Errors
    /// The event to send: a broken ring, or a host error.
    pub fn finish(&mut self, queue: usize, mut answer: Answer, since: Instant, now: Instant) -> Result<(), BlockEvent> {
        self.in_flight -= 1;
        let action = match (answer.errno, &self.disk) {
            (Some(errno), Some(disk)) => Some((disk.action(answer.kind, errno), errno)),
            _ => None,
        };
        let kept = answer.again.take();
        if let (Some((ErrorAction::Stop, errno)), Some(request), State::Active { .. }) = (action, kept, self.state) {
            let request = *request;
            self.kept.push(Kept { queue, request, since });
            return Err(self.failed(answer.kind, ErrorAction::Stop, errno));
        }
        if let Some((ErrorAction::Ignore, _)) = action {
            answer.pretend_success();
        }
        self.count(&answer, since, now);
        if self.state != State::Broken
            && let Some(ring) = self.queues.get_mut(queue).and_then(|slot| slot.ring.as_mut())
        {
            ring.answer(answer.head, answer.status_address, answer.status, answer.written_bytes)
                .map_err(|error| self.broken(queue, &error))?;
        }
        match action {
            // There is nobody any more for whom it could be kept.
            Some((ErrorAction::Stop, errno)) if self.may_report() => {
                Err(self.failed(answer.kind, ErrorAction::Report, errno))
            }
            Some((action, errno)) if action != ErrorAction::Stop && self.may_report() => {
                Err(self.failed(answer.kind, action, errno))
            }
            _ => Ok(()),
        }
    }

    fn failed(&self, kind: Option<IoKind>, action: ErrorAction, errno: Errno) -> BlockEvent {
        BlockEvent::IoError {
            device: self.index,
            node: self.disk.as_ref().and_then(|disk| disk.edge.target().id()),
            // Only requests of a kind reach a node.
            kind: kind.unwrap_or(IoKind::Read),
            action,
            errno: errno as i32,
        }
    }

    /// Tells the driver of new answers on a queue, if it wants to be told. Returns whether it did.
    ///
    /// # Errors
    /// The event to send, when the ring turns out to be broken.
    pub fn notify(&mut self, queue: usize) -> Result<bool, BlockEvent> {
        if self.state == State::Broken {
            return Ok(false);
        }
        let Some(QueueSlot {
            call, ring: Some(ring), ..
        }) = self.queues.get_mut(queue)
        else {
            return Ok(false);
        };
        ring.notify(call).map_err(|error| self.broken(queue, &error))
    }

    fn broken(&mut self, queue: usize, error: &BrokenQueue) -> BlockEvent {
        self.state = State::Broken;
        BlockEvent::DeviceBroken {
            device: self.index,
            detail: format!("queue {queue}: {error}"),
        }
    }

    fn may_report(&mut self) -> bool {
        let now = Instant::now();
        let may = self
            .last_io_error
            .is_none_or(|last| now.duration_since(last) >= IO_ERROR_INTERVAL);
        if may {
            self.last_io_error = Some(now);
        }
        may
    }

    fn count(&mut self, answer: &Answer, since: Instant, now: Instant) {
        let Some(kind) = answer.kind else { return };
        let ending = match (answer.refused, u32::from(answer.status)) {
            (true, _) => Ending::Invalid,
            (false, VIRTIO_BLK_S_OK) => Ending::Done,
            (false, _) => Ending::Failed,
        };
        self.accounts.count(kind, answer.bytes, ending, since, now);
    }
}

fn take_all(
    ring: &mut VirtQueue,
    memory: &'static GuestRam,
    geometry: &Geometry,
    take: &mut impl FnMut(Request),
) -> Result<(), BrokenQueue> {
    ring.disable_kicks()?;
    loop {
        ring.look_ahead();
        for _ in 0..LOOK_AHEAD {
            let Some(chain) = ring.take()? else { return Ok(()) };
            take(request::parse(memory, chain, geometry)?);
        }
    }
}

#[cfg(test)]
mod tests;
