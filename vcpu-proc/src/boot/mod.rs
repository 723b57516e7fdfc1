//! Getting a kernel into RAM and vCPU 0 to its first instruction.
//!
//! The formats are told apart by content. Kernel and initrd are untrusted: their headers are checked before anything is
//! copied, and what they ask for must lie in RAM. A kernel that lies can harm its own guest only.

mod bzimage;
pub mod entry;
mod error;
mod flat;
mod image;
mod memory_map;
mod pvh;
mod start_info;

pub use entry::Entry;
pub use error::BootError;

use image::Image;
use ipc::caps::{InitrdFd, KernelFd};
use ipc::memory::GuestRam;
use ipc::vcpu::KernelFormat;
use memory_map::{MAX_COMMAND_LINE_BYTES, load_initrd, low_ram_end, write_command_line};

/// What the kernel is loaded into.
pub struct Target<'a> {
    /// Guest RAM.
    pub ram: &'a GuestRam,
    /// Its size.
    pub ram_bytes: u64,
    /// Address of the ACPI root pointer.
    pub rsdp: u64,
}

/// What to boot.
pub struct Source {
    /// Kernel image.
    pub kernel: KernelFd,
    /// Initial RAM disk.
    pub initrd: Option<InitrdFd>,
    /// Command line without a final NUL.
    pub command_line: String,
}

/// Loads kernel, initrd and command line; returns how to enter the kernel.
///
/// # Errors
/// Names what is wrong with the files or the command line.
pub fn load(target: &Target<'_>, source: Source) -> Result<(KernelFormat, Entry), BootError> {
    let Target { ram, ram_bytes, rsdp } = *target;
    let ram_end = low_ram_end(ram_bytes);
    let mut kernel = Image::new(source.kernel.into_fd(), "kernel image")?;
    let initrd = source.initrd.map(|fd| Image::new(fd.into_fd(), "initrd")).transpose()?;
    match detect(&kernel)? {
        KernelFormat::BzImage => {
            let loaded = bzimage::load(ram, ram_bytes, &mut kernel)?;
            write_command_line(ram, &source.command_line, loaded.command_line_bytes)?;
            let initrd = load_initrd(ram, initrd.as_ref(), loaded.end, loaded.initrd_end)?;
            let rsi = bzimage::write_zero_page(ram, ram_bytes, rsdp, &loaded, initrd)?;
            let rip = loaded.entry;
            Ok((KernelFormat::BzImage, Entry::Long { rip, rsi }))
        }
        KernelFormat::Pvh => {
            let (eip, end) = pvh::load(ram, ram_bytes, &mut kernel)?;
            write_command_line(ram, &source.command_line, MAX_COMMAND_LINE_BYTES)?;
            let initrd = load_initrd(ram, initrd.as_ref(), end, ram_end)?;
            // Below 640 KiB.
            let ebx = start_info::write(ram, ram_bytes, rsdp, initrd)? as u32;
            Ok((KernelFormat::Pvh, Entry::Protected { eip, ebx }))
        }
        KernelFormat::Flat => {
            let (rip, end) = flat::load(ram, ram_bytes, &kernel)?;
            write_command_line(ram, &source.command_line, MAX_COMMAND_LINE_BYTES)?;
            let initrd = load_initrd(ram, initrd.as_ref(), end, ram_end)?;
            let rsi = start_info::write(ram, ram_bytes, rsdp, initrd)?;
            Ok((KernelFormat::Flat, Entry::Long { rip, rsi }))
        }
    }
}

fn detect(kernel: &Image) -> Result<KernelFormat, BootError> {
    let mut start = [0; bzimage::MAGIC_OFFSET + 4];
    let available = usize::try_from(kernel.size_bytes())
        .unwrap_or(usize::MAX)
        .min(start.len());
    kernel.read_at(&mut start[..available], 0, "it shrank while it was read")?;
    if start.starts_with(flat::MAGIC) {
        Ok(KernelFormat::Flat)
    } else if start.starts_with(pvh::MAGIC) {
        Ok(KernelFormat::Pvh)
    } else if start[bzimage::MAGIC_OFFSET..] == *bzimage::MAGIC {
        Ok(KernelFormat::BzImage)
    } else if available < start.len() {
        Err(BootError::Truncated {
            what: "kernel image",
            detail: format!("it has {available} bytes"),
        })
    } else {
        Err(BootError::UnknownFormat)
    }
}

#[cfg(test)]
mod tests;
