//! ACPI's tables: finding, checking, and the few values that the tests need.

use crate::failure::{Failure, ensure, failure};
use crate::region::Region;
use crate::start_info;

/// A table with a good checksum.
#[derive(Clone, Copy)]
pub struct Table {
    /// All of it, header included.
    pub body: Region,
}

impl Table {
    /// The four characters it starts with.
    pub fn signature(self) -> [u8; 4] {
        let mut name = [0; 4];
        self.body.part(0, 4).copy_to(&mut name);
        name
    }

    fn at(address: u64) -> Result<Self, Failure> {
        let bytes = u64::from(Region::new(address, 36).read_unaligned::<u32>(4));
        ensure((36..16 << 20).contains(&bytes), "ACPI table length")?;
        let body = Region::new(address, bytes);
        ensure(sum(body) == 0, "ACPI table checksum")?;
        Ok(Self { body })
    }

    fn byte(self, offset: u64) -> u8 {
        self.body.read(offset)
    }

    fn word(self, offset: u64) -> u16 {
        self.body.read_unaligned(offset)
    }

    fn dword(self, offset: u64) -> u32 {
        self.body.read_unaligned(offset)
    }

    fn qword(self, offset: u64) -> u64 {
        self.body.read_unaligned(offset)
    }
}

fn sum(region: Region) -> u8 {
    (0..region.bytes()).fold(0, |sum, offset| sum.wrapping_add(region.read(offset)))
}

/// XSDT or RSDT, and the width of its pointers.
#[derive(Clone, Copy)]
pub struct Root {
    table: Table,
    pointer_bytes: u64,
}

/// The root table, by the root pointer that the monitor gave or by the search of old.
pub fn root() -> Result<Root, Failure> {
    let address = match start_info::rsdp() {
        0 => search().ok_or(failure("no RSDP"))?,
        given => given,
    };
    let pointer = Region::new(address, 36);
    ensure(
        pointer.read_unaligned::<u64>(0) == u64::from_le_bytes(*b"RSD PTR "),
        "RSDP signature",
    )?;
    ensure(sum(pointer.part(0, 20)) == 0, "RSDP checksum")?;
    let revision = pointer.read::<u8>(15);
    if revision >= 2 {
        ensure(sum(pointer) == 0, "RSDP extended checksum")?;
    }
    let extended = if revision >= 2 {
        pointer.read_unaligned::<u64>(24)
    } else {
        0
    };
    let (address, pointer_bytes, signature) = match extended {
        0 => (u64::from(pointer.read_unaligned::<u32>(16)), 4, *b"RSDT"),
        address => (address, 8, *b"XSDT"),
    };
    let table = Table::at(address)?;
    ensure(table.signature() == signature, "root table signature")?;
    Ok(Root { table, pointer_bytes })
}

fn search() -> Option<u64> {
    (0xe0000..0x10_0000)
        .step_by(16)
        .find(|address| Region::new(*address, 8).read::<u64>(0) == u64::from_le_bytes(*b"RSD PTR "))
}

impl Root {
    /// All tables that the root points to; each is checked when its turn comes.
    pub fn tables(self) -> impl Iterator<Item = Result<Table, Failure>> {
        (36..self.table.body.bytes())
            .step_by(self.pointer_bytes as usize)
            .map(move |offset| {
                Table::at(match self.pointer_bytes {
                    4 => u64::from(self.table.dword(offset)),
                    _ => self.table.qword(offset),
                })
            })
    }

    /// The table with this signature.
    pub fn table(self, signature: &[u8; 4]) -> Result<Option<Table>, Failure> {
        for table in self.tables() {
            let table = table?;
            if table.signature() == *signature {
                return Ok(Some(table));
            }
        }
        Ok(None)
    }

    /// The fixed description table.
    pub fn fadt(self) -> Result<Fadt, Failure> {
        let table = self.table(b"FACP")?.ok_or(failure("no FADT"))?;
        let dword = |offset| table.dword(offset);
        let extended = |offset: u64| {
            if table.body.bytes() > offset + 8 {
                table.qword(offset)
            } else {
                0
            }
        };
        let dsdt = match extended(140) {
            0 => u64::from(dword(40)),
            address => address,
        };
        Ok(Fadt {
            table,
            dsdt: Table::at(dsdt)?,
        })
    }

    /// Base address of the memory-mapped configuration space of PCI segment 0 and its last bus.
    pub fn ecam(self) -> Result<Option<(u64, u8)>, Failure> {
        Ok(self.table(b"MCFG")?.map(|table| (table.qword(44), table.byte(55))))
    }

    /// Calls back for each processor that can be used, with the number of its interrupt controller.
    pub fn processors(self, mut each: impl FnMut(u32)) -> Result<(), Failure> {
        self.madt(|kind, entry, table| match kind {
            0 if table.dword(entry + 4) & 1 != 0 => each(u32::from(table.byte(entry + 3))),
            9 if table.dword(entry + 8) & 1 != 0 => each(table.dword(entry + 4)),
            _ => {}
        })
    }

    /// Address of the I/O interrupt controller that serves line 0 and up.
    pub fn io_controller(self) -> Result<u64, Failure> {
        let mut found = 0;
        self.madt(|kind, entry, table| {
            if kind == 1 && table.dword(entry + 8) == 0 {
                found = u64::from(table.dword(entry + 4));
            }
        })?;
        ensure(found != 0, "no IOAPIC in the MADT")?;
        Ok(found)
    }

    fn madt(self, mut each: impl FnMut(u8, u64, Table)) -> Result<(), Failure> {
        let table = self.table(b"APIC")?.ok_or(failure("no MADT"))?;
        let mut entry = 44;
        while entry + 2 <= table.body.bytes() {
            let bytes = u64::from(table.byte(entry + 1));
            ensure(bytes >= 2 && entry + bytes <= table.body.bytes(), "MADT entry length")?;
            each(table.byte(entry), entry, table);
            entry += bytes;
        }
        Ok(())
    }
}

/// A register that ACPI describes by address space and address.
#[derive(Clone, Copy)]
pub struct Register {
    /// 0: memory, 1: ports.
    pub space: u8,
    /// Where.
    pub address: u64,
}

/// The fixed description table and the DSDT it points to.
#[derive(Clone, Copy)]
pub struct Fadt {
    table: Table,
    /// The differentiated description table.
    pub dsdt: Table,
}

impl Fadt {
    /// Whether the machine has the reduced set of registers.
    pub fn hardware_reduced(self) -> bool {
        self.table.dword(112) & 1 << 20 != 0
    }

    /// Sleep control register of a reduced machine.
    pub fn sleep_control(self) -> Register {
        Register {
            space: self.table.byte(244),
            address: self.table.qword(248),
        }
    }

    /// Port of PM1a control of a full machine.
    pub fn pm1_control(self) -> u16 {
        self.table.dword(64) as u16
    }

    /// Port of PM1a's event registers of a full machine.
    pub fn pm1_event(self) -> u16 {
        self.table.dword(56) as u16
    }

    /// Half of the length of PM1a's event registers: where the enable register is.
    pub fn pm1_enable_offset(self) -> u16 {
        u16::from(self.table.byte(88)) / 2
    }

    /// Port and value that switch a full machine to ACPI mode; port 0 when it always is.
    pub fn enable_command(self) -> (u16, u8) {
        (self.table.dword(48) as u16, self.table.byte(52))
    }

    /// The line of the system control interrupt.
    pub fn control_interrupt(self) -> u16 {
        self.table.word(46)
    }

    /// Reset register and the value that resets, when there is one.
    pub fn reset(self) -> Option<(Register, u8)> {
        let register = Register {
            space: self.table.byte(116),
            address: self.table.qword(120),
        };
        (self.table.dword(112) & 1 << 10 != 0).then(|| (register, self.table.byte(128)))
    }

    /// The value that means S5, from the package `\_S5` in the DSDT.
    pub fn soft_off_type(self) -> Option<u8> {
        let body = self.dsdt.body;
        let name = u32::from_le_bytes(*b"_S5_");
        let place = (36..body.bytes().saturating_sub(8)).find(|offset| body.read_unaligned::<u32>(*offset) == name)?;
        // PackageOp, PkgLength (1 to 4 bytes, the count of further ones in its top bits), NumElements, first element.
        if body.read::<u8>(place + 4) != 0x12 {
            return None;
        }
        let more = u64::from(body.read::<u8>(place + 5) >> 6);
        let element = place + 5 + 1 + more + 1;
        match body.read::<u8>(element) {
            0x0a => Some(body.read(element + 1)),
            small @ (0 | 1) => Some(small),
            _ => None,
        }
    }
}
