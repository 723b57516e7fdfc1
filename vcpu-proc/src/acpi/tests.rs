//! The tables are walked as an operating system does, and disassembled and recompiled by the reference compiler where it
//! is installed.

use super::*;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use std::process::Command;
use vm_memory::MmapRegion;

fn build(vcpus: u16) -> Tables {
    build_tables(AcpiConfig {
        vcpus,
        ram_bytes: 512 << 20,
        serial: true,
        fw_cfg: true,
    })
    .unwrap()
}

fn blob(tables: &Tables, address: u64) -> &[u8] {
    let (_, bytes) = tables.blobs.iter().find(|(at, _)| *at == address).unwrap();
    bytes
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..][..4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..][..8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// RSDP → XSDT → tables, with the signature and length of each checked.
fn walk(tables: &Tables) -> Vec<(String, Vec<u8>)> {
    let rsdp = blob(tables, tables.rsdp_address);
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
    let xsdt = blob(tables, u64_at(rsdp, 24));
    let entries = xsdt[36..].chunks(8).map(|entry| u64_at(entry, 0));
    let mut found = vec![("XSDT".to_owned(), xsdt.to_vec())];
    for address in entries {
        let table = blob(tables, address);
        found.push((String::from_utf8_lossy(&table[..4]).into_owned(), table.to_vec()));
        if &table[..4] == b"FACP" {
            let dsdt = blob(tables, u64_at(table, 140));
            found.push(("DSDT".to_owned(), dsdt.to_vec()));
        }
    }
    for (name, table) in &found {
        assert_eq!(&table[..4], name.as_bytes());
        assert_eq!(u32_at(table, 4) as usize, table.len(), "{name}");
        assert_eq!(sum(table), 0, "checksum of {name}");
    }
    found
}

fn table(tables: &Tables, name: &str) -> Vec<u8> {
    walk(tables).into_iter().find(|(found, _)| found == name).unwrap().1
}

#[test]
fn an_operating_system_finds_every_table() {
    let names: Vec<String> = walk(&build(2)).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["XSDT", "FACP", "DSDT", "APIC", "MCFG"]);
}

#[test]
fn the_tables_are_the_same_each_time() {
    assert_eq!(build(4), build(4));
}

#[test]
fn devices_that_a_machine_may_lack_are_not_described_then() {
    let without = build_tables(AcpiConfig {
        vcpus: 1,
        ram_bytes: 512 << 20,
        serial: false,
        fw_cfg: false,
    });
    let names = |tables: &Tables| {
        let dsdt = table(tables, "DSDT");
        [b"QEMU0002", b"QEMU0001"].map(|name| dsdt.windows(8).any(|part| part == name))
    };
    assert_eq!(names(&without.unwrap()), [false, true]);
    assert_eq!(names(&build(1)), [true, true]);
}

#[test]
fn the_largest_machine_fits_and_nothing_overlaps() {
    let tables = build_tables(AcpiConfig {
        vcpus: 255,
        ram_bytes: 1 << 40,
        serial: true,
        fw_cfg: true,
    })
    .unwrap();
    let mut ranges: Vec<_> = tables
        .blobs
        .iter()
        .map(|(at, bytes)| (*at, *at + bytes.len() as u64))
        .collect();
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0));
    assert!(ranges.last().unwrap().1 <= ACPI_TABLES_BASE + ACPI_TABLES_BYTES);
    assert!(ranges.iter().all(|(start, _)| start % ALIGNMENT == 0));
}

#[test]
fn the_fadt_describes_sleep_and_reset() {
    let fadt = table(&build(1), "FACP");
    // HW_REDUCED_ACPI, RESET_REG_SUP, SLP_BUTTON, PWR_BUTTON, WBINVD.
    assert_eq!(u32_at(&fadt, 112), 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4 | 1);
    let port = |offset: usize| (fadt[offset], fadt[offset + 1], u64_at(&fadt, offset + 4));
    assert_eq!(port(116), (1, 8, 0x602));
    assert_eq!(fadt[128], 1);
    assert_eq!(port(244), (1, 8, 0x600));
    assert_eq!(port(256), (1, 8, 0x601));
}

#[test]
fn the_madt_lists_every_processor_and_the_ioapic() {
    for vcpus in [1, 255] {
        let madt = table(&build(vcpus), "APIC");
        assert_eq!(u64_at(&madt, 36), 0xfee0_0000, "and no flags");
        let (processors, ioapic) = madt[44..].split_at(8 * usize::from(vcpus));
        for (id, entry) in (0..=u8::MAX).zip(processors.chunks(8)) {
            assert_eq!(entry, [0, 8, id, id, 1, 0, 0, 0]);
        }
        assert_eq!(ioapic, [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    }
}

#[test]
fn a_jump_to_the_bios_resets_the_machine() {
    let tables = build(1);
    let code = blob(&tables, 0xf_fff0);
    assert!(code.len() <= 16, "nothing lies above 1 MiB");
    let Ok(kvm) = Kvm::new() else {
        eprintln!("skipped: no /dev/kvm");
        return;
    };
    let vm = kvm.create_vm().unwrap();
    let memory = MmapRegion::<()>::new(4096).unwrap();
    // SAFETY: the code fits into the last 16 bytes of the page, which nobody else knows yet.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), memory.as_ptr().add(0xff0), code.len()) };
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0xf_f000,
        memory_size: memory.size() as u64,
        userspace_addr: memory.as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the mapping outlives the run of the vCPU below.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs.selector = 0xffff;
    sregs.cs.base = 0xf_fff0;
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    regs.rip = 0;
    regs.rflags = 2;
    vcpu.set_regs(&regs).unwrap();
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(0x602, [1]) => {}
        exit => panic!("{exit:?}"),
    }
}

/// Runs the compiler on a file in `directory`; `None` when it is not installed.
fn iasl(directory: &std::path::Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new("iasl")
        .current_dir(directory)
        .args(arguments)
        .output()
        .ok()?;
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "iasl {arguments:?}: {text}");
    Some(text)
}

#[test]
fn the_reference_compiler_understands_every_table() {
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in walk(&build(3)) {
        let file = format!("{name}.dat");
        std::fs::write(directory.path().join(&file), bytes).unwrap();
        let Some(output) = iasl(directory.path(), &["-d", &file]) else {
            eprintln!("skipped: iasl is not installed");
            return;
        };
        let source = std::fs::read_to_string(directory.path().join(format!("{name}.dsl"))).unwrap();
        for complaint in ["Error", "Warning", "**** ", "Invalid", "Unknown"] {
            assert!(
                !output.contains(complaint) && !source.contains(complaint),
                "{name}: {output}\n{source}"
            );
        }
    }
    let output = iasl(directory.path(), &["-p", "again", "DSDT.dsl"]).unwrap();
    assert!(output.contains(" 0 Errors, 0 Warnings"), "{output}");
    let source = std::fs::read_to_string(directory.path().join("DSDT.dsl")).unwrap();
    for expected in [
        "Device (C002)",
        "PNP0A08",
        "0xC0000000,         // Range Minimum",
        "0x0000000100000000, // Range Minimum",
        "PNP0501",
        "PNP0B00",
        "QEMU0001",
        "QEMU0002",
        "0x0510,             // Range Minimum",
        "Notify (\\_SB.PWRB, 0x80)",
        "Name (_S5, Package (0x04)",
    ] {
        assert!(source.contains(expected), "{expected} is not in\n{source}");
    }
}
