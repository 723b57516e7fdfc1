//! Typed capabilities: what a file descriptor in a message is, and so who may hold it.
//!
//! None is `Clone`. A holder that must keep its own copy says so with `try_clone`, which reads as what it is: one more
//! fd to account for.

use crate::codec;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

macro_rules! capabilities {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name(OwnedFd);

        impl $name {
            /// Names what this fd is. The caller vouches for it.
            pub fn new(fd: OwnedFd) -> Self {
                Self(fd)
            }
            /// A second fd of the same open file description.
            ///
            /// # Errors
            /// When the process has no free fd.
            pub fn try_clone(&self) -> std::io::Result<Self> {
                self.0.try_clone().map(Self)
            }
            /// Gives up the type.
            pub fn into_fd(self) -> OwnedFd {
                self.0
            }
        }

        impl AsFd for $name {
            fn as_fd(&self) -> BorrowedFd<'_> {
                self.0.as_fd()
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                codec::serialize_fd(self.0.as_raw_fd(), serializer)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                codec::deserialize_fd(deserializer).map(Self)
            }
        }
    )*};
}

capabilities! {
    /// Guest RAM, readable and writable: vcpu-proc and block-proc.
    GuestMemRw
    /// Guest RAM, read-only: dump-proc.
    GuestMemRo
    /// The record of requests under way ([`crate::inflight`]): block-proc, readable and writable.
    InflightFd
    /// One end of a pair whose other end tells when nothing of a block-proc is left, not even what the kernel still does for
    /// it: block-proc alone.
    FenceFd
    /// /dev/kvm: vcpu-proc alone.
    KvmFd
    /// Eventfd that the guest's queue notification signals (KVM_IOEVENTFD): vcpu-proc registers it, block-proc reads it.
    KickFd
    /// Eventfd that raises a queue's interrupt (KVM_IRQFD): block-proc writes it, vcpu-proc registers it.
    CallFd
    /// An open disk image or block device: block-proc alone.
    DiskFd
    /// A connection of NBD, in one direction or the other, that never blocks: block-proc alone.
    NbdSocketFd
    /// Where random bytes are read from: block-proc, for a virtio-rng device.
    RngSourceFd
    /// The byte stream behind a character device: the process that uses the bytes.
    ChardevFd
    /// One QMP client's connection, or one direction of a stdio monitor: qmp-proc alone.
    ClientFd
    /// Whatever a QMP client has passed along with a command: taken in by qmp-proc, kept by the supervisor until a command
    /// gives it a use, and then it becomes the capability of that use.
    ClientGivenFd
    /// A socket that the opener has made, or a client's that it has looked at: the supervisor, until its user gets it.
    SocketFd
    /// The kernel image, read-only: vcpu-proc while it loads.
    KernelFd
    /// The initial RAM disk, read-only: vcpu-proc while it loads.
    InitrdFd
    /// Where a dump goes, write-only: dump-proc.
    DumpFd
    /// /dev/userfaultfd: the process that makes a [`FaultFd`] with it, and closes it.
    FaultDeviceFd
    /// A userfaultfd of a process that maps guest RAM: made there, dump-proc while it dumps a running guest.
    FaultFd
    /// A vCPU, for its run page alone: whoever did not make the machine can do nothing else with it. The supervisor keeps it
    /// for the case that vcpu-proc ends; then a dump-proc maps the page and reads the last registers.
    RunPageFd
    /// The user-notification fd of a helper's sealed filter: made by the helper, kept by the supervisor.
    SeccompListener
}
