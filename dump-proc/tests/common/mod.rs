//! What the tests share: a guest's memory, a helper that is ready to dump it, and a reader of what it wrote.

// Each test file uses its own part of this.
#![allow(dead_code)]

use bulkhead_tests::bare::Bare;
use ipc::Failure;
use ipc::caps::{GuestMemRo, SeccompListener};
use ipc::dump::{DumpEvent, DumpForm, DumpOutput, DumpRange, DumpReply, DumpRequest};
use ipc::memory::{HIGH_RAM_START, LOW_RAM_END};
use ipc::vcpu::VcpuRegisters;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// Guest RAM.
pub struct Ram {
    pub memfd: File,
    pub bytes: u64,
}

impl Ram {
    /// RAM that nobody has touched.
    pub fn new(bytes: u64) -> Self {
        let memfd = File::from(memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap());
        memfd.set_len(bytes).unwrap();
        Self { memfd, bytes }
    }

    /// Writes bytes that are different everywhere and never zero.
    pub fn fill(&self, guest_address: u64, length: u64) {
        self.write(guest_address, &pattern(guest_address, length));
    }

    pub fn write(&self, guest_address: u64, bytes: &[u8]) {
        self.memfd.write_all_at(bytes, offset_of(guest_address)).unwrap();
    }

    /// Host memory that guest RAM takes up, in blocks of 512 bytes.
    pub fn blocks(&self) -> u64 {
        self.memfd.metadata().unwrap().blocks()
    }

    /// As the supervisor opens it for dump-proc: another open file description, read-only.
    pub fn read_only(&self) -> GuestMemRo {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.memfd));
        GuestMemRo::new(File::open(path).unwrap().into())
    }
}

pub fn offset_of(guest_address: u64) -> u64 {
    if guest_address < HIGH_RAM_START {
        guest_address
    } else {
        guest_address - HIGH_RAM_START + LOW_RAM_END
    }
}

/// The bytes that [`Ram::fill`] writes.
pub fn pattern(guest_address: u64, length: u64) -> Vec<u8> {
    (guest_address..guest_address + length)
        .map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 | 1)
        .collect()
}

/// A dump-proc that has been set up and sealed.
pub struct Dumper {
    pub bare: Bare<DumpRequest, DumpReply, DumpEvent>,
    pub listener: SeccompListener,
}

impl Dumper {
    pub fn sealed(ram: &Ram) -> Self {
        let mut bare = Bare::start(env!("CARGO_BIN_EXE_dump-proc"));
        let setup = DumpRequest::Setup {
            memory: ram.read_only(),
            ram_bytes: ram.bytes,
        };
        assert!(matches!(bare.ask(setup), Ok(DumpReply::Done)));
        let Ok(DumpReply::Sealed { listener, .. }) = bare.ask(DumpRequest::Seal) else {
            panic!("not sealed")
        };
        Self { bare, listener }
    }

    /// Asks for the dump; returns the bytes of guest memory in it.
    pub fn write(
        &mut self,
        output: impl Into<OwnedFd>,
        registers: Vec<VcpuRegisters>,
        range: Option<DumpRange>,
    ) -> Result<u64, Failure> {
        self.write_form(output, registers, DumpForm::Elf { range, paging: false })
    }

    /// As [`Self::write`], in any form.
    pub fn write_form(
        &mut self,
        output: impl Into<OwnedFd>,
        registers: Vec<VcpuRegisters>,
        form: DumpForm,
    ) -> Result<u64, Failure> {
        let request = DumpRequest::Write {
            output: DumpOutput::new(output.into()).unwrap(),
            registers,
            vmcoreinfo: None,
            form,
        };
        self.bare.ask(request).map(|reply| match reply {
            DumpReply::Written { memory_bytes } => memory_bytes,
            other => panic!("unexpected {other:?}"),
        })
    }
}

/// Dumps everything, with one vCPU.
pub fn dump(ram: &Ram, output: impl Into<OwnedFd>) -> Result<u64, Failure> {
    Dumper::sealed(ram).write(output, vec![registers(0)], None)
}

/// Registers that can be told apart.
pub fn registers(index: u64) -> VcpuRegisters {
    VcpuRegisters {
        general: std::array::from_fn(|register| 0x1111 * (1 + register as u64) + index),
        rip: 0xffff_ffff_8100_0000 + index,
        rflags: 0x202,
        ..VcpuRegisters::default()
    }
}

/// A PT_LOAD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    pub offset: u64,
    pub guest_address: u64,
    pub bytes: u64,
}

/// The PT_LOADs of a dump that begins at `start` of the file.
pub fn loads(dump: &File, start: u64) -> Vec<Load> {
    let u64_at = |at: u64| {
        let mut bytes = [0; 8];
        dump.read_exact_at(&mut bytes, start + at).unwrap();
        u64::from_le_bytes(bytes)
    };
    assert_eq!(u64_at(0), u64::from_le_bytes(*b"\x7fELF\x02\x01\x01\0"));
    let count = u64_at(56) & 0xffff;
    (0..count)
        .map(|index| 64 + 56 * index)
        .filter(|at| u64_at(*at) as u32 == 1)
        .map(|at| {
            assert_eq!(u64_at(at + 32), u64_at(at + 40), "p_filesz and p_memsz");
            assert_eq!(u64_at(at + 16), u64_at(at + 24), "p_vaddr and p_paddr");
            Load {
                offset: u64_at(at + 8),
                guest_address: u64_at(at + 24),
                bytes: u64_at(at + 32),
            }
        })
        .collect()
}

/// Compares every byte of the dump with guest RAM. (Reading the memfd's holes by `read` does not fill them.)
pub fn assert_equal_to_ram(dump: &File, start: u64, ram: &Ram) {
    for load in loads(dump, start) {
        assert_eq!(load.offset % 4096, load.guest_address % 4096);
        let mut at = 0;
        while at < load.bytes {
            let step = (load.bytes - at).min(4 * MIB);
            let (mut got, mut wanted) = (vec![0; step as usize], vec![0; step as usize]);
            dump.read_exact_at(&mut got, start + load.offset + at).unwrap();
            ram.memfd
                .read_exact_at(&mut wanted, offset_of(load.guest_address) + at)
                .unwrap();
            if let Some(byte) = (0..got.len()).find(|index| got[*index] != wanted[*index]) {
                panic!("differs at {:#x}", load.guest_address + at + byte as u64);
            }
            at += step;
        }
    }
}

/// A value of /proc/PID/status.
pub fn status_of(pid: u32, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text
        .lines()
        .find(|line| line.split(':').next() == Some(name))
        .unwrap_or_else(|| panic!("no {name}"));
    line[name.len() + 1..].trim().to_owned()
}

/// Makes reads and writes of the other end return at once instead of waiting.
pub fn set_nonblocking(fd: impl AsFd) {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
}
