use super::*;

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn vendor(name: &[u8; 12], max_leaf: u32) -> kvm_cpuid_entry2 {
    let part = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
    entry(0, 0, [max_leaf, part(0), part(8), part(4)])
}

/// A small Intel host: AVX2, a PMU, three cache levels.
fn intel() -> Vec<kvm_cpuid_entry2> {
    vec![
        vendor(b"GenuineIntel", 0x1f),
        entry(1, 0, [0x306c3, 0x0710_0800, ECX_PDCM | 1 << 28, 1 << 28 | 1 << 25]),
        entry(4, 0, [0x1c00_4121, 0, 0, 0]),
        entry(4, 2, [0x1c03_c163, 0, 0, 0]),
        entry(4, 3, [0, 0, 0, 0]),
        entry(6, 0, [0, 0, 0, 0]),
        entry(7, 0, [0, 1 << 5, 0, 0]),
        entry(0xa, 0, [0x0730_0404, 0, 0, 0x603]),
        entry(0xb, 0, [1, 2, 0x100, 77]),
        entry(0x1f, 0, [1, 2, 0x100, 77]),
        entry(0x4000_0000, 0, [0x4000_0001, 0, 0, 0]),
        entry(0x4000_0001, 0, [1 | 1 << 3, 0, 0, 0]),
        entry(0x8000_0008, 0, [0x3027, 0, 0, 0]),
    ]
}

fn build(vcpus: u16, changes: &[(&str, bool)]) -> Result<CpuModel, Failure> {
    let changes: Vec<CpuFeature> = changes
        .iter()
        .map(|(name, on)| CpuFeature {
            name: (*name).to_owned(),
            on: *on,
        })
        .collect();
    CpuModel::new(&intel(), one_socket(vcpus), true, &changes)
}

fn one_socket(cores: u16) -> CpuTopology {
    CpuTopology { cores, threads: 1 }
}

fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
    *entries
        .iter()
        .find(|entry| entry.function == function && entry.index == index)
        .unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"))
}

#[test]
fn every_vcpu_sees_its_own_apic_id() {
    let model = build(6, &[]).unwrap();
    for index in 0..6 {
        let entries = model.for_vcpu(index);
        let id = u32::from(index);
        assert_eq!(leaf(&entries, 1, 0).ebx, id << 24 | 6 << 16 | 0x0800);
        for topology in [0xb, 0x1f] {
            let threads = leaf(&entries, topology, 0);
            assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (0, 1, 0x100, id));
            let cores = leaf(&entries, topology, 1);
            assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (3, 6, 0x201, id));
            assert_eq!(leaf(&entries, topology, 2).ecx, 2);
        }
        // Private first level, shared third level, 8 core ids reserved.
        assert_eq!(leaf(&entries, 4, 0).eax, 7 << 26 | 0x121);
        assert_eq!(leaf(&entries, 4, 2).eax, 7 << 26 | 7 << 14 | 0x163);
        assert_eq!(leaf(&entries, 4, 3).eax, 0);
    }
}

#[test]
fn threads_and_sockets_are_told() {
    // Two sockets of two cores of two threads.
    let topology = CpuTopology { cores: 2, threads: 2 };
    let model = CpuModel::new(&intel(), topology, true, &[]).unwrap();
    for index in 0..8 {
        let entries = model.for_vcpu(index);
        let threads = leaf(&entries, 0xb, 0);
        assert_eq!((threads.eax, threads.ebx, threads.edx), (1, 2, u32::from(index)));
        let cores = leaf(&entries, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 4, u32::from(index)));
        assert_eq!(leaf(&entries, 1, 0).ebx >> 16 & 0xff, 4);
        // A core's threads share its first level, a socket's four threads the third.
        assert_eq!(leaf(&entries, 4, 0).eax, 1 << 26 | 1 << 14 | 0x121);
        assert_eq!(leaf(&entries, 4, 2).eax, 1 << 26 | 3 << 14 | 0x163);
    }
}

#[test]
fn a_single_vcpu_has_no_siblings() {
    let entries = build(1, &[]).unwrap().for_vcpu(0);
    assert_eq!(leaf(&entries, 1, 0).edx & EDX_HT, 0);
    assert_eq!(leaf(&entries, 4, 2).eax, 0x163);
    assert_eq!(leaf(&entries, 0xb, 1).eax, 0);
}

#[test]
fn what_kvm_provides_itself_is_announced() {
    let entries = build(1, &[]).unwrap().for_vcpu(0);
    assert_eq!(
        leaf(&entries, 1, 0).ecx & (ECX_HYPERVISOR | ECX_TSC_DEADLINE),
        ECX_HYPERVISOR | ECX_TSC_DEADLINE
    );
    assert_eq!(leaf(&entries, 6, 0).eax, EAX_ARAT);
}

#[test]
fn features_are_switched_by_name_in_order() {
    let off = build(1, &[("avx2", false), ("HYPERVISOR", false), ("kvmclock", false)]).unwrap();
    let entries = off.for_vcpu(0);
    assert_eq!(leaf(&entries, 7, 0).ebx, 0);
    assert_eq!(leaf(&entries, 1, 0).ecx & ECX_HYPERVISOR, 0);
    assert_eq!(leaf(&entries, 0x4000_0001, 0).eax, 0);
    let on_again = build(1, &[("avx2", false), ("avx2", true)]).unwrap().for_vcpu(0);
    assert_eq!(leaf(&on_again, 7, 0).ebx, 1 << 5);
}

#[test]
fn performance_counters_and_kvms_leaves_go_as_a_whole() {
    let entries = build(1, &[("pmu", false), ("kvm", false)]).unwrap().for_vcpu(0);
    assert_eq!(leaf(&entries, 0xa, 0).eax, 0);
    assert_eq!(leaf(&entries, 1, 0).ecx & ECX_PDCM, 0);
    assert!(entries.iter().all(|entry| entry.function >> 16 != 0x4000));
    let back = build(1, &[("pmu", false), ("pmu", true), ("kvm", false), ("kvm", true)]).unwrap();
    assert_eq!(leaf(&back.for_vcpu(0), 0xa, 0).eax, 0x0730_0404);
    assert_eq!(leaf(&back.for_vcpu(0), 0x4000_0001, 0).eax, 9);
}

#[test]
fn a_refusal_names_the_feature() {
    for (name, on, reason) in [
        ("avx3", true, "unknown CPU feature \"avx3\""),
        ("avx3", false, "unknown CPU feature \"avx3\""),
        (
            "avx512f",
            true,
            "this host cannot give the guest the CPU feature \"avx512f\"",
        ),
        (
            "amx-tile",
            true,
            "this host cannot give the guest the CPU feature \"amx-tile\"",
        ),
    ] {
        assert_eq!(build(1, &[(name, on)]).unwrap_err().message, reason);
    }
    // Switching off what is not there is what was asked for.
    build(1, &[("avx512f", false), ("srso-no", false)]).unwrap();
}

#[test]
fn amd_hosts_get_amds_topology() {
    let host = [
        vendor(b"AuthenticAMD", 0x10),
        entry(1, 0, [0, 0x0800, 0, 0]),
        entry(0x8000_0001, 0, [0, 0, 1 << 22, 0]),
        entry(0x8000_0008, 0, [0x3030, 0, 0x700f, 0]),
        entry(0x8000_001d, 3, [0x0003_c163, 0, 0, 0]),
        entry(0x8000_001e, 0, [9, 0x109, 1, 0]),
    ];
    let model = CpuModel::new(&host, one_socket(4), true, &[]).unwrap();
    assert_eq!(model.physical_address_bits(), 0x30);
    let entries = model.for_vcpu(3);
    assert_eq!(leaf(&entries, 0x8000_0001, 0).ecx, 1 << 22 | ECX_CMP_LEGACY);
    assert_eq!(leaf(&entries, 0x8000_0008, 0).ecx, 2 << 12 | 3);
    assert_eq!(leaf(&entries, 0x8000_001d, 3).eax, 3 << 14 | 0x163);
    let topology = leaf(&entries, 0x8000_001e, 0);
    assert_eq!((topology.eax, topology.ebx, topology.ecx), (3, 3, 0));
}
