//! A CPU model as its properties: what a guest with some features switched on or off would find in CPUID.

use super::{CpuModel, LEAF_BASIC, LEAF_KVM, LEAF_PMU, features};
use ipc::cpu::CpuProperties;
use ipc::vcpu::CpuFeature;
use kvm_bindings::kvm_cpuid_entry2;

const LEAF_VENDOR: u32 = 0;
const LEAF_EXTENDED_LAST: u32 = 0x8000_0000;
/// The three leaves of the processor's name.
const LEAVES_NAME: std::ops::RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;

impl CpuModel {
    /// The properties with these changes. A feature that this host cannot give stays off.
    ///
    /// # Errors
    /// The name of a feature that does not exist.
    pub fn expand(&self, changes: &[CpuFeature]) -> Result<CpuProperties, String> {
        let mut model = self.clone();
        for change in changes {
            let name = features::canonical(&change.name);
            if !matches!(name.as_str(), "pmu" | "kvm") && features::find(&name).next().is_none() {
                return Err(change.name.clone());
            }
            // The only other refusal: the host does not have it.
            let _ = model.apply(change, self);
        }
        Ok(model.properties())
    }

    fn properties(&self) -> CpuProperties {
        let mut all = std::collections::BTreeMap::new();
        for (word, names) in features::FEATURES {
            for (name, bit) in *names {
                // Two bits may have one name.
                *all.entry((*name).to_owned()).or_default() |= self.has(*word, *bit);
            }
        }
        all.insert(
            "pmu".to_owned(),
            self.leaf(LEAF_PMU).is_some_and(|leaf| leaf.eax & 0xff != 0),
        );
        all.insert("kvm".to_owned(), self.leaf(LEAF_KVM).is_some());
        let signature = self.leaf(LEAF_BASIC).map_or(0, |leaf| leaf.eax);
        let (family, extended_family) = (signature >> 8 & 0xf, signature >> 20 & 0xff);
        let (model, extended_model) = (signature >> 4 & 0xf, signature >> 16 & 0xf);
        CpuProperties {
            features: all,
            vendor: self
                .leaf(LEAF_VENDOR)
                .map_or_else(String::new, |leaf| letters(&[leaf.ebx, leaf.edx, leaf.ecx])),
            family: if family == 0xf {
                family + extended_family
            } else {
                family
            },
            model: extended_model << 4 | model,
            stepping: signature & 0xf,
            level: self.leaf(LEAF_VENDOR).map_or(0, |leaf| leaf.eax),
            xlevel: self.leaf(LEAF_EXTENDED_LAST).map_or(0, |leaf| leaf.eax),
            model_id: LEAVES_NAME
                .filter_map(|leaf| self.leaf(leaf))
                .map(|leaf| letters(&[leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]))
                .collect::<String>()
                .trim()
                .to_owned(),
        }
    }

    fn leaf(&self, leaf: u32) -> Option<&kvm_cpuid_entry2> {
        self.entries.iter().find(|entry| entry.function == leaf)
    }
}

/// Text in registers, up to its end.
fn letters(registers: &[u32]) -> String {
    let bytes = registers.iter().flat_map(|register| register.to_le_bytes());
    bytes.filter(|byte| (32..127).contains(byte)).map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc::vcpu::CpuTopology;

    fn entry(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn model() -> CpuModel {
        let word = |text: &str| u32::from_le_bytes(text.as_bytes().try_into().unwrap());
        let supported = [
            entry(0, [0xd, word("Auth"), word("cAMD"), word("enti")]),
            // Family 0xf + 0xa, model 0x21, stepping 2; ssse3, fpu.
            entry(1, [0x00a2_0f12, 0, 1 << 9, 1]),
            entry(0x8000_0000, [0x8000_0008, 0, 0, 0]),
            entry(0x8000_0002, [word("  A "), word("CPU\0"), 0, 0]),
        ];
        let topology = CpuTopology { cores: 1, threads: 1 };
        CpuModel::new(&supported, topology, false, &[]).unwrap()
    }

    fn change(name: &str, on: bool) -> CpuFeature {
        CpuFeature {
            name: name.to_owned(),
            on,
        }
    }

    #[test]
    fn properties_are_what_cpuid_says() {
        let properties = model().expand(&[]).unwrap();
        assert_eq!(properties.vendor, "AuthenticAMD");
        assert_eq!(
            (properties.family, properties.model, properties.stepping),
            (0x19, 0x21, 2)
        );
        assert_eq!((properties.level, properties.xlevel), (0xd, 0x8000_0008));
        assert_eq!(properties.model_id, "A CPU");
        for (name, on) in [
            ("ssse3", true),
            ("fpu", true),
            ("avx2", false),
            ("hypervisor", true),
            ("kvm", false),
        ] {
            assert_eq!(properties.features[name], on, "{name}");
        }
    }

    #[test]
    fn changes_show_as_far_as_the_host_goes() {
        let properties = model().expand(&[change("ssse3", false), change("avx2", true)]).unwrap();
        assert!(!properties.features["ssse3"] && !properties.features["avx2"]);
        assert_eq!(model().expand(&[change("avx3", true)]).unwrap_err(), "avx3");
    }
}
