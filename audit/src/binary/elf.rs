//! As much of ELF as the audit needs: code, function symbols, and code addresses in data.

/// An executable.
pub struct Image<'a> {
    /// Where it begins.
    pub entry: u64,
    /// Executable sections: address and bytes.
    pub code: Vec<(u64, &'a [u8])>,
    /// Function symbols: address and name.
    pub symbols: Vec<(u64, String)>,
    /// Addresses that the program's start writes into data: where, and which.
    pub pointers: Vec<(u64, u64)>,
    /// Where the tables are through which code refers to functions: a pointer in them is used only where code names it.
    pub tables: Vec<std::ops::Range<u64>>,
}

/// Section types and flags.
const SYMBOLS: u32 = 2;
const RELOCATIONS: u32 = 4;
const NO_BITS: u32 = 8;
const EXECUTABLE: u64 = 4;
/// Symbol types: none, function, indirect function.
const NO_TYPE: u8 = 0;
const FUNCTION: u8 = 2;
const INDIRECT: u8 = 10;
/// Relocations whose addend is an address: R_X86_64_RELATIVE and R_X86_64_IRELATIVE.
const RELATIVE: [u32; 2] = [8, 37];

struct Section {
    name: u32,
    kind: u32,
    flags: u64,
    address: u64,
    offset: u64,
    size: u64,
    link: u32,
}

fn bytes<const N: usize>(data: &[u8], at: u64) -> Option<[u8; N]> {
    let at = usize::try_from(at).ok()?;
    data.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn half(data: &[u8], at: u64) -> Option<u16> {
    bytes(data, at).map(u16::from_le_bytes)
}

fn word(data: &[u8], at: u64) -> Option<u32> {
    bytes(data, at).map(u32::from_le_bytes)
}

fn long(data: &[u8], at: u64) -> Option<u64> {
    bytes(data, at).map(u64::from_le_bytes)
}

fn part(data: &[u8], offset: u64, size: u64) -> Option<&[u8]> {
    let from = usize::try_from(offset).ok()?;
    data.get(from..from.checked_add(usize::try_from(size).ok()?)?)
}

impl<'a> Image<'a> {
    /// Reads a 64-bit little-endian x86-64 file; `None` when it is something else or is damaged.
    pub fn parse(data: &'a [u8]) -> Option<Self> {
        if data.get(..6)? != b"\x7fELF\x02\x01" || half(data, 18)? != 62 {
            return None;
        }
        let (table, entry_size, count) = (long(data, 40)?, half(data, 58)?, half(data, 60)?);
        let sections: Vec<Section> = (0..u64::from(count))
            .map(|index| {
                let at = table.checked_add(index * u64::from(entry_size))?;
                Some(Section {
                    name: word(data, at)?,
                    kind: word(data, at + 4)?,
                    flags: long(data, at + 8)?,
                    address: long(data, at + 16)?,
                    offset: long(data, at + 24)?,
                    size: long(data, at + 32)?,
                    link: word(data, at + 40)?,
                })
            })
            .collect::<Option<_>>()?;
        let mut image = Self {
            entry: long(data, 24)?,
            code: Vec::new(),
            symbols: Vec::new(),
            pointers: Vec::new(),
            tables: Vec::new(),
        };
        let names = sections.get(usize::from(half(data, 62)?))?;
        let names = part(data, names.offset, names.size)?;
        for section in &sections {
            if section.kind == NO_BITS {
                continue;
            }
            let content = part(data, section.offset, section.size)?;
            if names
                .get(section.name as usize..)
                .is_some_and(|name| name.starts_with(b".got"))
            {
                image.tables.push(section.address..section.address + section.size);
            }
            if section.flags & EXECUTABLE != 0 {
                image.code.push((section.address, content));
            }
            match section.kind {
                SYMBOLS => {
                    let names = sections.get(section.link as usize)?;
                    image.read_symbols(content, part(data, names.offset, names.size)?);
                }
                RELOCATIONS => image.read_relocations(content),
                _ => {}
            }
        }
        Some(image)
    }

    /// Whether an address is in an executable section.
    pub fn is_code(&self, address: u64) -> bool {
        let within = |(start, bytes): &(u64, &[u8])| (*start..*start + bytes.len() as u64).contains(&address);
        self.code.iter().any(within)
    }

    fn read_symbols(&mut self, content: &[u8], names: &[u8]) {
        for symbol in content.chunks_exact(24) {
            let (Some(name), Some(address), Some(section)) = (word(symbol, 0), long(symbol, 8), half(symbol, 6)) else {
                continue;
            };
            let kind = symbol[4] & 15;
            if section == 0 || ![NO_TYPE, FUNCTION, INDIRECT].contains(&kind) || !self.is_code(address) {
                continue;
            }
            let text = names.get(name as usize..).unwrap_or_default();
            let end = text.iter().position(|byte| *byte == 0).unwrap_or(0);
            self.symbols
                .push((address, String::from_utf8_lossy(&text[..end]).into_owned()));
        }
    }

    fn read_relocations(&mut self, content: &[u8]) {
        for relocation in content.chunks_exact(24) {
            if let (Some(place), Some(kind), Some(addend)) =
                (long(relocation, 0), word(relocation, 8), long(relocation, 16))
                && RELATIVE.contains(&kind)
            {
                self.pointers.push((place, addend));
            }
        }
    }
}
