//! One process's userfaultfd: protecting its mappings of guest RAM, and the faults there. The only place that knows
//! `linux/userfaultfd.h`.
//!
//! Of what a userfaultfd can do only this is used, and no more passes the sealed filter: in particular nothing that would
//! put content into the other process's memory.

use ipc::Failure;
use ipc::live::MemoryWatch;
use nix::errno::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Faults that are taken at a time.
pub const MESSAGES: usize = 16;

/// `UFFD_API`.
const API: u64 = 0xaa;
/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`.
const WRITE_PROTECT: u64 = 1 << 0;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`: also of shared memory, and of pages of it that nobody has touched yet.
const OF_SHARED_MEMORY: u64 = 1 << 12;
/// `UFFDIO_REGISTER_MODE_WP`.
const REGISTER_WRITE_PROTECT: u64 = 1 << 1;
/// `UFFDIO_WRITEPROTECT_MODE_WP`.
const PROTECT: u64 = 1 << 0;
/// `UFFD_EVENT_PAGEFAULT`.
const PAGE_FAULT: u8 = 0x12;

/// `struct uffdio_api`.
#[repr(C)]
struct ApiRequest {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Range {
    start: u64,
    length: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct RegisterRequest {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct ProtectRequest {
    range: Range,
    mode: u64,
}

/// `struct uffd_msg`, as far as it concerns page faults.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

nix::ioctl_readwrite!(uffdio_api, API as u8, 0x3f, ApiRequest);
nix::ioctl_readwrite!(uffdio_register, API as u8, 0x00, RegisterRequest);
nix::ioctl_readwrite!(uffdio_writeprotect, API as u8, 0x06, ProtectRequest);

/// A watched process. Offsets are those of the memory fd.
pub struct Faults(MemoryWatch);

impl Faults {
    /// Agrees with the kernel on what is needed and has it report on the process's mappings. Nothing is protected yet.
    ///
    /// # Errors
    /// Names what the kernel lacks.
    pub fn begin(watch: MemoryWatch) -> Result<Self, Failure> {
        let faults = Self(watch);
        faults.agree()?;
        for mapping in &faults.0.mappings {
            let mut request = RegisterRequest {
                range: Range {
                    start: mapping.address,
                    length: mapping.bytes,
                },
                mode: REGISTER_WRITE_PROTECT,
                ioctls: 0,
            };
            // SAFETY: the request reads and writes one structure of its own type; it concerns another process's memory.
            unsafe { uffdio_register(faults.fd(), &raw mut request) }.map_err(failed("UFFDIO_REGISTER"))?;
        }
        Ok(faults)
    }

    fn agree(&self) -> Result<(), Failure> {
        let ask = |features| {
            let mut request = ApiRequest {
                api: API,
                features,
                ioctls: 0,
            };
            // SAFETY: as above.
            unsafe { uffdio_api(self.fd(), &raw mut request) }.map(|_| request.features)
        };
        match ask(WRITE_PROTECT | OF_SHARED_MEMORY) {
            Ok(_) => Ok(()),
            // It does not say which it lacks, but which it has.
            Err(Errno::EINVAL) => {
                let has = ask(0).map_err(failed("UFFDIO_API"))?;
                Err(Failure::new(lacks(has)))
            }
            Err(errno) => Err(failed("UFFDIO_API")(errno)),
        }
    }

    fn fd(&self) -> i32 {
        self.0.faults.as_fd().as_raw_fd()
    }

    /// Holds back writes from now on. Pages that nobody has touched are not touched by this.
    ///
    /// # Errors
    /// The system's.
    pub fn protect(&self, offset: u64, bytes: u64) -> Result<(), Failure> {
        self.set(offset, bytes, PROTECT)
            .map_err(|error| Failure::new(format!("UFFDIO_WRITEPROTECT: {error}")))
    }

    /// Lets writes through again, and those that wait.
    ///
    /// # Errors
    /// The system's.
    pub fn lift(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.set(offset, bytes, 0)
    }

    fn set(&self, offset: u64, bytes: u64, mode: u64) -> io::Result<()> {
        let end = offset + bytes;
        for mapping in &self.0.mappings {
            let (first, last) = (mapping.offset.max(offset), (mapping.offset + mapping.bytes).min(end));
            if first >= last {
                continue;
            }
            let mut request = ProtectRequest {
                range: Range {
                    start: mapping.address + (first - mapping.offset),
                    length: last - first,
                },
                mode,
            };
            loop {
                // SAFETY: as above.
                match unsafe { uffdio_writeprotect(self.fd(), &raw mut request) } {
                    Ok(_) => break,
                    // The process changes its mappings this moment.
                    Err(Errno::EAGAIN | Errno::EINTR) => {}
                    // It has ended, and the machine with it.
                    Err(Errno::ESRCH) => return Ok(()),
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
        Ok(())
    }

    /// Waits for faults; returns where they are.
    ///
    /// # Errors
    /// The system's.
    pub fn wait<'a>(&self, offsets: &'a mut [u64; MESSAGES]) -> io::Result<impl Iterator<Item = u64> + use<'a>> {
        let mut messages = [Message::default(); MESSAGES];
        let vector = libc::iovec {
            iov_base: messages.as_mut_ptr().cast(),
            iov_len: size_of_val(&messages),
        };
        let bytes = loop {
            // SAFETY: one valid vector; any bytes are a valid message. Without an offset this is `readv`.
            let bytes = unsafe { libc::preadv2(self.fd(), &raw const vector, 1, -1, 0) };
            match usize::try_from(bytes) {
                Ok(bytes) => break bytes,
                Err(_) if matches!(Errno::last(), Errno::EINTR | Errno::EAGAIN) => {}
                Err(_) => return Err(Errno::last().into()),
            }
        };
        let mut count = 0;
        for message in &messages[..bytes / size_of::<Message>()] {
            if message.event == PAGE_FAULT
                && let Some(offset) = self.offset(message.address)
            {
                offsets[count] = offset;
                count += 1;
            }
        }
        Ok(offsets[..count].iter().copied())
    }

    fn offset(&self, address: u64) -> Option<u64> {
        self.0.mappings.iter().find_map(|mapping| {
            let into = address.checked_sub(mapping.address)?;
            (into < mapping.bytes).then(|| mapping.offset + into)
        })
    }
}

fn failed(call: &'static str) -> impl Fn(Errno) -> Failure {
    move |errno| Failure {
        message: format!("{call}: {}", errno.desc()),
        errno: Some(errno as i32),
    }
}

/// What is missing among the kernel's features.
pub fn lacks(has: u64) -> String {
    let what = if has & WRITE_PROTECT == 0 {
        "userfaultfd's write protection (UFFD_FEATURE_PAGEFAULT_FLAG_WP, Linux 5.7)"
    } else {
        "userfaultfd's write protection of shared memory (UFFD_FEATURE_WP_HUGETLBFS_SHMEM, Linux 5.19)"
    };
    format!("live dumps need {what}, which this kernel lacks")
}
