//! Why a kernel cannot be booted. Each message is one line that names the file and what is wrong with it.

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file ends before what its headers promise.
    #[error("the {what} is truncated: {detail}")]
    Truncated {
        /// "kernel image" or "initrd".
        what: &'static str,
        /// What is missing.
        detail: String,
    },
    /// The file contradicts its format.
    #[error("the kernel image is damaged: {0}")]
    Damaged(String),
    /// The file is sound, but cannot be booted here.
    #[error("the kernel image cannot be booted: {0}")]
    Unsupported(String),
    /// None of the formats.
    #[error(
        "the kernel image is of no known format: wanted is a bzImage, an ELF file with a PVH note, or a flat test image"
    )]
    UnknownFormat,
    /// It does not fit.
    #[error("the {what} does not fit into guest RAM: {detail}")]
    TooLarge {
        /// "kernel image" or "initrd".
        what: &'static str,
        /// Sizes.
        detail: String,
    },
    /// The command line is longer than the kernel takes.
    #[error("the kernel command line has {bytes} bytes, this kernel takes {limit}")]
    CommandLineLength {
        /// Its length.
        bytes: usize,
        /// The most.
        limit: usize,
    },
    /// The command line contains a NUL.
    #[error("the kernel command line contains a NUL byte")]
    CommandLineNul,
    /// The file cannot be read.
    #[error("reading the {what}: {errno}")]
    Read {
        /// "kernel image" or "initrd".
        what: &'static str,
        /// The system's error.
        errno: nix::errno::Errno,
    },
    /// Guest RAM is not where it should be.
    #[error("writing to guest RAM: {0}")]
    Ram(#[from] vm_memory::GuestMemoryError),
}
