//! The main engine: an io_uring that can do nothing but what this file lists.
//!
//! A seccomp filter does not see what a ring does. So the ring is created disabled, restricted to [`OPCODES`] on files of
//! its own table (IOSQE_FIXED_FILE is required) and to one io_uring_register opcode, FILES_UPDATE, by which disks come in
//! later; then it is enabled, and io_uring_setup is denied for the rest of the process's life.
//!
//! What a ring cannot do on all kernels that we run on (BLKDISCARD, ftruncate), or on none (lseek), goes to one worker
//! thread: a file system may have to read its tables from the disk to find a hole, and the thread must not wait for that.

use super::pool::{Job, Pool};
use super::table::Table;
use super::{Completion, Engine, Event, FileId, Operation};
use crate::buffer::Segments;
use io_uring::register::{Probe, Restriction};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use ipc::block::EngineChoice;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// All that the ring may ever do.
const OPCODES: [u8; 8] = [
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];
/// As an offset: the file's own position.
const OWN_POSITION: u64 = u64::MAX;
/// IORING_REGISTER_FILES_UPDATE, the only registration after sealing.
const REGISTER_FILES_UPDATE: u8 = 6;
/// Submission queue entries: what is queued beyond them costs a system call more.
const SUBMISSIONS: u32 = 256;
/// Completion queue entries; the kernel keeps what does not fit.
const COMPLETIONS: u32 = 4096;
/// Size of the file table: every queue of every device, every disk, and our own eventfds. The kernel refuses more than
/// RLIMIT_NOFILE.
const FILE_SLOTS: u64 = 1024;
/// Set in the user data of a watch; the rest is its index.
const WATCH: u64 = 1 << 63;
/// User data of entries that end a wait.
const CANCEL: u64 = u64::MAX;
/// Signal of the worker's own eventfd: u32 signals of callers never reach it.
const POOL_SIGNAL: u64 = u64::MAX;

struct Watch {
    /// Its slot in the file table.
    slot: u32,
    signal: u64,
}

/// See the module.
pub struct IoUringEngine {
    ring: IoUring,
    pool: Pool,
    slots: u32,
    slots_used: u32,
    /// Slots below `slots_used` that are empty again.
    free_slots: Vec<u32>,
    watches: Vec<Watch>,
    /// Per [`FileId`]: the slot, and the fd for the worker.
    files: Table<(u32, Arc<OwnedFd>)>,
    /// Per token: what the kernel is working on. The memory that it refers to lives here.
    in_flight: Vec<Option<Operation>>,
    for_pool: Vec<Job>,
    /// Completions taken from the ring and not yet reported.
    reaped: VecDeque<cqueue::Entry>,
}

impl IoUringEngine {
    /// Creates the ring, disabled, with its table and its restrictions.
    ///
    /// # Errors
    /// Where the host has no io_uring, forbids it, or is older than what is used here.
    pub fn new() -> std::io::Result<Self> {
        let ring = create_ring()?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if let Some(missing) = OPCODES.iter().find(|&&code| !probe.is_supported(code)) {
            return Err(std::io::Error::other(format!("io_uring lacks operation {missing}")));
        }
        let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let slots = u32::try_from(soft.min(FILE_SLOTS)).unwrap_or(0);
        ring.submitter().register_files(&vec![-1; slots as usize])?;
        let mut restrictions: Vec<Restriction> = OPCODES.map(Restriction::sqe_op).into();
        let fixed_file = squeue::Flags::FIXED_FILE.bits();
        restrictions.extend([
            Restriction::sqe_flags_required(fixed_file),
            Restriction::sqe_flags_allowed(fixed_file),
            Restriction::register_op(REGISTER_FILES_UPDATE),
        ]);
        ring.submitter().register_restrictions(&mut restrictions)?;
        let mut engine = Self {
            ring,
            pool: Pool::new()?,
            slots,
            slots_used: 0,
            free_slots: Vec::new(),
            watches: Vec::new(),
            files: Table::default(),
            in_flight: Vec::new(),
            for_pool: Vec::new(),
            reaped: VecDeque::new(),
        };
        let wake = engine.pool.wake_fd()?;
        engine.add_watch(&wake, POOL_SIGNAL)?;
        Ok(engine)
    }

    fn add_to_table(&mut self, fd: BorrowedFd<'_>) -> std::io::Result<u32> {
        let free = self.free_slots.last().copied();
        let slot = free.unwrap_or(self.slots_used);
        if slot >= self.slots {
            return Err(std::io::Error::other(format!(
                "the ring's file table is full ({} slots); raise RLIMIT_NOFILE",
                self.slots
            )));
        }
        let updated = self.ring.submitter().register_files_update(slot, &[fd.as_raw_fd()])?;
        if updated != 1 {
            return Err(std::io::Error::other("the ring's file table was not updated"));
        }
        match free {
            Some(_) => drop(self.free_slots.pop()),
            None => self.slots_used += 1,
        }
        Ok(slot)
    }

    fn add_watch(&mut self, eventfd: &OwnedFd, signal: u64) -> std::io::Result<()> {
        // The table keeps the eventfd open; the caller's fd may go.
        let slot = self.add_to_table(eventfd.as_fd())?;
        self.watches.push(Watch { slot, signal });
        Ok(())
    }

    fn arm(&mut self, watch: usize) -> std::io::Result<()> {
        // Multishot: one entry for the life of the ring. It fires once per wake-up, so the counter need not be read.
        let entry = opcode::PollAdd::new(types::Fixed(self.watches[watch].slot), libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(WATCH | watch as u64);
        self.push(&entry)
    }

    fn push(&mut self, entry: &squeue::Entry) -> std::io::Result<()> {
        loop {
            // SAFETY: the memory that the entry refers to is owned by `in_flight` until its completion is seen.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            self.enter(0, None)?;
            // The kernel takes no more while its completions overflow, so make room there as well.
            self.reaped.extend(self.ring.completion());
        }
    }

    /// Gives the kernel what is queued and waits for `want` completions, at most for `timeout`. An interrupted or
    /// overcommitted call is no error: the caller looks at the completions and comes back.
    fn enter(&mut self, want: usize, timeout: Option<Duration>) -> std::io::Result<()> {
        let entered = match timeout {
            None => {
                let queued = self.ring.submission().len();
                // With this flag also what completed on our thread's account becomes visible when nothing is waited for.
                let flags = io_uring::EnterFlags::GETEVENTS.bits();
                // SAFETY: no signal mask is given, and the entries are those of `push`.
                unsafe {
                    let submitter = self.ring.submitter();
                    submitter.enter::<libc::sigset_t>(queued as u32, want as u32, flags, None)
                }
            }
            Some(timeout) => {
                let timespec = types::Timespec::from(timeout);
                let arguments = types::SubmitArgs::new().timespec(&timespec);
                self.ring.submitter().submit_with_args(want, &arguments)
            }
        };
        match entered {
            Ok(_) => Ok(()),
            Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                Errno::EINTR | Errno::EAGAIN | Errno::EBUSY | Errno::ETIME => Ok(()),
                _ => Err(error),
            },
        }
    }

    fn handle(&mut self, entry: &cqueue::Entry, events: &mut Vec<Event>) -> std::io::Result<()> {
        let data = entry.user_data();
        if data == CANCEL {
            // The wait itself says how it ended; one that was over already cannot be found.
            return Ok(());
        }
        if data & WATCH != 0 {
            let watch = usize::try_from(data & !WATCH).map_err(std::io::Error::other)?;
            if entry.result() < 0 {
                return Err(std::io::Error::from_raw_os_error(-entry.result()));
            }
            match u32::try_from(self.watches[watch].signal) {
                Ok(signal) => events.push(Event::Signal(signal)),
                Err(_) => events.extend(self.pool.completions().into_iter().map(Event::Completed)),
            }
            if !cqueue::more(entry.flags()) {
                self.arm(watch)?;
            }
            return Ok(());
        }
        let token = u32::try_from(data).map_err(std::io::Error::other)?;
        if let Some(operation) = self.in_flight[token as usize].take() {
            let result = usize::try_from(entry.result()).map_err(|_| Errno::from_raw(-entry.result()));
            events.push(Event::Completed(Completion {
                token,
                result,
                operation,
            }));
        }
        Ok(())
    }
}

/// The best ring that the kernel knows: completions run on our thread alone when we ask (6.1), without interrupting it
/// (5.19), or in any way (5.15).
fn create_ring() -> std::io::Result<IoUring> {
    let base = || {
        let mut builder = IoUring::builder();
        builder.setup_r_disabled().setup_cqsize(COMPLETIONS).dontfork();
        builder
    };
    let invalid = |error: &std::io::Error| error.raw_os_error() == Some(libc::EINVAL);
    match base().setup_single_issuer().setup_defer_taskrun().build(SUBMISSIONS) {
        Err(error) if invalid(&error) => {}
        result => return result,
    }
    match base().setup_coop_taskrun().build(SUBMISSIONS) {
        Err(error) if invalid(&error) => {}
        result => return result,
    }
    base().build(SUBMISSIONS)
}

/// An entry that fills these segments. It points to several, and has one in itself.
fn read(file: types::Fixed, offset: u64, into: &Segments) -> squeue::Entry {
    match into.iovecs() {
        [only] => opcode::Read::new(file, only.iov_base.cast(), bytes(only))
            .offset(offset)
            .build(),
        several => opcode::Readv::new(file, several.as_ptr(), several.len() as u32)
            .offset(offset)
            .build(),
    }
}

/// The other way round.
fn write(file: types::Fixed, offset: u64, from: &Segments, flags: i32) -> squeue::Entry {
    match from.iovecs() {
        [only] => opcode::Write::new(file, only.iov_base.cast_const().cast(), bytes(only))
            .offset(offset)
            .rw_flags(flags)
            .build(),
        several => opcode::Writev::new(file, several.as_ptr(), several.len() as u32)
            .offset(offset)
            .rw_flags(flags)
            .build(),
    }
}

/// As many as an entry can name. The kernel moves less at a time in any case.
fn bytes(segment: &libc::iovec) -> u32 {
    u32::try_from(segment.iov_len).unwrap_or(u32::MAX)
}

/// What is waited for. Errors and the end are always told.
fn ready_flags(to_write: bool) -> u32 {
    (if to_write {
        libc::POLLOUT
    } else {
        libc::POLLIN | libc::POLLRDHUP
    }) as u32
}

impl Engine for IoUringEngine {
    fn choice(&self) -> EngineChoice {
        EngineChoice::IoUring
    }

    fn watch(&mut self, eventfd: OwnedFd, signal: u32) -> std::io::Result<()> {
        self.add_watch(&eventfd, signal.into())
    }

    fn hold(&mut self, file: BorrowedFd<'_>) -> std::io::Result<()> {
        // A ring goes when its last request has ended, and its table with it.
        self.add_to_table(file).map(drop)
    }

    // The kernel waits for a stream without a thread of ours.
    fn start(&mut self, disks: bool, _streams: usize) -> std::io::Result<()> {
        // The enabling thread becomes the only one that may submit.
        self.ring.submitter().register_enable_rings()?;
        self.pool.start(usize::from(disks))?;
        (0..self.watches.len()).try_for_each(|watch| self.arm(watch))?;
        self.enter(0, None)
    }

    fn add_file(&mut self, file: OwnedFd) -> std::io::Result<FileId> {
        let slot = self.add_to_table(file.as_fd())?;
        Ok(FileId(self.files.insert((slot, Arc::new(file)))))
    }

    fn remove_file(&mut self, file: FileId) {
        drop(self.take_file(file));
    }

    fn take_file(&mut self, file: FileId) -> Option<OwnedFd> {
        let (slot, fd) = self.files.remove(file.0)?;
        // A slot that could not be emptied is not used again, and its file stays open.
        match self.ring.submitter().register_files_update(slot, &[-1]) {
            Ok(_) => self.free_slots.push(slot),
            Err(error) => ipc::helper::log(&format!("the ring keeps a closed file: {error}")),
        }
        Arc::into_inner(fd)
    }

    fn submit(&mut self, token: u32, operation: Operation) {
        let (slot, file) = self.files.get(operation.file().0);
        let fd = types::Fixed(*slot);
        let entry = match &operation {
            Operation::Read { offset, segments, .. } => read(fd, *offset, segments),
            Operation::ReadStream { segments, .. } => read(fd, OWN_POSITION, segments),
            Operation::WriteStream { segments, .. } => write(fd, OWN_POSITION, segments, 0),
            Operation::Ready { to_write, .. } => opcode::PollAdd::new(fd, ready_flags(*to_write)).build(),
            Operation::Write {
                offset,
                segments,
                durable,
                ..
            } => write(fd, *offset, segments, if *durable { libc::RWF_DSYNC } else { 0 }),
            Operation::Sync { .. } => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Range {
                offset, bytes, mode, ..
            } => opcode::Fallocate::new(fd, *bytes)
                .offset(*offset)
                .mode(mode.flags())
                .build(),
            Operation::Discard { .. } | Operation::Truncate { .. } | Operation::Extent { .. } => {
                self.for_pool.push(Job {
                    token,
                    file: file.clone(),
                    operation,
                });
                return;
            }
        };
        let index = token as usize;
        if self.in_flight.len() <= index {
            self.in_flight.resize_with(index + 1, || None);
        }
        // Moving the operation does not move an array of segments that the entry points to.
        self.in_flight[index] = Some(operation);
        if let Err(error) = self.push(&entry.user_data(token.into())) {
            // The ring itself is unusable: no request can ever be answered again.
            panic!("io_uring_enter: {error}");
        }
    }

    fn cancel_wait(&mut self, token: u32) {
        // The flag that every entry must have means nothing for this one. Before Linux 5.19 it is refused with it: there a
        // wait ends when the peer does something.
        let entry = opcode::AsyncCancel::new(token.into())
            .build()
            .flags(squeue::Flags::FIXED_FILE)
            .user_data(CANCEL);
        if let Err(error) = self.push(&entry) {
            panic!("io_uring_enter: {error}");
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.enter(0, None)
    }

    fn begin(&mut self) -> std::io::Result<bool> {
        if !self.ring.submission().is_empty() {
            self.enter(0, None)?;
        }
        Ok(!self.reaped.is_empty() || !self.ring.completion().is_empty())
    }

    fn wait(&mut self, events: &mut Vec<Event>, timeout: Option<Duration>) -> std::io::Result<()> {
        if !self.for_pool.is_empty() {
            self.pool.submit(&mut self.for_pool);
        }
        let want = usize::from(self.reaped.is_empty() && self.ring.completion().is_empty());
        self.enter(want, timeout.filter(|_| want > 0))?;
        self.reaped.extend(self.ring.completion());
        while let Some(entry) = self.reaped.pop_front() {
            self.handle(&entry, events)?;
        }
        Ok(())
    }
}

impl Drop for IoUringEngine {
    /// Waits for the kernel to let go of our memory. In the process itself an engine is never dropped.
    fn drop(&mut self) {
        let mut events = Vec::new();
        while self.in_flight.iter().any(Option::is_some) {
            if self.wait(&mut events, None).is_err() {
                std::process::abort();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Submits an entry and returns its result.
    fn result_of(engine: &mut IoUringEngine, entry: &squeue::Entry) -> i32 {
        engine.push(&entry.clone().user_data(77)).unwrap();
        loop {
            engine.enter(1, None).unwrap();
            let found = engine.ring.completion().find(|entry| entry.user_data() == 77);
            if let Some(entry) = found {
                return entry.result();
            }
        }
    }

    #[test]
    fn a_sealed_ring_does_only_what_is_listed() {
        let mut engine = IoUringEngine::new().unwrap();
        engine.start(true, 0).unwrap();
        let FileId(id) = engine.add_file(tempfile::tempfile().unwrap().into()).unwrap();
        let (slot, file) = engine.files.get(id).clone();
        let fixed = types::Fixed(slot);
        let mut byte = 0u8;
        let denied = [
            opcode::Nop::new().build(),
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/etc/passwd".as_ptr()).build(),
            opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
            opcode::Recv::new(fixed, &raw mut byte, 1).build(),
            // The right operation on a file that is not in the table, or with more flags.
            opcode::Fsync::new(types::Fd(file.as_raw_fd())).build(),
            opcode::Fsync::new(fixed).build().flags(squeue::Flags::ASYNC),
        ];
        for entry in denied {
            assert_eq!(result_of(&mut engine, &entry), -libc::EACCES, "{entry:?}");
        }
        assert_eq!(result_of(&mut engine, &opcode::Fsync::new(fixed).build()), 0);
        assert_eq!(
            result_of(&mut engine, &opcode::Read::new(fixed, &raw mut byte, 1).build()),
            0
        );
        let submitter = engine.ring.submitter();
        let error = |result: std::io::Result<()>| result.unwrap_err().raw_os_error();
        assert_eq!(error(submitter.unregister_files()), Some(libc::EACCES));
        assert_eq!(error(submitter.register_eventfd(file.as_raw_fd())), Some(libc::EACCES));
        assert_eq!(error(submitter.register_personality().map(drop)), Some(libc::EACCES));
    }
}
