//! The freestanding guest in `tests/guest`: building it, its flat form, and the host's half of what it reports.
//!
//! The guest takes its orders from the kernel command line and reports in lines that start with `BHG: `;
//! `tests/guest/src/script.rs` and `tests/guest/src/cases/` say which.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// What every line of the guest's report starts with.
pub const LINE_PREFIX: &str = "BHG: ";
/// First bytes of a flat image; the load address follows, then the entry point.
pub const FLAT_MAGIC: &[u8; 8] = b"BHFLAT64";

const TARGET: &str = "x86_64-unknown-linux-gnu";
const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const PT_LOAD: u32 = 1;
/// First word of a `blk-log` record.
const RECORD_MAGIC: u64 = u64::from_le_bytes(*b"BHGRECRD");
/// Bytes of a `blk-log` record.
pub const RECORD_BYTES: usize = 512;

/// Path of the guest as an ELF file with a PVH note. Builds it first, once in this process; cargo's own lock orders
/// several processes.
///
/// # Panics
/// When it does not build.
pub fn image() -> PathBuf {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(build).clone()
}

/// Path of the guest as a flat image.
///
/// # Panics
/// As [`image`].
pub fn flat_image() -> PathBuf {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE
        .get_or_init(|| {
            let elf = image();
            let flat = flat_from_elf(&std::fs::read(&elf).expect("reading the guest")).expect("the guest's layout");
            let path = elf.with_extension("flat");
            let temporary = elf.with_extension(format!("flat.{}", std::process::id()));
            std::fs::write(&temporary, flat).expect("writing the flat guest");
            std::fs::rename(&temporary, &path).expect("naming the flat guest");
            path
        })
        .clone()
}

fn build() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest");
    let workspace = source.parent().and_then(Path::parent).expect("tests/guest");
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    // A relative CARGO_TARGET_DIR means relative to where cargo was called: the workspace.
    let target = workspace.join(target).join("guest");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(&source)
        .args(["build", "--release", "--quiet", "--locked", "--offline", "--target-dir"])
        .arg(&target);
    // Flags meant for the host programs would replace the guest's own.
    for name in [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "RUSTC_WORKSPACE_WRAPPER",
    ] {
        cargo.env_remove(name);
    }
    cargo.env_remove(format!(
        "CARGO_TARGET_{}_RUSTFLAGS",
        TARGET.to_uppercase().replace('-', "_")
    ));
    let output = cargo.output().expect("starting cargo");
    assert!(
        output.status.success(),
        "the guest does not build:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    target.join(TARGET).join("release").join("guest")
}

/// The flat form of the guest: what its ELF file loads, in one piece. The linker script puts the flat header first.
///
/// # Errors
/// Says what is wrong with the file.
pub fn flat_from_elf(elf: &[u8]) -> Result<Vec<u8>, &'static str> {
    if elf.len() < ELF_HEADER_BYTES || !elf.starts_with(b"\x7fELF\x02\x01") {
        return Err("not a 64-bit ELF file");
    }
    let table = usize::try_from(number(elf, 32, 8)?).map_err(|_| "program header offset")?;
    let count = usize::try_from(number(elf, 56, 2)?).map_err(|_| "program header count")?;
    let mut segments = Vec::new();
    for index in 0..count {
        let header = table + index * PROGRAM_HEADER_BYTES;
        if number(elf, header, 4)? != u64::from(PT_LOAD) {
            continue;
        }
        let [offset, address, file_bytes, memory_bytes] = [(8, 8), (24, 8), (32, 8), (40, 8)]
            .map(|(place, width)| number(elf, header + place, width).unwrap_or(u64::MAX));
        let end = offset.checked_add(file_bytes).ok_or("segment overflows")?;
        let data = elf
            .get(offset as usize..end as usize)
            .ok_or("segment outside of the file")?;
        segments.push((address, data, memory_bytes));
    }
    let start = segments
        .iter()
        .map(|segment| segment.0)
        .min()
        .ok_or("nothing to load")?;
    let mut flat = Vec::new();
    for (address, data, memory_bytes) in segments {
        let place = (address - start) as usize;
        let end = place + data.len().max(memory_bytes as usize);
        if flat.len() < end {
            flat.resize(end, 0);
        }
        flat[place..place + data.len()].copy_from_slice(data);
    }
    if flat.get(..8) != Some(FLAT_MAGIC) || number(&flat, 8, 8)? != start {
        return Err("the flat header is not where loading starts");
    }
    Ok(flat)
}

fn number(bytes: &[u8], place: usize, width: usize) -> Result<u64, &'static str> {
    let field = bytes.get(place..place + width).ok_or("file is too short")?;
    let mut whole = [0; 8];
    whole[..width].copy_from_slice(field);
    Ok(u64::from_le_bytes(whole))
}

/// The 64-bit word at an index of the guest's data pattern. Equal to `pattern::word` in the guest.
pub fn pattern_word(seed: u64, index: u64) -> u64 {
    let mut value = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The guest's checksum of data. Equal to `pattern::Checksum` in the guest.
pub fn checksum(data: &[u8]) -> u64 {
    data.chunks_exact(8).fold(0xcbf2_9ce4_8422_2325, |sum, word| {
        let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
        (sum ^ word).wrapping_mul(0x100_0000_01b3)
    })
}

/// The checksum that `blk-verify mib=… seed=…` reports.
pub fn pattern_checksum(mib: u64, seed: u64) -> u64 {
    (0..mib << 17).fold(0xcbf2_9ce4_8422_2325, |sum, index| {
        (sum ^ pattern_word(seed, index)).wrapping_mul(0x100_0000_01b3)
    })
}

/// The number of the `blk-log` record in a sector; `None` when the sector does not hold a whole record.
pub fn record_number(sector: &[u8]) -> Option<u64> {
    let word = |index: usize| number(sector, 8 * index, 8).ok();
    let own = word(1)?;
    let whole = word(0)? == RECORD_MAGIC
        && (2..RECORD_BYTES / 8).all(|index| word(index) == Some(pattern_word(own, index as u64)));
    whole.then_some(own)
}

/// The lines of the guest's report in what came from the serial port, without their prefix.
pub fn report(serial: &str) -> Vec<&str> {
    serial
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix(LINE_PREFIX))
        .collect()
}

/// The value of `key=` in the first report line that starts with `name `.
pub fn value<'a>(serial: &'a str, name: &str, key: &str) -> Option<&'a str> {
    report(serial)
        .into_iter()
        .filter(|line| line.split(' ').next() == Some(name))
        .find_map(|line| {
            line.split(' ')
                .find_map(|word| word.split_once('=').filter(|(found, _)| *found == key))
        })
        .map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_line_and_key() {
        let serial = "noise\r\nBHG: blk queues=4 ro=0\r\nBHG: ok blk\r\n";
        assert_eq!(value(serial, "blk", "ro"), Some("0"));
        assert_eq!(value(serial, "smp", "ro"), None);
        assert_eq!(report(serial), ["blk queues=4 ro=0", "ok blk"]);
    }

    #[test]
    fn checksum_of_the_pattern_is_that_of_its_bytes() {
        let bytes: Vec<u8> = (0..1 << 17)
            .flat_map(|index| pattern_word(7, index).to_le_bytes())
            .collect();
        assert_eq!(checksum(&bytes), pattern_checksum(1, 7));
    }

    #[test]
    fn a_file_that_is_no_elf_is_refused() {
        assert!(flat_from_elf(b"BHFLAT64").is_err());
        assert!(flat_from_elf(&[0; 100]).is_err());
    }
}
