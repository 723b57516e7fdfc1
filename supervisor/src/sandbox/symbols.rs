//! Where in a helper's program an address is: by the symbols of its executable, which is read when somebody asks.
//!
//! A sealed helper's program does not change, but its file may be replaced by a newer one meanwhile: then there is no answer
//! rather than a wrong one.

use std::cell::Cell;
use std::fs::{File, Metadata};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// The program of one helper.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    identity: Option<Identity>,
    load_address: Cell<Option<u64>>,
}

/// Which file it is, and which content of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

impl From<Metadata> for Identity {
    fn from(of: Metadata) -> Self {
        Self {
            device: of.dev(),
            inode: of.ino(),
            bytes: of.size(),
            changed: (of.mtime(), of.mtime_nsec()),
        }
    }
}

impl Program {
    /// That at a path, which has just been executed.
    pub fn started(path: PathBuf) -> Self {
        Self {
            identity: std::fs::metadata(&path).ok().map(Identity::from),
            path,
            load_address: Cell::new(None),
        }
    }

    /// It has said where it is loaded, before it could know anybody but us.
    pub fn loaded_at(&self, address: u64) {
        self.load_address.set(Some(address));
    }

    /// Its function at an address, as `name+0x12`. `None` where that is not known: its file is another one by now, or has no
    /// symbols, or the address is not in it.
    pub fn symbol(&self, address: u64) -> Option<String> {
        let relative = address.checked_sub(self.load_address.get()?)?;
        let mut file = File::open(&self.path).ok()?;
        let identity = file.metadata().ok().map(Identity::from);
        if identity != self.identity {
            return None;
        }
        function(&mut file, relative).ok().flatten()
    }
}

const SYMBOL_TABLE: u32 = 2;
const SYMBOL_BYTES: usize = 24;
const SECTION_BYTES: usize = 64;
const FUNCTION: u8 = 2;
/// Far more than any name is long that somebody reads.
const MAX_NAME_BYTES: usize = 512;
/// How much of a table is in memory at a time: a multiple of a symbol's size.
const CHUNK_BYTES: usize = SYMBOL_BYTES * 2048;

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from(half(bytes, at)) | u32::from(half(bytes, at + 2)) << 16
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

fn read_at<const N: usize>(file: &mut (impl Read + Seek), offset: u64) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The function that an address in an executable's own numbering lies in.
fn function(file: &mut (impl Read + Seek), address: u64) -> io::Result<Option<String>> {
    let header: [u8; 64] = read_at(file, 0)?;
    if &header[..6] != b"\x7fELF\x02\x01" || usize::from(half(&header, 58)) != SECTION_BYTES {
        return Ok(None);
    }
    let (sections, count) = (long(&header, 40), half(&header, 60));
    let section = |file: &mut _, index: u64| {
        let at = sections.checked_add(index * SECTION_BYTES as u64);
        read_at::<SECTION_BYTES>(file, at.ok_or(io::ErrorKind::InvalidData)?)
    };
    for index in 0..u64::from(count) {
        let table = section(file, index)?;
        if word(&table, 4) != SYMBOL_TABLE {
            continue;
        }
        let (offset, bytes) = (long(&table, 24), long(&table, 32));
        let Some((name, start)) = find(file, offset, bytes, address)? else {
            return Ok(None);
        };
        let names = section(file, word(&table, 40).into())?;
        let at = long(&names, 24).checked_add(name.into());
        file.seek(SeekFrom::Start(at.ok_or(io::ErrorKind::InvalidData)?))?;
        let mut text = Vec::new();
        file.take(MAX_NAME_BYTES as u64).read_to_end(&mut text)?;
        let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
        let text = String::from_utf8_lossy(&text[..end]);
        let name = rustc_demangle::demangle(&text);
        return Ok(Some(format!("{name:#}+{:#x}", address - start)));
    }
    Ok(None)
}

/// The function symbol that covers an address: where its name is, and where it begins.
fn find(file: &mut (impl Read + Seek), offset: u64, bytes: u64, address: u64) -> io::Result<Option<(u32, u64)>> {
    file.seek(SeekFrom::Start(offset))?;
    let mut table = file.take(bytes);
    let mut chunk = Vec::with_capacity(CHUNK_BYTES);
    loop {
        chunk.clear();
        table.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut chunk)?;
        for symbol in chunk.chunks_exact(SYMBOL_BYTES) {
            let (start, size) = (long(symbol, 8), long(symbol, 16));
            if symbol[4] & 15 == FUNCTION && address.checked_sub(start).is_some_and(|into| into < size) {
                return Ok(Some((word(symbol, 0), start)));
            }
        }
        if chunk.len() < CHUNK_BYTES {
            return Ok(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(never)]
    extern "C" fn a_function_of_this_test() -> u32 {
        std::hint::black_box(7)
    }

    #[test]
    fn an_address_in_this_program_has_its_functions_name() {
        let program = Program::started(std::env::current_exe().unwrap());
        let at = a_function_of_this_test as extern "C" fn() -> u32 as usize as u64;
        assert_eq!(program.symbol(at), None, "where it is loaded is not known yet");
        program.loaded_at(ipc::helper::load_address());
        let name = program.symbol(at + 1).unwrap();
        assert!(name.ends_with("a_function_of_this_test+0x1"), "{name}");
        assert_eq!(program.symbol(ipc::helper::load_address()), None);
        assert_eq!(program.symbol(0), None);
        assert_eq!(program.symbol(u64::MAX), None);
    }

    #[test]
    fn another_file_in_its_place_gives_no_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        std::fs::copy(std::env::current_exe().unwrap(), &path).unwrap();
        let program = Program::started(path.clone());
        program.loaded_at(ipc::helper::load_address());
        let at = a_function_of_this_test as extern "C" fn() -> u32 as usize as u64;
        assert!(program.symbol(at).is_some());
        std::fs::remove_file(&path).unwrap();
        assert_eq!(program.symbol(at), None);
        std::fs::write(&path, b"\x7fELF\x02\x01").unwrap();
        assert_eq!(program.symbol(at), None);
    }

    #[test]
    fn a_damaged_file_is_no_reason_to_fail() {
        let whole = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        for length in [0, 10, 64, 4096] {
            let mut cut = io::Cursor::new(&whole[..length]);
            assert!(!matches!(function(&mut cut, 0x1000), Ok(Some(_))), "{length}");
        }
        let mut wild = whole[..4096].to_vec();
        wild[40..48].fill(0xff);
        assert!(!matches!(function(&mut io::Cursor::new(wild), 0x1000), Ok(Some(_))));
    }
}
