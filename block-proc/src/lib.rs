//! block-proc: the disks of the machine, and its random numbers.
//!
//! **What it may hold.** The disks' file descriptors, guest RAM read-write, and of every virtqueue the kick and the call
//! eventfd; connections of NBD that it was handed, and whoever is at their other end is hostile ([`nbd`]). Never /dev/kvm, a
//! path, a socket of its own making, or JSON. What it may ask of the kernel is
//! `policies/block-proc.json`, loaded before the first byte of the guest is read; what its io_uring may do is
//! [`engine::io_uring`].
//!
//! **Who talks to it.** The supervisor, over one channel ([`ipc::block`]): it says which devices there are, hands over
//! disks and sources of random bytes, passes on what drivers programmed, pauses. And the guest, through RAM: everything
//! found there is hostile.
//!
//! **What its crash means.** The guest sees its disks stand still. Nothing that was acknowledged is lost, because an
//! answer is written only after the host had the data and the record of requests the way to it ([`ledger`]). The supervisor starts a successor.
//!
//! **How data flows.** No other process sees a request:
//!
//! ```text
//! kick eventfd ─► engine ─► iothread ─► device::virtqueue ─► device::request   (chain ─► checked request)
//!                                            ▲                     │
//! call eventfd ◄─ one per queue and turn ◄───┤              device::serve ─► node ─► executor::io ─► engine ─► host file
//!                                            └───── answer ◄──────┘             (futures, run by the iothread)
//! ```
//!
//! [`control`] is the main thread; [`iothread`] owns everything that touches the guest. There is one of it, and one more
//! for each iothread object, each with its own devices, executor and engine; all are there before the seal. A virtio-rng
//! device ([`device::rng`]) has no node: it reads its source by the engine into memory of its own. A request is a task of the
//! [`executor`]; a [`node`] is a driver (encrypted ones use [`crypto`]); [`graph`] has the nodes of a thread and moves the
//! edges between them while nothing is under way; [`throttle`] holds requests back where there are limits; an [`engine`] is
//! how the host is asked (io_uring, or threads). Guest pages are given to the kernel as they are; [`buffer`] explains how
//! that stays sound.
//!
//! `unsafe` is in three places: `buffer` (raw memory), `engine::syscalls` and `engine::io_uring` (handing it to the
//! kernel); and one call of mallopt in the program's `main`.

pub mod bitmap;
pub mod bitmaps;
pub mod buffer;
pub mod control;
pub mod crypto;
pub mod device;
pub mod engine;
pub mod executor;
pub mod graph;
pub mod iothread;
pub mod job;
pub mod ledger;
pub mod mailbox;
pub mod nbd;
pub mod node;
pub mod polling;
pub mod throttle;
