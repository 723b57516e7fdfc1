//! CPU features by QEMU's names, and where CPUID reports them.

/// A register that CPUID returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// The register that a group of features is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word {
    /// EAX going in.
    pub leaf: u32,
    /// ECX going in.
    pub subleaf: u32,
    /// The register coming out.
    pub register: Register,
}

const fn word(leaf: u32, subleaf: u32, register: Register) -> Word {
    Word {
        leaf,
        subleaf,
        register,
    }
}

/// A word and its features: name and bit. Spellings with '.' and '_' are looked up with '-'.
type Group = (Word, &'static [(&'static str, u8)]);

/// All names, packed: one name a line would hide the groups.
#[rustfmt::skip]
pub const FEATURES: &[Group] = &[
    (
        word(1, 0, Register::Edx),
        &[
            ("fpu", 0), ("vme", 1), ("de", 2), ("pse", 3), ("tsc", 4), ("msr", 5), ("pae", 6), ("mce", 7), ("cx8", 8),
            ("apic", 9), ("sep", 11), ("mtrr", 12), ("pge", 13), ("mca", 14), ("cmov", 15), ("pat", 16), ("pse36", 17),
            ("pn", 18), ("clflush", 19), ("ds", 21), ("acpi", 22), ("mmx", 23), ("fxsr", 24), ("sse", 25), ("sse2", 26),
            ("ss", 27), ("ht", 28), ("tm", 29), ("ia64", 30), ("pbe", 31),
        ],
    ),
    (
        word(1, 0, Register::Ecx),
        &[
            ("pni", 0), ("sse3", 0), ("pclmulqdq", 1), ("pclmuldq", 1), ("dtes64", 2), ("monitor", 3), ("ds-cpl", 4),
            ("vmx", 5), ("smx", 6), ("est", 7), ("tm2", 8), ("ssse3", 9), ("cid", 10), ("fma", 12), ("cx16", 13),
            ("xtpr", 14), ("pdcm", 15), ("pcid", 17), ("dca", 18), ("sse4-1", 19), ("sse4-2", 20), ("x2apic", 21),
            ("movbe", 22), ("popcnt", 23), ("tsc-deadline", 24), ("aes", 25), ("xsave", 26), ("avx", 28), ("f16c", 29),
            ("rdrand", 30), ("hypervisor", 31),
        ],
    ),
    (
        word(0x8000_0001, 0, Register::Edx),
        &[
            ("syscall", 11), ("nx", 20), ("xd", 20), ("mmxext", 22), ("fxsr-opt", 25), ("ffxsr", 25), ("pdpe1gb", 26),
            ("rdtscp", 27), ("lm", 29), ("i64", 29), ("3dnowext", 30), ("3dnow", 31),
        ],
    ),
    (
        word(0x8000_0001, 0, Register::Ecx),
        &[
            ("lahf-lm", 0), ("cmp-legacy", 1), ("svm", 2), ("extapic", 3), ("cr8legacy", 4), ("abm", 5), ("lzcnt", 5),
            ("sse4a", 6), ("misalignsse", 7), ("3dnowprefetch", 8), ("osvw", 9), ("ibs", 10), ("xop", 11),
            ("skinit", 12), ("wdt", 13), ("lwp", 15), ("fma4", 16), ("tce", 17), ("nodeid-msr", 19), ("tbm", 21),
            ("topoext", 22), ("perfctr-core", 23), ("perfctr-nb", 24),
        ],
    ),
    (
        word(7, 0, Register::Ebx),
        &[
            ("fsgsbase", 0), ("tsc-adjust", 1), ("sgx", 2), ("bmi1", 3), ("hle", 4), ("avx2", 5), ("fdp-excptn-only", 6),
            ("smep", 7), ("bmi2", 8), ("erms", 9), ("invpcid", 10), ("rtm", 11), ("zero-fcs-fds", 13), ("mpx", 14),
            ("avx512f", 16), ("avx512dq", 17), ("rdseed", 18), ("adx", 19), ("smap", 20), ("avx512ifma", 21),
            ("pcommit", 22), ("clflushopt", 23), ("clwb", 24), ("intel-pt", 25), ("avx512pf", 26), ("avx512er", 27),
            ("avx512cd", 28), ("sha-ni", 29), ("avx512bw", 30), ("avx512vl", 31),
        ],
    ),
    (
        word(7, 0, Register::Ecx),
        &[
            ("avx512vbmi", 1), ("avx512-vbmi", 1), ("umip", 2), ("pku", 3), ("ospke", 4), ("waitpkg", 5),
            ("avx512vbmi2", 6), ("avx512-vbmi2", 6), ("gfni", 8), ("vaes", 9), ("vpclmulqdq", 10), ("avx512vnni", 11),
            ("avx512bitalg", 12), ("avx512-vpopcntdq", 14), ("la57", 16), ("rdpid", 22), ("bus-lock-detect", 24),
            ("cldemote", 25), ("movdiri", 27), ("movdir64b", 28), ("sgxlc", 30), ("pks", 31),
        ],
    ),
    (
        word(7, 0, Register::Edx),
        &[
            ("avx512-4vnniw", 2), ("avx512-4fmaps", 3), ("fsrm", 4), ("avx512-vp2intersect", 8), ("md-clear", 10),
            ("serialize", 14), ("tsx-ldtrk", 16), ("arch-lbr", 19), ("amx-bf16", 22), ("avx512-fp16", 23),
            ("amx-tile", 24), ("amx-int8", 25), ("spec-ctrl", 26), ("stibp", 27), ("flush-l1d", 28),
            ("arch-capabilities", 29), ("core-capability", 30), ("ssbd", 31),
        ],
    ),
    (
        word(7, 1, Register::Eax),
        &[
            ("avx-vnni", 4), ("avx512-bf16", 5), ("cmpccxadd", 7), ("fzrm", 10), ("fsrs", 11), ("fsrc", 12),
            ("fred", 17), ("lkgs", 18), ("wrmsrns", 19), ("amx-fp16", 21), ("avx-ifma", 23), ("lam", 26),
        ],
    ),
    (
        word(7, 1, Register::Edx),
        &[
            ("avx-vnni-int8", 4), ("avx-ne-convert", 5), ("amx-complex", 8), ("avx-vnni-int16", 10), ("prefetchiti", 14),
            ("avx10", 19),
        ],
    ),
    (
        word(7, 2, Register::Edx),
        &[
            ("intel-psfd", 0), ("ipred-ctrl", 1), ("rrsba-ctrl", 2), ("ddpd-u", 3), ("bhi-ctrl", 4), ("mcdt-no", 5),
        ],
    ),
    (
        word(0xd, 1, Register::Eax),
        &[("xsaveopt", 0), ("xsavec", 1), ("xgetbv1", 2), ("xsaves", 3), ("xfd", 4)],
    ),
    (word(6, 0, Register::Eax), &[("arat", 2)]),
    (word(0x8000_0007, 0, Register::Edx), &[("invtsc", 8)]),
    (
        word(0x8000_0008, 0, Register::Ebx),
        &[
            ("clzero", 0), ("xsaveerptr", 2), ("wbnoinvd", 9), ("ibpb", 12), ("ibrs", 14), ("amd-stibp", 15),
            ("stibp-always-on", 17), ("amd-ssbd", 24), ("virt-ssbd", 25), ("amd-no-ssb", 26), ("amd-psfd", 28),
        ],
    ),
    (
        word(0x8000_000a, 0, Register::Edx),
        &[
            ("npt", 0), ("lbrv", 1), ("svm-lock", 2), ("nrip-save", 3), ("tsc-scale", 4), ("vmcb-clean", 5),
            ("flushbyasid", 6), ("decodeassists", 7), ("pause-filter", 10), ("pfthreshold", 12), ("avic", 13),
            ("v-vmsave-vmload", 15), ("vgif", 16), ("vnmi", 25),
        ],
    ),
    (
        word(0x8000_0021, 0, Register::Eax),
        &[
            ("no-nested-data-bp", 0), ("lfence-always-serializing", 2), ("null-sel-clr-base", 6), ("auto-ibrs", 8),
            ("sbpb", 27), ("ibpb-brtype", 28), ("srso-no", 29), ("srso-user-kernel-no", 30),
        ],
    ),
    (
        word(0x4000_0001, 0, Register::Eax),
        &[
            ("kvmclock", 0), ("kvm-nopiodelay", 1), ("kvm-mmu", 2), ("kvmclock", 3), ("kvm-asyncpf", 4),
            ("kvm-steal-time", 5), ("kvm-pv-eoi", 6), ("kvm-pv-unhalt", 7), ("kvm-pv-tlb-flush", 9),
            ("kvm-asyncpf-vmexit", 10), ("kvm-pv-ipi", 11), ("kvm-poll-control", 12), ("kvm-pv-sched-yield", 13),
            ("kvm-asyncpf-int", 14), ("kvm-msi-ext-dest-id", 15), ("kvmclock-stable-bit", 24),
        ],
    ),
    (word(0x4000_0001, 0, Register::Edx), &[("kvm-hint-dedicated", 0)]),
];

/// A name in the spelling of the table.
pub fn canonical(name: &str) -> String {
    name.to_ascii_lowercase().replace(['_', '.'], "-")
}

/// The bits that a (canonical) name stands for; empty for a name that is not in the table.
pub fn find(name: &str) -> impl Iterator<Item = (Word, u8)> + '_ {
    FEATURES.iter().flat_map(move |(word, names)| {
        names
            .iter()
            .filter(move |(known, _)| *known == name)
            .map(move |(_, bit)| (*word, *bit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_canonical_and_every_word_listed_once() {
        for (index, (word, names)) in FEATURES.iter().enumerate() {
            assert!(FEATURES[..index].iter().all(|(other, _)| other != word), "{word:?}");
            for (name, bit) in *names {
                assert_eq!(canonical(name), *name);
                assert!(*bit < 32);
            }
        }
    }

    #[test]
    fn no_name_stands_for_two_features() {
        let mut names: Vec<&str> = FEATURES
            .iter()
            .flat_map(|(_, names)| names.iter().map(|n| n.0))
            .collect();
        assert!(names.len() >= 200);
        names.sort_unstable();
        let twice: Vec<&str> = names
            .windows(2)
            .filter(|pair| pair[0] == pair[1])
            .map(|pair| pair[0])
            .collect();
        // The old and the new clock MSRs.
        assert_eq!(twice, ["kvmclock"]);
    }

    #[test]
    fn qemus_spellings_are_found() {
        for name in [
            "avx2",
            "sse4.1",
            "sse4_1",
            "SSE4-2",
            "lahf_lm",
            "tsc-deadline",
            "arch-capabilities",
        ] {
            assert!(find(&canonical(name)).next().is_some(), "{name}");
        }
        assert!(find("avx3").next().is_none());
    }
}
