//! `bulkhead audit`: what Bulkhead may do, what it does, and whether these are the same.
//!
//! A program of its own, which `bulkhead audit` executes: neither the policy compiler nor the disassembler is linked into a
//! process of a machine. It asks no process of a machine anything. What it expects it compiles from `policies/*.json`
//! (embedded, or of a directory given with `--policies`); what it finds it reads from the kernel: /proc, ptrace, sock_diag.
//!
//! - [`policy`]: the reviewed data, as types; compiled; as tables; compared; searched for what weakens a filter.
//! - [`live`]: a running machine against its declaration.
//! - [`coverage`]: which rules a tracing run exercised.
//! - [`binary`]: which system calls a helper's code can make, against its policy.

pub mod binary;
pub mod command;
pub mod coverage;
pub mod live;
pub mod policy;
