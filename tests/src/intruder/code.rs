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

/// So much memory there is for arguments.
const MEMORY_BYTES: u64 = 64 << 10;

impl Puppet {
    /// Takes a process over. Its main thread waits in a system call, or makes one soon.
    ///
    /// # Panics
    /// When this process may not.
    pub fn seize(pid: i32) -> Self {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
        let mut threads: Vec<Pid> = threads
            .filter_map(|task| Some(Pid::from_raw(task.ok()?.file_name().to_str()?.parse().ok()?)))
            .collect();
        threads.sort();
        for thread in &threads {
            ptrace::seize(*thread, ptrace::Options::empty()).expect("PTRACE_SEIZE");
            ptrace::interrupt(*thread).expect("PTRACE_INTERRUPT");
            waitpid(*thread, Some(WaitPidFlag::__WALL)).expect("wait");
        }
        let thread = Pid::from_raw(pid);
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

    /// Whether it is gone.
    pub fn is_gone(&self) -> bool {
        self.gone
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        if self.gone {
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
