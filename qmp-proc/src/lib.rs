//! qmp-proc: one process serves one management client and ends with it.
//!
//! **Holds** the client's connection (or the two directions of a stdio monitor), the channel to the supervisor, the log.
//! **Never holds** guest RAM, disks, paths or /dev/kvm. It is the only process that parses what a client writes; a client
//! that breaks it has gained a process that can send typed commands over one channel, and the supervisor decides about
//! each of those.
//!
//! **Talks to** the supervisor alone: [`ipc::qmp`]. **A crash** costs the client its connection; other monitors have
//! processes of their own.
//!
//! # Data flow
//! ```text
//! bytes ─ json::Reader ─ Value ─ session ─ schema (checked, typed) ─ ipc::qmp::QmpCall ─▶ supervisor
//! bytes ◀ json::Printer ─ Value ◀ session ◀ json::ser ◀ ipc::qmp::{Return, TimedEvent} ◀─ supervisor
//! ```
//! [`json`] knows the wire's dialect, [`schema`] the commands, [`session`] the protocol's states, [`connection`] the file
//! descriptors. Only [`connection`] makes system calls; the rest is plain data in and out.
//!
//! # Life
//! Setup → memory is reserved → sealed → spare → Serve → the client leaves, or the channel closes → exit. After sealing
//! the process can do eight system calls (`policies/qmp-proc.json`), none of which gets it memory: see [`memory`].
//!
//! # Limits
//! A message has at most 64 MiB of tokens, 2 Mi tokens and 1024 levels; it is read into a value of bounded size, and its
//! answer is printed piecewise. Without `oob` one command is read and carried out at a time, with it up to eight wait. A
//! client that does not read its answers is not read from; one that does not read its events is dropped
//! ([`session::MAX_QUEUED_OUTPUT`]).

pub mod connection;
pub mod human;
pub mod json;
pub mod memory;
pub mod name;
pub mod schema;
pub mod session;
