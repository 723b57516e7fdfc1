//! What CPUID tells the guest: the host's features as far as KVM can give them, the features switched on and off by name,
//! and a topology of our own, in which the APIC id is the vCPU's number.

mod expand;
mod features;

use features::{Register, Word};
use ipc::Failure;
use ipc::vcpu::{CpuFeature, CpuTopology};
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const LEAF_BASIC: u32 = 1;
const LEAF_CACHES: u32 = 4;
const LEAF_POWER: u32 = 6;
const LEAF_PMU: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_KVM: u32 = 0x4000_0000;
const LEAF_KVM_LAST: u32 = 0x4000_00ff;
const LEAF_EXTENDED: u32 = 0x8000_0001;
const LEAF_ADDRESS_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHES: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const ECX_PDCM: u32 = 1 << 15;
const EDX_HT: u32 = 1 << 28;
const ECX_CMP_LEGACY: u32 = 1 << 1;
const EAX_ARAT: u32 = 1 << 2;

/// The CPUID of all vCPUs but for what differs between them.
#[derive(Debug, Clone)]
pub struct CpuModel {
    entries: Vec<kvm_cpuid_entry2>,
    topology: CpuTopology,
}

impl CpuModel {
    /// From what KVM supports. `tsc_deadline` says whether KVM's local APIC has the deadline timer, which older kernels
    /// do not list.
    ///
    /// # Errors
    /// Names a feature that is unknown, or wanted and not to be had.
    pub fn new(
        supported: &[kvm_cpuid_entry2],
        topology: CpuTopology,
        tsc_deadline: bool,
        changes: &[CpuFeature],
    ) -> Result<Self, Failure> {
        let mut model = Self {
            entries: supported.to_vec(),
            topology,
        };
        if let Some(basic) = model.entry_mut(LEAF_BASIC, 0) {
            basic.ecx |= ECX_HYPERVISOR;
            if tsc_deadline {
                basic.ecx |= ECX_TSC_DEADLINE;
            }
        }
        // The timer of KVM's local APIC runs in every idle state.
        if let Some(power) = model.entry_mut(LEAF_POWER, 0) {
            power.eax |= EAX_ARAT;
        }
        let available = model.clone();
        for change in changes {
            model.apply(change, &available)?;
        }
        model.add_topology();
        Ok(model)
    }

    /// How many bits a guest physical address has.
    pub fn physical_address_bits(&self) -> u32 {
        self.entries
            .iter()
            .find(|entry| entry.function == LEAF_ADDRESS_SIZES)
            .map_or(36, |entry| entry.eax & 0xff)
    }

    /// The entries for one vCPU.
    pub fn for_vcpu(&self, index: u16) -> Vec<kvm_cpuid_entry2> {
        let id = u32::from(index);
        let threads = u32::from(self.topology.threads);
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                LEAF_BASIC => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
                LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => entry.edx = id,
                LEAF_AMD_TOPOLOGY => {
                    entry.eax = id;
                    entry.ebx = (threads - 1) << 8 | (id / threads) & 0xff;
                }
                _ => {}
            }
        }
        entries
    }

    fn entry_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.entries
            .iter_mut()
            .find(|entry| entry.function == leaf && entry.index == subleaf)
    }

    fn register_mut(&mut self, word: Word) -> Option<&mut u32> {
        self.entry_mut(word.leaf, word.subleaf)
            .map(|entry| match word.register {
                Register::Eax => &mut entry.eax,
                Register::Ebx => &mut entry.ebx,
                Register::Ecx => &mut entry.ecx,
                Register::Edx => &mut entry.edx,
            })
    }

    fn has(&self, word: Word, bit: u8) -> bool {
        self.clone()
            .register_mut(word)
            .is_some_and(|register| *register & 1 << bit != 0)
    }

    fn apply(&mut self, change: &CpuFeature, available: &Self) -> Result<(), Failure> {
        let name = features::canonical(&change.name);
        let missing = || {
            Failure::new(format!(
                "this host cannot give the guest the CPU feature \"{}\"",
                change.name
            ))
        };
        match name.as_str() {
            "pmu" => return self.set_pmu(change.on, available).ok_or_else(missing),
            "kvm" => return self.set_kvm(change.on, available).ok_or_else(missing),
            _ => {}
        }
        let bits: Vec<(Word, u8)> = features::find(&name).collect();
        if bits.is_empty() {
            return Err(Failure::new(format!("unknown CPU feature \"{}\"", change.name)));
        }
        if change.on && !bits.iter().any(|(word, bit)| available.has(*word, *bit)) {
            return Err(missing());
        }
        for (word, bit) in bits {
            let on = change.on && available.has(word, bit);
            if let Some(register) = self.register_mut(word) {
                *register = *register & !(1 << bit) | u32::from(on) << bit;
            }
        }
        Ok(())
    }

    /// Performance counters: a leaf of their own, and the MSR that describes them.
    fn set_pmu(&mut self, on: bool, available: &Self) -> Option<()> {
        let host = available.clone().entry_mut(LEAF_PMU, 0).copied();
        if on && host.is_none_or(|entry| entry.eax & 0xff == 0) {
            return None;
        }
        if let Some(entry) = self.entry_mut(LEAF_PMU, 0) {
            *entry = kvm_cpuid_entry2 {
                function: LEAF_PMU,
                ..Default::default()
            };
            if let (true, Some(host)) = (on, host) {
                *entry = host;
            }
        }
        if let (false, Some(basic)) = (on, self.entry_mut(LEAF_BASIC, 0)) {
            basic.ecx &= !ECX_PDCM;
        }
        Some(())
    }

    /// KVM's own leaves.
    fn set_kvm(&mut self, on: bool, available: &Self) -> Option<()> {
        let is_kvm = |entry: &kvm_cpuid_entry2| (LEAF_KVM..=LEAF_KVM_LAST).contains(&entry.function);
        self.entries.retain(|entry| !is_kvm(entry));
        if on {
            let leaves: Vec<_> = available
                .entries
                .iter()
                .filter(|entry| is_kvm(entry))
                .copied()
                .collect();
            if leaves.is_empty() {
                return None;
            }
            self.entries.extend(leaves);
        }
        Some(())
    }

    /// Replaces what KVM passes on of the host's topology.
    fn add_topology(&mut self) {
        let threads = u32::from(self.topology.threads);
        let cores = u32::from(self.topology.cores);
        let in_socket = cores * threads;
        let thread_bits = threads.trailing_zeros();
        let id_bits = in_socket.next_power_of_two().trailing_zeros();
        let has_v2 = self.entries.iter().any(|entry| entry.function == LEAF_TOPOLOGY_V2);
        let has_v1 = self.max_leaf() >= LEAF_TOPOLOGY;
        let amd = self.is_amd();
        self.entries
            .retain(|entry| !matches!(entry.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2));
        for leaf in [(LEAF_TOPOLOGY, has_v1), (LEAF_TOPOLOGY_V2, has_v2)]
            .iter()
            .filter(|(_, present)| *present)
            .map(|(leaf, _)| *leaf)
        {
            // Level 0: threads of a core; level 1: cores of the package; level 2: the end.
            for (index, shift, count, kind) in [(0, thread_bits, threads, 1), (1, id_bits, in_socket, 2), (2, 0, 0, 0)]
            {
                self.entries.push(kvm_cpuid_entry2 {
                    function: leaf,
                    index,
                    flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                    eax: shift,
                    ebx: count,
                    ecx: kind << 8 | index,
                    ..Default::default()
                });
            }
        }
        // Ids reserved for those that share a cache, less one: the third level by a socket, the others by a core.
        let sharing = |level: u32| {
            if level >= 3 {
                in_socket.next_power_of_two() - 1
            } else {
                threads - 1
            }
        };
        let core_ids = cores.next_power_of_two() - 1;
        for entry in &mut self.entries {
            match entry.function {
                LEAF_BASIC => {
                    entry.ebx = entry.ebx & 0xff00_ffff | in_socket.min(255) << 16;
                    entry.edx = entry.edx & !EDX_HT | if in_socket > 1 { EDX_HT } else { 0 };
                }
                // A cache's level is in bits 5 to 7.
                LEAF_CACHES if entry.eax & 0x1f != 0 => {
                    let shared = sharing(entry.eax >> 5 & 7);
                    entry.eax = entry.eax & 0x3fff | shared << 14 | core_ids.min(63) << 26;
                }
                LEAF_AMD_CACHES if entry.eax & 0x1f != 0 => {
                    entry.eax = entry.eax & 0x3fff | sharing(entry.eax >> 5 & 7) << 14;
                }
                LEAF_EXTENDED if amd => {
                    entry.ecx = entry.ecx & !ECX_CMP_LEGACY | if in_socket > 1 { ECX_CMP_LEGACY } else { 0 };
                }
                LEAF_ADDRESS_SIZES if amd => entry.ecx = entry.ecx & !0xf0ff | id_bits << 12 | (in_socket - 1) & 0xff,
                // One node.
                LEAF_AMD_TOPOLOGY => entry.ecx = 0,
                _ => {}
            }
        }
    }

    fn max_leaf(&self) -> u32 {
        self.entries
            .iter()
            .find(|entry| entry.function == 0)
            .map_or(0, |entry| entry.eax)
    }

    /// AMD or Hygon, by the vendor string.
    fn is_amd(&self) -> bool {
        self.entries
            .iter()
            .find(|entry| entry.function == 0)
            .is_some_and(|entry| [*b"Auth", *b"Hygo"].contains(&entry.ebx.to_le_bytes()))
    }
}

#[cfg(test)]
mod tests;
