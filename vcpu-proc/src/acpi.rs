//! The ACPI tables: what the guest's operating system is told about the machine.
//!
//! The machine is hardware-reduced (ACPI 6.5 §4.1): no PM timer, no SCI, no 8259 or 8254 to speak of, but sleep and
//! reset registers and a generic event device. What is described is what [`crate::layout`] says. The tables are made
//! from the configuration alone, the same bytes each time, so that a reset guest finds what it found before.
//!
//! Deliberately not described:
//! - The keyboard controller. Ours only pulls the reset line. Linux looks for PNP0303 and for FADT's 8042 flag, and
//!   when both are absent does not probe (a probe of a controller without keyboard costs it half a second). The reset
//!   by way of port 0x64 needs no description.
//! - An interrupt of the clock: ours raises none, and a driver that believes in one waits for it.
//! - `_PRT`: no device has INTx.
//! - x2APIC entries in the MADT: with at most 255 vCPUs every APIC ID is below 255.
//!
//! With the tables come a few bytes of code at a PC's reset vector, the only firmware there is. Linux takes a
//! hardware-reduced machine for one with EFI and does not use the reset register of the FADT (`efi_reboot_required` in
//! arch/x86/platform/efi/quirks.c); finding no EFI either, it jumps to the BIOS, which must be there then.

use crate::layout::{
    ACPI_PORT, ACPI_PORTS, ACPI_RESET_PORT, ACPI_RESET_VALUE, ACPI_SLEEP_CONTROL_PORT, ACPI_SLEEP_STATUS_PORT,
    ACPI_TABLES_BASE, ACPI_TABLES_BYTES, ECAM_BASE, ECAM_BYTES, FW_CFG_PORT, FW_CFG_PORTS, GED_GSI, GED_POWER_BUTTON,
    GED_STATUS_PORT, IOAPIC_BASE, LAPIC_BASE, PCI32_BASE, PCI32_BYTES, PVPANIC_PORT, RTC_PORT, SERIAL_GSI, SERIAL_PORT,
    SLEEP_TYPE_S5, pci64_window,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

const OEM: [u8; 6] = *b"BLKHD ";
const OEM_TABLE: [u8; 8] = *b"BULKHEAD";
const OEM_REVISION: u32 = 1;
/// Revision 2 of the DSDT: integers have 64 bits.
const DSDT_REVISION: u8 = 2;
/// Bytes of a table header.
const HEADER_BYTES: u32 = 36;
/// Tables start at multiples of this; RSDP must (§5.2.5.1).
const ALIGNMENT: u64 = 16;
/// CMOS byte with the century, for FADT.
const RTC_CENTURY: u8 = 0x32;
/// Where a processor in real mode jumps to have the BIOS reset the machine: FFFF:0000.
const RESET_VECTOR: u64 = 0xf_fff0;
/// FADT IAPC_BOOT_ARCH: there is no VGA to probe.
const BOOT_NO_VGA: u16 = 1 << 2;

/// What differs between machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcpiConfig {
    /// How many vCPUs, 1 to 255; the APIC ID of vCPU n is n.
    pub vcpus: u16,
    /// Size of guest RAM; decides where the 64-bit PCI window lies.
    pub ram_bytes: u64,
    /// Whether there is a serial port.
    pub serial: bool,
    /// Whether there is fw_cfg.
    pub fw_cfg: bool,
}

/// The tables, the code beside them, and where they go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// Guest physical address of the RSDP.
    pub rsdp_address: u64,
    /// Guest physical address and contents.
    pub blobs: Vec<(u64, Vec<u8>)>,
}

/// The tables do not fit where they have to lie.
#[derive(Debug, thiserror::Error)]
#[error("the ACPI tables need {needed} bytes, there are {ACPI_TABLES_BYTES}")]
pub struct TablesTooLarge {
    needed: u64,
}

/// Makes all tables of a machine.
///
/// # Errors
/// When they do not fit into their area, which takes more vCPUs than a machine can have.
pub fn build_tables(config: AcpiConfig) -> Result<Tables, TablesTooLarge> {
    let mut blobs = Vec::new();
    // The RSDP comes first, where a guest without other help searches, but is made last.
    let rsdp_address = ACPI_TABLES_BASE;
    let mut next = rsdp_address + (Rsdp::len() as u64).next_multiple_of(ALIGNMENT);
    let mut place = |blob: Vec<u8>| {
        let address = next;
        next = (address + blob.len() as u64).next_multiple_of(ALIGNMENT);
        blobs.push((address, blob));
        address
    };

    let dsdt = place(dsdt(config));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(place(fadt(dsdt)));
    xsdt.add_entry(place(madt(config.vcpus)));
    xsdt.add_entry(place(mcfg()));
    let xsdt = place(bytes(&xsdt));

    let needed = next - rsdp_address + (ACPI_TABLES_BASE + ACPI_TABLES_BYTES - RESET_VECTOR);
    if needed > ACPI_TABLES_BYTES {
        return Err(TablesTooLarge { needed });
    }
    blobs.push((rsdp_address, bytes(&Rsdp::new(OEM, xsdt))));
    blobs.push((RESET_VECTOR, reset_code()));
    Ok(Tables { rsdp_address, blobs })
}

fn bytes(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

/// The BIOS: 16-bit code that uses the reset register.
fn reset_code() -> Vec<u8> {
    let [port_low, port_high] = u16::try_from(ACPI_RESET_PORT).expect("ports are 16-bit").to_le_bytes();
    #[rustfmt::skip]
    let code = vec![
        0xba, port_low, port_high, // mov dx, port
        0xb0, ACPI_RESET_VALUE,    // mov al, value
        0xee,                      // out dx, al
        0xf4,                      // hlt
        0xeb, 0xfd,                // jmp to the hlt
    ];
    code
}

/// A one-byte register at a port.
fn port_register(port: u64) -> GAS {
    GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, port)
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        // Both buttons are (at most) devices in the DSDT, not fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.reset_reg = port_register(ACPI_RESET_PORT);
    fadt.reset_value = ACPI_RESET_VALUE;
    fadt.sleep_control_reg = port_register(ACPI_SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port_register(ACPI_SLEEP_STATUS_PORT);
    fadt.century = RTC_CENTURY;
    fadt.iapc_boot_arch = BOOT_NO_VGA.into();
    bytes(&fadt.finalize())
}

fn madt(vcpus: u16) -> Vec<u8> {
    // The crate leaves the flags 0: PCAT_COMPAT off, no 8259 that would have to be silenced.
    let mut madt = MADT::new(
        OEM,
        OEM_TABLE,
        OEM_REVISION,
        LocalInterruptController::Address(low(LAPIC_BASE)),
    );
    for id in (0..=u8::MAX).take(vcpus.into()) {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, low(IOAPIC_BASE), 0));
    bytes(&madt)
}

fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(ECAM_BASE, 0, 0, 0);
    bytes(&mcfg)
}

fn dsdt(config: AcpiConfig) -> Vec<u8> {
    let mut devices = Vec::new();
    processors(&mut devices, config.vcpus);
    pci_root(&mut devices, config.ram_bytes);
    board(&mut devices);
    if config.serial {
        serial(&mut devices);
    }
    clock(&mut devices);
    pvpanic(&mut devices);
    if config.fw_cfg {
        fw_cfg(&mut devices);
    }
    power_button(&mut devices);

    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&aml::Scope::raw("_SB_".into(), devices));
    let sleep_type = aml::Package::new(vec![&SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    dsdt.append_slice(&bytes(&aml::Name::new("_S5_".into(), &sleep_type)));
    dsdt.as_slice().to_vec()
}

fn name(path: &str, value: &dyn Aml) -> aml::Name {
    aml::Name::new(path.into(), value)
}

fn hid(id: &str) -> aml::Name {
    name("_HID", &aml::EISAName::new(id))
}

/// Ports of a device whose range is fixed.
fn ports(first: u64, count: u64) -> aml::IO {
    let first = u16::try_from(first).expect("ports are 16-bit");
    aml::IO::new(first, first, 1, u8::try_from(count).expect("a device has few ports"))
}

/// An edge-triggered, active-high interrupt of one device.
fn interrupt(gsi: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, gsi)
}

fn low(address: u64) -> u32 {
    u32::try_from(address).expect("lies below 4 GiB")
}

/// \_SB.C000…: the processors, by the UIDs of the MADT.
fn processors(devices: &mut Vec<u8>, vcpus: u16) {
    for uid in 0..vcpus {
        aml::Device::new(
            format!("C{uid:03X}").as_str().into(),
            vec![&name("_HID", &"ACPI0007"), &name("_UID", &uid)],
        )
        .to_aml_bytes(devices);
    }
}

/// \_SB.PCI0: the host bridge and what it forwards.
fn pci_root(devices: &mut Vec<u8>, ram_bytes: u64) {
    let (high, high_bytes) = pci64_window(ram_bytes);
    let cacheable = aml::AddressSpaceCacheable::NotCacheable;
    let windows = aml::ResourceTemplate::new(vec![
        &aml::AddressSpace::new_bus_number(0_u16, 0_u16),
        // CONFIG_ADDRESS and CONFIG_DATA are the bridge's own; the other ports are forwarded.
        &aml::IO::new(0xcf8, 0xcf8, 1, 8),
        &aml::AddressSpace::new_io(0_u16, 0x0cf7, None),
        &aml::AddressSpace::new_io(0x0d00_u16, 0xffff, None),
        &aml::AddressSpace::new_memory(
            cacheable,
            true,
            low(PCI32_BASE),
            low(PCI32_BASE + PCI32_BYTES - 1),
            None,
        ),
        &aml::AddressSpace::new_memory(cacheable, true, high, high + high_bytes - 1, None),
    ])
    .to_bytes();
    aml::Device::new(
        "PCI0".into(),
        vec![
            &hid("PNP0A08"),
            &name("_CID", &aml::EISAName::new("PNP0A03")),
            &name("_UID", &aml::ZERO),
            &name("_SEG", &aml::ZERO),
            &name("_BBN", &aml::ZERO),
            &name("_CRS", &windows),
        ],
    )
    .to_aml_bytes(devices);
}

/// \_SB.MBRD: addresses that belong to no device, or Linux would not use ECAM.
fn board(devices: &mut Vec<u8>) {
    let reserved = aml::ResourceTemplate::new(vec![
        &aml::Memory32Fixed::new(true, low(ECAM_BASE), low(ECAM_BYTES)),
        &ports(ACPI_PORT, ACPI_PORTS),
    ])
    .to_bytes();
    aml::Device::new(
        "MBRD".into(),
        vec![&hid("PNP0C02"), &name("_UID", &aml::ZERO), &name("_CRS", &reserved)],
    )
    .to_aml_bytes(devices);
}

/// \_SB.COM1: a 16550.
fn serial(devices: &mut Vec<u8>) {
    let resources = aml::ResourceTemplate::new(vec![&ports(SERIAL_PORT, 8), &interrupt(SERIAL_GSI)]).to_bytes();
    aml::Device::new(
        "COM1".into(),
        vec![&hid("PNP0501"), &name("_UID", &aml::ZERO), &name("_CRS", &resources)],
    )
    .to_aml_bytes(devices);
}

/// \_SB.RTC_: the CMOS clock.
fn clock(devices: &mut Vec<u8>) {
    let resources = aml::ResourceTemplate::new(vec![&ports(RTC_PORT, 2)]).to_bytes();
    aml::Device::new("RTC_".into(), vec![&hid("PNP0B00"), &name("_CRS", &resources)]).to_aml_bytes(devices);
}

/// \_SB.PEVT: the panic notification, under the ID that QEMU gave it and Linux's driver knows.
fn pvpanic(devices: &mut Vec<u8>) {
    let resources = aml::ResourceTemplate::new(vec![&ports(PVPANIC_PORT, 1)]).to_bytes();
    aml::Device::new(
        "PEVT".into(),
        vec![&name("_HID", &"QEMU0001"), &name("_CRS", &resources)],
    )
    .to_aml_bytes(devices);
}

/// \_SB.FWCF: fw_cfg, under the ID that QEMU gave it and Linux's driver knows.
fn fw_cfg(devices: &mut Vec<u8>) {
    let resources = aml::ResourceTemplate::new(vec![&ports(FW_CFG_PORT, FW_CFG_PORTS)]).to_bytes();
    aml::Device::new(
        "FWCF".into(),
        vec![&name("_HID", &"QEMU0002"), &name("_CRS", &resources)],
    )
    .to_aml_bytes(devices);
}

/// \_SB.PWRB and \_SB.GED_: the power button, and the event device that says it was pressed (§5.6.9). Reading the
/// status port takes the events, so it is read once.
fn power_button(devices: &mut Vec<u8>) {
    aml::Device::new("PWRB".into(), vec![&hid("PNP0C0C")]).to_aml_bytes(devices);

    let resources = aml::ResourceTemplate::new(vec![&interrupt(GED_GSI)]).to_bytes();
    let field = aml::Field::new(
        "GEDR".into(),
        aml::FieldAccessType::Byte,
        aml::FieldLockRule::NoLock,
        aml::FieldUpdateRule::WriteAsZeroes,
        vec![aml::FieldEntry::Named(*b"STAT", 8)],
    );
    aml::Device::new(
        "GED_".into(),
        vec![
            &name("_HID", &"ACPI0013"),
            &name("_UID", &aml::ZERO),
            &name("_CRS", &resources),
            &aml::OpRegion::new(
                "GEDR".into(),
                aml::OpRegionSpace::SystemIO,
                &u16::try_from(GED_STATUS_PORT).expect("ports are 16-bit"),
                &aml::ONE,
            ),
            &field,
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &aml::Store::new(&aml::Local(0), &aml::Path::new("STAT")),
                    &aml::If::new(
                        &aml::And::new(&aml::ZERO, &aml::Local(0), &GED_POWER_BUTTON),
                        vec![&aml::Notify::new(&aml::Path::new("\\_SB_.PWRB"), &0x80_u8)],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(devices);
}

/// A resource template borrows its parts, which are mostly temporaries; its bytes do not.
trait ToBytes {
    fn to_bytes(&self) -> Encoded;
}

impl ToBytes for aml::ResourceTemplate<'_> {
    fn to_bytes(&self) -> Encoded {
        Encoded(bytes(self))
    }
}

/// AML that is made already.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

#[cfg(test)]
mod tests;
