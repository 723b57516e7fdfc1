//! Code of an attacker's in a real, running, sealed process: any system call with any arguments, from inside.
//!
//! Nothing of the product knows of it. The process is stopped by ptrace, which takes root, and made to execute its own
//! `syscall` instruction with other registers: for the kernel (its filters, namespaces, limits, credentials) it is the process
//! that calls. Its other threads stand meanwhile.

use super::victim::shoot;
use crate::machine::PATIENCE;
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::time::{Duration, Instant};

/// What became of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The kernel did it.
    Done(i64),
    /// The kernel refused it.
    Refused(Errno),
    /// The process is gone: by SIGSYS at once, or by SIGKILL of the supervisor, who was told.
    Killed(i32),
}

impl Outcome {
    /// What it returned.
    pub fn value(self) -> Option<i64> {
        match self {
            Self::Done(value) => Some(value),
            Self::Refused(_) | Self::Killed(_) => None,
        }
    }
}

/// A process with somebody else's will. It goes on with its own when this is dropped, if it still can.
pub struct Puppet {
    /// The process.
    pub pid: i32,
    thread: Pid,
    others: Vec<Pid>,
    before: libc::user_regs_struct,
    /// Where a `syscall` instruction is.
    instruction: u64,
    /// Memory of the process below its stack, and how much of it is in use.
    memory: u64,
    used: u64,
    gone: bool,
}

/// Where the memory of a ring has its parts.
struct RingLayout {
    sq_tail: u64,
    sq_mask: u64,
    cq_head: u64,
    cq_tail: u64,
    cq_mask: u64,
    cqes: u64,
}

impl RingLayout {
    /// As the kernel tells it of a ring of ours.
    fn of_this_kernel() -> Self {
        let mut parameters = [0u32; 30];
        // SAFETY: `struct io_uring_params` has 120 bytes; the ring that is made is closed.
        unsafe {
            let ring = libc::syscall(libc::SYS_io_uring_setup, 8, parameters.as_mut_ptr());
            assert!(ring >= 0, "io_uring_setup: {}", std::io::Error::last_os_error());
            libc::close(ring as i32);
        }
        // `sq_off` begins at byte 40, `cq_off` at byte 80.
        let at = |word: usize| u64::from(parameters[word]);
        Self {
            sq_tail: at(11),
            sq_mask: at(12),
            cq_head: at(20),
            cq_tail: at(21),
            cq_mask: at(22),
            cqes: at(25),
        }
    }
}

/// So much memory there is for arguments.
const MEMORY_BYTES: u64 = 64 << 10;

impl Puppet {
    /// Takes a process over, in its main thread, which waits in a system call.
    ///
    /// # Panics
    /// When this process may not.
    pub fn seize(pid: i32) -> Self {
        Self::seize_in(pid, pid)
    }

    /// As [`Self::seize`], in another thread.
    ///
    /// # Panics
    /// As [`Self::seize`].
    pub fn seize_in(pid: i32, thread: i32) -> Self {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
        let mut threads: Vec<Pid> = threads
            .filter_map(|task| Some(Pid::from_raw(task.ok()?.file_name().to_str()?.parse().ok()?)))
            .collect();
        threads.sort();
        // What the kernel does for its rings is no thread of its own.
        threads.retain(|of| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/task/{of}/comm")).unwrap_or_default();
            !name.starts_with("iou-")
        });
        for thread in &threads {
            ptrace::seize(*thread, ptrace::Options::empty()).expect("PTRACE_SEIZE");
            ptrace::interrupt(*thread).expect("PTRACE_INTERRUPT");
            waitpid(*thread, Some(WaitPidFlag::__WALL)).expect("wait");
        }
        let thread = Pid::from_raw(thread);
        let before = ptrace::getregs(thread).expect("registers");
        let instruction = before.rip - 2;
        let code = ptrace::read(thread, instruction as ptrace::AddressType).expect("code");
        assert_eq!(code & 0xffff, 0x050f, "the thread does not wait in a system call");
        Self {
            pid,
            thread,
            others: threads.into_iter().filter(|other| *other != thread).collect(),
            // Below the red zone.
            memory: ((before.rsp - 4096) & !63) - MEMORY_BYTES,
            before,
            instruction,
            used: 0,
            gone: false,
        }
    }

    /// Puts bytes into its memory; returns where.
    ///
    /// # Panics
    /// When there is no room.
    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.memory + self.used;
        self.used += (bytes.len() as u64 + 63) & !63;
        assert!(self.used <= MEMORY_BYTES, "no room for arguments");
        for (index, chunk) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let address = at + 8 * index as u64;
            ptrace::write(self.thread, address as ptrace::AddressType, i64::from_ne_bytes(word)).expect("its memory");
        }
        at
    }

    /// As [`Self::put`], of words.
    pub fn put_words(&mut self, words: &[u64]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.put(&bytes)
    }

    /// As [`Self::put`], of a path.
    pub fn put_text(&mut self, text: &str) -> u64 {
        self.put(&[text.as_bytes(), b"\0"].concat())
    }

    /// Has it make a system call.
    ///
    /// # Panics
    /// When it is gone already.
    pub fn call(&mut self, number: i64, arguments: &[u64]) -> Outcome {
        assert!(!self.gone, "it is gone");
        let mut registers = self.before;
        let argument = |index: usize| arguments.get(index).copied().unwrap_or(0);
        registers.rip = self.instruction;
        registers.rax = number as u64;
        // No call to make again after this one.
        registers.orig_rax = u64::MAX;
        registers.rdi = argument(0);
        registers.rsi = argument(1);
        registers.rdx = argument(2);
        registers.r10 = argument(3);
        registers.r8 = argument(4);
        registers.r9 = argument(5);
        if ptrace::setregs(self.thread, registers).is_err() || ptrace::step(self.thread, None).is_err() {
            return self.killed();
        }
        if let Err(signal) = self.wait() {
            self.gone = true;
            return Outcome::Killed(signal);
        }
        let Ok(after) = ptrace::getregs(self.thread) else {
            return self.killed();
        };
        if after.rip != self.instruction + 2 {
            // Stopped on its way out.
            return self.killed();
        }
        match after.rax as i64 {
            error @ -4095..=-1 => Outcome::Refused(Errno::from_raw(-error as i32)),
            value => Outcome::Done(value),
        }
    }

    /// It is on its way out: waits until it is there.
    fn killed(&mut self) -> Outcome {
        self.gone = true;
        loop {
            if let Err(signal) = self.wait() {
                return Outcome::Killed(signal);
            }
        }
    }

    /// Waits until it stands again, or is gone: then it is said by which signal. Threads that stood under ptrace go first, and
    /// are reaped by who stood over them.
    fn wait(&self) -> Result<(), i32> {
        let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
        let began = Instant::now();
        loop {
            for thread in &self.others {
                let _ = waitpid(*thread, Some(flags));
            }
            match waitpid(self.thread, Some(flags)) {
                Ok(WaitStatus::Stopped(..) | WaitStatus::PtraceEvent(..)) => return Ok(()),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Err(signal as i32),
                Ok(WaitStatus::Exited(..)) | Err(_) => return Err(libc::SIGKILL),
                Ok(_) => {}
            }
            assert!(began.elapsed() < PATIENCE, "it neither stands nor ends");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Puts an entry into a ring's queue and has the kernel take it, in the thread whose ring it is; returns the result.
    ///
    /// # Panics
    /// When the ring is not where rings are.
    pub fn submit(&mut self, ring: i32, opcode: u8, path: &str) -> Option<i32> {
        const NAME: u64 = 0x1122_3344_5566_7788;
        let layout = RingLayout::of_this_kernel();
        let (rings, entries) = (self.ring_mapping(0), self.ring_mapping(0x1000_0000));
        let path = self.put_text(path);
        let tail = self.word(rings + layout.sq_tail);
        let index = tail & self.word(rings + layout.sq_mask);
        let entry = entries + 64 * u64::from(index);
        for (place, word) in [
            // Opcode, no flags (no registered file), and the descriptor: the current directory, or the channel.
            u64::from(opcode) | ((libc::AT_FDCWD as u32 as u64) << 32),
            0,
            path,
            8,
            NAME,
            0,
            0,
            0,
        ]
        .into_iter()
        .enumerate()
        {
            self.poke(entry + 8 * place as u64, word);
        }
        let completions = u64::from(self.word(rings + layout.cq_mask)) + 1;
        let array = (rings + layout.cqes + 16 * completions).next_multiple_of(64);
        self.poke_word(array + 4 * u64::from(index), index);
        self.poke_word(rings + layout.sq_tail, tail.wrapping_add(1));
        self.call(libc::SYS_io_uring_enter, &[ring as u64, 1, 0, 1, 0, 8])
            .value()?;
        let mut at = self.word(rings + layout.cq_head);
        while at != self.word(rings + layout.cq_tail) {
            let completion = rings + layout.cqes + 16 * (u64::from(at) & (completions - 1));
            if self.peek(completion) == NAME {
                // Nobody finds it a second time.
                self.poke(completion, 0);
                return Some(self.word(completion + 8) as i32);
            }
            at = at.wrapping_add(1);
        }
        None
    }

    /// Where a ring's memory of this offset is mapped.
    fn ring_mapping(&self, offset: u64) -> u64 {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid)).expect("its mappings");
        let found = maps.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            let range = words.next()?;
            let at = u64::from_str_radix(words.nth(1)?, 16).ok()?;
            let start = u64::from_str_radix(range.split('-').next()?, 16).ok()?;
            (line.contains("[io_uring]") && at == offset).then_some(start)
        });
        found.unwrap_or_else(|| panic!("no ring at {offset:#x}: {maps}"))
    }

    fn peek(&self, address: u64) -> u64 {
        ptrace::read(self.thread, address as ptrace::AddressType).expect("its memory") as u64
    }

    fn poke(&self, address: u64, word: u64) {
        ptrace::write(self.thread, address as ptrace::AddressType, word as i64).expect("its memory");
    }

    fn word(&self, address: u64) -> u32 {
        (self.peek(address & !7) >> (8 * (address & 7))) as u32
    }

    fn poke_word(&self, address: u64, word: u32) {
        let shift = 8 * (address & 7);
        let before = self.peek(address & !7) & !(0xffff_ffff << shift);
        self.poke(address & !7, before | u64::from(word) << shift);
    }

    /// The page of its stack where its arguments are.
    pub fn stack_page(&self) -> u64 {
        self.memory & !4095
    }

    /// Whether it is gone.
    pub fn is_gone(&self) -> bool {
        self.gone
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        if self.gone {
            // Its parent hears of its end only when who stood over its threads has.
            let gone = |thread: &Pid| {
                let ended = waitpid(*thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
                matches!(ended, Err(_) | Ok(WaitStatus::Signaled(..) | WaitStatus::Exited(..)))
            };
            let began = Instant::now();
            let mut left = self.others.clone();
            while !left.is_empty() && began.elapsed() < PATIENCE {
                left.retain(|thread| !gone(thread));
                std::thread::sleep(Duration::from_micros(200));
            }
            return;
        }
        if ptrace::setregs(self.thread, self.before).is_err() {
            return shoot(self.pid);
        }
        for thread in self.others.iter().chain([&self.thread]) {
            let _ = ptrace::detach(*thread, None);
        }
    }
}
