//! The launcher's system calls (and the opener's) that nix does not have, or has only with allocation. All of them are async-signal-safe, so
//! that they may run between clone3 and exec.

use nix::errno::Errno;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Result of a raw call.
pub type SysResult<T> = Result<T, Errno>;

/// Turns -1 into errno.
fn check(result: libc::c_long) -> SysResult<libc::c_long> {
    if result < 0 { Err(Errno::last()) } else { Ok(result) }
}

/// What clone3 returned in this process.
pub enum Cloned {
    /// In the new process.
    Child,
    /// In the old one.
    Parent {
        /// The child's pid.
        pid: i32,
        /// Its pidfd, close-on-exec.
        pidfd: OwnedFd,
    },
}

/// fork with new namespaces and a pidfd.
///
/// # Safety
/// The caller is single-threaded, and the child only makes async-signal-safe calls until it executes or exits.
pub unsafe fn clone_with_namespaces(flags: libc::c_int) -> SysResult<Cloned> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: all-zero is a valid clone_args: no stack, no TLS, no tid pointers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = u64::from((flags | libc::CLONE_PIDFD) as u32);
    arguments.pidfd = &raw mut pidfd as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: the arguments outlive the call; without a stack the child continues on a copy of ours, as after fork.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: the kernel has stored a new descriptor of ours.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Cloned::Parent { pid: pid as i32, pidfd })
}

/// Closes all descriptors from `first` to `last`. Nothing that is still used may be among them.
pub fn close_range(first: u32, last: u32) -> SysResult<()> {
    // SAFETY: plain numbers; the caller's contract is above.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
}

/// dup3: puts `from` at number `to`.
pub fn duplicate_to(from: RawFd, to: RawFd, close_on_exec: bool) -> SysResult<()> {
    // SAFETY: plain numbers.
    check(unsafe { libc::dup3(from, to, if close_on_exec { libc::O_CLOEXEC } else { 0 }) }.into()).map(drop)
}

/// Puts /dev/null in the place of standard input, output and error.
pub fn detach_standard_files() -> SysResult<()> {
    let null = nix::fcntl::open(
        c"/dev/null",
        nix::fcntl::OFlag::O_RDWR | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )?;
    for number in 0..=2 {
        duplicate_to(null.as_raw_fd(), number, true)?;
    }
    Ok(())
}

/// fcntl(F_DUPFD_CLOEXEC): a duplicate at a number of at least `lowest`.
pub fn duplicate_above(from: RawFd, lowest: RawFd) -> SysResult<RawFd> {
    // SAFETY: plain numbers.
    check(unsafe { libc::fcntl(from, libc::F_DUPFD_CLOEXEC, lowest) }.into()).map(|fd| fd as RawFd)
}

/// pivot_root(".", "."): the current directory becomes the root, the old root is stacked on top of it.
pub fn pivot_to_current_directory() -> SysResult<()> {
    let here = c".".as_ptr();
    // SAFETY: valid C strings.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, here, here) }).map(drop)
}

/// Empties all three capability sets of the calling thread.
pub fn drop_capability_sets() -> SysResult<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    /// _LINUX_CAPABILITY_VERSION_3
    const VERSION: u32 = 0x2008_0522;
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let sets = [0u32; 6];
    // SAFETY: version 3 reads two structures of three words.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) }).map(drop)
}

/// Removes every capability from the bounding set.
pub fn drop_bounding_set() -> SysResult<()> {
    for capability in 0..64 {
        // SAFETY: plain numbers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
            return match Errno::last() {
                // One past the last that this kernel knows.
                Errno::EINVAL if capability > 0 => Ok(()),
                errno => Err(errno),
            };
        }
    }
    Ok(())
}

/// Locks the rules by which an id change or an exec could bring capabilities back.
pub fn lock_securebits() -> SysResult<()> {
    // SECBIT_NOROOT, NO_SETUID_FIXUP, NO_CAP_AMBIENT_RAISE, each with its lock, and KEEP_CAPS_LOCKED.
    const BITS: libc::c_ulong = 0b1110_1111;
    // SAFETY: plain numbers.
    check(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, BITS, 0, 0, 0) }.into()).map(drop)
}

/// Sets the signal that ends this process with its parent.
pub fn die_with_parent() -> SysResult<()> {
    // SAFETY: plain numbers.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) }.into()).map(drop)
}

/// Forbids privileges from executed files.
pub fn set_no_new_privs() -> SysResult<()> {
    // SAFETY: plain numbers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into()).map(drop)
}

/// Enters a Landlock domain.
pub fn landlock_restrict_self(ruleset: RawFd) -> SysResult<()> {
    // SAFETY: plain numbers.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset, 0) }).map(drop)
}

/// Executes `name` under a directory fd with its name, perhaps an argument, and no environment. Returns only on failure.
pub fn execute(directory: RawFd, name: &CStr, argument: Option<&CStr>) -> Errno {
    let argument = argument.map_or(std::ptr::null(), CStr::as_ptr);
    let argv = [name.as_ptr(), argument, std::ptr::null()];
    let environment: [*const libc::c_char; 1] = [std::ptr::null()];
    // SAFETY: both arrays are null-terminated and live.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            directory,
            name.as_ptr(),
            argv.as_ptr(),
            environment.as_ptr(),
            0,
        )
    };
    Errno::last()
}

/// Room for the control data of a few descriptors, aligned as cmsghdr.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Receives one packet with up to two descriptors into fixed buffers. Returns the packet's length (0: the peer closed).
pub fn receive(socket: BorrowedFd<'_>, packet: &mut [u8], fds: &mut [Option<OwnedFd>; 2]) -> SysResult<usize> {
    let mut part = libc::iovec {
        iov_base: packet.as_mut_ptr().cast(),
        iov_len: packet.len(),
    };
    let mut control = Control([0; 64]);
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    // SAFETY: all buffers outlive the call.
    let length =
        check(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) } as libc::c_long)?;
    let mut count = 0;
    // SAFETY: the message was filled in by the kernel; the CMSG functions stay inside its control buffer.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                let received = ((*header).cmsg_len - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                for index in 0..received {
                    let fd = OwnedFd::from_raw_fd(data.add(index).read_unaligned());
                    // More than two are closed here.
                    if let Some(slot) = fds.get_mut(count) {
                        *slot = Some(fd);
                    }
                    count += 1;
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    if message.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 || count > 2 {
        return Err(Errno::EMSGSIZE);
    }
    Ok(length as usize)
}

/// Sends one packet with at most one descriptor.
pub fn send(socket: BorrowedFd<'_>, packet: &[u8], fd: Option<BorrowedFd<'_>>) -> SysResult<()> {
    let mut part = libc::iovec {
        iov_base: packet.as_ptr().cast_mut().cast(),
        iov_len: packet.len(),
    };
    let mut control = Control([0; 64]);
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if let Some(fd) = fd {
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: the control buffer is larger than one descriptor's control message.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd.as_raw_fd());
        }
    }
    // SAFETY: all buffers outlive the call.
    check(unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) } as libc::c_long)
        .map(drop)
}
