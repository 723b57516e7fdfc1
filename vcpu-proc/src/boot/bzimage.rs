//! Linux bzImages, by the 64-bit boot protocol (Documentation/arch/x86/boot.rst): the setup header is checked here, the
//! compressed kernel copied by linux-loader, and the zero page written.

use super::error::BootError;
use super::image::Image;
use super::memory_map::{COMMAND_LINE, Initrd, ZERO_PAGE, low_ram_end, memory_map};
use crate::layout::KERNEL_RAM_START;
use ipc::memory::GuestRam;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{ByteValued, Bytes, GuestAddress};

/// Where the setup header starts in the file.
const HEADER_OFFSET: u64 = 0x1f1;
/// Where [`MAGIC`] is in the file.
pub const MAGIC_OFFSET: usize = 0x202;
/// "HdrS".
pub const MAGIC: &[u8; 4] = b"HdrS";

const BOOT_FLAG: u16 = 0xaa55;
const SECTOR_BYTES: u64 = 512;
/// First protocol with xloadflags, init_size and pref_address, Linux 3.8.
const MIN_VERSION: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// Distance of the 64-bit entry point from the load address.
const ENTRY_64_OFFSET: u64 = 0x200;
/// Boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// syssize counts paragraphs.
const PARAGRAPH_BYTES: u64 = 16;

/// A kernel in RAM.
pub struct Loaded {
    header: setup_header,
    /// Where it is entered in 64-bit mode.
    pub entry: u64,
    /// End of the memory that it needs before it reads the memory map.
    pub end: u64,
    /// End of the memory where it looks for an initrd.
    pub initrd_end: u64,
    /// Longest command line it takes.
    pub command_line_bytes: usize,
}

/// Loads the kernel.
///
/// # Errors
/// Names what is wrong with the file.
pub fn load(ram: &GuestRam, ram_bytes: u64, image: &mut Image) -> Result<Loaded, BootError> {
    let mut header = setup_header::default();
    image.read_at(
        header.as_mut_slice(),
        HEADER_OFFSET,
        "the setup header is not all there",
    )?;
    check(&header, image.size_bytes())?;
    let ram_end = low_ram_end(ram_bytes);
    let address = load_address(&header, image.size_bytes(), ram_end)?;
    let result = BzImage::load(ram, Some(GuestAddress(address)), image, None)
        .map_err(|error| BootError::Damaged(error.to_string()))?;
    // linux-loader has read the header again, and the file may have changed since: what was checked is what counts.
    let _ = result;
    let init_bytes = u64::from(header.init_size);
    Ok(Loaded {
        header,
        entry: address + ENTRY_64_OFFSET,
        end: address + init_bytes.max(payload_bytes(&header, image.size_bytes())),
        initrd_end: ram_end.min(u64::from(header.initrd_addr_max) + 1),
        command_line_bytes: usize::try_from(header.cmdline_size).unwrap_or(usize::MAX),
    })
}

fn setup_bytes(header: &setup_header) -> u64 {
    // 0 means 4 for the oldest kernels, and the boot sector comes first.
    let sectors = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    (sectors + 1) * SECTOR_BYTES
}

fn payload_bytes(header: &setup_header, file_bytes: u64) -> u64 {
    file_bytes.saturating_sub(setup_bytes(header))
}

fn check(header: &setup_header, file_bytes: u64) -> Result<(), BootError> {
    let (flag, version, flags64) = (header.boot_flag, header.version, header.xloadflags);
    if flag != BOOT_FLAG {
        return Err(BootError::Damaged(format!(
            "its boot flag is {flag:#x} instead of 0xaa55"
        )));
    }
    if version < MIN_VERSION || header.loadflags & LOADED_HIGH == 0 {
        return Err(BootError::Unsupported(format!(
            "it speaks boot protocol {}.{:02}, wanted is 2.12 or later (Linux 3.8)",
            version >> 8,
            version & 0xff
        )));
    }
    if flags64 & XLF_KERNEL_64 == 0 {
        return Err(BootError::Unsupported("it is not a 64-bit kernel".to_owned()));
    }
    let announced = u64::from(header.syssize) * PARAGRAPH_BYTES;
    let present = payload_bytes(header, file_bytes);
    if announced == 0 || present + PARAGRAPH_BYTES <= announced {
        return Err(BootError::Truncated {
            what: "kernel image",
            detail: format!("its header announces {announced} bytes behind the setup code, the file has {present}"),
        });
    }
    let (payload_offset, payload_length) = (header.payload_offset, header.payload_length);
    if u64::from(payload_offset) + u64::from(payload_length) > present || present <= ENTRY_64_OFFSET {
        return Err(BootError::Truncated {
            what: "kernel image",
            detail: format!(
                "its compressed kernel has {payload_length} bytes at {payload_offset:#x} behind the setup code, the \
                 file has {present}"
            ),
        });
    }
    Ok(())
}

/// Where the kernel goes: to the address it prefers, or when RAM is too small for that, as low as it can be moved.
fn load_address(header: &setup_header, file_bytes: u64, ram_end: u64) -> Result<u64, BootError> {
    let needed = u64::from(header.init_size).max(payload_bytes(header, file_bytes));
    let alignment = u64::from(header.kernel_alignment);
    let fits = |address: u64| address.checked_add(needed).is_some_and(|end| end <= ram_end);
    let preferred = header.pref_address;
    if preferred >= KERNEL_RAM_START && fits(preferred) {
        return Ok(preferred);
    }
    if header.relocatable_kernel != 0 && alignment.is_power_of_two() {
        let lowest = KERNEL_RAM_START.next_multiple_of(alignment);
        if fits(lowest) {
            return Ok(lowest);
        }
    }
    Err(BootError::TooLarge {
        what: "kernel image",
        detail: format!("it needs {needed:#x} bytes at {preferred:#x}, RAM for kernels ends at {ram_end:#x}"),
    })
}

/// Writes the zero page and returns its address.
///
/// # Errors
/// When there is no RAM for it.
pub fn write_zero_page(
    ram: &GuestRam,
    ram_bytes: u64,
    rsdp: u64,
    kernel: &Loaded,
    initrd: Initrd,
) -> Result<u64, BootError> {
    let mut params = boot_params {
        hdr: kernel.header,
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    // All addresses are below 4 GiB: both lie in low RAM.
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.ramdisk_image = initrd.address as u32;
    params.hdr.ramdisk_size = initrd.bytes as u32;
    let map = memory_map(ram_bytes);
    let mut table = params.e820_table;
    for (entry, range) in table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: range.start,
            size: range.bytes,
            r#type: range.kind.number(),
        };
    }
    params.e820_table = table;
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    ram.write_obj(params, GuestAddress(ZERO_PAGE))?;
    Ok(ZERO_PAGE)
}
