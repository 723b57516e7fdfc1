//! Queries that tell what the machine is. None waits for anything: what they say is known here.

use super::Vm;
use crate::cli;
use crate::config::Topology;
use ipc::info::{
    CpuDefinitionInfo, CurrentMachineParams, HostMemPolicy, HotpluggableCpu, MachineInfo, Memdev, MemoryInfo,
    TargetInfo, UuidInfo,
};
use ipc::qmp::{Command, CpuInstanceProperties, QmpError, Return};
use ipc::vcpu::MAX_VCPUS;

/// The architecture of every guest.
pub const TARGET: &str = "x86_64";

/// The answer to a query of this module.
pub fn answer(vm: &Vm, command: &Command) -> Option<Result<Return, QmpError>> {
    Some(Ok(match command {
        Command::QueryUuid => Return::Uuid(UuidInfo { uuid: uuid_text(vm) }),
        Command::QueryTarget => Return::Target(TargetInfo { arch: TARGET.into() }),
        Command::QueryMachines => Return::Machines(machines()),
        Command::QueryCurrentMachine => Return::CurrentMachine(CurrentMachineParams {
            // The ACPI tables have no S3.
            wakeup_suspend_support: false,
        }),
        Command::QueryIothreads => Return::IoThreads(super::objects::io_threads(vm)),
        Command::QueryHotpluggableCpus => Return::HotpluggableCpus(cpu_slots(vm.config.topology)),
        Command::QueryCpuDefinitions => Return::CpuDefinitions(cpu_models()),
        Command::QueryMemorySizeSummary => Return::MemorySize(MemoryInfo {
            base_memory: vm.config.ram_bytes,
        }),
        Command::QueryMemdev => Return::Memdevs(super::objects::memdevs(vm)),
        Command::QueryCommandLineOptions { option } => return Some(command_line_options(option.as_deref())),
        _ => return None,
    }))
}

/// The machine's UUID, all zeros if it has none.
pub fn uuid_text(vm: &Vm) -> String {
    uuid(vm.config.uuid.unwrap_or_default())
}

/// In the form of `-uuid`.
fn uuid(bytes: [u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (place, byte) in bytes.iter().enumerate() {
        if matches!(place, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text += &format!("{byte:02x}");
    }
    text
}

/// QMP's name of a CPU model's type.
pub fn cpu_type(model: &str) -> String {
    format!("{model}-{TARGET}-cpu")
}

fn machines() -> Vec<MachineInfo> {
    let entry = |(place, (name, _)): (usize, &(&str, &str))| MachineInfo {
        name: (*name).to_owned(),
        is_default: (place == 0).then_some(true),
        cpu_max: if *name == "none" { 1 } else { i64::from(MAX_VCPUS) },
        hotpluggable_cpus: false,
        numa_mem_supported: false,
        deprecated: false,
        default_cpu_type: cli::CPUS
            .first()
            .filter(|_| *name != "none")
            .map(|(model, _)| cpu_type(model)),
        acpi: *name != "none",
    };
    cli::MACHINES.iter().enumerate().map(entry).collect()
}

fn cpu_models() -> Vec<CpuDefinitionInfo> {
    let entry = |(name, _): &(&str, &str)| CpuDefinitionInfo {
        name: (*name).to_owned(),
        // What the guest gets is what this host has.
        migration_safe: Some(false),
        is_static: false,
        unavailable_features: Some(Vec::new()),
        typename: cpu_type(name),
        deprecated: false,
    };
    cli::CPUS.iter().map(entry).collect()
}

/// Where the vCPU of this number is.
pub fn place(topology: Topology, index: usize) -> CpuInstanceProperties {
    let index = index as i64;
    let (cores, threads) = (i64::from(topology.cores), i64::from(topology.threads));
    CpuInstanceProperties {
        socket_id: index / (cores * threads),
        core_id: index / threads % cores,
        thread_id: index % threads,
    }
}

/// A vCPU's object.
pub fn cpu_path(index: usize) -> String {
    format!("/machine/unattached/device[{index}]")
}

/// All slots, each with its vCPU: none is left for a vCPU to come. The last comes first, as clients know it.
fn cpu_slots(topology: Topology) -> Vec<HotpluggableCpu> {
    let model = cli::CPUS.first().map_or("", |(model, _)| model);
    let slot = |index| HotpluggableCpu {
        ty: cpu_type(model),
        vcpus_count: 1,
        props: place(topology, index),
        qom_path: Some(cpu_path(index)),
    };
    (0..usize::from(topology.vcpus)).rev().map(slot).collect()
}

/// Guest memory: a memfd that several processes map and that fills as the guest uses it.
pub fn memory(bytes: u64) -> Memdev {
    Memdev {
        id: None,
        size: bytes,
        merge: false,
        dump: false,
        prealloc: false,
        share: true,
        reserve: Some(false),
        host_nodes: Vec::new(),
        policy: HostMemPolicy::Default,
    }
}

fn command_line_options(name: Option<&str>) -> Result<Return, QmpError> {
    let options = cli::command_line_options(name);
    match name {
        Some(name) if options.is_empty() => Err(QmpError::generic(format!("invalid option name: {name}"))),
        _ => Ok(Return::CommandLineOptions(options)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_has_the_form_of_the_option() {
        assert_eq!(uuid([0; 16]), "00000000-0000-0000-0000-000000000000");
        let bytes = std::array::from_fn(|place| 0x10 * place as u8 + 0xf - place as u8);
        assert_eq!(uuid(bytes), "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0");
    }

    #[test]
    fn vcpus_are_numbered_through_threads_then_cores_then_sockets() {
        let topology = Topology {
            vcpus: 12,
            sockets: 2,
            cores: 3,
            threads: 2,
        };
        let places: Vec<_> = (0..12)
            .map(|index| place(topology, index))
            .map(|place| (place.socket_id, place.core_id, place.thread_id))
            .collect();
        assert_eq!(places[..4], [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]);
        assert_eq!(places[5..8], [(0, 2, 1), (1, 0, 0), (1, 0, 1)]);
        let slots = cpu_slots(topology);
        assert_eq!(slots.len(), 12);
        assert_eq!(slots[0].props, place(topology, 11));
        assert_eq!(slots[11].qom_path.as_deref(), Some("/machine/unattached/device[0]"));
    }

    #[test]
    fn exactly_one_machine_is_the_default() {
        assert_eq!(
            machines()
                .iter()
                .filter(|machine| machine.is_default == Some(true))
                .count(),
            1
        );
    }
}
