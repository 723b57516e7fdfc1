//! A live dump's memory against a writer in this process, through the kernel's real userfaultfd.

use super::*;
use crate::memory::GuestMemory;
use ipc::caps::{FaultDeviceFd, FaultFd, GuestMemRo};
use ipc::live::RamMapping;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use std::num::NonZero;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const PAGES: u64 = 512;
const BYTES: u64 = PAGES * PAGE_BYTES;

/// A mapping of guest RAM as vcpu-proc has one.
struct Writer {
    ram: NonNull<u8>,
}

// SAFETY: the mapping stays; it is written through atomics alone.
unsafe impl Send for Writer {}
// SAFETY: likewise.
unsafe impl Sync for Writer {}

impl Writer {
    fn word(&self, offset: u64) -> &AtomicU64 {
        assert!(offset < BYTES && offset.is_multiple_of(8));
        // SAFETY: aligned and inside of a shared mapping, which any 8 bytes are valid in.
        unsafe { self.ram.byte_add(offset as usize).cast::<AtomicU64>().as_ref() }
    }
}

/// Guest RAM whose writers dump-proc can hold back; `None`: not on this machine.
fn memory() -> Option<(Arc<GuestMemory>, Arc<Writer>)> {
    let device = match std::fs::File::options().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => FaultDeviceFd::new(device.into()),
        Err(error) => {
            println!("SKIPPED: /dev/userfaultfd: {error}");
            return None;
        }
    };
    let fd = memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&fd, BYTES as i64).unwrap();
    let length = NonZero::new(BYTES as usize).unwrap();
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let ram = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, &fd, 0) }.unwrap();
    // SAFETY: USERFAULTFD_IOC_NEW takes flags.
    let made = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), 0xaa00, libc::O_CLOEXEC) };
    assert!(made >= 0, "{}", std::io::Error::last_os_error());
    let watch = MemoryWatch {
        // SAFETY: just made.
        faults: FaultFd::new(unsafe { OwnedFd::from_raw_fd(made) }),
        mappings: vec![RamMapping {
            address: ram.as_ptr() as u64,
            offset: 0,
            bytes: BYTES,
        }],
    };
    let memory = Arc::new(GuestMemory::new(GuestMemRo::new(fd), BYTES).unwrap());
    let live = Live::new(vec![watch], &memory.pieces(None)).unwrap_or_else(|failure| panic!("{}", failure.message));
    memory.go_live(live).unwrap();
    Some((memory, Arc::new(Writer { ram: ram.cast() })))
}

fn read_word(memory: &GuestMemory, offset: u64) -> u64 {
    let mut word = [0; 8];
    memory.read(offset, &mut word).unwrap();
    u64::from_le_bytes(word)
}

#[test]
fn what_is_written_later_is_not_in_the_dump() {
    let Some((memory, writer)) = memory() else { return };
    writer.word(8).store(1, Ordering::Relaxed);
    let guards = Guards::start().unwrap();
    guards.arm(&memory).unwrap();
    let rest = memory.extent(PAGE_BYTES, BYTES).unwrap();
    assert!(!rest.is_data, "protecting has touched holes");
    assert_eq!(rest.bytes, BYTES - PAGE_BYTES);
    // One page with data, one that nobody has touched.
    for offset in [8, 100 * PAGE_BYTES] {
        writer.word(offset).store(2, Ordering::Relaxed);
    }
    assert_eq!(read_word(&memory, 8), 1);
    assert_eq!(read_word(&memory, 100 * PAGE_BYTES), 0);
    let mut part = [9; 4];
    memory.read(6, &mut part).unwrap();
    assert_eq!(part, [0, 0, 1, 0]);
    let mut now = [0; 8];
    memory.read_now(8, &mut now).unwrap();
    assert_eq!(u64::from_le_bytes(now), 2);
    memory.release(0, PAGE_BYTES).unwrap();
    assert_eq!(read_word(&memory, 8), 2, "what is released is what is there");
    assert_eq!(read_word(&memory, 100 * PAGE_BYTES), 0);
}

/// Two pages far from each other are kept in step; the dump reads one early, the other late.
#[test]
fn pages_that_are_kept_in_step_are_in_step_in_the_dump() {
    let (first, second) = (16, (PAGES - 1) * PAGE_BYTES);
    for round in 0..30 {
        let Some((memory, writer)) = memory() else { return };
        let end = Arc::new(AtomicBool::new(false));
        let gate = Arc::new(Mutex::new(()));
        let count = {
            let (writer, end, gate) = (Arc::clone(&writer), Arc::clone(&end), Arc::clone(&gate));
            std::thread::spawn(move || {
                let mut count = 0;
                while !end.load(Ordering::Relaxed) {
                    // The guest can be paused between two steps.
                    let _turn = gate.lock().unwrap();
                    count += 1;
                    writer.word(first).store(count, Ordering::SeqCst);
                    writer.word(second).store(count, Ordering::SeqCst);
                    writer
                        .word(count % PAGES * PAGE_BYTES + 8)
                        .store(count, Ordering::SeqCst);
                }
                count
            })
        };
        let guards = Guards::start().unwrap();
        std::thread::yield_now();
        let paused = gate.lock().unwrap();
        let wanted = writer.word(first).load(Ordering::SeqCst);
        guards.arm(&memory).unwrap();
        drop(paused);
        let mut seen = Vec::new();
        let mut page = [0; PAGE];
        for number in 0..PAGES {
            memory.read(number * PAGE_BYTES, &mut page).unwrap();
            memory.release(number * PAGE_BYTES, PAGE_BYTES).unwrap();
            for offset in [first, second] {
                if offset / PAGE_BYTES == number {
                    let at = (offset % PAGE_BYTES) as usize;
                    seen.push(u64::from_le_bytes(page[at..at + 8].try_into().unwrap()));
                }
            }
        }
        end.store(true, Ordering::Relaxed);
        count.join().unwrap();
        assert_eq!(seen, [wanted, wanted], "round {round}");
    }
}

/// The writer waits when nothing more can be put aside, and goes on when the dump has come along.
#[test]
fn what_is_put_aside_is_bounded() {
    let Some((memory, writer)) = memory() else { return };
    let live = memory.live().unwrap();
    assert_eq!(live.max_kept as u64 * PAGE_BYTES, MIN_KEPT_BYTES);
    let mut kept = live.kept();
    for page in 0..live.max_kept as u64 {
        kept.pages.insert(PAGES + page, None);
    }
    drop(kept);
    let guards = Guards::start().unwrap();
    guards.arm(&memory).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let waiting = {
        let done = Arc::clone(&done);
        std::thread::spawn(move || {
            writer.word(5 * PAGE_BYTES).store(1, Ordering::SeqCst);
            done.store(true, Ordering::SeqCst);
        })
    };
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(!done.load(Ordering::SeqCst), "a page beyond the bound was put aside");
    memory.release(5 * PAGE_BYTES, PAGE_BYTES).unwrap();
    waiting.join().unwrap();
}

#[test]
fn the_error_names_what_the_kernel_lacks() {
    for (has, name) in [
        (0, "UFFD_FEATURE_PAGEFAULT_FLAG_WP"),
        (1, "UFFD_FEATURE_WP_HUGETLBFS_SHMEM"),
    ] {
        assert!(faults::lacks(has).contains(name));
    }
}
