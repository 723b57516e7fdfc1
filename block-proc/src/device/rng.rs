//! A virtio-rng device: one virtqueue of buffers to fill with random bytes, at most so many in a period.
//!
//! One buffer is taken at a time and one read is under way at a time, into memory of our own: a source that blocks for
//! ever holds up neither a reset nor a pause, and a driver that fills its queue makes no work beyond the next answer. What
//! was read for a driver that is gone waits for the next. A buffer may come back with fewer bytes than it has room for;
//! drivers have to ask again (virtio 1.2 §5.4.6).

use super::chain::{BrokenChain, Chain};
use super::virtqueue::{BrokenQueue, VirtQueue};
use crate::buffer::{Buffer, Segments};
use crate::engine::FileId;
use ipc::Failure;
use ipc::block::{BlockEvent, RngLimit};
use ipc::caps::CallFd;
use ipc::memory::GuestRam;
use ipc::virtio::{Activation, DeviceIdentity, DeviceIndex};
use nix::errno::Errno;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Most bytes of one read.
const STEP_BYTES: usize = 4096;
/// When a source without bytes is asked again.
const RETRY: Duration = Duration::from_secs(1);

/// How many bytes may still be given in this period.
#[derive(Debug)]
struct Quota {
    limit: RngLimit,
    left: u64,
    /// When the period ends that began with the first byte given.
    renewal: Option<Instant>,
}

impl Quota {
    fn new(limit: RngLimit) -> Self {
        Self {
            limit,
            left: limit.max_bytes,
            renewal: None,
        }
    }

    /// What may be given now.
    fn left(&mut self, now: Instant) -> u64 {
        if self.renewal.is_some_and(|renewal| renewal <= now) {
            self.renewal = None;
            self.left = self.limit.max_bytes;
        }
        self.left
    }

    fn spend(&mut self, bytes: u64, now: Instant) {
        self.left = self.left.saturating_sub(bytes);
        let period = Duration::from_millis(self.limit.period_ms.into());
        self.renewal.get_or_insert(now + period);
    }
}

/// The source of a device's bytes.
struct Source {
    file: FileId,
    buffer: Arc<Buffer>,
    /// A read is under way into `buffer`.
    reading: bool,
    /// Bytes of `buffer` that were read and not given: from where to where.
    ready: std::ops::Range<usize>,
    /// It had nothing: when it is asked again.
    dry_until: Option<Instant>,
    /// Whether the supervisor knows that it is dry.
    told: bool,
}

/// See the module.
pub struct Rng {
    index: DeviceIndex,
    call: CallFd,
    ring: Option<VirtQueue>,
    active: bool,
    quota: Quota,
    source: Option<Source>,
    /// The buffer that is being filled.
    waiting: Option<Chain>,
}

/// What a device has done, or wants done.
pub enum Step {
    /// There is nothing to do before something happens.
    Idle,
    /// A buffer has been filled. There may be another.
    Gave,
    /// This is to be read from the source.
    Read {
        /// The source.
        file: FileId,
        /// Where to.
        into: Segments,
    },
}

impl Rng {
    /// A device without a source.
    pub fn new(index: DeviceIndex, call: CallFd) -> Self {
        Self {
            index,
            call,
            ring: None,
            active: false,
            quota: Quota::new(RngLimit {
                max_bytes: 0,
                period_ms: 1,
            }),
            source: None,
            waiting: None,
        }
    }

    /// Whether it has a source.
    pub fn is_attached(&self) -> bool {
        self.source.is_some()
    }

    /// Puts a source behind it, once.
    pub fn attach(&mut self, file: FileId, limit: RngLimit) -> DeviceIdentity {
        self.quota = Quota::new(limit);
        self.source = Some(Source {
            file,
            buffer: Buffer::new(STEP_BYTES),
            reading: false,
            ready: 0..0,
            dry_until: None,
            told: false,
        });
        let bits = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX];
        DeviceIdentity {
            features: bits.into_iter().fold(0, |features, bit| features | 1 << bit),
            config: Vec::new(),
        }
    }

    /// A driver is ready.
    ///
    /// # Errors
    /// When there is one already, there is no source, or what it programmed cannot be.
    pub fn activate(&mut self, memory: &'static GuestRam, activation: &Activation) -> Result<(), Failure> {
        let number = self.index.0;
        if self.ring.is_some() {
            return Err(Failure::new(format!("device {number} is active: reset it first")));
        }
        if self.source.is_none() {
            return Err(Failure::new(format!("device {number} has no source of random bytes")));
        }
        let [setup] = &*activation.queues else {
            // A driver that enables no queue gets nothing, which is no mistake.
            return match activation.queues.len() {
                0 => Ok(()),
                _ => Err(Failure::new(format!("device {number} has one queue"))),
            };
        };
        if setup.index != 0 {
            return Err(Failure::new(format!("device {number} has no queue {}", setup.index)));
        }
        let event_index = activation.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let ring = VirtQueue::new(memory, setup, event_index, None)
            .map_err(|error| Failure::new(format!("device {number} queue 0: {error}")))?;
        self.ring = Some(ring);
        self.active = true;
        Ok(())
    }

    /// Lets go of the driver's ring. Its buffer is not filled any more.
    pub fn reset(&mut self) {
        self.active = false;
        self.ring = None;
        self.waiting = None;
    }

    /// Goes one step on: takes a buffer, fills it from what has been read, or says what to read for it.
    ///
    /// # Errors
    /// Once, when the ring turns out to be broken: the event to send.
    pub fn advance(&mut self, memory: &'static GuestRam, now: Instant) -> Result<Step, BlockEvent> {
        if !self.active {
            return Ok(Step::Idle);
        }
        self.try_advance(memory, now).map_err(|error| self.broken(&error))
    }

    fn try_advance(&mut self, memory: &'static GuestRam, now: Instant) -> Result<Step, BrokenQueue> {
        let (Some(ring), Some(source)) = (&mut self.ring, &mut self.source) else {
            return Ok(Step::Idle);
        };
        if self.waiting.is_none() {
            self.waiting = next(ring, memory)?;
        }
        let Some(chain) = &self.waiting else {
            return Ok(Step::Idle);
        };
        let left = self.quota.left(now);
        if left == 0 || source.reading {
            return Ok(Step::Idle);
        }
        if source.ready.is_empty() {
            if source.dry_until.is_some_and(|until| until > now) {
                return Ok(Step::Idle);
            }
            let bytes = chain.writable.bytes().min(left).min(STEP_BYTES as u64) as usize;
            source.reading = true;
            return Ok(Step::Read {
                file: source.file,
                into: Segments::of_buffer(&source.buffer, bytes),
            });
        }
        let bytes = chain.writable.bytes().min(left).min(source.ready.len() as u64) as usize;
        let mut from = Segments::of_buffer(&source.buffer, source.ready.start + bytes);
        from.advance(source.ready.start as u64);
        from.copy_to(&chain.writable);
        source.ready.start += bytes;
        let head = chain.head;
        self.waiting = None;
        self.quota.spend(bytes as u64, now);
        ring.give_back(head, bytes as u32)?;
        Ok(Step::Gave)
    }

    /// A read has ended. Look with [`Self::advance`] what that makes possible.
    ///
    /// # Errors
    /// The event to send, when the source has nothing.
    pub fn read(&mut self, result: Result<usize, Errno>, now: Instant) -> Result<(), BlockEvent> {
        let Some(source) = &mut self.source else { return Ok(()) };
        source.reading = false;
        source.dry_until = None;
        let errno = match result {
            Ok(0) => 0,
            Ok(bytes) => {
                source.ready = 0..bytes.min(STEP_BYTES);
                source.told = false;
                return Ok(());
            }
            Err(Errno::EINTR | Errno::EAGAIN) => return Ok(()),
            Err(errno) => errno as i32,
        };
        source.dry_until = Some(now + RETRY);
        if std::mem::replace(&mut source.told, true) {
            return Ok(());
        }
        Err(BlockEvent::RngDry {
            device: self.index,
            errno,
        })
    }

    /// When to look again although nothing was read and no driver kicked: a buffer waits for bytes.
    pub fn wake_at(&self, now: Instant) -> Option<Instant> {
        let source = self.source.as_ref().filter(|source| self.active && !source.reading)?;
        self.waiting.as_ref()?;
        if self.quota.left == 0 {
            self.quota.renewal
        } else if source.ready.is_empty() {
            Some(source.dry_until.unwrap_or(now))
        } else {
            Some(now)
        }
    }

    /// Tells the driver of filled buffers, if it wants to be told.
    ///
    /// # Errors
    /// The event to send, when the ring turns out to be broken.
    pub fn notify(&mut self) -> Result<(), BlockEvent> {
        let (true, Some(ring)) = (self.active, &mut self.ring) else {
            return Ok(());
        };
        ring.notify(&self.call).map(drop).map_err(|error| self.broken(&error))
    }

    /// Serves nothing more until it is reset.
    fn broken(&mut self, error: &BrokenQueue) -> BlockEvent {
        self.active = false;
        self.waiting = None;
        BlockEvent::DeviceBroken {
            device: self.index,
            detail: format!("queue 0: {error}"),
        }
    }
}

/// The next buffer. Without one, the driver is asked to kick.
fn next(ring: &mut VirtQueue, memory: &'static GuestRam) -> Result<Option<Chain>, BrokenQueue> {
    loop {
        if let Some(chain) = ring.take()? {
            ring.disable_kicks()?;
            let chain = Chain::read(memory, chain)?;
            if chain.writable.bytes() == 0 {
                return Err(BrokenChain::NoRoom.into());
            }
            return Ok(Some(chain));
        }
        // Once more for what came between the look and the wish: a driver that goes on kicks.
        if !ring.enable_kicks()? {
            return Ok(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_begins_with_its_first_byte_and_ends_after_its_length() {
        let mut quota = Quota::new(RngLimit {
            max_bytes: 10,
            period_ms: 100,
        });
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(quota.left(at(0)), 10);
        assert_eq!(quota.left(at(5000)), 10);
        quota.spend(4, at(5000));
        assert_eq!(quota.left(at(5050)), 6);
        quota.spend(6, at(5050));
        assert_eq!(quota.left(at(5099)), 0);
        assert_eq!(quota.left(at(5100)), 10);
    }
}
